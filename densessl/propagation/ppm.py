"""The pixel propagation module."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn

from densessl._checks import as_tokens, as_valid
from densessl._memory import check_fits
from densessl._normalize import normalized
from densessl._tensors import check_number, check_tensor
from densessl.features import tokens_to_map
from densessl.propagation._blockwise import power, propagate


def propagation_weights(tokens: Tensor, gamma: float = 2.0) -> Tensor:
    """``s(x_i, x_j) = max(cos(x_i, x_j), 0) ** gamma`` (PixPro, Eq. 4).

    Args:
        tokens: Tokens ``(B, N, C)``.
        gamma: Exponent, above 0. Below 1 its gradient is infinite at 0, so 1e-6 is added before the power, as in the
            published code.

    Returns:
        Weights ``(B, N, N)``.

    Examples:
        >>> propagation_weights(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
        tensor([[[1., 0.],
                 [0., 1.]]])
    """
    unit = normalized(tokens)
    return power(unit @ unit.mT, gamma)


class PPM(nn.Module):
    """Pixel propagation module (PixPro, Eqs. 3 and 4): each cell becomes a sum over all cells similar to it.

    The sum is ``y_i = sum_j s(x_i, x_j) g(x_j)``, not normalised by the sum of s. PPM does not mean PSPNet's pyramid
    pooling module here.

    Published: ``PPM(nn.Conv2d(256, 256, 1))``. ``PPM()`` has no parameters (the paper's l = 0). A transform of two
    layers: ``PPM(nn.Sequential(nn.Conv2d(256, 256, 1), nn.BatchNorm2d(256), nn.ReLU(), nn.Conv2d(256, 256, 1)))``.

    Args:
        transform: The function g, a module from map ``(B, C, h, w)`` to map; None means the identity.
        gamma: Exponent of the similarity, above 0; 2 as in the paper.
        normalize_values: Whether g(x) is L2-normalised per cell. The published code does so; Eq. 3 does not (False).
        algorithm: How the sum is taken; the values are the same up to rounding. ``"dense"`` holds the weights of all
            pairs of cells at once, ``(B, N, N)``. ``"blockwise"`` computes them tile by tile, and again in the backward
            pass, so that memory grows with N; the sum can then be differentiated only once. ``"triton"`` does the same
            by kernels for a CUDA device, in float32, bfloat16 or float16. None takes ``"dense"`` below 1,024 cells and
            ``"blockwise"`` from there on; it never takes ``"triton"``, because that was measured on a single card, an
            H100, where it took 0.92 of the time of ``"blockwise"``.

    Raises:
        ValueError: If the transform is not a module, or is an ``nn.Linear``; if gamma is not positive; or if the
            algorithm is unknown.

    Examples:
        >>> ppm = PPM(nn.Conv2d(32, 32, 1))
        >>> ppm(torch.rand(2, 32, 7, 7)).shape
        torch.Size([2, 32, 7, 7])
    """

    def __init__(
        self,
        transform: nn.Module | None = None,
        *,
        gamma: float = 2.0,
        normalize_values: bool = True,
        algorithm: Literal["dense", "blockwise", "triton"] | None = None,
    ) -> None:
        super().__init__()
        if transform is not None and not isinstance(transform, nn.Module):
            what = "a class" if isinstance(transform, type) else repr(transform)
            raise ValueError(f"transform: expected a module, such as nn.Conv2d(256, 256, 1), or None, got {what}")
        if isinstance(transform, nn.Linear):
            raise ValueError(
                "transform: expected a module from map to map, such as nn.Conv2d(256, 256, 1), got an nn.Linear, which "
                "would act along the map's width"
            )
        check_number(gamma, "gamma", "a positive exponent", lambda value: value > 0)
        if algorithm not in (None, "dense", "blockwise", "triton"):
            raise ValueError(f'algorithm: expected "dense", "blockwise", "triton" or None, got {algorithm!r}')
        self.transform = nn.Identity() if transform is None else transform
        self.gamma = gamma
        self.normalize_values = normalize_values
        self.algorithm = algorithm

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, normalize_values={self.normalize_values}, algorithm={self.algorithm!r}"

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Sums over all similar cells.

        Args:
            x: Feature map ``(B, C, h, w)`` or tokens ``(B, N, C)``, floating point.
            valid: Optional boolean tensor ``(B, N)`` or ``(B, h, w)``, for instance from ``densessl.cell_validity``:
                the cells that are summed over. Other cells get a sum too, which a mask of valid cells leaves unused;
                those of them that are not finite count as 0.

        Returns:
            The sums in the same form and size, with the channels that ``transform`` gives. They are not normalised
            here: the losses do that (the published code does so at its end).

        Raises:
            ValueError: If a shape or dtype is not as described; if ``transform`` changes the number of cells; on
                tokens, if it has convolutions over more than one cell; with ``algorithm="dense"``, if the weights
                cannot fit into memory; with ``algorithm="triton"``, if Triton or a CUDA device is missing, or the dtype
                is float64.
        """
        tokens = as_tokens(x, "x")
        if valid is not None:
            keep = as_valid(valid, x, "valid")
            # 0 * NaN would reach all cells, through the sum, through a norm within g and through the gradients.
            read = keep | tokens.isfinite().all(2)
            x = x.masked_fill(~(read[..., None] if x.ndim == 3 else read.view(-1, 1, *x.shape[2:])), 0)
            tokens = as_tokens(x, "x")
        if x.ndim == 3 and any(isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) for m in self.transform.modules()):
            raise ValueError(
                "transform: expected convolutions of 1 x 1 for tokens, whose neighbours are not known; pass x as a map"
            )
        # g is made of 1x1 convolutions and works on maps: tokens pass as a map of one column.
        values = self.transform(x if x.ndim == 4 else tokens_to_map(tokens, (tokens.shape[1], 1)))
        check_tensor(values, "transform", "that it gives a map")
        if values.ndim != 4 or values.shape[2:].numel() != tokens.shape[1]:
            got = tuple(values.shape)
            raise ValueError(f"transform: expected that it keeps the map's {tokens.shape[1]} cells, got a map {got}")
        values = values.flatten(2).mT
        if self.normalize_values:
            values = normalized(values)
        if valid is not None:
            values = values.masked_fill(~keep[..., None], 0)
        algorithm = self.algorithm or ("dense" if tokens.shape[1] < _MANY_CELLS else "blockwise")
        if algorithm == "dense":
            held = _BYTES_A_PAIR * tokens.shape[0] * tokens.shape[1] ** 2
            shape = (*tokens.shape[:2], tokens.shape[1])
            check_fits(held, x.device, "x", f"the table of all weights, {shape},", 'algorithm="blockwise"')
            weights = propagation_weights(tokens, self.gamma)
            out = weights @ values.to(weights.dtype)
        else:
            unit = normalized(tokens)
            dtype = _product_dtype(unit)
            if algorithm == "triton":
                _check_kernels(x.device, dtype)
            out = propagate(unit.to(dtype), values.to(dtype), self.gamma, algorithm == "triton")
        return tokens_to_map(out, (x.shape[2], x.shape[3])) if x.ndim == 4 else out


_MANY_CELLS = 1024  # from so many cells on, tiles are faster
_BYTES_A_PAIR = 12  # taken by cosines and weights in the forward pass


def _product_dtype(unit: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of ``unit`` would run here: autocast does not reach operators of our own."""
    device = unit.device.type
    wide = unit.dtype == torch.float64 or not torch.is_autocast_enabled(device)
    return unit.dtype if wide else torch.get_autocast_dtype(device)


_TRITON = find_spec("triton") is not None  # torch brings it on Linux


def _check_kernels(device: torch.device, dtype: torch.dtype) -> None:
    if not _TRITON:
        raise ValueError('algorithm: "triton" needs the package triton, which is not installed')
    if device.type != "cuda":
        raise ValueError(f'x: expected a CUDA device for algorithm="triton", got {device}')
    if dtype == torch.float64:
        raise ValueError('x: expected float32, bfloat16 or float16 for algorithm="triton", got torch.float64')
