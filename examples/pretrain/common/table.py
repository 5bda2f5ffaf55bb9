"""The table of what is logged, metrics.csv: a row for every logged step."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only


class Table(CSVLogger):
    """Lightning's table, with all that is logged of a step in one row: learning rates beside the loss.

    Args:
        folder: Folder of the run; the table is its ``metrics.csv``.
    """

    def __init__(self, folder: str) -> None:
        # Lightning saves after each step's metrics; saved in between, the rates would get a row of their own.
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=2**62)

    @rank_zero_only
    def save(self) -> None:
        rows: dict[int, dict[str, Any]] = {}
        for row in self.experiment.metrics:
            rows.setdefault(row["step"], {}).update(row)
        self.experiment.metrics = list(rows.values())
        super().save()
