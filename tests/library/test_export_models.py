"""Backbones of timm, folders for Hugging Face, and the models of other libraries that take the weights."""

import json

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models import resnet18, resnet50

from densessl import FeatureMap
from densessl.checkpoints import load_backbone
from densessl.export import export, main

DETECTORS = ["fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "fcos"]


@pytest.fixture
def image():
    return torch.rand(1, 3, 64, 96)


def trained(model):
    """A model whose statistics and biases are not those of a new one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.1, 0.1)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def saved(model, path, prefix="teacher.backbone."):
    torch.save({prefix + name: value for name, value in model.state_dict().items()}, path)
    return path


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *(("convnext_atto", True), ("convnext_atto", False), ("vit_tiny_patch16_224", False), ("resnet26", False)),
        *(("mobilenetv3_small_050", False), ("resnet18d", False), ("levit_128s", True)),
    ],
)
def test_any_timm_model_is_exported(name, given, tmp_path):
    model = timm.create_model(name).eval()
    saved(model, tmp_path / "last.pth")
    export(tmp_path / "last.pth", "timm", tmp_path / "out.safetensors", model=name if given else None)
    again = timm.create_model(name, num_classes=0, checkpoint_path=str(tmp_path / "out.safetensors"))  # strict
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


def test_swav_is_exported(tmp_path):
    model = resnet18()
    state = {f"module.{name}": value for name, value in model.state_dict().items() if not name.startswith("fc.")}
    heads = {"module.projection_head.0.weight": torch.rand(4, 4), "module.prototypes.weight": torch.rand(4, 4)}
    torch.save(state | heads | {"module.unheard_of.weight": torch.rand(4, 4)}, tmp_path / "swav.pth")
    done = export(tmp_path / "swav.pth", "torchvision", tmp_path / "out.pth")
    assert done.dropped.keys() == heads.keys() | {"unheard_of.weight"}
    assert len(done.weights) == len(state)


def test_a_named_model_is_compared_with(tmp_path):
    path = saved(timm.create_model("convnext_atto"), tmp_path / "last.pth")
    with pytest.raises(ValueError, match=r"last.pth does not fit the resnet26"):
        export(path, "timm", tmp_path / "out.pth", model="resnet26")
    with pytest.raises(ValueError, match=r"model: expected the name of a timm model \(convnext\S*,.*got 'convnext_at'"):
        export(path, "timm", tmp_path / "out.pth", model="convnext_at")
    with pytest.raises(ValueError, match=r"model: expected None for detectron2, which takes ResNets only"):
        export(path, "detectron2", tmp_path / "out.pkl", model="convnext_atto")
    with pytest.raises(ValueError, match=r"out: expected a folder for huggingface, got .*out.pth"):
        export(path, "huggingface", tmp_path / "out.pth")
    with pytest.raises(ValueError, match=r"last.pth does not fit: weights: expected those of a ResNet"):
        export(path, "huggingface", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]


def test_several_backbones_are_named_on_the_command_line(tmp_path, capsys):
    torch.save({"student": resnet18().state_dict(), "teacher": resnet18().state_dict()}, tmp_path / "dino.pth")
    arguments = [str(tmp_path / "dino.pth"), "--to", "timm", "--out", str(tmp_path / "out.pth")]
    assert main(arguments) == 2
    assert "holds 2 backbones, 'student.', 'teacher.': choose one, as in root='teacher.'" in capsys.readouterr().err
    assert main([*arguments, "--root", "teacher"]) == 0


def test_a_whole_missing_module_is_written_as_initialised(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("norm.")}
    torch.save(state, tmp_path / "last.pth")
    done = export(tmp_path / "last.pth", "huggingface", tmp_path / "hub", model="vit_tiny_patch16_224")
    assert (tmp_path / "hub" / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert done.dropped == dict.fromkeys(("norm.weight", "norm.bias"), "not in the checkpoint: written as initialised")
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items() if name in state)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_transformers_opens_resnets(name, tmp_path, image):
    transformers = pytest.importorskip("transformers")
    model = trained(torchvision.models.get_model(name))
    done = export(saved(model, tmp_path / "last.pth"), "huggingface", tmp_path / "hub")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hub")
    assert transformers.ResNetModel(config).state_dict().keys() == done.weights.keys()
    expected = FeatureMap(model).eval()(image)
    opened, info = transformers.AutoModel.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(opened.eval()(image).last_hidden_state, expected)
    backbone = transformers.ResNetBackbone.from_pretrained(tmp_path / "hub", out_features=["stage4"]).eval()
    torch.testing.assert_close(backbone(image).feature_maps[0], expected)
    opened.save_pretrained(tmp_path / "again")
    load_backbone(back := torchvision.models.get_model(name), tmp_path / "again" / "model.safetensors")
    torch.testing.assert_close(FeatureMap(back).eval()(image), expected)


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224"])
def test_transformers_opens_timms_folders(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, image = trained(timm.create_model(name)), torch.rand(1, 3, 224, 224)
    export(saved(model, tmp_path / "last.pth"), "huggingface", tmp_path / "hub", model=name)
    assert "num_classes" not in json.loads((tmp_path / "hub" / "config.json").read_text()).get("model_args", {})
    opened = transformers.AutoModel.from_pretrained(tmp_path / "hub")
    assert type(opened) is transformers.TimmWrapperModel
    torch.testing.assert_close(opened.eval()(image).last_hidden_state, model.forward_features(image))
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    torch.testing.assert_close(again.forward_features(image), model.forward_features(image))


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_detrs_backbone_takes_the_weights(name, tmp_path, image):
    transformers = pytest.importorskip("transformers")
    model = trained(timm.create_model(name))
    saved(model, tmp_path / "last.pth")
    config = transformers.TimmBackboneConfig(backbone=name, features_only=True, out_indices=[-1])
    detr = transformers.DetrModel(
        transformers.DetrConfig(backbone_config=config, d_model=16, encoder_layers=1, decoder_layers=1)
    ).eval()
    load_backbone(detr.backbone.model, tmp_path / "last.pth")
    torch.testing.assert_close(detr.backbone.model(image)[-1], model.forward_features(image))
    backbone = transformers.TimmBackbone(config).eval()
    load_backbone(backbone._backbone, tmp_path / "last.pth")
    torch.testing.assert_close(backbone(image).feature_maps[0], model.forward_features(image))


@pytest.mark.parametrize("encoder", ["resnet18", "tu-resnet18", "tu-convnext_atto"])
def test_segmentation_models_pytorch_takes_the_weights(encoder, tmp_path, image):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = trained(timm.create_model(encoder.removeprefix("tu-")))
    saved(model, tmp_path / "last.pth")
    unet = smp.Unet(encoder, encoder_weights=None, classes=3).eval()
    load_backbone(unet.encoder.model if encoder.startswith("tu-") else unet.encoder, tmp_path / "last.pth")
    torch.testing.assert_close(unet.encoder(image)[-1], model.forward_features(image))


@pytest.mark.parametrize("name", DETECTORS)
def test_torchvisions_five_detectors_take_the_weights(name, tmp_path):
    with torch.device("meta"):
        shapes = {entry: value.shape for entry, value in resnet50().state_dict().items()}
    small = {f"teacher.backbone.{entry}": torch.rand(()).expand(shape) for entry, shape in shapes.items()}
    torch.save(small, tmp_path / "last.pth")
    with torch.device("meta"):
        detector = torchvision.models.get_model(f"{name}_resnet50_fpn", weights=None, weights_backbone=None)
    detector.backbone.body.to_empty(device="cpu")
    load_backbone(detector.backbone.body, tmp_path / "last.pth")
    expected = torch.load(tmp_path / "last.pth")
    for entry, value in detector.backbone.body.state_dict().items():
        if not entry.endswith("num_batches_tracked"):
            assert torch.equal(value, expected[f"teacher.backbone.{entry}"])
