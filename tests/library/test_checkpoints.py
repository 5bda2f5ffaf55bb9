"""The backbone of a file is found whatever stands before its names; else the file is refused, by name."""

import pickle
import random
import re
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18, vit_b_16
from torchvision.models.detection import fcos_resnet50_fpn

from densessl import EMA, ConvMLP, FeatureMap
from densessl._naming import from_detectron2, from_huggingface, to_detectron2, to_huggingface
from densessl.checkpoints import load_backbone, read_backbone
from densessl.export import export


def tiny(fill):
    """A ResNet-18's names with four channels each, every value equal, so that two networks are told apart."""
    shapes = {name: value.ndim for name, value in META.items()}
    kernel = {name: value.shape[-1] for name, value in META.items() if value.ndim == 4}
    return {
        name: torch.full((4, 4, kernel[name], kernel[name]) if ndim == 4 else (4,) * ndim, float(fill))
        for name, ndim in shapes.items()
    }


class Tiny(nn.Module):
    """A model with the entries of ``tiny``, and a classifier."""

    def __init__(self):
        super().__init__()
        for name, value in {**tiny(0), "fc.weight": torch.zeros(3, 4)}.items():
            owner = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_buffer(leaf, value.clone())


with torch.device("meta"):
    META = {name: value for name, value in resnet18().state_dict().items() if not name.startswith("fc.")}


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def head(prefix):
    return {f"{prefix}0.weight": torch.zeros(4, 4), f"{prefix}1.running_mean": torch.zeros(4)}


def counted(state):
    numbers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    return {f"{numbers[n.partition('.')[0]]}.{n.partition('.')[2]}": v for n, v in state.items()}


def compiled(state):
    return {
        re.sub(r"^(layer\d)\.", r"\1._orig_mod.", name) if "layer3" in name else name: v for name, v in state.items()
    }


HF = {to_huggingface(name): value for name, value in tiny(1).items()}
DETECTRON2 = {to_detectron2(name): value for name, value in tiny(1).items()}
PREFIXES = {
    "MoCo v3": under("module.base_encoder.", tiny(1) | head("fc.")) | under("module.momentum_encoder.", tiny(2)),
    "MoCo": under("module.encoder_q.", tiny(1)) | under("module.encoder_k.", tiny(2)),
    "VICReg": under("module.backbone.", tiny(1)) | head("module.projector."),
    "SwAV": under("module.", tiny(1) | head("projection_head.")) | {"module.prototypes.weight": torch.zeros(5, 4)},
    "DINO teacher": under("teacher.", under("backbone.", tiny(1)) | head("head.mlp.")),
    "DINOv2 teacher": under("teacher.backbone.", tiny(1)) | head("teacher.dino_head."),
    "BYOL": under("online_network.", tiny(1)) | under("target_network.", tiny(2)),
    "BYOL counted": under("online_network_state_dict.encoder.", counted(tiny(1)))
    | under("target_network_state_dict.encoder.", counted(tiny(2))),
    "lightly": under("backbone.0.", tiny(1)) | head("projection_head.layers."),
    "lightly counted": under("backbone.", counted(tiny(1))) | under("backbone_momentum.", counted(tiny(2))),
    "compiled": under("_orig_mod.", tiny(1)),
    "compiled in a recipe": under("encoder.0._orig_mod.", tiny(1)),
    "compiled in parts": compiled(tiny(1)),
    "recipe": under("encoder.0.", tiny(1)) | head("encoder.1.") | under("target.module.0.", tiny(2)),
    "two heads": under("encoder.backbone.", tiny(1)) | under("target.module.backbone.", tiny(2)),
    "method": under("method.encoder.0.", tiny(1)) | under("method.target.module.0.", tiny(2)) | head("method.ppm."),
    "method, two heads": under("method.encoder.backbone.", tiny(1)) | under("method.target.module.backbone.", tiny(2)),
    "method, compiled": under("method._orig_mod.encoder.0.", tiny(1)) | under("method._orig_mod.target.0.", tiny(2)),
    "OpenMMLab": under("backbone.", tiny(1)) | {"neck.lateral_convs.0.conv.weight": torch.zeros(4, 4, 3, 3)},
    "transformers": under("resnet.", HF) | {"classifier.1.weight": torch.zeros(3, 4)},
    "transformers' base": HF,
    "TimmWrapper": under("timm_model.", tiny(1)),
    "detectron2": under("backbone.bottom_up.", DETECTRON2)
    | {"proposal_generator.conv.weight": torch.zeros(4, 4, 3, 3)},
    "segmentation": under("encoder.", tiny(1)) | {"decoder.blocks.0.conv1.0.weight": torch.zeros(4, 4, 3, 3)},
    "another": under("my.own.net.", tiny(1)) | head("my.own.head."),
}


