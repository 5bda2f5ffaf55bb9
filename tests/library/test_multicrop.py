"""Two large views and several small ones: sizes, shares, coords, and both halves of the photometric steps."""

import pytest
import torch
from torchvision.transforms import v2

from densessl import (
    DistanceMatcher,
    View,
    byol_photometric,
    check_tracking,
    multicrop_photometric,
    multicrop_views,
)
from densessl.augment.presets import PILGaussianBlur


def test_views_of_two_sizes_know_where_they_are_from():
    image = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8)
    views = multicrop_views((48, 40), 24, 3, photometric=False)(image, seeds=range(5))
    assert [tuple(view.image.shape) for view in views] == [(3, 48, 40)] * 2 + [(3, 24, 24)] * 3
    shares = [float(view.coords[:2, :2].det().abs()) for view in views]
    assert all(0.38 < share <= 1.01 for share in shares[:2])
    assert all(0.03 < share < 0.42 for share in shares[2:])
    large, small = views[0].coords[None], views[2].coords[None]
    assert DistanceMatcher()(small, large, (3, 3), (6, 5)).shape == (1, 9, 30)
    check_tracking(multicrop_views(32, 16, 1, photometric=False), draws=5)


def test_colours_are_dinos():
    for index, pipeline in enumerate(multicrop_views(small=2).transforms):
        steps = [step for part in pipeline.transforms for step in (part, *getattr(part, "transforms", ()))]
        blur = next(s for s in steps if isinstance(s, v2.RandomApply) and isinstance(s.transforms[0], PILGaussianBlur))
        solarize = next(s for s in steps if isinstance(s, v2.RandomSolarize))
        assert (blur.p, solarize.p) == [(1.0, 0.0), (0.1, 0.2), (0.5, 0.0), (0.5, 0.0)][index]


def test_the_photometric_half_of_large_views_is_byols():
    halves = multicrop_photometric(3)
    assert len(halves) == 5
    assert halves[2] is halves[3] is halves[4]
    view = View(torch.rand(4, 3, 16, 16), torch.eye(3).expand(4, 3, 3), torch.full((4, 2), 16))
    for one, other in zip(halves, byol_photometric(), strict=False):
        assert torch.equal(one(view, seed=5).image, other(view, seed=5).image)
    assert halves[2](view, seed=5).image.shape == (4, 3, 16, 16)


@pytest.mark.parametrize("make", [lambda n: multicrop_views(small=n), multicrop_photometric])
def test_a_negative_number_is_refused(make):
    with pytest.raises(ValueError, match="small: expected a number of views of at least 0, got -1"):
        make(-1)
    assert make(0) is not None
