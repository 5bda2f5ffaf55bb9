"""Coords never lie: every geometric functional of the installed torchvision moves pixels and coords alike."""

import copy
import io
import pickle

import pytest
import torch
import torchvision.transforms.v2.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import InterpolationMode, v2
from tracing import tracer, tracking_error

from densessl import DenseCoords, ViewCoords
from densessl.coords._functionals import FOLLOWED, QUERIES, STATIONARY, dispatched_functionals

SOURCE = (60, 90)
BILINEAR = InterpolationMode.BILINEAR
CORNERS = [[0, 0], [89, 0], [89, 59], [0, 59]]
MOVED = [[5, 4], [81, 2], [87, 52], [2, 59]]

PROJECTIVE = {
    "horizontal_flip": F.horizontal_flip,
    "vertical_flip": F.vertical_flip,
    "crop": lambda x: F.crop(x, 5, 7, 30, 41),
    "crop beyond the image": lambda x: F.crop(x, -5, 70, 30, 41),
    "pad, four sides": lambda x: F.pad(x, [3, 4, 5, 6]),
    "pad, two numbers": lambda x: F.pad(x, [3, 4]),
    "pad, one number": lambda x: F.pad(x, 5),
    "resize": lambda x: F.resize(x, [37, 52]),
    "resize without antialias": lambda x: F.resize(x, [37, 52], antialias=False),
    "resize to the shorter edge without antialias": lambda x: F.resize(x, 41, antialias=False),
    "resize up": lambda x: F.resize(x, [100, 173]),
    "resize, bicubic": lambda x: F.resize(x, [100, 173], InterpolationMode.BICUBIC),
    "resize, shorter edge": lambda x: F.resize(x, 41),
    "resize, shorter edge, list": lambda x: F.resize(x, [41]),
    "resize, max_size": lambda x: F.resize(x, 41, max_size=50),
    "resize, longest edge": lambda x: F.resize(x, None, max_size=75),
    "resized_crop": lambda x: F.resized_crop(x, 5, 7, 30, 41, [48, 64]),
    "center_crop": lambda x: F.center_crop(x, [31, 44]),
    "center_crop, one number": lambda x: F.center_crop(x, 31),
    "center_crop, larger": lambda x: F.center_crop(x, [71, 95]),
    "center_crop, larger one way": lambda x: F.center_crop(x, [71, 33]),
    "affine": lambda x: F.affine(x, 23.0, [4, -3], 1.2, [10.0, -5.0], BILINEAR),
    "affine, center": lambda x: F.affine(x, 23.0, [4, -3], 0.8, [10.0, -5.0], BILINEAR, center=[10, 20]),
    "affine, one shear": lambda x: F.affine(x, -70.0, [0, 0], 1.0, 10.0, BILINEAR),
    "rotate": lambda x: F.rotate(x, 33.0, BILINEAR),
    "rotate, center": lambda x: F.rotate(x, 33.0, BILINEAR, center=[10, 20]),
    "rotate, expand": lambda x: F.rotate(x, 33.0, BILINEAR, expand=True),
    "rotate, expand, center": lambda x: F.rotate(x, 33.0, BILINEAR, expand=True, center=[10, 20]),
    "rotate by 90": lambda x: F.rotate(x, 90.0, BILINEAR),
    "rotate by 90, expand": lambda x: F.rotate(x, 90.0, BILINEAR, expand=True),
    "rotate by 180, expand": lambda x: F.rotate(x, -180.0, BILINEAR, expand=True),
    "rotate by 270, expand": lambda x: F.rotate(x, -90.0, BILINEAR, expand=True),
    "perspective": lambda x: F.perspective(x, CORNERS, MOVED),
    "perspective, coefficients": lambda x: F.perspective(
        x, None, None, coefficients=[1.1, 0.05, -3.0, -0.02, 0.95, 2.0, 5e-4, -3e-4]
    ),
}


