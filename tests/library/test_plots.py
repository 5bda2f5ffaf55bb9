"""Figures: drawn from every legal form of input, not blank, and clear about illegal ones."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch

from densessl import DistanceMatcher, ViewCoords, plots

matplotlib = pytest.importorskip("matplotlib")


def _drawn(figure) -> np.ndarray:
    """The figure's pixels, (H, W, 3)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba")
    width, height = (int(side) for side in figure.canvas.get_width_height())
    return np.frombuffer(buffer.getvalue(), np.uint8).reshape(height, width, 4)[..., :3]


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _identity_mask(size_q: tuple[int, int], size_k: tuple[int, int], sparse: bool = False) -> torch.Tensor:
    coords = ViewCoords(canvas_size=(30, 40)).as_subclass(torch.Tensor)[None]
    mask = DistanceMatcher(sparse=sparse)(coords, coords, size_q, size_k)
    return mask[0]


@pytest.mark.parametrize("sparse", [False, True])
def test_correspondence_draws_the_chosen_cell_and_its_matches(image, sparse):
    mask = _identity_mask((3, 4), (6, 5), sparse)
    keep = torch.arange(30) != _identity_mask((3, 4), (6, 5))[5].nonzero()[0]
    mask = mask * keep  # a sparse mask keeps the entries that become False
    figure = plots.plot_correspondence(image, image.float() / 255, mask, (3, 4), (6, 5), cell=5)
    dense = mask.to_dense()
    marks = [line.get_xydata()[0] for line in figure.axes[1].lines]
    expected = [((k % 5 + 0.5) * 40 / 5, (k // 5 + 0.5) * 30 / 6) for k in dense[5].nonzero().flatten().tolist()]
    assert expected
    np.testing.assert_allclose(sorted(map(tuple, marks)), sorted(expected))
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata()[0], (1.5 * 40 / 4, 1.5 * 30 / 3))
    assert _drawn(figure).std() > 10


def test_correspondence_picks_the_central_matched_cell(image):
    mask = torch.zeros(12, 12, dtype=torch.bool)
    mask[0, 3] = mask[6, 7] = True
    figure = plots.plot_correspondence(image, image, mask, (3, 4))
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata()[0], (2.5 * 10, 1.5 * 10))


def test_correspondence_without_a_match_says_so(image):
    figure = plots.plot_correspondence(image, image, torch.zeros(12, 12, dtype=torch.bool), (3, 4))
    assert figure.get_suptitle() == "no matched pair"


def test_similarity_shows_the_cosines(image):
    features = torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(1))
    other = torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    heat = plots.plot_similarity(features, image, 7).axes[1].images[-1].get_array()
    assert heat.shape == (3, 4)
    assert float(heat[1, 3]) == pytest.approx(1)
    figure = plots.plot_similarity(features, image, 7, other, image)
    heat = figure.axes[2].images[-1].get_array()
    expected = torch.nn.functional.cosine_similarity(features[:, 1, 3], other[:, 2, 5].float(), dim=0)
    assert float(heat[2, 5]) == pytest.approx(float(expected), abs=1e-5)
    assert _drawn(figure).std() > 10


def test_pca_colours_two_regions_differently(image):
    features = torch.zeros(5, 4, 6)
    features[0, :, :3] = features[1, :, 3:] = 1
    features = features + 0.01 * torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(3))
    figure = plots.plot_pca(features.requires_grad_(), image)
    shown = figure.axes[1].images[0].get_array()
    assert shown.shape == (4, 6, 3)
    assert abs(float(shown[:, :3, 0].mean() - shown[:, 3:, 0].mean())) > 0.7
    assert _drawn(figure).std() > 10


def test_pca_of_a_constant_map_is_grey(image):
    shown = plots.plot_pca(torch.ones(5, 4, 6), image).axes[1].images[0].get_array()
    assert np.ptp(shown) < 1e-4
    assert 0.3 < shown.mean() < 0.7


def test_no_pyplot_state(image):
    def registered():
        return sys.modules["matplotlib.pyplot"].get_fignums() if "matplotlib.pyplot" in sys.modules else []

    before = registered()  # figures that other tests left open
    plots.plot_pca(torch.randn(5, 4, 6), image)
    assert registered() == before


def test_bad_input_is_named(image):
    mask = torch.zeros(12, 12, dtype=torch.bool)
    features = torch.randn(8, 3, 4)
    for call, name in [
        (lambda: plots.plot_correspondence(image[:1], image, mask, (3, 4)), "image_q"),
        (lambda: plots.plot_correspondence(image, image.int(), mask, (3, 4)), "image_k"),
        (lambda: plots.plot_correspondence(image, image, mask[None], (3, 4)), "mask"),
        (lambda: plots.plot_correspondence(image, image, mask.float(), (3, 4)), "mask"),
        (lambda: plots.plot_correspondence(image, image, mask, (0, 4)), "size_q"),
        (lambda: plots.plot_correspondence(image, image, mask, (3, 4), cell=12), "cell"),
        (lambda: plots.plot_similarity(features[None], image, 0), "features_q"),
        (lambda: plots.plot_similarity(features, image, 12), "cell"),
        (lambda: plots.plot_similarity(features, image, 0, features), "image_k"),
        (lambda: plots.plot_similarity(features, image, 0, features[:4], image), "features_k"),
        (lambda: plots.plot_pca(features[:2], image), "features"),
        (lambda: plots.plot_pca(features.long(), image), "features"),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            call()


def test_without_matplotlib_the_error_names_the_extra(image, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install densessl\[plots\]"):
        plots.plot_pca(torch.randn(5, 4, 6), image)
