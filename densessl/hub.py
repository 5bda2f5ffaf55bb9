"""Small encoders that densessl's own study has pretrained, out of the package's files: nothing is downloaded.

What they have seen, how well they do and what they are not good for: ``weights/README.md``.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from torchvision.models.resnet import BasicBlock, ResNet

from densessl.backbone import FeatureMap
from densessl.checkpoints import load_backbone

__all__ = ["list_models", "load", "r10"]

_SUFFIX = ".safetensors"


def r10() -> FeatureMap:
    """The network of the study with random weights, in training mode.

    It is torchvision's ResNet with one basic block a stage (ten layers if it were whole), cut after ``layer2``.

    Returns:
        A module from images ``(B, 3, H, W)`` to feature maps ``(B, 128, h, w)`` at stride 8.

    Examples:
        >>> r10()(torch.rand(2, 3, 64, 96)).shape
        torch.Size([2, 128, 8, 12])
    """
    return FeatureMap(ResNet(BasicBlock, [1, 1, 1, 1]), "layer2")


def list_models() -> list[str]:
    """The names that ``load`` takes, in alphabetical order.

    Examples:
        >>> "pixpro_r10_study" in list_models()
        True
    """
    return sorted(path.stem for path in _folder().glob(f"*{_SUFFIX}"))


def load(name: str | Path) -> FeatureMap:
    """Loads a pretrained encoder of the study, on the CPU and in eval mode.

    Call ``.train()`` on it before you fine-tune it. Images are RGB, divided by 255, minus
    ``densessl.augment.presets.IMAGENET_MEAN``, divided by ``IMAGENET_STD``.

    Args:
        name: One of ``list_models()``, or the path of a ``*.safetensors`` file with weights of the same network, such
            as ``benchmarks/studies/compare.py`` leaves behind. For other files and networks see
            ``densessl.checkpoints.load_backbone``.

    Returns:
        A module from images ``(B, 3, H, W)`` to feature maps ``(B, 128, h, w)`` at stride 8.

    Raises:
        ValueError: If there are no weights of this name, or the file is missing, damaged or of another network; the
            message then names the first entry that is missing or has another shape.
        ImportError: If safetensors is not installed; it is the extra ``export``.

    Examples:
        >>> model = load("pixpro_r10_study")
        >>> model(torch.rand(1, 3, 256, 320)).shape
        torch.Size([1, 128, 32, 40])
    """
    model = r10()
    load_backbone(model, _file(name), name="the network of densessl.hub")
    return model.eval()


def _file(name: str | Path) -> Path:
    if isinstance(name, (str, Path)) and Path(name).suffix == _SUFFIX:
        return Path(name)
    names = list_models()
    if name in names:
        return _folder() / f"{name}{_SUFFIX}"
    close = get_close_matches(str(name), names, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    path = f"the path of a *{_SUFFIX} file"
    known = f"one of {', '.join(names)} or {path}" if names else f"{path} (this copy of densessl has no weights)"
    raise ValueError(f"name: expected {known}, got {name!r}{hint}")


def _folder() -> Path:
    """Where the weights lie: inside the installed package, or beside it in a clone."""
    inside = Path(__file__).parent / "weights"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "weights"
