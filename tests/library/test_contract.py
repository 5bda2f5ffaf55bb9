"""The parts together: compiled, distributed, on other devices, without host reads, and what they say to bad input."""

import copy
import functools
import inspect
import os
import pickle
import tempfile

import pytest
import torch
import torch.distributed as dist
import torchvision.models as tv
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import default_collate

import densessl
from densessl import (
    EMA,
    LARS,
    MLP,
    PPM,
    ConvMLP,
    DistanceMatcher,
    FeatureMap,
    InstanceConsistencyLoss,
    InstanceContrastLoss,
    MaskedView,
    NearestMatcher,
    PixContrastLoss,
    PixProLoss,
    View,
    coords_from_boxes,
    gather_tokens,
    gram_loss,
    instance_consistency_loss,
    instance_contrast_loss,
    kernel_alignment_loss,
    map_to_tokens,
    metrics,
    neighbor_order_loss,
    param_groups,
    pixcontrast_loss,
    pixpro_loss,
    prototype_loss,
    tokens_to_map,
)

META = torch.device("meta")


def boxes(count: int) -> Tensor:
    sides = torch.empty(count, 2).uniform_(0.4, 0.9)
    start = torch.rand(count, 2) * (1 - sides)
    return coords_from_boxes(torch.cat([start, start + sides], 1))


def encoder(dim: int = 8) -> nn.Sequential:
    return nn.Sequential(FeatureMap(tv.resnet18(), "layer3"), ConvMLP(256, 16, dim))


class Method(nn.Module):
    """A whole step: two views in, the loss out."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.online, self.ppm = encoder(), PPM(nn.Conv2d(8, 8, 1))
        self.target = EMA(self.online)
        self.match, self.loss = DistanceMatcher(), loss

    def forward(self, x1: Tensor, x2: Tensor, c1: Tensor, c2: Tensor, source_size: Tensor) -> Tensor:
        z1, z2 = self.online(x1), self.online(x2)
        t1, t2 = self.target(x1), self.target(x2)
        mask = self.match(c1, c2, z1.shape[-2:], z2.shape[-2:], source_size)
        return self.loss(self.ppm(z1), t2, mask) + self.loss(self.ppm(z2), t1, mask.mT)


def batch(count: int = 2) -> tuple[Tensor, ...]:
    """Views of two sizes."""
    views = torch.randn(count, 3, 48, 80), torch.randn(count, 3, 96, 64)
    return *views, boxes(count), boxes(count), torch.tensor([[375, 500]]).expand(count, 2)


# --- torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [PixProLoss(), PixContrastLoss(no_match="skip")])
def test_whole_step_compiles_without_a_break(loss):
    plain = Method(loss)
    compiled = copy.deepcopy(plain)
    step = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    inputs = batch()
    got, expected = step(*inputs), plain(*inputs)
    torch.testing.assert_close(got, expected)
    assert expected.item() != 0
    got.backward()
    expected.backward()
    for (name, a), b in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == name.startswith("target.")
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_other_parts_compile_without_a_break():
    query, key = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 6, 2)

    nearest = NearestMatcher(4, mutual=True)

    def parts(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        cost = -map_to_tokens(query) @ map_to_tokens(key).mT
        pairs = nearest(cost)
        picked = gather_tokens(map_to_tokens(query), pairs.query)
        mask = cost < 0
        meters = metrics.feature_std(query), *metrics.pair_similarity(query, key, mask)
        vectors = query.mean((2, 3)), key.mean((2, 3))
        return picked, *meters, instance_consistency_loss(*vectors)

    for got, expected in zip(
        torch.compile(parts, backend="eager", fullgraph=True)(query, key), parts(query, key), strict=True
    ):
        torch.testing.assert_close(got, expected)


# --- no host reads, other devices -----------------------------------------------------------------------------------


class NoHostReads(TorchDispatchMode):
    """Fails on what makes a GPU wait for the host: reading a value, or a shape that depends on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "is_nonzero", "equal.default")

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.seen.add(name)
        by_mask = name in ("aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default") and any(
            tensor is not None and tensor.dtype == torch.bool for tensor in (args[1])
        )
        if by_mask or any(word in name for word in self.FORBIDDEN):
            raise AssertionError(f"host read: {name}")
        return func(*args, **(kwargs or {}))


