"""Which cells of a view a student does not see: blocks, drawn at random."""

from __future__ import annotations

import random
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from densessl._tensors import check_number


class BlockMask(nn.Module):
    """Draws masks of blocks for the maps of a batch, as in BEiT, iBOT and DINOv2.

    In each batch the share ``images`` of the images is masked, at least one image. The shares of masked cells in these
    images are spread over the range ``cells`` as in DINOv2: the range is cut into equal steps, each step gives one
    share, and the shares are dealt out in random order. lightly's ``random_block_mask_image`` draws the blocks. Two
    things are added around it: the draw depends on torch's generator (lightly draws from Python's own, which stays as
    it was), and fewer than four cells can be masked, where lightly raises an error.

    Args:
        cells: Smallest and largest share of the cells that is masked in a masked image, in 0..1.
        images: Share of the images that are masked, in 0..1.
        least: Number of cells of the smallest block, if at least so many cells are to be masked.

    Raises:
        ValueError: If a number is out of its range.

    Examples:
        >>> mask = BlockMask()(batch=8, size=(14, 14))
        >>> mask.shape, mask.flatten(1).any(1).sum().item()
        (torch.Size([8, 14, 14]), 4)
    """

    def __init__(self, cells: tuple[float, float] = (0.1, 0.5), images: float = 0.5, least: int = 4) -> None:
        super().__init__()
        pair = isinstance(cells, (tuple, list)) and len(cells) == 2 and all(isinstance(share, Real) for share in cells)
        if not pair or not 0 <= cells[0] <= cells[1] <= 1:
            raise ValueError(f"cells: expected two shares in 0..1, the lower first, got {cells}")
        check_number(images, "images", "a share in 0..1", lambda value: 0 <= value <= 1)
        check_number(least, "least", "a whole number of at least 1", lambda value: value >= 1, whole=True)
        self.cells, self.images, self.least = (float(cells[0]), float(cells[1])), images, least

    def extra_repr(self) -> str:
        return f"cells={self.cells}, images={self.images}, least={self.least}"

    def forward(self, batch: int, size: tuple[int, int] | torch.Size) -> Tensor:
        """Draws from torch's generator of the CPU.

        Args:
            batch: Number of images, B.
            size: Height and width ``(h, w)`` of the map in cells, both at least 2, because a block never fills a side.

        Returns:
            Boolean tensor ``(B, h, w)`` on the CPU, True where a cell is masked.

        Raises:
            ValueError: If the size or the number of images is out of range.
            ImportError: If the installed lightly is too old to have the sampler.
        """
        check_number(batch, "batch", "a whole number of at least 1", lambda value: value >= 1, whole=True)
        pair = isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(side, Integral) for side in size)
        if not pair or min(size) < 2:
            raise ValueError(f"size: expected (height, width), both at least 2, got {size}")
        chosen = max(1, round(self.images * batch)) if self.images > 0 else 0
        masks = torch.zeros(batch, *size, dtype=torch.bool)
        order, low, step = torch.randperm(batch), self.cells[0], (self.cells[1] - self.cells[0]) / max(chosen, 1)
        shares = low + step * (torch.arange(chosen, dtype=torch.float64) + torch.rand(chosen, dtype=torch.float64))
        seed, state = int(torch.randint(1 << 62, ())), random.getstate()
        try:
            random.seed(seed)
            for image, share in zip(order.tolist(), shares.tolist(), strict=False):
                masks[image] = self._blocks((size[0], size[1]), int(size[0] * size[1] * share))
        finally:
            random.setstate(state)
        return masks

    def _blocks(self, size: tuple[int, int], number: int) -> Tensor:
        from lightly.models.utils import random_block_mask_image

        if number < 1:
            return torch.zeros(size, dtype=torch.bool)
        mask: Tensor = random_block_mask_image(size, number, min_num_masks_per_block=min(self.least, number))
        return mask
