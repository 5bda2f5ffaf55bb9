"""The losses of whole recipes against loops, on rectangular maps of two sizes.

DenseCL's and VICRegL's loops are written from the papers' equations, DetCon's and SlotCon's follow the authors' code.
"""

import re

import pytest
import torch
from making import cli, small
from reference import Box, box_cells, cosine, nearest, tokens
from torch import Tensor

from densessl import MaskedView, View, coords_from_boxes
from examples.pretrain.common.slots import Grouped, used
from examples.pretrain.densecl import DenseCL, Outputs
from examples.pretrain.detcon import DetCon, Regions
from examples.pretrain.slotcon import SlotCon
from examples.pretrain.vicregl import VICRegL

B, C, WIDTH = 3, 6, 5
SIZE_1, SIZE_2 = (3, 5), (4, 2)


def maps(*channels: int) -> list[tuple[Tensor, Tensor]]:
    """Of each number of channels, one map of view 1 and one of view 2."""
    return [tuple(3 * torch.randn(B, c, *size, dtype=torch.float64) for size in (SIZE_1, SIZE_2)) for c in channels]


# --- DenseCL ----------------------------------------------------------------------------------------------------------


def info_nce(query: Tensor, key: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Of one vector."""
    own = (cosine(query, key) / temperature).exp()
    return -(own / (own + sum((cosine(query, n) / temperature).exp() for n in negatives))).log()


def densecl_loop(query: Outputs, key: Outputs, cells: Tensor, images: Tensor, temperature: float):
    """The dense loss over all cells of the query, each with the key cell whose backbone feature is most similar."""
    f, g, r, t = (tokens(x) for x in (query.features, key.features, query.cells, key.cells))
    dense, partners = [], []
    for b in range(B):
        for s in range(r.shape[1]):
            similar = [float(cosine(f[b, s], g[b, j])) for j in range(g.shape[1])]
            partners.append(similar.index(max(similar)))
            dense.append(info_nce(r[b, s], t[b, partners[-1]], cells, temperature))
    instance = [info_nce(query.image[b], key.image[b], images, temperature) for b in range(B)]
    return sum(dense) / len(dense), sum(instance) / len(instance), partners


def test_densecl_equals_the_loop():
    recipe = small(DenseCL, layer="layer1", hidden_dim=8, dim=C, queue=7).double()
    (f, g), (r, t) = maps(WIDTH, C)
    query = Outputs(f, r.requires_grad_(), torch.randn(B, C, dtype=torch.float64, requires_grad=True))
    key = Outputs(g, t, torch.randn(B, C, dtype=torch.float64))
    dense, instance, pairs = recipe.losses(query, key)
    expected = densecl_loop(query, key, recipe.cell_queue.keys, recipe.image_queue.keys, 0.2)
    assert pairs.key.flatten().tolist() == expected[2]
    assert pairs.valid.all()
    for got, wanted, x in ((dense, expected[0], query.cells), (instance, expected[1], query.image)):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (got, wanted)))


def test_densecl_steps_weigh_the_two_losses_and_fill_the_queues(monkeypatch):
    recipe = small(DenseCL, layer="layer2", hidden_dim=8, dim=C, queue=5, dense_weight=0.3)
    image = torch.randn(2, 3, 32, 48)
    coords, size = torch.eye(3).expand(2, 3, 3), torch.tensor([[32, 48]] * 2)
    views = View(image, coords, size), View(image.flip(3), coords, size)
    before = recipe.cell_queue.keys, recipe.image_queue.keys
    loss, terms, _ = recipe(*views)
    torch.testing.assert_close(loss, 0.3 * terms["dense"] + 0.7 * terms["instance"])
    key = recipe.target(views[1].image)  # in train mode batch norm sees the same batch again
    for queue, old, new in zip(
        (recipe.cell_queue, recipe.image_queue), before, (key.cells.mean((2, 3)), key.image), strict=True
    ):
        assert torch.equal(queue.keys[:3], old[2:])
        torch.testing.assert_close(queue.keys[3:], torch.nn.functional.normalize(new, dim=1))
    assert any(p.grad is None for p in recipe.encoder.parameters())
    loss.backward()
    assert all(p.grad is not None for p in recipe.encoder.parameters())
    assert all(p.grad is None for p in recipe.target.parameters())


@pytest.mark.parametrize("weight", [-0.1, 1.5])
def test_densecl_names_a_bad_weight(weight):
    with pytest.raises(ValueError, match=rf"method.dense_weight: expected a number in 0..1, got {weight}"):
        small(DenseCL, dense_weight=weight)


# --- VICRegL ----------------------------------------------------------------------------------------------------------

BOXES: list[tuple[Box, Box]] = [
    ((0.11, 0.05, 0.83, 0.71), (0.27, 0.13, 0.97, 0.91)),
    ((0.62, 0.31, 0.04, 0.99), (0.37, 0.22, 0.79, 0.64)),  # flipped
    ((0.01, 0.02, 0.31, 0.43), (0.57, 0.61, 0.93, 0.98)),  # apart
]
SOURCE = (400, 150)  # width and height: per axis in 0..1, other cells would be the nearest
KEEP = (4, 2)


def vicreg(a: Tensor, b: Tensor) -> Tensor:
    """25 s + 25 v + c of vectors (n, d), scaled as in the authors' code.

    There s is a mean over dimensions too, and v and c are means over the two views, where the paper sums.
    """
    count, dim = a.shape
    s = sum(((x - y) ** 2).sum() for x, y in zip(a, b, strict=True)) / (count * dim)
    v, c = 0, 0
    for z in (a, b):
        centred = [x - sum(z) / count for x in z]
        cov = sum(x[:, None] * x[None] for x in centred) / (count - 1)
        for i in range(dim):
            v = v + (1 - (cov[i, i] + 1e-4).sqrt()).clamp(min=0) / dim / 2
            c = c + sum(cov[i, j] ** 2 for j in range(dim) if j != i) / dim / 2
    return 25 * s + 25 * v + c


def local_loop(z1: Tensor, z2: Tensor, by_feature_kept: int | None) -> tuple[Tensor, list[list[tuple[int, int, bool]]]]:
    """By place plus by feature; each the mean of both directions, and of the batches that the k-th pairs make."""
    a, b = tokens(z1), tokens(z2)
    by_place = [
        [
            [((x - u) ** 2 + (y - v) ** 2) ** 0.5 for u, v, _ in box_cells(second, SIZE_2, SOURCE)]
            for x, y, _ in box_cells(first, SIZE_1, SOURCE)
        ]
        for first, second in BOXES
    ]
    by_feature = [[[float(((x - y) ** 2).sum()) for y in b[i]] for x in a[i]] for i in range(B)]
    total, located = 0, None
    for cost, kept in ((by_place, KEEP), (by_feature, (by_feature_kept,) * 2)):
        for query, key, table, keep in (
            (a, b, cost, kept[0]),
            (b, a, [list(zip(*rows, strict=True)) for rows in cost], kept[1]),
        ):
            allowed = [[True] * key.shape[1]] * query.shape[1]
            pairs = [nearest(rows, allowed, keep, False) for rows in table]
            located = located or pairs
            slots = query.shape[1] if keep is None else keep
            for k in range(slots):
                left = torch.stack([query[i, pairs[i][k][0]] for i in range(B)])
                right = torch.stack([key[i, pairs[i][k][1]] for i in range(B)])
                total = total + vicreg(left, right) / slots / 2
    return total, located


def boxed_views(dtype: torch.dtype = torch.float64) -> list[View]:
    size = torch.tensor([SOURCE[::-1]] * B)
    boxes = [torch.tensor([pair[view] for pair in BOXES], dtype=dtype) for view in range(2)]
    return [View(torch.zeros(B, 3, 8, 8 + view), coords_from_boxes(x), size) for view, x in enumerate(boxes)]


@pytest.mark.parametrize("by_feature", [None, 3])
def test_vicregl_cells_equal_the_loop(by_feature):
    """Of the pairs by place 4 and 2 are kept; of those by feature all, as in the authors' code, or a number."""
    recipe = small(VICRegL, layer="layer1", hidden_dim=8, dim=C, keep=KEEP, keep_by_feature=by_feature)
    ((z1, z2),) = maps(C)
    z1.requires_grad_()
    z2.requires_grad_()
    got, located = recipe.local_loss(z1, z2, *boxed_views())
    expected, pairs = local_loop(z1, z2, by_feature)
    assert [list(zip(*(part[i].tolist() for part in located), strict=True)) for i in range(B)] == pairs
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
    for a, b in zip(*(torch.autograd.grad(loss, (z1, z2)) for loss in (got, expected)), strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


class Fixed(torch.nn.Module):
    """An encoder whose outputs, one pair of map and vectors per view, are known."""

    def __init__(self, *outputs: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.outputs[image.shape[3] - 8]


def test_vicregl_equals_the_loop(monkeypatch):
    recipe = small(VICRegL, layer="layer1", hidden_dim=8, dim=C, keep=KEEP, alpha=0.6)
    ((z1, z2),) = maps(C)
    w1, w2 = torch.randn(2, B, 8, dtype=torch.float64)
    recipe.encoder = Fixed((z1, w1), (z2, w2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = recipe(*boxed_views()).loss
    expected = 0.6 * vicreg(w1, w2) + 0.4 * local_loop(z1, z2, None)[0]
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)


def test_vicregl_keeps_what_the_authors_code_keeps_by_default():
    recipe = small(VICRegL, size=64, hidden_dim=8, dim=C)
    assert [match.keep for match in (*recipe.by_place, recipe.by_feature)] == [20, 4, None]


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_vicregl_names_a_bad_alpha(alpha):
    with pytest.raises(ValueError, match=rf"method.alpha: expected a number in 0..1, got {alpha}"):
        small(VICRegL, alpha=alpha)


# --- DetCon -----------------------------------------------------------------------------------------------------------

# Labels drawn in each view of six images: several times, in one view only, none in a view or in both, none in common.
DRAWN_1 = torch.tensor([[3, 1, 3, 5], [2, 2, 2, 2], [4, 1, 2, 2], [1, 2, 3, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
DRAWN_2 = torch.tensor([[1, 3, 3, 8], [7, 2, 7, 7], [0, 0, 0, 0], [9, 8, 7, 9], [0, 0, 0, 0], [3, 3, 4, 4]])


def drawn_regions(ids: Tensor) -> Regions:
    return Regions(3 * torch.randn(*ids.shape, C, dtype=torch.float64, requires_grad=True), ids)


def detcon_loop(query: Regions, own: Regions, other: Regions, temperature: float) -> Tensor:
    """As the authors' code has it: for each region of a view, a segment drawn several times counted once; their mean.

    Against it stand all regions of the other view, and those of its own view but for itself.
    """
    images, regions = query.ids.shape
    total = 0 * query.vectors.sum()
    for b in range(images):
        for i in range(regions):
            label = int(query.ids[b, i])
            against, toward = 0, []
            for c in range(images):
                for j in range(regions):
                    for keys, is_other in ((other, True), (own, False)):
                        same = b == c and int(keys.ids[c, j]) == label
                        if int(keys.ids[c, j]) == 0 or (same and not is_other):
                            continue
                        term = (cosine(query.vectors[b, i], keys.vectors[c, j]) / temperature).exp()
                        against = against + term
                        toward += [term] if same else []
            if label and toward:
                copies = query.ids[b].tolist().count(label)
                total = total + sum(-(term / against).log() for term in toward) / len(toward) / copies
    return total / (images * regions)


def test_detcon_equals_the_loop(monkeypatch):
    recipe = small(DetCon, layer="layer1", hidden_dim=8, dim=C, temperature=0.3)
    query, own, other = (drawn_regions(ids) for ids in (DRAWN_1, DRAWN_1, DRAWN_2))
    for a, b in ((own, other), (other, own)):
        got, expected = recipe.region_loss(query, a, b), detcon_loop(query, a, b, 0.3)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        both = [torch.autograd.grad(loss, [x.vectors for x in (query, a, b)]) for loss in (got, expected)]
        for mine, wanted in zip(*both, strict=True):
            assert mine.any()
            torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-12)
            halves = []
        for rank in range(2):  # two processes, each with half of the queries and all keys
            monkeypatch.setattr("examples.pretrain.detcon.rank", lambda rank=rank: rank)
            halves.append(recipe.region_loss(Regions(*(x[3 * rank :][:3] for x in query)), a, b))
        torch.testing.assert_close(sum(halves) / 2, expected, rtol=1e-9, atol=1e-12)
        monkeypatch.undo()


def test_detcon_equals_lightlys_loss_where_every_region_is_there():
    lightly = pytest.importorskip("lightly.loss.detcon_loss")
    recipe = small(DetCon, layer="layer1", hidden_dim=8, dim=C)
    ids = [torch.where(drawn == 0, 6, drawn) for drawn in (DRAWN_1, DRAWN_2)]
    (q1, q2), (t1, t2) = ([drawn_regions(x) for x in ids] for _ in range(2))
    theirs = lightly.DetConBLoss(0.1, gather_distributed=False)
    expected = theirs(q1.vectors, q2.vectors, t1.vectors, t2.vectors, *ids)
    got = recipe.region_loss(q1, t1, t2) + recipe.region_loss(q2, t2, t1)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def test_detcon_steps_pool_each_views_own_segments(monkeypatch):
    """The loop on what encoder, predictor and target give; a second and a third image with nothing in a view each."""
    recipe = small(DetCon, layer="layer2", hidden_dim=8, dim=C, regions=7)
    masks = [torch.zeros(3, 32, 48, dtype=torch.uint8), torch.zeros(3, 32, 48, dtype=torch.uint8)]
    masks[0][::2, :16], masks[0][::2, 16:, 24:] = 1, 2
    masks[1][:2, :, :24], masks[1][:2, 8:] = 2, 3
    coords, size = torch.eye(3).expand(3, 3, 3), torch.tensor([[32, 48]] * 3)
    views = [MaskedView(torch.randn(3, 3, 32, 48), coords, size, mask) for mask in masks]
    torch.manual_seed(5)
    loss, _, metrics = recipe(*views)
    logged = metrics()
    # In train mode batch norm sees the same batch again.
    torch.manual_seed(5)
    inputs = [(view.image, view.mask, recipe.draws(view.mask)) for view in views]
    z1, z2, t1, t2 = (module(*x) for module in (recipe.encoder, recipe.target) for x in inputs)
    assert [set(row.tolist()) for row in z1.ids] == [{1, 2}, {0}, {1, 2}]
    assert [set(row.tolist()) for row in z2.ids] == [{2, 3}, {2, 3}, {0}]
    assert torch.equal(z1.ids, t1.ids)
    q1, q2 = (Regions(recipe.predictor(z.vectors.flatten(0, 1)).view_as(z.vectors), z.ids) for z in (z1, z2))
    expected = detcon_loop(q1, t1, t2, 0.1) + detcon_loop(q2, t2, t1, 0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert logged["health/images_without_match"] == pytest.approx(2 / 3)
    there = torch.nn.functional.normalize(torch.cat([z1.vectors[0], z1.vectors[2]]).detach(), dim=1)
    std = sum(column.std(correction=0) for column in there.T) / C * C**0.5
    torch.testing.assert_close(logged["health/std_times_sqrt_c"], std, rtol=1e-4, atol=1e-6)
    pairs = [(i, j) for i in range(7) for j in range(7) if z1.ids[0, i] != t2.ids[0, j]]  # of the first image alone
    negative = sum(cosine(z1.vectors[0, i].detach(), t2.vectors[0, j]) for i, j in pairs) / len(pairs)
    torch.testing.assert_close(logged["health/similarity_negative"], negative, rtol=1e-4, atol=1e-5)
    loss.backward()
    for part in (recipe.encoder, recipe.predictor):
        assert all(p.grad is not None for p in part.parameters())
    assert all(p.grad is None for p in recipe.target.parameters())


def test_detcon_processes_are_one_process(monkeypatch):
    """Batch norm apart: each draws the regions of its images, and takes them against those of all."""
    recipe = small(DetCon, layer="layer2", hidden_dim=8, dim=C, regions=5).double().eval()
    coords, size = torch.eye(3).expand(4, 3, 3), torch.tensor([[32, 48]] * 4)
    masks = [torch.randint(4, (4, 4, 6)).repeat_interleave(8, 1).repeat_interleave(8, 2) for _ in range(2)]
    views = [MaskedView(torch.randn(4, 3, 32, 48, dtype=torch.float64), coords, size, mask) for mask in masks]
    torch.manual_seed(5)
    whole = [recipe.target(view.image, view.mask, recipe.draws(view.mask)) for view in views]

    def loss(views: list[MaskedView]) -> Tensor:
        torch.manual_seed(5)
        return recipe(*views).loss

    def gather(x: Tensor) -> list[Tensor]:
        """As a process finds it whose own part is this one."""
        found = [list(part.chunk(2)) for regions in whole for part in regions if part.dtype == x.dtype]
        return next(parts for parts in found if torch.allclose(parts[at[0]], x))

    expected = loss(views)
    assert expected > 0
    at, got = [0], []
    for name, value in (("gather", gather), ("world_size", lambda: 2), ("rank", lambda: at[0])):
        monkeypatch.setattr(f"examples.pretrain.detcon.{name}", value)
    for rank in range(2):
        at[0] = rank
        got.append(loss([MaskedView(*(part.chunk(2)[rank] for part in view)) for view in views]))
    torch.testing.assert_close(sum(got) / 2, expected, rtol=1e-9, atol=1e-12)


def test_detcons_draws_are_the_same_in_one_process_and_in_several(monkeypatch):
    recipe, mask = small(DetCon, layer="layer1", hidden_dim=8, dim=C, regions=5), torch.zeros(6, 4, 4)
    torch.manual_seed(3)
    whole, other = recipe.draws(mask), recipe.draws(mask)
    assert not torch.equal(whole, other)  # of the other view
    monkeypatch.setattr("examples.pretrain.detcon.world_size", lambda: 3)
    monkeypatch.setattr("examples.pretrain.detcon.rank", lambda: 2)
    torch.manual_seed(3)
    assert torch.equal(recipe.draws(mask[:2]), whole[4:])


def test_detcon_asks_for_segments():
    with pytest.raises(ValueError, match=r"data.segments: expected 'felzenszwalb' or 'grid', got 'none'"):
        cli(
            DetCon, "--data.folder=unread", "--data.nodata=0", "--data.segments=none"
        )  # a mask, but one segment an image


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regions": 0}, "method.regions: expected at least 1, got 0"),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
    ],
)
def test_detcon_names_a_bad_number(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small(DetCon, **{"hidden_dim": 8, "dim": C, **change})


# --- SlotCon ----------------------------------------------------------------------------------------------------------

K = 7  # prototypes


def assigned(score: Tensor, temperature: float) -> Tensor:
    terms = (score / temperature).exp()
    return terms / terms.sum()


def read_at(score: Tensor, box: Box, point: tuple[float, float]) -> Tensor:
    """Of one image's scores (K, h, w), bilinear at a place in the source image, continued beyond the edge cells."""
    _, h, w = score.shape
    x0, y0, x1, y1 = box
    x = min(max((point[0] - x0) / (x1 - x0) * w - 0.5, 0), w - 1)
    y = min(max((point[1] - y0) / (y1 - y0) * h - 0.5, 0), h - 1)
    left, top = min(int(x), w - 2), min(int(y), h - 2)
    rows = [score[:, top + i, left] * (left + 1 - x) + score[:, top + i, left + 1] * (x - left) for i in range(2)]
    return rows[0] * (top + 1 - y) + rows[1] * (y - top)


def grouping_loop(query: Tensor, key: Tensor, center: Tensor) -> Tensor:
    """Cross entropy at the cells of a grid over the box that the two views share."""
    h, w = query.shape[-2:]
    per_image = []
    for b, pair in enumerate(BOXES):
        sides = [(sorted(box[0::2]), sorted(box[1::2])) for box in pair]
        low, high = ([pick(side[i][j] for side in sides) for i in range(2)] for j, pick in ((0, max), (1, min)))
        if low[0] >= high[0] or low[1] >= high[1]:
            per_image.append(0 * query.sum())
            continue
        terms = []
        for i in range(h):
            for j in range(w):
                at = low[0] + (j + 0.5) / w * (high[0] - low[0]), low[1] + (i + 0.5) / h * (high[1] - low[1])
                wanted = assigned(read_at(key[b], pair[1], at) - center, 0.07)
                terms.append(-(wanted * assigned(read_at(query[b], pair[0], at), 0.1).log()).sum())
        per_image.append(sum(terms) / len(terms))
    return sum(per_image) / B


def grouped(size: tuple[int, int]) -> Grouped:
    scores = torch.randn(B, K, *size, dtype=torch.float64).div(3).requires_grad_()
    slots = torch.randn(B, K, C, dtype=torch.float64, requires_grad=True)
    return Grouped(torch.zeros(B, C, *size), scores, slots)


def tiny_slotcon() -> SlotCon:
    recipe = small(SlotCon, layer="layer1", hidden_dim=8, dim=C, prototypes=K).double()
    return recipe


def test_slotcon_grouping_equals_the_loop():
    recipe = tiny_slotcon()
    recipe.center.center.copy_(torch.randn(1, K, 1, 1) / 5)
    q, k = grouped(SIZE_1), grouped(SIZE_2)
    got = recipe.grouping_loss(q, k, *(view.coords for view in boxed_views()))
    expected = grouping_loop(q.scores, k.scores, recipe.center.value.flatten())
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    mine, wanted = (torch.autograd.grad(loss, q.scores)[0] for loss in (got, expected))
    assert mine[:2].any()
    torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-12)


def used_loop(scores: Tensor) -> list[tuple[int, int]]:
    """Image and prototype of each slot that an image uses."""
    _, _, h, w = scores.shape
    found = [{int(image[:, i, j].argmax()) for i in range(h) for j in range(w)} for image in scores]
    return [(b, s) for b in range(len(scores)) for s in range(K) if s in found[b]]


def slots_loop(query: Grouped, key: Grouped, predicted: dict[tuple[int, int], Tensor]) -> Tensor:
    keys = used_loop(key.scores)
    terms = [
        info_nce(x, key.slots[at], [key.slots[other] for other in keys if other != at], 0.2)
        for at, x in predicted.items()
    ]
    return 0.4 * sum(terms) / len(terms)


def assert_same_with_gradients(got: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    for mine, wanted in zip(*(torch.autograd.grad(loss, inputs) for loss in (got, expected)), strict=True):
        assert mine.any()
        torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-12)


def test_slotcon_slots_equal_the_loop():
    recipe = tiny_slotcon()
    q, k = grouped(SIZE_1), grouped(SIZE_2)
    keys = used_loop(k.scores)
    both = [at for at in used_loop(q.scores) if at in keys]
    assert 1 < len(both) < len(keys) < B * K
    assert [tuple(at) for at in used(q.scores).nonzero().tolist()] == used_loop(q.scores)
    predicted = recipe.predictor(torch.stack([q.slots[at] for at in both])[:, :, None, None])[:, :, 0, 0]
    expected = slots_loop(q, k, dict(zip(both, predicted, strict=True)))
    assert_same_with_gradients(recipe.slot_loss(q, k), expected, q.slots, k.slots)


def favouring(x: Grouped, prototypes: list[list[int]]) -> Grouped:
    """Each image of it using some of these prototypes alone, the first among them."""
    scores = x.scores.detach() - 9
    for b, wanted in enumerate(prototypes):
        scores[b, wanted] += 9
        scores[b, wanted[0], 0, 0] += 9
    return x._replace(scores=scores.requires_grad_())


def test_slotcon_takes_a_single_slot_with_the_others_of_its_view():
    """Alone it would have no batch statistics."""
    recipe = tiny_slotcon()
    q, k = favouring(grouped(SIZE_1), [[0, 1], [2, 3], [5, 4]]), favouring(grouped(SIZE_2), [[2], [5, 4], [5, 6]])
    slots = used_loop(q.scores)
    assert [at for at in slots if at in used_loop(k.scores)] == [(2, 5)]
    predicted = recipe.predictor(torch.stack([q.slots[at] for at in slots])[:, :, None, None])[:, :, 0, 0]
    expected = slots_loop(q, k, {(2, 5): predicted[slots.index((2, 5))]})
    assert_same_with_gradients(recipe.slot_loss(q, k), expected, q.slots, k.slots)


def test_slotcon_views_without_a_common_slot_lose_nothing():
    recipe = tiny_slotcon()
    loss = recipe.slot_loss(favouring(grouped(SIZE_1), [[0], [1], [2]]), favouring(grouped(SIZE_2), [[3], [4, 5], [6]]))
    assert loss == 0
    loss.backward()
    # Of all parameters: processes wait for each other's gradients.
    assert not any(p.grad.any() for p in recipe.predictor.parameters())
    assert all(x.isfinite().all() for x in recipe.predictor.state_dict().values())


def test_slotcon_processes_weighted_by_their_slots_are_one_process(monkeypatch):
    """Batch norm apart, each process takes its images' slots against those of all."""
    recipe = tiny_slotcon().eval()
    q, k = (Grouped(*map(torch.cat, zip(*(grouped(size) for _ in range(2)), strict=True))) for size in (SIZE_1, SIZE_2))
    expected = recipe.slot_loss(q, k)
    every = {torch.float64: k.slots, torch.uint8: used(k.scores).byte()}

    def gather(x: Tensor) -> list[Tensor]:
        parts = list(every[x.dtype].chunk(2))
        assert torch.equal(parts[at[0]], x)
        return parts

    at, got, slots = [0], 0, 0
    for name, value in (("gather", gather), ("world_size", lambda: 2), ("rank", lambda: at[0])):
        monkeypatch.setattr(f"examples.pretrain.slotcon.{name}", value)
    for rank in range(2):
        at[0] = rank
        mine, yours = (Grouped(*(part.chunk(2)[rank] for part in x)) for x in (q, k))
        number = int((used(mine.scores) & used(yours.scores)).sum())
        got, slots = got + number * recipe.slot_loss(mine, yours), slots + number
    assert_same_with_gradients(got / slots, expected, q.slots, k.slots)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prototypes": 0}, "method.prototypes: expected at least 1, got 0"),
        ({"group_weight": 2.0}, r"method.group_weight: expected a number in 0..1, got 2.0"),
        ({"student_temperature": -0.1}, "method.student_temperature: expected a positive number, got -0.1"),
        ({"teacher_temperature": 0.0}, "method.teacher_temperature: expected a positive number, got 0.0"),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
    ],
)
def test_slotcon_names_a_bad_number(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small(SlotCon, **{"hidden_dim": 8, "dim": C, "prototypes": K, **change})


def test_slotcon_pools_cells_by_their_likeness_to_prototypes():
    encoder = tiny_slotcon().encoder
    cells, scores, slots = encoder(torch.randn(2, 3, 32, 40, dtype=torch.float64))
    x, shares = tokens(cells), []
    for b in range(2):
        likeness = torch.stack([torch.stack([cosine(p, cell) for p in encoder.prototypes]) for cell in x[b]])
        torch.testing.assert_close(tokens(scores)[b], likeness)
        shares = torch.stack([assigned(row, 0.07) + 1e-6 for row in likeness])
        torch.testing.assert_close(slots[b], (shares / shares.sum(0)).T @ x[b])


def test_slotcon_steps_weigh_the_two_losses_and_move_the_center(monkeypatch):
    recipe = tiny_slotcon().float()
    recipe.group_weight = 0.3
    image = torch.randn(B, 3, 32, 48)
    coords = [view.coords for view in boxed_views(torch.float32)]
    views = [View(x, at, torch.tensor([[32, 48]] * B)) for x, at in zip((image, image.flip(3)), coords, strict=True)]
    loss, terms, _ = recipe(*views)
    torch.testing.assert_close(loss, 0.3 * terms["grouping"] + 0.7 * terms["slots"])
    scores = torch.cat([recipe.target(view.image).scores for view in views])
    torch.testing.assert_close(recipe.center.value[0, :, 0, 0], 0.1 * scores.mean((0, 2, 3)), atol=1e-6, rtol=1e-4)
    loss.backward()
    for part in (recipe.encoder, recipe.predictor):
        assert all(p.grad is not None for p in part.parameters())
    assert all(p.grad is None for p in recipe.target.parameters())
