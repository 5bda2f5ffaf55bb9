"""Random files of real networks: each is read rightly, or refused by the file's name with what could be chosen."""

import random
import re

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import nn
from transformers import ResNetConfig, ResNetModel

from densessl._naming import to_huggingface
from densessl.checkpoints import load_backbone, read_backbone

WIDTHS = (6, 8, 10, 12)
WRAPPERS = [
    *("module.", "_orig_mod.", "module.base_encoder.", "backbone.0.", "backbone.", "encoder.", "encoder.0."),
    *("model.", "net.", "student.", "teacher.", "module.backbone.", "method.encoder.backbone.", "my_encoder.trunk."),
]
AVERAGES = ["module.momentum_encoder.", "target.module.", "encoder_k.", "target_network.", "model_ema."]
HEADS = ["fc.", "head.", "head.mlp.", "projector.", "predictor.0.", "module.projection_head.", "prototypes."]


def resnet(classes=0):
    """With the names of torchvision's."""
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=classes, channels=WIDTHS)


def vit(classes=0):
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 12, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **sizes)


def hugging_face():
    """The same network as ``resnet``, under the names of transformers."""
    config = ResNetConfig(embedding_size=64, hidden_sizes=WIDTHS, depths=(1, 1, 1, 1), layer_type="basic")
    return ResNetModel(config)


def filled(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """A state with values of its own in each entry."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value + seed
        for name, value in model.state_dict().items()
    }


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def broken(state, rng):
    """A fault that no reading can mend: an entry is missing, renamed, moved, too much or of another shape."""
    backbone = [n for n in state if n.endswith("weight") and not n.startswith(("fc.", "head."))]
    name, changed = rng.choice(backbone), dict(state)
    kind = rng.choice(["missing", "renamed", "moved", "too much", "shape"])
    value = changed[name] if kind in ("too much", "shape") else changed.pop(name)
    if kind == "renamed":
        changed[re.sub(r"(\w+)\.weight$", r"\1_.weight", name)] = value
    elif kind == "moved":
        changed[f"elsewhere.{name}"] = value
    elif kind == "too much":
        changed[
            re.sub(r"(layer|blocks\.|stages\.)\d", r"\g<1>3.9", name) if re.search(r"\d", name) else f"{name}.1"
        ] = value
    elif kind == "shape":
        changed[name] = value[:-1]
    return changed


def prefix_of(rng):
    return "".join(rng.sample(WRAPPERS, rng.choice([0, 1, 1, 1, 2])))


def wrapped(content, rng):
    """As files nest their state dicts."""
    entries = list(content.items())
    rng.shuffle(entries)
    content = dict(entries)
    forms = [content, {"state_dict": content}, {"model": content, "epoch": 3, "args": {"lr": 0.1}}]
    return rng.choice([*forms, {"state_dict": {"model": content}}])


@pytest.mark.parametrize("seed", range(50))
def test_random_files_are_read_rightly_or_refused_by_name(seed, tmp_path):
    rng, file = random.Random(seed), tmp_path / rng_name(seed)
    make = rng.choice([resnet, vit])
    state = filled(make(), 1)
    expected = dict(state)
    is_broken = rng.random() < 0.3
    if is_broken:
        state = broken(state, rng)
    elif make is resnet and rng.random() < 0.4:
        state = {to_huggingface(name): value for name, value in state.items()}
        hugging_face().load_state_dict(state)  # the names are those of transformers
    prefix = prefix_of(rng)
    content = under(prefix, state)
    for head in rng.sample(HEADS, rng.randrange(3)):
        content[f"{rng.choice(['', prefix])}{head}weight"] = torch.zeros(4, 4)
    second = rng.choice(["none", "none", "average", "another"])
    other = ""
    if second == "average":
        content |= under(rng.choice(AVERAGES), filled(make(), 2))
    elif second == "another" and prefix:
        other = rng.choice([w for w in WRAPPERS if not w.startswith(prefix) and not prefix.startswith(w)])
        content |= under(other, filled(make(), 2))
    torch.save(wrapped(content, rng), file)

    def read(root=None):
        model, message = make(7), None
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            load_backbone(model, file, root)
        except ValueError as caught:
            message = str(caught)
        after = model.state_dict()
        if message is not None:
            assert all(torch.equal(before[name], value) for name, value in after.items())
            assert message.startswith(f"path: {file} ")
        return after, message

    def is_state(after, state):
        return all(torch.equal(after[name], value) for name, value in state.items())

    after, message = read()
    if is_broken:
        if other:  # the whole one fits
            assert message is not None or is_state(after, filled(make(), 2))
        else:
            assert message is not None
        return
    if not other:
        assert message is None, message
        assert is_state(after, expected)
        return
    if message is None:  # a file of this library's own recipes: the encoder is meant
        assert any(re.match(r"(module\.|method\.)*encoder\.", name) for name in (prefix, other))
        roots = {prefix.removesuffix("."), other.removesuffix(".")}
    else:
        assert f"{file} holds 2 backbones, " in message
        roots = set(re.findall(r"'([^']*)'", message.partition("backbones, ")[2].partition(": choose")[0]))
    read_back = [read(root) for root in sorted(roots)]
    assert [message for _, message in read_back] == [None, None]
    assert {is_state(after, expected) for after, _ in read_back} == {True, False}
    assert {is_state(after, filled(make(), 2)) for after, _ in read_back} == {True, False}


def rng_name(seed):
    return ("checkpoint.pth", "weights.ckpt", "model_final.pt", "pytorch_model.bin")[seed % 4]


@pytest.mark.parametrize("seed", range(6))
def test_students_and_teachers_are_told_apart(seed, tmp_path):
    rng, file = random.Random(seed), tmp_path / "dino.pth"
    make = rng.choice([resnet, vit])
    inner = {name: rng.choice(["", "module.", "backbone.", "module.backbone."]) for name in ("student", "teacher")}
    states = {name: filled(make(), number) for number, name in enumerate(inner, 1)}
    file_content = {
        name: under(inner[name], states[name]) | {f"{inner[name]}head.mlp.0.weight": torch.zeros(4, 4)}
        for name in inner
    }
    torch.save(file_content | {"epoch": 1, "optimizer": {"state": {}, "param_groups": []}}, file)
    named = ", ".join(f"'{name}.{inner[name]}'" for name in inner)
    for call in (read_backbone, lambda path: load_backbone(make(), path)):
        with pytest.raises(ValueError, match=rf"{file} holds 2 backbones, {named}: choose one, as in root="):
            call(file)
    for name, state in states.items():
        load_backbone(model := make(), file, name)
        assert all(torch.equal(model.state_dict()[entry], value) for entry, value in state.items())


def test_networks_of_another_kind_are_refused(tmp_path):
    for make, other in ((resnet, vit), (vit, resnet)):
        torch.save(under("module.", filled(make(), 1)), tmp_path / "file.pth")
        with pytest.raises(ValueError, match=r"path: .*file.pth does not fit the (VisionTransformer|ResNet): "):
            load_backbone(other(), tmp_path / "file.pth")
