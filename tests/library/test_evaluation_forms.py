"""What enters the protocols in other forms: images, labels, settings, and what the features return."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from densessl.evaluation import (
    cluster_segmentation,
    correspondence_accuracy,
    in_context_segmentation,
    linear_segmentation,
    nearest_neighbor_segmentation,
)

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = [torch.randint(0, 256, (3, 24, 32), dtype=torch.uint8, generator=GENERATOR) for _ in range(4)]
LABELS = [torch.randint(0, 3, (24, 32), generator=GENERATOR) for _ in range(4)]
LABELLED = list(zip(IMAGES, LABELS, strict=True))
LABELLED_TWO = [(image, labels.clamp(max=1)) for image, labels in LABELLED]


def features(images):
    return F.avg_pool2d(images.float() / 255, 4)


def linear(features=features, fit=LABELLED, test=LABELLED, classes=3, **settings):
    return linear_segmentation(features, fit, test, classes, **{"steps": 2, **settings})


def neighbors(features=features, fit=LABELLED, test=LABELLED, classes=3, **settings):
    return nearest_neighbor_segmentation(features, fit, test, classes, **settings)


def in_context(features=features, fit=LABELLED, test=LABELLED, classes=3, **settings):
    return in_context_segmentation(features, fit, test, classes, **settings)


def clusters(features=features, fit=None, test=LABELLED, classes=3):
    return cluster_segmentation(features, test, classes)


def correspondence(features=features, photos=IMAGES, **settings):
    return correspondence_accuracy(features, photos, **settings)


RETURNED = {
    "a tuple": lambda maps: (maps,),
    "a dict": lambda maps: {"layer4": maps},
    "an array": lambda maps: maps.numpy(),
    "nothing": lambda maps: None,
    "tokens": lambda maps: maps.flatten(2).mT,
    "vectors": lambda maps: maps.mean((2, 3)),
    "integers": lambda maps: (maps * 9).long(),
    "the first image's": lambda maps: maps[:1],
    "NaN": lambda maps: maps * float("nan"),
}


@pytest.mark.parametrize("returned", RETURNED)
@pytest.mark.parametrize("protocol", [linear, neighbors, in_context, correspondence])
def test_features_that_are_no_maps_are_named(protocol, returned):
    with pytest.raises(ValueError, match=r"^features: expected (it to return maps \(B, C, h, w\) with B = 4|finite)"):
        protocol(lambda images: RETURNED[returned](features(images)))


LABELLED_IN = {
    "labels as arrays": lambda image, labels: (image, labels.numpy()),
    "images as arrays": lambda image, labels: (image.numpy(), labels),
    "labels in 8 bits": lambda image, labels: (image, labels.byte()),
    "labels in floating point": lambda image, labels: (image, labels.float()),
    "labels of another size": lambda image, labels: (image, labels[:20]),
    "images in floating point": lambda image, labels: (image.float() / 255, labels),
    "channels last": lambda image, labels: (image.permute(1, 2, 0), labels),
    "16 bits": lambda image, labels: (image.to(torch.uint16) * 257, labels),
}


@pytest.mark.parametrize("form", LABELLED_IN)
@pytest.mark.parametrize("protocol", [linear, neighbors, in_context])
@pytest.mark.parametrize("part", ["fit", "test"])
def test_images_and_labels_in_other_forms_are_named(protocol, form, part):
    given = [LABELLED_IN[form](*pair) for pair in LABELLED]
    with pytest.raises(
        ValueError, match=rf"^{part if protocol is linear or part == 'test' else 'memory'}.*: expected "
    ):
        protocol(**{part: given})


@pytest.mark.parametrize("protocol", [linear, neighbors, in_context])
def test_what_holds_no_pairs_is_named(protocol):
    for given in (None, 3, []):
        with pytest.raises(ValueError, match=r"^(fit|memory): expected "):
            protocol(fit=given)


@pytest.mark.parametrize("part", ["fit", "test"])
@pytest.mark.parametrize("protocol", [linear, neighbors, in_context, clusters])
def test_labels_beyond_the_classes_are_refused(protocol, part):
    """Left out in silence, they would make the score better."""
    if protocol is clusters and part == "fit":
        return
    name = part if protocol in (linear, clusters) or part == "test" else "memory"
    given = [(image, labels.clamp(max=1)) for image, labels in LABELLED]
    given[2][1][3, 4] = 2
    others = {"fit": LABELLED_TWO, "test": LABELLED_TWO, part: given}
    with pytest.raises(ValueError, match=rf"^{name}.*: expected 0..1, or -1 or 255 where ignored, got 2"):
        protocol(**others, classes=2)
    for ignored in (-1, 255):
        given[2][1][3, 4] = ignored
        protocol(**others, classes=2)


@pytest.mark.parametrize("part", ["fit", "test"])
@pytest.mark.parametrize("protocol", [linear, neighbors, in_context])
@pytest.mark.parametrize(
    ("given", "got"),
    [
        (IMAGES, "a tensor alone"),
        (torch.stack(IMAGES), "a tensor alone"),
        ([{"image": image, "labels": labels} for image, labels in LABELLED], "dict"),
        ([(*pair, 0) for pair in LABELLED], "3 things"),
        ([pair[:1] for pair in LABELLED], "1 thing"),
    ],
    ids=["images alone", "a batch alone", "dicts", "triples", "singles"],
)
def test_what_is_no_pair_is_named(protocol, given, got, part):
    name = part if protocol is linear or part == "test" else "memory"
    with pytest.raises(ValueError, match=rf"^{name}\[0\]: expected a pair \(image, labels\), got {got}"):
        protocol(**{part: given})


@pytest.mark.parametrize("bad", ["1e-3", None, float("nan"), float("inf"), 0, -1], ids=repr)
@pytest.mark.parametrize(
    ("protocol", "name"),
    [
        *[(linear, name) for name in ("steps", "lr", "label_stride", "batch_size", "classes")],
        *[(neighbors, name) for name in ("neighbors", "temperature", "cells", "classes")],
        (correspondence, "batch_size"),
    ],
)
def test_settings_out_of_range_are_named(protocol, name, bad):
    if name == "cells" and bad is None:
        return
    with pytest.raises(ValueError, match=rf"^{name}: expected "):
        protocol(**{name: bad})


@pytest.mark.parametrize(
    ("protocol", "name"), [(linear, "steps"), (linear, "batch_size"), (neighbors, "neighbors"), (linear, "classes")]
)
def test_counts_are_whole_numbers(protocol, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected a whole number of at least \d, got 2.5"):
        protocol(**{name: 2.5})
    protocol(**{name: np.int64(3)})


@pytest.mark.parametrize("bad", [(), 1.0, ("a",), (0.0,), (-1.0,), (float("nan"),), None])
def test_distances_are_positive_numbers(bad):
    with pytest.raises(ValueError, match=r"^distances: expected .*at least one, got "):
        correspondence(distances=bad)
