"""Relational losses: reference arrays, dense forms from the equations, lightly, float64, memory and half precision."""

import subprocess
import sys

import lightly.loss
import pytest
import torch
from golden_cases import load
from torch.nn import functional as F

from densessl import (
    GramLoss,
    KernelAlignmentLoss,
    NeighborOrderLoss,
    gram_loss,
    kernel_alignment_loss,
    map_to_tokens,
    neighbor_order_loss,
)

GRAM = load("gram")
NECO = load("neco")


def gradient(loss, query, *others):
    query = query.clone().requires_grad_()
    value = loss(query, *others)
    (grad,) = torch.autograd.grad(value.sum(), query)
    return value.detach(), grad


def close(got, expected, tolerance):
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def dense_gram(x, g, negatives="keep"):
    """The equation with its table, one image."""
    x, g = F.normalize(x, dim=-1), F.normalize(g, dim=-1)
    own, other = x @ x.mT, g @ g.mT
    if negatives == "drop":
        own, other = own.clamp(min=0), other.clamp(min=0)
    if negatives == "drop_key":
        other = other.clamp(min=0)
    return (own - other).square().mean()


@pytest.mark.parametrize(
    ("case", "options"),
    {
        "plain": {},
        "no_negatives": {"negatives": "drop"},
        "teacher_negatives": {"negatives": "drop_key"},
        "batch": {"across": "batch"},
    }.items(),
)
def test_gram_equals_the_reference_arrays(case, options):
    loss, grad = gradient(GramLoss(**options), GRAM["gram_student"], GRAM["gram_target"])
    close(loss, GRAM[f"gram_{case}_loss"], 1e-6)
    close(grad, GRAM[f"gram_{case}_grad"], 1e-5)


@pytest.mark.parametrize("negatives", ["keep", "drop", "drop_key"])
@pytest.mark.parametrize("channels", [6, 40])
def test_gram_equals_the_dense_form_with_gradients_of_both(negatives, channels):
    query, key = torch.randn(2, 3, channels, 4, 5, dtype=torch.float64).unbind(0)
    valid = torch.rand(3, 4, 5) < 0.7
    a, b = query.clone().requires_grad_(), key.clone().requires_grad_()
    expected = torch.stack(
        [dense_gram(map_to_tokens(a)[i][v], map_to_tokens(b)[i][v], negatives) for i, v in enumerate(valid.flatten(1))]
    )
    hole = torch.where(valid[:, None], 0.0, torch.nan)
    c, d = (query + hole).requires_grad_(), (key + hole).requires_grad_()
    got = gram_loss(c, d, negatives=negatives, valid=valid, reduction="none")
    torch.testing.assert_close(got, expected)
    weight = torch.rand(3, dtype=torch.float64)
    for x, y in zip(
        torch.autograd.grad(got @ weight, (c, d)), torch.autograd.grad(expected @ weight, (a, b)), strict=True
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("difference", [1.0, 1e-2, 1e-4])
def test_gram_loses_no_digits_between_similar_models_on_large_maps(difference):
    key = torch.randn(1, 12544, 32)
    query = key + difference * torch.randn_like(key)
    loss, grad = gradient(gram_loss, query, key)
    exact, exact_grad = gradient(gram_loss, query.double(), key.double())
    close(loss, exact, 1e-5)
    close(grad, exact_grad, 1e-2 if difference < 1e-3 else 1e-4)
    if difference != 1e-2:
        return
    x, g = F.normalize(query[0].double(), dim=-1), F.normalize(key[0].double(), dim=-1)
    table = sum(((x[i::49] @ x.mT - g[i::49] @ g.mT).square().sum()) for i in range(49)) / 12544**2
    close(exact, table, 1e-6)


@pytest.mark.parametrize("ignored", [False, True])
def test_kernel_alignment_equals_lightlys(ignored):
    query, key = torch.randn(2, 4, 30, 7).unbind(0)
    query, key = query + 1, key + 0.5 * query
    mask = torch.rand(4, 30) < 0.4 if ignored else None
    if ignored:
        mask[2] = True
        mask[2, :1] = False  # one token: the image does not count
    loss, grad = gradient(kernel_alignment_loss, query, key, None if mask is None else ~mask)
    theirs = getattr(lightly.loss, "PatchKernelAlignmentLoss", None)
    if theirs is None:
        pytest.skip("this version of lightly has no PatchKernelAlignmentLoss")
    expected, expected_grad = gradient(theirs(), query, key, mask)
    close(loss, expected, 1e-5)
    close(grad, expected_grad, 1e-5)


def test_kernel_alignment_passes_gradcheck_by_both_and_reads_no_invalid_cell():
    query, key = torch.randn(2, 2, 9, 3, dtype=torch.float64, requires_grad=True).unbind(0)
    valid = torch.rand(2, 9) < 0.8
    assert torch.autograd.gradcheck(lambda q, k: kernel_alignment_loss(q, k, valid, reduction="none"), (query, key))
    hole = torch.where(valid[..., None], 0.0, torch.nan)
    loss, grad = gradient(kernel_alignment_loss, (query + hole).detach(), (key + hole).detach(), valid)
    torch.testing.assert_close(loss, kernel_alignment_loss(query, key, valid).detach())
    assert grad.isfinite().all()


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("steepness", [100, 5])
def test_neighbor_order_equals_the_reference_arrays(similarity, steepness, monkeypatch):
    monkeypatch.setattr("densessl.losses.neighbor_order._ENTRIES", 49 * 49 * 40)  # blocks across the images
    loss, grad = gradient(
        NeighborOrderLoss(similarity, steepness), *(NECO[f"neco_{x}"] for x in ("student", "teacher", "references"))
    )
    close(loss, NECO[f"neco_{similarity}_{steepness}_loss"], 1e-4)
    close(grad, NECO[f"neco_{similarity}_{steepness}_grad"], 1e-4)


def test_neighbor_order_of_images_and_of_valid_cells_alone():
    query, key, references = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4), torch.randn(2, 9, 5)
    valid = torch.rand(2, 3, 4) < 0.7
    hole = torch.where(valid[:, None], 0.0, torch.nan)
    got, grad = gradient(
        lambda q: neighbor_order_loss(q, key + hole, references, valid=valid, reduction="none"), query + hole
    )
    for i, v in enumerate(valid.flatten(1)):
        q, k = (map_to_tokens(x)[i : i + 1, v] for x in (query, key))
        torch.testing.assert_close(got[i], neighbor_order_loss(q, k, references[i : i + 1]))
    assert grad.isfinite().all()


