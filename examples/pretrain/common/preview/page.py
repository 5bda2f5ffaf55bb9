"""What the preview says in words, and its page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

from examples.pretrain.common.pages import facts, figure, grid, heading, page, paragraph
from examples.pretrain.common.preview.look import Files, Pairs
from examples.pretrain.common.preview.speed import Speed
from examples.pretrain.common.samples import Labels

if TYPE_CHECKING:
    from jsonargparse import Namespace

ALWAYS_BLURRED = ("byol",)  # presets whose first view is blurred with probability 1
FEW_CELLS = 16  # of a map, at and below which the preview warns: 4 x 4


def numbers(
    config: Namespace, files: Files, pairs: Pairs, speed: Speed, cells: tuple[int, int], labels: Labels | None = None
) -> dict[str, str]:
    """Names and values, in the order in which one asks for them."""
    size, batch = config.data.size, config.data.batch_size
    redrawn = f", {pairs.unmatched_redrawn:.1%} with {config.data.redraws} redraws" if config.data.redraws else ""
    waits = "the loader" if batch / speed.loader > speed.step else "the step"
    timed = "" if speed.timed == batch else f" (from a step of {speed.timed})"
    return {
        "images to train on": f"{files.found:,}",
        "kept for the probe": f"{files.held_out:,}",
        **({} if labels is None else {"labelled for the probe": labelled(labels)}),
        "unreadable": f"{len(files.unreadable)} of {files.looked_at:,} looked at",
        "median size": f"{files.sides[0]} x {files.sides[1]} px",
        f"smaller than the views ({size} px)": f"{files.small} of {files.looked_at:,} looked at",
        "crops enlarged": f"{pairs.enlarged:.1%}",
        "image pixels per view pixel": f"{pairs.shrinking:.2f} along a side",
        "map of a view": f"{cells[0]} x {cells[1]} cells",
        "pairs that match nothing": f"{pairs.unmatched:.1%}{redrawn}",
        "positives per cell": f"{pairs.positives:.2f}",
        "pixels without data": f"{pairs.nodata:.1%}",
        "steps": f"{speed.steps:,} of {batch} images",
        "passes over the images": f"{passes(speed, batch, files):.1f}",
        "loader": f"{speed.loader:.0f} images/s, {speed.workers} workers",
        "step": f"{speed.step:.2f} s on {speed.device}{timed}",
        "slower of the two": waits,
        "probe": f"{speed.readings} readings of {speed.reading:.2f} s" if speed.readings else "off",
        "the run will take": duration_of(speed),
        "memory": f"{speed.memory / 2**30:.1f} GB{timed}",
    }


def labelled(labels: Labels) -> str:
    """How many images the probe has labels of."""
    return f"{len(labels.fit)} to fit on, {len(labels.test)} to test on, {labels.counted} classes{labels.beside}"


def passes(speed: Speed, batch: int, files: Files) -> float:
    """How often the run sees each image."""
    return speed.steps * batch / max(1, files.found)


def duration_of(speed: Speed) -> str:
    """How long the run takes, and which part of it the probe."""
    whole = speed.hours + speed.probe_hours
    if not speed.readings:
        return hours(whole)
    return f"{hours(whole)}, {hours(speed.probe_hours)} of them ({speed.probe_hours / whole:.1%}) for the probe"


def hours(value: float) -> str:
    """A time in hours, or in minutes where it is short."""
    return f"{value:.1f} hours" if value >= 1 else f"{value * 60:.1f} minutes"


def warnings(config: Namespace, files: Files, pairs: Pairs, speed: Speed, cells: tuple[int, int]) -> list[str]:
    """What is off, in words, with what to do about it."""
    data, found = config.data, []
    if files.masks is not None:
        found.append(files.masks)
    if files.unreadable:
        names = ", ".join(path.name for path in files.unreadable[:5])
        found.append(
            f"Number of files that cannot be read: {len(files.unreadable)} ({names}). Others take their places."
        )
    if pairs.unmatched_redrawn > 0.1:
        found.append(
            f"{pairs.unmatched_redrawn:.0%} of the pairs share no cell and teach the pixel loss nothing. Raise the "
            f"lower end of data.scale (now {data.scale[0]:g}), or set data.redraws (now {data.redraws}) to 5."
        )
    if cells[0] * cells[1] <= FEW_CELLS:
        layer = config.backbone.get("layer")
        earlier = (
            f", or take an earlier layer, whose cells are smaller, in backbone.layer (now {layer})" if layer else ""
        )
        found.append(
            f"The map of a view has {cells[0]} x {cells[1]} cells, one for {data.size // cells[0]} x "
            f"{data.size // cells[1]} px: matching between so few cells leaves few pairs. Raise data.size (now "
            f"{data.size}){earlier}."
        )
    if pairs.enlarged > 0.1:
        found.append(
            f"{pairs.enlarged:.0%} of the crops have fewer pixels than the {data.size} px of the view and are "
            "enlarged: they teach blur. Lower data.size, or raise the lower end of data.scale."
        )
    if data.photometric != "none" and data.preset in ALWAYS_BLURRED:
        found.append(
            f"The preset {data.preset} blurs every first view (probability 1, up to 2 px of the view). One view pixel "
            f"is {pairs.shrinking:.1f} px of your images: details below some {4 * pairs.shrinking:.0f} px of them are "
            "lost in it. If your objects are that small, take data.preset mocov2, which blurs half of the views."
        )
    if files.found < 20 * data.batch_size:
        begins = config.backbone.get("init", "random")
        from_weights = ", and begin from weights (backbone.init: imagenet)" if begins == "random" else ""
        found.append(
            f"{files.found:,} images are fewer than 20 batches of {data.batch_size}: every step sees much the same "
            f"images. Halve data.batch_size and the learning rates, or keep the run short{from_weights}."
        )
    if passes(speed, data.batch_size, files) > 300:
        found.append(
            f"Each image is seen {passes(speed, data.batch_size, files):,.0f} times, more than 300: what is learned "
            "after that is these images by heart. Lower trainer.max_steps, and watch the probe."
        )
    return found


def write_page(
    method: str,
    values: dict[str, str],
    words: list[str],
    photos: list[tuple[str, Image.Image, Image.Image]],
    draws: tuple[str, list[tuple[Image.Image, Image.Image]]],
) -> str:
    """The page.

    Args:
        method: What a user calls the run.
        values: The numbers.
        words: The warnings.
        photos: For each photo its name, the photo with its crops, and its views joined.
        draws: The name of one photo, and for each draw the same two pictures.
    """
    boxes = [paragraph(text, "warn") for text in words] or [paragraph("Nothing looks off.")]
    shown = [
        grid(
            figure(crops, f"{name}: first crop yellow, second blue"),
            figure(views, "both views as the network sees them"),
        )
        for name, crops, views in photos
    ]
    further = [figure(crops, f"draw {i + 1}") + figure(views, "") for i, (crops, views) in enumerate(draws[1])]
    return page(
        f"Preview of a run: {method}",
        paragraph("What the run would see and cost, on a sample of the images. Nothing was trained.", "soft"),
        heading("Warnings"),
        *boxes,
        heading("Numbers"),
        facts(values),
        heading("Images, crops and matches"),
        paragraph("Lines join the centres of cells that match: their features are pulled together.", "soft"),
        *shown,
        heading(f"Several draws of {draws[0]}"),
        grid(*further),
    )
