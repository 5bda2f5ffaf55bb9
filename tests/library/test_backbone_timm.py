"""FeatureMap on timm's families: each equal to the model's own features, or refused by name."""

import functools
import inspect
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from densessl import FeatureMap

# Small members, one of each family, with the side of an image that they take.
FAMILIES = {
    "beit_base_patch16_224": 64,
    "botnet26t_256": 128,
    "caformer_s18": 64,
    "cait_xxs24_224": 64,
    "coatnet_nano_rw_224": 64,
    "convit_tiny": 224,
    "convnext_atto": 64,
    "cspresnet50": 64,
    "darknet17": 64,
    "davit_tiny": 64,
    "deit_tiny_patch16_224": 64,
    "densenet121": 64,
    "dla34": 64,
    "dm_nfnet_f0": 64,
    "dpn48b": 64,
    "edgenext_xx_small": 64,
    "efficientformer_l1": 224,
    "efficientformerv2_s0": 224,
    "efficientnet_lite0": 64,
    "efficientvit_b0": 64,
    "efficientvit_m0": 224,
    "eva02_tiny_patch14_224": 56,
    "fastvit_t8": 64,
    "focalnet_tiny_srf": 64,
    "gcvit_xxtiny": 224,
    "ghostnet_050": 64,
    "hgnetv2_b0": 64,
    "hiera_tiny_224": 224,
    "hrnet_w18_small": 64,
    "inception_next_atto": 64,
    "inception_v3": 160,
    "legacy_seresnet18": 64,
    "levit_128s": 224,
    "maxvit_rmlp_pico_rw_256": 64,
    "mixer_s32_224": 64,
    "mobilenetv2_035": 64,
    "mobilenetv3_small_050": 64,
    "mobilenetv4_conv_small_035": 64,
    "mobileone_s0": 64,
    "mobilevit_xxs": 64,
    "mobilevitv2_050": 64,
    "mvitv2_tiny": 64,
    "nest_tiny": 224,
    "nextvit_small": 64,
    "pit_ti_224": 224,
    "poolformer_s12": 64,
    "pvt_v2_b0": 64,
    "regnetx_002": 64,
    "repghostnet_050": 64,
    "repvit_m0_9": 64,
    "res2net50_14w_8s": 64,
    "resmlp_12_224": 64,
    "resnet10t": 64,
    "resnetv2_18": 64,
    "rexnetr_200": 64,
    "samvit_base_patch16": 64,
    "selecsls42": 128,
    "sequencer2d_s": 224,
    "shvit_s1": 128,
    "starnet_s050": 64,
    "swin_tiny_patch4_window7_224": 64,
    "swinv2_cr_tiny_224": 224,
    "swinv2_tiny_window8_256": 64,
    "tiny_vit_5m_224": 64,
    "tresnet_m": 64,
    "twins_pcpvt_small": 224,
    "vgg11": 64,
    "visformer_tiny": 224,
    "vit_relpos_small_patch16_224": 64,
    "vit_tiny_patch16_224": 64,
    "volo_d1_224": 64,
    "vovnet39a": 64,
    "xception41": 64,
    "xcit_nano_12_p16_224": 64,
}
FEW_BLOCKS = {"beit", "cait", "deit", "eva02", "samvit", "vit", "xcit"}
# Modules at these levels give more than a map, or timm names no module: compared with timm's own way.
OWN_FORM = {"hrnet_w18_small", "mvitv2_tiny", "pit_ti_224", "twins_pcpvt_small"}
# Refused by name; at these sizes and levels, none needs to be.
REFUSED: set[str] = set()


def small_model(name: str, side: int) -> nn.Module:
    options: dict[str, Any] = {}
    if name.split("_")[0] in FEW_BLOCKS:
        options["depth"] = 2
        if name.startswith("samvit"):
            options["global_attn_indexes"] = (1,)
    with torch.device("meta"):
        sized = "img_size" in inspect.signature(type(timm.create_model(name)).__init__).parameters
    if sized:
        options["img_size"] = side
    return timm.create_model(name, **options).eval()


def in_any_layout(out: Any, like: Tensor) -> bool:
    """Whether what a layer gave holds the map, with channels first, with channels last, or as tokens."""
    if not isinstance(out, Tensor):
        return False
    cells = like.shape[2] * like.shape[3]
    forms = [out, out.permute(0, 3, 1, 2)] if out.ndim == 4 else []
    if out.ndim == 3 and out.shape[1] >= cells:
        forms = [out[:, out.shape[1] - cells :].mT.reshape(like.shape)] if out.shape[2] == like.shape[1] else []
    return any(form.shape == like.shape and torch.allclose(form, like, rtol=1e-4, atol=1e-4) for form in forms)