@pytest.mark.parametrize("kind", [ViewCoords, DenseCoords])
@pytest.mark.parametrize("name", PROJECTIVE)
def test_each_functional_alone(name, kind):
    image, coords = PROJECTIVE[name](tracer(SOURCE)), PROJECTIVE[name](kind(canvas_size=SOURCE))
    assert type(coords) is kind
    assert coords.canvas_size == tuple(image.shape[-2:])
    assert tracking_error(image, coords, SOURCE) < 0.15


def test_the_oracle_sees_a_shift_and_a_flip():
    image, coords = tracer(SOURCE), ViewCoords(canvas_size=SOURCE)
    assert tracking_error(image.roll(2, -1), coords, SOURCE) >= 1.9
    assert tracking_error(image.flip(-1), coords, SOURCE) > 50


# torchvision's antialiased reduction is itself up to 0.11 px off the place, in pixels of its input (its filter is cut
# to whole pixels); a chain of several adds that up, whatever the coords do. It is tested alone and in random pipelines.
ANTIALIASED = {name for name in PROJECTIVE if name.startswith("resize,") or name == "resize"}
CHAINED = sorted(set(PROJECTIVE) - ANTIALIASED - {"crop beyond the image"})


@given(st.lists(st.sampled_from(CHAINED), min_size=2, max_size=4))
def test_chains(names):
    image, coords = tracer(SOURCE), ViewCoords(canvas_size=SOURCE)
    for name in names:
        if min(image.shape[-2:]) < 30:
            break
        image, coords = PROJECTIVE[name](image), PROJECTIVE[name](coords)
        # Interpolation at the rim of one step must not count as an error of the next.
        rim = 6
        inner = torch.full_like(image.as_subclass(Tensor)[2:], -1.0)
        inner[:, rim:-rim, rim:-rim] = image.as_subclass(Tensor)[2:, rim:-rim, rim:-rim]
        image = type(image)(torch.cat([image.as_subclass(Tensor)[:2], inner]))
    try:
        error = tracking_error(image, coords, SOURCE, rim=2)
    except AssertionError:
        return  # nothing but rim was left
    assert error < 0.15


@given(st.integers(0, 2**31))
def test_random_pipelines(seed):
    torch.manual_seed(seed)
    pipeline = v2.Compose(
        [
            v2.RandomResizedCrop((64, 48), scale=(0.3, 1.0)),
            v2.RandomAffine(40, (0.1, 0.1), (0.8, 1.3), 10, BILINEAR),
            v2.RandomPerspective(0.4, 0.5),
            v2.RandomApply([v2.RandomRotation(50, BILINEAR, expand=True)], p=0.5),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
        ]
    )
    source = (120, 160)
    image, coords = pipeline(tracer(source), ViewCoords(canvas_size=source))
    assert tracking_error(image, coords, source, rim=6) < 0.15


@given(st.integers(0, 2**31))
def test_elastic_densely(seed):
    torch.manual_seed(seed)
    pipeline = v2.Compose(
        [v2.RandomResizedCrop(96, scale=(0.3, 1.0)), v2.ElasticTransform(50.0), v2.RandomRotation(20)]
    )
    pipeline.transforms[2].interpolation = BILINEAR
    source = (120, 160)
    image, coords = pipeline(tracer(source), DenseCoords(canvas_size=source))
    assert tracking_error(image, coords, source, rim=6) < 0.5


def test_elastic_with_homographies_raises():
    with pytest.raises(ValueError, match=r"elastic cannot be followed by ViewCoords.*dense=True"):
        v2.ElasticTransform()(tracer(SOURCE), ViewCoords(canvas_size=SOURCE))


@given(st.integers(20, 90), st.integers(20, 90), st.integers(1, 120), st.one_of(st.none(), st.integers(60, 200)))
def test_resized_canvas_is_torchvisions_to_the_pixel(height, width, size, max_size):
    image = torch.zeros(1, height, width)
    if max_size is not None and max_size <= size:
        return
    coords = F.resize(ViewCoords(canvas_size=(height, width)), [size], max_size=max_size)
    assert coords.canvas_size == tuple(F.resize(image, [size], max_size=max_size).shape[-2:])


