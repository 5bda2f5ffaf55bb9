"""Where the backbone of a transfer recipe gets its weights: ``model.pretrained``."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path

import torchvision
from torch import nn
from torchvision.models import ResNet
from torchvision.models.detection import FCOS

from densessl.checkpoints import load_backbone, load_parts, read_backbone

log = logging.getLogger(__name__)

IMAGENET = "IMAGENET1K_V1"  # the weights that publications compare with; V2 is of a longer, stronger recipe


def make_resnet(name: str, pretrained: str) -> ResNet:
    """A torchvision ResNet without classifier, its weights loaded and everything left out reported.

    Args:
        name: Name of a torchvision ResNet, ``"resnet50"``.
        pretrained: ``"none"``, ``"imagenet"`` (torchvision's supervised weights, downloaded once), or a file: a
            checkpoint of this library, an exported file, or another that ``densessl.checkpoints.read_backbone`` reads.

    Returns:
        The network; ``fc`` is an identity, ``inplanes`` the channels of layer4.

    Raises:
        ValueError: If the name is unknown, a file cannot be read, or its weights are of another architecture.
    """
    known = torchvision.models.list_models(torchvision.models, include="*resne*")
    if name not in known:
        close = ", ".join(difflib.get_close_matches(name, known)) or ", ".join(known)
        raise ValueError(f"model.backbone: expected the name of a torchvision ResNet ({close}), got {name!r}")
    network = torchvision.models.get_model(name, weights=IMAGENET if pretrained == "imagenet" else None)
    network.fc = nn.Identity()
    if pretrained not in ("none", "imagenet"):
        if not Path(pretrained).is_file():
            raise ValueError(f"model.pretrained: expected none, imagenet or a file, got {pretrained!r}: no such file")
        try:
            read = load_backbone(network, pretrained)
        except ValueError as error:
            raise ValueError(f"model.pretrained for {name}: {error}") from error
        log.info("%s: loaded %d entries into %s", pretrained, len(read.weights), name)
        for entry, why in read.dropped.items():
            log.info("%s: left out %s: %s", pretrained, entry, why)
        if read.parts:
            log.info("%s: %d entries of pyramid and towers are no part of %s", pretrained, len(read.parts), name)
    return network


def load_pyramid(detector: nn.Module, pretrained: str) -> None:
    """Loads the pyramid and the towers that a file may hold beside the backbone, into a detector that names them so.

    Args:
        detector: The detector; torchvision's FCOS takes them. Others here have batch norm in the pyramid and other
            heads, and their pyramids stand on other stages, so that equal names do not mean equal places.
        pretrained: Where the weights come from, as in ``make_resnet``.

    Raises:
        ValueError: If an entry is of another shape than the detector's.
    """
    if pretrained in ("none", "imagenet"):
        return
    if not isinstance(detector, FCOS):
        for entry in read_backbone(pretrained).parts:
            log.info("%s: left out %s: not in the %s", pretrained, entry, type(detector).__name__)
        return
    try:
        read = load_parts(detector, pretrained)
    except ValueError as error:
        raise ValueError(f"model.pretrained: {error}") from error
    for entry, why in read.dropped.items():
        log.info("%s: left out %s: %s", pretrained, entry, why)
    if read.parts:
        fresh = [key for key in detector.state_dict() if key not in read.parts and not key.startswith("backbone.body.")]
        log.info("%s: loaded %d entries of pyramid and towers", pretrained, len(read.parts))
        log.info("%s: as initialised: %s", pretrained, ", ".join(fresh))
