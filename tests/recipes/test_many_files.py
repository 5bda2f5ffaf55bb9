"""Long lists of files: their order, their form, the kept index, and text files with a path a line."""

import os
import pickle
import time
from codecs import BOM_UTF8
from pathlib import Path

import pytest

from examples.pretrain.common.data import file_index, finding
from examples.pretrain.common.data.finding import find_photos
from examples.pretrain.common.data.fingerprint import fingerprint
from examples.pretrain.common.data.names import Names
from examples.pretrain.common.data.sources import FolderSource

PATHS = (
    "a-b/1.jpg",
    "a.jpg",
    "a/10.png",
    "a/2.png",
    "a/b/1.tif",
    "B.GIF",
    "é/z.webp",
    "a b.jpeg",
    "b/.no.jpg",
    "t",
)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder whose last change lies back."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "photos"
    for path in PATHS:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    for path in [root, *root.rglob("*")]:
        os.utime(path, (1e9, 1e9))
    return root


def test_the_order_is_that_of_paths(folder):
    found = find_photos(folder)
    assert list(found) == sorted(folder / path for path in PATHS[:-2])
    assert find_photos(str(folder) + "/")[0] == found[0]


def test_names(folder):
    found = find_photos(folder)
    paths = list(found)
    assert [found[i] for i in range(-len(found), len(found))] == paths + paths
    assert found[1:7:2] == paths[1:7:2]
    with pytest.raises(IndexError):
        found[len(found)]
    fewer = found.without([0, 3])
    assert list(fewer) == [*paths[1:3], *paths[4:]]
    assert list(pickle.loads(pickle.dumps(fewer))) == list(fewer)
    assert list(found.without([])) == paths
    odd = os.fsdecode(b"\xff\xfe.jpg")
    assert list(Names.of("x", [odd, "/y/z.png"])) == [Path("x") / odd, Path("/y/z.png")]
    assert len(Names.of("x", [])) == 0


def test_a_second_start_reads_the_index_unless_a_folder_has_changed(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(file_index, "LEAST", 3)
    monkeypatch.setattr(file_index, "SETTLED", 3600.0)
    scans = []
    below = finding._below

    def counted(root, path, *others):
        scans.append(path)
        return below(root, path, *others)

    monkeypatch.setattr(finding, "_below", counted)

    def listed() -> tuple[list[str], bool]:
        scans.clear()
        return [path.name for path in find_photos(folder)], bool(scans)

    first, second = listed(), listed()
    assert first == (second[0], True)
    assert second[1] is False
    (folder / "a" / "b" / "2.jpg").touch()
    assert "2.jpg" in listed()[0]
    assert listed()[1]  # just changed: another change could leave the same time
    os.utime(folder / "a" / "b", (1e9 + 5, 1e9 + 5))
    assert [listed()[1], listed()[1]] == [True, False]
    (folder / "a" / "b" / "2.jpg").rename(folder / "a" / "b" / "3.jpg")
    assert "3.jpg" in listed()[0]
    os.utime(folder / "a" / "b", (1e9 + 6, 1e9 + 6))
    listed()
    kept = file_index.index_of(folder)
    kept.write_bytes(kept.read_bytes()[:300])  # damaged
    assert [listed()[1], listed()[1]] == [True, False]
    folder.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"data.folder: expected a folder, got .*photos, which is missing"):
        find_photos(folder)


def test_a_pattern_is_called_one(folder):
    with pytest.raises(ValueError, match=r"--photos: .*, which is missing, or a pattern: give the folder"):
        find_photos(folder / "*.jpg", "--photos")


def test_photos_in_formats_that_are_not_read_are_told(folder, caplog):
    find_photos(folder)
    assert not caplog.records
    for name in ("b.HEIC", "c.heic", "a/d.nef", ".e.heic"):
        (folder / name).touch()
    assert len(find_photos(folder)) == len(PATHS) - 2
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        "data.folder: photos in formats that cannot be read are left out (2 .heic, 1 .nef); convert them to JPEG"
    )


def test_a_cache_that_cannot_be_written_stops_nothing(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(file_index, "LEAST", 3)
    (tmp_path / "cache").write_text("a file")
    assert len(find_photos(folder)) == len(PATHS) - 2


def test_small_folders_leave_no_index(folder, tmp_path):
    find_photos(folder)
    assert not (tmp_path / "cache").exists()
    assert time.time() > 1e9 + file_index.SETTLED


def test_a_text_file_with_a_path_a_line(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere.jpg"
    elsewhere.touch()
    text = tmp_path / "list.txt"
    text.write_text(f"photos/a.jpg\n\n{elsewhere}\nphotos/a/2.png\n")
    found = list(find_photos(text))
    assert found == [folder / "a.jpg", elsewhere, folder / "a" / "2.png"]
    text.write_bytes(BOM_UTF8 + text.read_bytes())  # as editors on Windows write it
    assert list(find_photos(text)) == found
    source = FolderSource(str(text))
    source.hold_out(1)
    assert [*source.paths(), *source.held_out()] == [found[0], found[2], found[1]]
    assert source.count(2, 0) == 2
    assert source.fingerprint() == fingerprint(Names.of(tmp_path, ["photos/a.jpg", "photos/a/2.png"]))
    text.write_text("photos/a.jpg\nphotos/none.jpg\n")
    with pytest.raises(ValueError, match=r"data.folder: .*list.txt names .*none.jpg, where there is no file"):
        find_photos(text)
    text.write_text("\n")
    with pytest.raises(ValueError, match=r"--photos: expected a path a line in .*list.txt, got none"):
        find_photos(text, "--photos")
