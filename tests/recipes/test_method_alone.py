"""A method is a plain module: imported and trained in a few lines, without a trainer."""

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
sys.modules["pytorch_lightning"] = None  # importing it now raises
import torch, torchvision
from densessl import LARS, FeatureMap, View, byol_views, param_groups
from examples.pretrain.pixpro import PixPro

method = PixPro(FeatureMap(torchvision.models.resnet18(), "layer2"), width=128, hidden_dim=64, dim=32)
optimizer = LARS(param_groups(method, weight_decay=1e-5), lr=1.0)
views = byol_views(size=32)
for _ in range(3):
    images = torch.randint(0, 256, (4, 3, 48, 64), dtype=torch.uint8)
    view1, view2 = (View(*parts) for parts in torch.utils.data.default_collate([views(image) for image in images]))
    loss, terms, metrics = method(view1, view2)
    optimizer.zero_grad(); loss.backward(); optimizer.step(); method.target.update(method.encoder)
assert loss.isfinite() and "health/effective_rank" in metrics()
"""


def test_pixpro_trains_three_steps_without_lightning():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE], capture_output=True, text=True, check=False, cwd=root
    )
    assert done.returncode == 0, done.stderr


def test_the_two_first_methods_are_short():
    folder = Path(__file__).parents[2] / "examples" / "pretrain"
    for name in ("pixpro", "pixcontrast"):
        assert len((folder / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60
