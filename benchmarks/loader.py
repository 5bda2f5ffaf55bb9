"""Images per second and CPU core: the recipes' loader against the published pipeline written with PIL transforms.

Two BYOL views of 224 px from JPEG photos, all on one core, one after the other in this run; and the device half of
the photometric steps, per batch, on the GPU where there is one.

    python benchmarks/loader.py [--data FOLDER]         (without FOLDER: generated 500x375 JPEGs)
    python benchmarks/loader.py --large [--data FOLDER] (without FOLDER: generated 4000x3000 JPEGs)

The second compares data.reduced, the loader's way with large JPEGs, with decoding all pixels: images/s, and of the same
draws how far the views' pixels are apart, in place, sharpness and value. Then decoding alone at each scale, by Pillow
and, where it is installed, by simplejpeg.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
import torchvision.transforms as v1
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import default_collate
from torchvision.io import write_jpeg

from densessl import byol_photometric
from examples.pretrain.common.data.files import Photos
from examples.pretrain.common.data.finding import find_photos
from examples.pretrain.common.data.options import photo_views

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class PILBlur:
    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(0.1, 2.0))))


def published(blur_p: float, solarize_p: float) -> v1.Compose:
    """PixPro's published augmentation, option BYOL, without its coordinates."""
    return v1.Compose(
        [
            v1.RandomResizedCrop(224, scale=(0.08, 1.0)),
            v1.RandomHorizontalFlip(),
            v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v1.RandomGrayscale(p=0.2),
            v1.RandomApply([PILBlur()], p=blur_p),
            v1.RandomApply([ImageOps.solarize], p=solarize_p),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),
        ]
    )


