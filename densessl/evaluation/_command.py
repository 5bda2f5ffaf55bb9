"""The command line: a backbone, data sets and protocols to a table and a file of results."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from densessl.evaluation._backbones import Backbone, features_of, make_backbone
from densessl.evaluation._jobs import Jobs
from densessl.evaluation._processes import from_first, place
from densessl.evaluation._protocols import PROTOCOLS, Protocol
from densessl.evaluation._report import read_results, table, versions, write_results
from densessl.evaluation._sources import SOURCES, parse_source


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m densessl.evaluation",
        description="What a frozen backbone is worth on dense tasks. Start it by torchrun --nproc_per_node N -m "
        "densessl.evaluation to share the work over N processes; the numbers are those of one.",
    )
    add = parser.add_argument
    add("--backbone", required=True, help="timm/NAME, torchvision/NAME, hf/NAME, a folder of transformers, or a file "
        "with a ResNet: a checkpoint of this library, an exported file, a published one")  # fmt: skip
    add("--weights", default="default", help="default: what the library has under the name (downloaded once); none: as "
        "initialised; or a file to load into the model")  # fmt: skip
    add("--layer", help="name of the module to cut after; default: the last that gives a map, behind the final norm in "
        "vision transformers")  # fmt: skip
    add("--mean", help="one number or three with commas, subtracted from images in 0..1, in place of the model's own")
    add("--std", help="one number or three with commas, by which images are divided then, in place of the model's own")
    add("--data", required=True, action="append", metavar="KIND:FOLDER", help="may be given several times; KIND is one "
        f"of {', '.join(SOURCES)}")  # fmt: skip
    add("--protocols", required=True, help=f"separated by commas, of {', '.join(PROTOCOLS)}; each runs on the data "
        "that it can use")  # fmt: skip
    add("--size", help="N or HxW in pixels in place of the protocols' own sizes")
    add("--fit", help="name of the split that probes learn from, in place of the data set's usual one")
    add("--test", help="name of the split that is scored, in place of the data set's usual one")
    add("--sbd", help="folder of SBD, for VOC's split trainaug")
    add("--limit", type=int, help="at most so many samples of each split, spread evenly, to try things out; such "
        "scores are no published numbers")  # fmt: skip
    add("--out", default="evaluation.json", help="file of the results; a run that finds its protocols there with the "
        "same settings takes them from it (default: %(default)s)")  # fmt: skip
    add("--store", help="folder for the features of the run, many GB for large data sets; default: the system's folder "
        "of temporary files")  # fmt: skip
    add("--held-gb", type=float, default=0.5, help="a probe's memory of features above so many GB goes to the store "
        "(default: %(default)s)")  # fmt: skip
    add("--batch-size", type=int, default=16, help="images encoded at once (default: %(default)s)")
    add("--seed", type=int, default=0, help="of all draws, initial weights included (default: %(default)s)")
    add("--device", help="default: cuda where there is one, else cpu")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see ``python -m densessl.evaluation --help``.

    Args:
        arguments: None: the process's.

    Returns:
        The exit code: 2 after an error of the user's, told in one line.
    """
    chosen = _parser().parse_args(arguments)
    joins = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized()
    try:
        if joins:
            distributed.init_process_group("gloo")
        _evaluate(chosen)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if joins:
            distributed.destroy_process_group()
    return 0


