"""What a report says, gathered from the run's options, its tables and its files."""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml
from jsonargparse import Namespace

from examples.pretrain.common.known_as import program_of
from examples.pretrain.common.run_folder import SETTINGS, last_checkpoint
from examples.pretrain.common.samples import optional_class_names
from examples.pretrain.common.scores import IMAGES, NOISE, SCORES, changes, told

UNMATCHED = "health/images_without_match"
Curves = dict[str, list[tuple[float, float]]]

RESNETS = ("resnet", "resnext", "wide_resnet")  # of torchvision, which the transfer recipes take


def read_curves(folder: Path) -> Curves:
    """All columns of the run's tables, earlier parts of a continued run included: (step, value), by name."""
    curves: Curves = defaultdict(list)
    tables = sorted(folder.glob("metrics-*.csv"), key=lambda path: (len(path.name), path.name))
    for path in [*tables, folder / "metrics.csv"]:
        if not path.is_file():
            continue
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name and name != "step" and value and row.get("step"):
                        curves[name].append((float(row["step"]), float(value)))
    return {name: sorted(points) for name, points in curves.items()}


def settings(config: Namespace) -> str:
    """All options as YAML."""
    values = json.loads(json.dumps(config.clone().as_dict(), default=str))
    values.pop("config", None)
    return yaml.safe_dump(values, sort_keys=False)


def weights_of(out: Path) -> Path:
    """The file of the run that comes next in line: the encoder, else the last checkpoint, else the best."""
    known = [out / "encoder.safetensors", out / "checkpoints" / "last.ckpt", out / "best.safetensors"]
    return next((path for path in known if path.is_file()), known[0])


def next_commands(config: Namespace, weights: Path) -> dict[str, str]:
    """What comes next, by purpose, with the run's own paths."""
    name, folder, out = config.backbone.name, str(config.data.folder), Path(config.out)
    layer = config.backbone.get("layer", "layer4")
    file, photos = shlex.quote(str(weights)), shlex.quote(folder)
    labels = f" --labels {shlex.quote(config.probe.labels)}" if config.probe.labels else ""
    whole = name.startswith(RESNETS) and layer == "layer4"
    cut = "." in layer  # inside one of the network's parts, as timm's blocks.4
    masks, classes = labelled_set(config.probe.labels)
    if whole:
        to = "torchvision"
        tune = (
            "python examples/transfer/segmentation.py fit --config examples/transfer/configs/own_masks_fcn_r18.yaml "
            f"--data.folder {shlex.quote(masks)} --model.classes {classes} --model.backbone {name} "
            f"--model.pretrained {file} "
            f"--out {shlex.quote(str(out / 'segmentation'))}"
        )
    else:  # the transfer recipes take whole ResNets
        to = "timm" if cut else f"timm --model {name}"
        tune = (
            "# In Python: backbone is a module for your own training; it gives maps of width channels.\n"
            "from examples.pretrain.common.backbones import make_backbone\n"
            f"backbone, width = make_backbone({name!r}, {layer!r}, {str(weights)!r}, {config.data.size})"
        )
    evaluate = {"evaluate": f"python examples/evaluate.py {file} --photos {photos}{labels}"}
    export = f"python -m densessl.export {file} --to {to} --out {shlex.quote(str(out / 'backbone.pth'))}"
    exports = {} if cut and name.startswith(RESNETS) else {"export": export}
    return evaluate | exports | {"fine-tune": tune}


def of_a_cut(config: Namespace) -> str:
    """What to know of the file of a backbone that ends inside a part; empty where it ends with one."""
    layer = config.backbone.get("layer", "layer4")
    if "." not in layer:
        return ""
    part = layer.partition(".")[0]
    if config.backbone.name.startswith(RESNETS):
        return (
            f"There is no command to export: the backbone ends at {layer}, inside its part {part}, and other libraries "
            f"load whole stages of ResNets only. In Python, the lines under fine-tune make the network up to {layer} "
            f"with these weights. For a file that other libraries load, train with --backbone.layer {part}."
        )
    return (
        f"The backbone ends at {layer}, inside its part {part}, so the exported file holds the network up to there, "
        f"under its own names. Load it into the whole {config.backbone.name} by load_state_dict(..., strict=False), "
        'and check that the result has no unexpected_keys: see "A backbone cut in its middle" in docs/weights.md.'
    )


