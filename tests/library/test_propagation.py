"""The pixel propagation module against a loop over Eqs. 3 and 4, and the heads."""

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F

from densessl import MLP, PPM, ConvMLP, map_to_tokens, tokens_to_map
from densessl.propagation import ppm as ppm_module

SIZE = (3, 5)


def features(channels: int = 4) -> torch.Tensor:
    return (3 * torch.randn(2, channels, *SIZE, dtype=torch.float64)).requires_grad_()


@pytest.mark.parametrize("normalize_values", [False, True])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("layers", [0, 1])
def test_equals_the_loop(layers, gamma, normalize_values):
    x = features()
    g = nn.Conv2d(4, 6, 1, dtype=torch.float64) if layers else None
    ppm = PPM(g, gamma=gamma, normalize_values=normalize_values)
    y = ppm(x)
    expected = reference.propagate(
        x,
        (lambda cell: g.weight[:, :, 0, 0] @ cell + g.bias) if layers else (lambda cell: cell),
        gamma,
        normalize_values,
        offset=1e-6 if gamma < 1 else 0.0,  # the published guard
    )
    assert y.shape == (2, 6 if layers else 4, *SIZE)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    inputs = [x, *ppm.parameters()]
    for got, wanted in zip(
        torch.autograd.grad((y * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("many", [1, 1024])
@pytest.mark.parametrize("layers", [0, 1])
def test_cells_that_are_not_valid_spread_nothing(layers, many, monkeypatch):
    """The loop over the valid cells alone; an image without any gets zeros. Both roads, all forms."""
    monkeypatch.setattr(ppm_module, "_MANY_CELLS", many)
    x = features()
    valid = torch.rand(2, 15) < 0.5
    valid[0, :2], valid[1] = torch.tensor([True, False]), False
    g = nn.Conv2d(4, 6, 1, dtype=torch.float64) if layers else None
    ppm = PPM(g)
    expected = reference.propagate(
        x,
        (lambda cell: g.weight[:, :, 0, 0] @ cell + g.bias) if layers else (lambda cell: cell),
        2.0,
        True,
        valid=valid,
    )
    weight = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), x)
    for y in (ppm(x, valid), ppm(x, valid.view(2, *SIZE)), tokens_to_map(ppm(map_to_tokens(x), valid), SIZE)):
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad((y * weight).sum(), x)[0], wanted)
    assert not expected[1].any()
    torch.testing.assert_close(ppm(x, torch.ones(2, 15, dtype=torch.bool)), ppm(x))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("algorithm", ["dense", "blockwise"])
def test_values_that_are_not_finite_in_cells_that_are_not_valid_go_nowhere(algorithm, value):
    clean = features().detach()
    valid = torch.ones(2, 15, dtype=torch.bool)
    valid[0, 4] = valid[1, 9] = False
    dirty = clean.masked_fill(~valid.view(2, 1, *SIZE), value).requires_grad_()
    clean.masked_fill_(~valid.view(2, 1, *SIZE), 0).requires_grad_()
    ppm = PPM(nn.Conv2d(4, 6, 1, dtype=torch.float64), algorithm=algorithm)
    for form in (lambda x: x, map_to_tokens):
        results = []
        for x in (clean, dirty):
            y = ppm(form(x), valid)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, ppm.transform.weight))))
        for expected, got in zip(*results, strict=True):
            assert got.isfinite().all()
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("transform", "got"), [(256, "256"), (nn.Conv2d, "a class"), ("conv", "'conv'")])
def test_a_transform_that_is_no_module_is_named(transform, got):
    with pytest.raises(ValueError, match=rf"transform: expected a module, .* or None, got {got}"):
        PPM(transform)


@pytest.mark.parametrize("algorithm", ["dense", "blockwise"])
@pytest.mark.parametrize("transform", [nn.Conv2d(4, 4, 3), nn.Flatten(2), nn.AvgPool2d(2)])
def test_a_transform_that_loses_cells_is_named(transform, algorithm):
    with pytest.raises(ValueError, match=r"transform: expected that it keeps the map's 15 cells, got a map \(2, 4, "):
        PPM(transform.double(), algorithm=algorithm)(features())


def test_a_transform_that_gives_no_map_is_named():
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(ValueError, match=r"transform: expected that it gives a map, got tuple"):
        PPM(Two())(features())


@pytest.mark.parametrize("valid", [torch.ones(2, 15), torch.ones(2, 5, 3, dtype=torch.bool)])
def test_bad_validity_is_named(valid):
    with pytest.raises(
        ValueError, match=r"valid: expected bool \(B, N\) = \(2, 15\) or \(B, h, w\) = \(2, 3, 5\), got"
    ):
        PPM()(features(), valid)


@pytest.mark.parametrize("gamma", [1.5, 2.0, 3.0])
def test_gradcheck(gamma):
    """Above gamma = 1 the power is smooth where the cosine is clamped."""
    assert torch.autograd.gradcheck(PPM(gamma=gamma), (torch.randn(1, 3, 2, 3, dtype=torch.float64).requires_grad_(),))


