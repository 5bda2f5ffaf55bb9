"""Random images in random forms: the views show the pixels that went in, or the form is refused by name."""

import random

import kornia.augmentation as K
import numpy as np
import pytest
import torch
import torchvision.models as tv
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from densessl import (
    BatchAugment,
    FeatureMap,
    MultiView,
    View,
    byol_photometric,
    byol_views,
    mocov2_views,
    multichannel_views,
    simclr_views,
)

CASES = 120


def pixels_of(draw: random.Random, channels: int = 3) -> Tensor:
    """uint8 (C, H, W), sides of 6 to 40 pixels."""
    return torch.randint(0, 256, (channels, draw.randint(6, 40), draw.randint(6, 40)), dtype=torch.uint8)


def as_pil(x: Tensor, mode: str) -> Image.Image:
    image = Image.fromarray(x.permute(1, 2, 0).numpy())
    return image.quantize(200) if mode == "P" else image.convert(mode)


def shown(image: Image.Image) -> Tensor:
    """What a PIL image shows, in colour or grey."""
    kept = image.convert("L" if image.mode in ("1", "L") else "RGB")
    return torch.from_numpy(np.atleast_3d(np.array(kept))).permute(2, 0, 1)


# Each gives what goes in and what has to come out of a pipeline without changes.
FORMS = {
    "uint8": lambda x: (x, x),
    "grey": lambda x: (x[:1], x[:1]),
    "five channels": lambda x: (torch.cat([x, x[:2]]), torch.cat([x, x[:2]])),
    "float32": lambda x: (x.float() / 255, x.float() / 255),
    "float64": lambda x: (x.double() / 255, x.double() / 255),
    "float16": lambda x: ((x / 255).half(), (x / 255).half()),
    "rounded beyond 1": lambda x: (x / 255 * (1 + 1e-6), x / 255 * (1 + 1e-6)),
    "an image of torchvision's": lambda x: (tv_tensors.Image(x), x),
    "not contiguous": lambda x: (x.mT.contiguous().mT, x),
    "channels last in memory": lambda x: (x.permute(1, 2, 0).contiguous().permute(2, 0, 1), x),
    "16 bits": lambda x: (x.to(torch.uint16) * 257, x.to(torch.uint16) * 257),
    **{f"pil {mode}": (lambda x, mode=mode: (image := as_pil(x, mode), shown(image)))
       for mode in ("RGB", "L", "1", "P", "RGBA", "CMYK", "YCbCr", "HSV")},
}  # fmt: skip
try:
    torch.rot90(torch.zeros(2, 2, dtype=torch.uint16))
except RuntimeError:  # torch 2.6 cannot mirror such images
    del FORMS["16 bits"]
NOT_TAKEN = {
    "channels last": lambda x: x.permute(1, 2, 0),
    "grey with channels last": lambda x: x[:1].permute(1, 2, 0),
    "channels last, float": lambda x: x.permute(1, 2, 0) / 255,
    "0 to 255 in floating point": lambda x: x.float(),
    "16 bits in floating point": lambda x: x.float() * 257,
    "normalised": lambda x: (x / 255 - 0.45) / 0.22,
    "-1 to 1": lambda x: x / 127.5 - 1,
    "NaN": lambda x: (x / 255).masked_fill(torch.rand(x.shape) < 0.1, torch.nan),
    "infinite": lambda x: (x / 255).masked_fill(torch.rand(x.shape) < 0.1, torch.inf),
    "complex": lambda x: x.to(torch.complex64),
    "a batch": lambda x: x[None],
    "a plane": lambda x: x[0],
    "a vector": lambda x: x.flatten(),
    "nothing": lambda x: x[:, :0],
    "no channels": lambda x: x[:0],
    "an array": lambda x: x.permute(1, 2, 0).numpy(),
    "an array of channels": lambda x: x.numpy(),
    "a path": lambda x: "photo.jpg",
    "bytes": lambda x: b"\xff\xd8",
    "a list": lambda x: x.tolist(),
    "none": lambda x: None,
}
# The pixels of these hold still or are picked.
EXACT = {
    "identity": (v2.Identity(), lambda x: x),
    "mirrored": (v2.RandomHorizontalFlip(1.0), lambda x: x.flip(-1)),
    "upside down": (v2.RandomVerticalFlip(1.0), lambda x: x.flip(-2)),
    "cut": (v2.CenterCrop(5), lambda x: v2.functional.center_crop(x, [5, 5])),
    "turned": (v2.RandomRotation((90, 90), expand=True), lambda x: x.rot90(1, (-2, -1))),
}


