"""The score of the place alone, by hand."""

import pytest
import torch

from benchmarks.place_alone import place_alone


def test_the_most_frequent_class_of_each_place_is_scored():
    left, right = torch.tensor([[0, 1, 255]]), torch.tensor([[0, 2, 1]])
    # Learnt: 0, 1 (the first of two equally frequent), 1.
    assert place_alone([left, right], [torch.tensor([[0, 1, 1]])], 3) == 1
    # Class 0: 1 of 2 pixels; class 1: 1 of 2; class 2 is nowhere and does not count.
    assert place_alone([left, right], [torch.tensor([[0, 0, 1]])], 3) == pytest.approx(0.5)
    assert place_alone([left, right], [torch.tensor([[0, 2, -1]])], 3) == pytest.approx((1 + 0 + 0) / 3)
