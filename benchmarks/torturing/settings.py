"""The grid of runs: processes, source, workers, accumulation; methods and colours take turns over it."""

from __future__ import annotations

import io
import itertools
import tarfile
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.io import encode_jpeg

METHODS = {
    "pixpro": (),
    "pixcontrast": (),
    "densecl": ("--method.queue=10",),
    "vicregl": ("--method.keep=[4,2]",),
    "pixpro_instance": ("--method.instance=contrast",),
    "slotcon": ("--method.prototypes=6", "--data.scale=[0.4,1.0]"),
}
# One method per cell of the grid. Heads with batch norm over whole images need two of them in each process.
ONE_EACH = (
    *("pixpro", "pixcontrast", "densecl", "vicregl"),  # one process: folder and shards, without and with accumulation
    *("pixpro_instance", "slotcon", "pixpro", "vicregl"),  # two
    *("densecl", "slotcon", "pixcontrast", "pixpro"),  # four
)
PHOTOS, SHARDS, BATCH, EPOCHS = 24, 8, 4, 2


class Setting(NamedTuple):
    """One cell of the grid."""

    processes: int
    source: str
    workers: int
    accumulate: int
    method: str
    photometric: str

    @property
    def batches(self) -> int:
        """Batches of the whole run."""
        return PHOTOS // BATCH * EPOCHS

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.batches // self.accumulate

    def arguments(self, photos: Path, out: Path) -> list[str]:
        """The command line of the run, after the program's name."""
        folder = photos if self.source == "folder" else f"{photos}/{{0..{SHARDS - 1}}}.tar"
        return [
            *("fit", "--backbone.name=resnet18", "--backbone.layer=layer1", "--method.hidden_dim=16", "--method.dim=8"),
            *METHODS[self.method],
            *(f"--data.folder={folder}", f"--data.images={PHOTOS}", "--data.size=32", f"--data.batch_size={BATCH}"),
            *(f"--data.workers={self.workers}", f"--data.photometric={self.photometric}", f"--out={out}"),
            *("--trainer.accelerator=cpu", f"--trainer.devices={self.processes}", f"--trainer.max_epochs={EPOCHS}"),
            *("--trainer.log_every_n_steps=1", f"--trainer.accumulate_grad_batches={self.accumulate}"),
            *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
            *("--save_every_n_steps=2", "--save_every_n_epochs=1", "--ckpt_path=auto"),
        ]

    def plain(self) -> Setting:
        """The setting whose uninterrupted run must end alike: a folder does not ask who reads it."""
        return self._replace(workers=0) if self.source == "folder" else self


def grid() -> list[Setting]:
    """All settings."""
    settings = []
    for number, (processes, source, accumulate) in enumerate(itertools.product((1, 2, 4), ("folder", "tar"), (1, 3))):
        photometric = "cpu" if number % 4 in (0, 3) else "device"
        for workers in (0, 1, 2):
            settings.append(Setting(processes, source, workers, accumulate, ONE_EACH[number], photometric))
    return settings


def write_photos(folder: Path) -> None:
    """Photos, each as a file and in one of the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard, PHOTOS, SHARDS):
                noise = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(number)) * 255
                pixels = torch.nn.functional.interpolate(noise, (36 + number % 5, 48), mode="bilinear")[0].byte()
                data = encode_jpeg(pixels).numpy().tobytes()
                (folder / f"{number:02}.jpg").write_bytes(data)
                entry = tarfile.TarInfo(f"{number:02}.jpg")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
