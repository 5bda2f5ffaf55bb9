"""The command ``preview``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from densessl import DistanceMatcher
from examples.pretrain.common import run_folder
from examples.pretrain.common.backbones import map_shape
from examples.pretrain.common.data.shard_lists import is_shards
from examples.pretrain.common.data.sources import evenly
from examples.pretrain.common.data.views import collate
from examples.pretrain.common.known_as import known_as
from examples.pretrain.common.optimizers import backbone_of
from examples.pretrain.common.parsing import parse
from examples.pretrain.common.preview.draw import joined, outlined, seen
from examples.pretrain.common.preview.look import Drawn, draw_pairs, look_at_files, match_of
from examples.pretrain.common.preview.page import numbers, warnings, write_page
from examples.pretrain.common.preview.speed import measure, on_device, planned_steps, probe_of
from examples.pretrain.common.watch import form_of

if TYPE_CHECKING:
    from examples.pretrain.common.cli import Recipe, Run

PHOTOS = 6
DRAWS = 4


def preview(recipe: Recipe, arguments: Sequence[str]) -> Path:
    """Writes the preview of a run with these options, and prints its numbers and warnings.

    Args:
        recipe: The recipe.
        arguments: The options of ``fit``. Pictures and page go to the folder ``preview`` of ``--out``, or to
            ``runs/preview`` where no folder is named.

    Returns:
        The page.

    Raises:
        ValueError: If an option does not fit, or the images are in shards.
    """
    from examples.pretrain.common.cli import fit_parser, make_run

    if any(word.partition("=")[0] == "--ckpt_path" for word in arguments):
        raise ValueError("ckpt_path: a preview is of a run that begins; leave it out")
    config = parse(fit_parser(recipe), arguments)
    out = config.out
    if is_shards(config.data.folder) or config.data.get("flow") is not None:
        raise ValueError(
            "preview: expected a folder of images in data.folder, got tar shards (unpack one) or pairs of frames"
        )
    if out == "":
        raise ValueError("out: expected the name of a folder, got none")
    folder = Path(out or "runs", "preview")
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    with tempfile.TemporaryDirectory() as elsewhere:  # a preview leaves the run's own files alone
        run = make_run(recipe, [*arguments, "--out", elsewhere])
        run_folder.prepare(str(folder))
        try:
            return write_preview(recipe, run, folder)
        except BaseException:
            for path in new:
                with suppress(OSError):  # it is not empty
                    path.rmdir()
            raise


def write_preview(recipe: Recipe, run: Run, folder: Path) -> Path:
    """As preview, from the parts of a run."""
    config, data, form = run.config, run.data, form_of(run.config)
    paths = data.source.paths()
    planned_steps(run)  # what does not fit is told before the seconds that follow
    labels = probe_of(run).labelled
    files = look_at_files(paths, len(data.source.held_out()), config.data.size)
    cells = map_size(run, form.size, form.channels)
    threshold, in_pixels = (config.method.get(name, other) for name, other in MATCHING.items())
    pairs, drawn, unreadable = draw_pairs(paths, data.draw, form.channels, cells, threshold, in_pixels)
    files = files._replace(unreadable=list(dict.fromkeys([*files.unreadable, *unreadable])))
    speed, _ = measure(run)
    values = numbers(config, files, pairs, speed, cells, labels)
    words = warnings(config, files, pairs, speed, cells)
    folder.mkdir(parents=True, exist_ok=True)
    match = DistanceMatcher(threshold)

    def pictures(photo: Drawn, draws: int) -> list[tuple]:
        batch = collate(photo.pairs[:draws])
        views = [seen(on_device(run, index, view), form) for index, view in enumerate(batch[:2])]
        masks: list[Tensor] = [match_of(pair, match, cells, in_pixels) for pair in photo.pairs[:draws]]
        return [
            (outlined(photo.image, [(pair.view1, pair.view2)]), joined(one, other, mask, cells))
            for pair, one, other, mask in zip(photo.pairs, *views, masks, strict=False)
        ]

    with torch.no_grad():
        photos = [(photo.name, *pictures(photo, 1)[0]) for photo in (drawn[i] for i in evenly(len(drawn), PHOTOS))]
        draws = drawn[0].name, pictures(drawn[0], DRAWS)
    for index, (_, crops, views) in enumerate(photos):
        crops.save(folder / f"crops-{index + 1}.png")
        views.save(folder / f"views-{index + 1}.png")
    for index, (crops, views) in enumerate(draws[1]):
        crops.save(folder / f"draw-{index + 1}-crops.png")
        views.save(folder / f"draw-{index + 1}-views.png")
    path = folder / "preview.html"
    path.write_text(write_page(known_as(recipe.method), values, words, photos, draws), encoding="utf-8")
    width = max(len(name) for name in values)
    print(*(f"{name:<{width}}  {value}" for name, value in values.items()), sep="\n")
    print(*(f"WARNING: {text}" for text in words), f"written: {path}", sep="\n")
    return path


# Options of the method that say which cells match, with what stands in where a method has none.
MATCHING = {"threshold": 0.7, "pixel_distances": False}


def map_size(run: Run, size: int, channels: int) -> tuple[int, int]:
    """Size of the map of a view; of a pyramid that of its finest level."""
    backbone = backbone_of(run.method)
    if hasattr(backbone, "levels"):
        with torch.no_grad():
            maps = backbone.eval()(torch.zeros(1, channels, size, size))
        backbone.train()
        h, w = next(iter(maps.values())).shape[-2:]
    else:
        _, h, w = map_shape(backbone, size, channels)
    return int(h), int(w)
