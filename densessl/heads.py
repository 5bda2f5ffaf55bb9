"""Projection and prediction heads."""

from __future__ import annotations

from torch import Tensor, nn


class ConvMLP(nn.Module):
    """Two 1x1 convolutions with batch norm and ReLU between them: PixPro's projection head, and its predictor.

    Args:
        in_dim: channels that come in.
        hidden_dim: 4096 as in the published code (the paper: 2048).
        out_dim: channels that go out.
    """

    def __init__(self, in_dim: int, hidden_dim: int = 4096, out_dim: int = 256) -> None:
        super().__init__()
        self.linear1 = nn.Conv2d(in_dim, hidden_dim, kernel_size=1)
        self.bn1 = nn.BatchNorm2d(hidden_dim)
        self.relu = nn.ReLU(inplace=True)
        self.linear2 = nn.Conv2d(hidden_dim, out_dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_dim, h, w)`` to ``(B, out_dim, h, w)``.

        Raises:
            ValueError: on another shape or integer features.
        """
        if x.ndim != 4 or not x.is_floating_point() or x.shape[1] != self.linear1.in_channels:
            raise ValueError(
                f"x: expected a floating point map (B, {self.linear1.in_channels}, h, w), "
                f"got {x.dtype} {tuple(x.shape)}"
            )
        return self.linear2(self.relu(self.bn1(self.linear1(x))))


class MLP(nn.Module):
    """Two linear layers with batch norm and ReLU between them, for one vector per image.

    Args:
        in_dim: width of the vectors that come in.
        hidden_dim: width between the layers.
        out_dim: width of the vectors that go out.
    """

    def __init__(self, in_dim: int, hidden_dim: int = 4096, out_dim: int = 256) -> None:
        super().__init__()
        self.linear1 = nn.Linear(in_dim, hidden_dim)
        self.bn1 = nn.BatchNorm1d(hidden_dim)
        self.relu = nn.ReLU(inplace=True)
        self.linear2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_dim)`` to ``(B, out_dim)``.

        Raises:
            ValueError: on another shape or integer features.
        """
        if x.ndim != 2 or not x.is_floating_point() or x.shape[1] != self.linear1.in_features:
            raise ValueError(
                f"x: expected floating point vectors (B, {self.linear1.in_features}), got {x.dtype} {tuple(x.shape)}"
            )
        return self.linear2(self.relu(self.bn1(self.linear1(x))))
