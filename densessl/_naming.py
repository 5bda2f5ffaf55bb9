"""The names of a ResNet's parameters in other libraries, to and from torchvision's."""

from __future__ import annotations

import re

_SEQUENTIAL = {"0": "conv1", "1": "bn1", **{str(stage + 3): f"layer{stage}" for stage in (1, 2, 3, 4)}}


def to_detectron2(name: str) -> str:
    """Turns ``layer1.0.bn1.weight`` into ``res2.0.conv1.norm.weight``."""
    if not name.startswith("layer"):
        return "stem." + name.replace("bn1.", "conv1.norm.")
    stage, rest = int(name[5]) + 1, name[7:]
    rest = rest.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return f"res{stage}." + re.sub(r"\bbn(\d)\.", r"conv\1.norm.", rest)


def from_detectron2(name: str) -> str:
    """The reverse of ``to_detectron2``; a name that does not belong to such a ResNet stays."""
    if name.startswith("stem.conv1."):
        return re.sub(r"^conv1\.norm\.", "bn1.", name.removeprefix("stem."))
    if not re.match(r"res[2-5]\.\d+\.", name):
        return name
    rest = name[4:].replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
    return f"layer{int(name[3]) - 1}" + re.sub(r"\bconv(\d)\.norm\.", r"bn\1.", rest)


def to_huggingface(name: str) -> str:
    """Turns ``layer1.0.bn1.weight`` into ``encoder.stages.0.layers.0.layer.0.normalization.weight``."""
    if not name.startswith("layer"):
        return "embedder.embedder." + name.replace("conv1.", "convolution.").replace("bn1.", "normalization.")
    stage, block, rest = name[5:].split(".", 2)
    rest = rest.replace("downsample.0.", "shortcut.convolution.").replace("downsample.1.", "shortcut.normalization.")
    rest = re.sub(r"^conv(\d)\.", lambda found: f"layer.{int(found[1]) - 1}.convolution.", rest)
    rest = re.sub(r"^bn(\d)\.", lambda found: f"layer.{int(found[1]) - 1}.normalization.", rest)
    return f"encoder.stages.{int(stage) - 1}.layers.{block}.{rest}"


def from_huggingface(name: str) -> str:
    """The reverse of ``to_huggingface``; a name that does not belong to such a ResNet stays."""
    if name.startswith("embedder.embedder."):
        rest = name.removeprefix("embedder.embedder.")
        return rest.replace("convolution.", "conv1.").replace("normalization.", "bn1.")
    found = re.fullmatch(r"encoder\.stages\.(\d)\.layers\.(\d+)\.(.*)", name)
    if found is None:
        return name
    rest = (
        found[3].replace("shortcut.convolution.", "downsample.0.").replace("shortcut.normalization.", "downsample.1.")
    )
    rest = re.sub(r"^layer\.(\d)\.convolution\.", lambda number: f"conv{int(number[1]) + 1}.", rest)
    rest = re.sub(r"^layer\.(\d)\.normalization\.", lambda number: f"bn{int(number[1]) + 1}.", rest)
    return f"layer{int(found[1]) + 1}.{found[2]}.{rest}"


def from_sequential(name: str) -> str:
    """Turns the counted names in ``nn.Sequential(*list(resnet.children())[:-1])`` into torchvision's."""
    first, _, rest = name.partition(".")
    return f"{_SEQUENTIAL[first]}.{rest}" if first in _SEQUENTIAL else name
