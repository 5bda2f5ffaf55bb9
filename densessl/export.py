"""Weights for other frameworks: ``python -m densessl.export CHECKPOINT --to torchvision --out FILE``."""

from __future__ import annotations

import argparse
import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from densessl._reading import safetensors
from densessl.checkpoints import CLASSIFIER, Weights, load_backbone, misfit, read_backbone

__all__ = ["FORMATS", "Weights", "architecture", "convert", "export", "load_backbone", "read_backbone"]

FORMATS = {
    "torchvision": (".safetensors", ".pth", ".pt"),
    "timm": (".safetensors", ".pth", ".pt"),
    "detectron2": (".pkl",),
    "mmdetection": (".pth",),
    "mmsegmentation": (".pth",),
}
"""The names that weights can be written in, each with the suffixes that its readers take."""

_RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
_FPN = re.compile(r"backbone\.fpn\.(inner|layer)_blocks\.(\d+)\.0\.(weight|bias)")
_EXTRA = re.compile(r"backbone\.fpn\.extra_blocks\.p([67])\.(weight|bias)")
_TOWER = re.compile(r"head\.(classification|regression)_head\.conv\.(\d+)\.(weight|bias)")


def convert(read: Weights, to: str) -> Weights:
    """Gives the weights of a ResNet, and of FPN and towers where there are any, the names of another framework.

    - ``"torchvision"``: a ResNet; with parts an ``fcos_resnet50_fpn`` without its prediction layers.
    - ``"timm"``: a ResNet, whose names are the same.
    - ``"detectron2"``: names as its ``matching_heuristics`` expects them, without what comes before ``stem``,
      ``res2``, ``fpn_lateral3``, ``head``: so one file fits C4 and FPN detectors.
    - ``"mmdetection"``, ``"mmsegmentation"``: ``backbone.*``, ``neck.*`` and, for the former, ``bbox_head.*``.

    Args:
        read: from ``read_backbone``.
        to: one of the above.

    Returns:
        ``weights`` by the new names, ``parts`` among them; ``dropped`` as before, with what has no place.

    Raises:
        ValueError: on an unknown name, or if the weights are no ResNet of torchvision's.
    """
    if to not in FORMATS:
        raise ValueError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}")
    architecture(read.weights)
    rename = {"detectron2": _detectron2_name, "mmdetection": _openmmlab_name, "mmsegmentation": _openmmlab_name}.get(to)
    if rename is not None:
        placed = {rename(name): value for name, value in read.weights.items()}
    elif read.parts and to == "torchvision":
        placed = {f"backbone.body.{name}": value for name, value in read.weights.items()}
    else:
        placed = dict(read.weights)
    dropped = dict(read.dropped)
    problem = "timm's ResNets have no detector around them" if to == "timm" else _unplaceable(read)
    levels = sum(name.endswith("weight") for name in read.parts if "inner_blocks" in name)
    for name, value in read.parts.items():
        if problem is not None:
            dropped[name] = problem
        elif to == "torchvision":
            placed[name] = value
        elif to == "mmsegmentation" and _TOWER.match(name):
            dropped[name] = "mmsegmentation has no FCOS head"
        else:
            placed[_part_name(name, levels, to)] = value
    return Weights(placed, {}, dropped)


def export(checkpoint: str | Path, to: str, out: str | Path) -> Weights:
    """Reads a checkpoint and writes its weights for another framework.

    Args:
        checkpoint: as for ``read_backbone``.
        to: as for ``convert``.
        out: file to write; ``*.safetensors``, ``*.pth`` or ``*.pt`` for torchvision and timm, ``*.pkl`` for
            detectron2 (NumPy arrays), ``*.pth`` for the other two.

    Returns:
        What was written, and every tensor that was not, with the reason.

    Raises:
        ValueError: as ``read_backbone`` and ``convert`` do, on another suffix, and if ``out`` is the checkpoint.
        ImportError: as ``read_backbone`` does.
    """
    out = Path(out)
    if to not in FORMATS:
        raise ValueError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}")
    if out.suffix not in FORMATS[to]:
        raise ValueError(f"out: expected a file {' or '.join('*' + s for s in FORMATS[to])} for {to}, got {out}")
    if out.resolve() == Path(checkpoint).resolve():
        raise ValueError(f"out: {out} is the checkpoint itself")
    read = read_backbone(checkpoint)
    try:
        done = convert(read, to)
    except ValueError as error:
        raise ValueError(f"checkpoint: {checkpoint} does not fit: {error}") from error
    # Copies: torch.save would write the whole storage behind a view, safetensors refuses what is not contiguous.
    tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in done.weights.items()}
    part = out.with_name(out.name + ".part")  # never half a file under the final name
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        safetensors().save_file(tensors, part, metadata={"format": "pt"})
    elif to == "detectron2":
        arrays = {n: (v.float() if v.is_floating_point() else v).numpy() for n, v in tensors.items()}
        with part.open("wb") as file:
            pickle.dump({"model": arrays, "__author__": "densessl", "matching_heuristics": True}, file)
    else:
        torch.save({"state_dict": tensors, "meta": {}} if to.startswith("mm") else tensors, part)
    part.replace(out)
    return done


