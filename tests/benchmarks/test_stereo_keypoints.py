"""Where the points of the stereo pair lie."""

import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("torchmetrics")
pytest.importorskip("scipy")

from benchmarks.stereo_keypoints import points_of


def test_points_follow_the_disparity():
    disparity = torch.full((4, 6), 2.0)
    disparity[0] = torch.inf  # not known
    left, right = points_of(disparity, 99)
    # The last three rows of the columns 2 to 5: what lies to the left is not seen in the right image.
    assert len(left) == 12
    torch.testing.assert_close(left - right, torch.tensor([[2.0, 0.0]]).expand(12, 2))
    assert float(left[:, 0].min()) == 2.5
    assert float(left[:, 1].min()) == 1.5
