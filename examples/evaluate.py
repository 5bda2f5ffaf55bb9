"""Scores a backbone on your own images, beside the weights it started from, ImageNet weights and random weights.

    python examples/evaluate.py runs/own/encoder.safetensors --photos FOLDER
    python examples/evaluate.py WEIGHTS --photos FOLDER --labels LABELLED --backbone resnet50 --layer layer4

CHECKPOINT is any file that ``densessl.checkpoints.load_backbone`` reads. The config.yaml that a run writes beside its
file says which network it is, how its images are prepared, and which images were kept out of the training. If
``--photos`` is the folder that the run was trained on, only those are scored. The table is printed, and written with
pictures as evaluation.html and .md.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from densessl.augment.presets import IMAGENET_MEAN, IMAGENET_STD
from examples.pretrain.common.backbones import make_backbone
from examples.pretrain.common.bar import speak_plainly
from examples.pretrain.common.data.finding import find_photos
from examples.pretrain.common.data.label_masks import mask_warning
from examples.pretrain.common.data.sources import FolderSource, evenly
from examples.pretrain.common.pages import facts, heading, page, paragraph, table
from examples.pretrain.common.report.gallery import gallery, gallery_html, gallery_strip
from examples.pretrain.common.report.write import meanings
from examples.pretrain.common.samples import Labels, read_labels, read_squares
from examples.pretrain.common.scores import SCORES, Form, frozen, scores, settled

log = logging.getLogger("evaluate")

SHOWN = 4
OWN_NAMES = {
    "backbone.init": "CHECKPOINT", "backbone.name": "--backbone", "backbone.layer": "--layer", "data.size": "--size",
}  # fmt: skip


class Setting(NamedTuple):
    """What the run's config.yaml or the command line says.

    Attributes:
        name: Name of the backbone.
        layer: Layer after which it is cut.
        form: How images go into it.
        start: Where the run began, ``backbone.init``; None: not known.
        seed: Of the run.
        folder: That the run was trained on; None: not known.
        held_out: ``probe.images`` of the run.
        advice: What to add to an error about the file, where its network is not known but assumed.
    """

    name: str
    layer: str
    form: Form
    start: str | None
    seed: int
    folder: str | None
    held_out: int | None
    advice: str = ""


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Scores the networks, prints and writes the comparison; returns the scores by network."""
    args = arguments(argv)
    speak_plainly()
    logging.getLogger().setLevel(logging.WARNING)
    out = args.out or args.checkpoint.parent / "evaluation"
    try:
        setting = setting_of(args)
        make_folder(out)
        photos, note = read_photos(args, setting)
        labels = None
        if args.labels is not None:
            labels = read_labels(args.labels, setting.form.channels, setting.form.size, args.images, "--labels")
        found, maps, missing = compare(args.checkpoint, setting, photos, labels)
    except (ValueError, OSError) as error:
        raise SystemExit(f"evaluate: error: {error}") from error
    about = {"file": str(args.checkpoint), "network": f"{setting.name}, {setting.layer}", "photos": note}
    if labels is not None:
        about["labelled"] = (
            f"{args.labels}: {len(labels.fit)} to fit, {len(labels.test)} to test, "
            f"{labels.counted} classes{labels.beside}"
        )
    print(write(out, found, photos[:SHOWN], maps, about, missing))
    if labels is not None:
        print(f"labelled: {about['labelled']}")
    print(f"written: {out / 'evaluation.html'}, {out / 'evaluation.md'}")
    return found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="The file that holds the backbone.")
    add("--photos", required=True, help="Folder of photos, best such that the backbone was not trained on.")
    add("--labels", help="Folder of labelled images, with images/ and masks/ in it.")
    add("--images", type=int, default=200, help="Greatest number of photos, and of labelled images (%(default)s).")
    run = "the run's own if its config.yaml lies beside the file"
    add("--backbone", help=f"Name of the network, of torchvision or timm ({run}, else resnet50).")
    add("--layer", help=f"Name of the layer after which the network is cut ({run}, else layer4).")
    add("--size", type=int, help=f"Side in pixels of the squares that are scored ({run}, else 224).")
    add("--mean", help=f"One number, or one for each channel with commas between, that is subtracted from images in "
        f"0..1 ({run}, else ImageNet's).")  # fmt: skip
    add("--std", help=f"One number, or one for each channel with commas between, by which images are divided after "
        f"that ({run}, else ImageNet's).")  # fmt: skip
    add("--out", type=Path, help="Folder for the comparison (evaluation, beside the file).")
    args = parser.parse_args(argv)
    for name in ("images", "size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    return args


def setting_of(args: argparse.Namespace) -> Setting:
    """What network the file holds; ValueError if there is no such file."""
    if not args.checkpoint.is_file():
        raise ValueError(f"CHECKPOINT: expected a file, got {args.checkpoint}, which is missing")
    near = [args.checkpoint.parent / "config.yaml", args.checkpoint.parent.parent / "config.yaml"]
    known = next((path for path in near if path.is_file()), None)
    config = settings_in(known) if known else {}
    backbone, data = config.get("backbone", {}), config.get("data", {})
    channels = data.get("channels", 3)
    form = Form(
        channels,
        args.size or data.get("size", 224),
        numbers(args.mean, "--mean", channels) or data.get("mean", IMAGENET_MEAN),
        numbers(args.std, "--std", channels) or data.get("std", IMAGENET_STD),
    )
    if min(form.std) <= 0:
        raise ValueError(f"--std: expected numbers above 0, got {args.std}")
    return Setting(
        args.backbone or backbone.get("name", "resnet50"),
        args.layer or backbone.get("layer", "layer4"),
        form,
        backbone.get("init"),
        config.get("seed", 0),
        data.get("folder"),
        config.get("probe", {}).get("images"),
        ""
        if args.backbone or backbone
        else ". No config.yaml lies beside the file, so resnet50 was assumed: name its own network with "
        "--backbone NAME --layer LAYER",
    )


def numbers(text: str | None, option: str, channels: int) -> list[float] | None:
    """A number for each channel; one stands for all. None where the option was not given."""
    if text is None:
        return None
    try:
        found = [float(number) for number in text.split(",")]
    except ValueError:
        found = []
    found = found * channels if len(found) == 1 else found
    if len(found) != channels or not all(map(math.isfinite, found)):
        raise ValueError(f"{option}: expected one number, or {channels} with commas between, got {text}")
    return found


def settings_in(path: Path) -> dict[str, Any]:
    """The settings of a run; none where the file is that of another program, ValueError where it cannot be read."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: expected the settings of a run, got no YAML: {' '.join(str(error).split())}"
        ) from error
    is_ours = isinstance(config, dict) and all(isinstance(config.get(part), dict) for part in ("backbone", "data"))
    return config if is_ours else {}


def make_folder(path: Path) -> None:
    """Makes the folder for the comparison, before the minutes that it takes; ValueError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: expected a folder that can be written to, got {path}: {error.strerror}") from error


def read_photos(args: argparse.Namespace, setting: Setting) -> tuple[list[Tensor], str]:
    """The photos to score on, and what they are: those kept out of the run, where its own folder is given."""
    paths, what = find_photos(args.photos, "--photos"), f"of {args.photos}"
    masks = mask_warning(paths, "--photos")
    if masks is not None:
        log.warning("%s", masks)
    if setting.folder is not None and Path(setting.folder).resolve() == Path(args.photos).resolve():
        source = FolderSource(args.photos)
        source.hold_out(setting.held_out)
        held_out = source.held_out()
        what += ", kept out of the training" if held_out else ", which were TRAINED ON"
        paths = held_out or paths
    photos = read_squares([paths[i] for i in evenly(len(paths), args.images)], *setting.form[:2])
    if not photos:
        raise ValueError(f"--photos: expected photos, got {len(paths)} files of which none can be read")
    return photos, f"{len(photos)} {what}"


def compare(
    checkpoint: Path, setting: Setting, photos: list[Tensor], labels: Labels | None
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor], dict[str, str]]:
    """Scores and maps by network, and why a network could not be had."""
    starts = {"this file": str(checkpoint), "its start": setting.start, "ImageNet": "imagenet", "random": "random"}
    if setting.start in (None, "imagenet", "random"):
        del starts["its start"]  # it is one of the others, or not known
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found, maps, missing = {}, {}, {}
    for name, init in starts.items():
        try:
            backbone = settled(network(setting, init).to(device), photos, setting.form)
        except Exception as error:  # no network, no such weights, a file that is gone: whatever the libraries raise
            if name == "this file":
                advice = setting.advice if "does not fit" in str(error) else ""
                raise ValueError(in_own_words(error) + advice) from error
            missing[name] = in_own_words(error).removeprefix("CHECKPOINT: ")[:500]  # it is not of the file
            continue
        label = f"{name} (its start)" if init == setting.start and name != "its start" else name
        with frozen(backbone, setting.form) as features:
            found[label] = scores(features, photos, labels)
            maps[label] = features(torch.stack(photos[:SHOWN])).cpu()
    return found, maps, missing