@pytest.mark.parametrize("name", FAMILIES)
def test_last_level_is_the_models_own_or_refused(name):
    model, side = small_model(name, FAMILIES[name]), FAMILIES[name]
    level = model.feature_info[-1]
    x, seen = torch.randn(1, 3, side, side), []
    try:
        encoder = FeatureMap(model, level["module"])
        with torch.no_grad():
            features = encoder(x)
    except ValueError as error:
        if name in REFUSED and (level["module"] in str(error) or type(model).__name__ in str(error)):
            return
        raise
    assert name not in REFUSED
    assert features.shape[:2] == (1, level["num_chs"])
    if name in OWN_FORM:
        index = len(model.feature_info) - 1
        own_maps = model.forward_intermediates(x, indices=[index], intermediates_only=True)
        torch.testing.assert_close(features, own_maps[0])
        return
    handle = model.get_submodule(level["module"]).register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model.forward_features(x)
    handle.remove()
    assert in_any_layout(seen[-1], features)
    own = model.state_dict()
    assert all(value is own[key] or torch.equal(value, own[key]) for key, value in encoder.state_dict().items())


vit = functools.partial(timm.create_model, "vit_tiny_patch16_224", depth=3)


def test_several_layers_are_the_single_ones():
    for model, layers in (
        (vit(img_size=(64, 96)).eval(), ["blocks.2", "blocks.0", "blocks.2"]),
        (timm.create_model("resnet10t").eval(), ["layer4", "layer2"]),
    ):
        x = torch.randn(2, 3, 64, 96)
        maps = FeatureMap(model, layers=layers)(x)
        assert len(maps) == len(layers)
        for layer, features in zip(layers, maps, strict=True):
            torch.testing.assert_close(features, FeatureMap(model, layer)(x))


def test_layers_are_checked():
    with pytest.raises(ValueError, match=r"layers: expected a list"):
        FeatureMap(vit(), layers="norm")
    with pytest.raises(ValueError, match=r"layers: expected blocks, or 'norm' alone"):
        FeatureMap(vit(), layers=["blocks.0", "norm"])


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({"img_size": 64}, (32, 96), r"image: VisionTransformer was made for 64x64 pixels, got 32x96"),
        ({"dynamic_img_size": True}, (40, 64), r"image: .* multiples of VisionTransformer's patch of 16x16 pixels"),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, (40, 64), r"image: .* patch of 16x16 .* elsewhere"),
    ],
)
def test_sizes_that_a_vit_does_not_take(options, size, message):
    encoder = FeatureMap(vit(**options), "blocks.1").eval()
    with pytest.raises(ValueError, match=message):
        encoder(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("name", ["gcvit_xxtiny", "volo_d1_224"])
def test_sizes_that_windows_and_positions_do_not_take(name):
    model = timm.create_model(name)
    layer = model.feature_info[-1]["module"]
    with pytest.raises(ValueError, match="image: the model does not take 96x128 pixels: "):
        FeatureMap(model, layer).eval()(torch.zeros(1, 3, 96, 128))


def test_dynamic_sizes():
    model = vit(dynamic_img_size=True, dynamic_img_pad=True, reg_tokens=4).eval()
    x = torch.randn(1, 3, 48, 80)
    assert in_any_layout(model.forward_features(x), FeatureMap(model, "norm")(x))


@pytest.mark.parametrize(
    ("name", "layer", "options", "channels"),
    [
        ("samvit_base_patch16", "blocks.0", {"img_size": 64, "depth": 1, "global_attn_indexes": (0,)}, 768),
        ("samvit_base_patch16", "blocks.0.mlp", {"img_size": 64, "depth": 1, "global_attn_indexes": (0,)}, 768),
        ("tiny_vit_5m_224", "stages.3.blocks", {}, 320),
        ("gcvit_xxtiny", "stages.2.blocks", {}, 256),
        ("swin_tiny_patch4_window7_224", "layers.1.blocks", {"img_size": 64}, 192),
        ("volo_d1_224", "network", {}, 384),
    ],
)
def test_channels_last_within_a_model(name, layer, options, channels):
    model = timm.create_model(name, **options).eval()
    side = options.get("img_size", 224)
    try:
        features = FeatureMap(model, layer)(torch.randn(1, 3, side, side))
    except ValueError as error:
        if layer in str(error):
            return
        raise
    assert features.shape[1] == channels
