"""The same photos through several networks, or through one before and after its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from densessl.plots import pca_colours
from examples.pretrain.common.pages import figure, tiles
from examples.pretrain.common.pictures import as_pillow, enlarged, heat, in_colour, similarity

SIDE = 192  # of a picture, in pixels

Row = list[tuple[str, Image.Image]]


def gallery(photos: Sequence[Tensor], maps: Mapping[str, Tensor]) -> list[Row]:
    """For each photo its pictures with captions: itself, principal components, similarity to its middle.

    Args:
        photos: The photos, uint8 ``(C, size, size)`` each.
        maps: For each network, by name, the maps of these photos, ``(P, C, h, w)``.
    """
    colours = {name: enlarged(pca_colours(of)[0], SIDE) for name, of in maps.items()}
    rows = []
    for index, photo in enumerate(photos):
        shown = torch.nn.functional.interpolate(in_colour(photo)[None].float(), (SIDE, SIDE), mode="area")[0]
        row: Row = [("photo", as_pillow(shown.round().to(torch.uint8)))]
        row += [(f"components, {name}", as_pillow(of[index])) for name, of in colours.items()]
        cosines = {name: similarity(of[index], middle(of)) for name, of in maps.items()}
        low = min(float(cosine.min()) for cosine in cosines.values())  # one scale, for networks that are compared
        for name, cosine in cosines.items():
            caption = f"similarity, {name} ({low:.2f} dark to 1 bright)"
            row.append((caption, as_pillow(enlarged(heat(cosine, low), SIDE))))
        rows.append(row)
    return rows


def middle(maps: Tensor) -> int:
    """Row-major index of the cell in the middle."""
    h, w = maps.shape[2:]
    return (h // 2) * w + w // 2


def gallery_html(rows: Sequence[Row]) -> str:
    """The gallery in a page."""
    return "".join(tiles(*(figure(picture, caption) for caption, picture in row)) for row in rows)


def gallery_strip(row: Row, gap: int = 6) -> Image.Image:
    """A photo's pictures beside each other, for a page that takes files."""
    picture = Image.new("RGBA", (len(row) * (SIDE + gap) - gap, SIDE))
    for place, (_, part) in enumerate(row):
        picture.paste(part, (place * (SIDE + gap), 0))
    return picture
