"""The tracer: an image whose pixels say where in the source they are. The first of the three oracles."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors

from densessl import cell_centers

MARK = 0.5


def tracer(size: tuple[int, int]) -> tv_tensors.Image:
    """x and y of each pixel's centre in source pixels, and a constant that fill does not have."""
    h, w = size
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    return tv_tensors.Image(torch.stack([x, y, torch.full_like(x, MARK)]))


def claimed(coords: Tensor, view_size: tuple[int, int], source: tuple[int, int]) -> Tensor:
    """(2, H, W): where the coords place each view pixel, in source pixels."""
    centers = cell_centers(coords.as_subclass(Tensor)[None], view_size)[0]
    return (centers * torch.tensor([source[1], source[0]])).T.unflatten(1, view_size)


def interior(view: Tensor, rim: int) -> Tensor:
    """(H, W) bool: pixels further than rim from the view's edge and from fill."""
    known = ((view[2] - MARK).abs() < 1e-4).float()[None]
    return -F.max_pool2d(-F.pad(known, [rim] * 4), 2 * rim + 1, stride=1)[0] > 0


def tracking_error(view: Tensor, coords: Tensor, source: tuple[int, int], rim: int = 3) -> float:
    """Largest distance between what the pixels say and what the coords say, in source pixels."""
    view = view.as_subclass(Tensor)
    place = claimed(coords, tuple(view.shape[-2:]), source)
    inside = interior(view, rim)
    # Outside the source nothing matches, so nothing is claimed there.
    limit = torch.tensor([source[1], source[0]])[:, None, None]
    inside &= ((place >= 0) & (place <= limit)).all(0) | place.isnan().any(0)
    assert inside.sum() > 10, "nothing to compare"
    return float((view[:2] - place)[:, inside].norm(dim=0).nan_to_num(torch.inf).max())
