"""The command line of a recipe: ``python pixpro.py fit --config configs/pixpro_r50_100ep.yaml --data.folder FOLDER``.

The options have the chapters of a paper's appendix: backbone, method, optimizer, data, trainer. ``preview`` in place of
``fit`` shows what such a run would see and cost.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
from jsonargparse import ArgumentParser, Namespace
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from examples.pretrain.common import run_folder
from examples.pretrain.common.anchor import WEIGHTS, Anchored
from examples.pretrain.common.backbones import make_backbone
from examples.pretrain.common.bar import RunBar, speak_plainly
from examples.pretrain.common.callbacks import standard_callbacks
from examples.pretrain.common.checkpoint_files import WholeFiles
from examples.pretrain.common.checks import check_options, named
from examples.pretrain.common.data.datamodule import PhotoViews
from examples.pretrain.common.data.label_masks import mask_warning
from examples.pretrain.common.data.options import photo_views
from examples.pretrain.common.data.sources import FolderSource
from examples.pretrain.common.extension import Extension
from examples.pretrain.common.identity import Identity, budget_of, check_same, identity_of, read_identity
from examples.pretrain.common.known_as import known_as
from examples.pretrain.common.method_parts import check_method
from examples.pretrain.common.optimizers import SquareRootLARS
from examples.pretrain.common.parsing import add_run_options, correct_trainer_texts, parse, settings_of, without_small
from examples.pretrain.common.processes import ending_together
from examples.pretrain.common.start import check_start
from examples.pretrain.common.table import Table
from examples.pretrain.common.training import Pretraining
from examples.pretrain.common.watch import add_probe_options, check_folders, watching

log = logging.getLogger(__name__)

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

# For methods whose backbone does not give one map of each view.
WITHOUT_ANCHOR = tuple(WEIGHTS)


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
        if self.config.overwrite:
            self.data.source.count(1, self.data.workers)  # nothing is deleted for a run that cannot begin
            run_folder.clear(self.config.out)
        source = self.data.source
        masks = mask_warning(source.paths(), "data.folder") if isinstance(source, FolderSource) else None
        if masks is not None and self.trainer.is_global_zero:
            log.warning("%s", masks)
        out, start = self.config.out, self.config.ckpt_path
        with named("method", self.config.method), run_folder.watched(out), run_folder.freed(out, start, self.trainer):
            self.trainer.fit(self.module, self.data, ckpt_path=start)


class Recipe(NamedTuple):
    """A method with what trains it.

    Attributes:
        method: Class of the method, a module that takes a backbone and the width of its map first. Its attribute
            ``in_words``, where it has one, names it in logs and reports.
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
        speak_plainly()
        with ending_together():
            main(self, sys.argv[1:])


