"""Pairs that PixContrast neither pulls together nor pushes apart, against the loop written from the equation."""

import itertools

import pytest
import reference
import torch
from test_contract import NoHostReads
from test_pixcontrast_blocks import gradients, inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from densessl import DistanceMatcher, PerLevel, PixContrastLoss, coords_from_boxes, pixcontrast_loss
from densessl.losses import _blockwise as blockwise
from densessl.losses import pixcontrast

SIZES = [((3, 7), (8, 5)), ((1, 1), (4, 5)), ((4, 5), (1, 1))]
FORMS = {"strided": lambda x: x, "sparse": lambda x: x.to_sparse_coo()}
LAYOUTS = pytest.mark.parametrize("layouts", [(a, b) for a in FORMS for b in FORMS], ids="-".join)


def take(road, monkeypatch):
    """All logits at once, blocks of one row, or blocks of several rows with a rest."""
    few = 1 << 40 if road == "all logits" else 0
    monkeypatch.setattr(pixcontrast, "_FEW_PAIRS", {torch.strided: few, torch.sparse_coo: few})
    if road != "all logits":
        monkeypatch.setitem(blockwise._BLOCK, "cpu", road)
        monkeypatch.setattr(pixcontrast, "_of_all_logits", None)


@pytest.fixture
def road(request, monkeypatch):
    take(request.param, monkeypatch)


def ignored(mask: Tensor) -> Tensor:
    """Pairs to leave out, some of them positive; rows and columns of which all are left out, or none."""
    ignore = torch.rand(mask.shape) < 0.3
    ignore[:, ::7], ignore[:, 2::7] = True, False
    ignore[:, :, 3::6] = True
    return ignore


@pytest.mark.parametrize("with_validity", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_value_and_gradients_equal_the_loop(monkeypatch, sizes, with_validity):
    query, key, mask = inputs(*sizes)
    ignore = ignored(mask)
    ignore[1] = True
    valid = torch.rand(len(mask), mask.shape[2]) < 0.7 if with_validity else None
    options = {"reduction": "none", "temperature": 0.2}
    expected = reference.pixcontrast_loss(query, key, mask, valid_k=valid, ignore=ignore, **options)
    wanted = gradients(expected, query, key)
    for road in ("all logits", 1, 100):
        take(road, monkeypatch)
        for of_mask, of_ignore in itertools.product(FORMS.values(), repeat=2):
            got = pixcontrast_loss(query, key, of_mask(mask), valid, of_ignore(ignore), **options)
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
            assert got[1].abs() < 1e-12  # where only positives are left
            for mine, theirs in zip(gradients(got, query, key), wanted, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("road", ["all logits", 100], indirect=True)
@LAYOUTS
def test_nothing_ignored_and_nothing_positive(road, layouts):
    query, key, mask = inputs(*SIZES[0])
    form = FORMS[layouts[1]]
    got = pixcontrast_loss(query, key, FORMS[layouts[0]](mask), ignore=form(torch.zeros_like(mask)))
    expected = pixcontrast_loss(query, key, FORMS[layouts[0]](mask))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    nothing = pixcontrast_loss(query, key, FORMS[layouts[0]](mask & False), ignore=form(torch.ones_like(mask)))
    assert nothing == 0
    assert not any(x.any() for x in gradients(nothing, query, key))


@pytest.mark.parametrize("road", ["all logits", 100], indirect=True)
@LAYOUTS
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_keys_that_every_query_ignores_may_hold_anything(road, layouts, value):
    query, key, mask = inputs(*SIZES[0])
    ignore = torch.rand(mask.shape) < 0.3
    mask[:, :, 4], ignore[:, :, 4] = False, mask.any(2)  # queries without a positive need not ignore it
    assert not ignore[:, :, 4].all()
    forms = FORMS[layouts[0]](mask), None, FORMS[layouts[1]](ignore)
    expected = pixcontrast_loss(query, key, *forms)
    wanted = gradients(expected, query, key)
    with torch.no_grad():
        key[:, :, 0, 4] = value
    got = pixcontrast_loss(query, key, *forms)
    assert torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients(got, query, key), wanted, strict=True))


@pytest.mark.parametrize("road", ["all logits", 100], indirect=True)
@LAYOUTS
def test_a_query_whose_positives_are_all_invalid_is_not_read_and_keeps_no_key(road, layouts):
    query, key, mask = inputs(*SIZES[0])
    ignore, valid = torch.rand(mask.shape) < 0.3, torch.ones(len(mask), mask.shape[2], dtype=torch.bool)
    valid[:, 5], mask[:, 2], mask[:, :, 4] = False, False, False
    mask[:, 2, 5] = True
    ignore[:, :, 4], ignore[:, 2, 4] = True, False
    forms = FORMS[layouts[0]](mask), valid, FORMS[layouts[1]](ignore)
    expected = pixcontrast_loss(query, key, *forms)
    wanted = gradients(expected, query, key)
    with torch.no_grad():
        key[:, :, 0, 4] = torch.nan
        query.flatten(2)[:, :, 2] = torch.nan
    got = pixcontrast_loss(query, key, *forms)
    assert torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients(got, query, key), wanted, strict=True))