def test_views_show_what_went_in():
    draw = random.Random(0)
    for case in range(CASES):
        name, move = draw.choice(list(FORMS)), draw.choice(list(EXACT))
        given, expected = FORMS[name](pixels_of(draw))
        kept = given.clone() if isinstance(given, Tensor) else given.copy()
        transform, by_hand = EXACT[move]
        view = MultiView(transform, dense=draw.random() < 0.3)(given)[0]
        assert type(view.image) is Tensor, (case, name)
        assert view.image.dtype == expected.dtype, (case, name)
        assert torch.equal(view.image.double(), by_hand(expected.double())), (case, name, move)
        assert view.source_size.tolist() == list(expected.shape[-2:])
        same = torch.equal(given, kept) if isinstance(given, Tensor) else given == kept
        assert same, (case, name)


PRESETS = [byol_views, mocov2_views, simclr_views, multichannel_views]


def test_presets_make_the_same_of_one_photo_in_all_its_forms():
    """PIL resizes in whole numbers, and solarizing turns round where a pixel lies near its threshold: rarely."""
    draw = random.Random(1)
    taken = [
        "uint8",
        "float32",
        "float64",
        "an image of torchvision's",
        "channels last in memory",
        "pil RGB",
        *(["16 bits"] if "16 bits" in FORMS else []),
    ]
    for case in range(CASES // 3):
        x, preset, name = pixels_of(draw), draw.choice(PRESETS), draw.choice(taken)
        statistics = {"mean": (0.4,) * 3, "std": (0.3,) * 3}
        views = preset(9, photometric=draw.random() < 0.5, **statistics)
        seeds = [draw.randrange(2**40), draw.randrange(2**40)]
        for view, expected in zip(views(FORMS[name](x)[0], seeds=seeds), views(x, seeds=seeds), strict=True):
            torch.testing.assert_close(view.coords, expected.coords)
            one, other = (unit(image) for image in (view.image, expected.image))
            away = (one - other).abs() / max(float(other.abs().max()), 1e-3)
            assert away.median() < 0.02, (case, name, preset.__name__)


def unit(image: Tensor) -> Tensor:
    """Whole numbers to 0..1; normalised images as they are."""
    return image.double() if image.is_floating_point() else image.double() / torch.iinfo(image.dtype).max


@pytest.mark.parametrize("kind", ["preset", "geometric"])
def test_other_images_are_refused_by_name(kind):
    draw = random.Random(2)
    for case in range(CASES):
        name = draw.choice(list(NOT_TAKEN))
        given = NOT_TAKEN[name](pixels_of(draw))
        views = draw.choice(PRESETS[:3])(8) if kind == "preset" else MultiView(draw.choice(list(EXACT.values()))[0])
        with pytest.raises(ValueError, match=r"^image: expected") as told:
            views(given)
        assert told.value is not None, (case, name)


WHOLE_NUMBERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint32, torch.bool]


@pytest.mark.parametrize("dtype", WHOLE_NUMBERS)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_refuse_whole_numbers_without_a_range(preset, dtype):
    """Scaled by the largest number of their type, 0 to 255 would become black."""
    given = (torch.randint(0, 2, (3, 20, 24)) if dtype == torch.bool else torch.randint(0, 128, (3, 20, 24))).to(dtype)
    with pytest.raises(ValueError, match=r"^image: expected"):
        preset(8, mean=(0.4,) * 3, std=(0.3,) * 3)(given)


