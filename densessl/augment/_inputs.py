"""Checks what MultiView takes: images, masks and seeds in their forms; everything else is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from densessl.augment._steps import is_pil
from densessl.coords import MovingMask

_SLACK = 1e-3  # how far rounding may put values beyond 0..1
_MASK_MODES = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B", "F")


def as_image(image: Any) -> Any:
    """A PIL image without palette, or an image tensor ``(C, H, W)``.

    Raises:
        ValueError: If the image is anything else, a tensor ``(H, W, C)`` for instance.
    """
    if is_pil(image):
        # Palettes would be interpolated as if they were colours, and black-and-white images would have nothing in
        # between.
        if image.mode == "1":
            return image.convert("L")
        return image.convert("RGB") if image.mode in ("P", "PA", "RGBA", "CMYK", "YCbCr", "LAB", "HSV") else image
    if not isinstance(image, Tensor) or image.ndim != 3 or 0 in image.shape or image.layout != torch.strided:
        got: Any = tuple(image.shape) if isinstance(image, (Tensor, np.ndarray)) else type(image).__name__
        got = image.layout if isinstance(image, Tensor) and image.layout != torch.strided else got
        raise ValueError(f"image: expected a PIL image or a tensor (C, H, W), got {got}")
    if image.shape[2] <= 4 < min(image.shape[:2]):
        raise ValueError(
            f"image: expected (C, H, W), got {tuple(image.shape)}, which looks like (H, W, C): permute(2, 0, 1) it"
        )
    if image.is_complex():
        raise ValueError(f"image: expected an integer or floating point tensor, got {image.dtype}")
    return image if isinstance(image, tv_tensors.Image) else tv_tensors.Image(image.as_subclass(Tensor))


def refuse_depth(image: Any) -> None:
    """Raises ValueError for images whose type does not say what white is, if a step divides by it.

    ``ToDtype(scale=True)`` would turn values of 0 to 255 in 32 bits into a black image.
    """
    if is_pil(image):
        if image.mode in ("I", "F"):
            raise ValueError(
                f"image: expected a PIL image of 8 or 16 bits, got {image.mode}, a mode that does not say what "
                "white is: divide by the largest possible value and pass a floating point tensor"
            )
    elif not image.is_floating_point() and image.dtype not in (torch.uint8, torch.uint16):
        raise ValueError(
            f"image: expected uint8, uint16, or floating point in 0..1, got {image.dtype}: the pipeline would divide "
            "by the largest number of that type; divide by the largest possible value and pass floating point"
        )


def refuse_values(image: Any, name: str = "image", slack: float = _SLACK) -> None:
    """Raises ValueError where floating point values are not in 0..1: times 255, normalised already, NaN.

    Args:
        image: A tensor. PIL images pass unchecked, because their mode says what their values mean.
        name: The argument's name, for the error.
        slack: How far values may lie beyond 0..1.
    """
    if not isinstance(image, Tensor) or not image.is_floating_point():
        return
    low, high = (float(bound) for bound in image.as_subclass(Tensor).aminmax())
    if not (low >= -slack and high <= 1 + slack):
        advice = "it seems to be normalised already" if low < -slack else "divide by its largest possible value"
        if low != low:
            advice = "it holds NaN"
        raise ValueError(f"{name}: expected floating point values in 0..1, got {low:.3g} to {high:.3g}: {advice}")


def as_mask(mask: Any, size: tuple[int, ...]) -> MovingMask:
    """A mask ``(H, W)`` or ``(1, H, W)`` of the image's size.

    Raises:
        ValueError: If the mask is a colour image, has another shape or size, or is no mask at all.
    """
    if is_pil(mask):
        if mask.mode not in _MASK_MODES:
            raise ValueError(
                f"mask: expected a PIL image of one channel, mode L, P, I or the like, got mode {mask.mode}: turn "
                "colours into labels first"
            )
        mask = F.pil_to_tensor(mask)[0]
    elif isinstance(mask, np.ndarray):
        if mask.dtype.kind not in "biuf":
            raise ValueError(f"mask: expected numbers, got an array of {mask.dtype}")
        mask = torch.as_tensor(np.ascontiguousarray(mask, mask.dtype.newbyteorder("=")))
    if not isinstance(mask, Tensor) or mask.layout != torch.strided:
        got = mask.layout if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask: expected a PIL image or a tensor (H, W) or (1, H, W), got {got}")
    plain = mask.as_subclass(Tensor)
    if plain.ndim not in (2, 3) or tuple(plain.shape[-2:]) != tuple(size) or (plain.ndim == 3 and len(plain) != 1):
        raise ValueError(
            f"mask: expected (H, W) = {tuple(size)}, the image's size, or (1, H, W), got {tuple(plain.shape)}"
        )
    return plain.as_subclass(MovingMask)


def checked_seeds(seeds: Sequence[int | Sequence[int]] | None, views: int) -> list[int | None]:
    """One number of 64 bits per view, or None per view where there are no seeds.

    Raises:
        ValueError: If the number of seeds differs from the number of views, or a seed is no int of at least 0.
    """
    if seeds is None:
        return [None] * views
    if isinstance(seeds, (Tensor, np.ndarray)):
        seeds = seeds.tolist()
    if isinstance(seeds, str) or not isinstance(seeds, Sequence) or len(seeds) != views:
        got = f"{len(seeds)} of them" if isinstance(seeds, Sequence) else repr(seeds)
        raise ValueError(f"seeds: expected one per view, {views} of them, got {got}")
    return [_number(seed) for seed in seeds]


def _number(seed: int | Sequence[int]) -> int:
    numbers = list(seed) if isinstance(seed, Sequence) and not isinstance(seed, str) else [seed]
    if not numbers or any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 0 for n in numbers):
        raise ValueError(f"seeds: expected ints of at least 0, or sequences of such, got {seed!r}")
    if not isinstance(seed, Sequence):
        if numbers[0] >= 2**64:
            raise ValueError(f"seeds: expected ints below 2**64, got {seed!r}")
        return int(numbers[0])
    return int(np.random.SeedSequence([int(n) for n in numbers]).generate_state(1, np.uint64)[0])
