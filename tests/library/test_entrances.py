"""What enters MultiView and BatchAugment: images, masks, seeds and pipelines in all their forms, right or refused."""

import random

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from densessl import (
    BatchAugment,
    MaskedView,
    MultiView,
    View,
    byol_views,
    cell_centers,
    mocov2_views,
    multichannel_views,
    simclr_views,
)


def photo(size: tuple[int, int] = (40, 56)) -> Tensor:
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8)


def numbered(size: tuple[int, int], dtype: torch.dtype = torch.int64) -> Tensor:
    return (torch.arange(size[0] * size[1]).view(size) + 1).to(dtype)


# --- masks ------------------------------------------------------------------------------------------------------------

MOVES = {
    "resize": v2.Resize((21, 17)),
    "enlarge": v2.Resize((97, 110)),
    "crop": v2.RandomResizedCrop((24, 31)),
    "turn": v2.RandomRotation(40, expand=True),
    "affine": v2.RandomAffine(20, (0.1, 0.1), (0.6, 1.4), 10),
    "perspective": v2.RandomPerspective(0.4, p=1.0),
    "pad": v2.Compose([v2.Pad((3, 5, 2, 1)), v2.CenterCrop(70)]),
    "chain": v2.Compose([v2.Resize(90), v2.RandomHorizontalFlip(1.0), v2.RandomCrop(60)]),
}


@pytest.mark.parametrize("name", MOVES)
def test_each_mask_pixel_has_the_label_at_its_centre(name):
    """A mask of numbered pixels says where it was picked: within half a pixel of each step, and on no side more."""
    size = (40, 56)
    view = MultiView(MOVES[name])(photo(size), numbered(size))[0]
    place = cell_centers(view.coords.as_subclass(Tensor)[None], view.mask.shape)[0] * torch.tensor([56.0, 40.0])
    number = view.mask.flatten() - 1
    shown = (number >= 0) & ((place > 0) & (place < torch.tensor([56.0, 40.0]))).all(-1)
    picked = torch.stack([number % 56 + 0.5, number // 56 + 0.5], -1)
    apart = (picked - place)[shown]
    assert shown.sum() > 100
    assert apart.abs().max() < 0.51
    assert apart.mean(0).abs().max() < 0.1  # the corner in place of the centre would be half a view pixel


@pytest.mark.parametrize("mode", ["edge", "reflect", "symmetric", "constant"])
def test_masks_are_padded_as_images_are(mode):
    size = (7, 9)
    image = numbered(size, torch.uint8).expand(3, *size).contiguous()
    view = MultiView(v2.Pad((2, 3, 4, 5), padding_mode=mode))(image, image[0])[0]
    assert torch.equal(view.mask, view.image[0])


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.float32]
)
@pytest.mark.parametrize("channel", [False, True])
def test_masks_keep_dtype_and_shape(dtype, channel):
    mask = (numbered((40, 56)) % 2).to(dtype)
    view = MultiView(v2.Compose([v2.RandomRotation(10), v2.CenterCrop(20)]))(photo(), mask[None] if channel else mask)[
        0
    ]
    assert type(view.mask) is Tensor
    assert view.mask.dtype == dtype
    assert view.mask.shape == ((1, 20, 20) if channel else (20, 20))


def test_labels_of_any_size_stay_what_they_are():
    ids = torch.tensor([2**24 + 1, 2**31 + 5, 2**53 + 1, -7])
    labels = ids[torch.arange(40 * 56) % 4].view(40, 56)
    for move in (*MOVES.values(), v2.ElasticTransform(20.0)):
        seen = set(MultiView(move, dense=True)(photo(), labels)[0].mask.unique().tolist())
        assert seen - {0} <= set(ids.tolist())
        assert len(seen) > 1


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("move", [v2.RandomHorizontalFlip(1.0), v2.CenterCrop(10), v2.RandomRotation((90, 90))])
def test_a_mask_that_was_computed_with_is_moved_all_the_same(inside, move):
    image = numbered((12, 20), torch.uint8).expand(3, 12, 20).contiguous()
    binary = v2.Lambda(lambda mask: (mask > 100).to(torch.int32), tv_tensors.Mask)
    steps = [v2.RandomApply([binary, move], p=1.0)] if inside else [binary, move]
    view = MultiView(v2.Compose(steps))(image, image[0])[0]
    assert torch.equal(view.mask, (view.image[0] > 100).to(torch.int32))


