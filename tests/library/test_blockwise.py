"""The pixel propagation module in tiles against the loop over its equations and against all weights at once."""

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densessl import PPM
from densessl.propagation import _blockwise as tiles
from densessl.propagation import ppm as ppm_module

GAMMAS = pytest.mark.parametrize("gamma", [0.5, 1.0, 1.5, 2.0, 4.0])


@pytest.fixture(params=[(1, 1), (4, 16), (7, 10**6), (512, 1)], ids=str)
def split(monkeypatch, request):
    """Tiles of one weight, of some with a rest, of all images together, of a whole image."""
    monkeypatch.setitem(tiles._SIDE, "cpu", request.param[0])
    monkeypatch.setitem(tiles._HELD, "cpu", request.param[1])
    monkeypatch.setattr(ppm_module, "propagation_weights", None)


def features(size: tuple[int, int], batch: int = 2, dtype=torch.float64) -> Tensor:
    return (3 * torch.randn(batch, 4, *size, dtype=dtype)).requires_grad_()


def gradients(y: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum(), inputs)


@pytest.mark.usefixtures("split")
@GAMMAS
@pytest.mark.parametrize("normalize_values", [False, True])
def test_equals_the_loop(gamma, normalize_values):
    x = features((3, 5))
    g = nn.Conv2d(4, 6, 1, dtype=torch.float64)
    ppm = PPM(g, gamma=gamma, normalize_values=normalize_values, algorithm="blockwise")
    got = ppm(x)
    expected = reference.propagate(
        x,
        lambda cell: g.weight[:, :, 0, 0] @ cell + g.bias,
        gamma,
        normalize_values,
        offset=1e-6 if gamma < 1 else 0.0,
    )
    torch.testing.assert_close(got, expected)
    inputs = [x, *ppm.parameters()]
    for mine, wanted in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(mine, wanted)


@GAMMAS
@pytest.mark.parametrize("size", [(5, 9), (13, 7), (1, 1), (1, 30)])
def test_equals_all_weights_at_once(monkeypatch, gamma, size):
    """float32 against float64, with dead, equal and opposite cells."""
    monkeypatch.setitem(tiles._SIDE, "cpu", 11)
    x = features(size, 3, torch.float32)
    with torch.no_grad():
        x[0, :, 0, 0] = 0
        x[1, :, 0, -1] = -x[1, :, 0, 0]
        x[2, :, 0, -1] = x[2, :, 0, 0]
    wide = x.detach().double().requires_grad_()
    got, expected = PPM(gamma=gamma, algorithm="blockwise")(x), PPM(gamma=gamma, algorithm="dense")(wide)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    (a,), (b,) = gradients(got, [x]), gradients(expected, [wide])
    if gamma > 1:  # else the slope jumps at 0, and a rounded cosine may lie on its other side
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    assert a.isfinite().all()
    assert not a[0, :, 0, 0].any()


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("gamma", [1.5, 2.0, 3.0])
def test_gradcheck(gamma):
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(PPM(gamma=gamma, algorithm="blockwise"), (x,))


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_as_the_other_road(monkeypatch, gamma, dtype):
    """Products in half precision, sums over tiles in float32: nearer to the truth than one tile's rounding."""
    monkeypatch.setitem(tiles._SIDE, "cpu", 16)
    x = features((9, 8), dtype=torch.float32)
    true = PPM(gamma=gamma, algorithm="dense")(x)
    with torch.autocast("cpu", dtype=dtype):
        got, other = PPM(gamma=gamma, algorithm="blockwise")(x), PPM(gamma=gamma, algorithm="dense")(x)
    assert got.dtype == other.dtype == dtype
    step = torch.finfo(dtype).eps * true.abs().max()
    assert (got - true).abs().max() < max(2 * step, 1.5 * (other - true).abs().max())
    (a,), (b,) = gradients(got.float(), [x]), gradients(true, [x])
    assert a.dtype == torch.float32
    assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > (0.98 if gamma < 1 else 0.999)


def test_half_precision_features_are_widened():
    x = (300 * F.normalize(torch.randn(2, 4, 3, 5), dim=1)).half().requires_grad_()
    y = PPM(algorithm="blockwise")(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, PPM(algorithm="blockwise")(x.float()))
    y.sum().backward()
    assert x.grad.dtype == torch.float16
    assert x.grad.isfinite().all()


def test_road_goes_by_size_unless_it_is_named(monkeypatch):
    taken = []
    monkeypatch.setattr(ppm_module, "propagate", lambda *a: taken.append("tiles") or tiles.propagate(*a))
    for algorithm, cells in ((None, 196), (None, 1024), ("dense", 1024), ("blockwise", 4)):
        PPM(algorithm=algorithm)(torch.randn(1, cells, 2))
        taken.append((algorithm, cells))
    assert taken == [(None, 196), "tiles", (None, 1024), ("dense", 1024), "tiles", ("blockwise", 4)]
    assert "algorithm=None" in repr(PPM())


def test_weights_beyond_the_machine_are_refused():
    """Of three million cells: in tiles they would only take long."""
    x = torch.randn(1, 1, 1).expand(1, 3_000_000, 1)
    with pytest.raises(ValueError, match=r'^x: the table of all weights, .* GiB of cpu; set algorithm="blockwise"$'):
        PPM(algorithm="dense")(x)


@pytest.mark.usefixtures("split")
def test_compiles_without_a_break():
    ppm = PPM(nn.Conv2d(4, 4, 1, dtype=torch.float64), algorithm="blockwise")
    x = features((3, 5))
    got, expected = torch.compile(ppm, backend="aot_eager", fullgraph=True)(x), ppm(x)
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients(got, [x]), gradients(expected, [x]), strict=True):
        torch.testing.assert_close(a, b)


def test_operator_is_described_truly():
    """Shapes, strides and gradients as torch is told they are."""
    unit = F.normalize(torch.randn(2, 7, 3), dim=-1).requires_grad_()
    values = torch.randn(2, 7, 5, requires_grad=True)
    torch.library.opcheck(tiles.propagate, (unit, values, 1.5))


@pytest.fixture
def fake_gpu(monkeypatch):
    """Tensors that say they are on a GPU, where there is Triton."""
    monkeypatch.setattr(ppm_module, "_TRITON", True)
    with torch._subclasses.fake_tensor.FakeTensorMode():
        yield


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("algorithm", [None, "triton"])
def test_runs_on_tensors_that_say_they_are_on_a_gpu(algorithm):
    """The operator's description."""
    y = PPM(gamma=1.5, algorithm=algorithm)(torch.rand(2, 4, 33, 40, device="cuda"))
    assert y.device.type == "cuda"
    assert y.shape == (2, 4, 33, 40)


@pytest.mark.usefixtures("fake_gpu")
def test_kernels_take_no_float64():
    x = torch.rand(2, 4, 3, 5, device="cuda", dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r'^x: expected float32, bfloat16 or float16 for algorithm="triton", got .*64$'
    ):
        PPM(algorithm="triton")(x)


def test_an_algorithm_that_is_unknown_or_cannot_run_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"^algorithm: expected \"dense\", .* or None, got 'tiles'$"):
        PPM(algorithm="tiles")
    x = torch.rand(2, 4, 3, 5)
    for there, message in (
        (True, r"^x: expected a CUDA device .*, got cpu$"),
        (False, r"^algorithm: .* not installed$"),
    ):
        monkeypatch.setattr(ppm_module, "_TRITON", there)
        with pytest.raises(ValueError, match=message):
            PPM(algorithm="triton")(x)
