"""How much the rules for positive pairs differ: the table of the page Fidelity.

Draws pairs of crops as PixPro does (scale 0.08 to 1, ratio 3/4 to 4/3, flips), matches 7x7 maps with T = 0.7 and
prints one Markdown row per image shape and rule.

    python benchmarks/assignment_rules.py
"""

import torch
from torch import Tensor
from torchvision.transforms.v2 import RandomResizedCrop

from densessl import DistanceMatcher, coords_from_boxes

PAIRS = 4000
MAP = (7, 7)
SHAPES = ((400, 400), (500, 375), (640, 360), (1024, 256))  # width, height


def draw_crops(width: int, height: int) -> tuple[Tensor, Tensor]:
    """Top left corners and sizes, x before y, each (PAIRS, 2), in pixels."""
    crop = RandomResizedCrop(1, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    image = torch.empty(1, height, width)
    drawn = [crop.make_params([image]) for _ in range(PAIRS)]
    corners = torch.tensor([[d["left"], d["top"]] for d in drawn], dtype=torch.float64)
    return corners, torch.tensor([[d["width"], d["height"]] for d in drawn], dtype=torch.float64)


def as_coords(start: Tensor, end: Tensor, flipped: Tensor) -> Tensor:
    """Boxes in 0..1, some of them mirrored, as coords."""
    boxes = torch.cat([start, end], 1)
    return coords_from_boxes(torch.where(flipped[:, None], boxes[:, [2, 1, 0, 3]], boxes))


def main() -> None:
    print("| image, w x h | rule | positives per image | cells with one, of 49 | images without | pairs that change |")
    print("|---|---|---|---|---|---|")
    for width, height in SHAPES:
        torch.manual_seed(0)
        side = torch.tensor([width, height], dtype=torch.float64)
        source_size = torch.tensor([height, width]).expand(PAIRS, 2)
        edges, indices = [], []
        for _ in range(2):
            corner, size = draw_crops(width, height)
            flipped = torch.rand(PAIRS) < 0.5
            edges.append(as_coords(corner / side, (corner + size) / side, flipped))
            # As in the published code: first and last pixel's index, over the largest index.
            indices.append(as_coords(corner / (side - 1), (corner + size - 1) / (side - 1), flipped))
        default = DistanceMatcher(0.7)(*edges, MAP)
        rules = {
            "default: larger cell, per axis": default,
            "published coordinates": DistanceMatcher(0.7)(*indices, MAP),
            "`source_size`: in pixels": DistanceMatcher(0.7)(*edges, MAP, source_size=source_size),
            '`unit="min"`: smaller cell': DistanceMatcher(0.7, unit="min")(*edges, MAP),
        }
        for name, mask in rules.items():
            positives = mask.sum((1, 2)).double()
            cells = mask.any(2).sum(1).double().mean()
            changed = (mask != default).sum() / default.sum()
            print(
                f"| {width} x {height} | {name} | {positives.mean():.1f} | {cells:.1f} "
                f"| {100 * (positives == 0).double().mean():.1f} % | {100 * changed:.1f} % |"
            )


if __name__ == "__main__":
    main()