def labelled_set(labels: str | None) -> tuple[str, str]:
    """Folder and number of classes for the segmentation recipe: the probe's where it has the recipe's layout."""
    if labels is not None and Path(labels, "masks", "train").is_dir() and Path(labels, "masks", "val").is_dir():
        return labels, str(len(optional_class_names(Path(labels), "probe.labels")) or "CLASSES")
    return "MASKS", "CLASSES"


def continuing(config: Namespace, recipe: type) -> dict[str, str]:
    """How a run that was stopped goes on; nothing where it left no checkpoint."""
    if not last_checkpoint(config.out).is_file():
        return {}
    program = os.path.relpath(program_of(recipe))
    settings = shlex.quote(str(Path(config.out, SETTINGS)))
    return {"continue": f"python {shlex.quote(program)} fit --config {settings} --ckpt_path last"}


def nothing_learnt(curves: Curves, moved: bool, normed: bool) -> str:
    """Why the scores of a run say nothing about what it has learnt, in words; empty where they do.

    Batch norm's statistics move in such a run too, and the scores with them.

    Args:
        curves: As from ``read_curves``.
        moved: Whether a weight of the backbone has changed.
        normed: Whether there are scores that batch norm's statistics may have changed.
    """
    unmatched = [value for _, value in curves.get(UNMATCHED, ())]
    if unmatched and min(unmatched) == 1:
        return (
            "No image had a pair of matching cells in any logged step, so a loss on pairs had nothing to learn from: "
            "look at the matcher and at the views."
        )
    if not moved:
        alone = "; changes of the scores come from batch norm's statistics alone" if normed else ""
        return f"No weight of the backbone has changed{alone}."
    return ""


def better_or_worse(readings: Sequence[Mapping[str, float]], score: str, noise: Mapping[str, float]) -> str:
    """What the probe says of the run, in words.

    Args:
        readings: The readings of the probe, from the start of the run to its end.
        score: The score by which ``best.safetensors`` is kept. Where others contradict it, it decides nothing else.
        noise: Up to how large a change of each score counts as none, as from ``noise_of``.
    """
    if len(readings) < 2:
        return "The probe was read once or never: it says nothing about this run."
    rose, fell = changes(readings[0], readings[-1], noise)
    first, last = readings[0][score], readings[-1][score]
    best = max(readings, key=lambda row: row[score])
    if rose and fell:
        return (
            f"Mixed: {told(rose, 'rose')}, and {told(fell, 'fell')}. Choose by what you need the backbone for; "
            f"best.safetensors is the best by {score} alone, of step {best['step']:.0f} with {best[score]:.3f}."
        )
    how = "better than it started" if score in rose else "worse than it started" if score in fell else ""
    if not how:
        others = told(rose, "rose") or told(fell, "fell")
        more = f" by this score; {others}" if others else ", because no score changed by more than its noise"
        how = f"level with its start{more}"
    text = f"The score {score} went from {first:.3f} to {last:.3f}: the backbone is {how}."
    if best["step"] != readings[-1]["step"]:
        text += f" It was best at step {best['step']:.0f} with {best[score]:.3f}: best.safetensors holds that one."
    return text


def told_noise(names: Iterable[str], noise: Mapping[str, float], photos: int, labelled: int) -> str:
    """What counts as noise in these scores, and why, in words.

    Args:
        names: Names of the scores that were read.
        noise: As from ``noise_of``.
        photos: Number of photos, as for ``noise_of``.
        labelled: Number of labelled images, as for ``noise_of``.
    """
    parts = []
    for of, what in (("pck", f"{photos} photos"), ("neighbors", f"{labelled} labelled images")):
        alike = [name for name in SCORES if name in names and name.startswith("pck") == (of == "pck")]
        if alike:
            parts.append(f"up to {noise[of]:.3f} in {' and '.join(alike)} (of {what})")
    return (
        f"Changes of {', '.join(parts)} count as noise. Runs that differ by their seed alone mostly differ by less "
        f"than {NOISE}. With fewer than {IMAGES} images the scores vary more, in proportion to 1 / sqrt(images)."
    )


def last_of(curves: Curves, name: str) -> float:
    """The last value of a column; NaN where there is none."""
    return curves[name][-1][1] if curves.get(name) else math.nan


def duration(seconds: float) -> str:
    """Hours, minutes or seconds, whichever is readable."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
