"""Maps and tokens: the two forms in which features come, and the way between them."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from densessl._tensors import check_tensor


def map_to_tokens(features: Tensor) -> Tensor:
    """Turns a feature map into tokens.

    Args:
        features: Feature map ``(B, C, h, w)``.

    Returns:
        Tokens ``(B, h * w, C)`` in row-major order.

    Raises:
        ValueError: If a shape is not as described.

    Examples:
        >>> map_to_tokens(torch.rand(2, 8, 4, 6)).shape
        torch.Size([2, 24, 8])
    """
    check_tensor(features, "features", "a map (B, C, h, w)")
    if features.ndim != 4:
        raise ValueError(f"features: expected a map (B, C, h, w), got {tuple(features.shape)}")
    return rearrange(features, "b c h w -> b (h w) c")


def tokens_to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Turns tokens into a feature map.

    Args:
        tokens: Tokens ``(B, N, C)`` in row-major order, with N = h * w.
        size: Height and width ``(h, w)`` of the map in cells.

    Returns:
        Feature map ``(B, C, h, w)``.

    Raises:
        ValueError: If the tokens have another shape, or the size is not that of N cells.

    Examples:
        >>> tokens_to_map(torch.rand(2, 24, 8), (4, 6)).shape
        torch.Size([2, 8, 4, 6])
    """
    h, w = size
    check_tensor(tokens, "tokens", f"(B, h * w = {h} * {w}, C)")
    if tokens.ndim != 3 or tokens.shape[1] != h * w:
        raise ValueError(f"tokens: expected (B, h * w = {h} * {w}, C), got {tuple(tokens.shape)}")
    return rearrange(tokens, "b (h w) c -> b c h w", h=h, w=w)
