"""Weights for other frameworks: ``python -m densessl.export CHECKPOINT --to torchvision --out FILE``."""

from __future__ import annotations

import argparse
import pickle
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from densessl._huggingface import RESNETS, create_timm, write_resnet, write_timm
from densessl._mismatch import misfit
from densessl._naming import to_detectron2, to_huggingface
from densessl._reading import safetensors
from densessl._resnets import NAMES, cut_from, expected_of
from densessl._whole import is_whole
from densessl.checkpoints import Weights, load_backbone, match_backbone, read_backbone

__all__ = ["FORMATS", "Weights", "architecture", "convert", "export", "load_backbone", "read_backbone"]

FORMATS = {
    "torchvision": (".safetensors", ".pth", ".pt"),
    "timm": (".safetensors", ".pth", ".pt"),
    "detectron2": (".pkl",),
    "mmdetection": (".pth",),
    "mmsegmentation": (".pth",),
    "huggingface": ("",),
}
"""The names that weights can be written in, each with the suffixes that its readers take; none: a folder."""

_TOPS = re.compile(r"(conv1|bn1|layer[1-4])\.")


def convert(read: Weights, to: str) -> Weights:
    """Gives the weights of a backbone the names of another framework.

    - ``"torchvision"``: a ResNet, or with parts a detector such as ``fcos_resnet50_fpn`` without prediction layers.
    - ``"timm"``: a ResNet, whose names are the same, or another backbone under its own names.
    - ``"detectron2"``: a ResNet under the names that its ``matching_heuristics`` expects, without what comes before
      ``stem`` and ``res2``, so that one file fits C4 and FPN detectors.
    - ``"mmdetection"``, ``"mmsegmentation"``: a ResNet under names that begin with ``backbone.``.
    - ``"huggingface"``: a ResNet of 18 to 152 layers, as in transformers' ``ResNetModel``.

    Args:
        read: Weights from ``read_backbone``.
        to: Name of the framework, one of the above.

    Returns:
        ``weights`` holds the tensors under the new names (for torchvision with the ``parts``); ``dropped`` also names
        those that have no place there.

    Raises:
        ValueError: If the framework is unknown, or needs a ResNet of torchvision's and the weights are none.

    Examples:
        >>> read = read_backbone("checkpoint.pth")
        >>> "backbone.conv1.weight" in convert(read, "mmdetection").weights
        True
    """
    if to not in FORMATS:
        raise ValueError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}")
    core = {name: value for name, value in read.weights.items() if _TOPS.match(name)}
    resnet = any(misfit(core, expected_of(core, name)) is None for name in NAMES)
    weights = core if resnet else dict(read.weights)
    if to != "timm" or not (resnet or is_whole(weights)):
        name = architecture(weights)
        if to == "huggingface" and name not in RESNETS:
            raise ValueError(f"weights: expected one of {', '.join(RESNETS)} for transformers' ResNetModel, got {name}")
    prefix = "backbone.body." if read.parts and to == "torchvision" else "backbone." if to.startswith("mm") else ""
    rename = {"detectron2": to_detectron2, "huggingface": to_huggingface}.get(to, str)
    placed = {prefix + rename(name): value for name, value in weights.items()}
    dropped = read.dropped | {name: "no part of a ResNet" for name in read.weights if name not in weights}
    if to == "torchvision":
        return Weights(placed | read.parts, {}, dropped)
    left = "FPN and towers are written in torchvision's names only"
    return Weights(placed, {}, dropped | dict.fromkeys(read.parts, left))


def export(
    checkpoint: str | Path, to: str, out: str | Path, root: str | None = None, model: str | None = None
) -> Weights:
    """Reads a checkpoint and writes its weights for another framework.

    Args:
        checkpoint: File to read, as in ``read_backbone``.
        to: Name of the framework, as in ``convert``.
        out: File to write: ``*.safetensors``, ``*.pth`` or ``*.pt`` for torchvision and timm, ``*.pkl`` for detectron2
            (NumPy arrays), ``*.pth`` for OpenMMLab's frameworks. For Hugging Face it is a folder, which then holds
            ``config.json`` and ``model.safetensors``.
        root: What stands before the backbone's names, as in ``read_backbone``.
        model: For ``"timm"`` and ``"huggingface"``, the name of the timm model that the weights belong to. Every name
            and shape is then compared with that model, and the folder is one that timm, AutoModel and TimmWrapperModel
            open. Top modules that the checkpoint lacks are written as timm initialises them and are named in
            ``dropped``. None means a ResNet of torchvision's, or for ``"timm"`` any backbone under the names that it
            has.

    Returns:
        The weights that were written, and every tensor that was left out, with the reason.

    Raises:
        ValueError: If ``read_backbone`` or ``convert`` raises it, if the suffix or the model is unknown, or if ``out``
            is the checkpoint itself.
        ImportError: If ``read_backbone`` raises it, or if a model is named and timm is missing.

    Examples:
        >>> written = export("checkpoint.pth", to="timm", out="backbone.pth")
    """
    out = Path(out)
    if to not in FORMATS:
        raise ValueError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}")
    if model is not None and to not in ("timm", "huggingface"):
        raise ValueError(f"model: expected None for {to}, which takes ResNets only, got {model!r}")
    if out.suffix not in FORMATS[to]:
        wanted = "a folder" if to == "huggingface" else "a file " + " or ".join("*" + s for s in FORMATS[to])
        raise ValueError(f"out: expected {wanted} for {to}, got {out}")
    if out.resolve() == Path(checkpoint).resolve():
        raise ValueError(f"out: {out} is the checkpoint itself")
    if model is not None:
        return _export_timm(checkpoint, to, out, root, model)
    read = read_backbone(checkpoint, root)
    try:
        done = convert(read, to)
    except ValueError as error:
        names, _ = cut_from(read.weights)
        advice = f"; name it, for instance --model {names[0]}" if names and to in ("timm", "huggingface") else ""
        raise ValueError(f"checkpoint: {checkpoint} does not fit: {error}{advice}") from error
    if to == "huggingface":
        write_resnet({name: value for name, value in read.weights.items() if _TOPS.match(name)}, out)
    else:
        _write(done.weights, to, out)
    return done