def _evaluate(chosen: argparse.Namespace) -> None:
    names = [name.strip() for name in chosen.protocols.split(",") if name.strip()]
    unknown = [name for name in names if name not in PROTOCOLS]
    if unknown or not names:
        raise ValueError(f"--protocols: expected some of {', '.join(PROTOCOLS)}, got {chosen.protocols!r}")
    for value, option in ((chosen.limit, "--limit"), (chosen.batch_size, "--batch-size")):
        if value is not None and value < 1:
            raise ValueError(f"{option}: expected at least 1, got {value}")
    sources = {word: parse_source(word) for word in chosen.data}
    wanted = [
        (name, word)
        for word, (_, source, _) in sources.items()
        for name in names
        if PROTOCOLS[name].kind == source.kind or (PROTOCOLS[name].kind, source.kind) == ("photos", "labelled")
    ]
    idle = [name for name in names if not any(name == protocol for protocol, _ in wanted)]
    if idle:
        raise ValueError(f"--protocols: {idle[0]} needs data of the kind {PROTOCOLS[idle[0]].kind}, got {chosen.data}")
    side = _parse_size(chosen.size) if chosen.size else None
    device = _device(chosen.device)
    torch.manual_seed(chosen.seed)  # of initial weights
    backbone = make_backbone(chosen.backbone, chosen.weights, chosen.layer)
    backbone = backbone._replace(
        mean=_numbers(chosen.mean, "--mean") or backbone.mean, std=_numbers(chosen.std, "--std") or backbone.std
    )
    features = features_of(backbone, device)
    path, what = Path(chosen.out), _what(chosen, backbone)
    results = from_first(read_results(path, what) if place()[0] == 0 else {})
    how = {"versions": versions(), "device": _device_name(device), "threads": torch.get_num_threads()}
    how["processes"] = place()[1]
    # Jobs at one size of one data set share the stores.
    groups: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for name, word in wanted:
        size = _rounded(side or PROTOCOLS[name].side, backbone.patch)
        if not _is_done(results.get(f"{name} on {word}"), PROTOCOLS[name], size):
            groups.setdefault((word, size), []).append(name)
    for (word, size), group in groups.items():
        with Jobs(sources[word], size, chosen, features, backbone.patch[1]) as jobs:
            for name in group:
                start = time.perf_counter()
                scores, counts = jobs.run(PROTOCOLS[name])
                results[f"{name} on {word}"] = {
                    "protocol": name,
                    "data": word,
                    "scores": scores,
                    "images": counts,
                    "size": size,
                    "settings": PROTOCOLS[name].settings,
                    "source": PROTOCOLS[name].source,
                    "seconds": round(time.perf_counter() - start, 2),
                }
                if place()[0] == 0:
                    write_results(path, what, how, results)
    if place()[0] == 0:
        ours = {f"{name} on {word}" for name, word in wanted}
        print(f"{chosen.backbone}, weights {backbone.notes}, cut after {backbone.layer}")
        print(table({key: result for key, result in results.items() if key in ours}))
        print(f"written to {path}")


def _parse_size(word: str) -> tuple[int, int]:
    sides = word.lower().split("x")
    if len(sides) not in (1, 2) or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"--size: expected N or HxW in pixels, got {word!r}")
    return int(sides[0]), int(sides[-1])


def _numbers(word: str | None, option: str) -> tuple[float, ...] | None:
    """Three numbers, of which one may stand for all."""
    if word is None:
        return None
    try:
        values = [float(part) for part in word.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 3) or (option == "--std" and min(values) <= 0):
        raise ValueError(f"{option}: expected one number or three with commas, got {word!r}")
    return tuple(values if len(values) == 3 else values * 3)


def _rounded(size: tuple[int, int] | int, patch: tuple[int, int]) -> tuple[int, int]:
    """Rounded down to whole patches: 512 becomes 504 at a patch of 14."""
    sides = (size, size) if isinstance(size, int) else size
    height, width = (max(side // step, 1) * step for side, step in zip(sides, patch, strict=True))
    return height, width


def _is_done(result: dict[str, Any] | None, protocol: Protocol, size: tuple[int, int]) -> bool:
    """Whether a result of an earlier run was made by the same settings, as JSON holds them."""
    if result is None:
        return False
    return [result["size"], result["settings"]] == json.loads(json.dumps([size, protocol.settings]))


def _what(chosen: argparse.Namespace, backbone: Backbone) -> dict[str, Any]:
    """All that the scores of a protocol depend on besides its own settings."""
    return {
        "backbone": chosen.backbone,
        "weights": backbone.notes,
        "layer": backbone.layer,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "fit": chosen.fit,
        "test": chosen.test,
        "limit": chosen.limit,
        "seed": chosen.seed,
    }


def _device(name: str | None) -> torch.device:
    if name is None:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name}: {error}") from error
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {os.cpu_count()} cores"
