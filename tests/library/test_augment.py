import warnings
from functools import partial, wraps

import kornia.augmentation as K
import pytest
import torch
import torchvision.transforms as v1
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from tracing import MARK, tracer, tracking_error

from densessl import (
    BatchAugment,
    DenseCoords,
    DistanceMatcher,
    MaskedView,
    MultiView,
    View,
    ViewCoords,
    byol_photometric,
    byol_views,
    check_tracking,
    mocov2_photometric,
    mocov2_views,
    simclr_photometric,
    simclr_views,
)
from densessl.augment._pil import OnPIL
from densessl.augment._steps import nested

PRESETS = [byol_views, mocov2_views, simclr_views]
PHOTOMETRIC = [byol_photometric, mocov2_photometric, simclr_photometric]


def photo(size: tuple[int, int] = (75, 100), seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("form", ["pil", "uint8", "float"])
def test_published_views(preset, form):
    image = {"pil": F.to_pil_image(photo()), "uint8": photo(), "float": photo().float() / 255}[form]
    first, second = preset((48, 64))(image)
    for view in (first, second):
        assert view.image.dtype == torch.float32
        assert view.image.shape == (3, 48, 64)
        assert view.image.min() < 0  # normalised
        assert type(view.coords) is ViewCoords
        assert view.coords.canvas_size == (48, 64)
        assert view.source_size.tolist() == [75, 100]
    assert not torch.equal(first.coords, second.coords)
    geometric = preset(32, photometric=False)(image)[0]
    assert geometric.image.dtype == (torch.float32 if form == "float" else torch.uint8)


def test_the_photometric_half_is_asymmetric_as_published():
    byol = [part for pipeline in byol_views().transforms for part in nested(pipeline)]
    assert [part.p for part in byol if isinstance(part, v2.RandomApply)] == [0.8, 1.0, 0.8, 0.1]
    assert [part.p for part in byol if isinstance(part, v2.RandomSolarize)] == [0, 0.2]
    one, two = byol_photometric()
    names = [[type(part).__name__ for part in augment.augmentation.children()] for augment in (one, two)]
    assert "RandomSolarize" not in names[0]
    assert names[1] == ["ColorJitter", "RandomGrayscale", "RandomGaussianBlur", "RandomSolarize", "Normalize"]


@pytest.mark.parametrize("channels", [1, 3])
def test_photometric_steps_on_pil_are_those_on_the_image_as_pil(channels):
    """The way to PIL and back loses nothing, of colour and grey images that are not square."""
    image = tv_tensors.Image(torch.randint(0, 256, (channels, 5, 9), dtype=torch.uint8))
    assert torch.equal(OnPIL()(image), image)
    assert torch.equal(OnPIL()(image.permute(0, 2, 1)), image.permute(0, 2, 1))  # not contiguous
    jitter = v2.ColorJitter(0.4, 0.4, 0.2, 0.1)
    torch.manual_seed(3)
    made = OnPIL(jitter)(image)
    torch.manual_seed(3)
    assert torch.equal(made, F.pil_to_tensor(jitter(F.to_pil_image(image))))
    assert isinstance(made, tv_tensors.Image)
    assert torch.equal(OnPIL()(F.to_dtype(image, torch.float32, scale=True)), image)
    assert torch.equal(OnPIL()(F.to_pil_image(image)), image)


def test_device_solarize_has_the_published_threshold():
    solarize = list(byol_photometric()[1].augmentation.children())[3]
    solarize.p = 1.0
    x = torch.linspace(0, 1, 256).expand(1, 3, 1, 256)
    for _ in range(5):
        torch.testing.assert_close(solarize(x), torch.where(x < 0.5, x, 1 - x))


def test_device_normalisation_equals_torchvisions():
    augment = BatchAugment(list(byol_photometric()[0].augmentation.children())[-1])
    batch = torch.stack([photo(), photo(seed=1)])
    view = augment(View(batch, torch.eye(3).expand(2, 3, 3), torch.tensor([[75, 100]] * 2)))
    expected = F.normalize(batch.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(view.image, expected)


def test_blur_of_a_float_image_is_close_to_pils():
    from densessl.augment.presets import PILGaussianBlur

    blur = PILGaussianBlur((1.5, 1.5))
    through_pil = blur(F.to_pil_image(photo()))
    out, plain = F.pil_to_tensor(through_pil).float(), blur(tv_tensors.Image(photo().float()))
    assert (out - plain)[:, 8:-8, 8:-8].abs().mean() < 3 < (out - photo()).abs().mean()
    mask = tv_tensors.Mask(photo()[:1])
    assert torch.equal(blur(mask), mask)


def test_a_mask_moves_along():
    labels = torch.zeros(75, 100, dtype=torch.uint8)
    labels[20:50, 30:80] = 7
    image = labels.expand(3, -1, -1).contiguous()
    for view in MultiView(v2.RandomResizedCrop(64, antialias=False), v2.RandomHorizontalFlip(1.0))(image, labels):
        assert type(view) is MaskedView
        assert view.mask.dtype == torch.uint8
        assert view.mask.shape == view.image.shape[-2:]
        assert ((view.image[0] > 3) == (view.mask == 7)).float().mean() > 0.95
    assert type(MultiView(v2.Identity())(F.to_pil_image(image), F.to_pil_image(labels[None]))[0].mask) is Tensor


def test_user_transforms_that_call_functionals_are_followed():
    class QuarterTurn(v2.Transform):
        def transform(self, inpt, params):
            return self._call_kernel(F.rotate, inpt, 90.0, expand=True)

    view = MultiView(v2.Compose([QuarterTurn(), v2.Resize(40)]))(tracer((60, 90)))[0]
    assert view.image.shape == (3, 60, 40)
    assert tracking_error(view.image, view.coords, (60, 90)) < 0.15


def test_pil_and_rotation_with_expand_never_disagree_on_the_canvas():
    torch.manual_seed(0)
    views = MultiView(v2.RandomRotation(180, expand=True))
    image = F.to_pil_image(photo((61, 83)))
    assert all(views(image)[0].image.dtype == torch.uint8 for _ in range(200))


class Unmoved(v2.Transform):
    """Crops the image and forgets the coords."""

    def transform(self, inpt, params):
        return inpt[..., :-2] if isinstance(inpt, tv_tensors.Image) else inpt


class Stripped(v2.Transform):
    def transform(self, inpt, params):
        return inpt.as_subclass(Tensor)


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        (v2.RandAugment(), "RandAugment"),
        (v2.Compose([v2.RandomApply([v2.TrivialAugmentWide()])]), "TrivialAugmentWide"),
        (nn.Sequential(v2.Identity(), v2.AutoAugment()), "AutoAugment"),
        (v2.RandomChoice([v2.Identity(), v2.AugMix()]), "AugMix"),
        (v2.FiveCrop(8), "FiveCrop"),
        (v2.TenCrop(8), "TenCrop"),
        (v2.ElasticTransform(), "ElasticTransform"),
        (v2.ToPureTensor(), "ToPureTensor"),
        (v2.Lambda(lambda x: x), "Lambda"),
        (v2.RandomOrder([v2.Lambda(lambda x: x + 0)]), "Lambda"),
        (v2.LinearTransformation(torch.eye(12), torch.zeros(12)), "LinearTransformation"),
        (v1.RandomCrop(8), "RandomCrop"),
        (v2.Compose([Unmoved()]), "Unmoved"),
        (v2.Compose([v2.ToImage(), Stripped(), v2.RandomHorizontalFlip(1.0)]), "Stripped"),
        (lambda image, coords: image, "lambda"),
        (lambda image, coords: (image, torch.eye(3)), "lambda"),
        (lambda image, coords: (image, tv_tensors.wrap(coords + 0, like=coords)), "lambda.* without canvas_size"),
        (v2.Compose([v2.RandomCrop(40), v2.Pad(9, padding_mode="reflect")]), "pad"),
    ],
)
def test_what_cannot_be_followed_raises_with_its_name(transform, name):
    with pytest.raises(ValueError, match=name):
        MultiView(transform)(photo())


