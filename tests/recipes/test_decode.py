"""The one reader: every format and depth against Pillow or by hand, folders with links, and mutilated files."""

import io
import os
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from examples.pretrain.common.data.decode import read_photo
from examples.pretrain.common.data.depths import alike, as_bytes
from examples.pretrain.common.data.finding import find_photos
from examples.pretrain.common.samples import read_squares
from examples.quickstart.photos import read_photos
from examples.transfer.datasets.linear_data import load_photo
from examples.transfer.datasets.segmentation_sets import Labelled
from examples.transfer.datasets.sizes import load

tifffile = pytest.importorskip("tifffile")

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (18, 26, 3), dtype=np.uint8)
GREY = COLOUR[..., 0].copy()
DEEP = RNG.integers(0, 65536, (18, 26), dtype=np.uint16)
SMOOTH = Image.fromarray(COLOUR).resize((104, 72), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def read(data: bytes, folder, channels: int = 3, **options: object) -> torch.Tensor:
    path = folder / "photo.bin"
    path.write_bytes(data)
    return read_photo(path, channels, **options)


def planes(image: Image.Image, mode: str) -> torch.Tensor:
    return torch.from_numpy(np.atleast_3d(np.array(image.convert(mode)))).permute(2, 0, 1)


# --- what Pillow reads as well ----------------------------------------------------------------------------------------

PLAIN = {
    "jpeg": saved(SMOOTH, "JPEG"),
    "grey jpeg": saved(SMOOTH.convert("L"), "JPEG"),
    "cmyk jpeg": saved(SMOOTH.convert("CMYK"), "JPEG"),
    "png": saved(SMOOTH, "PNG"),
    "palette png": saved(SMOOTH.quantize(17), "PNG"),
    "1-bit png": saved(SMOOTH.convert("1"), "PNG"),
    "rgba png": saved(SMOOTH.convert("RGBA"), "PNG"),
    "gif": saved(SMOOTH, "GIF"),
    "animated gif": saved(SMOOTH, "GIF", save_all=True, append_images=[SMOOTH.rotate(90), SMOOTH.rotate(180)]),
    "webp": saved(SMOOTH, "WEBP"),
    "rgba webp": saved(SMOOTH.convert("RGBA"), "WEBP"),
    "animated webp": saved(SMOOTH, "WEBP", save_all=True, append_images=[SMOOTH.rotate(90)]),
    "bmp": saved(SMOOTH, "BMP"),
    "grey tiff": saved(SMOOTH.convert("L"), "TIFF"),
    "grey and alpha tiff": saved(SMOOTH.convert("LA"), "TIFF"),
    "colour tiff": saved(SMOOTH, "TIFF"),
    "rgba tiff": saved(SMOOTH.convert("RGBA"), "TIFF"),
    "cmyk tiff": saved(SMOOTH.convert("CMYK"), "TIFF"),
    "palette tiff": saved(SMOOTH.quantize(17), "TIFF"),
    "1-bit tiff": saved(SMOOTH.convert("1"), "TIFF"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_every_format_becomes_grey_and_colour(name, tmp_path):
    """Within rounding; JPEG's colours, which have half the resolution, are enlarged in other ways."""
    image = Image.open(io.BytesIO(PLAIN[name]))
    for channels, mode in ((3, "RGB"), (1, "L")):
        found = read(PLAIN[name], tmp_path, channels)
        expected = planes(image.convert("RGB"), mode)
        assert found.dtype == torch.uint8
        assert found.shape == expected.shape
        difference = (found.int() - expected.int()).abs()
        assert difference.max() <= (16 if name == "jpeg" else 3)
        assert difference.float().mean() < 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_exif_says(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(SMOOTH, kind, exif=exif, **options)
    stored = Image.open(io.BytesIO(data))
    turned = ImageOps.exif_transpose(stored)
    for image, turn in ((turned, True), (SMOOTH if kind == "TIFF" else stored, False)):  # Pillow turns a TIFF itself
        found = read(data, tmp_path, turn=turn)
        assert found.shape == (3, image.height, image.width)
        assert (found.int() - planes(image, "RGB").int()).abs().float().mean() < 2


def test_a_jpeg_is_decoded_small(tmp_path):
    data = saved(SMOOTH.resize((416, 288)), "JPEG", quality=95)
    assert read(data, tmp_path, side=70).shape == (3, 72, 104)
    assert read(data, tmp_path, side=73).shape == (3, 144, 208)
    small = read(data, tmp_path, side=70).float()
    assert (small - planes(SMOOTH, "RGB")).abs().mean() < 8
    assert torch.equal(read(PLAIN["png"], tmp_path, side=9), planes(SMOOTH, "RGB"))


# --- depths and TIFF, by hand -----------------------------------------------------------------------------------------


def grey(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, np.float64)).float().expand(3, -1, -1)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (saved(Image.fromarray(DEEP), "PNG"), grey(DEEP / 65535)),
        (tiff(DEEP), grey(DEEP / 65535)),
        (tiff(DEEP, byteorder=">"), grey(DEEP / 65535)),
        (tiff(DEEP, photometric="miniswhite"), grey(1 - DEEP / 65535)),
        (tiff((DEEP / 65535).astype(np.float32)), grey(DEEP / 65535)),
        (tiff((DEEP / 65535).astype(np.float64)), grey(DEEP / 65535)),
        (tiff(GREY), grey(GREY)),
        (tiff(GREY, photometric="miniswhite"), grey(255 - GREY)),
        (tiff(GREY > 99, photometric="minisblack"), grey(255 * (GREY > 99))),
        (tiff(GREY > 99, photometric="miniswhite"), grey(255 * (GREY <= 99))),
        (tiff(COLOUR, tile=(16, 16)), None),
        (tiff(COLOUR, compression="zlib"), None),
        (tiff(COLOUR, bigtiff=True), None),
    ],
    ids=["png16", "tiff16", "big end", "16 white", "float32", "float64", "tiff8", "8 white", "1", "1 white",
         "tiles", "deflate", "big"],
)  # fmt: skip
def test_depths(data, expected, tmp_path):
    found = read(data, tmp_path)
    expected = torch.from_numpy(COLOUR).permute(2, 0, 1) if expected is None else expected
    assert found.dtype == (torch.uint8 if expected.max() > 1 else torch.float32)
    torch.testing.assert_close(found.float(), expected.float(), atol=1e-6, rtol=0)


def test_planes_apart(tmp_path):
    data = tiff(np.moveaxis(COLOUR, -1, 0), planarconfig="separate", photometric="rgb")
    assert torch.equal(read(data, tmp_path), torch.from_numpy(COLOUR).permute(2, 0, 1))


def deep_png(pixels: np.ndarray) -> bytes:
    """16 bits a channel, which Pillow writes in grey only; every filter of PNG by turns."""
    height, width, channels = pixels.shape
    rows = pixels.astype(">u2").view(np.uint8).reshape(height, -1).astype(np.int64)
    padded = np.pad(rows, ((1, 0), (2 * channels, 0)))
    left, up, corner = padded[1:, : -2 * channels], padded[:-1, 2 * channels :], padded[:-1, : -2 * channels]
    distances = np.stack([abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)])
    paeth = np.choose(distances.argmin(0), [left, up, corner])
    filtered = [rows, rows - left, rows - up, rows - (left + up) // 2, rows - paeth]
    lines = b"".join(bytes([y % 5]) + (filtered[y % 5][y] % 256).astype(np.uint8).tobytes() for y in range(height))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("stored", [1, 3, 4])
def test_16_bits_in_colour_are_kept(stored, tmp_path):
    pixels = RNG.integers(0, 65536, (18, 26, stored))
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 65535
    for channels in {3, stored}:
        found = read(deep_png(pixels), tmp_path, channels)
        torch.testing.assert_close(found, expected[:channels].expand(channels, -1, -1), atol=1e-7, rtol=0)


@pytest.mark.parametrize("channels", [2, 5])
def test_channels_of_one_s_own(channels, tmp_path):
    """H x W x C and C x H x W as tifffile writes them by default, GDAL's two layouts, ImageJ's stack."""
    last = RNG.integers(0, 256, (18, 26, channels), dtype=np.uint8)
    first = np.moveaxis(last, -1, 0)
    grey = {"photometric": "minisblack"}
    for data in (
        tiff(last, **grey),
        tiff(first, **grey),
        tiff(last, planarconfig="contig", **grey),
        tiff(first, planarconfig="separate", **grey),
        tiff(first, imagej=True),
        tiff(first, metadata=None, **grey),
    ):
        assert torch.equal(read(data, tmp_path, channels), torch.from_numpy(first.copy()))


def test_a_thumbnail_is_no_page(tmp_path):
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(COLOUR[::2, ::2], photometric="rgb", subfiletype=1)
        writer.write(COLOUR, photometric="rgb")
    assert torch.equal(read(file.getvalue(), tmp_path), torch.from_numpy(COLOUR).permute(2, 0, 1))


NAN = (DEEP / 65535).astype(np.float32)
NAN[3, 4] = np.nan


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff(GREY.astype(np.int16) - 99), "expected 1 to 16 bits without a sign, .*got int16"),
        (tiff(GREY.astype(np.uint32)), "expected 1 to 16 bits without a sign, .*got uint32"),
        (tiff(GREY.astype(np.float32)), r"expected floating point in 0..1, got .*25\d.0 and 0 values"),
        (tiff(-NAN.clip(0.1, 1)), "expected floating point in 0..1, got -0.99.* to -0.10"),
        (tiff(NAN), "expected floating point in 0..1, got .* and 1 values that are not finite"),
        (tiff(np.stack([GREY] * 4), photometric="minisblack"), "it has 4 pages: expected one image a file"),
        (tiff(np.stack([COLOUR] * 3), photometric="rgb"), "it has 3 pages: expected one image a file"),
        (tiff(np.stack([GREY] * 5), imagej=True), "it has 5 pages: expected one image a file"),
        (saved(SMOOTH, "TIFF", save_all=True, append_images=[SMOOTH]), "it has 2 pages"),
        (tiff(np.stack([GREY] * 5, -1), photometric="minisblack", planarconfig="contig"), "its 5 channels are neither"),
        (saved(Image.new("LAB", (9, 7)), "TIFF"), "expected grey, colour, a palette or CMYK, got CIELAB"),
        (saved(SMOOTH.convert("YCbCr"), "TIFF"), "expected grey, colour, a palette or CMYK, got YCBCR"),
        (deep_png(RNG.integers(0, 65536, (8, 9, 2))), "expected 16 bits in grey, colour, or .*got grey and alpha"),
        (tiff(np.stack([GREY] * 4, -1), photometric="minisblack", planarconfig="contig"), "its 4 channels are neither"),
        (b"", "cannot be read"),
        (b"no image at all", "cannot be read"),
    ],
)
def test_what_is_refused_by_name(data, message, tmp_path):
    with pytest.raises(RuntimeError, match=rf"photo.bin cannot be read: .*{message}|photo.bin {message}"):
        read(data, tmp_path)


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg", "packbits"])
def test_compressed_tiff(compression, tmp_path):
    data = saved(SMOOTH, "TIFF", compression=compression)
    try:
        import imagecodecs  # noqa: F401
    except ImportError:
        if compression != "packbits":
            with pytest.raises(RuntimeError, match="imagecodecs"):
                read(data, tmp_path)
            return
    found = read(data, tmp_path)
    assert (found.int() - planes(Image.open(io.BytesIO(data)), "RGB").int()).abs().max() <= 3