def test_the_check_for_host_reads_finds_them():
    for read in (
        lambda: torch.ones(3).sum().item(),
        lambda: torch.ones(3).nonzero(),
        lambda: torch.ones(3)[torch.ones(3).bool()],
        lambda: bool(torch.ones(1) > 0),
        lambda: torch.ones(3).long().bincount(),
    ):
        with pytest.raises(AssertionError, match="host read"), NoHostReads():
            read()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lars_reads_no_value(momentum):
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = LARS(param_groups(net, 0.1), lr=0.1, momentum=momentum)
    for _ in range(2):
        net(torch.randn(2, 3)).square().sum().backward()
        with NoHostReads() as reads:
            optimizer.step()
    assert any("norm" in name for name in reads.seen)


def test_ema_reads_no_value():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = EMA(net, lambda step: 0.9)
    with NoHostReads() as reads:
        ema.update(net)
        ema(torch.randn(2, 3))
    assert any("lerp" in name for name in reads.seen)


@pytest.mark.parametrize("loss", [pixpro_loss, pixcontrast_loss])
@pytest.mark.parametrize("no_match", ["zero", "skip"])
def test_losses_matchers_and_meters_read_no_value(loss, no_match):
    query, key = torch.randn(2, 4, 3, 5).requires_grad_(), torch.randn(2, 4, 6, 2)
    c1, c2 = boxes(2), boxes(2)
    source_size, valid = torch.tensor([[375, 500], [100, 100]]), torch.rand(2, 3, 5) < 0.9
    with NoHostReads():
        mask = DistanceMatcher()(c1, c2, (3, 5), (6, 2), source_size, valid)
        loss(PPM()(query), key, mask, no_match=no_match).backward()
        prototype_loss(query, query.detach(), valid, no_match=no_match).backward()
        NearestMatcher(3, mutual=True)(torch.randn(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool))
        metrics.positives_per_cell(mask)
        metrics.unmatched_share(mask)
        metrics.feature_std(query)
        metrics.pair_similarity(query, key, mask)
        metrics.propagation_entropy(query)


def test_sparse_loss_and_meters_read_no_value():
    """Once the mask is there and coalesced; making it reads the number of its pairs."""
    query, key = torch.randn(2, 4, 3, 5).requires_grad_(), torch.randn(2, 4, 6, 2)
    mask = DistanceMatcher(sparse=True)(boxes(2), boxes(2), (3, 5), (6, 2))
    with NoHostReads():
        pixpro_loss(query, key, mask).backward()
        metrics.positives_per_cell(mask)
        metrics.unmatched_share(mask)
        metrics.pair_similarity(query, key, mask)


def test_everything_runs_on_another_device():
    """On tensors that say they are on a GPU: one made on the CPU on the way raises, and so does a host read."""
    with FakeTensorMode():
        on_gpu = functools.partial(torch.rand, device="cuda")
        try:
            on_gpu(1).as_subclass(Tensor)
        except RuntimeError:
            pytest.skip("fake tensors of this torch cannot be stripped of their type")
        query, key = on_gpu(2, 4, 3, 5, requires_grad=True), on_gpu(2, 4, 6, 2)
        size, valid = torch.ones(2, 2, dtype=torch.int64, device="cuda"), on_gpu(2, 3, 5) < 0.9
        masks = [
            DistanceMatcher()(coords, on_gpu(2, 3, 3), (3, 5), (6, 2), size, valid)
            for coords in (on_gpu(2, 3, 3), on_gpu(2, 2, 12, 20))
        ]
        values = [
            loss(PPM(gamma=gamma)(query), key, mask, no_match=no_match)
            for loss in (pixpro_loss, pixcontrast_loss)
            for gamma in (0.5, 2.0)
            for mask in masks
            for no_match in ("zero", "skip")
        ]
        values += [meter(query) for meter in (metrics.feature_std, metrics.effective_rank, metrics.propagation_entropy)]
        values += [metrics.positives_per_cell(masks[0]), metrics.unmatched_share(masks[0])]
        values += [*metrics.pair_similarity(query, key, masks[0])]
        values += [*NearestMatcher(2, mutual=True)(on_gpu(2, 3, 4), on_gpu(2, 3, 4) < 0.5)]
        values += [instance_consistency_loss(on_gpu(4, 5), on_gpu(4, 5))]
        assert {value.device.type for value in values} == {"cuda"}


