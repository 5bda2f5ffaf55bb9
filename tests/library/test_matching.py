"""DistanceMatcher against the loop and the geometry of the method; NearestMatcher against brute force."""

import math

import pytest
import torch
from reference import box_cells, distances, homography_cells, matches, nearest
from torch import Tensor
from torchvision.transforms import v2

from densessl import DistanceMatcher, NearestMatcher, Pairs, cell_distance, coords_from_boxes, gather_tokens
from densessl.matching import distance

SIZE_Q, SIZE_K = (5, 9), (13, 7)


def random_boxes(count: int, side: tuple[float, float] = (0.3, 0.9)) -> Tensor:
    """Crops inside the image, some of them flipped along x or y."""
    sides = torch.empty(count, 2).uniform_(*side)
    start = torch.rand(count, 2) * (1 - sides)
    boxes = torch.cat([start, start + sides], 1)
    for axes in ([2, 1, 0, 3], [0, 3, 2, 1]):
        boxes = torch.where(torch.rand(count, 1) < 0.5, boxes[:, axes], boxes)
    return boxes


def random_homographies(count: int) -> Tensor:
    """Rotated, sheared, perspective views that look partly beyond the source image."""
    matrix = coords_from_boxes(random_boxes(count))
    matrix[:, :2] += 0.1 * torch.randn(count, 2, 3)
    matrix[:, 2, :2] = 0.4 * torch.rand(count, 2) - 0.2
    return matrix


def clear_of(distance: list[list[float]], threshold: float) -> Tensor:
    """Pairs whose distance float32 cannot confuse with the threshold."""
    return (torch.tensor(distance, dtype=torch.float64) - threshold).abs() > 1e-4


@pytest.mark.parametrize("unit", ["max", "min", "query", "key"])
@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("kind", ["boxes", "homographies"])
def test_mask_and_distance_equal_the_loop(kind, pixels, unit):
    source_size = torch.tensor([[375, 500], [200, 640], [64, 64]])
    if kind == "boxes":
        raw_q, raw_k = random_boxes(3), random_boxes(3)
        q, k, cells = coords_from_boxes(raw_q), coords_from_boxes(raw_k), box_cells
    else:
        raw_q = q = random_homographies(3)
        raw_k = k = random_homographies(3)
        cells = homography_cells
    size = source_size if pixels else None
    mask = DistanceMatcher(0.9, unit=unit)(q, k, SIZE_Q, SIZE_K, source_size=size)
    distance = cell_distance(q, k, SIZE_Q, SIZE_K, unit=unit, source_size=size)
    assert mask.shape == distance.shape == (3, 45, 91)
    assert mask.dtype == torch.bool
    compared = positive = 0
    for b in range(3):
        scale = (float(source_size[b, 1]), float(source_size[b, 0])) if pixels else (1.0, 1.0)
        a, c = (cells(raw[b].double().tolist(), s, scale) for raw, s in ((raw_q, SIZE_Q), (raw_k, SIZE_K)))
        expected = distances(a, c, unit)
        torch.testing.assert_close(distance[b].double(), torch.tensor(expected).double(), rtol=1e-3, atol=1e-4)
        clear = clear_of(expected, 0.9)
        wanted = torch.tensor(matches(a, c, 0.9, unit, scale))
        assert torch.equal(mask[b][clear], wanted[clear])
        compared, positive = compared + int(clear.sum()), positive + int(wanted.sum())
    assert compared > 0.99 * mask.numel()
    assert positive > 50


def test_units_order_the_masks():
    """The smaller unit is the stricter one, and query and key change places with the direction."""
    q, k = coords_from_boxes(random_boxes(8)), coords_from_boxes(random_boxes(8))
    mask = {unit: DistanceMatcher(unit=unit)(q, k, SIZE_Q, SIZE_K) for unit in ("max", "min", "query", "key")}
    assert torch.equal(mask["max"], mask["query"] | mask["key"])
    assert torch.equal(mask["min"], mask["query"] & mask["key"])
    assert mask["min"].sum() < mask["max"].sum()
    assert torch.equal(mask["query"], DistanceMatcher(unit="key")(k, q, SIZE_K, SIZE_Q).mT)


