"""Parts at several levels equal the parts called level by level, by hand."""

import pytest
import torch
from torch import nn

from densessl import (
    PPM,
    ConvMLP,
    DistanceMatcher,
    PerLevel,
    PixContrastLoss,
    PixProLoss,
    coords_from_boxes,
    level_mean,
    level_sizes,
)

SIZES_1 = {"p3": (6, 10), "p4": (3, 5), "p5": (2, 3)}
SIZES_2 = {"p3": (4, 7), "p4": (2, 4), "p5": (1, 2)}  # the second view is smaller
BOXES_1 = torch.tensor([[0.0, 0.0, 0.8, 0.7], [0.9, 0.1, 0.2, 0.6]], dtype=torch.float64)
BOXES_2 = torch.tensor([[0.2, 0.1, 1.0, 0.9], [0.3, 0.0, 0.8, 1.0]], dtype=torch.float64)
SOURCE = torch.tensor([[375, 500], [400, 300]])
LEVELS = list(SIZES_1)


def maps(sizes: dict, seed: int, channels: int = 5) -> dict:
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.randn(2, channels, h, w, dtype=torch.float64, generator=draw) for n, (h, w) in sizes.items()}


def as_list(levels: dict) -> list:
    return list(levels.values())


def as_is(levels: dict) -> dict:
    return levels


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Conv2d(5, 5, 1).double()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "per level"])
@pytest.mark.parametrize("form", [as_list, as_is])
def test_pixpro_over_levels_equals_each_level_by_hand(form, own, sparse):
    z1, t2 = maps(SIZES_1, 0), maps(SIZES_2, 1)
    c1, c2 = coords_from_boxes(BOXES_1), coords_from_boxes(BOXES_2)
    ppms = {name: PPM(linear(seed if own else 0)) for seed, name in enumerate(LEVELS)}
    match, loss = DistanceMatcher(0.7, sparse=sparse), PixProLoss()
    expected = []
    for name in LEVELS:
        mask = match(c1, c2, SIZES_1[name], SIZES_2[name], SOURCE)
        expected.append(loss(ppms[name](z1[name]), t2[name], mask))
    assert len({value.item() for value in expected}) == 3

    propagate = PerLevel(form(ppms) if own else ppms["p3"])
    q, k = form(z1), form(t2)
    masks = PerLevel(match)(c1, c2, level_sizes(q), level_sizes(k), SOURCE)
    losses = PerLevel(loss)(propagate(q), k, masks)
    assert type(losses) is type(q)
    if form is as_is:
        assert list(losses) == LEVELS
        losses = list(losses.values())
    assert losses == expected
    assert losses[0].dtype == torch.float64
    torch.testing.assert_close(level_mean(losses), sum(expected) / 3, rtol=1e-14, atol=0)
    weighted = level_mean(dict(zip(LEVELS, losses, strict=True)), {"p5": 1, "p3": 4.0, "p4": 2})
    by_hand = (4 * expected[0] + 2 * expected[1] + expected[2]) / 7
    torch.testing.assert_close(weighted, by_hand, rtol=1e-14, atol=0)


def test_thresholds_are_in_cells_of_each_level():
    """The same view twice: every cell matches itself alone, and from T = 0.75 its neighbours too, at every level."""
    coords = coords_from_boxes(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    sizes = {"p3": (8, 8), "p4": (4, 4), "p5": (2, 2)}
    for threshold, neighbours in ((0.7, 0), (0.75, 4)):
        masks = PerLevel(DistanceMatcher(threshold))(coords, coords, sizes, sizes)
        for name, (h, _) in sizes.items():
            assert masks[name].sum() == h * h + neighbours * h * (h - 1)


def test_gradients_reach_the_shared_part_from_every_level():
    z1, t2 = maps(SIZES_1, 0), maps(SIZES_2, 1)
    masks = {n: torch.ones(2, h * w, SIZES_2[n][0] * SIZES_2[n][1], dtype=torch.bool) for n, (h, w) in SIZES_1.items()}
    shared, loss = PPM(linear(0)), PixProLoss()
    level_mean(PerLevel(loss)(PerLevel(shared)(z1), t2, masks)).backward()
    together = shared.transform.weight.grad.clone()
    alone = torch.zeros_like(together)
    for name in LEVELS:
        shared.zero_grad()
        (loss(shared(z1[name]), t2[name], masks[name]) / 3).backward()
        assert shared.transform.weight.grad.abs().max() > 0
        alone += shared.transform.weight.grad
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-15)