def test_optimiser_and_target_run_on_another_device():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, dtype=torch.bfloat16)).to(META)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    LARS(param_groups(net, 0.1), lr=0.1).step()
    ema = EMA(net)
    ema.update(net)
    assert {p.device.type for p in ema.parameters()} == {"meta"}


# --- batches of views -----------------------------------------------------------------------------------------------


def views(count: int = 3) -> list[list]:
    """Samples of three views, two of them of one size, one with a mask, from sources of different sizes."""
    sizes = ((8, 8), (8, 8), (5, 6))
    return [
        [
            View(torch.rand(3, *sizes[0]), torch.eye(3), torch.tensor([30 + i, 40])),
            View(torch.rand(3, *sizes[1]), torch.rand(2, *sizes[1]), torch.tensor([30 + i, 40])),
            MaskedView(
                torch.rand(3, *sizes[2]),
                torch.eye(3),
                torch.tensor([30 + i, 40]),
                torch.zeros(sizes[2], dtype=torch.int64),
            ),
        ]
        for i in range(count)
    ]


def check_batch(collated: list, device: torch.device) -> None:
    assert [type(view) for view in collated] == [View, View, MaskedView]
    assert [tuple(view.image.shape) for view in collated] == [(3, 3, 8, 8), (3, 3, 8, 8), (3, 3, 5, 6)]
    assert all(tensor.device == device for view in collated for tensor in view)
    assert collated[1].coords.shape == (3, 2, 8, 8)
    assert collated[2].mask.shape == (3, 5, 6)


def test_lightnings_batch_transfer_keeps_views():
    from lightning_utilities.core.apply_func import apply_to_collection
    from pytorch_lightning import LightningModule

    collated = default_collate(views())
    check_batch(collated, torch.device("cpu"))
    assert collated[0].source_size.tolist() == [[30, 40], [31, 40], [32, 40]]
    moved = LightningModule().transfer_batch_to_device(collated, META, 0)
    check_batch(moved, META)
    half = apply_to_collection(collated, Tensor, lambda tensor: tensor + 0)
    check_batch(half, torch.device("cpu"))
    assert torch.equal(half[0].coords, collated[0].coords)


def test_views_survive_pinning_and_pickling():
    collated = default_collate(views())
    check_batch(pickle.loads(pickle.dumps(collated)), torch.device("cpu"))
    from torch.utils.data._utils.pin_memory import pin_memory

    if torch.cuda.is_available():
        check_batch(pin_memory(collated), torch.device("cpu"))


# --- DistributedDataParallel ----------------------------------------------------------------------------------------


