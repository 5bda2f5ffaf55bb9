"""Sparse masks in a compiled step. torch.compile refuses sparse tensors: what holds one runs as it is, in one piece."""

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import densessl
from densessl import PPM, DistanceMatcher, PixContrastLoss, PixProLoss, coords_from_boxes
from densessl.losses import pixcontrast


class Graphs:
    """A backend of torch.compile that counts what it is given and runs it as it is."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]):
        self.count += 1
        return module.forward


@pytest.fixture(params=["all logits", "blocks"])
def road(monkeypatch, request):
    if request.param == "blocks":
        monkeypatch.setattr(pixcontrast, "_FEW_PAIRS", {torch.strided: 0, torch.sparse_coo: 0})
    torch._dynamo.reset()


def inputs() -> tuple[Tensor, ...]:
    boxes = torch.tensor([[0.0, 0.0, 0.7, 0.8], [0.2, 0.1, 1.0, 0.9]])
    return torch.randn(2, 4, 5, 9), torch.randn(2, 4, 6, 7), *coords_from_boxes(boxes)[:, None].expand(2, 2, 3, 3)


@pytest.mark.usefixtures("road")
@pytest.mark.parametrize("loss", [PixProLoss(), PixContrastLoss()])
def test_sparse_loss_breaks_the_graph_once(loss):
    """Two graphs, before and after; nothing of matcher and loss is compiled in pieces."""
    ppm = PPM(nn.Conv2d(4, 4, 1))
    match = DistanceMatcher(sparse=True)

    @torch.compiler.disable
    def compare(y: Tensor, key: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
        return loss(y, key, match(c1, c2, y.shape[-2:], key.shape[-2:]))

    def step(query: Tensor, key: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
        return 2 * compare(ppm(query).relu(), key, c1, c2) + 1

    graphs = Graphs()
    arguments = inputs()
    got, expected = torch.compile(step, backend=graphs)(*arguments), step(*arguments)
    torch.testing.assert_close(got, expected)
    assert graphs.count == 2
    got.backward()
    assert ppm.transform.weight.grad.any()


@pytest.mark.usefixtures("road")
@pytest.mark.parametrize("loss", [PixProLoss(), PixContrastLoss()])
def test_sparse_loss_itself_is_left_as_it_is(loss):
    query, key, c1, c2 = inputs()
    mask = DistanceMatcher(sparse=True)(c1, c2, (5, 9), (6, 7))
    for given in (mask, mask.mT):
        graphs = Graphs()
        back = query if given is mask else key
        other = key if given is mask else query
        torch.testing.assert_close(torch.compile(loss, backend=graphs)(back, other, given), loss(back, other, given))
        assert graphs.count == 0


@pytest.mark.usefixtures("road")
@pytest.mark.parametrize("loss", [PixProLoss(), PixContrastLoss()])
def test_strided_masks_leave_one_graph(loss):
    match = DistanceMatcher()

    def step(query: Tensor, key: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
        return loss(query, key, match(c1, c2, query.shape[-2:], key.shape[-2:]))

    graphs = Graphs()
    arguments = inputs()
    compiled = torch.compile(step, backend=graphs, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), step(*arguments))
    assert graphs.count == 1


def test_types_are_asked_for_as_tuples():
    """The compiler of torch 2.6, the lowest version, does not take isinstance(x, A | B)."""
    for path in sorted(Path(densessl.__file__).parent.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "isinstance":
                assert not isinstance(call.args[1], ast.BinOp), f"{path}:{call.lineno}"
