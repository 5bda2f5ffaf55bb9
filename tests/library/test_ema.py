"""The momentum encoder against torch's AveragedModel, and everything that happens to a module in a training run."""

import copy
import functools
import io
import math
import pickle

import pytest
import torch
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from densessl import EMA


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


def disturb(module: nn.Module) -> None:
    """As an optimiser's step would."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))


def parameters(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def assert_equal(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 1.0])
def test_equals_averaged_model_after_one_priming_call(momentum):
    online = network()
    ours = EMA(online, momentum)
    oracle = AveragedModel(online, multi_avg_fn=get_ema_multi_avg_fn(momentum))
    oracle.update_parameters(online)  # copies
    for step in range(5):
        disturb(online)
        ours.update(online)
        oracle.update_parameters(online)
        assert ours.step == step + 1
        assert_equal(ours.module, oracle.module)
    still = torch.equal(ours.module[0].weight, online[0].weight)
    assert still == (momentum == 0.0)


def test_equals_the_recursion():
    online = network()
    ours = EMA(online, lambda step: 0.9 - 0.2 * step)
    expected = [p.double() for p in parameters(online)]
    for step in range(4):
        disturb(online)
        ours.update(online)
        m = 0.9 - 0.2 * step
        expected = [m * target + (1 - m) * p.double() for target, p in zip(expected, parameters(online), strict=True)]
    for target, wanted in zip(parameters(ours.module), expected, strict=True):
        torch.testing.assert_close(target.double(), wanted, rtol=1e-5, atol=1e-6)


def test_published_schedule():
    """lightly's cosine schedule with max_steps = K + 1."""
    steps = 37
    schedule = functools.partial(cosine_schedule, max_steps=steps + 1, start_value=0.99, end_value=1.0)
    for k in range(steps + 1):
        published = 1 - (1 - 0.99) * (math.cos(math.pi * k / steps) + 1) / 2
        assert schedule(k) == pytest.approx(published, abs=1e-15)
    asked = []

    def recorded(step: int) -> float:
        asked.append(step)
        return schedule(step)

    online = network()
    ema = EMA(online, recorded)
    for _ in range(3):
        ema.update(online)
    assert asked == [0, 1, 2]


def test_momentum_can_be_given_for_one_step():
    online = network()
    ema = EMA(online, 1.0)
    disturb(online)
    ema.update(online)
    assert not torch.equal(ema.module[0].weight, online[0].weight)
    ema.update(online, momentum=0.0)
    assert_equal(ema.module, online)
    assert ema.step == 2
    with pytest.raises(ValueError, match=r"momentum: expected a number in 0\.\.1, got 1\.5"):
        ema.update(online, momentum=1.5)
    with pytest.raises(ValueError, match=r"momentum: expected a number in 0\.\.1, got '0.9'"):
        EMA(online, "0.9")
    with pytest.raises(ValueError, match=r"momentum: .* got -0\.1"):
        EMA(online, lambda step: -0.1).update(online)


def test_buffers_stay_its_own():
    online = network()
    ema = EMA(online, 0.5).train()
    for _ in range(3):
        online(torch.randn(4, 3, 8, 8) + 5)
        disturb(online)
        ema.update(online)
    fresh = nn.BatchNorm2d(4)
    norm = ema.module[1]
    assert torch.equal(norm.running_mean, fresh.running_mean)
    assert norm.num_batches_tracked == 0
    ema(torch.randn(4, 3, 8, 8))
    assert norm.num_batches_tracked == 1
    assert not torch.equal(norm.running_mean, fresh.running_mean)
    assert not torch.equal(norm.running_mean, online[1].running_mean)
    mean = norm.running_mean.clone()
    ema.eval()(torch.randn(4, 3, 8, 8))
    assert torch.equal(norm.running_mean, mean)


def test_no_gradient_flows():
    online = network()
    ema = EMA(online)
    assert not any(p.requires_grad for p in ema.parameters())
    assert all(p.requires_grad for p in online.parameters())
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    assert not ema(x).requires_grad
    ema.update(online)
    assert all(p.grad_fn is None and not p.requires_grad for p in ema.parameters())
    online(x).sum().backward()  # the update left the graph of the online network alone
    assert all(p.grad is not None for p in online.parameters())


def test_forward_passes_everything_on():
    class Two(nn.Module):
        def forward(self, a: Tensor, *, b: Tensor) -> tuple[Tensor, Tensor]:
            return a + 1, b + 2

    a, b = EMA(Two())(torch.zeros(1), b=torch.zeros(1))
    assert (a.item(), b.item()) == (1, 2)


def test_module_without_parameters():
    ema = EMA(nn.Identity())
    ema.update(nn.Identity())
    assert ema.step == 1


