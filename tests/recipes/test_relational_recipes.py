"""PaKA, NeCo and iBOT across views: their losses against loops, and what they refuse."""

import math

import pytest
import torch
from making import cli, small
from reference import box_cells, distances, matches, nearest, prototype_loss, tokens
from test_family import BOXES, SIZE_1, SIZE_2, SOURCE, B, C, boxed_views, maps, read_at
from torch import Tensor, nn

from densessl import View, coords_from_boxes
from examples.pretrain.ibot_cross_view import IBOTCrossView
from examples.pretrain.neco import NeCo
from examples.pretrain.paka import PaKA

GRID = 3


class Given(nn.Module):
    """An encoder whose maps, one of each view, are known."""

    def __init__(self, *outputs) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, image: Tensor, mask: Tensor | None = None):
        return self.outputs[image.shape[3] - 8]


def places(boxes) -> list[tuple[float, float]] | None:
    """Centres of the grid over what two boxes share; None where that is nothing."""
    sides = [(sorted(box[0::2]), sorted(box[1::2])) for box in boxes]
    low, high = ([pick(side[i][j] for side in sides) for i in range(2)] for j, pick in ((0, max), (1, min)))
    if low[0] >= high[0] or low[1] >= high[1]:
        return None
    steps = [(i + 0.5) / GRID for i in range(GRID)]
    return [(low[0] + x * (high[0] - low[0]), low[1] + y * (high[1] - low[1])) for y in steps for x in steps]


def shared(features: Tensor, view: int) -> list[Tensor | None]:
    """Of each image, the cells of the grid, ``(N, C)``."""
    found = [places(pair) for pair in BOXES]
    return [
        None if at is None else torch.stack([read_at(features[b], BOXES[b][view], point) for point in at])
        for b, at in enumerate(found)
    ]


def alignment_loop(query: Tensor, key: Tensor, view: int) -> Tensor:
    """1 - <H K H, H L H> / (|H K H| |H L H|) by N x N kernels, 0 where nothing is shared."""
    total = 0
    for q, k in zip(shared(query, view), shared(key, 1 - view), strict=True):
        if q is None:
            continue
        n = len(q)
        center = torch.eye(n, dtype=q.dtype) - torch.ones(n, n, dtype=q.dtype) / n
        a, b = center @ q @ q.T @ center, center @ k @ k.T @ center
        total = total + 1 - (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())
    return total / B


def given(recipe: nn.Module, dim: int) -> list[Tensor]:
    (z1, z2), (t1, t2) = maps(dim, dim)
    z1.requires_grad_()
    z2.requires_grad_()
    recipe.encoder, recipe.target = Given(z1, z2), Given(t1, t2)
    return [z1, z2, t1, t2]


def test_paka_equals_the_loop():
    recipe = small(PaKA, layer="layer1", hidden_dim=8, dim=C, grid=GRID)
    z1, z2, t1, t2 = given(recipe, C)
    loss = recipe(*boxed_views()).loss
    expected = 0.5 * (alignment_loop(z1, t2, 0) + alignment_loop(z2, t1, 1))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    for a, b in zip(*(torch.autograd.grad(x, (z1, z2)) for x in (loss, expected)), strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def relaxed_sort(values: Tensor, steepness: float) -> Tensor:
    """The permutation matrix that diffsort's bitonic network gives one row of values."""
    from diffsort import DiffSortNet

    return DiffSortNet("bitonic", len(values), steepness=steepness)(values[None].float())[1][0]


def order_loop(query: Tensor, key: Tensor, references: Tensor, view: int, steepness: float) -> Tensor:
    total = 0
    for q, k, r in zip(shared(query, view), shared(key, 1 - view), references, strict=True):
        if q is None:
            continue
        unit = r / r.square().sum(1, keepdim=True).sqrt()
        for a, b in zip(q, k, strict=True):
            p, wanted = (relaxed_sort(unit @ (x / x.square().sum().sqrt()), steepness) for x in (a, b))
            total = total - (wanted * p.log()).sum(0).mean() / len(q)
    return total / B


def test_neco_equals_the_loop_and_fills_its_queue(monkeypatch):
    pytest.importorskip("diffsort")
    recipe = small(NeCo, layer="layer1", hidden_dim=8, dim=C, grid=GRID, queue=70, steepness=5.0)
    z1, z2, t1, t2 = given(recipe, C)
    before, taken, choose = recipe.queue.keys, [], recipe.chosen
    monkeypatch.setattr(recipe, "chosen", lambda *args: taken.append(choose(*args)) or taken[-1])
    loss = recipe(*boxed_views()).loss
    one, other, *pushed = taken
    assert one.shape == (B, GRID**2, C)
    assert not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])
    for references in (one, other):  # of the queue as it was before
        assert all(any(torch.equal(cell, key) for key in before) for cell in references.flatten(0, 1))
    expected = 0.5 * (order_loop(z1, t2, one.double(), 0, 5.0) + order_loop(z2, t1, other.double(), 1, 5.0))
    torch.testing.assert_close(loss.float(), expected.float(), rtol=1e-4, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(x, (z1, z2)) for x in (loss, expected)), strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    new = torch.cat([cells.flatten(0, 1) for cells in pushed])
    assert new.shape == (2 * B * 10, C)
    kept = torch.nn.functional.normalize(new, dim=1).float()
    torch.testing.assert_close(recipe.queue.keys, torch.cat([before[len(kept) :], kept]))
    for cells, source in zip(pushed, (t1, t2), strict=True):
        for b in range(B):
            assert all(any(torch.equal(cell, other) for other in tokens(source)[b]) for cell in cells[b])


