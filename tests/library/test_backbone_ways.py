"""FeatureMap keeps hooks, gradient checkpointing and FSDP by blocks; Hugging Face's models and torch.hub's."""

import copy
import os
import warnings
from contextlib import suppress
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision.models as tv
from torch import Tensor, nn

from densessl import EMA, FeatureMap


def small_timm_vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=(64, 96), depth=3)


@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing(when):
    model = small_timm_vit()
    if when == "before":
        model.set_grad_checkpointing(True)
    encoder = FeatureMap(model, "blocks.1").train()
    if when == "after":
        encoder.set_grad_checkpointing()
    calls = []
    model.blocks[0].attn.register_forward_hook(lambda *args: calls.append(1))
    encoder(torch.randn(1, 3, 64, 96)).sum().backward()
    assert len(calls) == 2  # once more in the backward pass
    with pytest.raises(ValueError, match=r"model: .* has no set_grad_checkpointing"):
        FeatureMap(tv.resnet18()).set_grad_checkpointing()


def test_hooks_fire_and_change_what_comes_out():
    for model, layer, part in (
        (tv.resnet18(), "layer2", "layer1"),
        (tv.VisionTransformer((32), 8, 2, 2, 32, 64), "encoder.ln", "encoder.layers"),
        (timm.create_model("convnext_atto"), "stages.2", "stages.1"),
        (small_timm_vit(), "norm", "blocks.1"),
    ):
        encoder = FeatureMap(model, layer).eval()
        size = (32, 32) if layer == "encoder.ln" else (64, 96)
        x = torch.randn(1, 3, *size)
        before = encoder(x)
        assert model.get_submodule(part) is encoder.get_submodule(part)
        handle = encoder.get_submodule(part).register_forward_hook(lambda module, args, out: out + 1)
        assert not torch.equal(encoder(x), before)
        handle.remove()
        assert torch.equal(encoder(x), before)


def test_the_model_stays_whole():
    model = small_timm_vit()
    names, x = list(model.state_dict()), torch.randn(1, 3, 64, 96)
    before = model.eval()(x)
    encoder = FeatureMap(model, "blocks.0")
    assert list(model.state_dict()) == names
    assert torch.equal(model(x), before)
    assert len(encoder.blocks) == 1
    assert {name.split(".")[0] for name in encoder.state_dict()} == {"cls_token", "pos_embed", "patch_embed", "blocks"}


def test_compiled():
    encoder = FeatureMap(small_timm_vit(), "norm").eval()
    x = torch.randn(1, 3, 64, 96)
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), encoder(x))


def shard(rank: int, folder: str, out: Any) -> None:
    warnings.filterwarnings("ignore")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    for name, model, layer, blocks in (
        ("timm", small_timm_vit(), "blocks.1", "blocks"),
        ("torchvision", tv.resnet18(), "layer2", "layer1"),
    ):
        encoder = FeatureMap(model, layer).eval()
        x = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            expected = encoder(x)
        for block in encoder.get_submodule(blocks).children():
            fully_shard(block, mesh=mesh)
        fully_shard(encoder, mesh=mesh)
        features = encoder(x)
        features.sum().backward()
        out[rank, name] = float((features - expected).abs().max())
    dist.barrier()  # both have told their figures before either ends
    os._exit(0)  # gloo's threads, which the mesh keeps, may abort a process while Python shuts down


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this version of torch shards on GPUs only")
def test_fully_sharded_by_blocks(tmp_path):
    with mp.Manager() as manager:
        out = manager.dict()
        mp.spawn(shard, (os.fspath(tmp_path), out), nprocs=2)
        assert len(out) == 4
        assert max(out.values()) < 1e-5


def test_size_of_torchvisions_vit():
    encoder = FeatureMap(tv.VisionTransformer(32, 8, 2, 2, 32, 64), "encoder.ln")
    with pytest.raises(ValueError, match="image: VisionTransformer was made for 32x32 pixels, got 32x48"):
        encoder(torch.zeros(1, 3, 32, 48))


