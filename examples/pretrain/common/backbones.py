"""Backbones by name: any torchvision or timm model, for views of a size and a number of channels."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from densessl import FeatureMap
from densessl.checkpoints import Weights, load_backbone

log = logging.getLogger(__name__)


class FrozenStatistics(FeatureMap):
    """A backbone whose batch norms use the statistics that they came with, in training mode too.

    Their scales and shifts are trained. A copy, as the target encoder makes one, is frozen as well, with statistics of
    its own that are the same; nothing ever changes either. Batch norm in the heads is not meant.
    """

    def train(self, mode: bool = True) -> FrozenStatistics:
        """As of every module, but batch norms stay in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


def make_backbone(
    name: str = "resnet50",
    layer: str = "layer4",
    init: str = "random",
    size: int = 224,
    channels: int = 3,
    freeze_statistics: bool = False,
    small_size: int | None = None,
) -> tuple[FeatureMap, int]:
    """A backbone and the channels of its map.

    Args:
        name: Name of a torchvision or timm model, ViTs included. For timm, a tag after the name chooses among its
            weights, as in ``NAME.TAG``.
        layer: Name of the layer after which the model is cut; its output is the feature map. In ResNets ``layer4``
            gives a cell for 32 x 32 pixels, ``layer3`` one for 16 x 16; in most ViTs of timm the last is ``norm``.
        init: Where the weights come from: ``random``; ``imagenet``, which downloads the weights that torchvision or
            timm has under the name (trained with ImageNet's labels, unless the name says otherwise); or the path of a
            file: a checkpoint of a run, its encoder.safetensors, or a checkpoint of another library or publication.
        size: Side of the views in pixels, for a first pass that shows the map's size.
        channels: Number of channels of the images. If it is not 3, the first convolution is made anew.
        freeze_statistics: Whether batch norm keeps the mean and variance that come with ``init``, in the online and in
            the target encoder. If false, each encoder computes them from its own views, which training from random
            weights needs.

    Raises:
        ValueError: If the model is unknown, a file does not fit, the map is a single cell, or the patches of a ViT do
            not fill the views.
    """
    kind = FrozenStatistics if freeze_statistics else FeatureMap
    model = make_model(name, init == "imagenet", size, channels, several=small_size is not None)
    if init in ("random", "imagenet"):
        backbone = kind(model, layer)
    else:
        backbone, read = _read_into(model, lambda: kind(model, layer), init, f"backbone.name={name}")
        log.info("%s: loaded %d entries; left out %d", init, len(read.weights), len(read.parts) + len(read.dropped))
    width, *cells = map_shape(backbone, size, channels)
    log.info("%s: %d px views give %dx%d cells", name, size, *cells)
    if small_size is not None:
        try:
            log.info(
                "%s: %d px views give %dx%d cells", name, small_size, *map_shape(backbone, small_size, channels)[1:]
            )
        except (ValueError, RuntimeError, AssertionError) as error:  # a model that was made for one size
            raise ValueError(f"data.small_size: {name} does not take views of {small_size} px: {error}") from error
    return backbone, width


def _read_into(model: nn.Module, cut: Callable[[], FeatureMap], path: str, name: str) -> tuple[FeatureMap, Weights]:
    """The cut network with a file's weights: of the whole network, or of one that was cut at the same place."""
    try:
        read = load_backbone(model, path)
    except ValueError:
        backbone = cut()
        try:
            return backbone, load_backbone(backbone, path, name=name)
        except ValueError as error:
            raise ValueError(f"backbone.init: {str(error).removeprefix('path: ')}") from error
    return cut(), read


def map_shape(backbone: nn.Module, size: int, channels: int) -> torch.Size:
    """``(C, h, w)`` of the backbone's map of a view."""
    with torch.no_grad():
        where = next(backbone.parameters(), torch.empty(0)).device
        features = backbone.eval()(torch.zeros(1, channels, size, size, device=where))
    backbone.train()
    return features.shape[1:]


def make_model(name: str, pretrained: bool, size: int, channels: int, several: bool = False) -> nn.Module:
    """A torchvision or timm model for views of this size and number of channels; ValueError on unknown names.

    With ``several`` for views of other sizes as well, where the model can be made so.
    """
    if name in torchvision.models.list_models(torchvision.models):
        try:
            model = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
        except OSError as error:  # of the download
            url = torchvision.models.get_model_weights(name).DEFAULT.url
            place = Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(url).name)
            raise _without_network(name, error, f"{url} and belongs in {place}") from error
        return model if channels == 3 else _with_channels(model, channels)
    import timm

    if timm.is_model(name):  # with or without the tag that names its weights
        sized = _size_argument(name, size, several)
        try:
            model = timm.create_model(name, pretrained=pretrained, in_chans=channels, num_classes=0, **sized)
        except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
            if pretrained and _is_download(error):
                hub = timm.get_pretrained_cfg(name).hf_hub_id
                place = f"model.safetensors of {hub} on Hugging Face, which may be fetched on another machine"
                raise _without_network(name, error, place) from error
            raise ValueError(f"backbone.name: {name} cannot be made for views of {size} px: {error}") from error
        stride = getattr(getattr(getattr(model, "patch_embed", None), "proj", None), "stride", (1, 1))
        if any(size % side for side in stride):  # cells would lie elsewhere than their coords say
            raise ValueError(f"data.size: expected a multiple of {name}'s patch of {stride[0]} px, got {size}")
        return model
    known = [*torchvision.models.list_models(torchvision.models), *timm.list_models()]
    close = ", ".join(difflib.get_close_matches(name, known)) or "none close"
    raise ValueError(f"backbone.name: expected the name of a torchvision or timm model ({close}), got {name!r}")


def _is_download(error: BaseException) -> bool:
    """Whether weights could not be fetched: the hub's own errors, or the network's below them."""
    origin = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or origin in ("huggingface_hub", "httpx", "requests", "urllib3")


def _without_network(name: str, error: BaseException, place: str) -> ValueError:
    reason = str(error).splitlines()[0].strip()[:120] if str(error) else type(error).__name__
    return ValueError(
        f"backbone.init: the weights of {name} cannot be downloaded ({reason}). The file is {place}. Otherwise begin "
        "from a file of weights with --backbone.init FILE, or from none with --backbone.init random"
    )


def _size_argument(name: str, size: int, several: bool) -> dict[str, int | bool]:
    """How the timm model of this name is told the size of its images: nothing for models that take every size.

    The name says little (fastvit, efficientvit and tiny_vit have no such argument, while eva02 and swin do): the
    signature of the model's class is asked, and the configuration of its weights.

    Raises:
        ValueError: If the model takes one size alone, and this is another.
    """
    import timm

    with torch.device("meta"):  # without memory for the weights, or time to draw them
        probe = timm.create_model(name)
    takes = inspect.signature(type(probe).__init__).parameters
    if "img_size" in takes:
        return {"img_size": size, **({"dynamic_img_size": True} if several and "dynamic_img_size" in takes else {})}
    own = probe.pretrained_cfg["input_size"][-1]
    if probe.pretrained_cfg.get("fixed_input_size") and size != own:
        raise ValueError(f"data.size: {name} takes images of {own} px alone, got {size}")
    return {}


def _with_channels(model: nn.Module, channels: int) -> nn.Module:
    """The model with its first convolution for other images than colour."""
    name, first = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    parent = model.get_submodule(name.rpartition(".")[0])
    new = nn.Conv2d(
        channels, first.out_channels, first.kernel_size, first.stride, first.padding, bias=first.bias is not None
    )
    parent._modules[name.rpartition(".")[2]] = new
    return model