def test_ibot_equals_the_loop_in_both_forms(monkeypatch):
    """The teacher's cell of the same view, and its nearest matched cell of the other one."""
    recipe = small(IBOTCrossView, "test_vit", "norm", hidden_dim=8, dim=C, prototypes=5, across=0.3, instance=0.6)
    (s1, s2), (t1, t2), (f1, f2) = maps(5, 5, C)
    (w1, w2), (i1, i2) = torch.randn(2, 2, B, 1, 5, dtype=torch.float64)
    for given in (s1, s2, w1, w2):
        given.requires_grad_()
    for part in (recipe.center, recipe.center_instance):
        part.center.copy_(torch.randn(1, 5))
        part.center = part.center.double()
    center, of_all = (part.value.flatten().clone() for part in (recipe.center, recipe.center_instance))
    recipe.encoder = Given((f1, tokens(s1), w1), (f2, tokens(s2), w2))
    recipe.target = Given((f1, tokens(t1), i1), (f2, tokens(t2), i2))
    masks = [torch.rand(B, *size) < 0.6 for size in (SIZE_1, SIZE_2)]
    monkeypatch.setattr("examples.pretrain.ibot_cross_view.drawn_blocks", lambda draw, x: masks[x.shape[2:] == SIZE_2])
    loss, terms, metrics = recipe(*boxed_views())

    same = 0.5 * sum(prototype_loss(s, t, m, center) for s, t, m in ((s1, t1, masks[0]), (s2, t2, masks[1])))
    across = 0
    for view, (s, t, m) in enumerate(((s1, t2, masks[0]), (s2, t1, masks[1]))):
        keys, seen = torch.zeros_like(tokens(s)), torch.zeros(B, s.shape[2] * s.shape[3], dtype=torch.bool)
        for b, pair in enumerate(BOXES):
            sizes = (SIZE_1, SIZE_2)
            own, other = (box_cells(pair[v], sizes[v], SOURCE) for v in (view, 1 - view))
            found = nearest(distances(own, other), matches(own, other, 0.7, source=SOURCE), len(own), False)
            for i, j, valid in found:
                if valid:
                    keys[b, i], seen[b, i] = tokens(t)[b, j], True
        across = across + 0.5 * prototype_loss(s, keys, m.flatten(1) & seen, center)
    assert across > 0
    torch.testing.assert_close(terms["same"], same, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(terms["across"], across, rtol=1e-8, atol=1e-10)
    instance = 0
    for b in range(B):
        for w, i in ((w1[b, 0], i2[b, 0]), (w2[b, 0], i1[b, 0])):
            instance = instance - (((i - of_all) / 0.04).softmax(0) * (w / 0.1).log_softmax(0)).sum() / (2 * B)
    torch.testing.assert_close(terms["instance"], instance)
    expected = 0.7 * same + 0.3 * across + 0.6 * instance
    torch.testing.assert_close(loss, expected)
    got, wanted = (torch.autograd.grad(x, (s1, s2, w1, w2)) for x in (loss, expected))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    every = torch.cat([tokens(t1), tokens(t2)], 1)
    torch.testing.assert_close(recipe.center.value.flatten(), 0.9 * center + 0.1 * every.mean((0, 1)))
    means = 0.9 * of_all + 0.1 * torch.cat([i1, i2]).mean((0, 1))
    torch.testing.assert_close(recipe.center_instance.value.flatten(), means)
    share = sum(((x - center) / 0.04).softmax(0) for x in tokens(t1).flatten(0, 1)) / (B * 15)
    assert metrics()["health/prototypes"] == pytest.approx(math.exp(-sum(x * math.log(x) for x in share.tolist())))


def test_every_parameter_of_ibot_is_trained_but_the_targets():
    recipe = small(IBOTCrossView, "test_vit", "norm", 64, hidden_dim=8, dim=C, prototypes=5, images=1.0)
    boxes = [coords_from_boxes(torch.tensor([[0.0, 0.1, 0.7, 0.8]] * 2)), coords_from_boxes(torch.eye(4)[2:] + 0.1)]
    views = [View(torch.randn(2, 3, 64, 64), coords, torch.tensor([[80, 64]] * 2)) for coords in boxes]
    recipe(*views).loss.backward()
    assert all(p.grad is not None and p.grad.any() for name, p in recipe.encoder.named_parameters() if "head" in name)
    assert all(p.grad is not None for p in recipe.encoder.parameters())
    assert recipe.encoder.token.token.grad.any()
    assert all(p.grad is None for p in recipe.target.parameters())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (PaKA, {"grid": 1}, "method.grid: expected at least 2, got 1"),
        (NeCo, {"grid": 1}, "method.grid: expected at least 2 and at most the root of method.queue, got 1"),
        (NeCo, {"grid": 4, "queue": 15}, "method.grid: expected .* at most the root of method.queue, got 4"),
        (IBOTCrossView, {"across": 1.1}, r"method.across, method.instance: expected .* got 1.1, 1.0"),
        (IBOTCrossView, {"instance": -1.0}, r"method.across, method.instance: .* got 0.5, -1.0"),
        (IBOTCrossView, {}, r"backbone: expected a ViT with a patch embedding"),
    ],
)
def test_bad_settings_are_named(method, options, message):
    with pytest.raises(ValueError, match=message):
        small(method, **{"hidden_dim": 8, "dim": C, **options})


@pytest.mark.parametrize("method", [PaKA, NeCo, IBOTCrossView])
def test_masks_of_validity_are_refused(method):
    with pytest.raises(ValueError, match=r"--data.nodata: there is no such option"):
        cli(method, "--data.folder=unread", "--data.nodata=0")