@pytest.mark.parametrize("sparse", [False, True])
def test_reverse_direction_is_the_transpose(sparse):
    match = DistanceMatcher(0.8, sparse=sparse)
    q, k = random_homographies(4), random_homographies(4)
    size = torch.tensor([[375, 500]]).expand(4, 2)
    forth, back = match(q, k, SIZE_Q, SIZE_K, size), match(k, q, SIZE_K, SIZE_Q, size).mT
    if sparse:
        forth, back = forth.to_dense(), back.to_dense()
    assert forth.shape == (4, 45, 91)
    assert forth.any()
    assert torch.equal(forth, back)


@pytest.mark.parametrize("block", [1, 91, 4 * 91, 7 * 4 * 91, 1 << 22])
def test_sparse_equals_dense_bit_by_bit(monkeypatch, block):
    monkeypatch.setattr(distance, "_BLOCK_PAIRS", block)
    q, k = random_homographies(4), random_homographies(4)
    q[2] = torch.nan
    valid_q = torch.rand(4, *SIZE_Q) < 0.8
    arguments = (q, k, SIZE_Q, SIZE_K, torch.tensor([[375, 500]]).expand(4, 2), valid_q)
    dense, sparse = DistanceMatcher(0.7)(*arguments), DistanceMatcher(0.7, sparse=True)(*arguments)
    assert sparse.layout == torch.sparse_coo
    assert sparse.dtype == torch.bool
    assert sparse.is_coalesced()
    assert torch.equal(sparse.indices().T, dense.nonzero())  # sorted by image, query, key
    assert sparse.values().all()
    assert dense.sum() > 50
    assert not dense[2].any()


def test_sparse_mask_may_be_empty():
    q, k = coords_from_boxes(torch.tensor([[0.0, 0, 0.2, 0.2]])), coords_from_boxes(torch.tensor([[0.7, 0.7, 1, 1]]))
    mask = DistanceMatcher(sparse=True)(q, k, SIZE_Q, SIZE_K)
    assert mask.shape == (1, 45, 91)
    assert mask._nnz() == 0


# --- the geometry of the method -------------------------------------------------------------------------------------


def test_identical_square_crops_match_themselves_only():
    """The neighbours are 1 / sqrt(2) = 0.7071 diagonals away, just beyond T = 0.7."""
    coords = coords_from_boxes(torch.tensor([[0.1, 0.2, 0.6, 0.7]]))
    assert torch.equal(DistanceMatcher(0.7)(coords, coords, (7, 7))[0], torch.eye(49, dtype=torch.bool))
    wider = DistanceMatcher(0.71)(coords, coords, (7, 7))
    assert wider.sum() == 49 + 4 * 7 * 6  # and all 4-neighbours


def test_comparison_is_strict():
    """Two 1x2 maps over a 2:1 strip: the cells of 0.25 x 0.25 make the neighbour distance exactly 2 / sqrt(8)."""
    coords = torch.diag_embed(torch.tensor([[0.5, 0.25, 1.0]])).double()
    at = float(cell_distance(coords, coords, (1, 2))[0, 0, 1])
    assert at == pytest.approx(math.sqrt(0.5))
    assert DistanceMatcher(at)(coords, coords, (1, 2)).sum() == 2
    assert DistanceMatcher(math.nextafter(at, 1))(coords, coords, (1, 2)).sum() == 4


def test_mean_positives_of_equal_square_cells():
    """2 pi T^2 = 3.08: the area of the disc over that of a cell, over random offsets."""
    generator = torch.Generator().manual_seed(1)
    offset = torch.rand(4000, 2, generator=generator) * 0.1  # up to one cell
    query = torch.tensor([[0.45, 0.45, 0.55, 0.55]]).expand(4000, 4)  # one cell, as large as the key's
    key = torch.cat([offset, offset + 0.9], 1)
    mask = DistanceMatcher(0.7)(coords_from_boxes(query), coords_from_boxes(key), (1, 1), (9, 9))
    mean = mask.sum((1, 2)).double().mean()
    assert mean == pytest.approx(2 * math.pi * 0.7**2, abs=0.04)  # 4000 draws of a count of spread 0.7


