"""LARS against a loop over the published rule."""

import copy
import math

import pytest
import torch
from reference import LoopLARS
from torch import Tensor, nn
from torch.nn import functional as F

from densessl import LARS, optim, param_groups


def network() -> nn.Sequential:
    """Weights of four, two, one and no dimensions; one weight matrix starts at zero."""
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3), nn.Linear(3, 2))
    nn.init.zeros_(net[4].weight)
    net.register_parameter("scale", nn.Parameter(torch.tensor(1.5)))
    return net


def backward(net: nn.Sequential, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 2, 4, 4, generator=generator).to(net.scale.dtype)
    net.zero_grad()
    (net.scale * net(x) - 1).square().sum().backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("held", [1, 100, 1 << 19])  # of a portion on the CPU; one tensor may be more
def test_equals_the_loop(momentum, weight_decay, dtype, held, monkeypatch):
    monkeypatch.setattr(optim, "_HELD_ON_CPU", held)
    ours = network().to(dtype)
    theirs = copy.deepcopy(ours).double()
    optimizer = LARS(param_groups(ours, weight_decay), lr=2.0, momentum=momentum, trust_coefficient=0.02)
    oracle = LoopLARS(
        list(theirs.parameters()), 2.0, momentum, lambda p: weight_decay if p.ndim > 1 else 0.0, trust=0.02
    )
    start = copy.deepcopy(ours)
    for step in range(6):
        # The same gradients for both: what is compared is the rule.
        backward(ours, step)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = p.grad.double()
        optimizer.step()
        oracle.step()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            tolerance = {"rtol": 2e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-9}
            torch.testing.assert_close(p.double(), q, msg=f"{name} in step {step}", **tolerance)
    for (name, p), q in zip(ours.named_parameters(), start.parameters(), strict=True):
        assert not torch.equal(p, q), name  # the zero-initialised one too


def test_first_step_by_hand():
    """|p| = 5, |g| = 10: the step is lr * trust * 5 / 10 * g; a bias takes lr * g."""
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([3.0, 4.0]))
    weight.grad, bias.grad = torch.tensor([[6.0, 8.0]]), torch.tensor([6.0, 8.0])
    LARS([weight, bias], lr=2.0, trust_coefficient=0.01).step()
    torch.testing.assert_close(weight.data, torch.tensor([[3 - 2 * 0.01 * 0.5 * 6, 4 - 2 * 0.01 * 0.5 * 8]]))
    torch.testing.assert_close(bias.data, torch.tensor([3 - 2 * 6.0, 4 - 2 * 8.0]))


def test_step_does_not_depend_on_the_gradients_size():
    """What LARS is for, and what weight decay inside the ratio must not break: wd counts in |d|."""
    steps = []
    for size in (1.0, 1e4):
        p = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        p.grad = size * torch.tensor([[0.6, 0.8]])
        LARS([p], lr=1.0).step()
        steps.append(p.detach() - torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(*steps)
    p = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    p.grad = torch.zeros(1, 2)
    LARS([p], lr=1.0, weight_decay=0.5, trust_coefficient=0.1).step()  # d = wd * p, so the step is 0.1 * p
    torch.testing.assert_close(p.data, 0.9 * torch.tensor([[3.0, 4.0]]))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_zero_weights_and_zero_gradients(weight_decay):
    zero, still = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2, 3))
    zero.grad, still.grad = torch.ones(2, 3), torch.zeros(2, 3)
    LARS([zero, still], lr=0.5, weight_decay=weight_decay).step()
    torch.testing.assert_close(zero.data, torch.full((2, 3), -0.5))
    assert torch.equal(still, torch.zeros(2, 3))


def test_no_gradient_and_no_guard():
    """With eps = 0 the ratio itself would be 0 / 0."""
    still = nn.Parameter(torch.ones(2, 3))
    still.grad = torch.zeros(2, 3)
    LARS([still], lr=0.5, eps=0.0).step()
    assert torch.equal(still, torch.ones(2, 3))


def test_without_ratio_it_is_torchs_sgd():
    """Tensors of one dimension: no adaptation, and momentum as torch has it."""
    ours = nn.Parameter(torch.randn(7))
    theirs = nn.Parameter(ours.detach().clone())
    optimizers = LARS([ours], lr=0.3, momentum=0.8), torch.optim.SGD([theirs], lr=0.3, momentum=0.8)
    for _ in range(4):
        ours.grad = theirs.grad = torch.randn(7)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(ours, theirs)


