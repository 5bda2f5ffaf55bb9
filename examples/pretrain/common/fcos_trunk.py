"""FCOS up to its prediction layers: what of a detector can be pretrained without boxes."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from densessl import level_sizes
from densessl.checkpoints import load_backbone, load_parts
from examples.pretrain.common.backbones import make_model

log = logging.getLogger(__name__)

LEVELS = ("p3", "p4", "p5", "p6", "p7")  # at strides 8 to 128
WIDTH = 256  # of the FPN and of each tower, as in torchvision's FCOS
TOWERS = ("classification_head", "regression_head")

Top = Literal["p5", "p6", "p7"]


class FCOSTrunk(nn.Module):
    """Backbone, FPN and the head's two towers of convolutions, from torchvision's parts and under its names.

    The state dict loads into torchvision's ``fcos_resnet50_fpn`` (``strict=False``): what it leaves missing are the
    prediction layers, and the convolutions of levels above ``top``.

    Args:
        network: A torchvision ResNet; its classifier is dropped.
        top: The last level of the pyramid; the first is P3. P6 and P7 are convolutions on P5.
        towers: Whether each level goes on through both towers, which all levels share as in the detector.

    Attributes:
        levels: Names of the levels; with ``top`` P6, ``("p3", "p4", "p5", "p6")``.
        width: Number of channels at each level: those of both towers side by side, or the FPN's.
    """

    def __init__(self, network: ResNet, top: Top = "p6", towers: bool = True) -> None:
        super().__init__()
        self.levels = LEVELS[: LEVELS.index(top) + 1]
        extra = None if top == "p5" else LastLevelP6P7(WIDTH, WIDTH)
        if top == "p6":
            extra.p7 = nn.Identity()  # no level trains it, and untrained weights are not for the file
        stages = {"layer2": "p3", "layer3": "p4", "layer4": "p5"}
        widths = [network.inplanes // 4, network.inplanes // 2, network.inplanes]
        self.backbone = BackboneWithFPN(network, stages, widths, WIDTH, extra)
        head = FCOSHead(WIDTH, num_anchors=1, num_classes=1)  # for its towers; the prediction layers are left
        self.head = nn.ModuleDict({name: nn.ModuleDict({"conv": head.get_submodule(name).conv}) for name in TOWERS})
        self.width = len(TOWERS) * WIDTH
        if not towers:
            self.head, self.width = nn.ModuleDict(), WIDTH

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """``(B, 3, H, W)`` to a map ``(B, width, h, w)`` per level."""
        maps = self.backbone(image)
        maps = {name: maps[name] for name in self.levels}
        if not self.head:
            return maps
        return {name: torch.cat([tower["conv"](x) for tower in self.head.values()], 1) for name, x in maps.items()}


def make_trunk(
    name: str = "resnet50",
    top: Top = "p6",
    towers: bool = True,
    init: str = "random",
    size: int = 224,
    channels: int = 3,
) -> tuple[FCOSTrunk, int]:
    """A trunk with the weights that the recipe starts from, and the channels of its maps.

    Args:
        name: Name of a torchvision ResNet.
        top: The last level of the pyramid; the first is P3.
        towers: Pretrain the convolutions of FCOS's head too; False: backbone and FPN.
        init: Where the weights come from: ``random``; ``imagenet``, for the backbone alone; or a file, whose FPN and
            towers are taken too where it has them.
        size: Side of the views in pixels, for a first pass that shows the maps' sizes.
        channels: Number of channels of the images.

    Raises:
        ValueError: If the model is another, a file does not fit, or a level is a single cell.
    """
    network = make_model(name, init == "imagenet", size, channels)
    if not isinstance(network, ResNet):
        raise ValueError(f"backbone.name: expected the name of a torchvision ResNet, got {name!r}")
    trunk = FCOSTrunk(network, top, towers)
    if init not in ("random", "imagenet"):
        load_trunk(trunk, init, name)
    try:
        with torch.no_grad():
            sizes = level_sizes(trunk.eval()(torch.zeros(1, channels, size, size)))
    except ValueError as error:
        raise ValueError(f"backbone.top, data.size: {top} of {size} px views: {error}") from error
    log.info("%s: %d px views give %s cells", name, size, ", ".join(f"{n} {h}x{w}" for n, (h, w) in sizes.items()))
    return trunk.train(), trunk.width


def load_trunk(trunk: FCOSTrunk, path: str, name: str) -> None:
    """Loads the backbone of a file, and those of FPN and towers that it holds; logs what is left out and what stays.

    Args:
        trunk: The trunk that is loaded into.
        path: The file.
        name: Name of the trunk's ResNet, for errors.

    Raises:
        ValueError: If the backbone is another, or an entry of FPN and towers has another shape.
    """
    try:
        read = load_backbone(trunk.backbone.body, path, name=f"backbone.name={name}")
        parts = load_parts(trunk, path)
    except ValueError as error:
        raise ValueError(f"backbone.init: {error}") from error
    log.info("%s: loaded %d entries of the backbone, %d of FPN and towers", path, len(read.weights), len(parts.parts))
    for name, why in (parts.dropped | read.dropped).items():
        log.info("%s: left out %s: %s", path, name, why)
    fresh = [name for name in trunk.state_dict() if not name.startswith("backbone.body.") and name not in parts.parts]
    log.info("%s: as initialised: %s", path, ", ".join(fresh) or "nothing")
