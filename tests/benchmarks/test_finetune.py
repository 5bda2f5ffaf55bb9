"""Fine-tuning with an FCN head: it learns, and looks at the share of the labels that it was told to."""

import pytest
import torch
from torch import nn

from benchmarks.studies.finetune import fine_tuned_miou


def scene(label: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture of two halves, whose class is their brightness; the last column is ignored."""
    labels = torch.zeros(40, 56, dtype=torch.int64)
    labels[:, 28:] = label
    image = (labels * 200).to(torch.uint8).expand(3, -1, -1).contiguous()
    labels[:, -1] = 11
    return image, labels


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())


def tuned(backbone: nn.Module, fit, **options) -> float:
    def normalize(images):
        return images.float() / 255

    return fine_tuned_miou(backbone, fit, [scene(1)], 2, normalize, batch_size=4, side=32, lr=1e-3, **options)


def test_it_learns_and_leaves_the_backbone_as_it_was():
    backbone = net()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    untrained, trained = (tuned(backbone, [scene(1)] * 4, steps=steps) for steps in (1, 80))
    assert trained > 0.85
    assert trained > untrained + 0.2
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


def test_it_looks_at_its_share_of_the_labels_alone():
    seen = []

    class Labels(list):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    fit = Labels([scene(1)] * 20)
    for seed in (0, 0, 1):
        seen.clear()
        tuned(net(), fit, steps=12, share=0.1, seed=seed)
        # The first one is looked at for its size.
        torch.manual_seed(seed)
        assert set(seen) <= {0, *torch.randperm(20)[:2].tolist()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_backbone_on_a_gpu_is_tuned_there():
    assert tuned(net().cuda(), [scene(1)] * 4, steps=80) > 0.85