def architecture(weights: Mapping[str, Tensor]) -> str:
    """The name of the torchvision ResNet that the weights are of, by names and shapes; any number of input channels.

    Raises:
        ValueError: if they are of none, naming the first entry that differs from the closest.
    """
    problems = []
    for name in _RESNETS:
        expected = dict(_entries(name))
        if "conv1.weight" in weights and weights["conv1.weight"].ndim == 4:
            shape = expected["conv1.weight"].shape
            expected["conv1.weight"] = torch.empty(
                (shape[0], weights["conv1.weight"].shape[1], *shape[2:]), device="meta"
            )
        problem = misfit(weights, expected)
        if problem is None:
            return name
        problems.append((len(weights.keys() ^ expected.keys()), f"closest is {name}, but {problem}"))
    closest = min(problems, key=lambda entry: entry[0])[1]
    raise ValueError(
        f"weights: expected those of a ResNet of torchvision's; {closest}. Other backbones keep the names of their "
        "own library: load_backbone puts them into such a model"
    )


@lru_cache
def _entries(name: str) -> Mapping[str, Tensor]:
    with torch.device("meta"):  # shapes, no values
        model = torchvision.models.get_model(name, weights=None)
    return {key: value for key, value in model.state_dict().items() if not CLASSIFIER.match(key)}


def _detectron2_name(name: str) -> str:
    if not name.startswith("layer"):
        return "stem." + name.replace("bn1.", "conv1.norm.")
    stage, rest = int(name[5]) + 1, name[7:]
    rest = rest.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return f"res{stage}." + re.sub(r"\bbn(\d)\.", r"conv\1.norm.", rest)


def _openmmlab_name(name: str) -> str:
    return f"backbone.{name}"


def _unplaceable(read: Weights) -> str | None:
    """Why FPN and towers are not those of torchvision's FCOS, the one structure that all three frameworks share."""
    for name, value in read.parts.items():
        known = _FPN.fullmatch(name) or _EXTRA.fullmatch(name)
        if tower := _TOWER.fullmatch(name):  # it repeats convolution, group norm, ReLU
            step = int(tower[2]) % 3
            known = tower if step < 2 and (tower[3] == "bias" or value.ndim == (1 if step else 4)) else None
        if known is None:
            return f"FPN and towers are not built as torchvision's FCOS: {name}"
    laterals = [v for n, v in read.parts.items() if "inner_blocks" in n and n.endswith("weight")]
    top = read.weights["layer4.0.downsample.0.weight"].shape[0]
    widths = [lateral.shape[1] for lateral in laterals]
    if widths != [top >> level for level in reversed(range(len(widths)))]:
        return f"the FPN does not stand on consecutive stages up to layer4: it takes {widths} channels"
    return None


def _part_name(name: str, levels: int, to: str) -> str:
    detectron2 = to == "detectron2"
    if match := _FPN.fullmatch(name):
        kind, level, leaf = match[1], int(match[2]), match[3]
        if detectron2:  # counts by stride: 32 = 2 ** 5 is the last
            return f"fpn_{'lateral' if kind == 'inner' else 'output'}{6 - levels + level}.{leaf}"
        return f"neck.{'lateral' if kind == 'inner' else 'fpn'}_convs.{level}.conv.{leaf}"
    if match := _EXTRA.fullmatch(name):
        number, leaf = int(match[1]), match[2]
        return f"top_block.p{number}.{leaf}" if detectron2 else f"neck.fpn_convs.{levels + number - 6}.conv.{leaf}"
    match = _TOWER.fullmatch(name)
    if match is None:
        raise ValueError(f"read: unknown part {name!r}")
    tower, step, leaf = "cls" if match[1] == "classification" else "reg", int(match[2]), match[3]
    if detectron2:
        return f"head.{tower.replace('reg', 'bbox')}_subnet.{step}.{leaf}"
    return f"bbox_head.{tower}_convs.{step // 3}.{'gn' if step % 3 else 'conv'}.{leaf}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see ``python -m densessl.export --help``.

    Args:
        arguments: None: the process's.

    Returns:
        The exit code: 2 after an error of the user's, told in one line.
    """
    parser = argparse.ArgumentParser(prog="python -m densessl.export", description="Weights for other frameworks.")
    parser.add_argument("checkpoint", help="of PixPro, this library, torchvision or timm")
    parser.add_argument("--to", required=True, choices=FORMATS)
    parser.add_argument("--out", required=True, help="file to write; its suffix chooses safetensors or pickle")
    parser.add_argument("--list", action="store_true", help="name every entry that was left out")
    chosen = parser.parse_args(arguments)
    try:
        done = export(chosen.checkpoint, chosen.to, chosen.out)
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
