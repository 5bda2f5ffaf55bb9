"""Images per second and CPU core: the recipes' loader against the published pipeline written with PIL transforms.

Two BYOL views of 224 px from JPEG photos, all on one core, one after the other in this run; and the device half of
the photometric steps, per batch, on the GPU where there is one.

    python benchmarks/loader.py [--data FOLDER]         (without FOLDER: generated 500x375 JPEGs)
"""

import argparse
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
from examples.pretrain.common.data.decode import find_photos
from examples.pretrain.common.data.files import Photos
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


def draw_photos(folder: Path, count: int = 100) -> None:
    """Smooth noise of several scales, which JPEG stores in some 50 kB at 500x375, as it does photos."""
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        layers = [
            torch.nn.functional.interpolate(
                torch.rand(1, 3, 375 // s, 500 // s, generator=generator), (375, 500), mode="bilinear"
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
            start = time.perf_counter()
            for index in range(turn * count, (turn + 1) * count):
                load(index)
            best[which] = max(best[which], count / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--batch-size", type=int, default=128, help="of the device half")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        if args.data is None:
            draw_photos(Path(scratch))
        paths = find_photos(args.data or scratch)[:100]
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
        v._replace(
            image=v.image.repeat(size // 8, 1, 1, 1).to(device), coords=v.coords.repeat(size // 8, 1, 1).to(device)
        )
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
