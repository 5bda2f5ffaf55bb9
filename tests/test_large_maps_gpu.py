"""The roads for large maps on a GPU, against float64 on the CPU and against the roads for small maps."""

import pytest
import torch
from torch import Tensor

from densessl import PPM, DistanceMatcher, coords_from_boxes, pixcontrast_loss, pixpro_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SIZE = (56, 50)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    boxes = torch.tensor([[0.0, 0.0, 0.7, 0.8], [0.2, 0.1, 1.0, 0.9]])
    c1, c2 = coords_from_boxes(boxes)[:, None].expand(2, 3, 3, 3)
    return torch.randn(3, 16, *SIZE), torch.randn(3, 16, *SIZE), c1.contiguous(), c2.contiguous()


def test_sparse_mask_is_the_dense_one():
    _, _, c1, c2 = (x.cuda() for x in inputs())
    sparse, dense = (DistanceMatcher(sparse=sparse)(c1, c2, SIZE) for sparse in (True, False))
    assert torch.equal(sparse.indices().T, dense.nonzero())
    assert dense.any()


@pytest.mark.parametrize("loss", [pixpro_loss, pixcontrast_loss])
@pytest.mark.parametrize("sparse", [False, True])
def test_losses_equal_float64_on_the_cpu(loss, sparse):
    query, key, c1, c2 = inputs()
    mask = DistanceMatcher()(c1, c2, SIZE)
    values, gradients = [], []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        q, k = (x.to(device, dtype, copy=True).requires_grad_() for x in (query, key))
        given = mask.to(device)
        value = loss(q, k, given.to_sparse_coo() if sparse else given)
        value.backward()
        values.append(value.double().cpu())
        gradients.append(torch.stack([q.grad, k.grad]).double().cpu())
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5 * gradients[0].abs().max().item())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("gamma", [1.5, 2.0])
def test_tiles_equal_all_weights_at_once(bf16, gamma):
    x = inputs()[0].cuda().requires_grad_()
    outputs, gradients = [], []
    for blockwise in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            y = PPM(gamma=gamma, blockwise=blockwise)(x)
        outputs.append(y.float())
        gradients.extend(torch.autograd.grad(y.float().square().sum(), x))
    tolerance = 3e-2 if bf16 else 1e-4
    for a, b in (outputs, gradients):
        assert (a - b).abs().max() < tolerance * a.abs().max()
