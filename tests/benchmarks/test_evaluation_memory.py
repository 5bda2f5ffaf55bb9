"""The program that measures the probes' memory, at a size of nothing."""

import pytest

pytest.importorskip("torchmetrics")
pytest.importorskip("scipy")

from benchmarks.evaluation_memory import PROBES, measure


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_is_measured(name):
    before, peak, seconds = measure(name, images=3, asked=1, side=64, channels=5)
    assert 0 < before <= peak
    assert seconds >= 0
