"""Masked prediction: the drawn blocks, the token in their place, the head and the loss."""

import copy
import pickle
import random

import pytest
import timm
import torch
import torchvision.models as tv
from lightly.models.modules.heads import DINOProjectionHead
from reference import prototype_loss as prototype_loop
from torch import Tensor, nn

from densessl import EMA, BlockMask, FeatureMap, MaskToken, PrototypeHead, PrototypeLoss, prototype_loss

ibot = pytest.importorskip("lightly.loss.ibot_loss")

# --- blocks -----------------------------------------------------------------------------------------------------------


def test_as_many_images_and_cells_as_asked_are_masked():
    masks = BlockMask((0.2, 0.4), images=0.75)(16, (12, 15))
    assert masks.shape == (16, 12, 15)
    assert masks.dtype == torch.bool
    shares = sorted(masks.flatten(1).float().mean(1).tolist())
    assert shares[:4] == [0] * 4
    for step, share in enumerate(shares[4:]):  # one in each of twelve steps; few cells may be missing
        assert 0.2 + 0.2 * step / 12 - 0.06 < share <= 0.2 + 0.2 * (step + 1) / 12
    assert (masks.flatten(1).any(1)[:8].sum(), masks.flatten(1).any(1)[8:].sum()) != (8, 4)  # in random order


def test_blocks_are_lightlys_and_a_function_of_torchs_seed_alone():
    random.seed(5)
    torch.manual_seed(3)
    before = random.getstate()
    first = BlockMask()(4, (10, 9))
    assert random.getstate() == before
    random.seed(6)
    torch.manual_seed(3)
    assert torch.equal(BlockMask()(4, (10, 9)), first)
    assert not torch.equal(BlockMask()(4, (10, 9)), first)
    sides = first.float()
    same = (sides[:, 1:] == sides[:, :-1]).float().mean() + (sides[:, :, 1:] == sides[:, :, :-1]).float().mean()
    assert same > 1.6  # blocks: neighbours are mostly alike


@pytest.mark.parametrize("size", [(2, 2), (3, 2), (5, 4)])
def test_few_cells_are_masked_too(size):
    """lightly raises below four cells."""
    masks = torch.cat([BlockMask((0.1, 0.5), images=1.0)(8, size) for _ in range(6)])
    assert masks.any()
    assert masks.flatten(1).float().mean(1).max() <= 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BlockMask((0.5, 0.1)), r"cells: expected two shares in 0..1, the lower first, got \(0.5, 0.1\)"),
        (lambda: BlockMask(images=1.5), r"images: expected a share in 0..1, got 1.5"),
        (lambda: BlockMask(least=0), r"least: expected a whole number of at least 1, got 0"),
        (lambda: BlockMask()(0, (4, 4)), r"batch: expected a whole number of at least 1, got 0"),
        (lambda: BlockMask()(2, (1, 9)), r"size: expected \(height, width\), both at least 2, got \(1, 9\)"),
    ],
)
def test_bad_blocks_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_is_masked_where_no_image_shall_be():
    assert not BlockMask(images=0)(3, (4, 4)).any()
    assert not BlockMask((0, 0))(3, (4, 4)).any()
    assert BlockMask(images=0.01)(3, (6, 6)).flatten(1).any(1).sum() == 1  # at least one image


# --- the token --------------------------------------------------------------------------------------------------------


def vit(name: str = "test_vit", **options) -> nn.Module:
    return timm.create_model(name, num_classes=0, img_size=(48, 64), **options).eval()


def test_a_timm_vit_sees_the_token_in_place_of_patches():
    model, image, mask = vit(), torch.randn(2, 3, 48, 64), torch.rand(2, 3, 4) < 0.5
    backbone = FeatureMap(model, "norm").eval()
    token = MaskToken(backbone)
    nn.init.normal_(token.token)
    got = token(backbone, image, mask)
    with torch.no_grad():
        x = model.patch_embed.proj(image).flatten(2).mT.clone()
        for b in range(2):
            for i in range(12):
                if mask[b, i // 4, i % 4]:
                    x[b, i] = token.token
        x = model.blocks(model.norm_pre(model._pos_embed(x.unflatten(1, (3, 4)))))
        expected = model.norm(x)[:, model.num_prefix_tokens :].mT.unflatten(2, (3, 4))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(token(backbone, image), backbone(image))
    got.square().sum().backward()
    assert token.token.grad.any()


def swin() -> tuple[nn.Module, Tensor]:
    small = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=(64, 96), **small)
    return FeatureMap(model, "layers.2"), torch.rand(2, 4, 6) < 0.4