def brighter(image):
    return image + 1


class Brighter(nn.Module):
    def forward(self, image):
        return image + 1


class BrighterTransform(v2.Transform):
    def forward(self, image):
        return image + 1


class Callable:
    def __call__(self, image, strength=1, *, both=False):
        return image + strength

    def method(self, image):
        return image + 1


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (brighter, "brighter"),
        (lambda x: x, "<lambda>"),
        (Brighter(), "Brighter"),
        (BrighterTransform(), "BrighterTransform"),
        (Callable().method, "method"),
        (partial(brighter), "partial"),
    ],
)
def test_steps_that_take_the_image_alone_are_named(step, name):
    message = f"transforms: expected steps that take the image and its coords, .*; {name} takes the image alone .see"
    for pipeline in (
        step,
        v2.Compose([v2.Identity(), step]),
        nn.Sequential(v2.Identity(), step) if isinstance(step, nn.Module) else step,
        v2.Compose([v2.RandomChoice([v2.Identity(), v2.RandomApply([step], p=1.0)])]),
    ):
        for call in (lambda p: MultiView(v2.Identity(), p), lambda p: check_tracking(p, draws=1)):
            with pytest.raises(ValueError, match=message):
                call(pipeline)


def test_steps_that_take_image_and_coords_in_any_way_are_not_refused():
    def passed(image, coords, mask=None):
        return (image, coords) if mask is None else (image, coords, mask)

    @wraps(brighter)
    def wrapper(*parts):
        return parts

    class ImageFirst(v2.Transform):
        """Hands its children the image alone, which is its own affair."""

        def __init__(self, transforms):
            super().__init__()
            self.transforms = transforms

        def forward(self, image, *rest):
            for transform in self.transforms:
                image = tv_tensors.wrap(transform(image), like=image)
            return (image, *rest)

    def failing(image, coords):
        return brighter(image, coords)  # a mistake inside of a step

    for step in (passed, wrapper, ImageFirst([brighter]), lambda *parts: parts, partial(passed, mask=None)):
        for pipeline in (step, v2.Compose([v2.Identity(), step])):
            MultiView(pipeline)(photo())
    with pytest.raises(TypeError, match="brighter"):
        MultiView(failing)(photo())