@pytest.fixture
def process_group():
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{os.path.join(folder, 'store')}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ema_follows_a_distributed_student():
    student = encoder()
    wrapped = nn.parallel.DistributedDataParallel(student)
    ours, plain = EMA(wrapped, 0.5), EMA(student, 0.5)
    assert list(ours.module.state_dict()) == list(student.state_dict())
    optimizer = LARS(param_groups(wrapped, 0.1), lr=1.0)
    for _ in range(2):
        wrapped(torch.randn(2, 3, 64, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ours.update(wrapped)
        plain.update(student)
    for a, b, p in zip(ours.module.parameters(), plain.module.parameters(), student.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, p)
    ours.update(torch.compile(wrapped, backend="eager"), momentum=0.0)
    for a, p in zip(ours.module.parameters(), student.parameters(), strict=True):
        assert torch.equal(a, p)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("loss", [PixProLoss(no_match="skip"), PixContrastLoss(no_match="skip")])
def test_batch_without_matches_gives_every_parameter_a_gradient(loss):
    """DDP waits for them all."""
    wrapped = nn.parallel.DistributedDataParallel(encoder())
    z = wrapped(torch.randn(2, 3, 64, 64))
    n = z.shape[2] * z.shape[3]
    value = loss(z, z.detach(), torch.zeros(2, n, n, dtype=torch.bool))
    value.backward()
    assert value.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in wrapped.parameters())


@pytest.mark.usefixtures("process_group")
def test_instance_contrast_gathers():
    query, key = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    gathered = InstanceContrastLoss(gather_distributed=True)(query, key)
    torch.testing.assert_close(gathered, instance_contrast_loss(query, key))


# --- precision ------------------------------------------------------------------------------------------------------


def test_bfloat16_autocast_leaves_mask_and_loss_alone():
    z1, z2, (_, _, c1, c2, size) = torch.randn(2, 8, 14, 9), torch.randn(2, 8, 11, 13), batch()

    def step() -> tuple[Tensor, ...]:
        mask = DistanceMatcher()(c1, c2, z1.shape[-2:], z2.shape[-2:], size)
        sparse = DistanceMatcher(sparse=True)(c1, c2, z1.shape[-2:], z2.shape[-2:], size)
        losses = [loss(z1, z2, m) for loss in (pixpro_loss, pixcontrast_loss) for m in (mask, sparse)]
        return mask, sparse.to_dense(), *losses

    expected = step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = step()
        assert (z1.flatten(2).mT @ z1.flatten(2)).dtype == torch.bfloat16  # autocast is on
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert expected[0].any()


def test_whole_step_under_autocast_trains():
    method = Method(PixProLoss())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method(*batch())
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in method.online.parameters())


# --- the names and what they say to bad input -----------------------------------------------------------------------


def test_every_public_name_is_documented():
    for name in densessl.__all__:
        assert inspect.getdoc(getattr(densessl, name)), name


def f32(*shape: int) -> Tensor:
    return torch.rand(*shape)


def i64(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int64)


def on_meta(*shape: int) -> Tensor:
    return torch.rand(*shape, device=META)


def mask_of(*shape: int, device: str = "cpu") -> Tensor:
    return torch.ones(*shape, dtype=torch.bool, device=device)


MATCH, NEAREST = DistanceMatcher(), NearestMatcher()
EYE = torch.eye(3).expand(2, 3, 3)
LOSSES = {"pixpro": pixpro_loss, "pixcontrast": pixcontrast_loss}
WITHOUT_MASK = {
    "gram": gram_loss,
    "kernel alignment": kernel_alignment_loss,
    "neighbor order": lambda query, key: neighbor_order_loss(query, key, f32(2, 3, 4)),
    "prototype": prototype_loss,
}

