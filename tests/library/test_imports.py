"""Imports point one way, and the heavy dependencies come in on use only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import densessl

PACKAGE = Path(densessl.__file__).parent
# module -> what of densessl it may import besides _tensors; a package imports its own modules
ALLOWED = {
    "_tensors": set(),
    "geometry._points": set(),
    "geometry.cells": {"geometry._points"},
    "geometry.distance": {"geometry._points", "geometry.cells"},
    "geometry.homography": {"geometry._points"},
    "geometry._inverse": {"geometry._points"},
    "geometry.warping": {"geometry._inverse", "geometry._points", "geometry.cells", "geometry.homography"},
    "geometry.alignment": {"geometry._points", "geometry.cells", "geometry.homography", "geometry.warping"},
    "features": set(),
    "_checks": {"features"},
    "_normalize": set(),
    "_sums": {"_checks", "_normalize"},
    "_memory": set(),
    "heads": {"_normalize"},
    "block_mask": set(),
    "ema": set(),
    "optim": set(),
    "multilevel": set(),
    "coords._functionals": set(),
    "coords._kernels": {"geometry", "coords._functionals"},
    "coords._matrices": set(),
    "coords.sources": {"coords._matrices"},
    "coords._labels": {"coords._functionals"},
    "augment._crop": set(),
    "augment._draws": set(),
    "augment._start": {"coords", "geometry"},
    "augment._steps": {"coords"},
    "augment._alone": {"augment._steps"},
    "augment._inputs": {"augment._steps", "coords"},
    "augment.views": {
        "augment._alone",
        "augment._draws",
        "augment._inputs",
        "augment._start",
        "augment._steps",
        "coords",
    },
    "augment.batch": {"augment._draws", "augment._inputs", "augment.views", "geometry"},
    "augment._pil": {"augment._steps"},
    "augment.presets": {"augment.batch", "augment._crop", "augment._pil", "augment.views"},
    "augment._kornia": set(),
    "augment.multichannel": {
        "augment.batch",
        "augment._kornia",
        "augment._pil",
        "augment.presets",
        "augment.views",
    },
    "augment.multicrop": {"augment._crop", "augment.batch", "augment.presets", "augment.views"},
    "_tracer": {"coords._functionals", "geometry"},
    "_sightings": {"_tracer"},
    "_untouched": set(),
    "_recoloured": {"_tracer", "augment._draws", "augment._steps", "coords"},
    "tracking": {
        "_recoloured",
        "_sightings",
        "_tracer",
        "_untouched",
        "augment",
        "augment._draws",
        "augment._start",
        "augment._steps",
        "coords",
    },
    "masks": {"_checks", "geometry"},
    "matching._windows": {"geometry"},
    "matching._buckets": {"geometry", "matching._windows"},
    "matching.distance": {"geometry", "_memory", "matching._buckets", "matching._windows"},
    "matching.pairs": set(),
    "matching.nearest": {"matching.pairs"},
    "matching.similarity": {"_checks", "_normalize"},
    "backbone._tree": set(),
    "backbone._layout": {"features"},
    "backbone._graph": {"backbone._tree"},
    "backbone._timm": {"backbone._tree"},
    "backbone._huggingface": {"backbone._tree", "features"},
    "backbone.mask_token": set(),
    "backbone._hub": {"backbone._layout", "backbone._tree", "features"},
    "queue": {"_normalize"},
    "propagation._triton": set(),
    "propagation._blockwise": {"propagation._triton"},
    "propagation.ppm": {"_checks", "_memory", "_normalize", "features", "propagation._blockwise"},
    "losses._reduce": set(),
    "losses._blockwise": set(),
    "losses._ignored": {"_sums"},
    "losses._products": set(),
    "losses.gram": {"_checks", "_normalize", "losses._products", "losses._reduce"},
    "losses.kernel_alignment": {"_checks", "losses._products", "losses._reduce"},
    "losses.neighbor_order": {"_checks", "_normalize", "losses._reduce"},
    "losses.prototype": {"_checks", "losses._reduce"},
    "losses.pixpro": {"_sums", "losses._reduce"},
    "losses.pixcontrast": {"_checks", "_sums", "losses._reduce", "losses._blockwise", "losses._ignored"},
    "losses.instance": {"losses._reduce"},
    "losses.info_nce": {"_normalize", "losses._reduce"},
    "losses.masked_info_nce": {"_normalize", "losses._reduce"},
    "metrics": {"_checks", "_normalize", "_sums", "propagation"},
    "_pca": set(),
    "plots": {"_pca", "_sums", "features", "geometry"},
    "_reading": set(),
    "_naming": set(),
    "_roots": {"_naming", "_reading"},
    "_mismatch": set(),
    "checkpoints": {"_mismatch", "_reading", "_roots"},
    "hub": {"backbone", "checkpoints"},
    "_huggingface": {"_naming", "_reading"},
    "_whole": set(),
    "_resnets": {"_mismatch", "checkpoints"},
    "export": {"_huggingface", "_mismatch", "_naming", "_reading", "_resnets", "_whole", "checkpoints"},
    "evaluation._refuse": set(),
    "evaluation._processes": set(),
    "evaluation._disk": set(),
    "evaluation._held": set(),
    "evaluation._stored": {"evaluation._disk", "evaluation._processes"},
    "evaluation.store": {
        "evaluation._batches",
        "evaluation._disk",
        "evaluation._processes",
        "evaluation._refuse",
        "evaluation._stored",
        "evaluation._together",
    },
    "evaluation._backbones": {
        "_resnets",
        "backbone",
        "backbone._layout",
        "checkpoints",
        "evaluation._batches",
        "export",
    },
    "evaluation._report": set(),
    "evaluation._sources": {"evaluation.data"},
    "evaluation._protocols": {
        "evaluation._batches",
        "evaluation.clustering",
        "evaluation.correspondence",
        "evaluation.in_context",
        "evaluation.keypoint_pairs",
        "evaluation.linear",
        "evaluation.neighbors",
        "evaluation.overclustering",
        "evaluation.patch",
        "evaluation.store",
        "evaluation.tokens",
        "evaluation.video",
    },
    "evaluation._jobs": {
        "evaluation._batches",
        "evaluation._processes",
        "evaluation._protocols",
        "evaluation._sources",
        "evaluation.data",
        "evaluation.data.voc",
        "evaluation.store",
    },
    "evaluation._command": {
        "evaluation._backbones",
        "evaluation._jobs",
        "evaluation._processes",
        "evaluation._protocols",
        "evaluation._report",
        "evaluation._sources",
        "evaluation._statistics",
    },
    "evaluation._statistics": {"evaluation._backbones"},
    "__main__": {"", "evaluation._command", "export"},
    "evaluation.__main__": {"evaluation._command"},
    "evaluation.data._files": set(),
    "evaluation.data.labelled": {"evaluation.data._files"},
    "evaluation.data.voc": {"evaluation.data._files", "evaluation.data.labelled"},
    "evaluation.data.scenes": {"evaluation.data._files", "evaluation.data.labelled"},
    "evaluation.data.folders": {"evaluation.data._files", "evaluation.data.labelled"},
    "evaluation.data.photos": {"evaluation.data._files"},
    "evaluation.data.videos": {"evaluation.data._files"},
    "evaluation.data.pairs": {"evaluation.data._files", "evaluation.keypoint_pairs"},
    "evaluation.shares": {"evaluation._refuse"},
    "evaluation._search": set(),
    "evaluation.retrieval": {"evaluation._disk", "evaluation._refuse", "evaluation._search"},
    "evaluation.matched": {"evaluation._refuse"},
    "evaluation.keypoints": {"evaluation._refuse"},
    "evaluation.label_propagation": {"evaluation._refuse", "evaluation._search"},
    "evaluation.tokens": {"_checks", "evaluation._refuse"},
    "evaluation.in_context": {
        "evaluation._batches",
        "evaluation._disk",
        "evaluation._held",
        "evaluation._processes",
        "evaluation._refuse",
        "evaluation._stored",
        "evaluation._together",
        "evaluation.matched",
        "evaluation.retrieval",
        "evaluation.shares",
        "features",
    },
    "evaluation._together": {"evaluation._processes"},
    "evaluation._batches": {"evaluation._refuse", "evaluation._stored", "evaluation._together"},
    "evaluation._boundaries": set(),
    "evaluation._kmeans": set(),
    "evaluation._nearest": set(),
    "evaluation._logistic": {"evaluation._together"},
    "evaluation._crops": {"evaluation._batches"},
    "evaluation._linear_head": {
        "evaluation._batches",
        "evaluation._crops",
        "evaluation._refuse",
        "evaluation._together",
        "evaluation.matched",
    },
    "evaluation.linear": {
        "evaluation._batches",
        "evaluation._held",
        "evaluation._linear_head",
        "evaluation._refuse",
        "evaluation._stored",
        "evaluation._together",
        "evaluation.in_context",
        "evaluation.matched",
    },
    "evaluation.patch": {
        "evaluation._batches",
        "evaluation._disk",
        "evaluation._logistic",
        "evaluation._nearest",
        "evaluation._refuse",
        "evaluation._together",
        "evaluation.matched",
    },
    "evaluation.overclustering": {
        "evaluation._batches",
        "evaluation._kmeans",
        "evaluation._refuse",
        "evaluation._together",
        "evaluation.matched",
    },
    "evaluation.video": {
        "evaluation._batches",
        "evaluation._boundaries",
        "evaluation._refuse",
        "evaluation._together",
        "evaluation.label_propagation",
    },
    "evaluation.keypoint_pairs": {"evaluation._batches", "evaluation._together", "evaluation.keypoints"},
    "evaluation.neighbors": {
        "_normalize",
        "evaluation._batches",
        "evaluation._processes",
        "evaluation._refuse",
        "evaluation._stored",
        "evaluation._together",
        "evaluation.matched",
        "evaluation.retrieval",
        "evaluation.shares",
        "features",
    },
    "evaluation.clustering": {
        "_normalize",
        "evaluation._batches",
        "evaluation._held",
        "evaluation._processes",
        "evaluation._refuse",
        "evaluation._stored",
        "evaluation._together",
        "evaluation.matched",
        "features",
    },
    "evaluation.correspondence": {
        "_normalize",
        "evaluation._batches",
        "evaluation._processes",
        "evaluation._refuse",
        "evaluation._together",
        "features",
        "geometry",
    },
}
ALLOWED["evaluation.data"] = {name for name in ALLOWED if name.startswith("evaluation.data.")}
for package in ("geometry", "coords", "augment", "matching", "propagation", "losses", "evaluation", "backbone"):
    ALLOWED[package] = {name for name in ALLOWED if name.startswith(f"{package}.")}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if name_of(path)]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_direction(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "densessl":
            imported.add(node.module.partition(".")[2])
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("densessl")}
    assert imported - {"_tensors"} <= ALLOWED[name_of(path)]


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_import_is_light():
    run(
        "import sys, densessl\n"
        "heavy = {'kornia', 'lightly', 'matplotlib', 'timm', 'pytorch_lightning', 'densessl.propagation._triton'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )


def test_everything_else_works_without_kornia_lightly_and_triton():
    run(
        """
