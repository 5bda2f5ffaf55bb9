"""Random masks in random forms through every part that takes one: right by a loop, or refused by the argument."""

import random
import re

import pytest
import torch
from reference import pair_similarity as similarity_by_loop
from reference import pixcontrast_loss as pixcontrast_by_loop
from reference import pixpro_loss as pixpro_by_loop
from torch import Tensor

from densessl import cell_labels, cell_validity, masks, pixcontrast_loss, pixpro_loss, pool_regions, sample_labels
from densessl.losses import pixcontrast
from densessl.matching import Pairs, gather_tokens, pairs_to_mask
from densessl.metrics import pair_similarity, positives_per_cell, unmatched_share

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")
CASES = 150


def shuffled(count: int, draw: random.Random) -> Tensor:
    return torch.tensor(draw.sample(range(count), count), dtype=torch.int64)


def as_entries(mask: Tensor, draw: random.Random, extra: Tensor) -> Tensor:
    """COO in a random order, some entries stored twice, those of ``extra`` with the value False."""
    stored = (mask | extra).nonzero()
    if draw.random() < 0.5 and len(stored):
        stored = torch.cat([stored, stored[torch.randint(len(stored), (3,))]])
    stored = stored[shuffled(len(stored), draw)]
    return torch.sparse_coo_tensor(stored.T, mask[tuple(stored.T)], mask.shape, check_invariants=True)


FORMS = {
    "strided": lambda mask, draw: mask,
    "transposed": lambda mask, draw: mask.mT.contiguous().mT,
    "every second": lambda mask, draw: torch.stack([mask, ~mask], 3).flatten(2)[..., ::2],
    "coo": lambda mask, draw: mask.to_sparse(),
    "coo of a transposed one": lambda mask, draw: mask.mT.to_sparse().mT,
    "not coalesced": lambda mask, draw: as_entries(mask, draw, torch.zeros_like(mask)),
    "false entries": lambda mask, draw: as_entries(mask, draw, torch.rand(mask.shape) < 0.3),
    "false entries, coalesced": lambda mask, draw: as_entries(mask, draw, torch.rand(mask.shape) < 0.3).coalesce(),
    "a product": lambda mask, draw: (mask | (torch.rand(mask.shape) < 0.3)).to_sparse() * mask,
}
NOT_TAKEN = {
    "hybrid": lambda mask: mask.to_sparse(2),
    "csr": lambda mask: mask.to_sparse_csr(),
    "csc": lambda mask: mask.to_sparse_csc(),
    "uint8": lambda mask: mask.byte(),
    "float": lambda mask: mask.float(),
    "int64": lambda mask: mask.long(),
    "sparse floats": lambda mask: mask.float().to_sparse(),
    "unbatched": lambda mask: mask[0],
    "with a channel": lambda mask: mask[:, None],
    "transposed": lambda mask: mask.mT,
    "one image more": lambda mask: torch.cat([mask, mask[:1]]),
    "one row less": lambda mask: mask[:, 1:],
    "flat": lambda mask: mask.flatten(),
    "meta": lambda mask: mask.to("meta"),
    "no tensor": lambda mask: mask.tolist(),
    "numpy": lambda mask: mask.numpy(),
    "none": lambda mask: None,
}


