"""The command line of a recipe: ``python pixpro.py fit --config configs/pixpro_r50_100ep.yaml --data.folder FOLDER``.

The options have the chapters of a paper's appendix: backbone, method, optimizer, data, trainer.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
from jsonargparse import ArgumentParser, Namespace
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from examples.pretrain.common.anchor import Anchored
from examples.pretrain.common.backbones import make_backbone
from examples.pretrain.common.callbacks import keep_earlier_rows, standard_callbacks
from examples.pretrain.common.checkpoint_files import WholeFiles
from examples.pretrain.common.data.datamodule import PhotoViews
from examples.pretrain.common.data.options import photo_views
from examples.pretrain.common.optimizers import SquareRootLARS
from examples.pretrain.common.training import Pretraining

# What a recipe decides by itself, or has no use for.
NOT_OF_A_RECIPE = {
    *("logger", "callbacks", "default_root_dir", "use_distributed_sampler", "reload_dataloaders_every_n_epochs"),
    *("limit_val_batches", "limit_test_batches", "limit_predict_batches", "val_check_interval", "inference_mode"),
    *("check_val_every_n_epoch", "num_sanity_val_steps", "enable_checkpointing", "enable_autolog_hparams"),
    *("overfit_batches", "fast_dev_run", "barebones", "plugins", "model_registry", "max_time", "min_epochs"),
    *("min_steps", "profiler", "inputs_transform"),
}
# Options of masks, for methods that hand no validity on: cells without data would count.
WITHOUT_MASKS = ("data.nodata", "data.segments", "data.grid", "data.segment_scale")

# Weights of the terms of anchor.py.
ANCHOR_HELP = {
    "method.anchor": "Weight of a Gram anchor: the similarities between an image's cells stay those of the backbone as "
    "it was before the first step. 0, the default, leaves it out; DINOv3 has 2.",
    "method.koleo": "Weight of KoLeo, which keeps the images of a batch apart. 0, the default, leaves it out; "
    "DINOv2 has 0.1.",
}
# For methods whose backbone does not give one map of each view.
WITHOUT_ANCHOR = tuple(ANCHOR_HELP)


class Run(NamedTuple):
    """What the options make: the parts of a run."""

    config: Namespace
    module: Pretraining
    data: PhotoViews
    trainer: pl.Trainer

    @property
    def method(self) -> nn.Module:
        """The method that is trained."""
        return self.module.method

    def fit(self) -> None:
        """Trains, from the start or from ``ckpt_path``."""
        self.trainer.fit(self.module, self.data, ckpt_path=self.config.ckpt_path)


class Recipe(NamedTuple):
    """A method with what trains it.

    Attributes:
        method: Class of the method, a module that takes a backbone and the width of its map first.
        optimizer: Settings of its optimiser, see optimizers.py.
        backbone: Makes the backbone and gives the width of its map.
        momentum: Momentum of the target encoder at the start and at the end; None: the method has no target encoder.
        without: Options that the method has no use for, as ``data.nodata``.
        defaults: Defaults that differ from those of the parts.
        check: Looks at the options before anything is made, and raises ValueError where they do not fit the method.
    """

    method: type[nn.Module]
    optimizer: type = SquareRootLARS
    backbone: Callable[..., tuple[nn.Module, int]] = make_backbone
    momentum: tuple[float, float] | None = (0.99, 1.0)
    without: Sequence[str] = ()
    defaults: dict[str, Any] = {}  # noqa: RUF012  never written to
    check: Callable[[Namespace], None] | None = None

    def run(self) -> None:
        """Runs the command line of this process; errors of the user's end it with one line."""
        main(self, sys.argv[1:])


