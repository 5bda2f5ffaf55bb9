"""From a mask of valid pixels to a mask of valid cells."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from densessl.geometry import Size


def cell_validity(mask: Tensor, size: Size, min_share: float = 0.5) -> Tensor:
    """Which cells of a map show enough of what counts: for ``valid_q`` and ``valid_k`` of a matcher or a loss.

    A cell's pixels are all that it touches: where the sizes do not divide, a pixel on the border of two cells belongs
    to both. Half of them is the rule that the source image's own edges follow: there a cell counts if its centre lies
    inside, and a straight edge through the centre leaves half. With all of them, single missing pixels, as of dead
    sensors, would cost whole cells; and a cell's features depend on more pixels than its own in any case.

    Args:
        mask: ``(B, H, W)`` or ``(B, 1, H, W)`` of any dtype, of a batch of views, e.g. ``MaskedView.mask``; valid is
            what is not 0.
        size: ``(h, w)`` of the feature map.
        min_share: least share of valid pixels, above 0, at most 1; 1: no pixel of the cell is missing.

    Returns:
        bool ``(B, N)``.

    Raises:
        ValueError: on another shape, size or share.
    """
    if mask.ndim not in (3, 4) or (mask.ndim == 4 and mask.shape[1] != 1):
        raise ValueError(f"mask: expected (B, H, W) or (B, 1, H, W), got {tuple(mask.shape)}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: expected (height, width), both at least 1, got {tuple(size)}")
    if not 0 < min_share <= 1:
        raise ValueError(f"min_share: expected a share above 0, at most 1, got {min_share}")
    valid = (mask if mask.ndim == 4 else mask[:, None]) != 0
    return F.adaptive_avg_pool2d(valid.float(), (size[0], size[1])).flatten(1) >= min_share