def torchvisions() -> tuple[nn.Module, Tensor]:
    model = tv.VisionTransformer(48, 16, 1, 2, 32, 32)
    return FeatureMap(model, "encoder.ln"), torch.rand(2, 3, 3) < 0.4


def dynamic() -> tuple[nn.Module, Tensor]:
    return FeatureMap(vit(dynamic_img_size=True, reg_tokens=2), "norm"), torch.rand(2, 3, 4) < 0.4


def hugging_face(name: str, **options) -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 16, "image_size": 64}
    config = getattr(transformers, f"{name}Config")(**sizes | options)
    return FeatureMap(getattr(transformers, f"{name}Model")(config), "layernorm"), torch.rand(2, 4, 4) < 0.4


MODELS = {
    "swin": swin,
    "torchvision": torchvisions,
    "dynamic": dynamic,
    "Dinov2": lambda: hugging_face("Dinov2"),
    "ViT": lambda: hugging_face("ViT"),
}


@pytest.mark.parametrize("name", MODELS)
def test_masked_cells_are_not_seen(name):
    """What lies in them changes nothing; what lies elsewhere does."""
    backbone, mask = MODELS[name]()
    mask[:, 0, 0], mask[:, -1, -1] = True, False
    backbone.eval()
    token = MaskToken(backbone)
    side = 16
    image = torch.randn(2, 3, mask.shape[1] * side, mask.shape[2] * side)
    hidden = mask.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]
    other = torch.where(hidden, torch.randn_like(image), image)
    with torch.no_grad():
        first = token(backbone, image, mask)
        torch.testing.assert_close(token(backbone, other, mask), first)
        assert first.shape[2:] == mask.shape[1:]
        assert not torch.allclose(backbone(other), backbone(image), atol=1e-4)
        assert not torch.allclose(token(backbone, image.roll(1, 3), mask), first, atol=1e-4)
        torch.testing.assert_close(token(backbone, image, torch.zeros_like(mask)), backbone(image))


