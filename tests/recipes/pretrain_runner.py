"""A small pretraining run as a program of its own, to be killed, continued, or run as several processes.

    python tests/recipes/pretrain_runner.py METHOD[,METHOD...] FOLDER OUT WORKERS EPOCHS STOP_AT SIGNAL [last]

Stops itself with SIGNAL after step STOP_AT (0: never); ``last`` continues from OUT's last.ckpt. Writes OUT/end.pt
(losses and parameters); of several methods, trained one after the other, OUT/METHOD/end.pt. METHOD=FOLDER reads another
folder than the others.
"""

import os
import signal
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn

from examples.pretrain import (
    densecl,
    ibot_cross_view,
    neco,
    paka,
    pixcontrast,
    pixcontrast_instance,
    pixcontrast_multicrop,
    pixpro,
    pixpro_instance,
    pixpro_video,
    vicregl,
)
from examples.pretrain.common.anchor import Anchored
from examples.pretrain.common.backbones import make_backbone
from examples.pretrain.common.checkpoint_files import WholeFiles
from examples.pretrain.common.data.options import photo_views
from examples.pretrain.common.last_checkpoint import LastCheckpoint
from examples.pretrain.common.processes import ending_together
from examples.pretrain.common.sharding import whole
from examples.pretrain.common.training import Pretraining

METHODS = {
    "pixpro": pixpro,
    "pixcontrast": pixcontrast,
    "pixcontrast_instance": pixcontrast_instance,
    "pixcontrast_multicrop": pixcontrast_multicrop,
    "pixpro_instance": pixpro_instance,
    "pixpro_video": pixpro_video,  # FOLDER holds frames and flow
    "densecl": densecl,
    "vicregl": vicregl,
    "anchored": pixcontrast,
    "paka": paka,
    "neco": neco,
    "ibot_cross_view": ibot_cross_view,
}
OPTIONS = {"pixpro_instance": {"instance": "contrast"}, "densecl": {"queue": 20}, "vicregl": {"keep": (4, 2)}}
OPTIONS |= {"paka": {"grid": 3}, "neco": {"grid": 2, "queue": 100}, "ibot_cross_view": {"prototypes": 12}}
VIT = ("test_vit", "norm", "random", 32)
TINY = {"hidden_dim": 32, "dim": 16}


def without_batch_statistics(module: nn.Module) -> None:
    """Group norm for batch norm: one process on a batch equals two on its halves only without batch statistics."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            module._modules[name] = nn.GroupNorm(4, child.num_features)
        else:
            without_batch_statistics(child)


class Stop(Callback):
    def __init__(self, at: int, number: int) -> None:
        self.at, self.number = at, number

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.at:
            os.kill(os.getpid(), self.number)


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        loss = trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")
        self.losses.append(float(loss))


def main(methods, folder, out, *rest) -> None:
    several = "," in methods
    with ending_together():
        for word in methods.split(","):
            method, _, own_folder = word.partition("=")
            place = Path(out, method) if several else Path(out)
            place.mkdir(exist_ok=True)
            train(method, own_folder or folder, place, *rest)


def train(method, folder, out, workers, epochs, stop_at, number, *resume) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    recipe = METHODS[method].recipe()
    backbone = VIT if method == "ibot_cross_view" else ("resnet18", "layer2", "random", 32)
    made = recipe.method(*make_backbone(*backbone), **TINY, **OPTIONS.get(method, {}))
    rate = {name: value for name, value in recipe.defaults.items() if name.startswith("optimizer.")}
    optimizer = recipe.optimizer(**{name.removeprefix("optimizer."): value for name, value in rate.items()})
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several or "groups" in resume:
        without_batch_statistics(made)
        if hasattr(made, "target"):
            made.target.requires_grad_(False)  # the new norms of the target too
    if method == "anchored":
        made = Anchored(made, anchor=2.0, koleo=0.3)
    module = Pretraining(made, optimizer, recipe.momentum or (0.0, 0.0))
    flow = {"flow": f"{folder}/flow", "scale": (0.4, 1.0)} if method == "pixpro_video" else {}
    folder = f"{folder}/frames" if flow else folder
    small = {"preset": "multicrop", "small": 2, "small_size": 16} if method == "pixcontrast_multicrop" else {}
    data = photo_views(folder, workers=int(workers), size=32, batch_size=8, photometric="cpu", seed=3, **flow, **small)
    losses = Losses()
    trainer = pl.Trainer(
        max_epochs=int(epochs),
        accelerator="cpu",
        devices=2 if several else 1,
        strategy=("fsdp2" if "fsdp2" in resume else "ddp") if several else "auto",
        logger=False,
        plugins=[WholeFiles()],
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            losses,
            LastCheckpoint(Path(out), 2),
            *([Stop(int(stop_at), getattr(signal, number))] if int(stop_at) else []),
        ],
    )
    trainer.fit(module, data, ckpt_path=str(Path(out) / "last.ckpt") if "last" in resume else None)
    state = {
        key: whole(value) if isinstance(value, torch.Tensor) else value for key, value in made.state_dict().items()
    }
    if trainer.is_global_zero:
        torch.save({"losses": losses.losses, "state": state}, Path(out) / "end.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
