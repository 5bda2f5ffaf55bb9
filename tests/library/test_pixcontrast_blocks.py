"""PixContrast in blocks against the loop written from the equation, and against the road by all logits at once."""

import pytest
import reference
import torch
from torch import Tensor

from densessl import pixcontrast_loss
from densessl.losses import _blockwise as _streaming
from densessl.losses import pixcontrast

B, C = 3, 6
LAYOUT = pytest.mark.parametrize("layout", ["strided", "sparse", "transposed"])
SIZES = [((5, 9), (13, 7)), ((1, 1), (4, 5)), ((4, 5), (1, 1)), ((1, 1), (1, 1)), ((2, 31), (31, 2))]


@pytest.fixture(params=[1, 300, 1 << 19])
def blocks(monkeypatch, request):
    """Blocks of one row, of several with a rest, of a whole image."""
    monkeypatch.setattr(pixcontrast, "_FEW_PAIRS", {torch.strided: 0, torch.sparse_coo: 0})
    monkeypatch.setitem(_streaming._BLOCK, "cpu", request.param)
    monkeypatch.setattr(pixcontrast, "_of_all_logits", None)


def inputs(size_q: tuple[int, int], size_k: tuple[int, int], dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Features of lengths far from 1, and a mask with empty rows and columns."""
    query, key = 3 * torch.randn(B, C, *size_q, dtype=dtype), 0.2 * torch.randn(B, C, *size_k, dtype=dtype)
    mask = torch.rand(B, size_q[0] * size_q[1], size_k[0] * size_k[1]) < 0.2
    mask[:, 1::4] = False
    mask[:, :, 1::5] = False
    return query.requires_grad_(), key.requires_grad_(), mask


def laid_out(mask: Tensor, layout: str) -> Tensor:
    if layout == "strided":
        return mask
    return mask.to_sparse_coo() if layout == "sparse" else mask.mT.contiguous().to_sparse_coo().mT


def gradients(value: Tensor, *inputs: Tensor) -> list[Tensor]:
    weight = torch.arange(1, value.numel() + 1, dtype=value.dtype).view(value.shape)
    return list(torch.autograd.grad((value * weight).sum(), inputs))


@pytest.mark.usefixtures("blocks")
@LAYOUT
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("empty", [[], [1], [0, 1, 2]])
def test_value_and_gradients_equal_the_loop(layout, sizes, empty):
    query, key, mask = inputs(*sizes)
    mask[empty] = False
    for reduction, no_match in (("mean", "zero"), ("none", "skip")):
        options = {"reduction": reduction, "no_match": no_match, "temperature": 0.2}
        got = pixcontrast_loss(query, key, laid_out(mask, layout), **options)
        expected = reference.pixcontrast_loss(query, key, mask, **options)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        for mine, wanted in zip(gradients(got, query, key), gradients(expected, query, key), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-7, atol=1e-11)
            assert not mine[empty].any()


@pytest.mark.parametrize("blockwise", [True, False])
@LAYOUT
@pytest.mark.parametrize("sizes", SIZES)
def test_invalid_keys_leave_the_denominator_and_are_no_positives(layout, sizes, blockwise, request):
    """Of three images the second has no valid key; queries of the others may have none among their positives."""
    if blockwise:
        request.getfixturevalue("small_blocks")
    query, key, mask = inputs(*sizes)
    valid = torch.rand(B, sizes[1][0] * sizes[1][1]) < 0.7
    valid[0, 0], valid[1] = True, False
    assert sizes != SIZES[0] or (mask & ~valid[:, None])[0].any()
    options = {"reduction": "none", "temperature": 0.2}
    expected = reference.pixcontrast_loss(query, key, mask, valid_k=valid, **options)
    wanted = gradients(expected, query, key)
    for form in (valid, valid.unflatten(1, sizes[1])):
        got = pixcontrast_loss(query, key, laid_out(mask, layout), form, **options)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        mine = gradients(got, query, key)
        torch.testing.assert_close(mine, wanted, rtol=1e-7, atol=1e-11)
        assert not mine[0][1].any()
        assert not mine[1].flatten(2).mT[~valid].any()
    everywhere = pixcontrast_loss(query, key, laid_out(mask, layout), torch.ones_like(valid))
    torch.testing.assert_close(everywhere, pixcontrast_loss(query, key, laid_out(mask, layout)), rtol=1e-12, atol=0)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(pixcontrast, "_FEW_PAIRS", {torch.strided: 0, torch.sparse_coo: 0})
    monkeypatch.setitem(_streaming._BLOCK, "cpu", 300)
    monkeypatch.setattr(pixcontrast, "_of_all_logits", None)


@pytest.mark.parametrize(
    "valid",
    [torch.ones(3, 4), torch.ones(3, 5, dtype=torch.bool), torch.ones(3, 2, 3, dtype=torch.bool)],
)
def test_bad_validity_is_named(valid):
    query, key, mask = inputs((5, 9), (2, 2))
    with pytest.raises(
        ValueError, match=r"valid_k: expected bool \(B, N\) = \(3, 4\) or \(B, h, w\) = \(3, 2, 2\), got"
    ):
        pixcontrast_loss(query, key, mask, valid)


@pytest.mark.usefixtures("blocks")
@LAYOUT
def test_gradient_of_one_side(layout):
    """As in training, where the key comes from the target."""
    query, key, mask = inputs(*SIZES[0])
    both = gradients(pixcontrast_loss(query, key, laid_out(mask, layout)), query, key)
    (of_query,) = gradients(pixcontrast_loss(query, key.detach(), laid_out(mask, layout)), query)
    (of_key,) = gradients(pixcontrast_loss(query.detach(), key, laid_out(mask, layout)), key)
    assert torch.equal(of_query, both[0])
    assert torch.equal(of_key, both[1])


@pytest.mark.usefixtures("blocks")
@LAYOUT
def test_gradcheck(layout):
    query, key = torch.randn(2, 3, 2, 3, dtype=torch.float64), torch.randn(2, 3, 4, 1, dtype=torch.float64)
    mask = laid_out(torch.rand(2, 6, 4) < 0.4, layout)
    leaves = query.requires_grad_(), key.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: pixcontrast_loss(q, k, mask, reduction="none"), leaves)
    with pytest.raises(RuntimeError):  # and says so where it ends
        torch.autograd.gradgradcheck(lambda q, k: pixcontrast_loss(q, k, mask), leaves)


@pytest.mark.parametrize("layout", ["strided", "sparse"])
@pytest.mark.parametrize("temperature", [0.3, 0.05])
def test_float32_is_float64_to_rounding(monkeypatch, layout, temperature):
    """Large enough to leave the road of all logits by itself."""
    query, key = torch.randn(1, 8, 50, 45), torch.randn(1, 8, 40, 52)
    mask = torch.rand(1, 2250, 2080) < 0.002
    mask[:, ::3] = False
    expected = pixcontrast._of_all_logits
    roads = []
    monkeypatch.setattr(pixcontrast, "_of_all_logits", lambda *a: roads.append(1) or expected(*a))
    leaves = [x.requires_grad_() for x in (query, key)]
    got = pixcontrast_loss(*leaves, laid_out(mask, layout), temperature=temperature)
    assert not roads
    monkeypatch.setattr(pixcontrast, "_FEW_PAIRS", {torch.strided: 1 << 40, torch.sparse_coo: 1 << 40})
    wide = [x.detach().double().requires_grad_() for x in leaves]
    wanted = pixcontrast_loss(*wide, mask, temperature=temperature)
    assert roads
    assert got.item() == pytest.approx(wanted.item(), rel=1e-6)
    for a, b in zip(gradients(got, *leaves), gradients(wanted, *wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=2e-6 * b.abs().max().item())


@pytest.mark.usefixtures("blocks")
@LAYOUT
def test_autocast_changes_no_bit(layout):
    query, key, mask = inputs(*SIZES[0], dtype=torch.float32)
    expected = pixcontrast_loss(query, key, laid_out(mask, layout))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = pixcontrast_loss(query, key, laid_out(mask, layout))
        of_got = gradients(got, query, key)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    for a, b in zip(of_got, gradients(expected, query, key), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("blocks")
@LAYOUT
@pytest.mark.parametrize("temperature", [1e-2, 1e-6])
def test_tiny_temperature(layout, temperature):
    """exp(cos / t) alone would overflow, and all of it underflow beside a larger negative."""
    query, key, mask = inputs(*SIZES[0], dtype=torch.float32)
    got = pixcontrast_loss(query, key, laid_out(mask, layout), temperature=temperature)
    wanted = reference.pixcontrast_loss(query.double(), key.double(), mask, temperature=max(temperature, 2e-3))
    if temperature == 1e-2:
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=0)
    assert got.isfinite()
    assert all(g.isfinite().all() and g.any() for g in gradients(got, query, key))


@pytest.mark.usefixtures("blocks")
@LAYOUT
def test_unknown_features_are_not_hidden(layout):
    query, key, mask = inputs(*SIZES[0])
    mask[0, 0, 0] = True
    with torch.no_grad():
        query[0, 0, 0, 0] = torch.nan
    per_image = pixcontrast_loss(query, key, laid_out(mask, layout), reduction="none")
    assert per_image.isnan().tolist() == [True, False, False]


@pytest.mark.usefixtures("blocks")
def test_compiles_without_a_break():
    query, key, mask = inputs(*SIZES[0])
    step = torch.compile(pixcontrast_loss, backend="aot_eager", fullgraph=True)
    got, expected = step(query, key, mask), pixcontrast_loss(query, key, mask)
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients(got, query, key), gradients(expected, query, key), strict=True):
        torch.testing.assert_close(a, b)
    valid = torch.rand(B, mask.shape[2]) < 0.7
    torch.testing.assert_close(step(query, key, mask, valid), pixcontrast_loss(query, key, mask, valid))


@pytest.mark.parametrize("layout", ["strided", "sparse"])
def test_operator_is_described_truly(layout):
    """Shapes, strides and gradients as torch is told they are."""
    query, key = torch.randn(2, 6, 3, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    mask = torch.rand(2, 6, 4) < 0.4
    positives = (None, mask.nonzero().T.contiguous()) if layout == "sparse" else (mask, None)
    for valid in (None, torch.tensor([[True, False, True, True]] * 2)):
        torch.library.opcheck(_streaming._forward, (query, key, *positives, valid, None, 0.3))