def test_a_functional_called_on_pixels_alone_cannot_hide_behind_a_container():
    sneaky = v2.RandomApply([Unmoved()], p=1.0)
    with pytest.raises(ValueError, match=r"Unmoved.*moved pixels and not the coords"):
        MultiView(v2.Compose([v2.Identity(), sneaky]))(photo())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MultiView(), "transforms: expected at least one"),
        (lambda: MultiView(3), "transforms: expected callables.*int"),
        (lambda: MultiView([v2.Identity(), v2.Identity()]), r"one per view, got list; write MultiView\(\*list\)$"),
        (lambda: MultiView((v2.Identity(),)), r"one per view, got tuple; write MultiView\(\*tuple\)$"),
        (lambda: MultiView(v2.Identity())(torch.zeros(4, 4)), r"image: expected .*got \(4, 4\)"),
        (lambda: MultiView(v2.Identity())("a.jpg"), "image: expected .*got str"),
        (lambda: MultiView(v2.Identity())(torch.zeros(3, 0, 4)), r"image: expected .*got \(3, 0, 4\)"),
        (lambda: MultiView(v2.Identity())(photo(), torch.zeros(4, 4)), r"mask: expected .*\(75, 100\).*got \(4, 4\)"),
        (lambda: BatchAugment(K.RandomElasticTransform()), "augmentation: RandomElasticTransform cannot be tracked"),
        (lambda: BatchAugment(K.AugmentationSequential(K.RandomJigsaw())), "RandomJigsaw"),
        (lambda: BatchAugment(K.AugmentationSequential(K.RandomThinPlateSpline())), "RandomThinPlateSpline"),
        (lambda: BatchAugment(K.auto.RandAugment(2, 10)), "RandAugment"),
        (lambda: BatchAugment(K.ImageSequential(K.RandomRotation(3.0))), "ImageSequential"),
        (lambda: BatchAugment(nn.Sequential(K.RandomRotation(3.0))), "Sequential"),
        (
            lambda: BatchAugment(K.RandomHorizontalFlip())(View(photo(), torch.eye(3), torch.ones(2))),
            r"view.image: expected .*got torch.uint8 \(3, 75, 100\)",
        ),
        (
            lambda: BatchAugment(K.RandomHorizontalFlip())(
                View(photo()[None].long(), torch.eye(3)[None], torch.ones(2))
            ),
            "view.image: expected .*int64",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- the contract through a DataLoader --------------------------------------------------------------------------------


class Photos(Dataset):
    """Sources of varying size; three views of two sizes."""

    def __init__(self, dense: bool = False, mask: bool = False):
        crop = v2.Compose([v2.RandomResizedCrop(48), v2.RandomHorizontalFlip()])
        small = v2.Compose([v2.RandomResizedCrop((24, 32)), v2.RandomHorizontalFlip()])
        self.views = MultiView(crop, crop, small, dense=dense)
        self.mask = mask

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int):
        image = photo((60 + 5 * index, 90 - 7 * index), index)
        return self.views(image, image[0] if self.mask else None)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_contract_survives_loader_workers_and_collate(dense, mask, workers):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = list(DataLoader(Photos(dense, mask), batch_size=3, num_workers=workers))
    assert len(batches) == 2
    for batch in batches:
        for view, size in zip(batch, ((48, 48), (48, 48), (24, 32)), strict=True):
            assert type(view) is (MaskedView if mask else View)
            assert view.image.shape == (3, 3, *size)
            assert type(view.coords) is Tensor
            assert view.coords.shape == ((3, 2, *size) if dense else (3, 3, 3))
            assert view.source_size.shape == (3, 2)
            assert view.source_size.dtype == torch.int64
            if mask:
                assert view.mask.shape == (3, *size)
        match = DistanceMatcher(0.7)
        found = match(batch[0].coords, batch[2].coords, (6, 6), (3, 4), source_size=batch[0].source_size)
        assert found.shape == (3, 36, 12)
        assert found.any()


