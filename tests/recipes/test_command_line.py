"""The command line of the recipes: wrong ones end with one line that names the option."""

import pickle
import re
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torchvision.io import write_png

from examples.pretrain import adapt, densecl, pixpro, pixpro_instance, slotcon, vicregl
from examples.pretrain.common.cli import fit_parser, main
from examples.pretrain.common.data.shard_lists import is_shards
from examples.pretrain.common.parsing import TRAINER

TINY = ["--backbone.name=resnet18", "--backbone.layer=layer2", "--data.size=32", "--data.batch_size=2",
        "--data.workers=0", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with four photos and files that are no checkpoints."""
    root = tmp_path_factory.mktemp("place")
    (root / "photos").mkdir()
    for index in range(4):
        write_png(torch.randint(0, 256, (3, 40, 48), dtype=torch.uint8), str(root / "photos" / f"{index}.png"))
    (root / "empty").mkdir()
    (root / "text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {"conv1.weight": torch.zeros(2)}}, root / "foreign.ckpt")
    (root / "unsafe.ckpt").write_bytes(pickle.dumps(Path("x")))
    (root / "list.txt").write_text("photos/0.png\ngone.jpg\n")
    (root / "list.csv").write_text("photos/0.png\n")
    (root / "bytes.txt").write_bytes(bytes(range(128, 256)))
    (root / "bad.yaml").write_text("data: [1, {")
    (root / "group.yaml").write_text("optimizer:\n  lrr: 3\n")
    (root / "top.yaml").write_text("save_every_n_epoch: 3\n")
    (root / "hyphen.yaml").write_text("data:\n  batch-size: 3\n")
    (root / "hyphens.yaml").write_text("save-every-n-epochs: 3\n")
    (root / "unknown.yaml").write_text("data:\n  foldr: x\n")
    return root


def error_of(recipe, place: Path, out: Path, *args: str) -> str:
    budget = [] if any("max_epochs" in arg or "max_steps" in arg for arg in args) else ["--trainer.max_steps=2"]
    given = [*TINY, "--data.folder", str(place / "photos"), "--out", str(out), *budget]
    with pytest.raises(SystemExit) as ended:
        main(recipe, ["fit", *given, *(arg.replace("PLACE", str(place)) for arg in args)])
    assert isinstance(ended.value.code, str), ended.value.code
    return ended.value.code


WRONG = {
    "--data.redraws=-1": "data.redraws: expected at least 0, got -1",
    "--data.size=0": "data.size: expected at least 1, got 0",
    "--data.size=32.5": "data.size: expected a whole number, got 32.5",
    "--data.scale=[1,.2]": "data.scale: expected shares of the image's area, .* got \\[1.0, 0.2\\]",
    "--data.scale=[0.2,2.0]": "data.scale: expected shares of the image's area, .* got \\[0.2, 2.0\\]",
    "--data.scale=[0,1]": "data.scale: .*got",
    "--data.scale=0.5": "data.scale: expected a list of 2 numbers.*got 0.5",
    "--data.scale=[.1,.5,1]": "data.scale: expected a list of 2 numbers.*got",
    "--seed=-1": "seed: expected a number in 0..4294967295, got -1",
    "--seed=99999999999": "seed: expected a number in 0..4294967295",
    "--optimizer.warmup=5": "optimizer.warmup: expected a share of the steps in 0..1, got 5",
    "--data.max_unreadable=5": "data.max_unreadable: expected a share in 0..1, got 5",
    "--data.max_unreadable=-1": "data.max_unreadable: expected a share in 0..1, got -1",
    "--data.batch_size=-8": "data.batch_size: expected at least 1, got -8",
    "--data.workers=-1": "data.workers: expected at least 0, got -1",
    "--data.channels=0": "data.channels: expected at least 1, got 0",
    "--data.std=[0,1,1]": "data.std: expected positive numbers",
    "--data.images=0": "data.images: expected at least 1, got 0",
    "--data.fold=x": "--data.fold: there is no such option; did you mean --data.folder",
    "--method.thresh=0.5": "--method.thresh: there is no such option; did you mean --method.threshold",
    "--data.batch-size=3": "--data.batch-size: there is no such option; did you mean --data.batch_size",
    "--foo=1": "--foo: there is no such option",
    "--data.preset=foo": "data.preset: expected byol, mocov2, simclr, multichannel, multicrop, got foo",
    "--data.folder=PLACE/photos.tar.d/train": "data.folder: expected a folder, got .*tar.d/train, which is missing",
    "--data.folder=PLACE/shards.tar": "data.images: expected the number of images in all shards",
    "--ckpt_path=PLACE/none.ckpt": "ckpt_path: expected a checkpoint .*none.ckpt: there is no such file",
    "--ckpt_path=last": "ckpt_path: expected a checkpoint .*last.ckpt: there is no such file",
    "--ckpt_path=PLACE/empty": "ckpt_path: expected a checkpoint .*empty: it is a folder",
    "--ckpt_path=PLACE/text.ckpt": "ckpt_path: expected a checkpoint of a run, got .*text.ckpt, which is none or",
    "--ckpt_path=PLACE/unsafe.ckpt": "ckpt_path: .*unsafe.ckpt, which is none or is damaged",
    "--ckpt_path=PLACE/foreign.ckpt": "ckpt_path: .*foreign.ckpt, which holds no settings .*--backbone.init",
    "--extend_to=5": "extend_to: expected with --ckpt_path",
    "--extend_to=-5": "extend_to: expected at least 1, got -5",
    "--out=/proc/run": "out: expected a folder that can be written to, got /proc/run",
    "--out=PLACE/text.ckpt": "out: expected a folder that can be written to, got .*text.ckpt",
    "--overwrite=true": "overwrite: expected no value, --overwrite alone, got 'true'",
    "--data.folder=PLACE/none.txt": "data.folder: expected a folder, got .*none.txt, which is missing",
    "--data.folder=PLACE/list.txt": "data.folder: .*list.txt names .*gone.jpg, where there is no file",
    "--data.folder=PLACE/bytes.txt": "data.folder: .*bytes.txt names .*, where there is no file",
    "--data.folder=PLACE/list.csv": "data.folder: expected a folder, got .*list.csv, which is a file, and no \\*.txt",
    "--data.reduced=7": "data.reduced: expected true or false, got 7",
    "--probe.images=abc": "probe.images: expected a whole number or null, got abc",
    "--probe.score=foo": "probe.score: expected pck, pck_colour, neighbors, linear, got foo",
    "--probe.photos=PLACE/empty": "probe.photos: expected images .* found none",
    "--probe.labels=PLACE/photos": "probe.labels: expected the folders images and masks",
    "--out=": "out: expected the name of a folder, got none",
    "--config=PLACE/none.yaml": "config: .*none.yaml",
    "--config=PLACE/bad.yaml": "parsing config",
    "--config=PLACE/unknown.yaml": "data.foldr: this recipe has no such option; did you mean data.folder",
    "--config=examples/pretrain/configs/own_images.yaml": "method.temperature: .* no such option; --help",
    "--config=PLACE/group.yaml": "optimizer.lrr: this recipe has no such option; --help",
    "--config=PLACE/top.yaml": "save_every_n_epoch: this recipe has no such option; did you mean save_every_n_epochs",
    "--config=PLACE/hyphen.yaml": "data.batch-size: this recipe has no such option; did you mean data.batch_size",
    "--config=PLACE/hyphens.yaml": "save-every-n-epochs: .* no such option; did you mean save_every_n_epochs",
    "--trainer.max_steps=0": "trainer: expected a budget",
    "--trainer.max_epochs=0": "trainer: expected a budget",
    "--trainer.devices=0": "trainer: .*devices",
    "--trainer.devices=-3": "trainer: .*devices",
    "--trainer.accelerator=foo": "trainer: .*foo",
    "--trainer.precision=7": "trainer.precision: expected .*16-mixed.*, got 7",
    "--trainer.strategy=foo": "trainer: .*foo",
    "--trainer.log_every_n_steps=0": "trainer.log_every_n_steps: expected at least 1, got 0",
    "--trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches: expected at least 1",
    "--trainer.limit_train_batches=2.0": "trainer.limit_train_batches: .*got 2.0",
    "--trainer.gradient_clip_algorithm=foo": "trainer: .*foo",
    "--save_every_n_steps=0": "save_every_n_steps: expected at least 1, got 0",
    "--momentum=[0.9,2.0]": "momentum: expected two numbers in 0..1, got \\[0.9, 2.0\\]",
    "--backbone.layer=layer9": "backbone.layer: .*layer9",
    "--backbone.init=PLACE/none": "backbone.init: there is no file",
    "--method.threshold=-1": "method.threshold: expected a positive number",
    "--method.hidden_dim=0": "method.hidden_dim: expected at least 1, got 0",
    "--optimizer.weight_decay=-1": "optimizer.weight_decay: expected a number of at least 0, got -1",
}


@pytest.mark.parametrize("argument", WRONG)
def test_a_wrong_command_line_ends_with_one_line(argument, place, tmp_path):
    error = error_of(pixpro.recipe(), place, tmp_path / "run", argument)
    assert "\n" not in error
    with pytest.raises(ValueError, match=f"^error: .*{WRONG[argument]}"):
        raise ValueError(error)
    assert not list((tmp_path / "run").glob("**/*.ckpt"))
    assert not (tmp_path / "run" / "config.yaml").exists()  # the folder is free for the next attempt


@pytest.mark.parametrize(
    ("module", "argument", "message"),
    [
        (densecl, "--method.queue=0", "error: method.queue: expected at least 1, got 0"),
        (densecl, "--data.nodata=0", "error: --data.nodata: there is no such option"),
        (densecl, "--method.temperature=0", "error: method.temperature: expected a positive number, got 0"),
        (slotcon, "--method.prototypes=0", "error: method.prototypes: expected at least 1, got 0"),
        (vicregl, "--method.alpha=2", "error: method.alpha: expected a number in 0..1, got 2.0"),
        (pixpro_instance, "--method.instance=foo", "error: method.instance: expected consistency, contrast, got foo"),
        (pixpro_instance, "--method.alpha=-1", "error: method.alpha: expected at least 0, got -1"),
    ],
)
def test_options_of_other_methods_are_named_whole(module, argument, message, place, tmp_path):
    assert error_of(module.recipe(), place, tmp_path, argument).startswith(message)


def no_network(*args, **options):
    raise URLError(OSError(-2, "Name or service not known"))


@pytest.mark.parametrize(
    ("name", "layer", "downloads", "file"),
    [
        ("resnet18", "layer2", "torch.hub.download_url_to_file", r"resnet18-\w+.pth and belongs in HOME/\S+.pth"),
        ("resnet10t", "layer2", "timm.models._builder.load_state_dict_from_hf", "model.safetensors of timm/resnet10t"),
    ],
)
def test_weights_that_cannot_be_downloaded(name, layer, downloads, file, place, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(downloads, no_network)
    named = ["--backbone.init=imagenet", f"--backbone.name={name}", f"--backbone.layer={layer}"]
    error = error_of(pixpro.recipe(), place, tmp_path / "run", *named)
    expected = (
        rf"error: backbone.init: the weights of {name} cannot be downloaded \(.*Name or service not known.*\)\. "
        rf"The file is \S*{file.replace('HOME', str(tmp_path))}\S*.* Otherwise begin from a file of weights with "
        "--backbone.init FILE, or from none with --backbone.init random"
    )
    assert re.fullmatch(expected, error), error
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_vanishes_ends_the_run_with_one_line(place, tmp_path, monkeypatch):
    def gone(*args, **kwargs):
        (tmp_path / "run").rmdir()
        raise FileNotFoundError(2, "No such file or directory", str(tmp_path / "run" / "metrics.csv"))

    monkeypatch.setattr("pytorch_lightning.Trainer.fit", gone)
    error = error_of(pixpro.recipe(), place, tmp_path / "run")
    assert error.startswith("error: out: the folder of the run, ")
    assert "can no longer be written to" in error


@pytest.mark.parametrize(
    ("folder", "shards"),
    [
        ("shards/{000..099}.tar", True),
        ("shards/{train-{0..9}.tar,val.tar}", True),
        ("shards/*.tar.gz", True),
        ("http://host/shard-{0..9}.tar?token=1", True),
        ("pipe:cat x", True),
        ("photos.tar.d/train", False),
        ("backup.tar/photos", False),
        ("photos", False),
    ],
)
def test_shards_are_told_by_the_end_of_the_name(folder, shards):
    assert is_shards(folder) == shards


def test_the_help_tells_the_defaults_of_the_recipe_alone():
    parser = fit_parser(adapt.recipe())
    texts = {action.dest: action.help or "" for action in parser._actions if action.dest.startswith("trainer.")}
    assert "trainer.precision" in texts
    assert not [name for name, text in texts.items() if "Default:" in text]
    assert set(TRAINER) <= set(texts)
    assert parser.prog.endswith(" fit")
