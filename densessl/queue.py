"""The queue of negatives."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from densessl._normalize import normalized
from densessl._tensors import check_number, check_tensor


class KeyQueue(nn.Module):
    """The last keys of the momentum encoder, first in, first out: negatives for ``InfoNCELoss`` (MoCo, Sec. 3.2).

    lightly's ``MemoryBankModule`` is not used for two reasons. Its bank is not part of the state, so a continued run
    would start with random negatives. And each update reads the place in the bank back from the device.

    Args:
        length: Number of keys to hold; 65,536 in MoCo and DenseCL. It need not be a multiple of the batch.
        dim: Length of the keys, C.

    Attributes:
        keys: Keys of unit length, ``(length, dim)``, float32, the oldest first. They are random at first, as published,
            and are saved with the state.

    Raises:
        ValueError: If length or dim is below 1.

    Examples:
        >>> queue = KeyQueue(length=1024, dim=32)
        >>> queue.push(torch.rand(8, 32))
        >>> queue.keys.shape
        torch.Size([1024, 32])
    """

    keys: Tensor

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        for name, value in (("length", length), ("dim", dim)):
            check_number(value, name, "a whole number of at least 1", lambda value: value >= 1, whole=True)
        self.register_buffer("keys", normalized(torch.randn(length, dim)))

    def extra_repr(self) -> str:
        return f"length={self.keys.shape[0]}, dim={self.keys.shape[1]}"

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Takes in the keys of all processes; the oldest keys leave. Call it after the loss that used the queue.

        Args:
            keys: New keys ``(B, dim)``, floating point, with the same B in every process. They are normalised here.

        Raises:
            ValueError: If a shape or dtype is not as described.
        """
        length, dim = self.keys.shape
        check_tensor(keys, "keys", f"floating point (B, {dim})")
        if keys.ndim != 2 or keys.shape[1] != dim or not keys.is_floating_point():
            raise ValueError(f"keys: expected floating point (B, {dim}), got {keys.dtype} {tuple(keys.shape)}")
        new = normalized(keys).to(self.keys.dtype)
        if dist.is_available() and dist.is_initialized():
            parts = [torch.empty_like(new) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, new.contiguous())
            new = torch.cat(parts)
        # A tensor of its own: the backward pass of this step still needs the old one.
        self.keys = torch.cat([self.keys[len(new) :], new[-length:]])