def pair(draw: random.Random, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key as maps or tokens, a mask with few or many positives, some images and rows without any."""
    batch, channels = draw.randint(1, 2), draw.randint(1, 4)
    size_q, size_k = ((draw.randint(1, 4), draw.randint(1, 3)) for _ in range(2))
    q, k = (torch.randn(batch, channels, *size, dtype=dtype) for size in (size_q, size_k))
    mask = torch.rand(batch, size_q[0] * size_q[1], size_k[0] * size_k[1]) < draw.choice([0, 0.1, 0.5, 1])
    mask &= torch.rand(batch, 1, 1) < 0.8
    mask &= torch.rand(batch, mask.shape[1], 1) < 0.8
    if draw.random() < 0.5:
        q, k = q.flatten(2).mT, k.flatten(2).mT
    return q.requires_grad_(), k.requires_grad_(), mask


def test_losses_and_meters(monkeypatch):
    draw = random.Random(0)
    for case in range(CASES // 2):
        few = draw.choice([0, 1 << 22])
        monkeypatch.setattr(pixcontrast, "_FEW_PAIRS", {torch.strided: few, torch.sparse_coo: few})
        q, k, mask = pair(draw, torch.float64)
        name = draw.choice(list(FORMS))
        form = FORMS[name](mask, draw)
        options = {"reduction": draw.choice(["mean", "none"]), "no_match": draw.choice(["zero", "skip"])}
        temperature = draw.uniform(0.1, 2)
        of = f"case {case}, {name}, {tuple(mask.shape)}"
        for got, expected in (
            (pixpro_loss(q, k, form, **options), pixpro_by_loop(q, k, mask, **options)),
            (
                pixcontrast_loss(q, k, form, temperature=temperature, **options),
                pixcontrast_by_loop(q, k, mask, temperature, **options),
            ),
        ):
            torch.testing.assert_close(got, expected, msg=lambda text, of=of: f"{of}: {text}")
            gradients = torch.autograd.grad(got.sum(), (q, k))
            torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), (q, k), allow_unused=True),
                                       msg=lambda text, of=of: f"{of}: {text}")  # fmt: skip
        assert positives_per_cell(form) == pytest.approx(float(mask.sum() / mask.shape[0] / mask.shape[1])), of
        assert unmatched_share(form) == pytest.approx(float((~mask.any((1, 2))).float().mean())), of
        assert [float(x) for x in pair_similarity(q, k, form)] == pytest.approx(
            list(similarity_by_loop(q.detach(), k.detach(), mask)), nan_ok=True
        ), of


def test_other_forms_are_refused_by_name():
    draw = random.Random(1)
    for _ in range(CASES):
        q, k, mask = pair(draw, torch.float32)
        name = draw.choice(list(NOT_TAKEN))
        if name in ("csr", "csc"):  # which torch makes of masks with as many entries in each image alone
            mask[:] = mask[:1]
        form = NOT_TAKEN[name](mask)
        if name == "transposed" and mask.shape[1] == mask.shape[2]:
            continue
        calls = [lambda: pixpro_loss(q, k, form), lambda: pixcontrast_loss(q, k, form),  # noqa: B023
                 lambda: pair_similarity(q, k, form)]  # noqa: B023  # fmt: skip
        if name not in ("transposed", "one image more", "one row less", "meta"):  # any size and device is as good
            calls += [lambda: positives_per_cell(form), lambda: unmatched_share(form)]  # noqa: B023
        for call in calls:
            with pytest.raises(ValueError, match=r"^(mask: expected|query, key, mask: expected one device)"):
                call()


def test_cells_without_pairs_may_hold_anything(monkeypatch):
    """NaN and infinities in random cells that no pair needs change neither a value nor a gradient."""
    draw = random.Random(2)
    for case in range(CASES // 2):
        few = draw.choice([0, 1 << 22])
        monkeypatch.setattr(pixcontrast, "_FEW_PAIRS", {torch.strided: few, torch.sparse_coo: few})
        q, k, mask = pair(draw, torch.float64)
        q, k = (x.detach().flatten(2).mT if x.ndim == 4 else x.detach() for x in (q, k))
        bad_q, bad_k = torch.rand(q.shape[:2]) < 0.3, torch.rand(k.shape[:2]) < 0.3
        mask = mask & ~bad_q[..., None] & ~bad_k[:, None]
        form = FORMS[draw.choice(list(FORMS))](mask, draw)
        results = []
        for fill in (1.0, draw.choice([torch.nan, torch.inf, -torch.inf])):
            inputs = [x.masked_fill(bad[..., None], fill).requires_grad_() for x, bad in ((q, bad_q), (k, bad_k))]
            losses = [pixpro_loss(*inputs, form), pixcontrast_loss(*inputs, form, ~bad_k)]
            for loss in losses:
                results.append([loss, *torch.autograd.grad(loss, inputs)])
        for clean, got in zip(results[:2], results[2:], strict=True):
            assert all(x.isfinite().all() for x in got), case
            torch.testing.assert_close(got, clean)


# --- label maps and validity ------------------------------------------------------------------------------------------

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]


def labels_by_loop(labels: Tensor, size: tuple[int, int]) -> list:
    """Of each cell the label that most of its pixels have, of equals the smallest; negative ones count as 0."""
    out = []
    for image in labels.tolist():
        counts: dict = {}
        for y, row in enumerate(image):
            for x, label in enumerate(row):
                cell = (y * size[0] // len(image), x * size[1] // len(row))
                of = counts.setdefault(cell, {})
                of[max(label, 0)] = of.get(max(label, 0), 0) + 1
        cells = [counts[i, j] for i in range(size[0]) for j in range(size[1])]
        out.append([min(label for label, n in of.items() if n == max(of.values())) for of in cells])
    return out


def test_label_maps():
    draw = random.Random(3)
    for case in range(CASES):
        dtype = draw.choice(INTEGERS)
        low, high = (-3, 5) if dtype.is_signed else (0, 5)
        labels = torch.randint(low, high, (draw.randint(1, 3), draw.randint(1, 9), draw.randint(1, 9)))
        if dtype in (torch.int64, torch.uint32):
            labels = torch.where(labels == 4, 2**32 - 1 - draw.randrange(3), labels)
        size = draw.randint(1, labels.shape[1]), draw.randint(1, labels.shape[2])
        given = labels.to(dtype)
        got = cell_labels(given[:, None] if draw.random() < 0.3 else given, size)
        assert got.flatten(1).tolist() == labels_by_loop(labels, size), (case, dtype)
        ids = torch.randint(0, 5, (len(labels), 3)).to(draw.choice(INTEGERS))
        features = torch.randn(len(labels), 2, *size, dtype=torch.float64)
        means, there = pool_regions(features, got.to(draw.choice([dtype, torch.int64])), ids)
        for b in range(len(labels)):
            for r, region in enumerate(ids[b].tolist()):
                cells = [
                    features[b, :, i, j] for i in range(size[0]) for j in range(size[1]) if got[b, i, j] == region > 0
                ]
                assert there[b, r] == bool(cells), (case, ids.dtype)
                expected = sum(cells) / len(cells) if cells else torch.zeros(2, dtype=torch.float64)
                torch.testing.assert_close(means[b, r], expected)
        drawn = sample_labels(got.to(draw.choice([dtype, torch.int64])), torch.rand(len(labels), 4))
        for b in range(len(labels)):
            known = {label for label in got[b].flatten().tolist() if label > 0}
            assert set(drawn[b].tolist()) <= (known or {0}), (case, dtype)


FOUR = torch.full((1, 2), 4)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("labels", lambda: cell_labels(torch.full((1, 4, 4), 2**32), (2, 2))),
        ("labels", lambda: cell_labels(torch.full((1, 4, 4), 2**40 + 1), (2, 2))),
        ("labels", lambda: cell_labels(torch.zeros(1, 4, 4), (2, 2))),
        ("labels", lambda: cell_labels(torch.zeros(1, 4, 4, dtype=torch.bool), (2, 2))),
        ("labels", lambda: cell_labels([[[1]]], (1, 1))),
        ("size", lambda: cell_labels(torch.zeros(1, 4, 4, dtype=torch.int64), 2)),
        ("size", lambda: cell_labels(torch.zeros(1, 4, 4, dtype=torch.int64), (2, 2, 2))),
        ("draws", lambda: sample_labels(torch.ones(1, 2, 2, dtype=torch.int64), torch.ones(1, 3))),
        ("draws", lambda: sample_labels(torch.ones(1, 2, 2, dtype=torch.int64), torch.full((1, 3), torch.nan))),
        ("draws", lambda: sample_labels(torch.ones(1, 2, 2, dtype=torch.int64), -torch.ones(1, 3))),
        ("mask", lambda: cell_validity([[[1]]], (1, 1))),
        ("size", lambda: cell_validity(torch.ones(1, 4, 4), 2)),
        ("ids", lambda: pool_regions(torch.rand(1, 2, 2, 2), torch.ones(1, 2, 2, dtype=torch.int64), torch.ones(1, 2))),
        ("pairs.query", lambda: pairs_to_mask(Pairs(FOUR, 0 * FOUR, FOUR > 0), (4, 9))),
        ("pairs.query", lambda: pairs_to_mask(Pairs(-FOUR, 0 * FOUR, FOUR > 0), (4, 9))),
        ("pairs.key", lambda: pairs_to_mask(Pairs(0 * FOUR, FOUR, FOUR > 0), (9, 4))),
        ("pairs.key", lambda: pairs_to_mask(Pairs(0 * FOUR, -FOUR, FOUR > 0), (9, 4))),
        ("pairs.valid", lambda: pairs_to_mask(Pairs(FOUR, FOUR, FOUR), (9, 9))),
        ("index", lambda: gather_tokens(torch.rand(1, 4, 2), FOUR)),
        ("index", lambda: gather_tokens(torch.rand(1, 4, 2), -FOUR)),
    ],
)  # fmt: skip
def test_labels_and_pairs_out_of_range_are_refused_by_name(name, call):
    with pytest.raises(ValueError, match=f"^{re.escape(name)}: expected"):
        call()


def test_on_a_device_labels_and_draws_out_of_range_reach_no_others(monkeypatch):
    """Values are not looked at there."""
    monkeypatch.setattr(masks, "_is_readable", lambda values: False)
    labels = torch.tensor([[[1, 1, 2**40, 2**40], [2, 2, 3, 3]]])
    assert cell_labels(labels, (2, 2)).tolist() == [[[1, 2**32 - 1], [2, 3]]]
    draws = torch.tensor([[1.0, 7.0, -3.0, torch.nan]])
    assert sample_labels(torch.tensor([[[4, 9], [4, 0]]]), draws)[0, :3].tolist() == [9, 9, 4]
    assert set(sample_labels(torch.tensor([[[4, 9], [4, 0]]]), draws)[0].tolist()) <= {4, 9}