@pytest.mark.parametrize("case", PREFIXES)
def test_every_prefix_is_found(case, tmp_path):
    torch.save({"state_dict": PREFIXES[case], "epoch": 3}, tmp_path / "file.pth")
    read, model = read_backbone(tmp_path / "file.pth"), Tiny()
    assert read.weights.keys() == META.keys()
    assert all((value == 1).all() for value in read.weights.values())
    assert len(read.weights) + len(read.dropped) == len(PREFIXES[case])
    load_backbone(model, tmp_path / "file.pth")
    assert all((value == (0 if name.startswith("fc.") else 1)).all() for name, value in model.state_dict().items())


def test_dicts_in_a_file_are_spread_out(tmp_path):
    file = tmp_path / "dino.pth"
    student = under("module.backbone.", tiny(1)) | head("module.head.mlp.")
    optimizer = {"state": {0: {"exp_avg": torch.zeros(4, 4, 3, 3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"student": student, "teacher": under("backbone.", tiny(2)), "optimizer": optimizer, "epoch": 3}, file)
    for call in (read_backbone, lambda path: load_backbone(Tiny(), path)):
        with pytest.raises(ValueError, match=r"dino.pth holds 2 backbones, 'student.module.backbone.', 'teacher.back"):
            call(file)
    for root, value in (("teacher", 2), ("teacher.backbone.", 2), ("student", 1), ("student.module", 1)):
        assert (read_backbone(file, root).weights["bn1.weight"] == value).all()
        read, model = load_backbone(model := Tiny(), file, root=root), model
        assert (model.get_buffer("layer4.1.conv2.weight") == value).all()
        other = "student.module.backbone." if value == 2 else "teacher.backbone."
        assert (
            read.dropped[f"{other}bn1.weight"]
            == f"another copy of the backbone, which root={other!r} reads in place of this one"
        )
    with pytest.raises(ValueError, match=r"root: expected one of 'student.module.backbone.', 'teacher.*, got 'tutor'"):
        read_backbone(file, "tutor")


def test_a_momentum_encoder_is_read_where_it_is_asked_for(tmp_path):
    torch.save(PREFIXES["MoCo v3"], tmp_path / "file.pth")
    read = read_backbone(tmp_path / "file.pth", "module.momentum_encoder")
    assert all((value == 2).all() for value in read.weights.values())
    torch.save({"state_dict": tiny(1), "state_dict_ema": tiny(2)}, tmp_path / "file.pth")
    assert (read_backbone(tmp_path / "file.pth", "state_dict_ema").weights["bn1.bias"] == 2).all()


def test_a_root_that_a_message_names_can_be_chosen_though_a_wrapper_has_its_name(tmp_path):
    states = under("model.", tiny(1)) | under("net.", tiny(2))
    for content in ({"model": states}, {"state_dict": {"model": states}}, {"model": under("_orig_mod.", states)}):
        torch.save(content, tmp_path / "file.pth")
        with pytest.raises(ValueError, match=r"holds 2 backbones, 'model.', 'net.': choose one"):
            read_backbone(tmp_path / "file.pth")
        for root, value in (("model.", 1), ("net.", 2), ("model", 1)):
            assert (read_backbone(tmp_path / "file.pth", root).weights["bn1.bias"] == value).all()


def test_the_models_architecture_chooses_among_networks(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1, embed_dim=6, num_heads=1)
    torch.save({"student": tiny(1), "teacher": vit.state_dict()}, tmp_path / "distilled.pth")
    load_backbone(model := Tiny(), tmp_path / "distilled.pth")
    assert (model.get_buffer("bn1.bias") == 1).all()


def test_a_model_with_names_of_its_own_is_found(tmp_path):
    model = nn.Sequential(OrderedDict(first=nn.Conv2d(3, 4, 3), second=nn.BatchNorm2d(4)))
    state = under("anything.at.all.", model.state_dict()) | head("anything.at.head.")
    torch.save(state, tmp_path / "file.pth")
    fresh = nn.Sequential(OrderedDict(first=nn.Conv2d(3, 4, 3), second=nn.BatchNorm2d(4)))
    load_backbone(fresh, tmp_path / "file.pth")
    assert torch.equal(fresh.first.weight, model.first.weight)


def test_a_compiled_model_is_loaded(tmp_path):
    torch.save(resnet18().state_dict() | {"bn1.bias": torch.full((64,), 3.0)}, tmp_path / "file.pth")
    load_backbone(torch.compile(model := resnet18()), tmp_path / "file.pth")
    assert (model.bn1.bias == 3).all()


def test_a_vits_encoder_is_no_root(tmp_path):
    with torch.device("meta"):
        meta = vit_b_16(num_classes=2).state_dict()
    state = {name: torch.zeros(1).expand(value.shape) for name, value in meta.items()}
    torch.save(under("teacher.backbone.", state), tmp_path / "vit.pth")
    read = read_backbone(tmp_path / "vit.pth")
    assert read.weights.keys() == {name for name in state if not name.startswith("heads.")}


def test_an_entry_under_another_prefix_is_not_called_missing(tmp_path):
    split = {("base." if name.startswith("layer4") else "") + name: value for name, value in tiny(1).items()}
    torch.save(under("body.a.", split) | under("head.a.", {}), tmp_path / "file.pth")
    torch.save(split, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"'layer4.0.conv1.weight' is not below '', but the file has 'base.layer4.0"):
        load_backbone(Tiny(), tmp_path / "file.pth")


def test_this_librarys_detectron2_files_are_read_back(tmp_path):
    torch.manual_seed(0)
    torch.save((model := resnet18()).state_dict(), tmp_path / "r18.pth")
    export(tmp_path / "r18.pth", "detectron2", tmp_path / "r18.pkl")
    load_backbone(again := resnet18(), tmp_path / "r18.pkl")
    expected = {name: value for name, value in model.state_dict().items() if not name.startswith("fc.")}
    assert all(torch.equal(again.state_dict()[name], value) for name, value in expected.items())


def test_pickles_of_the_second_protocol_are_read(tmp_path):
    arrays = {name: value.numpy() for name, value in DETECTRON2.items()}
    (tmp_path / "old.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}, protocol=2))
    assert read_backbone(tmp_path / "old.pkl").weights.keys() == META.keys()


def test_openmmlabs_numpy_scalars_are_read(tmp_path):
    meta = {"epoch": np.int64(3), "lr": np.float64(0.1), "small": np.float32(1), "history": np.arange(4)}
    torch.save({"meta": meta, "state_dict": under("backbone.", tiny(1)), "message_hub": meta}, tmp_path / "mm.pth")
    assert read_backbone(tmp_path / "mm.pth").weights.keys() == META.keys()


def test_openmmlabs_log_is_read_without_its_package(tmp_path, monkeypatch):
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": module.__name__})
    with monkeypatch.context() as installed:
        for name in ("mmengine", "mmengine.logging"):
            installed.setitem(sys.modules, name, types.ModuleType(name))
        installed.setitem(sys.modules, module.__name__, module)
        log = module.HistoryBuffer()
        log._log_history = np.ones(3)
        torch.save({"message_hub": {"loss": log}, "state_dict": under("backbone.", tiny(1))}, tmp_path / "mm.pth")
    assert read_backbone(tmp_path / "mm.pth").weights.keys() == META.keys()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["file.pth", "file.ckpt", "file.pkl"])
def test_what_is_refused_as_unsafe_says_so_and_how_to_convert_it(name, tmp_path):
    content = {"state_dict": tiny(1), "extra": Malicious(tmp_path / "made")}
    if name.endswith("pkl"):
        (tmp_path / name).write_bytes(pickle.dumps({"model": {}, "extra": Malicious(tmp_path / "made")}))
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} holds a \S*open and was refused as unsafe: .*weights_only.*convert"):
        read_backbone(tmp_path / name)
    assert not (tmp_path / "made").exists()


def test_refused_too_are_modules_and_system_calls(tmp_path):
    torch.save(nn.Conv2d(3, 3, 3), tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"holds a torch.nn.modules.conv.Conv2d and was refused as unsafe"):
        read_backbone(tmp_path / "module.pth")
    (tmp_path / "system.pkl").write_bytes(b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00exit\x85R.")
    with pytest.raises(ValueError, match=r"holds a posix.system and was refused as unsafe"):
        read_backbone(tmp_path / "system.pkl")


def test_recipes_checkpoints_of_both_kinds_are_read(tmp_path):
    encoder = nn.Sequential(FeatureMap(resnet18()), ConvMLP(512, 8, 4))
    module = nn.ModuleDict({"encoder": encoder, "target": EMA(encoder)})
    states = (module.state_dict(), nn.ModuleDict({"method": module}).state_dict())
    for state in states:
        torch.save({"state_dict": state, "optimizer_states": [{"state": {}}]}, tmp_path / "last.ckpt")
        load_backbone(model := resnet18(), tmp_path / "last.ckpt")
        assert torch.equal(model.layer4[1].conv2.weight, encoder[0].state_dict()["layer4.1.conv2.weight"])


@pytest.mark.parametrize("root", ["method.encoder.", "method.encoder.0.", "method._orig_mod.encoder."])
def test_detectors_under_a_method_are_read_in_parts(root, tmp_path):
    with torch.device("meta"):
        names = fcos_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    state = {name: torch.zeros(value.shape[:0] + (1,) * value.ndim) for name, value in names.items()}
    state["backbone.body.conv1.weight"] = torch.zeros(1, 1, 7, 7)
    torch.save(under(root, state) | under("method.target.module.", state), tmp_path / "file.pth")
    read = read_backbone(tmp_path / "file.pth")
    assert read.weights.keys() == {n.removeprefix("backbone.body.") for n in names if n.startswith("backbone.body.")}
    assert {n for n in names if n.startswith("backbone.fpn.")} < read.parts.keys()
    assert any("_head.conv." in name for name in read.parts)


@pytest.mark.parametrize(("to_other", "back"), [(to_detectron2, from_detectron2), (to_huggingface, from_huggingface)])
def test_names_go_there_and_back(to_other, back):
    with torch.device("meta"):
        for model in (timm.create_model("resnet18", num_classes=0), timm.create_model("resnet50", num_classes=0)):
            names = list(model.state_dict())
            assert [back(to_other(name)) for name in names] == names
            assert len({to_other(name) for name in names}) == len(names)


WORDS = ["module", "method", "encoder", "backbone", "net", "model", "student", "trunk", "_orig_mod", "0", "my_encoder"]
AVERAGES = ["target.module", "momentum_encoder", "encoder_k", "target_network", "model_ema"]


def mutilated(state, rng):
    """A fault that makes a state another network's, or none."""
    name = rng.choice([name for name in state if not name.endswith("num_batches_tracked")])
    kind = rng.choice(["missing", "shape", "extra", "moved"])
    changed = dict(state)
    if kind == "shape":
        changed[name] = torch.ones(*state[name].shape, 2)
    else:
        del changed[name]
    if kind == "extra":
        changed["layer2.7.conv1.weight"] = state[name]
    if kind == "moved":
        changed[f"elsewhere.{name}"] = state[name]
    return changed


@pytest.mark.parametrize("seed", range(30))
def test_random_files_are_read_right_or_refused_by_name(seed, tmp_path):
    rng = random.Random(seed)
    prefix = "".join(f"{word}." for word in rng.choices(WORDS, k=rng.randrange(5)))
    form = rng.choice([lambda s: s, compiled, counted, lambda s: {to_huggingface(n): v for n, v in s.items()}])
    broken = rng.random() < 0.4
    state = mutilated(tiny(1), rng) if broken else tiny(1)
    content = under(prefix, state if broken else form(state)) | head(
        rng.choice(["projector.", "head.", f"{prefix}projector."])
    )
    if rng.random() < 0.5:
        content |= under(f"{rng.choice(['', 'module.', 'method.'])}{rng.choice(AVERAGES)}.", tiny(2))
    entries = list(content.items())
    rng.shuffle(entries)
    content = dict(entries)
    file = tmp_path / rng.choice(["file.pth", "file.ckpt", "file.safetensors", "file.pkl"])
    if file.suffix == ".safetensors":
        save_file(content, file)
    elif file.suffix == ".pkl":
        file.write_bytes(pickle.dumps({"model": {name: value.numpy() for name, value in content.items()}}))
    else:
        torch.save(rng.choice([content, {"state_dict": content}, {"model": content}]), file)
    model, error = Tiny(), None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        load_backbone(model, file)
    except ValueError as caught:
        error = str(caught)
    assert (error is not None) == broken, error
    expected = before if broken else before | tiny(1)
    assert all(torch.equal(expected[name], value) for name, value in model.state_dict().items())
    if error is not None:
        assert error.startswith(f"path: {file} ")
        missing = re.search(r"entry '(\S+)' is missing", error)
        assert missing is None or f"elsewhere.{missing[1]}" not in error
        assert missing is None or not any(name.endswith(f"elsewhere.{missing[1]}") for name in content)


def renamed(old, new):
    return {new(name): value for name, value in old.items()}


def test_names_that_nearly_fit_are_shown_beside_those_that_were_expected(tmp_path):
    """Two libraries may name one network's entries alike up to an underscore, which no first entry tells."""
    torch.save(under("net.", renamed(tiny(1), lambda name: f"_{name}")), tmp_path / "file.pth")
    with pytest.raises(ValueError, match="does not fit the Tiny: ") as caught:
        load_backbone(Tiny(), tmp_path / "file.pth")
    told = str(caught.value)
    entries = sum(not name.endswith("num_batches_tracked") for name in META)
    assert (
        f"does not fit the Tiny: entry 'conv1.weight' is missing; the file lacks {entries} of {entries} entries" in told
    )
    assert "such as 'conv1.weight', 'bn1.weight' and 'bn1.bias'" in told
    assert told.endswith("the closest that it has are 'net._conv1.weight', 'net._bn1.weight' and 'net._bn1.bias'")


def test_names_that_are_nothing_alike_are_shown_too(tmp_path):
    torch.save(renamed(tiny(1), lambda name: f"Q{sum(map(ord, name))}.{len(name)}.{name[::-1]}"), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"does not fit the Tiny: .* in their place it has 'Q.*', 'Q.*' and 'Q.*'$"):
        load_backbone(Tiny(), tmp_path / "file.pth")


def test_entries_without_a_place_are_counted(tmp_path):
    deeper = tiny(1) | {f"layer1.{block}.conv1.weight": torch.ones(4, 4, 3, 3) for block in (2, 3, 4, 5)}
    torch.save(deeper, tmp_path / "file.pth")
    with pytest.raises(
        ValueError,
        match=r"no place for entry 'layer1.2.conv1.weight'; .*none for 4 .*layer1.3.conv1.weight' and 'layer1.4",
    ):
        load_backbone(Tiny(), tmp_path / "file.pth")


def test_one_entry_that_does_not_fit_is_named_once(tmp_path):
    torch.save(tiny(1) | {"bn1.bias": torch.ones(7)}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"the Tiny: entry 'bn1.bias' is \(7,\), expected \(4,\)$"):
        load_backbone(Tiny(), tmp_path / "file.pth")
    torch.save({name: value for name, value in tiny(1).items() if name != "bn1.bias"}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"the Tiny: entry 'bn1.bias' is missing$"):
        load_backbone(Tiny(), tmp_path / "file.pth")


def test_a_model_that_is_cut_is_called_by_its_own_name(tmp_path):
    torch.save(tiny(1), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"does not fit the ResNet: "):
        load_backbone(FeatureMap(resnet18()), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"does not fit my own network: "):
        load_backbone(FeatureMap(resnet18()), tmp_path / "file.pth", name="my own network")
