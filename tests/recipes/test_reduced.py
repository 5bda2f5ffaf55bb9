"""Large JPEGs decoded at a fraction of their size: the same places, the same colours, the same errors."""

import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from examples.pretrain.common.data.decode import decode_photo
from examples.pretrain.common.data.files import Photos
from examples.pretrain.common.data.options import photo_views
from examples.pretrain.common.data.reduced import FilePixels, step_for

SIZE = 24


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Soft blobs; neither side is a multiple of 8."""
    rng = np.random.default_rng(3)
    layers = [
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize((401, 303), Image.BICUBIC)
        for side in (4, 9, 14)
    ]
    return Image.fromarray(np.mean([np.asarray(layer) for layer in layers], 0).astype(np.uint8))


def saved(image: Image.Image, orientation: int = 1, **options) -> Tensor:
    exif, file = Image.Exif(), io.BytesIO()
    exif[274] = orientation
    image.save(file, options.pop("format", "JPEG"), quality=95, exif=exif, **options)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def drawing(channels: int = 3, **options):
    options = {"size": SIZE, "photometric": "none", "channels": channels, "scale": (0.3, 1.0), **options}
    return photo_views("unused", mean=[0.5] * channels, std=[0.5] * channels, **options).draw


def pairs(data: Tensor, channels: int = 3, **options):
    """Views of the reduced image beside those of the whole one, from the same draws."""
    for index in range(6):
        batches = []
        for reduced in (True, False):
            draw = drawing(channels, reduced=reduced, **options)
            image = draw.decoded(data, "photo", channels, 0, index)
            assert isinstance(image, FilePixels) == reduced
            batches.append(draw(image, "photo", 0, index))
        yield from zip(batches[0][:2], batches[1][:2], strict=True)


def shift(one: Tensor, other: Tensor) -> Tensor:
    """By how many pixels an image lies beside another, x and y; by least squares, free of a change in brightness."""
    one, other = one.float().mean(0), other.float().mean(0)
    slopes = [(one[1:-1, 2:] - one[1:-1, :-2]) / 2, (one[2:, 1:-1] - one[:-2, 1:-1]) / 2]
    known = torch.stack([*(slope.flatten() for slope in slopes), torch.ones(slopes[0].numel())], 1)
    return torch.linalg.lstsq(known, (other - one)[1:-1, 1:-1].flatten()[:, None]).solution[:2, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_lie_where_the_coords_say(orientation, photo):
    """Far below the pixel of the file that check_tracking allows; a part of the last eighth ignored is 5 pixels."""
    for small, whole in pairs(saved(photo, orientation)):
        assert torch.equal(small.coords, whole.coords)
        assert torch.equal(small.source_size, whole.source_size)
        steps = small.coords.diagonal()[:2].abs() * small.source_size.flip(0) / SIZE
        assert (shift(whole.image, small.image).abs() * steps).max() < 0.4
        assert (small.image.float() - whole.image.float()).abs().mean() < 4


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_colours(mode, channels, photo):
    for small, whole in pairs(saved(photo.convert(mode)), channels):
        assert small.image.shape == whole.image.shape == (channels, SIZE, SIZE)
        assert small.image.dtype == torch.uint8
        difference = small.image.float() - whole.image.float()
        assert difference.mean((1, 2)).abs().max() < 1.5
        assert difference.abs().mean() < 4


def test_what_follows_the_crop_is_the_runs(photo):
    """Flips, quarter turns and redraws; and a phone's file of several pictures."""
    data = saved(photo, format="MPO", save_all=True, append_images=[photo])
    for small, whole in pairs(data, vertical_flip=True, quarter_turns=True, redraws=3, scale=(0.08, 0.2)):
        assert torch.equal(small.coords, whole.coords)
        assert (small.image.float() - whole.image.float()).abs().mean() < 4


def test_as_few_pixels_as_the_crops_need(photo):
    data, draw = saved(photo), drawing(scale=(0.9, 1.0))
    assert draw.decoded(data, "photo", 3, 0, 0).photo.step == 8  # 303 pixels to 24
    assert drawing(scale=(0.9, 1.0), size=64).decoded(data, "photo", 3, 0, 0).photo.step == 4
    image = draw.decoded(data, "photo", 3, 0, 0)
    image.photo.crop((10, 10, 40, 60), (24, 24))  # not what it was decoded for
    assert image.photo.step == 1
    assert [step_for([pair]) for pair in ((8.0, 9.0), (9.0, 7.9), (3.9, 5.0), (1.9, 9.0), (0.5, 0.5))] == [
        8,
        4,
        2,
        1,
        1,
    ]


def test_what_is_decoded_whole(photo):
    data = saved(photo)
    for draw, channels in ((drawing(size=80), 3), (drawing(reduced=False), 3), (drawing(nodata=0), 3)):
        assert torch.equal(draw.decoded(data, "photo", channels, 0, 0), decode_photo(data, "photo", channels))
    png = saved(photo, format="PNG")
    assert torch.equal(drawing().decoded(png, "photo", 3, 0, 0), decode_photo(png, "photo", 3))


def test_a_damaged_one_is_counted_and_named(photo, tmp_path, caplog):
    whole = saved(photo).numpy().tobytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.jpg").write_bytes(whole)
    with caplog.at_level(logging.WARNING):
        batch = Photos([tmp_path / "a.jpg", tmp_path / "b.jpg"], drawing(), channels=3)[0, 0]
    assert int(batch.unreadable) == 1
    assert "a.jpg: unreadable, another takes its place: image file is truncated" in caplog.text