def test_other_parts_and_other_orders_of_the_keys():
    z1, t2 = maps(SIZES_1, 0), maps(SIZES_2, 1)
    head = ConvMLP(5, 8, 4).double().eval()
    projected = PerLevel(head)(z1)
    assert all(torch.equal(projected[name], head(z1[name])) for name in LEVELS)
    masks = {n: torch.ones(2, h * w, SIZES_2[n][0] * SIZES_2[n][1], dtype=torch.bool) for n, (h, w) in SIZES_1.items()}
    turned = dict(reversed(masks.items()))
    contrast = PixContrastLoss(reduction="none")
    losses = PerLevel(contrast)(z1, t2, turned)
    assert list(losses) == LEVELS
    assert all(torch.equal(losses[name], contrast(z1[name], t2[name], masks[name])) for name in LEVELS)
    assert level_mean(losses).shape == (2,)


def test_state_names():
    assert list(PerLevel(linear(0)).state_dict()) == ["part.weight", "part.bias"]
    assert list(PerLevel([linear(0), linear(1)]).state_dict())[:2] == ["part.0.weight", "part.0.bias"]
    assert "part.p4.weight" in PerLevel({"p3": linear(0), "p4": linear(1)}).state_dict()
    one = linear(0)
    assert PerLevel(nn.ModuleList([one, one]))([torch.ones(1, 5, 2, 3).double()] * 2)[1].shape == (1, 5, 2, 3)


Z1, T2 = maps(SIZES_1, 0), maps(SIZES_2, 1)
MASKS = {n: torch.ones(2, h * w, SIZES_2[n][0] * SIZES_2[n][1], dtype=torch.bool) for n, (h, w) in SIZES_1.items()}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PerLevel([]), "part: expected a module, or a list or dict of modules, one per level, got ModuleList"),
        (lambda: PerLevel(None), "part: expected a module, .*got None"),
        (lambda: PerLevel(nn.Identity())(torch.ones(1)), "inputs: expected a list or dict .*, got Tensor"),
        (lambda: PerLevel(nn.Identity())(), "inputs: expected a list or dict .*, got nothing"),
        (lambda: PerLevel(nn.Identity())([]), r"inputs\[0\]: expected a list or dict .*, got none in it"),
        (lambda: PerLevel([PPM()] * 2)(as_list(Z1)), r"part: expected the levels \[0, 1, 2\], got \[0, 1\]"),
        (lambda: PerLevel([PPM()] * 3)(Z1), r"part: expected the levels \['p3', 'p4', 'p5'\], got \[0, 1, 2\]"),
        (lambda: PerLevel(PixProLoss())(Z1, T2, {**MASKS, "p6": None}), r"inputs\[2\]: expected the levels \['p3', "),
        (lambda: PerLevel(PixProLoss())(Z1, T2, {**MASKS, "p4": MASKS["p3"]}), r"level 'p4': mask: expected bool .*15"),
        (lambda: PerLevel(PPM())([Z1["p3"], torch.ones(2)]), "level 1: x: expected"),
        (lambda: level_sizes(torch.ones(1)), "maps: expected a list or dict of one value per level, got Tensor"),
        (lambda: level_sizes([Z1["p3"], (2, 3)]), r"maps: expected a map \(B, C, h, w\) at level 1, got tuple"),
        (lambda: level_sizes({"p3": torch.ones(2, 3, 4)}), r"maps: .* at level 'p3', got \(2, 3, 4\)"),
        (lambda: level_sizes({**Z1, "p6": torch.ones(2, 3, 1, 1)}), "maps: level 'p6' is 1x1"),
        (lambda: level_mean([torch.ones(()), torch.ones(2)]), r"values: expected \(\) at level 1 as at 0, got \(2,\)"),
        (lambda: level_mean([torch.ones(())], [1.0, 2.0]), r"weights: expected the levels \[0\], got \[0, 1\]"),
        (lambda: level_mean([torch.ones(())], [0.0]), r"weights: expected numbers from 0 on, not all 0, got \[0.0\]"),
        (lambda: level_mean([torch.ones(())] * 2, [2, -1]), r"weights: expected numbers .*got \[2, -1\]"),
    ],
)
def test_bad_input_names_argument_and_level(call, message):
    with pytest.raises(ValueError, match=message):
        call()