def test_another_number_of_channels_is_an_error_of_the_settings(tmp_path):
    with pytest.raises(ValueError, match=r"data.channels: expected 4 channels, got 3 in .*photo.bin"):
        read(PLAIN["png"], tmp_path, 4)
    assert torch.equal(read(PLAIN["rgba png"], tmp_path, 4)[:3], planes(SMOOTH, "RGB"))
    assert read(PLAIN["cmyk tiff"], tmp_path, 4).shape == (4, 72, 104)


def test_images_of_two_depths_become_alike(tmp_path):
    shallow, deep = read(tiff(GREY), tmp_path), read(tiff(GREY.astype(np.uint16) * 257), tmp_path)
    assert (shallow.dtype, deep.dtype) == (torch.uint8, torch.float32)
    one, other = alike([shallow, deep])
    torch.testing.assert_close(one, other)
    assert torch.equal(as_bytes(deep), shallow)
    assert as_bytes(shallow) is shallow
    assert alike([shallow, shallow])[0] is shallow


@pytest.mark.parametrize(
    "read_one",
    [
        lambda path: read_photos(path.parent, 1, 18)[0],
        lambda path: read_squares([path], 3, 18)[0],
        lambda path: load(path, True),
        lambda path: load_photo(str(path)),
        lambda path: Labelled([path], [path.parent / ".labels" / "a.png"], torch.arange(256), lambda *pair: pair)[0][0],
    ],
)
def test_every_recipe_takes_16_bits(read_one, tmp_path):
    """Once all of them were plain white."""
    path = tmp_path / "deep.png"
    Image.fromarray(DEEP).save(path)
    (tmp_path / ".labels").mkdir()
    Image.new("L", (26, 18)).save(tmp_path / ".labels" / "a.png")
    image = read_one(path)
    assert image.dtype == torch.uint8
    expected = torch.from_numpy(np.round(DEEP / 257).astype(np.uint8))
    middle = (expected.shape[1] - image.shape[2]) // 2
    assert torch.equal(image.as_subclass(torch.Tensor), expected[:, middle : middle + image.shape[2]].expand(3, -1, -1))