BAD = {
    "threshold 0": (lambda: DistanceMatcher(0), r"threshold: .*positive.* got 0"),
    "threshold nan": (lambda: DistanceMatcher(float("nan")), r"threshold: .* got nan"),
    "unit": (lambda: DistanceMatcher(unit="mean"), r"unit: expected one of 'max', 'min', 'query', 'key', got 'mean'"),
    "coords shape": (lambda: MATCH(f32(2, 4), EYE, (3, 5)), r"coords_q: .*\(B, 3, 3\).* got \(2, 4\)"),
    "coords unbatched": (lambda: MATCH(EYE, torch.eye(3), (3, 5)), r"coords_k: .* got \(3, 3\)"),
    "coords integer": (lambda: MATCH(EYE, EYE.long(), (3, 5)), r"coords_k: expected a floating point .* torch\.int64"),
    "coords batch": (
        lambda: MATCH(EYE, EYE[:1], (3, 5)),
        r"coords_k: expected as many images as coords_q, B = 2, got 1",
    ),
    "coords device": (lambda: MATCH(EYE, on_meta(2, 3, 3), (3, 5)), r"coords_k: expected a tensor on cpu .* got meta"),
    "size zero": (lambda: MATCH(EYE, EYE, (0, 5)), r"size_q: .* got \(0, 5\)"),
    "size triple": (lambda: MATCH(EYE, EYE, (3, 5), (2, 3, 4)), r"size_k: .* got \(2, 3, 4\)"),
    "source_size shape": (lambda: MATCH(EYE, EYE, (3, 5), source_size=i64(2)), r"source_size: .*\(B, 2\).* got \(2,\)"),
    "source_size device": (
        lambda: MATCH(EYE, EYE, (3, 5), source_size=on_meta(2, 2)),
        r"source_size: expected a tensor on cpu as coords, got meta",
    ),
    "valid_q shape": (
        lambda: MATCH(EYE, EYE, (3, 5), valid_q=mask_of(2, 14)),
        r"valid_q: expected bool \(B, N\) = \(2, 15\) or \(B, h, w\) = \(2, 3, 5\), got torch\.bool \(2, 14\)",
    ),
    "valid_q transposed": (lambda: MATCH(EYE, EYE, (3, 5), valid_q=mask_of(2, 5, 3)), r"valid_q: .* got .*\(2, 5, 3\)"),
    "valid_q unbatched": (lambda: MATCH(EYE, EYE, (3, 5), valid_q=mask_of(3, 5)), r"valid_q: .* got .*\(3, 5\)"),
    "valid_q scalar": (
        lambda: MATCH(EYE, EYE, (3, 5), valid_q=torch.tensor(True)),
        r"valid_q: .* got torch\.bool \(\)",
    ),
    "valid_k dtype": (lambda: MATCH(EYE, EYE, (3, 5), valid_k=f32(2, 15)), r"valid_k: expected bool .* torch\.float32"),
    "valid_k device": (
        lambda: MATCH(EYE, EYE, (3, 5), valid_k=mask_of(2, 15, device="meta")),
        r"valid_k: expected a tensor on cpu as the coords, got meta",
    ),
    "keep 0": (lambda: NearestMatcher(0), r"keep: expected a whole number of at least 1, or None, got 0"),
    "keep above": (lambda: NearestMatcher(4)(f32(2, 3, 9)), r"keep: expected at most .*3, got 4"),
    "cost shape": (lambda: NEAREST(f32(3, 4)), r"cost: .*\(B, Nq, Nk\), got torch\.float32 \(3, 4\)"),
    "cost empty": (lambda: NEAREST(f32(2, 3, 0)), r"cost: .* got torch\.float32 \(2, 3, 0\)"),
    "cost integer": (lambda: NEAREST(i64(2, 3, 4)), r"cost: expected floating point .* got torch\.int64"),
    "valid shape": (
        lambda: NEAREST(f32(2, 3, 4), mask_of(2, 4, 3)),
        r"valid: .*\(2, 3, 4\), got torch\.bool \(2, 4, 3\)",
    ),
    "valid enlarges": (lambda: NEAREST(f32(1, 3, 4), mask_of(2, 3, 4)), r"valid: .*\(1, 3, 4\), got .* \(2, 3, 4\)"),
    "valid too deep": (lambda: NEAREST(f32(2, 3, 4), mask_of(1, 2, 3, 4)), r"valid: .* got .* \(1, 2, 3, 4\)"),
    "valid dtype": (lambda: NEAREST(f32(2, 3, 4), f32(2, 3, 4)), r"valid: expected bool, .* got torch\.float32"),
    "valid device": (
        lambda: NEAREST(f32(2, 3, 4), mask_of(2, 3, 4, device="meta")),
        r"valid: expected a tensor on cpu as cost, got meta",
    ),
    "gather tokens": (lambda: gather_tokens(f32(3, 4), i64(3, 2)), r"tokens: expected \(B, N, C\), got \(3, 4\)"),
    "gather index dtype": (lambda: gather_tokens(f32(2, 3, 4), f32(2, 3)), r"index: expected int64 .* torch\.float32"),
    "gather index batch": (
        lambda: gather_tokens(f32(2, 3, 4), i64(3, 3)),
        r"index: .* B = 2, got torch\.int64 \(3, 3\)",
    ),
    "gather device": (
        lambda: gather_tokens(f32(2, 3, 4), i64(2, 3).to(META)),
        r"index: expected a tensor on cpu as tokens, got meta",
    ),
    "gamma": (lambda: PPM(gamma=0), r"gamma: expected a positive exponent, got 0"),
    "ppm integer": (lambda: PPM()(i64(2, 3, 4, 5)), r"x: expected floating point .* got torch\.int64 \(2, 3, 4, 5\)"),
    "ppm shape": (lambda: PPM()(f32(2, 3)), r"x: .*\(B, C, h, w\) or \(B, N, C\), got torch\.float32 \(2, 3\)"),
    "convmlp channels": (lambda: ConvMLP(4, 8, 2)(f32(2, 3, 5, 5)), r"x: .*\(B, 4, h, w\), got .* \(2, 3, 5, 5\)"),
    "convmlp integer": (lambda: ConvMLP(4, 8, 2)(i64(2, 4, 5, 5)), r"x: expected a floating point .* torch\.int64"),
    "mlp shape": (lambda: MLP(4, 8, 2)(f32(2, 4, 1, 1)), r"x: .*\(B, 4\), got torch\.float32 \(2, 4, 1, 1\)"),
    "mlp integer": (lambda: MLP(4, 8, 2)(i64(2, 4)), r"x: expected floating point .* torch\.int64"),
    "map_to_tokens": (lambda: map_to_tokens(f32(2, 3, 4)), r"features: expected a map \(B, C, h, w\), got \(2, 3, 4\)"),
    "tokens_to_map": (lambda: tokens_to_map(f32(2, 15, 4), (5, 4)), r"tokens: .*5 \* 4, C\), got \(2, 15, 4\)"),
    "ema momentum": (lambda: EMA(nn.Identity(), 1.01), r"momentum: expected a number in 0\.\.1, got 1\.01"),
    "contrast temperature": (lambda: InstanceContrastLoss(0.0), r"temperature: expected a positive number, got 0\.0"),
    "contrast function": (
        lambda: instance_contrast_loss(f32(2, 3), f32(2, 3), temperature=-1.0),
        r"temperature: .*-1\.0",
    ),
    "contrast one image": (
        lambda: InstanceContrastLoss()(f32(1, 3), f32(1, 3)),
        r"query: expected at least 2 images.* got 1",
    ),
    "pixcontrast temperature": (lambda: PixContrastLoss(-1.0), r"temperature: expected a positive number, got -1\.0"),
    "pixcontrast function": (
        lambda: pixcontrast_loss(f32(2, 3, 4), f32(2, 3, 4), mask_of(2, 3, 3), temperature=0.0),
        r"temperature: .* got 0\.0",
    ),
    "reduction": (lambda: PixProLoss(reduction="sum"), r"reduction: expected 'mean' or 'none', got 'sum'"),
    "no_match": (lambda: PixContrastLoss(no_match="drop"), r"no_match: expected 'zero' or 'skip', got 'drop'"),
}
for _name, _loss in WITHOUT_MASK.items():
    BAD |= {
        f"{_name} {case}": (functools.partial(_loss, *arguments), message)
        for case, (arguments, message) in {
            "query shape": ((f32(2, 3), f32(2, 3, 4)), r"query: .*\(B, N, C\), got .* \(2, 3\)"),
            "key integer": ((f32(2, 3, 4), i64(2, 3, 4)), r"key: expected floating point .* torch\.int64"),
            "cells": ((f32(2, 3, 4), f32(2, 5, 4)), r"key: expected \(B, N.*\) = \(2, 3.* got \(2, 5"),
            "key device": ((f32(2, 3, 4), on_meta(2, 3, 4)), r"(key|query, key, references): expected .* meta"),
        }.items()
    }