def test_a_mask_that_lost_its_type_or_size_is_refused():
    lost = v2.Lambda(lambda mask: mask.as_subclass(Tensor), tv_tensors.Mask)
    with pytest.raises(ValueError, match=r"returned the mask as Tensor.*tv_tensors\.wrap"):
        MultiView(v2.Compose([lost, v2.RandomHorizontalFlip(1.0)]))(photo(), numbered((40, 56)))
    cut = v2.Lambda(lambda mask: mask[..., 1:], tv_tensors.Mask)
    with pytest.raises(ValueError, match="mask"):
        MultiView(cut)(photo(), numbered((40, 56)))


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        *((Image.new(mode, (56, 40)), f"mode {mode}") for mode in ("RGB", "RGBA", "LA", "CMYK", "HSV", "YCbCr")),
        (torch.zeros(3, 40, 56), r"\(3, 40, 56\)"),
        (torch.zeros(40, 56, 3), r"\(40, 56, 3\)"),
        (torch.zeros(1, 1, 40, 56), r"\(1, 1, 40, 56\)"),
        (torch.zeros(56, 40), r"\(56, 40\)"),
        (torch.zeros(40, 56).to_sparse(), "got torch.sparse_coo"),
        (np.zeros((40, 56), object), "got an array of object"),
        ("mask.png", "got str"),
    ],
)
def test_other_masks_are_refused_by_name(mask, got):
    with pytest.raises(ValueError, match=f"^mask: expected .*{got}"):
        MultiView(v2.Identity())(photo(), mask)


@pytest.mark.parametrize("form", [lambda x: x[::-1], lambda x: x.astype(">i4"), lambda x: np.asfortranarray(x)])
def test_masks_as_arrays(form):
    labels = form(numbered((40, 56)).numpy())
    moved = MultiView(v2.Identity())(photo(), labels)[0].mask
    assert moved.tolist() == labels.tolist()


@pytest.mark.parametrize("mode", ["1", "L", "P", "I", "I;16"])
def test_masks_as_pil_images(mode):
    assert MultiView(v2.CenterCrop(9))(photo(), Image.new(mode, (56, 40), 1))[0].mask.shape == (9, 9)


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [byol_views(8), byol_views(8, photometric=False), MultiView(v2.CenterCrop(8))])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 255, "largest possible value"),
        (lambda x: (x - 0.5) / 0.25, "normalised already"),
        (lambda x: x + torch.where(x > 0.9, torch.nan, 0.0), "NaN"),
        (lambda x: x.permute(1, 2, 0), r"looks like \(H, W, C\)"),
        (lambda x: x.to_sparse(), "got torch.sparse_coo"),
    ],
)
def test_images_in_other_forms_are_refused(views, change, message):
    with pytest.raises(ValueError, match=f"^image: expected.*{message}"):
        views(change(photo() / 255))


def test_a_first_step_of_ones_own_may_bring_values_into_range():
    view = MultiView(v2.Compose([v2.Lambda(lambda x: x / 255, tv_tensors.Image), v2.CenterCrop(8)]))(photo().float())[0]
    assert view.image.max() <= 1


def test_16_bit_pil_images_are_named_by_colour_changes():
    for mode in ("I;16", "I", "F"):
        with pytest.raises(ValueError, match=f"^image: expected a PIL image.*got {mode}"):
            byol_views(8, mean=(0.5,), std=(0.25,))(Image.new(mode, (20, 20)))


class Halve(v2.Transform):
    """Writes into the image that it is given."""

    def transform(self, inpt, params):
        return inpt.mul_(0.5) if isinstance(inpt, tv_tensors.Image) else inpt


@pytest.mark.parametrize(
    "changing",
    [
        Halve(),
        v2.Compose([v2.CenterCrop((40, 56)), Halve()]),
        v2.RandomApply([v2.RandomHorizontalFlip(0.0), Halve()], p=1.0),
        v2.Lambda(lambda x: x.mul_(0.5), tv_tensors.Image),
        v2.Normalize([0.5] * 3, [0.5] * 3, inplace=True),
        v2.RandomErasing(p=1.0, inplace=True),
        v2.Lambda(lambda mask: mask.zero_(), tv_tensors.Mask),
    ],
)
def test_no_step_changes_the_callers_tensors_or_the_other_views(changing):
    image, mask = torch.rand(3, 40, 56), numbered((40, 56))
    kept, labels = image.clone(), mask.clone()
    _, other = MultiView(changing, v2.Identity())(image, mask)
    for left, right in ((image, kept), (mask, labels), (other.image, kept), (other.mask, labels)):
        assert torch.equal(left, right)