def in_own_words(error: Exception) -> str:
    """An error of the recipes' parts on one line, which names this command's arguments in place of the recipes'."""
    text = " ".join(str(error).split()).partition(" Otherwise begin ")[0]  # what follows is advice for a training
    for theirs, ours in OWN_NAMES.items():
        text = text.replace(theirs, ours)
    return text


def network(setting: Setting, init: str) -> nn.Module:
    """The backbone with these weights; random ones are those that the run began with."""
    torch.manual_seed(setting.seed)
    return make_backbone(setting.name, setting.layer, init, setting.form.size, setting.form.channels)[0]


def write(
    out: Path,
    found: dict[str, dict[str, float]],
    photos: list[Tensor],
    maps: dict[str, Tensor],
    about: dict[str, str],
    missing: dict[str, str],
) -> str:
    """Writes evaluation.html and evaluation.md; returns the table."""
    names = [name for name in SCORES if name in next(iter(found.values()))]
    rows = [[label, *(f"{values[name]:.3f}" for name in names)] for label, values in found.items()]
    gone = [f"{name} is not in the table: {why}" for name, why in missing.items()]
    width = max(len(row[0]) for row in rows)
    printed = "\n".join(
        [f"{'':<{width}}  " + "  ".join(f"{name:>10}" for name in names)]
        + [f"{row[0]:<{width}}  " + "  ".join(f"{value:>10}" for value in row[1:]) for row in rows]
        + gone
    )
    pictures = gallery(photos, maps)
    text = page(
        f"Evaluation of {Path(about['file']).name}",
        facts(about),
        heading("Scores"),
        table(["network", *names], rows),
        paragraph(meanings(names), "soft"),
        *(paragraph(line, "warn") for line in gone),
        heading("The same photos through each network"),
        gallery_html(pictures),
    )
    (out / "evaluation.html").write_text(text, encoding="utf-8")
    lines = [f"# Evaluation of {about['file']}", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += [f"| network | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", meanings(names), "", *gone, ""]
    for index, row in enumerate(pictures):
        gallery_strip(row).save(out / f"photo-{index + 1}.png")
        lines += [f"![{', '.join(caption for caption, _ in row)}](photo-{index + 1}.png)", ""]
    (out / "evaluation.md").write_text("\n".join(lines), encoding="utf-8")
    return printed


if __name__ == "__main__":
    main()
