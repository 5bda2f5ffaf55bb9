"""What watches a run of a recipe: the probe, and the report at its end."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from examples.pretrain.common.data.datamodule import PhotoViews
from examples.pretrain.common.data.finding import find_photos
from examples.pretrain.common.probe import DenseProbe, dense_probe
from examples.pretrain.common.report.callback import RunReport
from examples.pretrain.common.samples import labelled_pairs
from examples.pretrain.common.scores import Form


def add_probe_options(parser: ArgumentParser) -> None:
    """Adds ``--probe.*``."""
    parser.add_function_arguments(dense_probe, "probe", skip={"data", "form", "out"})


def form_of(config: Namespace) -> Form:
    """How the images of a run go into its network."""
    return Form(*(config.data[name] for name in Form._fields))


def check_folders(config: Namespace, data: PhotoViews) -> None:
    """Looks for the folders and files of a run, before weights are read or downloaded, which may take long.

    Raises:
        ValueError: If one is missing or does not hold what is expected; the message names its option.
    """
    photos, labels = config.probe.photos, config.probe.labels
    if photos is None:
        data.source.hold_out(config.probe.images)
    data.source.count(1, data.workers)
    if photos is not None:
        find_photos(photos, "probe.photos")
    if labels is not None:
        labelled_pairs(labels, "probe.labels")


def watching(config: Namespace, data: PhotoViews) -> tuple[DenseProbe, RunReport]:
    """The callbacks that watch a run of these options: the probe, and the report.

    Raises:
        ValueError: If an option of the probe does not fit.
    """
    form = form_of(config)
    probe = dense_probe(data, form, config.out, **config.probe)
    return probe, RunReport(config, data, form, probe)