# --- pipelines --------------------------------------------------------------------------------------------------------


class Holder(v2.Transform):
    def __init__(self, held):
        super().__init__()
        self.held = held

    def transform(self, inpt, params):
        return inpt


@pytest.mark.parametrize("held", [lambda x: x, lambda x: [x], lambda x: {"a": (x,)}, lambda x: Holder(x)])
@pytest.mark.parametrize("name", ["RandAugment", "TrivialAugmentWide", "AutoAugment", "AugMix"])
def test_what_a_step_holds_is_looked_at_too(held, name):
    with pytest.raises(ValueError, match=f"{name} cannot be tracked"):
        MultiView(v2.Compose([Holder(held(getattr(v2, name)()))]))


RANDOM = v2.RandAugment()


@pytest.mark.parametrize("held_by", ["closure", "global variable", "default", "keyword's default"])
def test_what_a_function_holds_is_looked_at_too(held_by):
    hidden = RANDOM
    function = {
        "closure": lambda x: hidden(x),
        "global variable": lambda x: RANDOM(x),
        "default": lambda x, step=hidden: step(x),
        "keyword's default": lambda x, *, step=hidden: step(x),
    }[held_by]
    with pytest.raises(ValueError, match="RandAugment cannot be tracked"):
        MultiView(v2.Lambda(function, tv_tensors.Image))


@pytest.mark.parametrize("container", [v2.Compose, lambda steps: nn.Sequential(*steps)])
def test_containers_with_a_forward_of_their_own_keep_it(container):
    base = type(container([v2.Identity()]))

    class Never(base):
        def forward(self, *inputs):
            return inputs

    steps = [v2.RandomHorizontalFlip(1.0)]
    never = Never(steps) if base is v2.Compose else Never(*steps)
    image = photo()
    for pipeline in (never, v2.Compose([never]), nn.Sequential(never), v2.RandomApply([never], p=1.0)):
        assert torch.equal(MultiView(pipeline)(image)[0].image, image)


@pytest.mark.parametrize("around", [lambda x: v2.RandomApply([x], p=1.0), lambda x: v2.RandomChoice([x])])
def test_a_sequential_inside_another_transform_is_refused(around):
    with pytest.raises(ValueError, match=r"Sequential cannot be tracked.*v2\.Compose"):
        MultiView(around(nn.Sequential(v2.RandomHorizontalFlip())))


@pytest.mark.parametrize("distortion", [0.9, 1.0])
def test_strong_perspective_keeps_the_cells_that_it_shows(distortion):
    views = MultiView(v2.RandomPerspective(distortion, p=1.0))
    white = torch.full((3, 60, 80), 255, dtype=torch.uint8)
    lost = 0
    for seed in range(60):
        view = views(white, seeds=[seed])[0]
        shown = view.image[0].flatten() > 254
        known = cell_centers(view.coords.as_subclass(Tensor)[None], (60, 80))[0].isfinite().all(-1)
        lost += int((shown & ~known).sum() > 0.5 * shown.sum())
    assert lost == 0


# --- seeds and further steps ------------------------------------------------------------------------------------------


class OldRandom(v2.Transform):
    def transform(self, inpt, params):
        gain = random.random() * np.random.rand()  # noqa: NPY002
        return tv_tensors.wrap(inpt * gain, like=inpt) if isinstance(inpt, tv_tensors.Image) else inpt


def test_a_view_is_a_function_of_its_seed_alone():
    pipeline = v2.Compose([v2.RandomResizedCrop(16), OldRandom()])
    image = torch.rand(3, 40, 56)

    def others() -> tuple:
        return torch.rand(2).tolist(), random.random(), np.random.rand()  # noqa: NPY002

    def start() -> None:
        torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002

    start()
    expected = others()
    start()
    first, second = MultiView(pipeline, pipeline)(image, seeds=[3, (1, 2, 3)])
    assert others() == expected  # the generators of torch, random and NumPy are left as they were
    swapped = MultiView(v2.CenterCrop(9), pipeline, pipeline)(image, seeds=[0, (1, 2, 3), 3])
    for view, same in ((first, swapped[2]), (second, swapped[1])):
        assert torch.equal(view.image, same.image)
        assert torch.equal(view.coords, same.coords)
    assert not torch.equal(first.coords, second.coords)