def hugging_face_models() -> dict[str, tuple[Any, list[str], tuple[int, int]]]:
    hf = pytest.importorskip("transformers")
    vit = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    convnext = {"hidden_sizes": [8, 16, 32], "depths": [1, 2, 1], "num_stages": 3}
    swin = {"embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "window_size": 4, "image_size": 64}
    dinov2 = hf.Dinov2Config(**vit, image_size=70, patch_size=14)
    registers = hf.Dinov2WithRegistersConfig(**vit, image_size=70, patch_size=14, num_register_tokens=4)
    dinov3 = hf.DINOv3ViTConfig(**vit, patch_size=16, num_register_tokens=4)
    return {
        "dinov2": (hf.Dinov2Model(dinov2), ["encoder.layer.0", "encoder.layer.2", "layernorm"], (70, 42)),
        "registers": (hf.Dinov2WithRegistersModel(registers), ["encoder.layer.1", "layernorm"], (70, 42)),
        "dinov3": (hf.DINOv3ViTModel(dinov3), ["model.layer.0", "model.layer.2", "norm"], (64, 96)),
        "vit": (hf.ViTModel(hf.ViTConfig(**vit, image_size=64)), ["layers.0", "layers.2", "layernorm"], (64, 64)),
        "convnext": (
            hf.ConvNextModel(hf.ConvNextConfig(**convnext)),
            ["encoder.stages.0", "encoder.stages.2"],
            (64, 96),
        ),
        "swin": (hf.SwinModel(hf.SwinConfig(**swin)), ["encoder.layers.0", "encoder.layers.2", "layernorm"], (64, 96)),
    }


NORMS = ("layernorm", "norm")


@pytest.mark.parametrize("name", ["dinov2", "registers", "dinov3", "vit", "convnext", "swin"])
def test_hugging_face(name):
    model, layers, size = hugging_face_models()[name]
    model.eval()
    x, blocks = torch.randn(2, 3, *size), [layer for layer in layers if layer not in NORMS]
    several = dict(zip(blocks, FeatureMap(model, layers=blocks)(x), strict=True))
    for layer in layers:
        encoder, seen = FeatureMap(model, layer), []
        handle = model.get_submodule(layer).register_forward_hook(lambda module, args, out, to=seen: to.append(out))
        model(x)
        handle.remove()
        out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        features = encoder(x)
        h, w = features.shape[-2:]
        assert h * size[1] == w * size[0]
        expected = out if out.ndim == 4 else out[:, out.shape[1] - h * w :].mT.unflatten(2, (h, w))
        torch.testing.assert_close(features, expected)
        torch.testing.assert_close(several.get(layer, features), features)
        torch.testing.assert_close(EMA(encoder).module(x), features)
        features.sum().backward()
        left = {key for key, p in encoder.named_parameters() if p.grad is None}
        assert left <= {"embeddings.mask_token"}  # which the model itself uses for masked patches alone
        assert set(encoder.state_dict()) <= set(model.state_dict())
        model.zero_grad(set_to_none=True)


def test_hugging_face_backbones():
    hf = pytest.importorskip("transformers")
    config = hf.ConvNextConfig(
        hidden_sizes=[8, 16, 32], depths=[1, 1, 1], num_stages=3, out_features=["stage1", "stage3"]
    )
    model, x = hf.AutoBackbone.from_config(config).eval(), torch.randn(1, 3, 64, 96)
    own = model(x).feature_maps
    torch.testing.assert_close(FeatureMap(model, "stage3")(x), own[1])
    torch.testing.assert_close(FeatureMap(model, layers=["stage3", "stage1"])(x), [own[1], own[0]])
    assert list(FeatureMap(model, "stage3").state_dict()) == list(model.state_dict())
    with pytest.raises(ValueError, match=r"layer: expected a stage among .* got 'stage2'"):
        FeatureMap(model, "stage2")


def test_hugging_face_is_refused_by_name():
    hf = pytest.importorskip("transformers")
    config = hf.Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=70, patch_size=14)
    with pytest.raises(ValueError, match=r"layer: expected a block of Dinov2Model .* got layer4"):
        FeatureMap(hf.Dinov2Model(config))
    with pytest.raises(ValueError, match=r"model: expected the model without its task's head"):
        FeatureMap(hf.Dinov2ForImageClassification(config), "dinov2.layernorm")
    with pytest.raises(ValueError, match=r"image: .* multiples of the patch"):
        FeatureMap(hf.Dinov2Model(config), "layernorm")(torch.zeros(1, 3, 75, 70))


