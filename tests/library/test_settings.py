"""Settings in other forms: YAML reads 1e-3 as a text, and NaN, infinity and half a pair pass for numbers."""

import pytest
import torch
from torch import nn

from densessl import (
    LARS,
    MLP,
    PPM,
    BlockMask,
    ConvMLP,
    DistanceMatcher,
    InfoNCELoss,
    InstanceContrastLoss,
    KeyQueue,
    MaskedInfoNCELoss,
    NearestMatcher,
    NeighborOrderLoss,
    PixContrastLoss,
    PrototypeHead,
    PrototypeLoss,
    byol_views,
    cell_labels,
    cell_validity,
    coords_from_depth,
    coords_from_flow,
    coords_from_points,
    mocov2_views,
    multicrop_views,
    simclr_views,
)

LABELS = torch.ones(1, 6, 8, dtype=torch.int64)
FLOW = torch.rand(1, 2, 6, 8)
POINTS = torch.rand(1, 3, 2) * 6


def lars(**settings):
    return LARS([nn.Parameter(torch.ones(2))], **{"lr": 0.1, **settings})


NUMBERS = [
    *[(kind, "temperature") for kind in (InfoNCELoss, InstanceContrastLoss, MaskedInfoNCELoss, PixContrastLoss)],
    *[(PrototypeLoss, "query_temperature"), (PrototypeLoss, "key_temperature"), (NeighborOrderLoss, "steepness")],
    *[(PPM, "gamma"), (DistanceMatcher, "threshold"), (BlockMask, "images"), (BlockMask, "least")],
    *[(NearestMatcher, "keep")],
    *[(lars, name) for name in ("lr", "momentum", "weight_decay", "trust_coefficient", "eps")],
    (lambda min_share: cell_validity(LABELS > 0, (3, 4), min_share), "min_share"),
    (lambda radius: coords_from_points(POINTS, POINTS, (6, 8), radius=radius), "radius"),
]


@pytest.mark.parametrize("bad", ["1e-3", None, float("nan"), float("inf"), -1, [0.5], torch.ones(2)], ids=repr)
@pytest.mark.parametrize(("make", "name"), NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_what_is_no_number_in_range_is_named(make, name, bad):
    if (name == "keep" and bad is None) or (name == "threshold" and isinstance(bad, float) and bad > 1):
        make(**{name: bad})  # all query cells, and all pairs
        return
    with pytest.raises(ValueError, match=rf"^{name}: expected "):
        make(**{name: bad})


@pytest.mark.parametrize(("make", "name"), [(BlockMask, "least"), (NearestMatcher, "keep")])
def test_whole_numbers_are_asked_for(make, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got 1.5"):
        make(**{name: 1.5})


@pytest.mark.parametrize("bad", [0, -1, 1.5, "4", None, True, float("nan")], ids=repr)
@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in (MLP, ConvMLP) for name in ("in_dim", "hidden_dim", "out_dim")]
    + [(PrototypeHead, name) for name in ("in_dim", "hidden_dim", "dim", "prototypes")]
    + [(KeyQueue, name) for name in ("length", "dim")],
)
def test_widths_are_whole_numbers(kind, name, bad):
    widths = {"length": 4, "dim": 4} if kind is KeyQueue else {"in_dim": 4}
    with pytest.raises(ValueError, match=rf"^{name}: expected a whole number of at least 1, got "):
        kind(**{**widths, name: bad})


@pytest.mark.parametrize("preset", [byol_views, mocov2_views, simclr_views, multicrop_views])
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *[("size", bad) for bad in (0, -3, 1.5, "64", None, (), (8, 9, 3), (8, 0), (8, "9"), True)],
        *[("scale", bad) for bad in (0.5, None, (0.5, 0.1), (-1, 1), ("a", 1), (0.1, 2), (0.1, float("nan")), (0, 0))],
        *[("ratio", bad) for bad in (1.0, None, (2.0, 1.0), (0, 1), ("a", 1), (0.5, float("inf")))],
    ],
)
def test_crops_are_asked_for_in_sizes_and_shares(preset, name, bad):
    with pytest.raises(ValueError, match=rf"^{name}: expected "):
        preset(**{name: bad})
    if preset is multicrop_views and name != "ratio":
        with pytest.raises(ValueError, match=rf"^small_{name}: expected "):
            preset(**{f"small_{name}": bad})


def test_crops_of_one_side_or_two():
    for size, shape in ((8, (8, 8)), ([8], (8, 8)), ((8, 9), (8, 9)), (torch.Size((8, 9)), (8, 9))):
        view, _ = byol_views(size, scale=[0, 1])(torch.rand(3, 20, 30))
        assert view.image.shape[1:] == shape


SIZES = [3, "34", None, (3,), (3, 4, 5), (0, 4), (-1, 4), (3.5, 4), (3, float("nan")), ("a", "b"), True]


@pytest.mark.parametrize("size", SIZES, ids=repr)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda size: cell_labels(LABELS, size), "size"),
        (lambda size: cell_validity(LABELS > 0, size), "size"),
        (lambda size: BlockMask()(2, size), "size"),
        (lambda size: coords_from_points(POINTS, POINTS, size), "size"),
        (lambda size: coords_from_points(POINTS, POINTS, (6, 8), source_size=size), "source_size"),
        (lambda size: coords_from_flow(FLOW, source_size=size), "source_size"),
    ],
    ids=["cell_labels", "cell_validity", "BlockMask", "coords_from_points", "their source", "coords_from_flow"],
)
def test_what_is_no_size_is_named(make, name, size):
    if name == "source_size" and size in (None, (3.5, 4)):
        assert make(size).isfinite().any()  # as large as the frame; a resized one may have broken sides
        return
    with pytest.raises(ValueError, match=rf"^{name}: expected "):
        make(size)


@pytest.mark.parametrize("cells", [0.5, None, ("a", "b"), (0.1,), (0.5, 0.1), (0.1, float("nan")), (-0.1, 0.5), 3])
def test_shares_of_cells_are_two_numbers(cells):
    with pytest.raises(ValueError, match=r"^cells: expected two shares in 0..1, the lower first, got "):
        BlockMask(cells)


@pytest.mark.parametrize("batch", [0, -1, 4.0, "a", True, None])
def test_a_batch_is_a_whole_number(batch):
    with pytest.raises(ValueError, match=r"^batch: expected "):
        BlockMask()(batch, (4, 5))


def test_cells_of_no_pixel_are_refused():
    with pytest.raises(ValueError, match=r"^mask: expected .* got \(2, 6, 0\)"):
        cell_validity(torch.ones(2, 6, 0, dtype=torch.bool), (3, 4))


CAMERA = torch.tensor([[8.0, 0, 4], [0, 8, 3], [0, 0, 1]])


@pytest.mark.parametrize("name", ["intrinsics", "source_intrinsics", "pose"])
@pytest.mark.parametrize("change", ["transposed", "zero", "singular"])
def test_cameras_that_are_none_are_refused(name, change):
    given = {"intrinsics": CAMERA, "source_intrinsics": CAMERA, "pose": torch.eye(4)}
    given["pose"][:3, 3] = torch.tensor([0.1, 0.2, 0.3])
    good = given[name]
    given[name] = {"transposed": good.mT, "zero": good * 0, "singular": good * (torch.arange(len(good)) > 0)[:, None]}[
        change
    ]
    with pytest.raises(ValueError, match=rf"^{name}: expected an invertible matrix whose last row is 0"):
        coords_from_depth(torch.ones(6, 8), **given)