def test_parameters_without_gradient_stay():
    used, unused = nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.randn(2, 2))
    before = unused.detach().clone()
    optimizer = LARS([used, unused], lr=1.0, weight_decay=0.1)
    for _ in range(2):
        used.grad = torch.randn(2, 2)
        optimizer.step()
    assert torch.equal(unused, before)
    assert unused not in optimizer.state
    unused.grad = torch.randn(2, 2)  # joins later
    optimizer.step()
    assert not torch.equal(unused, before)
    LARS([nn.Parameter(torch.ones(2, 2))], lr=1.0).step()  # no gradient anywhere


def test_state_dict_continues():
    whole = network()
    optimizer = LARS(param_groups(whole, 0.1), lr=0.5)
    for step in range(3):
        backward(whole, step)
        optimizer.step()
    resumed = copy.deepcopy(whole)
    other = LARS(param_groups(resumed, 0.0), lr=9.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 5):
        for net, opt in ((whole, optimizer), (resumed, other)):
            backward(net, step)
            opt.step()
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert other.param_groups[0]["lr"] == 0.5
    assert other.param_groups[0]["weight_decay"] == 0.1


def test_lr_scheduler_and_one_lr_per_group():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = LARS([{"params": [a]}, {"params": [b], "lr": 10.0}], lr=1.0, momentum=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        a.grad, b.grad = torch.ones(1), torch.ones(1)
        optimizer.step()
        scheduler.step()
        total = sum(0.5**k for k in range(step + 1))
        assert a.item() == pytest.approx(-total)
        assert b.item() == pytest.approx(-10 * total)


def test_closure_runs_with_gradients_and_its_loss_comes_back():
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([p], lr=1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 4.0
    assert p[0, 0] < 1
    assert optimizer.step() is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters(dtype):
    """Gradients of 3e4: their norm is infinite in float16."""
    p = nn.Parameter(torch.full((16, 16), 2.0, dtype=dtype))
    wide = nn.Parameter(p.detach().float())
    optimizers = LARS([p], lr=1.0, trust_coefficient=0.1), LARS([wide], lr=1.0, trust_coefficient=0.1)
    for _ in range(3):
        p.grad = torch.full((16, 16), 3e4, dtype=dtype)
        wide.grad = p.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    assert p.dtype == dtype
    torch.testing.assert_close(p.float(), wide, rtol=2e-2, atol=0)
    assert wide[0, 0] < 1.5


def test_mixed_precision_in_one_group():
    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2).double())
    p.grad, q.grad = torch.ones(2, 2), torch.ones(2, 2).double()
    LARS([p, q], lr=1.0, trust_coefficient=0.1).step()
    torch.testing.assert_close(p.double(), q, rtol=1e-6, atol=0)
    assert q[0, 0].item() == pytest.approx(0.9, abs=1e-8)


@pytest.mark.parametrize("given", [nn.Linear(4, 2).parameters(), list(nn.Linear(4, 2).parameters()), None])
def test_param_groups_of_what_is_no_module(given):
    with pytest.raises(ValueError, match=rf"module: expected a module, .*got {type(given).__name__}"):
        param_groups(given, 1e-5)


def test_param_groups():
    net = network()
    net[3].weight.requires_grad_(False)
    decayed, plain = param_groups(net, 1e-5)
    assert [id(p) for p in decayed["params"]] == [id(net[0].weight), id(net[4].weight)]
    assert decayed["weight_decay"] == 1e-5
    rest = [net.scale, net[0].bias, net[1].weight, net[1].bias, net[3].bias, net[4].bias]
    assert [id(p) for p in plain["params"]] == [id(p) for p in rest]
    assert plain["weight_decay"] == 0.0
    assert len(param_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1
    assert param_groups(nn.Identity(), 0.1) == []
    torch.optim.AdamW(param_groups(nn.Linear(2, 2), 0.1))


def test_learns():
    net, x = nn.Linear(8, 1, bias=False), torch.randn(64, 8)
    y = x @ torch.randn(8, 1)
    optimizer = LARS(param_groups(net, 0.0), lr=5.0, trust_coefficient=0.01)
    first = F.mse_loss(net(x), y).item()
    for _ in range(100):
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
    assert F.mse_loss(net(x), y).item() < 0.2 * first


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "trust_coefficient", "eps"])
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_negative_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a number of at least 0, got {value}"):
        LARS([nn.Parameter(torch.ones(1))], **{"lr": 1.0, name: value})


def test_sparse_gradients_are_refused_and_nothing_moves():
    dense, table = nn.Linear(3, 2), nn.Embedding(5, 3, sparse=True)
    before = dense.weight.detach().clone()
    optimizer = LARS([*dense.parameters(), *table.parameters()], lr=1.0)
    dense(table(torch.tensor([1]))).sum().backward()
    with pytest.raises(ValueError, match=r"params: expected dense gradients, got torch.sparse_coo for parameter 2"):
        optimizer.step()
    assert torch.equal(dense.weight, before)
