"""What watches a run of a recipe: the probe, and the report at its end."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace
from pytorch_lightning.callbacks import Callback

from examples.pretrain.common.data.datamodule import PhotoViews
from examples.pretrain.common.probe import dense_probe
from examples.pretrain.common.report.callback import RunReport
from examples.pretrain.common.scores import Form


def add_probe_options(parser: ArgumentParser) -> None:
    """Adds ``--probe.*``."""
    parser.add_function_arguments(dense_probe, "probe", skip={"data", "form", "out"})


def form_of(config: Namespace) -> Form:
    """How the images of a run go into its network."""
    return Form(*(config.data[name] for name in Form._fields))


def watching(config: Namespace, data: PhotoViews) -> list[Callback]:
    """The callbacks that watch a run of these options.

    Raises:
        ValueError: If an option of the probe does not fit.
    """
    form = form_of(config)
    probe = dense_probe(data, form, config.out, **config.probe)
    return [probe, RunReport(config, data, form, probe)]