class Dino(nn.Module):
    """Stands in for the first DINO of torch.hub: its parts, names and methods, none of its sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 8, 8)
        self.patch_embed.patch_size = 8
        self.cls_token = nn.Parameter(torch.randn(1, 1, 16))
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(16), nn.Identity()

    def prepare_tokens(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed(x).flatten(2).mT
        return torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1)

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        x, out = self.prepare_tokens(x), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if len(self.blocks) - i <= n:
                out.append(self.norm(x))
        return out


class Dino2(Dino):
    """Stands in for DINOv2 and DINOv3 of torch.hub, which make maps themselves."""

    def get_intermediate_layers(self, x: Tensor, n: Any = 1, reshape: bool = False, norm: bool = True) -> Any:
        size, x, out = (x.shape[2] // 8, x.shape[3] // 8), self.prepare_tokens(x), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in n:
                out.append((self.norm(x) if norm else x)[:, 1:].mT.unflatten(2, size))
        return tuple(out)


@pytest.mark.parametrize("kind", [Dino, Dino2])
def test_torch_hub_dino(kind):
    model, x = kind(), torch.randn(2, 3, 24, 40)
    last = Dino.get_intermediate_layers(model, x, 1)[0][:, 1:].mT.unflatten(2, (3, 5))
    encoder = FeatureMap(model, "norm")
    torch.testing.assert_close(encoder(x), last)
    torch.testing.assert_close(copy.deepcopy(encoder)(x), last)
    first = FeatureMap(model, "blocks.0")
    expected = model.blocks[0](model.prepare_tokens(x))[:, 1:].mT.unflatten(2, (3, 5))
    torch.testing.assert_close(first(x), expected)
    assert set(first.state_dict()) == {n for n in model.state_dict() if n.startswith(("blocks.0", "cls", "patch"))}
    maps = FeatureMap(model, layers=["blocks.2", "blocks.0"])(x)
    torch.testing.assert_close(maps[1], expected)
    with pytest.raises(ValueError, match=r"layer: expected a block of .*'blocks.0' to 'blocks.2'"):
        FeatureMap(model)
    with pytest.raises(ValueError, match="image: expected sides that are multiples"):
        encoder(torch.zeros(1, 3, 25, 40))


@pytest.mark.parametrize("kind", ["resnet", "timm", "vit"])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_images_of_another_precision_are_refused_by_name(kind, model_dtype, dtype):
    encoder = {
        "resnet": lambda: FeatureMap(tv.resnet18(), "layer2"),
        "timm": lambda: FeatureMap(small_timm_vit(), "blocks.0"),
        "vit": lambda: FeatureMap(tv.VisionTransformer(32, 8, 2, 2, 32, 64), "encoder.ln"),
    }[kind]()
    encoder = encoder.eval().to(model_dtype)
    image = torch.rand(1, 3, *((32, 32) if kind == "vit" else (64, 96)), dtype=dtype)
    if dtype == model_dtype:
        assert encoder(image).dtype == dtype
        return
    message = rf"^image: expected {model_dtype} as the model's parameters, got {dtype}; .*autocast"
    with pytest.raises(ValueError, match=message) as caught:
        encoder(image)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), suppress(RuntimeError):
        encoder(image)  # whatever autocast does with it, it is not refused by us


def test_models_that_convert_images_themselves_take_any_precision():
    class Converting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.to(self.conv.weight.dtype))

    encoder = FeatureMap(Converting(), "conv")
    assert encoder(torch.rand(1, 3, 16, 24).half()).dtype == torch.float32


def test_other_errors_of_images_of_another_precision_stay_as_they_are():
    encoder = FeatureMap(tv.resnet18(), "layer2").eval()

    def fail(*args: Any) -> None:
        raise RuntimeError("out of something")

    encoder.conv1.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of something"):
        encoder(torch.rand(1, 3, 64, 96).half())
