"""FeatureMap on torchvision's families: each equal to what the model itself computes at that layer."""

import pytest
import torch
import torchvision
from torch import Tensor

from densessl import FeatureMap

# A small member of each family: its last layer with a map, and the side of an image that it takes.
FAMILIES = {
    "alexnet": ("features", 96),
    "convnext_tiny": ("features", 64),
    "densenet121": ("features", 64),
    "efficientnet_b0": ("features", 64),
    "googlenet": ("inception5b", 64),
    "inception_v3": ("Mixed_6e", 96),
    "maxvit_t": ("blocks.3", 224),
    "mnasnet0_5": ("layers", 64),
    "mobilenet_v2": ("features", 64),
    "mobilenet_v3_small": ("features", 64),
    "regnet_y_400mf": ("trunk_output", 64),
    "resnext50_32x4d": ("layer3", 64),
    "shufflenet_v2_x0_5": ("conv5", 64),
    "squeezenet1_1": ("features", 64),
    "swin_v2_t": ("features", 64),
    "vgg11_bn": ("features", 64),
    "wide_resnet50_2": ("layer2", 64),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_last_level_is_the_models_own(name):
    layer, side = FAMILIES[name]
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    x, seen = torch.randn(1, 3, side, side), []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    with torch.no_grad():
        model(x)
        handle.remove()
        features = FeatureMap(model, layer)(x)
    own: Tensor = seen[0].permute(0, 3, 1, 2) if name.startswith("swin") else seen[0]
    torch.testing.assert_close(features, own)
