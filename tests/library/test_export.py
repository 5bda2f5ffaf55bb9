"""Every layout of checkpoint is read, every target's names are whole, and the features stay the same."""

import argparse
import pickle
import runpy
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18, resnet34, resnet50, vit_b_16
from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2, fcos_resnet50_fpn

import densessl.export
from densessl import EMA, ConvMLP, FeatureMap
from densessl.evaluation._backbones import make_backbone
from densessl.export import Weights, architecture, convert, export, load_backbone, main, read_backbone

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
BACKBONE = {"conv1.weight": torch.rand(4, 3, 3, 3), "layer1.0.bn1.weight": torch.rand(4), "bn1.bias": torch.rand(4)}
FC = {"fc.weight": torch.rand(10, 4)}
HEAD = {"linear1.weight": torch.rand(8, 4, 1, 1), "bn1.weight": torch.rand(8)}


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


PIXPRO = {
    **under("module.encoder.", BACKBONE),
    **under("module.encoder_k.", BACKBONE),
    **under("module.projector.", HEAD),
    **under("module.projector_k.", HEAD),
    "module.value_transform.weight": torch.rand(4, 4, 1, 1),
}
LIGHTNING = {
    **under("encoder.0.", BACKBONE),
    **under("encoder.1.", HEAD),
    **under("target.module.0.", BACKBONE),
    "target._extra_state": {"step": 3},
    "ppm.transform.weight": torch.rand(4, 4, 1, 1),
}
MOCO = under("module.encoder_q.", BACKBONE | FC) | under("module.encoder_k.", BACKBONE | FC) | {"module.queue": FC}
LAYOUTS = {
    "pixpro": {"opt": argparse.Namespace(arch="resnet50"), "model": PIXPRO, "epoch": 100},
    "lightning": {"state_dict": LIGHTNING, "hyper_parameters": {"backbone": "resnet18"}},
    "moco": {"state_dict": MOCO, "arch": "resnet50"},
    "parallel": {"state_dict": under("module.", BACKBONE | FC)},
    "openmmlab": {"state_dict": under("backbone.", BACKBONE) | {"neck.lateral_convs.0.conv.bias": torch.rand(2)}},
    "plain": BACKBONE | FC,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_every_layout_gives_the_same_backbone(layout, zipped, tmp_path):
    torch.save(LAYOUTS[layout], tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    read = read_backbone(tmp_path / "file.pth")
    assert read.weights.keys() == BACKBONE.keys()
    assert all(torch.equal(read.weights[name], BACKBONE[name]) for name in BACKBONE)
    assert not read.parts


def test_every_entry_is_read_or_dropped_with_its_reason(tmp_path):
    for layout, state in (("pixpro", PIXPRO), ("lightning", LIGHTNING), ("plain", BACKBONE | FC)):
        torch.save(LAYOUTS[layout], tmp_path / "file.pth")
        read = read_backbone(tmp_path / "file.pth")
        assert len(read.weights) + len(read.dropped) == len(state)
        assert read.dropped.keys() < state.keys()
        for name, why in read.dropped.items():
            if name.startswith(("module.encoder_k.", "module.projector_k.", "target.")):
                assert "momentum encoder" in why
            else:
                assert why == "classifier" if name.startswith("fc.") else "pretraining only" in why


def test_safetensors_are_read(tmp_path):
    save_file(BACKBONE, tmp_path / "encoder.safetensors")
    read = read_backbone(str(tmp_path / "encoder.safetensors"))
    assert read.weights.keys() == BACKBONE.keys()
    assert not read.dropped


def test_a_module_called_encoder_inside_a_backbone_is_no_root(tmp_path):
    with torch.device("meta"):
        keys = vit_b_16().state_dict().keys()
    state = {name: torch.zeros((1, 1, 2, 2) if name == "conv_proj.weight" else 1) for name in keys}
    torch.save(state, tmp_path / "vit.pth")
    assert read_backbone(tmp_path / "vit.pth").weights.keys() == {n for n in keys if not n.startswith("heads.")}


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.pth", None, "there is no file .*gone.pth"),
        ("text.pth", b"hello", "text.pth is no checkpoint, or is damaged"),
        ("empty.ckpt", b"", "empty.ckpt is no checkpoint, or is damaged"),
        ("empty.safetensors", b"", "empty.safetensors is no checkpoint, or is damaged"),
        ("module.pth", nn.Conv2d(3, 3, 3), "module.pth holds a torch.nn.modules.conv.Conv2d"),
        ("list.pth", [torch.zeros(2)], "list.pth: expected a dict of tensors, got list"),
        ("head.pth", {"state_dict": HEAD}, "head.pth holds no backbone: .* 2 tensors: linear1.weight"),
        ("nothing.pth", {"model": {}}, "nothing.pth holds no backbone: .* 0 tensors: none"),
    ],
)
def test_what_is_no_checkpoint_is_named(name, content, message, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        read_backbone(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_named(zipped, tmp_path):
    path = tmp_path / "half.ckpt"
    torch.save(LAYOUTS["pixpro"], path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"half.ckpt is no checkpoint, or is damaged"):
        read_backbone(path)


def test_nothing_in_a_file_is_run(tmp_path):
    torch.save({"state_dict": BACKBONE, "extra": Malicious(tmp_path / "made")}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"file.pth holds a \S*open"):
        read_backbone(tmp_path / "file.pth")
    assert not (tmp_path / "made").exists()


def test_without_safetensors_the_error_tells_what_to_install(monkeypatch, tmp_path):
    save_file(BACKBONE, tmp_path / "encoder.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'densessl\[export\]'"):
        read_backbone(tmp_path / "encoder.safetensors")


@pytest.fixture(scope="module")
def encoder():
    """A backbone whose every norm differs, so that no two can be mistaken for each other."""
    torch.manual_seed(0)
    model = resnet18()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.1, 0.1)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return FeatureMap(model).eval()


@pytest.fixture(scope="module")
def checkpoint(encoder, tmp_path_factory):
    """A recipe's checkpoint: encoder and head, target, Lightning's wrapping."""
    query = nn.Sequential(encoder, ConvMLP(512, 16, 8))
    state = nn.ModuleDict({"encoder": query, "target": EMA(query)}).state_dict()
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    torch.save({"state_dict": state, "epoch": 3}, path)
    return path


@pytest.mark.parametrize(
    ("to", "suffix"), [("torchvision", ".safetensors"), ("torchvision", ".pth"), ("timm", ".safetensors")]
)
def test_features_stay_the_same(to, suffix, encoder, checkpoint, tmp_path):
    out = tmp_path / f"backbone{suffix}"
    done = export(checkpoint, to, out)
    weights = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    assert weights.keys() == done.weights.keys()
    assert out.stat().st_mode & 0o777 == 0o644
    model = resnet18() if to == "torchvision" else timm.create_model("resnet18")
    assert model.load_state_dict(weights, strict=False) == (["fc.weight", "fc.bias"], [])
    model.eval()
    image = torch.rand(1, 3, 64, 96)
    features = FeatureMap(model)(image) if to == "torchvision" else model.forward_features(image)
    torch.testing.assert_close(features, encoder(image), rtol=0, atol=1e-6)
    assert features.std() > 0.1


def test_timm_opens_the_file_itself(checkpoint, encoder, tmp_path):
    export(checkpoint, "timm", tmp_path / "backbone.safetensors")
    model = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(tmp_path / "backbone.safetensors"))
    assert torch.equal(model.layer4[1].conv2.weight, encoder.get_submodule("layer4.1.conv2").weight)


