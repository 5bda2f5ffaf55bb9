"""Folders that transformers and timm open: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from densessl._naming import to_huggingface
from densessl._reading import safetensors

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
"""The networks that transformers' ResNetModel builds."""
_TIMM_ONLY = ("tag", "license", "origin_url", "paper_ids")  # of the weights that timm publishes under the name


def write_resnet(weights: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Writes a folder for ``ResNetModel`` and ``ResNetBackbone``, and gives what was written.

    Args:
        weights: Weights of one of RESNETS, under torchvision's names.
        folder: Folder to write; it is made if it does not exist.
    """
    blocks = [{name.split(".")[1] for name in weights if name.startswith(f"layer{stage}.")} for stage in (1, 2, 3, 4)]
    bottleneck = "layer1.0.conv3.weight" in weights
    last = "conv3" if bottleneck else "conv2"
    widths = [weights[f"layer{stage}.0.{last}.weight"].shape[0] for stage in (1, 2, 3, 4)]
    config = {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": weights["conv1.weight"].shape[1],
        "embedding_size": weights["conv1.weight"].shape[0],
        "hidden_sizes": widths,
        "depths": [len(some) for some in blocks],
        "layer_type": "bottleneck" if bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,  # the stride lies in the 3x3 convolution, as in torchvision
    }
    renamed = {to_huggingface(name): value for name, value in weights.items()}
    _write(renamed, config, folder)
    return renamed


def write_timm(model: nn.Module, folder: Path) -> None:
    """Writes a timm model's folder, for ``timm.create_model("local-dir:...")``, AutoModel and TimmWrapperModel.

    Args:
        model: A model from ``timm.create_model(..., num_classes=0)``.
        folder: Folder to write; it is made if it does not exist.
    """
    hub = importlib.import_module("timm.models")
    described: Any = model.pretrained_cfg
    described = {key: value for key, value in dict(described).items() if key not in _TIMM_ONLY}
    model.pretrained_cfg = described
    with tempfile.TemporaryDirectory() as scratch:
        hub.save_for_hf(model, scratch, safe_serialization=True)
        config = json.loads((Path(scratch) / "config.json").read_text(encoding="utf-8"))
    # timm from 1.0.31 on repeats the number of classes here, and transformers then passes it twice.
    arguments = {key: value for key, value in config.pop("model_args", {}).items() if key != "num_classes"}
    if arguments:
        config["model_args"] = arguments
    _write(model.state_dict(), config, folder)


def create_timm(name: str) -> nn.Module:
    """A timm model without classifier, as initialised.

    Raises:
        ValueError: If timm knows no such model.
        ImportError: If timm is not installed.
    """
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ImportError("models of timm need that package: pip install 'densessl[timm]'") from error
    if not timm.is_model(name):
        base = re.split(r"[._]", name)[0]
        close = ", ".join(timm.list_models(f"{base}*")[:5]) or "see timm.list_models()"
        raise ValueError(f"model: expected the name of a timm model ({close}), got {name!r}")
    return timm.create_model(name, pretrained=False, num_classes=0)


def _write(tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> None:
    copies = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:  # never half a file under the final name
        # Not save_file, which makes files that others cannot read.
        (Path(scratch) / "model.safetensors").write_bytes(safetensors().save(copies, metadata={"format": "pt"}))
        (Path(scratch) / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for file in ("model.safetensors", "config.json"):
            shutil.move(Path(scratch) / file, folder / file)
