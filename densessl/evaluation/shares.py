"""How much of each cell of a map each class covers."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from densessl._tensors import check_tensor
from densessl.evaluation._refuse import check_at_least, known_labels


def class_shares(
    labels: Tensor, classes: int, size: tuple[int, int], *, ignored: Literal["exclude", 0] = "exclude"
) -> Tensor:
    """How much of each cell each class covers.

    Where the labels' sides are no multiples of the map's, neighbouring cells share the pixels on their border, as
    ``adaptive_avg_pool2d`` has it.

    Args:
        labels: Class of each pixel, int64 ``(B, H, W)``, 0..classes-1, or -1 or 255 for ignored pixels.
        classes: Number of classes, at least 1.
        size: ``(h, w)`` of the cells.
        ignored: "exclude" counts among the labelled pixels only. 0 counts ignored pixels as class 0, as the open code
            of the in-context evaluation (open-hummingbird-eval 2.0.0) does.

    Returns:
        float32 ``(B, h * w, classes)``; rows sum to 1, or to 0 where no pixel of the cell is labelled.

    Raises:
        ValueError: If the labels have another shape or dtype, or a label is out of range.
    """
    check_at_least(classes, 1, "classes")
    if ignored not in ("exclude", 0):
        raise ValueError(f'ignored: expected "exclude" or 0, got {ignored!r}')
    check_tensor(labels, "labels", "int64 (B, H, W)")
    if labels.ndim != 3 or 0 in labels.shape:
        raise ValueError(f"labels: expected int64 (B, H, W), got {labels.dtype} {tuple(labels.shape)}")
    if not isinstance(size, Sequence) or len(size) != 2 or not all(isinstance(n, Integral) and n >= 1 for n in size):
        raise ValueError(f"size: expected (h, w), whole numbers of at least 1, got {size!r}")
    known = known_labels(labels, classes, "labels")
    if ignored == 0:
        labels, known = labels.masked_fill(~known, 0), torch.ones_like(known)
    shares = torch.empty(len(labels), size[0] * size[1], classes, device=labels.device)
    for image, (label, counts) in enumerate(zip(labels, known, strict=True)):  # one at a time: one-hot maps are large
        one_hot = torch.zeros(classes, *label.shape, device=labels.device)
        one_hot.scatter_(0, label.clamp(0, classes - 1)[None], counts.float()[None])
        shares[image] = F.adaptive_avg_pool2d(one_hot, size).flatten(1).mT
    return shares / shares.sum(-1, keepdim=True).clamp(min=1e-12)