def test_update_between_the_forward_passes_equals_update_after_the_optimiser():
    """The published place, and the usual one: the keys of a step see the same target."""
    x, results = torch.randn(5, 4, 3, 8, 8), []
    start = network()
    for published in (True, False):
        online = copy.deepcopy(start)
        ema = EMA(online, 0.9)
        optimizer = torch.optim.SGD(online.parameters(), lr=0.1)
        keys = []
        if not published:
            ema.update(online)
        for batch in x:
            query = online(batch)
            if published:
                ema.update(online)
            key = ema(batch)
            keys.append(key)
            optimizer.zero_grad()
            (query - 2 * key - 1).square().mean().backward()
            optimizer.step()
            if not published:
                ema.update(online)
        results.append(torch.stack(keys))
    assert torch.equal(*results)


# --- what happens to a module ---------------------------------------------------------------------------------------


def test_state_dict_continues_the_schedule():
    def schedule(step: int) -> float:
        return 0.5 + 0.1 * step

    online = network()
    whole = EMA(online, schedule)
    halves = EMA(online, schedule)
    states = []
    for _ in range(4):
        disturb(online)
        states.append(copy.deepcopy(online))
    for student in states:
        whole.update(student)
    for student in states[:2]:
        halves.update(student)
    file = io.BytesIO()
    torch.save(halves.state_dict(), file)
    file.seek(0)
    resumed = EMA(network(), schedule)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.step == 2
    for student in states[2:]:
        resumed.update(student)
    assert resumed.step == 4
    assert_equal(resumed.module, whole.module)


def test_state_is_the_modules_own_names_below_module():
    state = EMA(network()).state_dict()
    assert set(state) == {f"module.{name}" for name in network().state_dict()} | {"_extra_state"}


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_independent_and_continue(how):
    online = network()
    ema = EMA(online, functools.partial(cosine_schedule, max_steps=10, start_value=0.5, end_value=1.0))
    disturb(online)
    ema.update(online)
    twin = copy.deepcopy(ema) if how == "deepcopy" else pickle.loads(pickle.dumps(ema))
    assert twin.step == 1
    assert_equal(twin.module, ema.module)
    before = parameters(ema.module)
    disturb(online)
    twin.update(online)
    assert all(torch.equal(a, b) for a, b in zip(before, ema.module.parameters(), strict=True))
    ema.update(online)
    assert_equal(twin.module, ema.module)
    assert not any(p.requires_grad for p in twin.parameters())