import sys
sys.modules["kornia"] = sys.modules["lightly"] = sys.modules["triton"] = None  # importing them now raises
import torch, torchvision
from torch import nn
from torch.utils.data import default_collate
import densessl as d
views = d.byol_views(64)
batch = default_collate([views(torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)) for _ in range(2)])
encoder = nn.Sequential(d.FeatureMap(torchvision.models.resnet18()), d.ConvMLP(512, 64, 32))
target, ppm, match = d.EMA(encoder), d.PPM(nn.Conv2d(32, 32, 1)), d.DistanceMatcher(0.7)
optimizer = d.LARS(d.param_groups(encoder, 1e-5), lr=0.1)
z1, z2 = (encoder(v.image) for v in batch)
t1, t2 = (target(v.image) for v in batch)
mask = match(batch[0].coords, batch[1].coords, z1.shape[-2:])
loss = d.PixProLoss()(ppm(z1), t2, mask) + d.PixContrastLoss()(z2, t1, mask.mT)
loss = loss + d.InstanceConsistencyLoss()(z1.mean((2, 3)), t2.mean((2, 3)))
loss.backward(); optimizer.step(); target.update(encoder)
d.check_tracking(views, draws=1)
for call in (d.byol_photometric, lambda: d.instance_contrast_loss(torch.ones(2, 3), torch.ones(2, 3))):
    try:
        call()
    except ImportError:
        pass
    else:
        raise AssertionError("kornia and lightly are needed exactly here")
try:
    d.PPM(algorithm="triton")(torch.ones(1, 3, 2))
except ValueError as error:
    assert str(error) == 'algorithm: "triton" needs the package triton, which is not installed', error
else:
    raise AssertionError("triton is needed here")
"""
    )


def test_public_names():
    assert sorted(densessl.__all__) == sorted(set(densessl.__all__))
    for name in densessl.__all__:
        assert getattr(densessl, name).__doc__, name


def test_no_asserts_for_user_errors():
    for path in MODULES:
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text()))), path