def names(text):
    return text.split()


# Written from detectron2's and mmdetection's sources: their ResNet, FPN and FCOS heads.
DETECTRON2_R18 = names("""
    stem.conv1
    res2.0.conv1 res2.0.conv2 res2.1.conv1 res2.1.conv2
    res3.0.conv1 res3.0.conv2 res3.0.shortcut res3.1.conv1 res3.1.conv2
    res4.0.conv1 res4.0.conv2 res4.0.shortcut res4.1.conv1 res4.1.conv2
    res5.0.conv1 res5.0.conv2 res5.0.shortcut res5.1.conv1 res5.1.conv2
""")
MMDETECTION_R18 = names("""
    conv1 bn1
    layer1.0.conv1 layer1.0.bn1 layer1.0.conv2 layer1.0.bn2 layer1.1.conv1 layer1.1.bn1 layer1.1.conv2 layer1.1.bn2
    layer2.0.conv1 layer2.0.bn1 layer2.0.conv2 layer2.0.bn2 layer2.1.conv1 layer2.1.bn1 layer2.1.conv2 layer2.1.bn2
    layer3.0.conv1 layer3.0.bn1 layer3.0.conv2 layer3.0.bn2 layer3.1.conv1 layer3.1.bn1 layer3.1.conv2 layer3.1.bn2
    layer4.0.conv1 layer4.0.bn1 layer4.0.conv2 layer4.0.bn2 layer4.1.conv1 layer4.1.bn1 layer4.1.conv2 layer4.1.bn2
    layer2.0.downsample.0 layer2.0.downsample.1 layer3.0.downsample.0 layer3.0.downsample.1
    layer4.0.downsample.0 layer4.0.downsample.1
""")


