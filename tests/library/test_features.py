"""Unit tokens: their own gradient formula against autograd's, to the second derivative."""

import pytest
import torch
from torch import Tensor

from densessl import pixpro_loss
from densessl._normalize import normalized


def by_autograd(x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 1e-12, length, torch.inf)


@pytest.mark.parametrize("strided", [False, True])
def test_value_and_gradient_are_those_of_autograd(strided):
    x = 3 * torch.randn(2, 7, 5, dtype=torch.float64)
    x = (x.mT.contiguous().mT if strided else x).requires_grad_()
    with torch.no_grad():
        x[0, 3] = 0
    weight = torch.randn_like(x)
    got, expected = normalized(x), by_autograd(x)
    assert torch.equal(got, expected)
    (a,), (b,) = (torch.autograd.grad((y * weight).sum(), x) for y in (got, expected))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert not a[0, 3].any()


def test_derivatives_of_both_orders():
    x = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(normalized, (x,))
    assert torch.autograd.gradgradcheck(normalized, (x,))
    key, mask = torch.randn(2, 3, 4, dtype=torch.float64), torch.rand(2, 3, 3) < 0.5
    assert torch.autograd.gradgradcheck(lambda q: pixpro_loss(q, key, mask), (x,))


def test_under_functional_transforms():
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    together = torch.func.vmap(torch.func.grad(lambda row: normalized(row).square()[:, 0].sum()))(x)
    alone = [torch.func.grad(lambda row: normalized(row).square()[:, 0].sum())(row) for row in x]
    torch.testing.assert_close(together, torch.stack(alone))