# --- kornia on top ----------------------------------------------------------------------------------------------------

PROJECTIVE_KORNIA = {
    "flip": lambda: K.RandomHorizontalFlip(),
    "rotation": lambda: K.RandomRotation(40.0, p=1.0),
    "affine": lambda: K.RandomAffine(30.0, (0.1, 0.1), (0.7, 1.3), 10.0, p=1.0),
    "perspective": lambda: K.RandomPerspective(0.4, p=1.0),
    "crop": lambda: K.RandomCrop((40, 50), p=1.0),
    "resized crop": lambda: K.RandomResizedCrop((40, 56), scale=(0.3, 1.0), p=1.0),
    "resize": lambda: K.Resize((50, 70)),
    "pad": lambda: K.PadTo((90, 100)),
    "a sequence": lambda: K.AugmentationSequential(
        K.RandomRotation(20.0, p=0.5), K.ColorJitter(0.0, 0.0, 0.0, 0.0), K.RandomVerticalFlip(), K.CenterCrop((50, 60))
    ),
}


def tracer_batch(coords_kind) -> tuple[View, tuple[int, int]]:
    source = (90, 120)
    # 0..1, as kornia wants it; the crop before it stays at the source's scale, the flip mirrors it
    pipeline = v2.Compose([v2.RandomCrop((70, 80)), v2.RandomHorizontalFlip()])
    views = [View(*pipeline(tracer(source), coords_kind(canvas_size=source)), torch.tensor(source)) for _ in range(3)]
    batch = default_collate(views)
    return batch._replace(image=batch.image / torch.tensor([120.0, 90.0, 1.0])[:, None, None]), source


