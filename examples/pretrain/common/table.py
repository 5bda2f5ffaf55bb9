"""The table of what is logged, metrics.csv: a row for every logged step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.loggers.logger import rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only


class Table(CSVLogger):
    """Lightning's table, with all that is logged of a step in one row: learning rates beside the loss.

    Args:
        folder: Folder of the run; the table is its ``metrics.csv``.
    """

    def __init__(self, folder: str) -> None:
        # Lightning saves after each step's metrics; saved in between, the rates would get a row of their own.
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=2**62)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            _keep_earlier_rows(Path(self.log_dir, "metrics.csv"))
        return super().experiment

    @rank_zero_only
    def save(self) -> None:
        rows: dict[int, dict[str, Any]] = {}
        for row in self.experiment.metrics:
            rows.setdefault(row["step"], {}).update(row)
        self.experiment.metrics = list(rows.values())
        super().save()


def _keep_earlier_rows(path: Path) -> None:
    """A continued run starts a metrics.csv of its own; Lightning would delete the one that is there."""
    if path.exists():
        number = 1 + sum(1 for _ in path.parent.glob("metrics-*.csv"))
        path.rename(path.with_name(f"metrics-{number}.csv"))
