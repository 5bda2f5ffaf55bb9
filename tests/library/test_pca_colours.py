"""Principal components as colours: what they hold, and that people who confuse red and green see them too."""

import pytest
import torch

from densessl._pca import oklab_to_srgb
from densessl.plots import pca_colours

LUMINANCE = torch.tensor([0.2126, 0.7152, 0.0722])


def test_oklab_gives_the_known_colours():
    lightness = torch.tensor([0.0, 1.0, 0.627955, 0.452014], dtype=torch.float64)
    red = torch.tensor([0.0, 0.0, 0.224863, -0.032457], dtype=torch.float64)
    yellow = torch.tensor([0.0, 0.0, 0.125846, -0.311528], dtype=torch.float64)
    expected = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(oklab_to_srgb(lightness, red, yellow), expected, atol=2e-3, rtol=0)


def test_three_directions_hold_everything():
    directions = torch.linalg.qr(torch.randn(6, 3)).Q
    maps = torch.einsum("ck,bkhw->bchw", directions, torch.rand(2, 3, 4, 7) + 0.1)
    colours, held = pca_colours(maps)
    assert colours.shape == (2, 3, 4, 7)
    assert colours.dtype == torch.float32
    assert colours.min() >= 0
    assert colours.max() <= 1
    assert held == pytest.approx(1)


def test_the_strongest_component_is_light_against_dark():
    maps = torch.zeros(1, 5, 4, 6)
    maps[:, 0, :, :3] = maps[:, 1, :, 3:] = 1
    maps += 0.05 * torch.randn(1, 5, 4, 6)
    light = torch.einsum("c,chw->hw", LUMINANCE, pca_colours(maps)[0][0])
    sides = light[:, :3], light[:, 3:]
    assert max(side.min() for side in sides) - min(side.max() for side in sides) > 0.3


def test_several_maps_share_their_colours():
    maps = torch.randn(1, 8, 5, 6).expand(2, -1, -1, -1)
    colours = pca_colours(maps)[0]
    torch.testing.assert_close(colours[0], colours[1])


def test_maps_of_few_directions_and_none():
    one = torch.randn(1, 1, 3, 4)  # of one channel: the unit features are 1 and -1
    assert torch.isfinite(pca_colours(one)[0]).all()
    grey, held = pca_colours(torch.ones(2, 6, 3, 5))
    assert held == 0
    assert float(grey.max() - grey.min()) < 1e-4


@pytest.mark.parametrize("maps", [torch.randn(3, 4, 5), torch.ones(1, 3, 4, 5, dtype=torch.int64)])
def test_bad_input_is_named(maps):
    with pytest.raises(ValueError, match=r"^maps: expected"):
        pca_colours(maps)