def test_hugging_faces_own_mask_token_gets_no_gradient():
    """As FeatureMap's page says, for DistributedDataParallel."""
    backbone, _ = hugging_face("Dinov2")
    backbone(torch.randn(1, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == ["embeddings.mask_token"]


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = FeatureMap(vit(), "norm")
        self.token = MaskToken(self.backbone)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.token(self.backbone, image, mask)


def test_copies_work_on_their_own_backbone_and_names_stay():
    both, image, mask = Both().eval(), torch.randn(1, 3, 48, 64), torch.rand(1, 3, 4) < 0.5
    assert {name.split(".")[0] for name in both.state_dict()} == {"backbone", "token"}
    assert list(both.backbone.state_dict()) == list(vit().state_dict())
    expected = both(image, mask)
    for other in (copy.deepcopy(both), pickle.loads(pickle.dumps(both)), EMA(both).module):
        torch.testing.assert_close(other(image, mask), expected)
        with torch.no_grad():
            other.token.token += 1
        assert not torch.allclose(other(image, mask), expected)
        torch.testing.assert_close(both(image, mask), expected)


def test_a_compiled_encoder_masks_too():
    """Compiled once without a mask, it must not forget one that comes later."""
    both, image = Both().eval(), torch.randn(1, 3, 48, 64)
    masks = [torch.rand(1, 3, 4) < 0.5 for _ in range(2)]
    expected = [both(image, mask) for mask in (None, *masks, None)]
    both.compile(backend="eager")
    for mask, wanted in zip((None, *masks, None), expected, strict=True):
        torch.testing.assert_close(both(image, mask), wanted)


def test_bad_masks_and_backbones_are_named():
    both, image = Both(), torch.randn(2, 3, 48, 64)
    with pytest.raises(ValueError, match=r"backbone: expected a ViT with a patch embedding named .*, got FeatureMap"):
        MaskToken(FeatureMap(tv.resnet18(), "layer2"))
    for mask, message in (
        (torch.ones(2, 12, dtype=torch.bool), r"mask: expected bool \(B, h, w\) with B = 2, got torch.bool \(2, 12\)"),
        (torch.ones(2, 3, 4), r"mask: expected bool .* got torch.float32"),
        (torch.ones(1, 3, 4, dtype=torch.bool), r"mask: expected .* B = 2, got torch.bool \(1, 3, 4\)"),
        (
            torch.ones(2, 3, 5, dtype=torch.bool),
            r"mask: expected cells made of whole patches, got 3x5 cells of 3x4",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            both(image, mask)
    torch.testing.assert_close(both.eval()(image), both.backbone(image))  # nothing stays masked


# --- head and loss ----------------------------------------------------------------------------------------------------


def test_the_head_equals_lightlys():
    theirs = DINOProjectionHead(6, 10, 4, 7)
    ours = PrototypeHead(6, 10, 4, 7)
    state = {f"linear{i + 1}.{kind}": theirs.state_dict()[f"layers.{2 * i}.{kind}"] for i in range(3) for kind in
             ("weight", "bias")}  # fmt: skip
    state = {name: value[:, :, None, None] if name.endswith("weight") else value for name, value in state.items()}
    ours.load_state_dict(state | {"prototypes": theirs.last_layer.weight_v})
    x = torch.randn(3, 6, 4, 5)
    torch.testing.assert_close(
        ours(x).permute(0, 2, 3, 1), theirs(x.permute(0, 2, 3, 1).flatten(0, 2)).view(3, 4, 5, 7)
    )


def test_the_head_can_be_copied_where_lightlys_cannot():
    with pytest.raises(RuntimeError, match="deepcopy"):
        EMA(DINOProjectionHead(6, 10, 4, 7))
    EMA(PrototypeHead(6, 10, 4, 7))


def test_scores_are_float32_under_autocast():
    head, x = PrototypeHead(6, 10, 4, 7), torch.randn(3, 6, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x).dtype == torch.float32
    assert head.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("no_match", ["zero", "skip"])
def test_the_loss_equals_the_loop(reduction, no_match):
    query, key = torch.randn(2, 3, 5, 4, 2, dtype=torch.float64).unbind(0)
    valid, center = torch.rand(3, 4, 2) < 0.6, torch.randn(5, dtype=torch.float64)
    valid[1] = False
    options = {"reduction": reduction, "no_match": no_match}
    expected = prototype_loop(query.requires_grad_(), key, valid, center, (0.2, 0.3), **options)
    loss = PrototypeLoss(0.2, 0.3, **options)
    hole = torch.where(valid[:, None], 0.0, torch.nan)
    with torch.no_grad():
        holes = (query + hole), (key + hole)
    asked = holes[0].requires_grad_()
    got = loss(asked, holes[1].requires_grad_(), valid, center)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), asked)[0], torch.autograd.grad(expected.sum(), query)[0], rtol=1e-8, atol=1e-12
    )
    assert holes[1].grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_equals_lightlys(dtype):
    query, key = (3 * torch.randn(2, 4, 6, 3, 5)).to(dtype).float().unbind(0)
    mask = torch.rand(4, 3, 5) < 0.5
    mask[2] = False
    theirs = ibot.IBOTPatchLoss(6)
    theirs.center.center.normal_()
    cells = [x.permute(0, 2, 3, 1)[mask] for x in (key, query.requires_grad_())]
    center = theirs.center.value.clone()
    expected = theirs(*cells, mask)
    got = prototype_loss(query, key, mask, center=center)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, query)[0] for x in (got, expected)), rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(prototype_loss(query.to(dtype), key.to(dtype), mask, center=center), got)


def test_a_step_without_a_cell_gives_nothing_where_lightlys_centre_is_lost():
    query, key, mask = torch.randn(2, 6, 3, 5, requires_grad=True), torch.randn(2, 6, 3, 5), torch.zeros(2, 3, 5) > 0
    theirs = ibot.IBOTPatchLoss(6)
    theirs(*(x.permute(0, 2, 3, 1)[mask] for x in (key, query)), mask)
    assert theirs.center.value.isnan().all()
    loss = prototype_loss(query, key, mask)
    assert loss == 0
    (grad,) = torch.autograd.grad(loss, query)
    assert not grad.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PrototypeLoss(0.0), r"query_temperature: expected a positive number, got 0.0"),
        (lambda: PrototypeLoss(0.1, -1), r"key_temperature: expected a positive number, got -1"),
        (lambda: PrototypeLoss(reduction="sum"), r"reduction: .* got 'sum'"),
        (lambda: PrototypeLoss(no_match="drop"), r"no_match: .* got 'drop'"),
        (lambda: prototype_loss(torch.ones(2, 3, 4), torch.ones(2, 3, 5)), r"key: expected \(B, N, K\) = \(2, 3, 4\)"),
        (
            lambda: prototype_loss(torch.ones(2, 3, 4), torch.ones(2, 3, 4), center=torch.ones(3)),
            r"center: expected K = 4 numbers, got \(3,\)",
        ),
        (
            lambda: prototype_loss(torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2, 4) > 0),
            r"valid: expected bool \(B, N\) = \(2, 3\)",
        ),
        (lambda: PrototypeHead(3, 4, 5, 6)(torch.ones(2, 4, 3, 3)), r"x: expected a floating point map \(B, 3, h, w\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