@pytest.mark.parametrize("road", ["all logits", 100], indirect=True)
def test_entries_with_the_value_false_are_not_ignored(road):
    query, key, mask = inputs(*SIZES[0])
    stored, kept = torch.rand(mask.shape) < 0.3, torch.rand(*mask.shape[:2], 1) < 0.5
    stored[-1, -1, -1], kept[-1, -1] = True, False
    sparse = torch.sparse_coo_tensor(stored.nonzero().T, kept.expand_as(stored)[stored], stored.shape)
    for form in FORMS.values():
        got = pixcontrast_loss(query, key, form(mask), ignore=sparse)
        torch.testing.assert_close(got, pixcontrast_loss(query, key, form(mask), ignore=stored & kept))


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.layout == torch.strided and (x.is_floating_point() or self.of_any):
                self.count = max(self.count, x.numel())
        return out


@pytest.mark.parametrize("layout", FORMS)
def test_no_table_of_all_pairs(layout, monkeypatch):
    """Neither outside of the blocks nor within; for sparse masks no boolean one either."""
    monkeypatch.setattr(pixcontrast, "_FEW_PAIRS", {torch.strided: 0, torch.sparse_coo: 0})
    size = (40, 31)
    block = 8 * size[0] * size[1]
    monkeypatch.setitem(blockwise._BLOCK, "cpu", block)
    logits, seen = blockwise._logits, []
    monkeypatch.setattr(blockwise, "_logits", lambda *a: seen.append(logits(*a).numel()) or logits(*a))
    c1, c2 = coords_from_boxes(torch.tensor([[0.0, 0.0, 0.7, 0.8], [0.2, 0.1, 1.0, 0.9]]))[:, None]
    mask, near = (DistanceMatcher(radius, sparse=True)(c1, c2, size, size) for radius in (0.7, 1.2))
    if layout == "strided":
        mask, near = mask.to_dense(), near.to_dense()
    query, key = (torch.randn(1, 3, *size, requires_grad=True) for _ in range(2))
    largest = Largest()
    largest.of_any = layout == "sparse"
    with largest:
        pixcontrast_loss(query, key, mask, ignore=near).backward()
    assert 0 < max(seen) <= block
    assert 0 < largest.count < mask.numel() / 10


def test_strided_masks_are_not_read_back():
    query, key, mask = inputs(*SIZES[0])
    with NoHostReads():
        pixcontrast_loss(query, key, mask, ignore=ignored(mask)).backward()


def test_module_and_levels_pass_it_on():
    query, key, mask = inputs(*SIZES[0])
    ignore = ignored(mask)
    expected = pixcontrast_loss(query, key, mask, None, ignore, temperature=0.2)
    loss = PixContrastLoss(0.2)
    assert torch.equal(loss(query, key, mask, ignore=ignore), expected)
    assert torch.equal(PerLevel(loss)([query], [key], [mask], None, [ignore])[0], expected)
    assert not torch.equal(loss(query, key, mask), expected)


@pytest.mark.parametrize("road", [100], indirect=True)
@pytest.mark.parametrize("layouts", [("strided", "strided"), ("strided", "sparse")], ids="-".join)
def test_compiled(road, layouts):
    torch._dynamo.reset()
    query, key, mask = inputs(*SIZES[0])
    forms = FORMS[layouts[0]](mask), None, FORMS[layouts[1]](ignored(mask))
    step = torch.compile(pixcontrast_loss, backend="eager", fullgraph=layouts == ("strided", "strided"))
    got, expected = step(query, key, *forms), pixcontrast_loss(query, key, *forms)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got, query, key), gradients(expected, query, key))


@pytest.mark.parametrize("layouts", [("strided", "strided"), ("sparse", "sparse")], ids="-".join)
def test_operator_is_described_truly(layouts):
    query, key = torch.randn(2, 6, 3, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    mask = torch.rand(2, 6, 4) < 0.4
    out = ~mask & (torch.rand(2, 6, 4) < 0.4)
    positives = (None, mask.nonzero().T.contiguous()) if layouts[0] == "sparse" else (mask, None)
    out = out.nonzero().T.contiguous() if layouts[1] == "sparse" else out
    torch.library.opcheck(blockwise._forward, (query, key, *positives, None, out, 0.3))


BAD = {
    "shape": lambda: torch.zeros(3, 4, 45, dtype=torch.bool),
    "dtype": lambda: torch.zeros(3, 45, 4),
    "no tensor": lambda: [[[True]]],
}


@pytest.mark.parametrize("case", BAD)
def test_bad_masks_are_named(case):
    query, key, mask = inputs((5, 9), (2, 2))
    with pytest.raises(ValueError, match=r"^ignore: expected bool \(B, Nq, Nk\) = \(3, 45, 4\), got"):
        pixcontrast_loss(query, key, mask, ignore=BAD[case]())


def test_other_layouts_and_devices_are_named():
    query, key, mask = inputs((5, 9), (2, 2))
    with pytest.raises(ValueError, match=r"^ignore: expected a strided or sparse COO mask, got"):
        pixcontrast_loss(query, key, mask, ignore=torch.ones_like(mask).to_sparse_csr())
    with pytest.raises(ValueError, match=r"^ignore: expected a sparse COO mask with 3 sparse dimensions"):
        pixcontrast_loss(query, key, mask, ignore=mask.to_sparse(2))
    with pytest.raises(ValueError, match=r"^ignore: expected a mask on cpu as the features, got meta"):
        pixcontrast_loss(query, key, mask, ignore=mask.to("meta"))