def test_copy_at_construction_is_independent():
    online = network()
    ema = EMA(online)
    before = parameters(ema.module)
    disturb(online)
    assert all(torch.equal(a, b) for a, b in zip(before, ema.module.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_dtype(dtype):
    online = network()
    ema = EMA(online, 0.5)
    online.to(dtype)
    ema.to(dtype)
    disturb(online)
    ema.update(online)
    assert ema(torch.randn(2, 3, 8, 8, dtype=dtype)).dtype == dtype
    assert all(p.dtype == dtype and p.isfinite().all() for p in ema.parameters())


def test_a_wider_target_averages_a_half_precision_student():
    """bfloat16 has 8 bits: with m = 0.99 a target in it would stand still."""
    online = network().bfloat16()
    ema = EMA(online, 0.99).float()
    first = parameters(ema.module)
    disturb(online)
    for _ in range(3):
        ema.update(online)
    for target, start, p in zip(ema.module.parameters(), first, online.parameters(), strict=True):
        torch.testing.assert_close(target, p.float() + 0.99**3 * (start - p.float()))


def test_compiled_student_and_target():
    online = network()
    plain = copy.deepcopy(online)
    compiled = torch.compile(online, backend="eager", fullgraph=True)
    ema, expected = EMA(compiled, 0.5), EMA(plain, 0.5)
    assert isinstance(ema.module, nn.Sequential)
    disturb(online)
    plain.load_state_dict(online.state_dict())
    ema.update(compiled)
    expected.update(plain)
    assert_equal(ema.module, expected.module)
    x = torch.randn(2, 3, 8, 8)
    fast = torch.compile(ema, backend="eager", fullgraph=True)
    torch.testing.assert_close(fast(x), expected(x))
    disturb(online)
    plain.load_state_dict(online.state_dict())
    ema.update(compiled)  # the compiled forward reads the updated weights
    expected.update(plain)
    torch.testing.assert_close(fast(x), expected(x))
    assert not fast(x).requires_grad


def test_student_that_does_not_fit():
    ema = EMA(nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"online: expected 2 parameters as at construction, got 4"):
        ema.update(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"online: expected shape \(4, 3\) for parameter 0, got \(3, 4\)"):
        ema.update(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"online: expected parameter 0 on cpu as the target, got meta"):
        ema.update(nn.Linear(3, 4, device="meta"))
    for target in (ema, ema.module, torch.compile(ema.module)):
        with pytest.raises(ValueError, match=r"online: expected the module that is trained, got this average itself"):
            ema.update(target)
    for wrong in (ema.parameters(), ema.state_dict(), "encoder"):
        with pytest.raises(ValueError, match=f"online: expected a module, .*got {type(wrong).__name__}"):
            ema.update(wrong)
        with pytest.raises(ValueError, match=f"online: expected a module, .*got {type(wrong).__name__}"):
            EMA(wrong)
    assert ema.step == 0


# --- half precision and integers ------------------------------------------------------------------------------------


def half_precision_run(dtype: torch.dtype) -> tuple[nn.Module, list[nn.Module]]:
    start = nn.Linear(16, 12).to(dtype)
    student, students = copy.deepcopy(start), []
    for _ in range(300):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn(p.shape).to(dtype) * 0.01)
        students.append(copy.deepcopy(student))
    return start, students


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model_equals_the_recursion(dtype):
    start, students = half_precision_run(dtype)
    ema = EMA(start, 0.99)
    expected = [p.double() for p in parameters(start)]
    for student in students:
        ema.update(student)
        expected = [0.99 * e + 0.01 * p.double() for e, p in zip(expected, parameters(student), strict=True)]
    for p, wanted in zip(ema.module.parameters(), expected, strict=True):
        assert p.dtype == dtype
        torch.testing.assert_close(p.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_quarter_precision_model_goes_its_whole_way(dtype):
    start, end = (nn.ParameterList([nn.Parameter(torch.full((3,), x).to(dtype), False)]) for x in (0.0, 1.0))
    ema = EMA(start, 0.99)
    for _ in range(500):
        ema.update(end)
    assert ema.module[0].dtype == dtype
    torch.testing.assert_close(ema.module[0].float(), torch.ones(3))  # 0.9934, rounded


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state"])
def test_half_precision_averages_are_saved(how):
    start, students = half_precision_run(torch.bfloat16)
    whole, halves = EMA(start, 0.99), EMA(start, 0.99)
    for student in students[:100]:
        whole.update(student)
        halves.update(student)
    if how == "deepcopy":
        resumed = copy.deepcopy(halves)
    elif how == "pickle":
        resumed = pickle.loads(pickle.dumps(halves))
    else:
        file = io.BytesIO()
        torch.save(halves.state_dict(), file)
        file.seek(0)
        resumed = EMA(nn.Linear(16, 12).bfloat16(), 0.99)
        resumed.load_state_dict(torch.load(file, weights_only=True))
    for student in students[100:]:
        whole.update(student)
        resumed.to("cpu", torch.bfloat16).update(student)
    assert_equal(resumed.module, whole.module)
    for index, average in whole.get_extra_state()["averages"].items():
        assert torch.equal(average, resumed.get_extra_state()["averages"][index])
    for student in students:
        halves.update(student)
    assert not torch.equal(halves.module.weight, resumed.module.weight)


def test_half_precision_state_without_averages_continues_from_the_rounded_values():
    start, students = half_precision_run(torch.bfloat16)
    ema = EMA(start, 0.99)
    for student in students:
        ema.update(student)
    state = ema.state_dict()
    state["_extra_state"] = {"step": 7}
    state = copy.deepcopy(state)
    fresh = nn.Linear(16, 12).bfloat16()
    for resumed in (EMA(fresh, 0.5), ema):  # the second has averages of its own
        resumed.load_state_dict(state)
        assert resumed.step == 7
        resumed.update(fresh, 0.5)
        wanted = (0.5 * state["module.weight"].float() + 0.5 * fresh.weight.float()).bfloat16()
        assert torch.equal(resumed.module.weight, wanted)


def test_weights_loaded_into_a_half_precision_target_count():
    start, students = half_precision_run(torch.bfloat16)
    ema = EMA(start, 0.99)
    ema.update(students[0])
    other = nn.Linear(16, 12).bfloat16()
    ema.module.load_state_dict(other.state_dict())
    ema.update(students[1], 1.0)
    assert_equal(ema.module, other)


def test_integer_parameters_are_copied():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self.table = nn.Parameter(torch.arange(3), requires_grad=False)
            self.flags = nn.Parameter(torch.tensor([True, False]), requires_grad=False)

    ema, student = EMA(Model(), 0.75), Model()
    with torch.no_grad():
        student.weight.add_(4.0)
        student.table.mul_(5)
        student.flags.logical_not_()
    ema.update(student)
    assert ema.module.weight.tolist() == [1.0, 1.0]
    assert ema.module.table.tolist() == [0, 5, 10]
    assert ema.module.flags.tolist() == [False, True]