@given(st.integers(5, 300), st.integers(5, 300), st.floats(-720, 720), st.booleans())
def test_expanded_canvas_is_torchvisions_to_the_pixel(height, width, angle, whole):
    angle = float(round(angle / 15) * 15) if whole else angle
    coords = F.rotate(ViewCoords(canvas_size=(height, width)), angle, expand=True)
    assert coords.canvas_size == tuple(F.rotate(torch.zeros(1, height, width), angle, expand=True).shape[-2:])


@pytest.mark.parametrize("name", sorted(set(PROJECTIVE) - {"resize, bicubic", "resize, longest edge"}))
def test_pil_images_move_as_tensors_do(name):
    """PIL's float images, one channel per coordinate."""
    planes = [Image.fromarray(plane.numpy()) for plane in tracer(SOURCE).as_subclass(Tensor)]
    moved = torch.stack([F.pil_to_tensor(PROJECTIVE[name](plane))[0] for plane in planes])
    coords = PROJECTIVE[name](ViewCoords(canvas_size=SOURCE))
    if coords.canvas_size != tuple(moved.shape[-2:]):
        assert "expand" in name  # rounds its canvas differently; MultiView turns PIL into tensors there
        return
    assert tracking_error(moved, coords, SOURCE) < 0.15


@pytest.mark.parametrize("mode", ["reflect", "symmetric"])
def test_mirrored_padding_is_refused_where_coords_would_lie(mode):
    whole = ViewCoords(canvas_size=SOURCE)
    padded = F.pad(F.horizontal_flip(whole), [9, 9], padding_mode=mode)
    assert padded.canvas_size == (78, 108)  # of the whole source: beyond it nothing matches
    with pytest.raises(ValueError, match=f"padding_mode='{mode}'.*after a crop"):
        F.pad(F.crop(whole, 5, 5, 40, 40), [9, 9], padding_mode=mode)
    dense = F.pad(F.crop(DenseCoords(canvas_size=SOURCE), 5, 5, 40, 40), [9, 9], padding_mode=mode)
    assert dense[:, :9].isnan().all()
    assert dense[:, 9:-9, 9:-9].isfinite().all()


def test_dense_coords_know_fill_that_comes_in_after_a_crop():
    image = F.rotate(F.crop(tracer(SOURCE), 10, 10, 40, 40), 45.0, BILINEAR)
    coords = F.rotate(F.crop(DenseCoords(canvas_size=SOURCE), 10, 10, 40, 40), 45.0)
    fill = image[2] == 0
    assert fill.sum() > 100
    assert coords.as_subclass(Tensor)[:, fill].isnan().all()
    assert coords.as_subclass(Tensor)[:, image[2] == 0.5].isfinite().all()


# --- nothing of the installed torchvision is overlooked ---------------------------------------------------------------

RAISES = {"five_crop", "ten_crop"}


def test_every_functional_is_known():
    """A functional of a new torchvision fails here: decide whether it moves pixels, and follow it or list it."""
    known = {functional.__name__ for functional in FOLLOWED} | {"elastic"} | STATIONARY | QUERIES | RAISES
    assert set(dispatched_functionals()) - known == set()


def test_dispatched_functionals_are_all_that_dispatch():
    """Against torchvision's own registry, read here and nowhere in the package."""
    from torchvision.transforms.v2.functional._utils import _KERNEL_REGISTRY

    image_functionals = {
        f.__name__ for f, kernels in _KERNEL_REGISTRY.items() if any("Image" in t.__name__ for t in kernels)
    }
    assert image_functionals <= set(dispatched_functionals()) | {"get_num_frames"}