for _name, _loss in LOSSES.items():
    BAD |= {
        f"{_name} {case}": (functools.partial(_loss, *arguments), message)
        for case, (arguments, message) in {
            "query shape": ((f32(2, 3), f32(2, 9, 4), mask_of(2, 3, 9)), r"query: .*\(B, N, C\), got .* \(2, 3\)"),
            "key integer": (
                (f32(2, 3, 4), i64(2, 9, 4), mask_of(2, 3, 9)),
                r"key: expected floating point .* torch\.int64",
            ),
            "batch": ((f32(2, 3, 4), f32(3, 9, 4), mask_of(2, 3, 9)), r"key: expected B = 2 .* got B = 3 and C = 4"),
            "channels": ((f32(2, 3, 4), f32(2, 9, 5), mask_of(2, 3, 9)), r"key: .* C = 4 .* got B = 2 and C = 5"),
            "mask transposed": (
                (f32(2, 3, 4), f32(2, 9, 4), mask_of(2, 9, 3)),
                r"mask: expected bool \(B, Nq, Nk\) = \(2, 3, 9\), got torch\.bool \(2, 9, 3\)",
            ),
            "mask dtype": ((f32(2, 3, 4), f32(2, 9, 4), f32(2, 3, 9)), r"mask: expected bool .* got torch\.float32"),
            "key device": (
                (f32(2, 3, 4), on_meta(2, 9, 4), mask_of(2, 3, 9)),
                r"query, key, mask: .* cpu, meta and cpu",
            ),
            "mask device": (
                (f32(2, 3, 4), f32(2, 9, 4), mask_of(2, 3, 9, device="meta")),
                r"query, key, mask: expected one device, got cpu, cpu and meta",
            ),
            "reduction": (
                (f32(2, 3, 4), f32(2, 9, 4), mask_of(2, 3, 9)),
                r"reduction: expected 'mean' or 'none', got 'sum'",
            ),
        }.items()
    }
    BAD[f"{_name} reduction"] = (
        functools.partial(BAD[f"{_name} reduction"][0], reduction="sum"),
        r"reduction: .*'sum'",
    )
for _name, _loss in {"consistency": InstanceConsistencyLoss(), "contrast": InstanceContrastLoss()}.items():
    BAD |= {
        f"{_name} map": (functools.partial(_loss, f32(2, 3, 1, 1), f32(2, 3)), r"query: .*\(B, C\).* \(2, 3, 1, 1\)"),
        f"{_name} integer": (
            functools.partial(_loss, f32(2, 3), i64(2, 3)),
            r"key: expected floating point .* torch\.int64",
        ),
        f"{_name} shapes": (functools.partial(_loss, f32(2, 3), f32(2, 4)), r"key: expected .*\(2, 3\), got \(2, 4\)"),
        f"{_name} device": (
            functools.partial(_loss, f32(2, 3), on_meta(2, 3)),
            r"key: expected a tensor on cpu .* meta",
        ),
    }


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("loss", [pixpro_loss, pixcontrast_loss])
def test_other_layouts_of_masks_are_refused(loss):
    with pytest.raises(ValueError, match=r"^mask: expected a strided or sparse COO mask, got torch\.sparse_csr"):
        loss(f32(2, 3, 4), f32(2, 9, 4), mask_of(2, 3, 9).to_sparse_csr())
