"""The command line: a backbone, data sets and protocols to a table and a file of results."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
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
from densessl.evaluation._statistics import fill_statistics, has_batch_norm


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Scores a frozen backbone on dense tasks, prints a table and writes a file of results. Begin with "
        "--protocols linear-fast,neighbors on labelled images, or --protocols correspondence on photos without labels. "
        "'torchrun --nproc_per_node N -m densessl.evaluation' shares the work over N processes; the scores are those "
        "of one.",
    )
    add = parser.add_argument
    add("--backbone", required=True, help="The backbone: timm/NAME, torchvision/NAME or hf/NAME; a folder of "
        "transformers; or a file with a ResNet, which may be a checkpoint of this library, an exported file or a "
        "published one.")  # fmt: skip
    add("--weights", default="default", help="The weights of the backbone: 'default' takes those that the library has "
        "under the name, downloaded once; 'none' leaves the model as it is initialised; the path of a file loads that "
        "file into the model. The file may hold the whole model, or what lies before --layer (default: "
        "%(default)s).")  # fmt: skip
    add("--fill-statistics", type=int, metavar="N", help="Number of images from which mean and variance of every "
        "batch norm are computed anew before a data set is scored, images of the split that probes learn from; 0 keeps "
        "those that come with the weights. By default 256 with --weights none, so that random weights are scored as a "
        "training at learning rate 0 would leave them, and else 0. Videos and pairs are left out.")  # fmt: skip
    add("--layer", help="Name of the module after which the backbone is cut. By default it is the last one whose "
        "output is a map, in vision transformers after the final norm.")  # fmt: skip
    add("--mean", help="One number, or three with commas, that are subtracted from the images in 0..1; by default the "
        "model's own.")  # fmt: skip
    add("--std", help="One number, or three with commas, by which the images are divided after that; by default the "
        "model's own.")  # fmt: skip
    add("--data", required=True, action="append", metavar="KIND:FOLDER", help="Kind and folder of a data set. The "
        f"option may be given several times; KIND is one of {', '.join(SOURCES)}. For 'own' the folder holds "
        "images/SPLIT/*, masks/SPLIT/*.png of the same names with the class number of each pixel (255 where it is "
        "ignored), and classes.txt with the name of one class a line; SPLIT is train and test. For 'photos' it holds "
        "photos, in any sub-folders and without labels.")  # fmt: skip
    add("--protocols", required=True, help="Names of the protocols, separated by commas. Each runs on the data that it "
        f"can use. The names are {', '.join(PROTOCOLS)}.")  # fmt: skip
    add("--size", help="Size of the images in pixels, N or HxW, in place of the protocols' own sizes.")
    add("--fit", help="Name of the split that probes learn from, in place of the data set's usual one.")
    add("--test", help="Name of the split that is scored, in place of the data set's usual one.")
    add(
        "--sbd",
        help="Folder of SBD, for VOC's split trainaug, unless VOC's folder has SegmentationClassAug and trainaug.txt.",
    )
    add("--limit", type=int, help="Greatest number of samples of each split, which are spread evenly over it, to try "
        "things out. Such scores are no published numbers.")  # fmt: skip
    add("--out", default="evaluation.json", help="File of the results. A run that finds its protocols there with the "
        "same settings takes them from it (default: %(default)s).")  # fmt: skip
    add("--store", help="Folder for the features while the run lasts, many GB for large data sets; by default the "
        "system's folder of temporary files. A run that is killed (SIGKILL) leaves its folder densessl-features-* "
        "there, which may be removed.")  # fmt: skip
    add("--held-gb", type=float, default=0.5, help="Memory in GB that a probe may fill with the features it keeps, at "
        "least 0; if they need more, they are kept in files (default: %(default)s).")  # fmt: skip
    add("--batch-size", type=int, default=16, help="Number of images that are encoded at once, at least 1 (default: "
        "%(default)s).")  # fmt: skip
    add("--seed", type=int, default=0, help="Seed of all random choices, those of initial weights included "
        "(default: %(default)s).")  # fmt: skip
    add("--device", help="Device of torch that encodes the images; by default cuda where there is one, else cpu.")
    return parser


def main(arguments: Sequence[str] | None = None, program: str = "python -m densessl.evaluation") -> int:
    """The command line; see ``python -m densessl.evaluation --help``.

    Args:
        arguments: Arguments of the command line; None means those of the process.
        program: The command, as the help names it.

    Returns:
        The exit code: 2 after an error of the user's, told in one line; 130 after a run that was stopped.
    """
    chosen = _parser(program).parse_args(arguments)
    # Says every try to download; the error in the end is ours. The level of the logger above is set at its import.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    # A queue's signal ends the run as Ctrl-C does, so that its features are removed.
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if is_main else None
    joins = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized()
    try:
        if joins:
            distributed.init_process_group("gloo")
        _evaluate(chosen)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped: the same command goes on with what {chosen.out} does not hold yet", file=sys.stderr)
        return 130
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)
        if joins:
            # Gloo's threads free the last tensors in this pause. With torch 2.6, closing the group may wait for ever
            # for a thread that has not done so.
            time.sleep(0.3)
            distributed.destroy_process_group()
    return 0


def _evaluate(chosen: argparse.Namespace) -> None:
    names = [name.strip() for name in chosen.protocols.split(",") if name.strip()]
    unknown = [name for name in names if name not in PROTOCOLS]
    if unknown or not names:
        raise ValueError(f"--protocols: expected some of {', '.join(PROTOCOLS)}, got {chosen.protocols!r}")
    least = ((chosen.limit, "--limit", 1), (chosen.batch_size, "--batch-size", 1),
             (chosen.fill_statistics, "--fill-statistics", 0))  # fmt: skip
    for value, option, lowest in least:
        if value is not None and value < lowest:
            raise ValueError(f"{option}: expected at least {lowest}, got {value}")
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
    filled = chosen.fill_statistics if chosen.fill_statistics is not None else 256 * (chosen.weights == "none")
    if filled and has_batch_norm(backbone.model):
        notes = f"{backbone.notes}, batch norm's statistics from {filled} images of each data set"
        backbone = backbone._replace(notes=notes)
    else:
        filled = 0
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
            if filled and (images := jobs.images(filled)) is not None:
                fill_statistics(backbone, images, chosen.batch_size, device)
            for name in group:
                start = time.perf_counter()
                scores, counts = jobs.run(name, PROTOCOLS[name])
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