@pytest.mark.parametrize("threshold", [0.5001, 0.7])
def test_cell_inside_the_other_view_has_a_positive(threshold):
    """No point of a view lies farther than half a diagonal from a cell's centre, and the larger cell is the unit."""
    boxes_q, boxes_k = random_boxes(200, (0.2, 0.9)), random_boxes(200, (0.2, 0.9))
    views = coords_from_boxes(boxes_q), coords_from_boxes(boxes_k), SIZE_Q, SIZE_K
    matched = DistanceMatcher(threshold)(*views).any(2)
    inside = []
    for box_q, box_k in zip(boxes_q.tolist(), boxes_k.tolist(), strict=True):
        low_x, high_x = sorted(box_k[0::2])
        low_y, high_y = sorted(box_k[1::2])
        inside.append([low_x <= x <= high_x and low_y <= y <= high_y for x, y, _ in box_cells(box_q, SIZE_Q)])
    inside = torch.tensor(inside)
    assert inside.sum() > 1000
    assert matched[inside].all()
    assert not DistanceMatcher(0.35)(*views).any(2)[inside].all()


def drawn_boxes(count: int, height: int, width: int) -> Tensor:
    """Boxes that torchvision's RandomResizedCrop draws, in pixel edges over size."""
    image = torch.empty(1, height, width)
    crop = v2.RandomResizedCrop(224)
    boxes = []
    for _ in range(count):
        box = crop.make_params([image])
        boxes.append([box["left"], box["top"], box["left"] + box["width"], box["top"] + box["height"]])
    return torch.tensor(boxes) / torch.tensor([width, height, width, height])


def test_counts_of_the_published_pipeline():
    """Measured over 4,000 pairs at 500x375 (PIXPRO_FACTS 3.1): positives, matched cells, images without.

    The spread of the count over images is about 120, so a mean of 4,000 lies within 4 (two of its standard errors,
    once for the table and once for this draw); the effects told apart are larger: max against min 115 and 63.
    """
    q, k = coords_from_boxes(drawn_boxes(4000, 375, 500)), coords_from_boxes(drawn_boxes(4000, 375, 500))
    size = torch.tensor([[375, 500]]).expand(4000, 2)
    expected = {
        ("max", False): (114.8, 34.2, 0.023),
        ("max", True): (112.8, 33.9, 0.026),
        ("min", True): (63.4, 30.2, 0.033),
    }
    for (unit, pixels), (positives, cells, empty) in expected.items():
        mask = DistanceMatcher(0.7, unit=unit)(q, k, (7, 7), source_size=size if pixels else None)
        count = mask.sum((1, 2))
        assert count.double().mean() == pytest.approx(positives, abs=5)
        assert mask.any(2).sum(1).double().mean() == pytest.approx(cells, abs=0.8)
        assert (count == 0).double().mean() == pytest.approx(empty, abs=0.012)
    per_axis, isotropic = DistanceMatcher()(q, k, (7, 7)), DistanceMatcher()(q, k, (7, 7), source_size=size)
    assert (per_axis ^ isotropic).sum() / isotropic.sum() == pytest.approx(0.2, abs=0.04)


def test_source_size_changes_only_what_is_not_square():
    q, k = coords_from_boxes(random_boxes(6)), coords_from_boxes(random_boxes(6))
    match = DistanceMatcher()
    square, wide = torch.tensor([[64, 64]] * 6), torch.tensor([[100, 400]] * 6)
    assert torch.equal(match(q, k, SIZE_Q, SIZE_K), match(q, k, SIZE_Q, SIZE_K, square))
    assert torch.equal(match(q, k, SIZE_Q, SIZE_K, wide), match(q, k, SIZE_Q, SIZE_K, 3 * wide))
    assert not torch.equal(match(q, k, SIZE_Q, SIZE_K), match(q, k, SIZE_Q, SIZE_K, wide))