def _export_timm(checkpoint: str | Path, to: str, out: Path, root: str | None, model: str) -> Weights:
    network = create_timm(model)
    own = network.state_dict()

    def expect(names: Collection[str]) -> dict[str, Tensor]:
        tops = {name.partition(".")[0] for name in names}
        return {name: value for name, value in own.items() if not names or name.partition(".")[0] in tops}

    done = match_backbone(own, checkpoint, root, expect, f"the {model}")
    if to == "timm":
        _write(done.weights, to, out)
        return done
    network.load_state_dict(done.weights, strict=False)
    write_timm(network, out)
    fresh = {name: "not in the checkpoint: written as initialised" for name in own if name not in done.weights}
    return Weights(dict(network.state_dict()), {}, done.dropped | fresh)


def _write(weights: Mapping[str, Tensor], to: str, out: Path) -> None:
    # These are copies: torch.save would write the whole storage behind a view, and safetensors refuses tensors that are
    # not contiguous.
    tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    part = out.with_name(out.name + ".part")  # never half a file under the final name
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        # Not save_file, which makes files that others cannot read.
        part.write_bytes(safetensors().save(tensors, metadata={"format": "pt"}))
    elif to == "detectron2":
        arrays = {n: (v.float() if v.is_floating_point() else v).numpy() for n, v in tensors.items()}
        with part.open("wb") as file:
            pickle.dump({"model": arrays, "__author__": "densessl", "matching_heuristics": True}, file)
    else:
        torch.save({"state_dict": tensors, "meta": {}} if to.startswith("mm") else tensors, part)
    part.replace(out)


def architecture(weights: Mapping[str, Tensor]) -> str:
    """The name of the torchvision ResNet that the weights are of, by names and shapes; any number of input channels.

    Raises:
        ValueError: If the weights belong to none of them; the message names the first entry that differs from the
            closest.

    Examples:
        >>> from torchvision.models import resnet18
        >>> architecture({name: value for name, value in resnet18().state_dict().items() if not name.startswith("fc.")})
        'resnet18'
    """
    problems = []
    for name in NAMES:
        expected = expected_of(weights, name)
        problem = misfit(weights, expected)
        if problem is None:
            return name
        problems.append((len(weights.keys() ^ expected.keys()), f"closest is {name}, but {problem}"))
    names, last = cut_from(weights)
    if names:
        raise ValueError(f"weights: expected a whole ResNet of torchvision's, got a {' or '.join(names)} up to {last}")
    closest = min(problems, key=lambda entry: entry[0])[1]
    raise ValueError(
        f"weights: expected those of a ResNet of torchvision's; {closest}. Other backbones keep the names of their "
        "own library: load_backbone puts them into such a model"
    )


def main(arguments: Sequence[str] | None = None, program: str = "python -m densessl.export") -> int:
    """The command line; see ``python -m densessl.export --help``.

    Args:
        arguments: Arguments of the command line; None means those of the process.
        program: The command, as the help names it.

    Returns:
        The exit code: 2 after an error of the user's, which is told in one line.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description="Writes a backbone's weights in the form that another framework reads.",
    )
    parser.add_argument(
        "checkpoint", help="File of the weights, written by this library, torchvision, timm or a published method."
    )
    parser.add_argument("--to", required=True, choices=FORMATS, help="The framework to write for.")
    parser.add_argument(
        "--out",
        required=True,
        help="File to write: *.safetensors, *.pth or *.pt for torchvision and timm, *.pkl for detectron2, *.pth for "
        "mmdetection and mmsegmentation. For huggingface, a folder.",
    )
    parser.add_argument(
        "--root", help="Text before the names of the backbone's entries, if the file holds several networks."
    )
    parser.add_argument(
        "--model",
        help="Name of the timm model that the weights are of, for timm and huggingface. Whole ResNets of torchvision's "
        "need none.",
    )
    parser.add_argument("--list", action="store_true", help="Name every entry that was left out.")
    chosen = parser.parse_args(arguments)
    try:
        done = export(chosen.checkpoint, chosen.to, chosen.out, chosen.root, chosen.model)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{chosen.out}: {len(done.weights)} entries, named for {chosen.to}")
    reasons: dict[str, list[str]] = {}
    for name, why in done.dropped.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        tops = dict.fromkeys(".".join(name.split(".")[: 2 if name.startswith("module.") else 1]) for name in names)
        print(f"left out {len(names)} of {', '.join(tops)}: {why}")
        if chosen.list:
            print(*(f"    {name}" for name in names), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
