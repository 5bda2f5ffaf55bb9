"""The rule by which a run counts as collapsed, on features of known shape."""

import pytest
import torch

from densessl.metrics import effective_rank, feature_std
from examples.pretrain.common.collapsed import RANK, STD, collapsed
from examples.pretrain.pixpro_fpn import metrics_of_levels


def readings(features):
    """Deviation times sqrt(C), and effective rank."""
    return float(feature_std(features)) * features.shape[1] ** 0.5, float(effective_rank(features))


def along_one_direction(noise, channels=256, directions=None):
    """One unit direction plus noise in all directions, or in the first few."""
    generator = torch.Generator().manual_seed(0)
    features = torch.zeros(16, channels, 7, 7)
    features[:, 0] = 1
    used = channels if directions is None else directions
    features[:, :used] += noise / used**0.5 * torch.randn(16, used, 7, 7, generator=generator)
    turn = torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0]  # no channel is special
    return torch.einsum("ij,bjhw->bihw", turn, features)


def test_noise_around_one_direction_is_a_collapse_however_many_directions_it_has():
    std, rank = readings(along_one_direction(0.05))
    assert std < 0.1
    assert rank > 10
    assert collapsed(std, rank)


@pytest.mark.parametrize(
    ("noise", "directions", "expected"),
    [(0.15, None, False), (0.15, 4, True), (0.5, 4, False), (1.0, None, False), (0.0, None, True)],
)
def test_features_between_the_bounds_are_judged_by_their_directions(noise, directions, expected):
    std, rank = readings(along_one_direction(noise, directions=directions))
    assert collapsed(std, rank) == expected


@pytest.mark.parametrize(("std", "rank", "expected"), [
    (0.05, 200.0, True), (0.15, float("nan"), True), (0.31, 1.0, False), (float("nan"), 50.0, True),
    (float("nan"), float("nan"), True), (0.127, 20.0, False),
])  # fmt: skip
def test_values_that_are_at_hand(std, rank, expected):
    assert collapsed(std, rank) == expected


def test_the_level_that_collapsed_stands_for_a_pyramid():
    levels = {"p3": along_one_direction(0.12), "p4": along_one_direction(0.2, directions=3)}
    cells = {level: torch.eye(49, dtype=torch.bool).expand(16, -1, -1) for level in levels}
    valid = {level: torch.ones(16, 49, dtype=torch.bool) for level in levels}
    both = {level: readings(features) for level, features in levels.items()}
    assert both["p3"][0] < both["p4"][0]  # the healthy level has the lower deviation
    assert not collapsed(*both["p3"])
    assert collapsed(*both["p4"])
    metrics = metrics_of_levels(levels, levels, cells, valid, valid)
    assert (float(metrics[STD]), float(metrics[RANK])) == pytest.approx(both["p4"], abs=1e-4)
    healthy = {"p3": along_one_direction(0.12), "p4": along_one_direction(1.0)}
    metrics = metrics_of_levels(healthy, healthy, cells, valid, valid)
    assert float(metrics[STD]) == pytest.approx(both["p3"][0], abs=1e-4)