# --- batches ----------------------------------------------------------------------------------------------------------


def batch_of(image: Tensor) -> View:
    count = len(image) if image.ndim else 1
    return View(image, torch.eye(3).expand(count, 3, 3), torch.tensor([[30, 40]]).expand(count, 2))


def test_batches():
    """uint8 and float are one; a flip gives the pixels back."""
    draw = random.Random(3)
    flip = BatchAugment(K.RandomHorizontalFlip(p=1.0))
    colours = byol_photometric()
    for case in range(CASES // 4):
        x = torch.randint(0, 256, (2, 3, draw.randint(14, 24), draw.randint(14, 24)), dtype=torch.uint8)
        forms = [x, x.float() / 255, x.double() / 255, x.contiguous(memory_format=torch.channels_last)]
        for image in forms:
            view = flip(batch_of(image))
            torch.testing.assert_close(view.image, x.flip(-1).float() / 255, atol=1e-6, rtol=0, msg=str(case))
        seed, augment = draw.randrange(2**30), colours[case % 2]
        first = augment(batch_of(forms[0]), seed=seed).image
        for image in forms[1:]:
            torch.testing.assert_close(augment(batch_of(image), seed=seed).image, first, atol=1e-4, rtol=1e-4)


NO_BATCH = {
    "channels last": lambda x: x.permute(0, 2, 3, 1),
    "channels last, uint8": lambda x: (x * 255).byte().permute(0, 2, 3, 1),
    "one image": lambda x: x[0],
    "0 to 255": lambda x: x * 255,
    "normalised": lambda x: (x - 0.45) / 0.22,
    "NaN": lambda x: x.masked_fill(x > 0.9, torch.nan),
    "16 bits": lambda x: (x * 65535).to(torch.uint16),
    "int64": lambda x: (x * 255).long(),
    "bool": lambda x: x > 0.5,
    "complex": lambda x: x.to(torch.complex64),
    "an array": lambda x: x.numpy(),
    "a list": lambda x: x.tolist(),
    "none": lambda x: None,
}


@pytest.mark.parametrize("name", NO_BATCH)
def test_other_batches_are_refused_by_name(name):
    for augment in (BatchAugment(K.RandomHorizontalFlip()), byol_photometric()[0]):
        view = batch_of(torch.rand(2, 3, 12, 16))
        with pytest.raises(ValueError, match=r"^view\.image: expected"):
            augment(view._replace(image=NO_BATCH[name](view.image)))


# --- encoders ---------------------------------------------------------------------------------------------------------

NO_IMAGES = {
    "uint8": lambda x: (x * 255).byte(),
    "int64": lambda x: (x * 255).long(),
    "one image": lambda x: x[0],
    "channels last": lambda x: x.permute(0, 2, 3, 1),
    "grey": lambda x: x[:, :1],
    "four channels": lambda x: torch.cat([x, x[:, :1]], 1),
    "a video": lambda x: x[:, :, None],
    "too small": lambda x: x[..., :8, :8],
    "an array": lambda x: x.numpy(),
    "a view": lambda x: batch_of(x),
    "none": lambda x: None,
}


@pytest.fixture(scope="module")
def encoders():
    return FeatureMap(tv.resnet18()), FeatureMap(tv.resnet18(), layers=["layer4", "layer2"])


@pytest.mark.parametrize("name", NO_IMAGES)
def test_encoders_refuse_other_images_by_name(name, encoders):
    for encoder in encoders:
        with pytest.raises(ValueError, match=r"^image: expected|^image: layer 'layer4' shrinks 8x8 pixels"):
            encoder(NO_IMAGES[name](torch.rand(2, 3, 64, 96)))