@pytest.mark.parametrize("kind", [ViewCoords, DenseCoords])
@pytest.mark.parametrize("name", PROJECTIVE_KORNIA)
@pytest.mark.parametrize("seed", range(3))
def test_kornia_composes_on_what_happened_before(name, kind, seed):
    torch.manual_seed(seed)
    batch, source = tracer_batch(kind)
    view = BatchAugment(PROJECTIVE_KORNIA[name]())(batch)
    scale = torch.tensor([120.0, 90.0, 1.0])[:, None, None]
    for image, coords in zip(view.image, view.coords, strict=True):
        assert tracking_error(image * scale, coords, source, rim=4) < 0.3


def test_kornia_moves_the_mask_and_rims_are_fill():
    batch, _ = tracer_batch(ViewCoords)
    labels = torch.full((3, 70, 80), 200, dtype=torch.uint8)
    view = BatchAugment(K.RandomRotation((30.0, 40.0), p=1.0))(MaskedView(*batch, labels), seed=1)
    fill = view.image[:, 2] == 0
    assert view.mask.dtype == torch.uint8
    assert ((view.mask == 0) == fill).float().mean() > 0.97
    assert (view.image[:, 2] == MARK).any()


@pytest.mark.parametrize("preset", PHOTOMETRIC)
def test_photometric_half_on_the_device(preset):
    batch = default_collate([byol_views(32, photometric=False)(photo(seed=i))[0] for i in range(4)])
    for augment in preset():
        view = augment(batch, seed=3)
        assert view.image.dtype == torch.float32
        assert view.image.shape == batch.image.shape
        assert view.coords is batch.coords  # nothing moved: nothing computed
        assert view.image.std() > 0.3


def test_a_seeded_draw_repeats_and_leaves_the_global_generator_alone():
    batch = default_collate([byol_views(32, photometric=False)(photo(seed=i))[0] for i in range(4)])
    augment = byol_photometric()[0]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = augment(batch, seed=7), augment(batch, seed=7), augment(batch, seed=8)
    assert torch.equal(first.image, again.image)
    assert not torch.equal(first.image, other.image)
    assert torch.equal(torch.rand(3), expected)


def test_batch_augment_is_float32_under_autocast():
    batch, _ = tracer_batch(ViewCoords)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        view = BatchAugment(K.RandomAffine(30.0, p=1.0))(batch._replace(image=batch.image.bfloat16()), seed=0)
    exact = BatchAugment(K.RandomAffine(30.0, p=1.0))(batch, seed=0)
    assert view.image.dtype == torch.float32
    assert torch.equal(view.coords, exact.coords)


def test_views_of_ones_own_keep_the_precision_of_their_coords():
    batch, _ = tracer_batch(ViewCoords)
    exact = batch._replace(coords=batch.coords.double())
    view = BatchAugment(K.RandomAffine(30.0, p=1.0))(exact, seed=0)
    assert view.coords.dtype == torch.float64
    torch.testing.assert_close(view.coords.float(), BatchAugment(K.RandomAffine(30.0, p=1.0))(batch, seed=0).coords)
    for other in (batch.image, tuple(batch)):
        with pytest.raises(ValueError, match=f"view: expected a View or a MaskedView, .* got {type(other).__name__}"):
            BatchAugment(K.RandomAffine(30.0, p=1.0))(other)


def test_palette_images_become_colours():
    palette = F.to_pil_image(photo()).convert("P")
    assert MultiView(v2.Identity())(palette)[0].image.shape[0] == 3
    assert MultiView(v2.Identity())(Image.new("L", (10, 10)))[0].image.shape[0] == 1
