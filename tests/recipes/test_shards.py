"""Tar shards as the source of the pretraining recipes."""

import io
import logging
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from torchvision.io import encode_jpeg

pytest.importorskip("webdataset")

from making import TINY, cli, drawing

from examples.pretrain.common.data.shard_lists import find_shards, is_shards
from examples.pretrain.common.data.shard_loader import ShardLoader
from examples.pretrain.pixpro import PixPro

SHARDS, EACH = 4, 10


def jpeg(index: int) -> bytes:
    """A photo that is told by its height: rows 40 + index."""
    noise = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(index)) * 255
    pixels = torch.nn.functional.interpolate(noise, (40 + index, 64), mode="bilinear")[0].byte()
    return encode_jpeg(pixels).numpy().tobytes()


def write_shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def photos_of(shard: int, count: int = EACH) -> dict[str, bytes]:
    numbers = range(shard * EACH, shard * EACH + count)
    return {f"class/{number:03}.v2.{end}": jpeg(number) if end == "JPEG" else b"7" for number in numbers
            for end in ("JPEG", "cls")} | {"class/._000.jpg": b"rubbish"}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Forty photos, with labels, in four shards."""
    root = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        write_shard(root / f"{shard:03}.tar", photos_of(shard))
    return root


def loader(folder: Path, mask_of=None, **options) -> ShardLoader:
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    given = {"images": 40, "channels": 3, "batch_size": 5, "rank": 0, "world_size": 1, "workers": 0, **options}
    return ShardLoader(shards, drawing(mask_of=mask_of), **given)


def photos_in(batches) -> list[int]:
    return [int(rows) - 40 for batch in batches for rows in batch.view1.source_size[:, 0]]


def views_by_photo(batches) -> dict[int, torch.Tensor]:
    views = {}
    for batch in batches:
        for number, *images in zip(photos_in([batch]), batch.view1.image, batch.view2.image, strict=True):
            views[number] = torch.stack(images)
    return views


def test_every_photo_once_an_epoch_over_all_processes(folder):
    loaders = [loader(folder, rank=rank, world_size=2) for rank in range(2)]
    epochs = []
    for _ in range(2):
        read = [photos_in(each) for each in loaders]
        assert [len(numbers) for numbers in read] == [20, 20]
        assert sorted(read[0] + read[1]) == list(range(40))
        epochs.append(read)
    assert epochs[0] != epochs[1]
    assert [each.epoch for each in loaders] == [1, 1]
    in_order = sorted(epochs[0][0][:10])
    assert epochs[0][0][:10] != in_order  # mixed within the shard
    assert len({number // EACH for number in in_order}) == 1


def test_workers_and_processes_change_no_view(folder):
    """Three workers share four shards; batches of 7 are put together from what workers have over."""
    one = loader(folder)
    several = loader(folder, workers=3, batch_size=7)
    for _ in range(2):
        expected, got = views_by_photo(one), views_by_photo(several)
        assert len(expected) == 40
        assert len(got) == 35 == 7 * len(several)
        assert all(torch.equal(expected[number], views) for number, views in got.items())
    assert not torch.equal(*(views_by_photo(one)[0] for _ in range(2)))
    several = loader(folder, workers=2, rank=1, world_size=2)
    assert all(torch.equal(views_by_photo(loader(folder))[n], v) for n, v in views_by_photo(several).items())
    view1, view2 = views_by_photo(loader(folder))[0]
    assert not torch.equal(view1, view2)


def test_masks_come_with_the_views(folder):
    """A mask that is one channel of the photo; batches of 7 are put together from what workers have over."""
    for batch in loader(folder, workers=3, batch_size=7, mask_of=lambda image: image[1]):
        for view in batch[:2]:
            assert view.mask.shape == (7, 32, 32)
            assert (view.mask.float() - view.image[:, 1].float()).abs().mean() < 12  # 60 and more for another channel


def test_another_number_of_workers_resumes_at_shard_boundaries(folder):
    whole = loader(folder)
    expected = photos_in(whole)
    stopped = loader(folder)
    batches = iter(stopped)
    for stop, finished in ((1, 0), (2, 1), (3, 1), (4, 2)):  # a shard is two batches
        next(batches)
        state = stopped.state_dict()
        assert state["batch"] == stop
        assert sum(state["finished"]) == finished
        again = loader(folder, workers=2)
        again.load_state_dict(state)
        read = photos_in(again)
        assert len(read) == 40 - 5 * stop
        rest = expected[10 * finished :]  # the shard that was begun from its start
        if stop == 4:
            assert sorted(read) == sorted(rest)
        assert set(read) <= set(rest)
        assert sorted(photos_in(again)) == list(range(40))  # the next epoch is whole
    state["finished"].append(False)
    with pytest.raises(ValueError, match="expected the 5 shards of the checkpoint, got 4"):
        loader(folder).load_state_dict(state)


@pytest.mark.parametrize(("workers", "size", "ends"), [(0, 3, 0), (1, 7, 0), (2, 3, 5), (2, 7, 4), (3, 4, 3)])
def test_goes_on_with_the_very_batches(workers, size, ends, tmp_path):
    """Shards of differing lengths, so that workers run dry one by one, and rows are over and put together; a photo
    that cannot be read; twice as many images promised as there are, so that the shards are started again."""
    for shard, count in enumerate((10, 3, 7, 5)):
        files = photos_of(shard, count)
        write_shard(tmp_path / f"{shard}.tar", {**files, "broken.jpg": b"rubbish"} if shard % 2 else files)
    options = {"workers": workers, "batch_size": size, "images": 50}
    whole = loader(tmp_path, **options)
    expected = [photos_in([batch]) for _ in range(2) for batch in whole]
    stops = range(1, len(expected), 2) if workers == 0 else range(1 + ends, len(expected), 8)
    for stop in stops:
        stopped, read = loader(tmp_path, **options), []
        while len(read) < stop:
            for batch in stopped:
                read.append(photos_in([batch]))
                if len(read) == stop:
                    break
        again = loader(tmp_path, **options)
        again.load_state_dict(stopped.state_dict())
        first = photos_in([next(batches := iter(again))])
        second = again.state_dict()  # and stopped once more
        del batches
        assert first == expected[stop]
        last = loader(tmp_path, **options)
        last.load_state_dict(second)
        read = [*read, first]
        while len(read) < len(expected):
            read += [photos_in([batch]) for batch in last]
        assert read == expected, stop


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_photos_are_named_counted_and_left_out(workers, tmp_path, capfd):
    logging.getLogger().addHandler(handler := logging.StreamHandler())  # the workers' log is on their stderr
    write_shard(tmp_path / "0.tar", {**photos_of(0, 5), "cut.jpg": jpeg(0)[: len(jpeg(0)) // 2], "empty.jpg": b""})
    damaged = write_shard(tmp_path / "1.tar", {**photos_of(1, 5), "long.jpg": bytes(100_000)})
    damaged.write_bytes(damaged.read_bytes()[:-50_000])
    try:
        batches = list(loader(tmp_path, images=10, workers=workers))
    finally:
        logging.getLogger().removeHandler(handler)
    assert sum(int(batch.unreadable.sum()) for batch in batches) == 3
    assert sorted(photos_in(batches)) == [*range(5), *range(10, 15)]
    text = capfd.readouterr().err
    assert f"{tmp_path}/0.tar/cut.jpg: unreadable, left out" in text
    assert "empty.jpg" in text
    assert f"{damaged}: unreadable, left out: the shard ends early" in text


def test_a_process_with_too_few_photos_starts_its_shards_again(tmp_path, caplog):
    for shard, count in enumerate((10, 4)):
        write_shard(tmp_path / f"{shard}.tar", photos_of(shard, count))
    with caplog.at_level(logging.WARNING):
        counts = [Counter(photos_in(loader(tmp_path, images=14, batch_size=3, world_size=2, rank=r))) for r in (0, 1)]
    assert [sum(count.values()) for count in counts] == [6, 6]
    small = next(count for count in counts if min(count) >= EACH)
    assert set(small.values()) == {1, 2}
    assert caplog.text.count("has read all its shards after 1 of 2 batches") == 1


def test_shards_without_a_readable_photo(tmp_path):
    write_shard(tmp_path / "0.tar", {"a.jpg": b"rubbish", "b.txt": b""})
    with pytest.raises(ValueError, match=r"data.folder: expected photos in the tar shards, found none"):
        next(iter(loader(tmp_path)))


# --- from the command line --------------------------------------------------------------------------------------------


def fit(source: str, out: Path, *args: str):
    made = cli(
        PixPro, *TINY, "--data.folder", source, "--data.size=32", "--data.batch_size=8", "--data.workers=0", "--out",
        str(out), "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false", "--trainer.max_epochs=1", *args)  # fmt: skip
    made.fit()
    return made


@pytest.mark.parametrize(
    "source", ["{folder}/{{000..003}}.tar", "{folder}/*.tar", "pipe:cat {folder}/{{000..003}}.tar"]
)
def test_a_recipe_trains(source, folder, tmp_path):
    made = fit(source.format(folder=folder), tmp_path, "--data.images=40", "--trainer.log_every_n_steps=1")
    assert made.trainer.global_step == 5
    assert torch.isfinite(made.trainer.callback_metrics["loss"])


def test_a_checkpoint_holds_the_finished_shards(folder, tmp_path):
    source, size = f"{folder}/{{000..003}}.tar", ["--data.images=40", "--data.batch_size=5"]
    size += ["--trainer.max_epochs=-1", "--trainer.max_steps=4"]
    fit(source, tmp_path, *size, "--save_every_n_steps=4")
    path = tmp_path / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
    assert (state["epoch"], state["batch"], sum(state["finished"])) == (0, 4, 2)
    made = fit(source, tmp_path / "again", *size, f"--ckpt_path={path}", "--extend_to=8")
    assert made.trainer.global_step == 8
    end = made.trainer.fit_loop._combined_loader.flattened[0].state_dict()
    assert (end["epoch"], end["batch"], end["finished"]) == (0, 8, [True] * 4)


@pytest.mark.parametrize(
    ("source", "args", "message"),
    [
        ("{folder}/{{000..003}}.tar", [], r"data.images: expected the number of images in all shards .*got None"),
        ("{folder}/{{000..005}}.tar", ["--data.images=40"], r"found none at .*004.tar, .*005.tar \(2 of 6 places"),
        ("{folder}/no*.tar", ["--data.images=40"], r"data.folder: expected tar shards, found none at .*no\*.tar"),
        (
            "{folder}/{{000..003}}.tar",
            ["--data.images=40", "--data.workers=5"],
            "data.folder: expected a shard for each of 1 processes x 5 workers, found 4",
        ),
        (
            "{folder}/{{000..003}}.tar",
            [
                "--data.images=40",
                "--data.channels=4",
                "--data.photometric=none",
                "--data.mean=[0,0,0,0]",
                "--data.std=[1,1,1,1]",
            ],
            r"data.channels: expected 4 channels, got 3 in .*.tar/class/",
        ),
        ("{folder}/{{000..003}}.tar", ["--data.images=4"], "data.batch_size: expected 1 to 4, the images of .*got 8"),
    ],
)
def test_bad_input_stops_before_training(source, args, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(source.format(folder=folder), tmp_path, *args)


def test_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r"pip install 'densessl\[shards\]'"):
        find_shards(f"{folder}/000.tar", 10, 1, 0)


def test_what_is_taken_for_shards(tmp_path):
    assert all(map(is_shards, ["a/{0..9}.tar", "a/{x.tar,y.tar}", "pipe:curl -s x", "https://x/a.tar?key=1", "a.tar"]))
    assert not is_shards("photos")
    (tmp_path / "photos.tar").mkdir()
    assert not is_shards(str(tmp_path / "photos.tar"))