# --- folders ----------------------------------------------------------------------------------------------------------


def test_links_are_followed_without_loops_and_hidden_folders_left_out(tmp_path):
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for name in ("photos/b/2.PNG", "photos/b/._2.png", "photos/.ipynb_checkpoints/3.png", "elsewhere/deep/1.png",
                 "photos/notes.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PLAIN["png"])
    (folder / "linked").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "deep" / "up").symlink_to(folder, target_is_directory=True)
    (elsewhere / "deep" / "again").symlink_to(elsewhere, target_is_directory=True)
    assert [str(path.relative_to(folder)) for path in find_photos(folder)] == ["b/2.PNG", "linked/deep/1.png"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"--data: expected images \(.bmp, .*\) below .*, found none among its 1 f"):
        find_photos(tmp_path / "empty", "--data")
    with pytest.raises(ValueError, match=r"data.folder: expected a folder, got .*nowhere, which is missing"):
        find_photos(tmp_path / "nowhere")


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_names_that_are_not_utf8(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    for name in (b"/a\xff.png", b"/b\xff.png"):
        with open(folder + name, "wb") as file:
            file.write(PLAIN["png"] if name[1] == ord("a") else b"broken")
    good, broken = find_photos(tmp_path)
    assert torch.equal(read_photo(good, 3), planes(SMOOTH, "RGB"))
    with pytest.raises(RuntimeError, match=r"caf\\xe9/b\\xff.png cannot be read") as told:
        read_photo(broken, 3)
    str(told.value).encode()  # it can be printed


# --- mutilated files --------------------------------------------------------------------------------------------------

FUZZED = [
    PLAIN["jpeg"],
    saved(SMOOTH, "JPEG", progressive=True),
    PLAIN["cmyk jpeg"],
    PLAIN["png"],
    deep_png(np.stack([DEEP] * 3, -1)),
    PLAIN["animated gif"],
    PLAIN["webp"],
    PLAIN["bmp"],
    PLAIN["palette tiff"],
    tiff(COLOUR, compression="zlib"),
]


def mutilated(data: bytes, draw: random.Random) -> bytes:
    """Cut, bytes changed (most of them in the header), a part left out or doubled."""
    changed = bytearray(data)
    kind = draw.randrange(4)
    if kind == 0:
        return bytes(changed[: draw.randrange(len(data))])
    if kind == 1:
        reach = draw.choice([40, 400, len(data)])
        for _ in range(draw.randint(1, 12)):
            changed[draw.randrange(min(reach, len(data)))] = draw.randrange(256)
        return bytes(changed)
    start, length = draw.randrange(len(data)), draw.randint(1, 64)
    part = b"" if kind == 2 else 2 * changed[start : start + length]
    return bytes(changed[:start] + part + changed[start + length :])


@pytest.mark.parametrize("number", range(len(FUZZED)))
def test_mutilated_files_are_read_or_named(number, tmp_path):
    """Damage in the pixels cannot always be seen; what is read has to be an image, and all else a named error."""
    draw = random.Random(number)
    path = tmp_path / "mutilated.bin"
    refused = 0
    for _ in range(100):
        path.write_bytes(mutilated(FUZZED[number], draw))
        try:
            image = read_photo(path, draw.choice([1, 3]), side=draw.choice([None, 32]))
        except RuntimeError as error:
            assert str(path) in str(error)  # noqa: PT017
            refused += 1
            continue
        assert image.dtype in (torch.uint8, torch.float32)
        assert image.ndim == 3
        assert image.shape[0] in (1, 3)
        assert image.numel() > 0
        assert image.isfinite().all()
        assert image.min() >= 0
        assert image.max() <= (255 if image.dtype == torch.uint8 else 1)
    assert refused > 10
