"""Projection and prediction heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densessl._normalize import normalized
from densessl._tensors import check_number, check_tensor


class ConvMLP(nn.Module):
    """Two 1x1 convolutions with batch norm and ReLU between them: PixPro's projection head and its predictor.

    Args:
        in_dim: Number of input channels.
        hidden_dim: Number of channels between the convolutions; 4096 is the published code's (the paper says 2048).
        out_dim: Number of output channels.

    Examples:
        >>> ConvMLP(512, 64, 32)(torch.rand(2, 512, 4, 6)).shape
        torch.Size([2, 32, 4, 6])
    """

    def __init__(self, in_dim: int, hidden_dim: int = 4096, out_dim: int = 256) -> None:
        super().__init__()
        _check_widths(in_dim=in_dim, hidden_dim=hidden_dim, out_dim=out_dim)
        self.linear1 = nn.Conv2d(in_dim, hidden_dim, kernel_size=1)
        self.bn1 = nn.BatchNorm2d(hidden_dim)
        self.relu = nn.ReLU(inplace=True)
        self.linear2 = nn.Conv2d(hidden_dim, out_dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, in_dim, h, w)`` to ``(B, out_dim, h, w)``.

        Raises:
            ValueError: If the map has another shape or integer values.
        """
        check_tensor(x, "x", f"a floating point map (B, {self.linear1.in_channels}, h, w)")
        if x.ndim != 4 or not x.is_floating_point() or x.shape[1] != self.linear1.in_channels:
            raise ValueError(
                f"x: expected a floating point map (B, {self.linear1.in_channels}, h, w), "
                f"got {x.dtype} {tuple(x.shape)}"
            )
        return self.linear2(self.relu(self.bn1(self.linear1(x))))


class MLP(nn.Module):
    """Two linear layers with batch norm and ReLU between them, for one vector per image.

    Args:
        in_dim: Length of the input vectors.
        hidden_dim: Length between the layers.
        out_dim: Length of the output vectors.

    Examples:
        >>> MLP(512, 64, 32)(torch.rand(2, 512)).shape
        torch.Size([2, 32])
    """

    def __init__(self, in_dim: int, hidden_dim: int = 4096, out_dim: int = 256) -> None:
        super().__init__()
        _check_widths(in_dim=in_dim, hidden_dim=hidden_dim, out_dim=out_dim)
        self.linear1 = nn.Linear(in_dim, hidden_dim)
        self.bn1 = nn.BatchNorm1d(hidden_dim)
        self.relu = nn.ReLU(inplace=True)
        self.linear2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, in_dim)`` to ``(B, out_dim)``.

        Raises:
            ValueError: If the vectors have another shape or integer values.
        """
        check_tensor(x, "x", f"floating point vectors (B, {self.linear1.in_features})")
        if x.ndim != 2 or not x.is_floating_point() or x.shape[1] != self.linear1.in_features:
            raise ValueError(
                f"x: expected floating point vectors (B, {self.linear1.in_features}), got {x.dtype} {tuple(x.shape)}"
            )
        return self.linear2(self.relu(self.bn1(self.linear1(x))))


class PrototypeHead(nn.Module):
    """Similarity of each cell to K prototypes: the head of DINO and iBOT, as 1x1 convolutions.

    It has three layers with GELU between them, then takes the cosine with each prototype. On every cell it equals
    lightly's ``DINOProjectionHead`` (``norm_last_layer=True``). That one is not used for two reasons: the old
    ``weight_norm`` in it cannot be copied, which ``EMA`` needs, and its scores lose digits in half precision.

    Args:
        in_dim: Number of input channels.
        hidden_dim: Number of channels of the two hidden layers.
        dim: Number of channels of the space in which the prototypes lie.
        prototypes: Number of prototypes, K.

    Examples:
        >>> PrototypeHead(512, 64, dim=32, prototypes=100)(torch.rand(2, 512, 4, 6)).shape
        torch.Size([2, 100, 4, 6])
    """

    def __init__(self, in_dim: int, hidden_dim: int = 2048, dim: int = 256, prototypes: int = 8192) -> None:
        super().__init__()
        _check_widths(in_dim=in_dim, hidden_dim=hidden_dim, dim=dim, prototypes=prototypes)
        self.linear1 = nn.Conv2d(in_dim, hidden_dim, kernel_size=1)
        self.linear2 = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=1)
        self.linear3 = nn.Conv2d(hidden_dim, dim, kernel_size=1)
        self.gelu = nn.GELU()
        for layer in (self.linear1, self.linear2, self.linear3):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.randn(prototypes, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, in_dim, h, w)`` to cosines ``(B, K, h, w)``, in float32 (or float64) even under autocast.

        Raises:
            ValueError: If the map has another shape or integer values.
        """
        if x.ndim != 4 or not x.is_floating_point() or x.shape[1] != self.linear1.in_channels:
            raise ValueError(
                f"x: expected a floating point map (B, {self.linear1.in_channels}, h, w), "
                f"got {x.dtype} {tuple(x.shape)}"
            )
        cells = self.linear3(self.gelu(self.linear2(self.gelu(self.linear1(x)))))
        with torch.autocast(x.device.type, enabled=False):
            unit, prototypes = normalized(cells.flatten(2).mT), normalized(self.prototypes)
            return (unit @ prototypes.to(unit.dtype).mT).mT.unflatten(2, x.shape[2:])


def _check_widths(**widths: int) -> None:
    for name, value in widths.items():
        check_number(value, name, "a whole number of at least 1", lambda value: value >= 1, whole=True)
