"""Makes runs of recipes and small methods for the tests."""

import sys

from torch import nn

from densessl import MultiView
from examples.pretrain.common.backbones import make_backbone
from examples.pretrain.common.cli import Recipe, Run, make_run
from examples.pretrain.common.data.options import photo_views
from examples.pretrain.common.data.views import DrawViews

TINY = ["--backbone.name=resnet18", "--backbone.layer=layer2", "--method.hidden_dim=32", "--method.dim=16"]


def recipe_of(method: type[nn.Module]) -> Recipe:
    """The recipe of a method's file; of a subclass, that of the method it is derived from."""
    modules = [sys.modules[base.__module__] for base in method.__mro__]
    return next(module.recipe for module in modules if hasattr(module, "recipe"))()._replace(method=method)


def cli(method: type[nn.Module], *args: str) -> Run:
    """What the command line makes of the options."""
    return make_run(recipe_of(method), args)


def without_images(monkeypatch) -> None:
    """Lets runs be made, and not begun, whose folders are not there."""
    monkeypatch.setattr("examples.pretrain.common.cli.check_folders", lambda config, data: None)


def small(
    method: type[nn.Module], name: str = "resnet18", layer: str = "layer2", size: int = 32, **options
) -> nn.Module:
    """A method on a small backbone, without a command line."""
    return method(*make_backbone(name, layer, "random", size), **options)


def drawing(seed: int = 0, redraws: int = 0, size: int = 32, mask_of=None, **options) -> DrawViews:
    """Draws two views of 32 px without colour changes; ``size`` only says below which size an image is enlarged."""
    options = {"size": 32, "photometric": "none", **options}
    pipelines = photo_views("unused", **options).draw.views.transforms
    return DrawViews(MultiView(*pipelines), seed=seed, redraws=redraws, size=size, mask_of=mask_of)