def test_what_moves_pixels_is_followed_or_raises():
    """Each geometric functional of the installed torchvision, found by what it does to an image."""
    moving = set(dispatched_functionals()) - STATIONARY - QUERIES
    assert {functional.__name__ for functional in FOLLOWED} | {"elastic"} | RAISES == moving


@pytest.mark.parametrize("name", sorted(STATIONARY & set(dispatched_functionals())))
def test_stationary_functionals_leave_pixels_where_they_are(name):
    """A constant image with one odd pixel: the odd place may spread (blur), it may not go elsewhere."""
    arguments = {
        "adjust_brightness": (0.5,),
        "adjust_contrast": (0.5,),
        "adjust_gamma": (0.5,),
        "adjust_hue": (0.2,),
        "adjust_saturation": (0.5,),
        "adjust_sharpness": (0.5,),
        "erase": (0, 0, 3, 3, torch.zeros(3, 3, 3, dtype=torch.uint8)),
        "gaussian_blur": ([3, 3],),
        "jpeg": (95,),
        "normalize": ([0.4] * 3, [0.2] * 3),
        "permute_channels": ([2, 0, 1],),
        "posterize": (4,),
        "solarize": (128,),
    }.get(name, ())
    pixels = torch.full((3, 32, 32), 40, dtype=torch.uint8)
    pixels[:, 24:, 16:24] = torch.tensor([250, 180, 120], dtype=torch.uint8)[:, None, None]
    image = pixels.float() / 255 if name in ("normalize", "gaussian_noise") else pixels
    if name == "grayscale_to_rgb":
        image = image[:1]
    kernel = getattr(F, name)
    out = kernel(image, *arguments).float().mean(0)
    away = (out[8:, 8:] - out[12, 12]).abs()
    peak = (away == away.max()).nonzero()[0]
    assert 16 <= peak[0].item() < 24
    assert 8 <= peak[1].item() < 16
    coords = F.crop(ViewCoords(canvas_size=(64, 64)), 3, 4, 32, 32)
    assert torch.equal(kernel(coords, *arguments), coords)


@pytest.mark.parametrize("name", sorted(RAISES))
def test_functionals_that_return_several_views_raise(name):
    with pytest.raises(ValueError, match=f"{name} cannot be followed"):
        getattr(F, name)(ViewCoords(canvas_size=(8, 8)), 3)


# --- a tensor with metadata -------------------------------------------------------------------------------------------


def saved(x: Tensor) -> Tensor:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "keep",
    [
        Tensor.clone,
        Tensor.detach,
        copy.copy,
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
        saved,
        lambda x: x.to(torch.float64),
        lambda x: x.to("cpu"),
        lambda x: x.requires_grad_(),
    ],
)
@pytest.mark.parametrize("kind", [ViewCoords, DenseCoords])
def test_type_and_canvas_size_are_kept(kind, keep):
    coords = F.crop(kind(canvas_size=(30, 40)), 2, 3, 10, 20)
    kept = keep(coords)
    assert type(kept) is kind
    assert kept.canvas_size == (10, 20)
    assert torch.equal(kept.as_subclass(Tensor).float(), coords.as_subclass(Tensor))


@pytest.mark.parametrize("kind", [ViewCoords, DenseCoords])
def test_arithmetic_and_collate_give_plain_tensors(kind):
    coords = kind(canvas_size=(30, 40))
    assert type(coords + 1) is Tensor
    batch = default_collate([coords, coords])
    assert type(batch) is Tensor
    assert batch.shape == (2, *coords.shape)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ViewCoords(torch.eye(4), canvas_size=(3, 3)), r"data: expected a homography \(3, 3\), got \(4, 4\)"),
        (lambda: ViewCoords(canvas_size=(0, 3)), r"canvas_size: .*got \(0, 3\)"),
        (lambda: DenseCoords(torch.zeros(3, 4, 4)), r"data: expected dense coords \(2, H, W\), got \(3, 4, 4\)"),
        (lambda: DenseCoords(), "canvas_size: expected .*got None"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
