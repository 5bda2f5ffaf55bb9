"""Where the backbone of a transfer recipe gets its weights: ``model.pretrained``."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torchvision
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.detection import FCOS

from densessl.export import read_backbone

log = logging.getLogger(__name__)

IMAGENET = "IMAGENET1K_V1"  # the weights that publications compare with; V2 is of a longer, stronger recipe


def make_resnet(name: str, pretrained: str, dilate: Sequence[bool] = (False, False, False)) -> ResNet:
    """A torchvision ResNet without classifier, its weights loaded and every difference reported.

    Args:
        name: of a torchvision ResNet, ``"resnet50"``.
        pretrained: ``"none"``, ``"imagenet"`` (torchvision's supervised weights, downloaded once), or a file: a
            checkpoint of this library, an exported file, or another that ``densessl.export.read_backbone`` reads.
        dilate: whether layer2, layer3, layer4 dilate in place of their stride.

    Returns:
        The network; ``fc`` is an identity, ``inplanes`` the channels of layer4.

    Raises:
        ValueError: on an unknown name, a file that cannot be read, or weights of another architecture.
    """
    known = torchvision.models.list_models(torchvision.models, include="*resne*")
    if name not in known:
        close = ", ".join(difflib.get_close_matches(name, known)) or ", ".join(known)
        raise ValueError(f"model.backbone: expected the name of a torchvision ResNet ({close}), got {name!r}")
    network = torchvision.models.get_model(name, weights=None, replace_stride_with_dilation=list(dilate))
    network.fc = nn.Identity()
    if pretrained == "imagenet":
        weights = torchvision.models.get_model_weights(name)[IMAGENET].get_state_dict(progress=False)
        classifier = [key for key in weights if key.startswith("fc.")]
        log.info("imagenet: left out %s: the classifier", ", ".join(classifier))
        load(network, {key: value for key, value in weights.items() if key not in classifier}, name, "imagenet")
    elif pretrained != "none":
        path = Path(pretrained)
        if not path.is_file():
            raise ValueError(f"model.pretrained: expected none, imagenet or a file, got {pretrained!r}: no such file")
        read = read_backbone(path)
        for entry, why in read.dropped.items():
            log.info("%s: left out %s: %s", path, entry, why)
        if read.parts:
            log.info("%s: %d entries of pyramid and towers are no part of %s", path, len(read.parts), name)
        load(network, read.weights, name, str(path))
    return network


def load_parts(detector: nn.Module, pretrained: str) -> None:
    """Loads the pyramid and the towers that a file may hold beside the backbone, into a detector that names them so.

    Args:
        detector: torchvision's FCOS takes them. Others here have batch norm in the pyramid and other heads, and their
            pyramids stand on other stages, so that equal names do not mean equal places.
        pretrained: as of make_resnet.

    Raises:
        ValueError: if an entry is of another shape than the detector's.
    """
    if pretrained in ("none", "imagenet"):
        return
    parts, own = read_backbone(pretrained).parts, detector.state_dict() if isinstance(detector, FCOS) else {}
    for key in parts:
        if key not in own:
            log.info("%s: left out %s: not in the %s", pretrained, key, type(detector).__name__)
        elif parts[key].shape != own[key].shape:
            raise ValueError(
                f"model.pretrained: {pretrained} does not fit the {type(detector).__name__}: {key} is "
                f"{tuple(parts[key].shape)}, expected {tuple(own[key].shape)}"
            )
    fitting = {key: value for key, value in parts.items() if key in own}
    detector.load_state_dict(fitting, strict=False)
    if fitting:
        fresh = [key for key in own if key not in parts and not key.startswith("backbone.body.")]
        log.info("%s: loaded %d entries of pyramid and towers", pretrained, len(fitting))
        log.info("%s: as initialised: %s", pretrained, ", ".join(fresh))


def load(network: nn.Module, weights: Mapping[str, Tensor], name: str, source: str) -> None:
    """Loads weights that have to fit entry by entry.

    Batch norm's step counters may be missing: older files lack them, and nothing reads them.

    Args:
        network: takes the weights.
        weights: by the network's own names.
        name: of the network, for the messages.
        source: of the weights, for the messages.

    Raises:
        ValueError: if an entry is missing, unexpected or of another shape.
    """
    own = network.state_dict()
    missing = [key for key in own if key not in weights]
    counters = [key for key in missing if key.endswith("num_batches_tracked")]
    missing = [key for key in missing if key not in counters]
    unexpected = [key for key in weights if key not in own]
    reshaped = [
        f"{key} is {tuple(weights[key].shape)}, expected {tuple(value.shape)}"
        for key, value in own.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if missing or unexpected or reshaped:
        found = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
        told = "; ".join(f"{len(keys)} {what}: {_few(keys)}" for what, keys in found.items() if keys)
        raise ValueError(f"model.pretrained: {source} does not fit model.backbone {name}: {told}")
    network.load_state_dict(weights, strict=False)
    log.info("%s: loaded %d entries into %s", source, len(weights), name)
    if counters:
        log.info("%s: %d step counters of batch norm are missing and stay 0: %s", source, len(counters), _few(counters))


def _few(keys: Sequence[str], most: int = 3) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
