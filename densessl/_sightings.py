"""One draw of a pipeline compared with its coords: distances between what a view shows and what its coords say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from densessl._tracer import claims, classify, colours_changed, folded, mask_positions, reach_of, without_rim

_LEAST_SHARE_OF_A_VIEW = 0.25  # of a view's pixels, less the rims
_JUMP = 4.0  # pixels of the other image between neighbouring pixels: more is the edge of something that moves
_ROUNDING = 1e-3  # source pixels; what float32 loses where nothing moved is no error
# Swapped channels and dropped pixels look like fill to a tracer.
OR_COLOURS = "or a step of your own changed the colours: leave such steps out of the check"
LEAVE_OUT = "Leave steps that change colours without torchvision's functionals out of the audit"


class Where(NamedTuple):
    """Names a draw in an error; a pipeline's text is long, and only made when it is needed.

    ``recoloured`` looks for a step whose change of colours looks like a move, where an error has been found.
    """

    size: tuple[int, int]
    draw: int
    pipeline: Any
    step: Any = None
    recoloured: Callable[[], Any] | None = None

    def __str__(self) -> str:
        by = "" if self.step is None else f"by {self.step!r}, "
        return f"{by}on a source of {self.size[0]}x{self.size[1]} in draw {self.draw} of {self.pipeline!r}"


class Seen(NamedTuple):
    """One view: errors of the compared pixels, what they may be, and how many pixels show the source."""

    errors: Tensor
    allowance: float
    shown: int


def largest_excess(seen: Seen, tolerance: float, what: str, where: Where) -> float:
    """The largest error beyond the allowance; ValueError if it is also beyond the tolerance."""
    if seen.errors.numel() == 0:
        return 0.0
    excess = float((seen.errors - seen.allowance).max())
    if not excess <= tolerance:
        step = None if where.recoloured is None else where.recoloured()
        if step is not None:
            raise ValueError(
                f"transform: colours changed, cannot be compared: {what} look moved, but how depends on the tracer's "
                f"colours, {where._replace(step=step)}. {LEAVE_OUT}"
            )
        # Nothing told a change of colours from a move here.
        cause = f", {OR_COLOURS}" if what == "pixels" and where.recoloured is None else ""
        raise ValueError(
            f"transform: {what} moved and coords did not follow: {float(seen.errors.max()):.2f} source pixels apart, "
            f"{tolerance + seen.allowance:.2f} allowed, {where}{cause}"
        )
    return excess if excess > _ROUNDING else 0.0


def compared_image(
    first: Tensor, second: Tensor, coords: Tensor, size: tuple[int, int], allowance: float, slack: float, where: Where
) -> Seen:
    pixels = classify(first, second)
    claimed = claims(coords, first.shape[-2:])
    errors, compared, padding = _errors(
        first.as_subclass(Tensor)[:2].movedim(0, -1), pixels.known, claimed, size, slack
    )
    candidates = int((pixels.known & ~padding).sum())
    if len(errors) < _LEAST_SHARE_OF_A_VIEW * candidates:
        raise ValueError(
            f"transform: the coords know nothing of {1 - len(errors) / candidates:.0%} of what a view shows of its "
            f"source, at least {_LEAST_SHARE_OF_A_VIEW:.0%} must be comparable, {where}"
        )
    beyond = ~((claimed >= 0) & (claimed <= 1)).all(-1) & ~claimed.isnan().any(-1)
    return Seen(errors, allowance, int((~pixels.fill & (~beyond | compared)).sum()))


def compared_images(first: Tensor, second: Tensor, enlarged: float, most: float, where: Where) -> list[Tensor]:
    """Both passes without their rims; ValueError where the step between changed colours.

    Enlarging widens rims and seams in view pixels: ``enlarged`` is by how much at least, ``most`` at most.
    """
    if first.shape != second.shape or first.shape[-3] != 3:
        raise ValueError(
            f"transform: expected images (3, H, W) of one size in two passes of one draw, got {tuple(first.shape)} "
            f"and {tuple(second.shape)}, {where}"
        )
    pixels = classify(first, second)
    changed = colours_changed(pixels, reach_of(3 * most + 1, first.shape))
    if changed > 0:
        raise ValueError(
            f"transform: colours changed, cannot be compared: at least {changed:.1%} of the view, {where}. {LEAVE_OUT}"
        )
    return without_rim((first, second), pixels, reach_of(2 * enlarged, first.shape))


def compared_carried(
    first: Tensor, second: Tensor, carried: Tensor, start: Tensor, other: tuple[int, int], allowance: float
) -> Seen:
    """Compares positions in the other image: those that a view's coords were carried to, and those of its pixels.

    Args:
        first: The tracer of the first pass; its colours say where in its image a pixel comes from.
        second: The tracer of the second pass.
        carried: The view's coords in the other image, ``(3, 3)`` or ``(2, H, W)``.
        start: Dense coords ``(1, 2, h, w)``: where the pixels of the tracer's image lie in the other image.
        other: Height and width of the other image in pixels.
        allowance: Allowed error in pixels of the tracer's image; it grows here with the image's largest stretch.

    Returns:
        Errors in pixels of the other image. Pixels beside unknown pixels or beside jumps of more than ``_JUMP`` pixels
        are left out: between the two sides of a jump, positions are interpolated and belong to nothing.
    """
    h, w = start.shape[-2:]
    scale = torch.tensor([other[1], other[0]], dtype=start.dtype).view(1, 2, 1, 1)
    steps = [
        nn.functional.pad((start * scale).diff(dim=d).norm(dim=1), pad) for d, pad in ((2, (0, 0, 0, 1)), (3, (0, 1)))
    ]
    stretch = torch.maximum(*steps)
    smooth = stretch <= _JUMP  # NaN compares as False
    rough = nn.functional.max_pool2d((~smooth).to(start.dtype)[None], 5, 1, 2)
    place = first.as_subclass(Tensor)[:2].movedim(0, -1)[None].to(start.dtype)
    margin = torch.tensor([0.5 / w, 0.5 / h], dtype=start.dtype)
    within = ((place >= margin) & (place <= 1 - margin)).all(-1)[0]

    # Does not use the sampling that carries coords, because that is what is tested here.
    def read(maps: Tensor) -> Tensor:
        sampled = nn.functional.grid_sample(maps, 2 * place - 1, align_corners=False, padding_mode="border")
        return sampled[0].movedim(0, -1)

    truth, claimed = read(start), claims(carried, first.shape[-2:]).to(start.dtype)
    known = classify(first, second).known & within & (read(rough)[..., 0] == 0)
    known &= truth.isfinite().all(-1) & claimed.isfinite().all(-1)
    errors = ((truth - claimed) * scale.view(2)).norm(dim=-1)[known]
    largest = float(stretch[smooth].max()) if smooth.any() else 1.0
    return Seen(errors, allowance * max(1.0, largest), int(known.sum()))


def compared_mask(
    first: Tensor, second: Tensor, coords: Tensor, size: tuple[int, int], allowance: float, slack: float, where: Where
) -> Seen:
    position, known, changed = mask_positions(first, second, size)
    if changed.any():
        raise ValueError(
            f"transform: the mask's labels changed, cannot be compared: {changed.float().mean():.1%} of the view, "
            f"{where}. Leave steps that change labels out of the audit"
        )
    claimed = claims(coords, position.shape[:2])
    errors, compared, _ = _errors(position.float(), known, claimed, size, slack + 2 * allowance)
    return Seen(errors, allowance, int(compared.sum()))


def _errors(
    position: Tensor, known: Tensor, claimed: Tensor, size: tuple[int, int], slack: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Distances in source pixels; which pixels they are of; which show padding that repeats the source.

    If a pixel of the source is shown where the coords lie beyond the source, it is padding if mirroring or repeating
    would put this pixel there, and an error otherwise.
    """
    scale = torch.tensor([size[1], size[0]])
    inside = ((claimed >= 0) & (claimed <= 1)).all(-1)
    beyond = known & ~inside & ~claimed.isnan().any(-1)
    padding = torch.zeros_like(known)
    if beyond.any():
        repeated = [((position - place) * scale).norm(dim=-1) <= slack for place in folded(claimed)]
        padding = beyond & (repeated[0] | repeated[1])
    compared = known & (inside | (beyond & ~padding))
    return ((position - claimed) * scale).norm(dim=-1)[compared], compared, padding
