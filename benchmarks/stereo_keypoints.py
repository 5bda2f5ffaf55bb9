"""Points of scikit-image's stereo pair found by a backbone's features: python -m benchmarks.stereo_keypoints --help."""

from __future__ import annotations

import argparse

import torch
from skimage.data import stereo_motorcycle

from densessl.evaluation import keypoint_accuracy
from densessl.evaluation._backbones import features_of, make_backbone

PIXELS = (16, 32)


def points_of(disparity: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (P, 2), x and y, of the left image chosen at random, and their places in the right image."""
    height, width = disparity.shape
    chosen = torch.randperm(height * width, generator=torch.Generator().manual_seed(0))
    y, x = chosen // width, chosen % width
    left = torch.stack([x + 0.5, y + 0.5], 1)
    right = left - torch.stack([disparity[y, x], torch.zeros(len(x))], 1)
    seen = right.isfinite().all(1) & (right[:, 0] > 0)
    return left[seen][:count], right[seen][:count]


def main() -> None:
    """Prints the share of points that are found within 16 and 32 pixels, and that of points taken to have stayed."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--backbone", required=True, help="The backbone, named as in python -m densessl.evaluation.")
    parser.add_argument("--weights", default="default", help="Its weights, named likewise (%(default)s).")
    parser.add_argument("--layer", help="The layer whose output is read, named likewise (the last one).")
    parser.add_argument(
        "--points", type=int, default=2000, help="Number of points of the left image to look for (%(default)s)."
    )
    chosen = parser.parse_args()
    torch.manual_seed(0)
    features = features_of(make_backbone(chosen.backbone, chosen.weights, chosen.layer), torch.device("cpu"))
    left, right, measured = stereo_motorcycle()
    images = torch.stack([torch.from_numpy(image.copy()).movedim(2, 0) for image in (left, right)])
    source, target = points_of(torch.from_numpy(measured), chosen.points)
    sides = torch.tensor([images.shape[3], images.shape[2]])
    maps = features(images)
    found = [
        keypoint_accuracy(
            maps[:1], maps[1:], (source / sides)[None], (target / sides)[None], extent=(pixels / sides)[None], alpha=1.0
        ).per_point
        for pixels in PIXELS
    ]
    stayed = [float(((source - target).norm(dim=1) <= pixels).float().mean()) for pixels in PIXELS]
    for name, shares in (("found", found), ("taken to have stayed", stayed)):
        told = ", ".join(f"{share:.3f} within {pixels} px" for share, pixels in zip(shares, PIXELS, strict=True))
        print(f"{len(source)} points, {name}: {told}")


if __name__ == "__main__":
    main()
