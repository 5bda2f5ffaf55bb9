"""Whether a method has the parts that the training looks for."""

from __future__ import annotations

from torch import nn

from densessl import EMA


def check_method(method: nn.Module, backbone: nn.Module) -> None:
    """Checks that the backbone and the target encoder are where the training saves, scores and updates them.

    Args:
        method: A method, as a recipe makes it.
        backbone: The backbone that it was given.

    Raises:
        ValueError: If ``encoder`` does not begin with the backbone, if ``target`` is no EMA, or if there is another
            EMA, which nothing would update.
    """
    name, encoder = type(method).__name__, getattr(method, "encoder", None)
    first = next(encoder.children(), None) if isinstance(encoder, nn.Module) else None
    if first is not backbone:
        got = "none" if encoder is None else type(encoder).__name__
        begins = "" if first is None else f" that begins with {type(first).__name__}"
        raise ValueError(
            f"method: expected {name}.encoder to begin with the backbone that it was given, as in "
            f"nn.Sequential(backbone, head), got {got}{begins}"
        )
    target = getattr(method, "target", None)
    if target is not None and not isinstance(target, EMA):
        raise ValueError(f"method: expected {name}.target to be an EMA of the encoder, got {type(target).__name__}")
    for place, module in method.named_modules():
        if isinstance(module, EMA) and module is not target:
            raise ValueError(
                f"method: expected the moving average of the encoder in {name}.target, which the training updates, got "
                f"an EMA in {name}.{place}"
            )