def test_each_image_has_its_own_source_size():
    q, k = coords_from_boxes(random_boxes(3)), coords_from_boxes(random_boxes(3))
    sizes = torch.tensor([[100, 400], [300, 200], [50, 50]])
    together = DistanceMatcher()(q, k, SIZE_Q, SIZE_K, sizes)
    alone = [DistanceMatcher()(q[i : i + 1], k[i : i + 1], SIZE_Q, SIZE_K, sizes[i : i + 1]) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


# --- what never matches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("threshold", [0.7, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_unknown_coords_never_match(bad, threshold, sparse):
    match = DistanceMatcher(threshold, sparse=sparse)
    good = coords_from_boxes(torch.tensor([[0.0, 0.0, 1.0, 1.0]])).expand(3, 3, 3)
    for place in range(9):
        broken = good.clone()
        broken[1].view(-1)[place] = bad
        for pair in ((broken, good), (good, broken), (broken, broken)):
            mask = match(*pair, SIZE_Q, SIZE_K)
            per_image = (mask.to_dense() if sparse else mask).sum((1, 2))
            assert per_image[0] > 0
            assert per_image[2] > 0
            # An infinite entry of the last row shrinks the view to a point of the image: no cell, no match either.
            assert per_image[1] == 0, (place, pair[0] is broken)


def test_dense_coords_match_like_the_homography_and_nan_pixels_do_not():
    boxes = random_boxes(2)
    q, k = coords_from_boxes(boxes), coords_from_boxes(random_boxes(2))
    h, w = 20, 36  # four pixels a cell
    centers = torch.tensor([[[x, y] for x, y, _ in box_cells(box, (h, w))] for box in boxes.tolist()])
    dense = centers.mT.unflatten(2, (h, w)).float()
    match = DistanceMatcher()
    expected = match(q, k, SIZE_Q, SIZE_K)
    assert torch.equal(match(dense, k, SIZE_Q, SIZE_K), expected)
    dense[:, :, :4] = torch.nan  # the first row of cells
    masked = match(dense, k, SIZE_Q, SIZE_K)
    assert not masked[:, :9].any()
    assert expected[:, :9].any()
    assert torch.equal(masked[:, 9:], expected[:, 9:])


def test_infinite_dense_coords_never_match():
    """Beside an infinite pixel a cell's centre is known and its extent infinite: its distances would all be 0."""
    centers = torch.tensor([[x, y] for x, y, _ in box_cells((0, 0, 1, 1), (10, 18))])
    dense = centers.T.unflatten(1, (10, 18))[None]
    match = DistanceMatcher()
    expected = match(dense, dense, SIZE_Q)[0]
    broken = dense.clone()
    broken[:, :, :, 8] = torch.inf
    mask = match(broken, dense, SIZE_Q)[0]
    touched = torch.zeros(5, 9, dtype=torch.bool)
    touched[:, 3:6] = True
    assert torch.equal(mask[~touched.flatten()], expected[~touched.flatten()])
    assert not mask.view(5, 9, 45)[:, 4].any()
    assert not (mask & ~expected).any()


def test_cells_outside_the_source_never_match():
    """Both views look half a width beyond the source; their outer cells lie upon one another."""
    coords = coords_from_boxes(torch.tensor([[-0.5, 0.0, 0.5, 1.0]]))
    mask = DistanceMatcher()(coords, coords, (4, 6))
    columns = mask[0].any(1).view(4, 6).any(0)
    assert columns.tolist() == [False] * 3 + [True] * 3
    assert torch.equal(mask[0], mask[0].T)


def test_valid_cells():
    q, k = coords_from_boxes(random_boxes(4)), coords_from_boxes(random_boxes(4))
    valid_q, valid_k = torch.rand(4, *SIZE_Q) < 0.5, torch.rand(4, *SIZE_K) < 0.5
    match = DistanceMatcher(1.5)
    full = match(q, k, SIZE_Q, SIZE_K)
    expected = full & valid_q.flatten(1)[:, :, None] & valid_k.flatten(1)[:, None]
    assert torch.equal(match(q, k, SIZE_Q, SIZE_K, valid_q=valid_q, valid_k=valid_k), expected)
    assert torch.equal(match(q, k, SIZE_Q, SIZE_K, None, valid_q.flatten(1), valid_k.flatten(1)), expected)
    assert 0 < expected.sum() < full.sum()


def test_autocast_changes_nothing():
    q, k = random_homographies(8), random_homographies(8)
    match = DistanceMatcher()
    expected = match(q, k, (28, 28))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(match(q, k, (28, 28)), expected)


def test_key_size_defaults_to_the_query_size():
    q, k = coords_from_boxes(random_boxes(2)), coords_from_boxes(random_boxes(2))
    assert torch.equal(DistanceMatcher()(q, k, SIZE_Q), DistanceMatcher()(q, k, SIZE_Q, SIZE_Q))


# --- NearestMatcher and gather_tokens -------------------------------------------------------------------------------


def random_cost(kind: str) -> tuple[Tensor, Tensor | None]:
    cost = torch.randn(4, 6, 9, dtype=torch.float64)
    if kind == "ties":
        cost = torch.randint(0, 3, (4, 6, 9)).double()
    if kind == "broken":
        draw = torch.rand(4, 6, 9)
        cost[draw < 0.6] = torch.nan
        cost[draw < 0.4] = torch.inf
        cost[draw < 0.2] = -torch.inf
        cost[0] = torch.nan
        cost[1, 2] = torch.inf
    valid = None
    if kind == "invalid":
        valid = torch.rand(4, 6, 9) < 0.3
        valid[3] = False
    return cost, valid


@pytest.mark.parametrize("kind", ["plain", "ties", "broken", "invalid"])
@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("keep", [None, 1, 4, 6])
@pytest.mark.parametrize("transposed", [False, True])
def test_nearest_pairs_equal_brute_force(keep, mutual, kind, transposed):
    cost, valid = random_cost(kind)
    if transposed:
        cost, valid = cost.mT, None if valid is None else valid.mT
    pairs = NearestMatcher(keep, mutual=mutual)(cost, valid)
    assert isinstance(pairs, Pairs)
    assert pairs.query.dtype == pairs.key.dtype == torch.int64
    assert pairs.valid.dtype == torch.bool
    allowed = torch.ones_like(cost, dtype=torch.bool) if valid is None else valid
    for b in range(4):
        got = list(zip(*(part[b].tolist() for part in pairs), strict=True))
        assert got == nearest(cost[b].tolist(), allowed[b].tolist(), keep, mutual)
    assert pairs.valid.any()


def test_valid_broadcasts():
    cost = torch.randn(3, 5, 7)
    columns = torch.tensor([True, False, True, True, False, False, True])
    expected = NearestMatcher()(cost, columns.expand(3, 5, 7))
    for shaped in (columns, columns[None, None], columns.expand(3, 1, 7)):
        for got, wanted in zip(NearestMatcher()(cost, shaped), expected, strict=True):
            assert torch.equal(got, wanted)
    assert columns[expected.key].all()


def test_half_precision_costs():
    cost = torch.randperm(2 * 6 * 9).view(2, 6, 9)
    for dtype in (torch.float16, torch.bfloat16):
        pairs = NearestMatcher(mutual=True)(cost.to(dtype))
        assert torch.equal(pairs.valid, NearestMatcher(mutual=True)(cost.to(dtype).float()).valid)


def test_gather_tokens_equals_indexing_and_passes_the_gradient():
    tokens = torch.randn(3, 7, 4, dtype=torch.float64, requires_grad=True)
    index = torch.randint(7, (3, 5))
    picked = gather_tokens(tokens, index)
    for b in range(3):
        for k in range(5):
            assert torch.equal(picked[b, k], tokens[b, index[b, k]])
    picked.sum().backward()
    for b in range(3):
        for n in range(7):
            assert torch.equal(tokens.grad[b, n], (index[b] == n).sum().double().expand(4))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (DistanceMatcher(0.5, unit="min", sparse=True), "threshold=0.5, unit='min', sparse=True"),
        (NearestMatcher(3, mutual=True), "keep=3, mutual=True"),
    ],
)
def test_repr_shows_the_options(module, text):
    assert text in repr(module)
