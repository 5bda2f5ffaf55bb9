"""The roads for large maps on a GPU, against float64 on the CPU and against the roads for small maps."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from densessl import PPM, DistanceMatcher, coords_from_boxes, pixcontrast_loss, pixpro_loss
from densessl.propagation import _blockwise as tiles

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


@pytest.fixture(params=["as it is", "compiled"])
def compiled(request):
    torch._dynamo.reset()
    return request.param == "compiled"


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("gamma", [1.5, 2.0])
@pytest.mark.parametrize("algorithm", ["blockwise", "triton"])
def test_roads_equal_all_weights_at_once(algorithm, bf16, gamma, compiled):
    x = inputs()[0].cuda().requires_grad_()
    outputs, gradients = [], []
    for road in ("dense", algorithm):
        ppm = PPM(gamma=gamma, algorithm=road)
        if compiled and road == algorithm:
            ppm = torch.compile(ppm, fullgraph=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            y = ppm(x)
        outputs.append(y.float())
        gradients.extend(torch.autograd.grad(y.float().square().sum(), x))
    tolerance = 3e-2 if bf16 else 1e-4
    for a, b in (outputs, gradients):
        assert (a - b).abs().max() < tolerance * a.abs().max()


@pytest.mark.parametrize(("dtype", "tf32"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize(
    ("size", "gamma"),
    [((1, 3, 2), 2.0), ((300, 20, 33), 2.0), ((300, 20, 33), 1.5), ((131, 256, 256), 2.0), ((70, 300, 520), 2.0)],
)
def test_kernels_equal_float64(monkeypatch, size, dtype, tf32, gamma):
    """As the machine runs them, where the interpreter's tests have small blocks and no bfloat16."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    count, width, depth = size
    unit = F.normalize(torch.randn(2, width, count) + 0.3, dim=1).to("cuda", dtype).mT.requires_grad_()
    values, grad = torch.randn(2, 2, depth, count).to("cuda", dtype).mT
    values.requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (unit, values)]
    results = []
    for given, out in (
        ((unit, values), tiles.propagate(unit, values, gamma, True)),
        (exact, tiles.power(exact[0] @ exact[0].mT, gamma) @ exact[1]),
    ):
        results.append((out, *torch.autograd.grad(out, given, grad.to(out.dtype))))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 5e-3 if tf32 else 1e-4
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == dtype
        assert (got - wanted).abs().max() < tolerance * wanted.abs().max()


def test_kernels_give_the_same_bits_again():
    x = inputs()[0].cuda().requires_grad_()
    once, twice = (torch.autograd.grad(PPM(algorithm="triton")(x).square().sum(), x)[0] for _ in range(2))
    assert torch.equal(once, twice)
