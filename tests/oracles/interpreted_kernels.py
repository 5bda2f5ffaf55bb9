"""The Triton kernels in Triton's interpreter, on a CPU, against float64. test_kernels.py runs this in a process of its
own: TRITON_INTERPRET must be set before triton is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from densessl import PPM
from densessl.propagation import _blockwise as tiles
from densessl.propagation import _triton as kernels
from densessl.propagation import ppm as ppm_module

# Cells, channels of unit, channels of values: one cell, less than a block, whole blocks, rests everywhere.
SIZES = [(1, 3, 2), (11, 7, 40), (32, 16, 32), (19, 20, 33)]


@triton.jit
def loop(count):
    for _ in range(count):
        pass


try:
    loop[(1,)](2)
except triton.runtime.errors.InterpreterError:  # before Triton 3.9
    pytest.skip("this version of Triton's interpreter cannot loop with this version of NumPy", allow_module_level=True)


@pytest.fixture(autouse=True, params=["whole", "in parts"])
def small(monkeypatch, request):
    """Small blocks, rows held whole or read in parts, several programs a result; memory that nobody wrote is NaN."""
    torch.manual_seed(0)
    channels = 64 if request.param == "whole" else 16
    blocks = kernels.Blocks(16, 16, channels, 4, 1), kernels.Blocks(32, 16, channels, 4, 1)
    monkeypatch.setattr(kernels, "blocks_of", lambda *_: blocks)
    monkeypatch.setattr(kernels, "_MOST_OUT", max(32, channels))
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))


def inputs(count: int, width: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Laid out channels first, as maps are; cosines of both signs, the first two cells alike."""
    unit = F.normalize(torch.randn(2, width, count) + 0.3, dim=1)
    unit[:, :, 1:2] = unit[:, :, :1]
    values, grad = torch.randn(2, 2, depth, count)
    return tuple(x.to(dtype).mT for x in (unit, values, grad))


def expected(unit: Tensor, values: Tensor, grad: Tensor, gamma: float) -> tuple[Tensor, ...]:
    """The equation's sum and its gradients, all pairs at once."""
    unit, values = (x.double().requires_grad_() for x in (unit, values))
    cosine = (unit @ unit.mT).clamp(min=0)
    out = (cosine + (1e-6 if gamma < 1 else 0)) ** gamma @ values
    return out.detach(), *torch.autograd.grad(out, (unit, values), grad.double())


def computed(unit: Tensor, values: Tensor, grad: Tensor, gamma: float) -> tuple[Tensor, ...]:
    """Through torch's operator and its gradient."""
    unit, values = (x.detach().requires_grad_() for x in (unit, values))
    out = tiles.propagate(unit, values, gamma, True)
    return out.detach(), *torch.autograd.grad(out, (unit, values), grad)


def test_a_dead_cell_has_the_slope_from_above():
    """As in the tiles."""
    unit, values, grad = inputs(3, 4, 2, torch.float32)
    unit[:, 1] = 0
    for gamma in (0.5, 1.0):
        wanted = tiles._backward(grad, unit, values, gamma, False)
        assert wanted[0][:, 1].all()
        for got, other in zip(tiles._backward(grad, unit, values, gamma, True), wanted, strict=True):
            torch.testing.assert_close(got, other)


@pytest.mark.parametrize(
    ("size", "gamma"), [*((size, 2.0) for size in SIZES), *((SIZES[-1], g) for g in (0.5, 1, 3.3))]
)
def test_equals_the_equation(size, gamma):
    given = inputs(*size, torch.float32)
    for got, wanted in zip(computed(*given, gamma), expected(*given, gamma), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def test_half_precision_is_within_its_rounding():
    """Weights and results are rounded, sums are not. float16 alone: the interpreter cannot multiply bfloat16."""
    given = inputs(19, 20, 33, torch.float16)
    bounds = expected(*(x.abs() for x in given), 1.5)  # of the terms, without cancelling
    for got, wanted, bound in zip(computed(*given, 1.5), expected(*given, 1.5), bounds, strict=True):
        assert got.dtype == torch.float16
        assert ((got.double() - wanted).abs() <= torch.finfo(torch.float16).eps * bound).all()
        assert not torch.equal(got.double(), wanted)


def test_operator_is_described_truly():
    """Shapes, strides and gradients as torch is told they are."""
    unit, values, _ = inputs(3, 4, 2, torch.float32)
    torch.library.opcheck(tiles.propagate, (unit.requires_grad_(), values.requires_grad_(), 1.5, True))


def test_nothing_to_do():
    for shape in ((0, 5, 3), (2, 0, 3)):
        assert tiles.propagate(torch.ones(shape), torch.ones(shape), 2.0, True).shape == shape


def test_module_takes_the_kernels(monkeypatch):
    monkeypatch.setattr(ppm_module, "_check_kernels", lambda *_: None)
    x = torch.randn(1, 5, 3, 7, requires_grad=True)
    results = []
    for algorithm in ("triton", "dense"):
        y = PPM(gamma=1.5, algorithm=algorithm)(x)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_number_that_is_none_stays_seen():
    unit, values, _ = inputs(11, 7, 4, torch.float32)
    unit[0, 3, 5] = torch.nan
    out = tiles.propagate(unit, values, 2.0, True)
    assert out[0].isnan().all()
    assert not out[1].isnan().any()
