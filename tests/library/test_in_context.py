"""The in-context protocols on the golden arrays, by way of images that name their features."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchmetrics")
pytest.importorskip("scipy")

from densessl.evaluation import FAST, HUMMINGBIRD, HUMMINGBIRD_OPEN, in_context_segmentation

FILE = Path(__file__).parent.parent / "oracles" / "golden" / "hbird.npz"


@pytest.mark.parametrize(("name", "cells", "batch"), [("whole", 10_000, 2), ("sampled", 77, 3)])
def test_the_open_protocol_gives_the_golden_score(name, cells, batch):
    with np.load(FILE) as file:
        g = {key.removeprefix("hbird_"): torch.from_numpy(file[key]) for key in file.files}
    bank = torch.cat([g["train_features"], g["val_features"]]).movedim(-1, 1)
    labels = torch.cat([g["train_labels"], g["val_labels"]])
    pairs = [(torch.full((3, 24, 24), i, dtype=torch.uint8), labels[i]) for i in range(11)]

    def features(images):
        return bank[images[:, 0, 0, 0].long()]

    open_code = HUMMINGBIRD_OPEN._replace(neighbors=int(g["k"]), cells=cells)
    made = in_context_segmentation(features, pairs[:7], pairs[7:], 5, open_code, batch_size=batch, seed=1)
    assert made == pytest.approx(float(g[f"{name}_miou_hungarian"]), abs=1e-6)
    identity = open_code._replace(matched=False)
    made = in_context_segmentation(features, pairs[:7], pairs[7:], 5, identity, batch_size=batch, seed=1)
    assert made == pytest.approx(float(g[f"{name}_miou_identity"]), abs=1e-6)
    for protocol in (HUMMINGBIRD, FAST):
        assert 0 < in_context_segmentation(features, pairs[:7], pairs[7:], 5, protocol) < 1
    with pytest.raises(ValueError, match=r"^protocol:"):
        in_context_segmentation(features, pairs[:7], pairs[7:], 5, "fast")


def images(labels: torch.Tensor, count: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.full((3, 16, 24), i, dtype=torch.uint8), labels) for i in range(count)]


def ramps(given):
    return torch.arange(len(given) * 2 * 4 * 6).view(-1, 2, 4, 6).float().sin()


GOOD = images(torch.arange(24).expand(16, 24) % 3)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("memory", lambda: (ramps, [], GOOD, 3)),
        ("test", lambda: (ramps, GOOD, [], 3)),
        ("memory", lambda: (ramps, images(torch.full((16, 24), 3)), GOOD, 3)),
        ("test", lambda: (ramps, GOOD, images(torch.full((16, 24), -2)), 3)),
        ("memory", lambda: (ramps, images(torch.full((16, 24), 255)), GOOD, 3)),
        ("memory", lambda: (ramps, images(torch.full((16, 24), 255)), GOOD, 3, HUMMINGBIRD_OPEN)),
        ("test", lambda: (ramps, GOOD, images(torch.full((16, 24), 255)), 3)),
        (r"memory\[0\]", lambda: (ramps, images(torch.zeros(16, 20).long()), GOOD, 3)),
        (r"test\[1\]", lambda: (ramps, GOOD, [GOOD[0], (GOOD[0][0].float(), GOOD[0][1])], 3)),
        ("features", lambda: (lambda given: ramps(given) / 0, GOOD, GOOD, 3)),
        ("features", lambda: (lambda given: ramps(given)[:, 0], GOOD, GOOD, 3)),
        ("classes", lambda: (ramps, GOOD, GOOD, 1)),
        ("protocol.neighbors", lambda: (ramps, GOOD, GOOD, 3, FAST._replace(neighbors=49))),
        ("protocol.cells", lambda: (ramps, GOOD, GOOD, 3, FAST._replace(cells=1))),
    ],
)
def test_bad_input_is_refused_by_name(name, call):
    with pytest.raises(ValueError, match=f"^{name}:"):
        in_context_segmentation(*call())