def detectron2_entries(convolutions):
    return {f"{name}.weight" for name in convolutions} | {f"{n}.norm.{leaf}" for n in convolutions for leaf in NORM}


def detectron2_c5(weights, image):
    """detectron2's ResNet-18, from its names alone."""

    def convolve(x, name, stride=1):
        kernel = weights[f"{name}.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        mean, var, weight, bias = (
            weights[f"{name}.norm.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias)

    x = F.max_pool2d(F.relu(convolve(image, "stem.conv1", 2)), 3, 2, 1)
    for stage in (2, 3, 4, 5):
        for block in (0, 1):
            name, stride = f"res{stage}.{block}", 2 if stage > 2 and block == 0 else 1
            inner = convolve(F.relu(convolve(x, f"{name}.conv1", stride)), f"{name}.conv2")
            x = F.relu(inner + (convolve(x, f"{name}.shortcut", 2) if stride == 2 else x))
    return x


def test_detectron2_names_and_features(checkpoint, encoder, tmp_path):
    export(checkpoint, "detectron2", tmp_path / "r18.pkl")
    content = pickle.loads((tmp_path / "r18.pkl").read_bytes())
    assert (content["__author__"], content["matching_heuristics"]) == ("densessl", True)
    assert content["model"].keys() == detectron2_entries(DETECTRON2_R18)
    weights = {name: torch.from_numpy(value) for name, value in content["model"].items()}
    image = torch.rand(1, 3, 64, 96)
    torch.testing.assert_close(detectron2_c5(weights, image), encoder(image), rtol=0, atol=1e-5)


def test_detectron2_names_of_a_bottleneck():
    blocks = [f"res{stage}.{block}" for stage, count in {2: 3, 3: 4, 4: 6, 5: 3}.items() for block in range(count)]
    convolutions = [f"{block}.conv{number}" for block in blocks for number in (1, 2, 3)]
    shortcuts = ["res2.0.shortcut", "res3.0.shortcut", "res4.0.shortcut", "res5.0.shortcut"]
    with torch.device("meta"):
        state = {name: value for name, value in resnet50().state_dict().items() if not name.startswith("fc.")}
    done = convert(Weights(state, {}, {}), "detectron2")
    assert done.weights.keys() == detectron2_entries(["stem.conv1", *convolutions, *shortcuts])
    assert done.weights["res4.5.conv3.norm.bias"] is state["layer3.5.bn3.bias"]
    assert done.weights["res5.0.shortcut.norm.bias"] is state["layer4.0.downsample.1.bias"]


@pytest.mark.parametrize("to", ["mmdetection", "mmsegmentation"])
def test_openmmlab_names_and_the_way_back(to, checkpoint, tmp_path):
    export(checkpoint, to, tmp_path / "r18.pth")
    content = torch.load(tmp_path / "r18.pth", weights_only=True)
    leaves = {name: NORM if "bn" in name or name.endswith("sample.1") else ("weight",) for name in MMDETECTION_R18}
    expected = {f"backbone.{name}.{leaf}" for name, some in leaves.items() for leaf in some}
    assert content.keys() == {"state_dict", "meta"}
    assert content["state_dict"].keys() == expected
    there, back = read_backbone(checkpoint).weights, read_backbone(tmp_path / "r18.pth").weights
    assert there.keys() == back.keys()
    assert all(torch.equal(there[name], back[name]) for name in there)


@pytest.fixture(scope="module")
def fcos():
    """What a file with torchvision's FCOS would give, without values."""
    with torch.device("meta"):
        return detector(fcos_resnet50_fpn(weights=None, weights_backbone=None))


def detector(model):
    state = model.state_dict()
    body = {n.removeprefix("backbone.body."): v for n, v in state.items() if n.startswith("backbone.body.")}
    parts = {n: v for n, v in state.items() if n.startswith("backbone.fpn.") or "_head.conv." in n}
    return Weights(body, parts, {})


@pytest.mark.parametrize("root", ["", "module.", "encoder.", "encoder.0."])
def test_detectors_are_read_in_parts(root, tmp_path):
    state = {
        "backbone.body.conv1.weight": torch.rand(4, 3, 7, 7),
        "backbone.fpn.inner_blocks.0.0.weight": torch.rand(4, 4, 1, 1),
        "head.regression_head.conv.0.bias": torch.rand(4),
        "head.regression_head.bbox_reg.bias": torch.rand(4),
        "rpn.head.conv.0.0.weight": torch.rand(4, 4, 3, 3),
    }
    torch.save(under(root, state) | under("target.module.", state), tmp_path / "file.pth")
    read = read_backbone(tmp_path / "file.pth")
    assert read.weights.keys() == {"conv1.weight"}
    assert read.parts.keys() == {"backbone.fpn.inner_blocks.0.0.weight", "head.regression_head.conv.0.bias"}
    assert "predicts the classes" in read.dropped[f"{root}head.regression_head.bbox_reg.bias"]
    assert "other than torchvision's FCOS" in read.dropped[f"{root}rpn.head.conv.0.0.weight"]
    assert len(read.dropped) == 2 + len(state)


def test_parts_in_torchvision_names(fcos):
    with torch.device("meta"):
        keys = fcos_resnet50_fpn(weights=None, weights_backbone=None).state_dict().keys()
    predictions = {name for name in keys if "cls_logits" in name or "bbox_" in name}
    assert convert(fcos, "torchvision").weights.keys() == keys - predictions
    assert len(predictions) == 6


@pytest.mark.parametrize("to", ["timm", "detectron2", "mmdetection", "mmsegmentation", "huggingface"])
def test_parts_are_written_in_torchvisions_names_only(to, fcos):
    done, alone = convert(fcos, to), convert(fcos._replace(parts={}), to)
    assert done.weights.keys() == alone.weights.keys()
    assert done.dropped == dict.fromkeys(fcos.parts, "FPN and towers are written in torchvision's names only")


def test_parts_of_other_detectors_keep_torchvisions_names():
    with torch.device("meta"):
        model = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
    done = convert(detector(model), "torchvision").weights
    assert {name for name in model.state_dict() if name.startswith("backbone.")} == done.keys()


@pytest.mark.parametrize("name", ["resnet34", "resnet101", "wide_resnet50_2", "resnext50_32x4d"])
def test_architecture_is_told_by_names_and_shapes(name):
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=0, in_chans=4).state_dict()
    assert architecture(state) == name
    without_counters = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert architecture(without_counters) == name


def test_what_is_no_resnet_of_torchvisions_is_refused(tmp_path):
    with torch.device("meta"):
        state = timm.create_model("resnet18", num_classes=0).state_dict()
    wider = state | {"layer3.0.bn2.bias": torch.empty(300, device="meta")}
    deeper = state | {"layer4.2.conv1.weight": torch.empty(512, 512, 3, 3, device="meta")}
    shorter = {name: value for name, value in state.items() if name != "layer2.1.conv2.weight"}
    for weights, entry in (
        (wider, r"'layer3.0.bn2.bias' is \(300,\), expected \(256,\)"),
        (deeper, "no place for entry 'layer4.2.conv1.weight'"),
        (shorter, "'layer2.1.conv2.weight' is missing"),
    ):
        with pytest.raises(ValueError, match=f"closest is resnet18, but .*{entry}"):
            architecture(weights)
    torch.save(BACKBONE, tmp_path / "small.pth")
    with pytest.raises(ValueError, match=r"checkpoint: .*small.pth does not fit: .*entry"):
        export(tmp_path / "small.pth", "timm", tmp_path / "out.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.pth"]


def test_loading_into_models(checkpoint, encoder, tmp_path):
    model = resnet18(num_classes=5)
    fc = model.fc.weight.clone()
    read = load_backbone(model, checkpoint)
    assert torch.equal(model.layer3[0].bn2.running_var, encoder.get_buffer("layer3.0.bn2.running_var"))
    assert torch.equal(model.fc.weight, fc)
    assert "target._extra_state" in read.dropped

    shallow = FeatureMap(resnet18(), "layer2")
    read = load_backbone(shallow, checkpoint)
    assert torch.equal(shallow.get_submodule("layer2.1.conv1").weight, encoder.get_submodule("layer2.1.conv1").weight)
    assert {n.partition(".")[0] for n, why in read.dropped.items() if "no such module" in why} == {"layer3", "layer4"}


@pytest.mark.parametrize(
    ("make", "entry"),
    [
        (resnet34, "entry 'layer1.2.conv1.weight' is missing"),
        (resnet50, r"entry 'layer1.0.conv1.weight' is \(64, 64, 3, 3\), expected \(64, 64, 1, 1\)"),
    ],
)
def test_loading_another_depth_names_file_and_entry(make, entry, checkpoint):
    with torch.device("meta"):
        model = make()
    with pytest.raises(ValueError, match=f"last.ckpt does not fit the ResNet: {entry}"):
        load_backbone(model, checkpoint)


def test_a_deeper_file_changes_nothing(tmp_path):
    torch.save(resnet34().state_dict(), tmp_path / "r34.pth")
    model = resnet18()
    before = model.conv1.weight.clone()
    with pytest.raises(ValueError, match=r"r34.pth does not fit the ResNet: there is no place for entry 'layer1.2"):
        load_backbone(model, tmp_path / "r34.pth")
    assert torch.equal(model.conv1.weight, before)


@pytest.mark.parametrize(
    ("to", "out", "message"),
    [
        ("keras", "out.pth", "to: expected one of torchvision, timm, detectron2, .*, got 'keras'"),
        ("timm", "out.pkl", r"out: expected a file \*.safetensors or \*.pth or \*.pt for timm, got .*out.pkl"),
        ("detectron2", "out.pth", r"out: expected a file \*.pkl for detectron2"),
        ("mmdetection", "file.pth", "out: .*file.pth is the checkpoint itself"),
    ],
)
def test_wrong_arguments(to, out, message, tmp_path):
    torch.save(BACKBONE, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "file.pth", to, tmp_path / out)
    with pytest.raises(ValueError, match="to: expected one of"):
        convert(Weights(BACKBONE, {}, {}), "keras")


def test_command_line(checkpoint, tmp_path, capsys):
    out = str(tmp_path / "new" / "r18.pth")
    assert main([str(checkpoint), "--to", "mmdetection", "--out", out]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{out}: 120 entries, named for mmdetection",
        "left out 9 of encoder: serves pretraining only, such as projection head and predictor",
        "left out 130 of target: momentum encoder: the query encoder is the one that transfers",
    ]
    assert main([str(checkpoint), "--to", "mmdetection", "--out", out, "--list"]) == 0
    listed = {line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("    ")}
    assert listed == read_backbone(checkpoint).dropped.keys()


def test_command_line_ends_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export", "gone.pth", "--to", "timm", "--out", "out.pth"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(densessl.export.__file__, run_name="__main__")  # as python -m does, without a new process
    assert capsys.readouterr() == ("", "error: path: there is no file gone.pth\n")


def test_a_resnet_that_was_cut_is_told_by_its_name(tmp_path):
    """As own_images.md has it without a GPU: a ResNet-18 up to layer3."""
    file, out = tmp_path / "cut.safetensors", tmp_path / "out.safetensors"
    save_file(FeatureMap(resnet18(), "layer3").state_dict(), file)
    with pytest.raises(ValueError, match=r"got a resnet18 up to layer3; name it, for instance --model resnet18$"):
        export(file, "timm", out)
    with pytest.raises(ValueError, match=r"got a resnet18 up to layer3$"):
        export(file, "torchvision", out)
    export(file, "timm", out, model="resnet18")
    missing, unexpected = timm.create_model("resnet18").load_state_dict(load_file(out), strict=False)
    assert not unexpected
    assert {name.partition(".")[0] for name in missing} == {"layer4", "fc"}
    with pytest.raises(ValueError, match=r"as in --backbone torchvision/resnet18 --layer layer3 --weights .*cut"):
        make_backbone(str(file), "default", None)
    make_backbone("torchvision/resnet18", str(file), "layer3")


def test_resnets_that_begin_alike_are_all_named():
    def begins(model, *parts):
        return {name: value for name, value in model.state_dict().items() if name.partition(".")[0] in parts}

    first = ("conv1", "bn1", "layer1", "layer2")
    with pytest.raises(ValueError, match=r"got a resnet50 or resnet101 up to layer2$"):
        architecture(begins(resnet50(), *first))
    with pytest.raises(ValueError, match=r"got a resnet18 up to layer2$"):
        architecture(begins(resnet18(), *first))
    for parts in (("conv1", "bn1", "layer2"), ("conv1", "layer1", "layer2"), (*first, "layer4")):
        with pytest.raises(ValueError, match=r"closest is resnet18, but entry .* is missing"):
            architecture(begins(resnet18(), *parts))
    shallow = resnet18()
    del shallow.layer2[1]  # no network of torchvision's
    with pytest.raises(ValueError, match="closest is resnet18"):
        architecture(begins(shallow, *first))
