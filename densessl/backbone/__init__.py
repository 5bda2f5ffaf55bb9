"""Backbones as feature maps."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from densessl._tensors import check_tensor
from densessl.backbone._graph import GraphRun, cut
from densessl.backbone._hub import prepare as prepare_hub
from densessl.backbone._huggingface import prepare as prepare_huggingface
from densessl.backbone._layout import Layout
from densessl.backbone._timm import prepare as prepare_timm
from densessl.backbone._tree import REGISTRIES, shallow
from densessl.backbone.mask_token import MaskToken

__all__ = ["FeatureMap", "MaskToken"]


# What torch says where windows or position embeddings were made for another size of the images.
_OF_A_SIZE = re.compile(r"is invalid for input of size|must match the size of tensor")
# And where a layer's parameters are of another precision than what it is given.
_OF_A_DTYPE = re.compile(r"should be the same|scalar type|same dtype")
_FINAL_NORMS = ("norm", "encoder.ln")  # of timm's and of torchvision's vision transformers


class FeatureMap(nn.Module):
    """A torchvision, timm or Hugging Face model as an encoder from images to a feature map, or to several.

    Everything after ``layer`` (pooling, classifier) is dropped, so that no parameter stays without a gradient. Two
    parts of Hugging Face's models are exceptions: the ``mask_token`` in the embeddings of DINOv2, DINOv3 and others,
    which no forward pass here uses, and the stages of an ``AutoBackbone`` behind the layer. DistributedDataParallel
    waits for their gradients: freeze them (``requires_grad_(False)``) before wrapping, or pass
    ``find_unused_parameters=True``.

    Parameter and buffer names stay the model's own: ``state_dict()`` loads into the plain model (``strict=False`` for
    the dropped head), and the other way round. The modules are the model's, too: hooks on them, gradient checkpointing
    and ``fully_shard`` of blocks work as on the plain model.

    Each kind of model is run through the interface that it offers:

    - timm's models by ``forward_intermediates``, for the layers that ``feature_info`` names (``"blocks.11"``,
      ``"stages.3"``, ``"layer4"``) and for ``"norm"``. Class and register tokens are dropped, and the channels come
      first.
    - Hugging Face's models by their outputs: ``"encoder.layer.11"``, ``"encoder.stages.3"``, ``"layernorm"``; the
      stages of an ``AutoBackbone`` (which is kept whole) by their names, ``"stage4"``.
    - DINO's models of torch.hub by ``get_intermediate_layers``: ``"blocks.11"``, ``"norm"``.
    - All other models, and other layers of timm's models, by their graph, which is cut after the layer. Hooks on
      modules that contain the layer then do not fire.

    Args:
        model: A model of one of these kinds, or any module that ``torch.fx`` can trace.
        layer: Name of the module to cut after. The default ``"layer4"`` is the C5 map of a ResNet. Use ``"encoder.ln"``
            for torchvision's ViTs, ``"features"`` for its ConvNeXt and ``"permute"`` for its Swin.
        layers: Names of several modules, in place of ``layer``. The output is then a list of their maps, in this order.

    Attributes:
        layer: The name that was given; None if ``layers`` was given. If the model has a part of this name, this is that
            part.

    Raises:
        ValueError: If the model has no such layer, or its output cannot be reached.

    Examples:
        >>> from torchvision.models import resnet18
        >>> encoder = FeatureMap(resnet18(), layer="layer4")
        >>> encoder(torch.rand(2, 3, 64, 96)).shape
        torch.Size([2, 512, 2, 3])
    """

    _programs: tuple[nn.Module, nn.Module]
    _run: Callable[[nn.Module, Tensor], list[Any]]

    def __init__(self, model: nn.Module, layer: str = "layer4", *, layers: Sequence[str] | None = None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            what = repr(model) if isinstance(model, str) else type(model).__name__
            raise ValueError(f"model: expected a module, such as torchvision.models.resnet50(), got {what}")
        if layers is None and not isinstance(layer, str):
            raise ValueError(f"layer: expected the name of a layer, got {layer!r}; layers=[...] takes several")
        names = [layer] if layers is None else list(layers)
        if isinstance(layers, str) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"layers: expected a list of names of layers, got {layers!r}")
        part, self._programs, self._run = _prepare(model, names)
        # To hold the model's registries, instead of nesting it as a part, keeps the model's names.
        for registry in REGISTRIES:
            self.__dict__[registry] = part.__dict__[registry]
        self._non_persistent_buffers_set = set(part._non_persistent_buffers_set) & set(self._buffers)
        self._share()
        self.training = model.training
        self._several = layers is not None
        self._layouts = [Layout(model, name) for name in names]
        if "layer" not in self._modules:  # some models have a part of that name, which stays theirs
            self.layer = layer if layers is None else None

    def _share(self) -> None:
        """Makes the programs run on this module's own parameters, buffers and modules."""
        for program in self._programs:
            for registry in REGISTRIES:
                program.__dict__[registry] = self.__dict__[registry]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()  # copied and unpickled programs come with modules of their own

    def extra_repr(self) -> str:
        names = [layout.layer for layout in self._layouts]
        return f"layers={names!r}" if self._several else f"layer={names[0]!r}"

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switches the model's gradient checkpointing, as its own method of this name does.

        Args:
            enable: Whether to compute activations again in the backward pass instead of keeping them.

        Raises:
            ValueError: If the model has no such method.
        """
        for program in self._programs:
            switch: Any = getattr(program, "set_grad_checkpointing", None)
            if switch is None:
                raise ValueError(
                    f"model: {type(program).__name__} has no set_grad_checkpointing; switch gradient checkpointing on "
                    "in the model, before FeatureMap takes it"
                )
            switch(enable)

    def forward(self, image: Tensor) -> Any:
        """Encodes a batch of images.

        Args:
            image: Batch of images ``(B, C, H, W)``, floating point, with as many channels as the model takes.

        Returns:
            A feature map ``(B, C, h, w)``, or with ``layers`` a list of maps.

        Raises:
            ValueError: If the image has another shape, another number of channels or integer values; if its precision
                is not that of the parameters, autocast is off and the model does not convert it; if the model does not
                take images of this size; or if a map has a single cell, or no map comes out.
        """
        check_tensor(image, "image", "floating point images (B, C, H, W)")
        if image.ndim != 4 or not image.is_floating_point():
            raise ValueError(
                f"image: expected floating point images (B, C, H, W), got {image.dtype} {tuple(image.shape)}"
                + ("; scale uint8 to 0..1 and normalise it first" if not image.is_floating_point() else "")
            )
        size = (image.shape[2], image.shape[3])
        self._layouts[0].refuse_size(size)
        try:
            outs = self._run(self._programs[self.training], image)
        except AssertionError as error:  # timm and torchvision raise this at sizes that they do not take
            raise ValueError(f"image: the model does not take {size[0]}x{size[1]} pixels: {error}") from error
        except RuntimeError as error:  # torch raises this at another number of channels, and in many other cases
            _refuse_precision(self, image, error)
            channels = _input_channels(self)
            if channels in (None, image.shape[1]):
                if _OF_A_SIZE.search(str(error)) is None:
                    raise
                raise ValueError(f"image: the model does not take {size[0]}x{size[1]} pixels: {error}") from error
            last = f"; channels come first, got {tuple(image.shape)}" if image.shape[3] == channels else ""
            raise ValueError(f"image: expected {channels} channels, got {image.shape[1]}{last}") from error
        maps = [layout(out, size) for layout, out in zip(self._layouts, outs, strict=True)]
        return maps if self._several else maps[0]


def _refuse_precision(model: nn.Module, image: Tensor, error: RuntimeError) -> None:
    """Raises ValueError in place of torch's error if the image has another precision than all parameters.

    Not before the model runs, because some models convert their images, and sharded parameters are converted later.
    """
    if _OF_A_DTYPE.search(str(error)) is None or torch.is_autocast_enabled(image.device.type):
        return
    own = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(own) == 1 and image.dtype not in own:
        expected = own.pop()
        raise ValueError(
            f"image: expected {expected} as the model's parameters, got {image.dtype}; convert it, "
            f"image.to({expected}), or run the model under torch.autocast"
        ) from error


def _input_channels(model: nn.Module) -> int | None:
    """Channels that the model's first convolution takes; None if it has none."""
    first = next((part for part in model.modules() if isinstance(part, nn.Conv2d)), None)
    return None if first is None else first.in_channels


def _prepare(
    model: nn.Module, layers: list[str]
) -> tuple[nn.Module, tuple[nn.Module, nn.Module], Callable[[nn.Module, Tensor], list[Any]]]:
    """The part of the model that is used, its programs for evaluation and for training, and what runs a program."""
    for prepare in (prepare_timm, prepare_huggingface, prepare_hub):
        prepared = prepare(model, layers)
        if prepared is not None:
            part, run = prepared
            if part is model:
                return model, (model, model), run
            programs = (shallow(part), shallow(part))
            for mode, program in zip((False, True), programs, strict=True):
                program.training = mode
            return shallow(part), programs, run
    modules = dict(model.named_modules())
    for layer in layers:
        if layer not in modules:
            names = ", ".join(name for name, _ in model.named_children())
            usual = next(
                (f"; for a vision transformer usually {name!r}" for name in _FINAL_NORMS if name in modules), ""
            )
            raise ValueError(f"layer: {type(model).__name__} has no {layer!r}; its top modules are {names}{usual}")
    part, (evaluation, training) = cut(model, layers)
    return part, (evaluation, training), GraphRun(layers)
