"""The tracer of ``check_tracking``: an image and a mask that say where in the source they come from."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from densessl.coords._functionals import STATIONARY
from densessl.geometry import cell_centers

# Two passes of one draw differ only in the tracer's third channel. A value that does not depend on the mark is fill; a
# value that depends on the mark but is not the mark has been changed.
MARKS = (0.7381, 0.3119)
RIMS = (-1.0, -2.0)  # in place of the marks: shows the source, but cannot be compared
_EXACT = 1e-3


class Tracer(tv_tensors.Image):
    """An image whose pixels say where they are: x, y and a mark; colour changes leave it alone."""


def _identity(image: Tracer, *args: Any, **kwargs: Any) -> Tracer:
    return image


for _name in sorted(STATIONARY):
    if hasattr(F, f"{_name}_image"):
        F.register_kernel(_name, Tracer)(_identity)


def tracers(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """``(3, H, W)`` for each of the two passes: x and y in 0..1 and the pass's mark."""
    h, w = size
    x, y = torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy")
    first, second = (torch.stack([x, y, torch.full_like(x, mark)]) for mark in MARKS)
    return first, second


def tracing_masks(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Labels ``(H, W)``, int64, of the two passes: the number of the pixel from the start, and from the end."""
    number = torch.arange(size[0] * size[1]).view(size)
    return number + 1, size[0] * size[1] - number


class Pixels(NamedTuple):
    """What two passes of one draw tell about each pixel of a view, bool ``(H, W)`` each."""

    fill: Tensor
    known: Tensor
    changed: Tensor


def classify(first: Tensor, second: Tensor) -> Pixels:
    """Tells fill, pixels of the source and pixels whose values were changed from one another."""
    one, two = (image.as_subclass(Tensor)[2] for image in (first, second))

    def both(values: tuple[float, float]) -> Tensor:
        return ((one - values[0]).abs() < _EXACT) & ((two - values[1]).abs() < _EXACT)

    fill, known = (one - two).abs() < _EXACT, both(MARKS)
    return Pixels(fill, known, ~fill & ~known & ~both(RIMS))


def reach_of(width: float, size: torch.Size) -> int:
    """A rim's width in whole pixels; wider than the view means nothing more."""
    return min(math.ceil(width), max(size[-2:])) if math.isfinite(width) else max(size[-2:])


def colours_changed(pixels: Pixels, reach: int) -> float:
    """Share of the view in solid patches of changed values.

    Interpolation mixes pixels with fill beside fill, and where a thin line of fill was scaled away. Such seams are
    narrow, whereas a change of colours fills patches.
    """
    return float(eroded(pixels.changed, reach).float().mean())


def without_rim(images: tuple[Tensor, Tensor], pixels: Pixels, reach: int) -> list[Any]:
    """Both passes with their marks replaced in a rim around the view and around all that is not comparable."""
    inner = eroded(pixels.known, reach)
    out = []
    for image, mark, rim in zip(images, MARKS, RIMS, strict=True):
        plain = image.as_subclass(Tensor)
        third = torch.where(pixels.fill, 0.0, torch.where(inner, mark, rim))
        marked = torch.cat([plain[:2], third[None]])
        out.append(tv_tensors.wrap(marked, like=image) if isinstance(image, tv_tensors.TVTensor) else marked)
    return out


def eroded(flags: Tensor, reach: int) -> Tensor:
    padded = nn.functional.pad(flags.float()[None], [reach] * 4)
    # Row by row and column by column: the same minimum, with far fewer comparisons.
    rows = nn.functional.max_pool2d(-padded, (1, 2 * reach + 1), stride=1)
    return -nn.functional.max_pool2d(rows, (2 * reach + 1, 1), stride=1)[0] > 0


def claims(coords: Tensor, view_size: torch.Size) -> Tensor:
    """``(H, W, 2)``: where coords, ``(3, 3)`` or ``(2, H, W)``, place each pixel in the source's unit square."""
    return cell_centers(coords.as_subclass(Tensor)[None], view_size)[0].unflatten(0, tuple(view_size))


def folded(position: Tensor) -> tuple[Tensor, Tensor]:
    """Where padding takes a pixel beyond the unit square from: mirrored, and repeated from the edge."""
    turned = position.remainder(2.0)
    return torch.where(turned <= 1, turned, 2 - turned), position.clamp(0, 1)


def mask_positions(first: Tensor, second: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Where a mask's labels come from.

    Args:
        first: The mask of the first pass, ``(H, W)``.
        second: The mask of the second pass.
        size: Height and width of the source.

    Returns:
        Positions ``(H, W, 2)`` in the unit square; which pixels are labels of the source; and which pixels had their
        labels changed.
    """
    one, two = (mask.as_subclass(Tensor).double() for mask in (first, second))
    number, again = one - 1, size[0] * size[1] - two
    fill = one == two
    known = ~fill & (number == again) & (number >= 0) & (number < size[0] * size[1])
    y, x = torch.div(number, size[1], rounding_mode="floor"), number.remainder(size[1])
    return torch.stack([(x + 0.5) / size[1], (y + 0.5) / size[0]], -1), known, ~fill & ~known


def source_steps(coords: Tensor, canvas: tuple[int, int], size: tuple[int, int], otherwise: float) -> list[float]:
    """Source pixels between neighbouring view pixels, at some places of the view.

    Args:
        coords: Coords ``(3, 3)`` or ``(2, H, W)``.
        canvas: Height and width of the view in pixels.
        size: Height and width of the source in pixels.
        otherwise: Answer to give if no place of the view is known.
    """
    plain = coords.as_subclass(Tensor)[None]
    grid = (min(canvas[0], 16), min(canvas[1], 16))
    position = cell_centers(plain, grid)[0].unflatten(0, grid) * torch.tensor([size[1], size[0]])
    lengths = []
    for axis in (0, 1):
        apart = position.diff(dim=axis).norm(dim=-1) * grid[axis] / canvas[axis]
        lengths += apart[apart > 0].tolist()  # without NaN
    return lengths or [otherwise]