@pytest.mark.parametrize("seeds", [3, [1], [1, 2, 3], [1, -2], [1, 0.5], "ab", [1, ()], [1, "x"]])
def test_other_seeds_are_refused(seeds):
    with pytest.raises(ValueError, match=r"^seeds: expected"):
        byol_views(8)(photo(), seeds=seeds)


def test_seeds_on_the_cpu_leave_cuda_alone(monkeypatch):
    def touched(*args):
        raise AssertionError

    for name in ("manual_seed", "manual_seed_all", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, touched)
    byol_views(8)(photo(), seeds=[1, 2])
    BatchAugment(K.RandomHorizontalFlip())(batch(), seed=1)


@pytest.mark.parametrize("preset", [byol_views, mocov2_views, simclr_views, multichannel_views])
@pytest.mark.parametrize("photometric", [False, True])
def test_presets_take_further_steps_after_crop_and_flip(preset, photometric):
    statistics = {"mean": (0.5,) * 3, "std": (0.2,) * 3} if preset is multichannel_views else {}
    flip = v2.RandomVerticalFlip(1.0)
    views = preset(8, photometric, extra=(flip,), **statistics)
    plain = preset(8, photometric, **statistics)
    for pipeline, without in zip(views.transforms, plain.transforms, strict=True):
        assert pipeline.transforms[2] is flip
        assert len(pipeline.transforms) == len(without.transforms) + 1
    turned, straight = (v(photo() * 0 + 9, seeds=[1, 1])[0].coords for v in (views, plain))
    assert turned[1, 1] == pytest.approx(-float(straight[1, 1]))


# --- batches ----------------------------------------------------------------------------------------------------------


def batch() -> View:
    return View(torch.rand(2, 3, 16, 20), torch.eye(3).expand(2, 3, 3), torch.tensor([[16, 20]] * 2))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda v: View(*(part[0] for part in v)), "view.image: .*default_collate"),
        (lambda v: v._replace(coords=v.coords[0]), "coords: expected"),
        (lambda v: v._replace(coords=v.coords[:1]), "view.coords: expected as many"),
        (lambda v: v._replace(coords=v.coords.bfloat16()), "coords: expected .*bfloat16"),
        (lambda v: v._replace(source_size=v.source_size[0]), "view.source_size: expected"),
        (lambda v: MaskedView(*v, torch.zeros(16, 20)), "view.mask: expected"),
        (lambda v: View(*(part[:0] for part in v)), "view.image: expected .*at least one view"),
        (lambda v: v._replace(image=v.image * 255), "view.image: expected .*0..1"),
        (lambda v: v._replace(image=(v.image - 0.5) / 0.25), "view.image: expected .*normalised already"),
    ],
)
def test_other_batches_are_refused_by_name(change, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        BatchAugment(K.RandomHorizontalFlip())(change(batch()))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "1", [1, 2]])
def test_other_seeds_of_a_batch_are_refused(seed):
    with pytest.raises(ValueError, match=r"^seed: expected an int of at least 0"):
        BatchAugment(K.RandomHorizontalFlip())(batch(), seed=seed)


@pytest.mark.parametrize(
    "make",
    [
        lambda: K.RandomAffine(10.0, padding_mode="reflection"),
        lambda: K.AugmentationSequential(K.RandomShear(10.0, padding_mode="reflection")),
        lambda: K.RandomTranslate((0.1, 0.1), padding_mode="reflection"),
        lambda: K.RandomCrop((8, 8), padding=2, padding_mode="reflect"),
        lambda: K.PadTo((30, 30), pad_mode="reflect"),
    ],
)
def test_mirrored_padding_of_a_batch_is_refused(make):
    with pytest.raises(ValueError, match=r"augmentation: .*mirrored"):
        BatchAugment(make())


def test_a_skipped_matrix_is_refused():
    skipping = K.AugmentationSequential(K.RandomRotation(10.0), transformation_matrix_mode="skip")
    for augmentation in (skipping, K.AugmentationSequential(skipping, K.RandomHorizontalFlip())):
        with pytest.raises(ValueError, match=r"augmentation: .*transformation_matrix_mode='skip'"):
            BatchAugment(augmentation)


@pytest.mark.parametrize("kind", [View, MaskedView])
def test_a_view_goes_to_a_device_as_a_whole(kind):
    view = kind(*(torch.zeros(2) for _ in kind._fields))
    moved = view.to("meta")
    assert type(moved) is kind
    assert {part.device.type for part in moved} == {"meta"}
