"""FeatureMap on torchvision's and timm's models: outputs, names, copies, modes."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision.models as tv
from torch import Tensor, nn

from densessl import EMA, FeatureMap, MaskToken


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    layer: str
    size: tuple[int, int]
    shape: tuple[int, ...]
    channels_last: bool = False
    prefix: int = 0  # class and register tokens


def small_vit(**options: Any) -> nn.Module:
    return tv.VisionTransformer(32, 8, 2, 2, 32, 64, **options)


def small_swin(**options: Any) -> nn.Module:
    return tv.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], **options)


def small_convnext(**options: Any) -> nn.Module:
    blocks = [tv.convnext.CNBlockConfig(8, 16, 2), tv.convnext.CNBlockConfig(16, None, 2)]
    return tv.ConvNeXt(blocks, **options)


CASES = {
    "resnet18": Case(tv.resnet18, "layer4", (64, 96), (512, 2, 3)),
    "resnet18-c3": Case(tv.resnet18, "layer2", (64, 96), (128, 8, 12)),
    "resnet50": Case(tv.resnet50, "layer4", (64, 96), (2048, 2, 3)),
    "convnext_tiny": Case(tv.convnext_tiny, "features", (64, 96), (768, 2, 3)),
    "swin_t": Case(tv.swin_t, "permute", (64, 96), (768, 2, 3)),
    "swin-c4": Case(small_swin, "features.3", (32, 64), (32, 4, 8), channels_last=True),
    "swin-norm": Case(small_swin, "norm", (32, 64), (32, 4, 8), channels_last=True),
    "swin-permute": Case(small_swin, "permute", (32, 64), (32, 4, 8)),
    "vit": Case(small_vit, "encoder.ln", (32, 32), (32, 4, 4), prefix=1),
    "timm-resnet": Case(functools.partial(timm.create_model, "resnet10t"), "layer4", (64, 96), (512, 2, 3)),
    "timm-convnext": Case(functools.partial(timm.create_model, "convnext_atto"), "stages.3", (64, 96), (320, 2, 3)),
    "timm-vit": Case(
        functools.partial(timm.create_model, "vit_tiny_patch16_224", img_size=(64, 96), depth=4),
        "blocks.3",
        (64, 96),
        (192, 4, 6),
        prefix=1,
    ),
    "timm-vit-norm": Case(
        functools.partial(timm.create_model, "vit_tiny_patch16_224", img_size=(64, 96), depth=2),
        "norm",
        (64, 96),
        (192, 4, 6),
        prefix=1,
    ),
    "timm-vit-registers": Case(
        functools.partial(timm.create_model, "vit_small_patch14_reg4_dinov2", img_size=(42, 70), depth=2),
        "norm",
        (42, 70),
        (384, 3, 5),
        prefix=5,
    ),
    "timm-swin": Case(
        functools.partial(
            timm.create_model, "swin_tiny_patch4_window7_224", img_size=(32, 64), depths=(2, 2), num_heads=(2, 4)
        ),
        "norm",
        (32, 64),
        (192, 4, 8),
        channels_last=True,
    ),
}
SMALL = ["resnet18", "swin-permute", "vit", "timm-convnext", "timm-vit", "timm-swin"]
ALL = pytest.mark.parametrize("name", CASES)
FEW = pytest.mark.parametrize("name", SMALL)


def build(name: str) -> tuple[nn.Module, FeatureMap, Tensor]:
    case = CASES[name]
    model = case.make()
    return model, FeatureMap(model, case.layer), torch.randn(2, 3, *case.size)


def own_output(model: nn.Module, case: Case, x: Tensor) -> Tensor:
    """What the model itself computes at that layer, as a map."""
    seen = []
    handle = model.get_submodule(case.layer).register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(x)
    handle.remove()
    (out,) = seen
    if out.ndim == 3:
        h, w = case.shape[1:]
        tokens = out[:, case.prefix :]
        assert tokens.shape[1] == h * w
        return torch.stack([tokens[:, i * w : (i + 1) * w].mT for i in range(h)], 2)
    return out.permute(0, 3, 1, 2) if case.channels_last else out


@ALL
@pytest.mark.parametrize("training", [False, True])
def test_equals_the_models_own_output(name, training):
    model, encoder, x = build(name)
    twin = copy.deepcopy(model).train(training)
    encoder.train(training)
    torch.manual_seed(1)
    expected = own_output(twin, CASES[name], x)
    torch.manual_seed(1)
    features = encoder(x)
    assert features.shape == (2, *CASES[name].shape)
    torch.testing.assert_close(features, expected)
    for key, value in encoder.state_dict().items():  # batch norm has seen the same
        torch.testing.assert_close(value, twin.state_dict()[key], msg=key)


@ALL
def test_names_are_the_models_own_and_every_parameter_gets_a_gradient(name):
    model, encoder, x = build(name)
    own = model.state_dict()
    assert set(encoder.state_dict()) <= set(own)
    assert len(encoder.state_dict()) > 10
    parameters = dict(encoder.named_parameters())
    # timm's ViT and Swin drop only their head's layers: compare with what lies behind the layer.
    left_out = {key.split(".")[0] for key in set(dict(model.named_parameters())) - set(parameters)}
    assert left_out <= {"fc", "head", "heads", "classifier", "layer3", "layer4", "norm", "features"}
    (encoder(x) * torch.randn(2, *CASES[name].shape)).sum().backward()
    assert [key for key, p in parameters.items() if p.grad is None] == []


@FEW
def test_states_go_back_and_forth(name):
    case = CASES[name]
    model, encoder, x = build(name)
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    encoder.eval()
    state = {key: value.clone() for key, value in encoder.state_dict().items()}
    plain = case.make()
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert unexpected == []
    assert set(missing) == set(model.state_dict()) - set(state)
    torch.testing.assert_close(own_output(plain.eval(), case, x), encoder(x))
    other = FeatureMap(case.make(), case.layer).eval()
    assert not torch.allclose(other(x), encoder(x))
    missing, unexpected = other.load_state_dict(plain.state_dict(), strict=False)
    assert missing == []
    assert set(unexpected) == set(model.state_dict()) - set(state)
    torch.testing.assert_close(other(x), encoder(x))


@FEW
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "ema", "nested"])
def test_copies_are_whole(name, how):
    """Same names and outputs; what moves or replaces the copy's tensors is what its forward sees."""
    _, encoder, x = build(name)
    encoder.eval()
    make = {
        "deepcopy": lambda: copy.deepcopy(encoder),
        "pickle": lambda: pickle.loads(pickle.dumps(encoder)),
        "ema": lambda: EMA(encoder).module,
        "nested": lambda: copy.deepcopy(nn.ModuleList([pickle.loads(pickle.dumps(copy.deepcopy(encoder)))]))[0],
    }[how]
    twin = make()
    assert list(twin.state_dict()) == list(encoder.state_dict())
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in encoder.named_parameters()]
    assert not twin.training
    twin.requires_grad_(True)
    expected = encoder(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not torch.equal(twin(x), expected)
    assert torch.equal(encoder(x), expected)  # independent
    twin.load_state_dict({key: value.clone() for key, value in encoder.state_dict().items()}, assign=True)
    assert torch.equal(twin(x), expected)
    twin.double()
    torch.testing.assert_close(twin(x.double()).float(), expected, rtol=1e-3, atol=1e-3)
    twin.to("meta")
    assert twin(x.double().to("meta")).device.type == "meta"
    assert torch.equal(encoder(x), expected)


@FEW
def test_to_dtype(name):
    _, encoder, x = build(name)
    before = encoder.eval()(x)
    encoder.double()
    assert all(value.dtype != torch.float32 for value in encoder.state_dict().values())
    after = encoder(x.double())
    assert after.dtype == torch.float64
    torch.testing.assert_close(after.float(), before, rtol=1e-3, atol=1e-3)


STOCHASTIC = {
    "dropout": lambda: FeatureMap(small_vit(dropout=0.5), "encoder.ln"),
    "attention dropout": lambda: FeatureMap(small_swin(attention_dropout=0.5, stochastic_depth_prob=0.0), "permute"),
    "stochastic depth": lambda: FeatureMap(small_convnext(stochastic_depth_prob=0.5), "features"),
    "drop path": lambda: FeatureMap(timm.create_model("convnext_atto", drop_path_rate=0.5), "stages.2"),
}


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("how", ["itself", "deepcopy", "pickle", "copied in evaluation"])
def test_modes_switch_what_is_random(kind, how):
    """Some of it is baked into the traced graphs, one for each mode; copies keep both."""
    encoder = STOCHASTIC[kind]()
    encoder.train(how != "copied in evaluation")
    if how == "deepcopy" or how == "copied in evaluation":
        encoder = copy.deepcopy(encoder)
    if how == "pickle":
        encoder = pickle.loads(pickle.dumps(encoder))
    x = torch.randn(4, 3, 32, 32)

    def is_random() -> bool:
        return not torch.equal(encoder(x), encoder(x))

    assert is_random() == encoder.training == (how != "copied in evaluation")
    for mode in (False, True, False):
        assert encoder.train(mode).training == mode
        assert is_random() == mode
    outer = nn.Sequential(encoder).train()
    assert is_random()
    outer.eval()
    assert not is_random()


def test_frozen_norms_stay_frozen():
    """Some modules in evaluation mode, the rest in training: not changed by cutting or copying."""
    model = tv.resnet18()
    model.bn1.eval()
    encoder = FeatureMap(model)
    for module in (model, encoder, copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert not module.bn1.training
        assert module.training
        assert module.layer1.get_submodule("0.bn1").training
    x, before = torch.randn(2, 3, 64, 64), model.bn1.running_mean.clone()
    encoder(x)
    assert torch.equal(model.bn1.running_mean, before)
    assert not FeatureMap(tv.resnet18().eval()).training


def test_modules_can_be_replaced():
    """SyncBatchNorm.convert_sync_batchnorm does it."""
    encoder = FeatureMap(tv.resnet18(), "layer1")
    x = torch.randn(2, 3, 32, 32)
    before = encoder.eval()(x)
    encoder.conv1 = nn.Conv2d(3, 64, 7, 2, 3)
    assert not torch.allclose(encoder(x), before)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(encoder))
    assert isinstance(converted.bn1, nn.SyncBatchNorm)
    assert isinstance(converted.layer1.get_submodule("0.bn1"), nn.SyncBatchNorm)
    torch.testing.assert_close(converted.eval()(x), encoder(x))
    converted.bn1.weight.data.zero_()
    converted.bn1.bias.data.zero_()
    assert not torch.allclose(converted(x), encoder(x))


def test_one_encoder_takes_many_sizes():
    encoder = FeatureMap(tv.resnet18()).eval()
    for h, w in ((64, 32), (96, 160), (65, 63)):
        assert encoder(torch.randn(1, 3, h, w)).shape[-2:] == (-(-h // 32), -(-w // 32))


def test_no_parameter_of_the_head_is_left():
    encoder = FeatureMap(tv.resnet50())
    assert not [key for key in encoder.state_dict() if key.startswith("fc")]
    assert not hasattr(encoder, "fc")
    assert sum(p.numel() for p in encoder.parameters()) == 23_508_032
    assert "layer='layer4'" in repr(encoder)


def test_any_traceable_module():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten())
    encoder = FeatureMap(net, "2")
    x = torch.randn(2, 1, 21, 13)
    assert torch.equal(encoder(x), net[:3](x))
    assert set(encoder.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer4 = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer4(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (
            lambda: FeatureMap(small_vit()),
            "has no 'layer4'; its top modules are .*heads; for a vision transformer usually 'encoder.ln'$",
        ),
        (
            lambda: FeatureMap(timm.models.VisionTransformer(32, 16, embed_dim=32, depth=1, num_heads=2)),
            "has no 'layer4'; its top modules are .*head; for a vision transformer usually 'norm'$",
        ),
        (
            lambda: FeatureMap(tv.resnet18(), "layer5"),
            r"layer: ResNet has no 'layer5'; its top modules are conv1, .*fc$",
        ),
        (lambda: FeatureMap("resnet18"), r"model: expected a module, such as .*, got 'resnet18'"),
        (lambda: FeatureMap(tv.resnet18), r"model: expected a module, such as .*, got function"),
        (lambda: FeatureMap(tv.resnet18().state_dict()), r"model: expected a module, such as .*, got OrderedDict"),
        (
            lambda: FeatureMap(tv.resnet18(), ["layer4"]),
            r"layer: expected the name of a layer, .* layers=",
        ),
        (lambda: FeatureMap(tv.resnet18(), layers=[3]), r"layers: expected a list of names of layers, got \[3\]"),
        (lambda: MaskToken("vit"), r"backbone: expected "),
        (lambda: FeatureMap(small_vit()), r"layer: VisionTransformer has no 'layer4'"),
        (lambda: FeatureMap(Untraceable()), r"model: the graph of Untraceable cannot be cut after 'layer4': .*"),
    ],
)
def test_bad_models(build_it, message):
    with pytest.raises(ValueError, match=message):
        build_it()


@pytest.mark.parametrize(
    ("layer", "image", "message"),
    [
        ("layer4", torch.zeros(2, 3, 64, 64, dtype=torch.uint8), r"image: .* got torch\.uint8 \(2, 3, 64, 64\); scale"),
        (
            "layer4",
            torch.zeros(3, 64, 64),
            r"image: expected floating point images \(B, C, H, W\), got .* \(3, 64, 64\)",
        ),
        ("layer4", torch.zeros(2, 3, 32, 32), r"image: layer 'layer4' shrinks 32x32 pixels to a 1x1 map"),
        ("fc", torch.zeros(2, 3, 64, 64), r"layer: expected 'fc' to give a map .* got \(2, 1000\)"),
    ],
)
def test_bad_images(layer, image, message):
    encoder = FeatureMap(tv.resnet18(), layer).eval()
    with pytest.raises(ValueError, match=message):
        encoder(image)


def test_a_compiled_encoder_takes_several_sizes():
    """From the second size on the compiler takes sizes for symbols."""
    encoder = FeatureMap(tv.resnet18(), "layer2").eval()
    compiled = torch.compile(encoder, backend="eager")
    for batch, side in ((2, 64), (3, 32), (4, 96)):
        image = torch.randn(batch, 3, side, side + 16)
        with torch.no_grad():
            assert torch.equal(compiled(image), encoder(image))
