"""The losses of whole recipes against loops written from their papers' equations, on rectangular maps of two sizes."""

import sys
from pathlib import Path

import pytest
import torch
from reference import cosine, tokens
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "pretrain"))

from densecl import DenseCL, Outputs

B, C, WIDTH = 3, 6, 5
SIZE_1, SIZE_2 = (3, 5), (4, 2)


def maps(*channels: int) -> list[tuple[Tensor, Tensor]]:
    """Of each number of channels, one map of view 1 and one of view 2."""
    return [tuple(3 * torch.randn(B, c, *size, dtype=torch.float64) for size in (SIZE_1, SIZE_2)) for c in channels]


# --- DenseCL ----------------------------------------------------------------------------------------------------------


def info_nce(query: Tensor, key: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Of one vector."""
    own = (cosine(query, key) / temperature).exp()
    return -(own / (own + sum((cosine(query, n) / temperature).exp() for n in negatives))).log()


def densecl_loop(query: Outputs, key: Outputs, cells: Tensor, images: Tensor, temperature: float):
    """The dense loss over all cells of the query, each with the key cell whose backbone feature is most similar."""
    f, g, r, t = (tokens(x) for x in (query.features, key.features, query.cells, key.cells))
    dense, partners = [], []
    for b in range(B):
        for s in range(r.shape[1]):
            similar = [float(cosine(f[b, s], g[b, j])) for j in range(g.shape[1])]
            partners.append(similar.index(max(similar)))
            dense.append(info_nce(r[b, s], t[b, partners[-1]], cells, temperature))
    instance = [info_nce(query.image[b], key.image[b], images, temperature) for b in range(B)]
    return sum(dense) / len(dense), sum(instance) / len(instance), partners


def test_densecl_equals_the_loop():
    recipe = DenseCL(backbone="resnet18", layer="layer1", hidden_dim=8, dim=C, queue=7, size=32).double()
    (f, g), (r, t) = maps(WIDTH, C)
    query = Outputs(f, r.requires_grad_(), torch.randn(B, C, dtype=torch.float64, requires_grad=True))
    key = Outputs(g, t, torch.randn(B, C, dtype=torch.float64))
    dense, instance, pairs = recipe.losses(query, key)
    expected = densecl_loop(query, key, recipe.cell_queue.keys, recipe.image_queue.keys, 0.2)
    assert pairs.key.flatten().tolist() == expected[2]
    assert pairs.valid.all()
    for got, wanted, x in ((dense, expected[0], query.cells), (instance, expected[1], query.image)):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (got, wanted)))


def test_densecl_steps_weigh_the_two_losses_and_fill_the_queues(monkeypatch):
    from reading import Batch

    from densessl import View

    recipe = DenseCL(backbone="resnet18", layer="layer2", hidden_dim=8, dim=C, queue=5, dense_weight=0.3, size=32)
    logged = {}
    monkeypatch.setattr(recipe, "log_dict", lambda values, **options: logged.update(values))
    recipe.trainer = Trainer()
    image = torch.randn(2, 3, 32, 48)
    coords, size = torch.eye(3).expand(2, 3, 3), torch.tensor([[32, 48]] * 2)
    views = View(image, coords, size), View(image.flip(3), coords, size)
    before = recipe.cell_queue.keys, recipe.image_queue.keys
    loss = recipe.training_step(Batch(*views, torch.zeros(2), torch.zeros(2)), 0)
    torch.testing.assert_close(loss, 0.3 * logged["loss/dense"] + 0.7 * logged["loss/instance"])
    key = recipe.target(views[1].image)  # in train mode batch norm sees the same batch again
    for queue, old, new in zip(
        (recipe.cell_queue, recipe.image_queue), before, (key.cells.mean((2, 3)), key.image), strict=True
    ):
        assert torch.equal(queue.keys[:3], old[2:])
        torch.testing.assert_close(queue.keys[3:], torch.nn.functional.normalize(new, dim=1))
    assert any(p.grad is None for p in recipe.encoder.parameters())
    loss.backward()
    assert all(p.grad is not None for p in recipe.encoder.parameters())
    assert all(p.grad is None for p in recipe.target.parameters())


class Trainer:
    """One process whose step is not logged."""

    world_size, global_step, log_every_n_steps = 1, 0, 50


@pytest.mark.parametrize("weight", [-0.1, 1.5])
def test_densecl_names_a_bad_weight(weight):
    with pytest.raises(ValueError, match=rf"model.dense_weight: expected a number in 0..1, got {weight}"):
        DenseCL(dense_weight=weight)