def test_two_layers_with_batch_norm_between():
    g = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)).double()
    x = features()
    values = g(x).detach()
    place = {tuple(x[b, :, i, j].tolist()): values[b, :, i, j] for b in range(2) for i in range(3) for j in range(5)}
    expected = reference.propagate(x, lambda cell: place[tuple(cell.tolist())], 2.0, True)
    torch.testing.assert_close(PPM(g)(x), expected)


@pytest.mark.parametrize("layers", [0, 1])
def test_tokens_are_the_map(layers):
    x = features()
    ppm = PPM(nn.Conv2d(4, 6, 1, dtype=torch.float64) if layers else None)
    torch.testing.assert_close(ppm(map_to_tokens(x)), map_to_tokens(ppm(x)))
    torch.testing.assert_close(tokens_to_map(ppm(map_to_tokens(x)), SIZE), ppm(x))


def test_published_one_and_the_one_without_parameters():
    published = PPM(nn.Conv2d(256, 256, 1))
    assert published.gamma == 2.0
    assert published.normalize_values
    assert published(torch.randn(1, 256, 7, 7)).shape == (1, 256, 7, 7)
    assert not list(PPM().parameters())
    assert "gamma=2.0, normalize_values=True" in repr(published)


def test_cells_like_no_other_keep_their_own_value():
    """Orthogonal cells: all weights but one's own are 0; not divided by their sum, else scale would not matter."""
    x = torch.eye(4).view(1, 4, 2, 2) * 5
    torch.testing.assert_close(PPM()(x), x / 5)
    torch.testing.assert_close(PPM(normalize_values=False)(x), x)
    same = torch.ones(1, 4, 2, 2)
    torch.testing.assert_close(PPM(normalize_values=False)(same), 4 * same)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_dead_and_opposite_cells_have_finite_gradients(gamma):
    x = torch.randn(2, 4, *SIZE)
    x[0] = 0
    x[1, :, 0] = -x[1, :, 1]
    x[1, :, 2, 3] = 0
    x.requires_grad_()
    y = PPM(gamma=gamma)(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() < 1e3
    assert x.grad[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features(dtype):
    """Values of 300: their squares overflow float16, so all is widened first."""
    x = (300 * F.normalize(torch.randn(2, 4, *SIZE), dim=1)).to(dtype).requires_grad_()
    y = PPM()(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, PPM()(x.float()))
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()
    with torch.autocast("cpu", dtype=dtype):
        g = nn.Conv2d(4, 4, 1)
        assert PPM(g)(x.float()).isfinite().all()


def test_heads_are_linear_norm_relu_linear():
    """One vector per image through MLP is a map of one cell through ConvMLP; each step written out."""
    conv, mlp = ConvMLP(6, 10, 4), MLP(6, 10, 4)
    mlp.load_state_dict(
        {key: value.flatten(1) if value.ndim == 4 else value for key, value in conv.state_dict().items()}
    )
    x = torch.randn(8, 6)
    hidden = x @ mlp.linear1.weight.T + mlp.linear1.bias
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
    expected = hidden.clamp(min=0) @ mlp.linear2.weight.T + mlp.linear2.bias
    torch.testing.assert_close(mlp(x), expected)
    torch.testing.assert_close(conv(x[:, :, None, None])[:, :, 0, 0], expected)
    a_map = torch.randn(2, 6, *SIZE)
    torch.testing.assert_close(conv(a_map), conv(a_map.mT).mT)
    assert conv(a_map).shape == (2, 4, *SIZE)


def test_published_head_widths():
    head = ConvMLP(2048)
    assert head.linear1.weight.shape == (4096, 2048, 1, 1)
    assert head.linear2.weight.shape == (256, 4096, 1, 1)
    assert head.linear1.bias is not None
    assert head.linear2.bias is not None


def test_tokens_are_row_major():
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    tokens = map_to_tokens(x)
    torch.testing.assert_close(tokens, reference.tokens(x))
    assert torch.equal(tokens[:, 7], x[:, :, 1, 2])
    assert torch.equal(tokens_to_map(tokens, (4, 5)), x)


def test_transforms_that_would_mix_other_cells_are_refused():
    """On tokens a 3x3 convolution would join cells that are no neighbours; a linear layer acts along a map's width."""
    tokens = torch.rand(2, 15, 4)
    with pytest.raises(ValueError, match=r"transform: expected convolutions of 1 x 1 for tokens"):
        PPM(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)))(tokens)
    assert PPM(nn.Conv2d(4, 4, 3, padding=1))(torch.rand(2, 4, 3, 5)).shape == (2, 4, 3, 5)
    with pytest.raises(ValueError, match=r"transform: expected a module from map to map, .* got an nn.Linear"):
        PPM(nn.Linear(4, 4))