def fit_parser(recipe: Recipe) -> ArgumentParser:
    """The options of ``fit``, the recipe's own first."""

    def left_out(chapter: str) -> set[str]:
        return {name.split(".")[1] for name in recipe.without if name.startswith(f"{chapter}.")}

    parser = ArgumentParser(description="Trains the method on a folder of images.")
    parser.add_argument("--config", action="config", help="YAML file of options; later options win.")
    parser.add_class_arguments(recipe.method, "method", skip={"backbone", "width"} | left_out("method"))
    for name, text in ANCHOR_HELP.items():
        if name not in recipe.without:
            parser.add_argument(f"--{name}", type=float, default=0.0, help=text)
    parser.add_function_arguments(recipe.backbone, "backbone", skip={"size", "channels"} | left_out("backbone"))
    parser.add_class_arguments(recipe.optimizer, "optimizer", instantiate=False)
    if recipe.momentum is not None:
        parser.add_argument(
            "--momentum",
            type=tuple[float, float],
            default=recipe.momentum,
            help="Momentum of the target encoder at the start and at the end of the run; a cosine leads from one to "
            "the other.",
        )
    parser.add_function_arguments(photo_views, "data", skip={"seed"} | left_out("data"))
    parser.add_argument("--seed", type=int, default=0, help="Seed of the first weights and of everything drawn.")
    parser.add_argument("--compile", type=bool, default=False, help="Compile the encoders with torch.compile.")
    parser.add_argument("--out", type=str, default="runs/pretrain", help="Folder of the run.")
    parser.add_argument("--ckpt_path", type=str, default=None, help="Checkpoint to go on from; last: that of the run.")
    parser.add_argument("--save_every_n_epochs", type=int, default=10, help="Epochs between checkpoints that stay.")
    parser.add_argument("--save_every_n_steps", type=int, default=1000, help="Steps between writings of last.ckpt.")
    parser.add_class_arguments(pl.Trainer, "trainer", skip=NOT_OF_A_RECIPE, instantiate=False)
    parser.set_defaults(recipe.defaults)
    return parser


def make_run(recipe: Recipe, arguments: Sequence[str]) -> Run:
    """All parts of a run, from the options of ``fit``.

    Raises:
        ValueError: If an option does not fit.
    """
    config = fit_parser(recipe).parse_args(list(arguments))
    if recipe.check is not None:
        recipe.check(config)
    pl.seed_everything(config.seed, verbose=False)
    data = photo_views(**config.data, seed=config.seed)
    backbone, width = recipe.backbone(**config.backbone, size=config.data.size, channels=config.data.channels)
    options = dict(config.method)
    weights = {name: options.pop(name) for name in ("anchor", "koleo") if name in options}
    method = recipe.method(backbone, width, **options)
    if any(weights.values()):
        method = Anchored(method, **weights)
    optimizer = recipe.optimizer(**config.optimizer)
    momentum = config.momentum if recipe.momentum is not None else (0.0, 0.0)
    module = Pretraining(method, optimizer, tuple(momentum), config.compile)
    if config.ckpt_path == "auto":
        config.ckpt_path = "last" if (Path(config.out) / "checkpoints" / "last.ckpt").is_file() else None
    if config.ckpt_path == "last":
        config.ckpt_path = str(last_checkpoint(Path(config.out)))
    keep_earlier_rows(Path(config.out) / "metrics.csv")
    trainer = pl.Trainer(
        **config.trainer,
        logger=[logger(config.out, name="", version="") for logger in (CSVLogger, TensorBoardLogger)],
        plugins=[WholeFiles()],
        callbacks=standard_callbacks(config.out, config.save_every_n_epochs, config.save_every_n_steps),
    )
    return Run(config, module, data, trainer)


def last_checkpoint(out: Path) -> Path:
    """The checkpoint that a stopped run left behind.

    Raises:
        ValueError: If there is none.
    """
    path = out / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise ValueError(f"ckpt_path: expected {path} to continue from, found none; without --ckpt_path a run starts")
    return path


@rank_zero_only
def write_config(recipe: Recipe, run: Run) -> None:
    """Writes all options beside the run, as a file that ``--config`` takes."""
    out = Path(run.config.out)
    out.mkdir(parents=True, exist_ok=True)
    config = run.config.clone()
    config.pop("config", None)
    fit_parser(recipe).save(config, str(out / "config.yaml"), overwrite=True, skip_validation=True)


def main(recipe: Recipe, arguments: Sequence[str]) -> None:
    """Runs a command: ``fit`` and its options."""
    logging.basicConfig(level=logging.INFO)
    if list(arguments[:1]) != ["fit"]:
        if list(arguments[:1]) in (["-h"], ["--help"]):
            fit_parser(recipe).print_help()
            raise SystemExit(0)
        raise SystemExit(f"error: expected the command fit, got {' '.join(arguments[:1]) or 'none'}")
    try:
        made = make_run(recipe, arguments[1:])
        write_config(recipe, made)
        made.fit()
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
