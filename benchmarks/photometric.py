"""Time of the photometric steps on one CPU core, as ratios within this run.

python benchmarks/photometric.py
"""

import platform
import time
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor
from torchvision.transforms import v2

from densessl import byol_photometric, byol_views
from densessl.augment import View
from densessl.augment.presets import PILGaussianBlur


def milliseconds(call: Callable[[], object], least_of: int = 7, repeats: int = 10) -> float:
    call()
    best = float("inf")
    for _ in range(least_of):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter() - start) / repeats)
    return 1e3 * best


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    view = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)
    source = torch.randint(0, 256, (3, 375, 500), dtype=torch.uint8)
    image = torchvision.tv_tensors.Image(view)
    photo = v2.functional.to_pil_image(view)
    batch = View(view.expand(8, -1, -1, -1), torch.eye(3).expand(8, 3, 3), torch.ones(8, 2, dtype=torch.int64))
    whole, geometric = byol_views(), byol_views(photometric=False)
    first, second = byol_photometric()

    def on_device() -> tuple[Tensor, Tensor]:
        return first(batch).image, second(batch).image

    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {platform.machine()}, one core")
    pil = milliseconds(lambda: PILGaussianBlur((1.5, 1.5))(photo))
    tensor = milliseconds(lambda: v2.GaussianBlur(13, (1.5, 1.5))(image))
    print(f"blur of one 224x224 view, sigma 1.5: torchvision {tensor:.2f} ms, PIL {pil:.2f} ms: {tensor / pil:.1f} x")
    both = milliseconds(lambda: whole(source), repeats=3)
    crops = milliseconds(lambda: geometric(source), repeats=3)
    print(f"two BYOL views of a 500x375 image: whole {both:.1f} ms, crops {crops:.1f} ms: {both / crops:.1f} x")
    kornia = milliseconds(on_device, repeats=1) / 8
    print(f"photometric half through kornia, on this core, both views: {kornia:.1f} ms an image")


if __name__ == "__main__":
    main()
