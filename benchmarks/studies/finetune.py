"""Fine-tunes one encoder through the transfer recipes, as a command line would, and reads the figures they log."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TRANSFER = Path(__file__).parents[2] / "examples" / "transfer"


def fcn_miou(weights: Path, camvid: Path, backbone: str, out: Path, options: Sequence[str] = ()) -> float:
    """mIoU, 0..1, on CamVid's test split, of an FCN trained on its train split.

    Args:
        weights: File encoder.safetensors of the whole backbone.
        camvid: Folder with ``images/`` and ``labels/``.
        backbone: Name of a torchvision ResNet.
        out: Folder of the run.
        options: Further options of the recipe, such as ``--trainer.max_epochs=1``.
    """
    common = ["--config", str(TRANSFER / "configs" / "camvid_fcn_r18.yaml"), f"--data.folder={camvid}", f"--out={out}"]
    common += [f"--model.backbone={backbone}", f"--model.pretrained={weights}", *options]
    _call("segmentation.py", "fit", *common)
    _call("segmentation.py", "test", *common, f"--ckpt_path={out / 'last.ckpt'}")
    return _last(out, "test/miou")


def detector_ap(weights: Path, cards: Path, backbone: str, out: Path, options: Sequence[str] = ()) -> dict[str, float]:
    """AP and AP50, 0..1, on the cards' val split, of an FCOS trained on their train split; arguments as fcn_miou."""
    common = ["--config", str(TRANSFER / "configs" / "cards_fcos_r18.yaml"), f"--data.folder={cards}", f"--out={out}"]
    _call("detection.py", "fit", *common, f"--model.backbone={backbone}", f"--model.pretrained={weights}", *options)
    return {name: _last(out, f"val/box_{name}") / 100 for name in ("ap", "ap50")}


def _call(recipe: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(TRANSFER / recipe), *arguments], check=True)


def _last(out: Path, figure: str) -> float:
    """What was logged last under a name, in the newest of the run's tables that has it."""
    tables = sorted(out.glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    for table in reversed(tables):
        with table.open(newline="") as file:
            values = [row[figure] for row in csv.DictReader(file) if row.get(figure)]
        if values:
            return float(values[-1])
    raise RuntimeError(f"{out}: no table of the recipe has {figure}")