def fit_parser(recipe: Recipe) -> ArgumentParser:
    """The options of ``fit``, the recipe's own first."""

    def left_out(chapter: str) -> set[str]:
        return {name.split(".")[1] for name in recipe.without if name.startswith(f"{chapter}.")}

    about = (
        f"Pretrains a backbone by {known_as(recipe.method)}, on a folder of images without labels. Begin with "
        "--config, --data.folder, --out and --backbone.init. With 'preview' in place of 'fit' the same options show "
        "what the run would do."
    )
    program = f"{Path(sys.argv[0]).name} fit"
    parser = ArgumentParser(prog=program, description=about, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of options. Options after it win.")
    parser.add_class_arguments(recipe.method, "method", skip={"backbone", "width"} | left_out("method"))
    for name, text in WEIGHTS.items():
        if name not in recipe.without:
            parser.add_argument(f"--{name}", type=float, default=0.0, help=text)
    sizes = {"size", "channels", "small_size"}
    parser.add_function_arguments(recipe.backbone, "backbone", skip=sizes | left_out("backbone"))
    parser.add_class_arguments(recipe.optimizer, "optimizer", instantiate=False)
    if recipe.momentum is not None:
        parser.add_argument(
            "--momentum",
            type=tuple[float, float],
            default=recipe.momentum,
            help="Momentum of the target encoder at the start and at the end of the run, each in 0..1; it follows a "
            "cosine between them.",
        )
    parser.add_function_arguments(photo_views, "data", skip={"seed"} | without_small(recipe.method) | left_out("data"))
    add_probe_options(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed of the random weights and of all random choices, in 0..4294967295."
    )
    parser.add_argument(
        "--compile", type=bool, default=False, help="Whether the encoders are compiled by torch.compile."
    )
    add_run_options(parser)
    parser.add_class_arguments(pl.Trainer, "trainer", skip=NOT_OF_A_RECIPE, instantiate=False)
    correct_trainer_texts(parser)
    parser.set_defaults({"trainer.log_every_n_steps": 10, "trainer.enable_model_summary": False, **recipe.defaults})
    return parser


def make_run(recipe: Recipe, arguments: Sequence[str]) -> Run:
    """All parts of a run, from the options of ``fit``.

    Raises:
        ValueError: If an option does not fit.
    """
    parser = fit_parser(recipe)
    config = parse(parser, arguments)
    if recipe.check is not None:
        recipe.check(config)
    check_options(config)
    name = recipe.method.__name__
    start = run_folder.checkpoint_of(config.ckpt_path, config.out, name.lower())
    identity, found = identity_of(name, config), None
    if start is not None:
        found = read_identity(start)
        check_same(found, identity, config.extend_to, start)
    elif config.extend_to is not None:
        raise ValueError("extend_to: expected with --ckpt_path, the run to train on; a new run has trainer.max_epochs")
    run_folder.check_place(config.out, start, config.ckpt_path, config.overwrite)
    module, data = parts_of(recipe, config, begins=start is None)
    config.out = run_folder.new_folder(name.lower()) if config.out is None else config.out
    run_folder.prepare(config.out)
    settings = parser.dump(settings_of(config, budget_of(identity)), skip_validation=True)
    config.ckpt_path = None if start is None else str(start)
    probe, report = watching(config, data)
    bar = RunBar(scores=lambda: probe.latest)
    callbacks = [
        *standard_callbacks(config.out, config.save_every_n_epochs, config.save_every_n_steps),
        Identity(identity, config.data.folder, found),
        run_folder.Settings(config.out, settings, known_as(recipe.method)),
        *([Extension(found["step"])] if found is not None and budget_of(found) != budget_of(identity) else []),
        probe,
        *([] if config.trainer.enable_progress_bar is False else [bar]),  # after the probe, whose scores it shows
        report,  # last, because it tells of what the others have written
    ]
    loggers = [Table(config.out), TensorBoardLogger(config.out, name="", version="")]
    options = {**config.trainer, **{key.removeprefix("trainer."): n for key, n in budget_of(identity).items()}}
    try:
        trainer = pl.Trainer(**options, logger=loggers, plugins=[WholeFiles()], callbacks=callbacks)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ValueError(f"trainer: {error}") from error
    return Run(config, module, data, trainer)


def parts_of(recipe: Recipe, config: Namespace, begins: bool) -> tuple[Pretraining, PhotoViews]:
    """What trains, and on what.

    Args:
        recipe: The recipe.
        config: All options.
        begins: Whether the run begins; otherwise a checkpoint brings all weights, and ``backbone.init`` is not read.
    """
    pl.seed_everything(config.seed, verbose=False)
    data = photo_views(**config.data, seed=config.seed)
    check_folders(config, data)
    start = {**config.backbone, "init": config.backbone.init if begins else "random"}
    if config.data.get("small"):
        start["small_size"] = config.data.small_size
    with named("backbone", config.backbone):
        backbone, width = recipe.backbone(**start, size=config.data.size, channels=config.data.channels)
    options = dict(config.method)
    weights = {name: options.pop(name) for name in ("anchor", "koleo") if name in options}
    with named("method", config.method):
        method = recipe.method(backbone, width, **options)
    check_method(method, backbone)
    if any(weights.values()):
        method = Anchored(method, **weights)
    optimizer = recipe.optimizer(**config.optimizer)
    if begins:
        check_start(config.backbone, backbone, optimizer)
    momentum = config.momentum if recipe.momentum is not None else (0.0, 0.0)
    return Pretraining(method, optimizer, tuple(momentum), config.compile), data


def run_fit(recipe: Recipe, arguments: Sequence[str]) -> None:
    """Runs the command ``fit``."""
    made = make_run(recipe, arguments)
    if list(arguments) == sys.argv[2:]:  # Lightning repeats it for the processes that it starts
        sys.argv += ["--out", made.config.out]
    made.fit()


def run_preview(recipe: Recipe, arguments: Sequence[str]) -> None:
    """Runs the command ``preview``."""
    from examples.pretrain.common.preview.command import preview  # it needs the parts that are made here

    preview(recipe, arguments)


COMMANDS = {"fit": run_fit, "preview": run_preview}


def main(recipe: Recipe, arguments: Sequence[str]) -> None:
    """Runs a command, ``fit`` or ``preview``, with the options of ``fit``."""
    command = " ".join(arguments[:1])
    if command in ("-h", "--help"):
        fit_parser(recipe).print_help()
        raise SystemExit(0)
    if command not in COMMANDS:
        raise SystemExit(f"error: expected the command {' or '.join(COMMANDS)}, got {command or 'none'}")
    try:
        COMMANDS[command](recipe, arguments[1:])
    except (ValueError, RuntimeError, OSError, MisconfigurationException) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from error
    except ImportError as error:
        if "pip install" not in str(error):
            raise
        raise SystemExit(f"error: {error}") from error
