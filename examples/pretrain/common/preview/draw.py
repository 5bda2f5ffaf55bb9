"""The pictures of the preview: outlines of crops, views as the network sees them, matched cells joined."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from densessl import MaskedView, View
from examples.pretrain.common.data.depths import as_bytes
from examples.pretrain.common.pictures import as_pillow, in_colour
from examples.pretrain.common.preview.look import corners_of
from examples.pretrain.common.scores import Form

FIRST, SECOND = "#ffb000", "#35a2ff"  # told apart by those who see no red or green, too
SIDE = 420  # of the pictures, in pixels
LINES = 24


def outlined(image: Tensor, pairs: list[tuple[View, View]], width: int = 4) -> Image.Image:
    """The photo with the outlines of both crops of each pair."""
    height, breadth = image.shape[-2:]
    scale = SIDE / max(height, breadth)
    shown = F.interpolate(
        in_colour(as_bytes(image))[None].float(), (round(height * scale), round(breadth * scale)), mode="area"
    )
    picture = as_pillow(shown[0].round().to(torch.uint8))
    pen = ImageDraw.Draw(picture)
    for pair in pairs:
        for view, colour in zip(pair, (FIRST, SECOND), strict=True):
            corners = corners_of(view) * torch.tensor([picture.width - 1, picture.height - 1])
            line = [tuple(corner) for corner in [*corners.tolist(), corners[0].tolist(), corners[1].tolist()]]
            pen.line(line, "black", width + 3, joint="curve")
            pen.line(line, colour, width, joint="curve")
    return picture


def seen(view: View | MaskedView, form: Form) -> list[Image.Image]:
    """A batch of views with their normalisation undone."""
    mean, std = (torch.tensor(values, device=view.image.device).view(-1, 1, 1) for values in (form.mean, form.std))
    pixels = in_colour((view.image * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    return [as_pillow(image).resize((SIDE // 2, SIDE // 2), Image.BICUBIC) for image in pixels]


def joined(one: Image.Image, other: Image.Image, mask: Tensor, cells: tuple[int, int]) -> Image.Image:
    """Two views beside each other, some of their matched cells joined."""
    (h, w), gap, size = cells, 48, (2 * one.width, 2 * one.height)  # twice as large, for lines without steps
    picture = Image.new("RGBA", (2 * size[0] + gap, size[1]))
    for left, view, colour in ((0, one, FIRST), (size[0] + gap, other, SECOND)):
        picture.paste(view.resize(size), (left, 0))
        ImageDraw.Draw(picture).rectangle((left, 0, left + size[0] - 1, size[1] - 1), outline=colour, width=6)
    pen, pairs = ImageDraw.Draw(picture), mask.nonzero()
    step = max(1, len(pairs) // LINES)
    for query, key in pairs[step // 2 :: step].tolist():
        begin = ((query % w + 0.5) * size[0] / w, (query // w + 0.5) * size[1] / h)
        end = ((key % w + 0.5) * size[0] / w + size[0] + gap, (key // w + 0.5) * size[1] / h)
        pen.line([begin, end], "black", 5)
        pen.line([begin, end], "white", 2)
        for x, y in (begin, end):
            pen.ellipse((x - 6, y - 6, x + 6, y + 6), "white", "black", 2)
    return picture.resize((picture.width // 2, picture.height // 2), Image.LANCZOS)
