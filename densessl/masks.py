"""A view's mask at the size of a feature map: valid cells, labels of cells, regions and their means.

A label map holds one label per position, from 1 on. 0 means that there is nothing, as in the mask of a ``MaskedView``.
Negative labels and 255, with which label maps mark what does not count, are nothing as well.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from densessl._checks import as_tokens
from densessl._tensors import check_number, check_tensor
from densessl.geometry import Size, checked_size

IGNORED = 255  # as in the masks of most data sets
_BITS = 32  # of a label, beside another number in one int64


def cell_validity(mask: Tensor, size: Size, min_share: float = 0.5) -> Tensor:
    """Tells which cells of a map show enough valid pixels: for ``valid_q`` and ``valid_k`` of a matcher or a loss.

    A cell covers all pixels that it touches: if the sizes do not divide, a pixel on the border of two cells belongs to
    both. The default of one half is the rule at the source image's own edges: a cell counts there if its centre lies
    inside, and a straight edge through the centre leaves half of it. If all pixels had to be valid, single missing
    pixels (dead sensors, for instance) would cost whole cells, while a cell's features depend on more pixels than its
    own anyway.

    Args:
        mask: Mask of a batch of views, ``(B, H, W)`` or ``(B, 1, H, W)``, of any dtype, for instance
            ``MaskedView.mask``. Pixels that are not 0 are valid.
        size: Height and width ``(h, w)`` of the feature map.
        min_share: Smallest share of valid pixels, above 0 and at most 1. With 1, no pixel of the cell may be missing.

    Returns:
        Boolean tensor ``(B, N)``, True for the cells that count.

    Raises:
        ValueError: If a shape, size or share is not as described.

    Examples:
        >>> mask = torch.tensor([[[1, 1, 0, 0], [1, 1, 0, 1]]])
        >>> cell_validity(mask, (1, 2))
        tensor([[ True, False]])
    """
    check_tensor(mask, "mask", "(B, H, W) or (B, 1, H, W)")
    if mask.ndim not in (3, 4) or (mask.ndim == 4 and mask.shape[1] != 1):
        raise ValueError(f"mask: expected (B, H, W) or (B, 1, H, W), got {tuple(mask.shape)}")
    if 0 in mask.shape[1:]:
        raise ValueError(f"mask: expected at least one pixel, got {tuple(mask.shape)}")
    h, w = checked_size(size, "size")
    check_number(min_share, "min_share", "a share above 0, at most 1", lambda value: 0 < value <= 1)
    valid = (mask if mask.ndim == 4 else mask[:, None]) != 0
    return F.adaptive_avg_pool2d(valid.float(), (h, w)).flatten(1) >= min_share


def cell_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """A label map at the size of a feature map: each cell takes the label that covers most of it.

    If two labels cover equally much, the smaller one wins. The result equals averaging each label's one-hot map over
    the cells and taking the largest share, as DetCon's published code does (the paper names only the average), but
    needs no map per label.

    Args:
        labels: Integer tensor ``(B, H, W)`` or ``(B, 1, H, W)``, labels from 0 up to below ``2**32``: the mask of a
            batch of ``MaskedView``. Negative labels, such as the -1 of "ignored", and 255 count as nothing, which is 0:
            number regions so that none is 255. ``2**32`` and more are refused on a CPU; on other devices, where the
            check would wait for the device, they become ``2**32 - 1``.
        size: Height and width ``(h, w)`` of the feature map, at most H and W. Where they do not divide these, a pixel
            belongs to the cell that its upper left corner lies in.

    Returns:
        Labels of the cells ``(B, h, w)``, int64.

    Raises:
        ValueError: If a shape, dtype or size is not as described; on a CPU also if a label is ``2**32`` or more.

    Examples:
        >>> labels = torch.tensor([[[3, 3, 5, 5], [3, 4, 5, 0]]])
        >>> cell_labels(labels, (1, 2))
        tensor([[[3, 5]]])
    """
    h, w = size if isinstance(size, (tuple, list)) and len(size) == 2 else (0, 0)
    check_tensor(labels, "labels", "integer (B, H, W) or (B, 1, H, W)")
    if labels.ndim == 4 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    _check_labels(labels)
    batch, height, width = labels.shape
    whole = not any(isinstance(side, (float, str, bool, type(None))) for side in (h, w))
    if not whole or not (1 <= h <= height and 1 <= w <= width):
        raise ValueError(f"size: expected (h, w) of 1 to {height} and 1 to {width}, the labels' size, got {size}")
    flat = labels.flatten(1).long()
    if _is_readable(flat) and int(flat.max()) >= 1 << _BITS:
        raise ValueError(f"labels: expected labels below 2**{_BITS}, got {int(flat.max())}")
    flat = flat.masked_fill(flat == IGNORED, 0)
    row, column = (torch.arange(n, device=labels.device) * m // n for n, m in ((height, h), (width, w)))
    cell = (row[:, None] * w + column).flatten()
    # Pixels in order of cell and label: how often a label comes in a cell is the length of a run.
    ordered = ((cell << _BITS) + flat.clamp(0, (1 << _BITS) - 1)).sort(1).values
    place = torch.arange(height * width, device=labels.device)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    length = place + 1 - torch.where(starts, place, 0).cummax(1).values
    # The longest run wins; of equally long runs, the one with the smaller label.
    label = ordered & (1 << _BITS) - 1
    score = (length << _BITS) + (1 << _BITS) - 1 - label
    best = torch.zeros(batch, h * w, dtype=torch.int64, device=labels.device)
    best.scatter_reduce_(1, ordered >> _BITS, score, "amax")
    return ((1 << _BITS) - 1 - (best & (1 << _BITS) - 1)).view(batch, h, w)


def sample_labels(labels: Tensor, draws: Tensor) -> Tensor:
    """Draws labels among those that an image has, with replacement; each is equally likely, whatever its area.

    Args:
        labels: Labels of cells ``(B, h, w)``, integer, for instance from ``cell_labels``.
        draws: Numbers ``(B, R)`` in 0..1 (1 excluded), floating point, for instance from ``torch.rand``; they alone
            determine what is drawn. Other values are refused on a CPU; on other devices they give the first or the last
            label.

    Returns:
        Labels ``(B, R)``, int64, from 1 on; all 0 for an image without labels.

    Raises:
        ValueError: If a shape or dtype is not as described; on a CPU also if a draw is out of range.

    Examples:
        >>> labels = torch.tensor([[[3, 3, 5, 5]]])
        >>> sample_labels(labels, torch.tensor([[0.1, 0.9]]))
        tensor([[3, 5]])
    """
    _check_labels(labels)
    check_tensor(draws, "draws", f"floating point (B, R) with B = {len(labels)} as labels")
    if draws.ndim != 2 or not draws.is_floating_point() or len(draws) != len(labels):
        raise ValueError(
            f"draws: expected floating point (B, R) with B = {len(labels)} as labels, "
            f"got {draws.dtype} {tuple(draws.shape)}"
        )
    if _is_readable(draws) and not bool(((draws >= 0) & (draws < 1)).all()):
        raise ValueError(
            f"draws: expected numbers from 0 up to below 1, got {float(draws.min())} to {float(draws.max())}"
        )
    ordered = labels.flatten(1).long().sort(1).values
    first = (ordered > 0) & (ordered != IGNORED)
    first[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    present = torch.where(first, ordered, 1 << _BITS).sort(1).values  # each label once, then the rest
    count = first.sum(1, keepdim=True)
    place = torch.minimum((draws * count).long().clamp(min=0), (count - 1).clamp(min=0))
    drawn = present.gather(1, place)
    return torch.where(count > 0, drawn, 0)


def same_region(first: Tensor, second: Tensor) -> Tensor:
    """Tells which cells, or regions, of two views have the same label: the positives of losses such as DetCon's.

    Args:
        first: Labels of one view, integer: of its regions ``(B, N)``, as ``sample_labels`` draws them, or of its cells
            ``(B, h, w)``, as ``cell_labels`` gives them.
        second: Labels of the other view, integer, ``(B, M)`` or ``(B, h, w)``.

    Returns:
        Boolean tensor ``(B, N, M)``, True where the labels are the same. Labels that stand for nothing (0, negative,
        255) match no label, not even themselves.

    Raises:
        ValueError: If a shape or dtype is not as described.

    Examples:
        >>> same_region(torch.tensor([[1, 2, 0]]), torch.tensor([[2, 0]]))
        tensor([[[False, False],
                 [ True, False],
                 [False, False]]])
    """
    flat = []
    for name, labels in (("first", first), ("second", second)):
        check_tensor(labels, name, "integer (B, N) or (B, h, w)")
        if labels.ndim not in (2, 3) or not _is_integer(labels) or len(labels) != len(first):
            raise ValueError(
                f"{name}: expected integer (B, N) or (B, h, w) with one B for both, got {labels.dtype} "
                f"{tuple(labels.shape)}"
            )
        flat.append(labels.flatten(1).long())
    one, other = flat
    counts = (one > 0) & (one != IGNORED)
    return (one[:, :, None] == other[:, None]) & counts[:, :, None]


def pool_regions(features: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the features over the cells of each region.

    Args:
        features: Feature map ``(B, C, h, w)``, or tokens ``(B, N, C)`` with N = h * w; floating point.
        labels: Label of each cell, integer, ``(B, h, w)``.
        ids: Labels of the regions to pool, integer, ``(B, R)``; one label may occur more than once.

    Returns:
        The means ``(B, R, C)`` in float32 (float64 stays float64), and a boolean tensor ``(B, R)``: which regions
        exist. The mean is 0 for regions that do not exist and for labels that stand for nothing (0, negative, 255). A
        cell that is not finite makes the means of its own region NaN, and no others.

    Raises:
        ValueError: If a shape or dtype is not as described.

    Examples:
        >>> features, labels = torch.tensor([[[[1.0, 3.0, 8.0]]]]), torch.tensor([[[1, 1, 2]]])
        >>> means, exist = pool_regions(features, labels, ids=torch.tensor([[1, 2, 9]]))
        >>> means.flatten().tolist(), exist.tolist()
        ([2.0, 8.0, 0.0], [[True, True, False]])
    """
    _check_labels(labels)
    batch, h, w = labels.shape
    tokens = as_tokens(features, "features")
    if tokens.shape[:2] != (batch, h * w) or (features.ndim == 4 and features.shape[2:] != (h, w)):
        raise ValueError(
            f"features: expected (B, C, h, w) or (B, h * w, C) with B, h, w = {batch}, {h}, {w} as labels, "
            f"got {tuple(features.shape)}"
        )
    check_tensor(ids, "ids", f"integer (B, R) with B = {batch} as labels")
    if ids.ndim != 2 or not _is_integer(ids) or len(ids) != batch:
        raise ValueError(f"ids: expected integer (B, R) with B = {batch} as labels, got {ids.dtype} {tuple(ids.shape)}")
    ids, labels = ids.long(), labels.long()  # wide unsigned types do not mix with others
    member = (ids[:, :, None] == labels.flatten(1)[:, None]) & ((ids > 0) & (ids != IGNORED))[:, :, None]
    area = member.sum(2)
    with torch.autocast(features.device.type, enabled=False):
        tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
        known = tokens.isfinite().all(2)
        tokens = tokens.masked_fill(~known[..., None], 0)  # in the product below 0 * NaN would reach every region
        means = member.to(tokens.dtype) @ tokens / area.clamp(min=1)[:, :, None]
        means = means.masked_fill((member & ~known[:, None]).any(2, keepdim=True), torch.nan)
    return means, area > 0


def _is_readable(x: Tensor) -> bool:
    """Whether values may be looked at: on a CPU, outside of a compiled graph, and if there are any."""
    return x.device.type == "cpu" and x.numel() > 0 and not torch.compiler.is_compiling()


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _check_labels(labels: Tensor) -> None:
    check_tensor(labels, "labels", "integer (B, h, w)")
    if labels.ndim != 3 or not _is_integer(labels):
        raise ValueError(f"labels: expected integer (B, h, w), got {labels.dtype} {tuple(labels.shape)}")