def test_neighbor_order_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffsort", None)
    with pytest.raises(ImportError, match=r"diffsort.*densessl\[neighbors\]"):
        neighbor_order_loss(*torch.randn(3, 1, 4, 2).unbind(0))


CALLS = {
    "gram": lambda q, k, **o: gram_loss(q, k, **o),
    "gram drop": lambda q, k, **o: gram_loss(q, k, negatives="drop", **o),
    "kernel alignment": lambda q, k, **o: kernel_alignment_loss(q, k, **o),
    "neighbor order": lambda q, k, **o: neighbor_order_loss(q, k, k.flip(0), **o),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_compute_in_float32(name, dtype):
    query, key = torch.randn(2, 3, 6, 4, 5).to(dtype).unbind(0)
    expected, expected_grad = gradient(CALLS[name], query.float(), key.float())
    query = query.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = CALLS[name](query, key)
    (grad,) = torch.autograd.grad(got, query)
    got = got.detach()
    assert got.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(grad.float(), expected_grad, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("name", CALLS)
def test_no_reduction_gives_the_terms_of_the_mean(name):
    query, key = torch.randn(2, 3, 6, 4, 5).unbind(0)
    each = CALLS[name](query, key, reduction="none")
    assert each.shape == (3,)
    torch.testing.assert_close(each.mean(), CALLS[name](query, key))
    torch.testing.assert_close(CALLS[name](map_to_tokens(query), map_to_tokens(key)), each.mean())


MEMORY = """
import torch, densessl
torch.set_num_threads(1)
loss = densessl.{name}
def peak():  # of this process alone; ru_maxrss would begin with that of the parent
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
def run(n):
    query, key = torch.randn(2, 256, n, n, requires_grad=True), torch.randn(2, 256, n, n)
    before = peak()
    loss(query, key).backward()
    return (peak() - before) / 1024
run(14)
print(run(112))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["gram_loss", "kernel_alignment_loss"])
def test_memory_of_large_maps(name):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY.format(name=name)], capture_output=True, text=True
    )
    assert float(done.stdout) < 120, done.stderr  # MiB; the table would take 2,500


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GramLoss("none"), r"negatives: expected 'keep', 'drop' or 'drop_key', got 'none'"),
        (lambda: GramLoss(across="all"), r"across: expected 'image' or 'batch', got 'all'"),
        (
            lambda: GramLoss(across="batch", reduction="none"),
            r"reduction: expected 'mean' across the batch, got 'none'",
        ),
        (lambda: gram_loss(torch.ones(2, 3, 4), torch.ones(2, 4, 4)), r"key: expected \(B, N\) = \(2, 3\)"),
        (lambda: KernelAlignmentLoss(reduction="sum"), r"reduction: .* got 'sum'"),
        (lambda: kernel_alignment_loss(torch.ones(2, 3, 4), torch.ones(3, 3, 4)), r"key: expected \(B, N\)"),
        (lambda: NeighborOrderLoss("dot"), r"similarity: .* got 'dot'"),
        (lambda: NeighborOrderLoss(steepness=0), r"steepness: expected a positive number, got 0"),
        (lambda: neighbor_order_loss(*torch.ones(2, 2, 3, 4), torch.ones(2, 1, 4)), r"references: .* R at least 2"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