def draw_photos(folder: Path, count: int = 100, size: tuple[int, int] = (375, 500)) -> None:
    """Smooth noise of several scales, which JPEG stores in some 50 kB at 500x375, as it does photos."""
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        layers = [
            torch.nn.functional.interpolate(
                torch.rand(1, 3, size[0] // s, size[1] // s, generator=generator), size, mode="bilinear"
            )
            for s in (3, 10, 30, 100)
        ]
        write_jpeg((sum(layers)[0] / 4 * 255).byte(), str(folder / f"{index:03}.jpg"), quality=88)


def rates(loads: list[Callable[[int], object]], count: int, rounds: int = 5) -> list[float]:
    """Images/s of each, the best of several rounds that take turns; other draws in every round."""
    best = [0.0] * len(loads)
    for turn in range(rounds):
        for which, load in enumerate(loads):
            load(turn * count)
            start = time.process_time()  # of one thread; what else the machine does leaves it alone
            for index in range(turn * count, (turn + 1) * count):
                load(index)
            best[which] = max(best[which], count / (time.process_time() - start))
    return best


def compare_decoders(paths: list[Path]) -> None:
    """Prints the time of decoding alone; no scale saves the Huffman decoding, which all pixels have a part in."""
    files = [path.read_bytes() for path in paths]

    def pillow(step: int) -> Callable[[int], object]:
        def decode(index: int) -> None:
            with Image.open(io.BytesIO(files[index % len(files)])) as file:
                file.draft(None, (file.width // step, file.height // step))
                file.load()

        return decode

    ways = {f"Pillow, 1/{step}": pillow(step) for step in (1, 2, 4, 8)}
    try:
        import simplejpeg
    except ImportError:
        pass
    else:
        with Image.open(paths[0]) as file:
            width, height = file.size
        for step in (1, 2, 4, 8):
            least = {"min_width": width // step, "min_height": height // step, "min_factor": 1}
            fast = {"fastdct": True, "fastupsample": True, **least}
            ways[f"simplejpeg, 1/{step}"] = lambda i, fast=fast: simplejpeg.decode_jpeg(files[i % len(files)], **fast)
    print("\n| decoding alone | ms | times as fast as all pixels by Pillow |\n|---|---|---|")
    times = [1 / rate for rate in rates(list(ways.values()), len(files), rounds=3)]
    for name, seconds in zip(ways, times, strict=True):
        print(f"| {name} | {1e3 * seconds:.1f} | {times[0] / seconds:.2f} |")


def sharpness(image: torch.Tensor) -> float:
    """Mean square of the differences between neighbours."""
    grey = image.float().mean(0)
    return float(grey.diff(dim=0).square().mean() + grey.diff(dim=1).square().mean())


def shift(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """By how many pixels an image lies beside another, x and y, by least squares over both slopes and an offset."""
    one, other = one.float().mean(0), other.float().mean(0)
    slopes = [(one[1:-1, 2:] - one[1:-1, :-2]) / 2, (one[2:, 1:-1] - one[:-2, 1:-1]) / 2]
    known = torch.stack([*(slope.flatten() for slope in slopes), torch.ones(slopes[0].numel())], 1)
    return torch.linalg.lstsq(known, (other - one)[1:-1, 1:-1].flatten()[:, None]).solution[:2, 0]


def compare_large(paths: list[Path]) -> None:
    """Prints the table of ``--large``."""
    loads = {
        reduced: Photos(paths, photo_views("unused", photometric="device", reduced=reduced).draw, channels=3)
        for reduced in (False, True)
    }
    speeds = rates(
        [lambda i, photos=photos: photos[(i // len(paths), i % len(paths))] for photos in loads.values()],
        len(paths),
        rounds=3,
    )
    shifts, ratios, apart = [], [], []
    for index in range(2 * len(paths)):
        whole, reduced = (photos[(index // len(paths), index % len(paths))] for photos in loads.values())
        for one, other in zip(whole[:2], reduced[:2], strict=True):
            assert torch.equal(one.coords, other.coords)
            steps = one.coords.diagonal()[:2].abs() * one.source_size.flip(0) / one.image.shape[-1]
            shifts.append(float((shift(one.image, other.image).abs() * steps).max()))
            ratios.append(sharpness(other.image) / sharpness(one.image))
            apart.append(float((one.image.float() - other.image.float()).abs().mean()))
    with Image.open(paths[0]) as file:
        size = f"{file.width}x{file.height}"
    megabytes = sum(path.stat().st_size for path in paths) / len(paths) / 1e6
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}; {len(paths)} JPEGs, {size}")
    print(f"of {megabytes:.1f} MB; photometric: device, CPU side\n| data.reduced | images/s per core |\n|---|---|")
    for reduced, speed in zip(loads, speeds, strict=True):
        print(f"| {str(reduced).lower()} | {speed:.1f} |")
    print(f"{speeds[1] / speeds[0]:.2f} times as many. Of {len(shifts)} views, reduced against whole: coords equal,")
    print(f"pixels at most {max(shifts):.2f} pixels of the file beside their place, sharpness {min(ratios):.2f} to")
    mean_ratio, mean_apart = sum(ratios) / len(ratios), sum(apart) / len(apart)
    print(f"{max(ratios):.2f}, on average {mean_ratio:.2f}, values {mean_apart:.1f} of 255 apart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="Folder of photos, of which 100 are read (drawn photos).")
    parser.add_argument("--large", action="store_true", help="Compare only ways to decode large photos.")
    parser.add_argument(
        "--batch-size", type=int, default=128, help="Images of a batch of the work on the device (%(default)s)."
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        if args.data is None:
            draw_photos(Path(scratch), *((10, (3000, 4000)) if args.large else ()))
        paths = find_photos(args.data or scratch)[:100]
        if args.large:
            compare_large(paths)
            compare_decoders(paths)
            return
        first, second = published(1.0, 0.0), published(0.1, 0.2)

        def pil(index: int) -> None:
            with Image.open(paths[index % len(paths)]) as file:
                image = file.convert("RGB")
            first(image), second(image)

        def ours(photometric: str) -> Callable[[int], object]:
            photos = Photos(paths, photo_views("unused", photometric=photometric).draw, channels=3)
            return lambda index: photos[(index // len(paths), index % len(paths))]

        kilobytes = sum(path.stat().st_size for path in paths) / len(paths) / 1024
        labels = ["published pipeline, PIL", "photometric: cpu", "photometric: device, CPU side"]
        rows = list(zip(labels, rates([pil, ours("cpu"), ours("device")], 200), strict=True))
        base = rows[0][1]
        batch = default_collate([ours("device")(i) for i in range(8)])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = args.batch_size if device.type == "cuda" else 8
    views = [
        v._replace(**{name: torch.cat([part] * (size // 8)).to(device) for name, part in v._asdict().items()})
        for v in (batch.view1, batch.view2)
    ]
    augment = byol_photometric()

    def device_side() -> None:
        for part, view in zip(augment, views, strict=True):
            part.to(device)(view)
        if device.type == "cuda":
            torch.cuda.synchronize()

    device_side()
    start = time.perf_counter()
    for _ in range(10):
        device_side()
    each = (time.perf_counter() - start) / 10
    name = torch.cuda.get_device_name() if device.type == "cuda" else "one CPU core"
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}; {len(paths)} JPEGs of {kilobytes:.0f} kB")
    print("| | images/s per core | against PIL |\n|---|---|---|")
    for label, value in rows:
        print(f"| {label} | {value:.1f} | {value / base:.2f} x |")
    print(f"Device side of photometric: device: {1e3 * each:.1f} ms for a batch of {size} (both views) on {name}")


if __name__ == "__main__":
    main()
