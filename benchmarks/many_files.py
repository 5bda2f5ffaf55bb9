"""Very many files: seconds of the first and the second start, and the memory of a run's processes over an epoch.

Makes a folder of empty files, a thousand to a sub-folder, and goes through an epoch of the recipes' loader whose
workers look at each file and decode nothing. Memory of a worker is what it shares with no other process, after the
first batches and at the end: it grows where reading copies what was shared.

    python benchmarks/many_files.py [--files 1300000] [--workers 2] [--objects]

--objects keeps the list as Python objects instead, one path each, as it was before.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import torch

from densessl import View
from examples.pretrain.common.data.finding import find_photos
from examples.pretrain.common.data.loader import ResumableLoader
from examples.pretrain.common.data.sources import FolderSource
from examples.pretrain.common.data.views import Batch

VIEW = View(torch.zeros(1, 1, 1, dtype=torch.uint8), torch.eye(3), torch.ones(2, dtype=torch.int64))


class Looked:
    """Looks at each file in place of decoding it."""

    def __init__(self, paths) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        os.stat(self.paths[key[1]])
        return Batch(VIEW, VIEW, torch.tensor(0), torch.tensor(False))


def megabytes(process: int | str, *entries: str) -> float:
    """Memory of a process: the sum of some of the entries that the kernel keeps."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    values = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return sum(values[entry] for entry in entries) / 1024


def own(process: int) -> float:
    """What a process shares with no other."""
    return megabytes(process, "Private_Clean", "Private_Dirty")


def make(root: Path, files: int) -> None:
    for start in range(0, files, 1000):
        folder = root / f"n{start // 1000:08}"
        folder.mkdir()
        for number in range(start, min(start + 1000, files)):
            os.close(os.open(folder / f"n{start // 1000:08}_{number:07}.JPEG", os.O_CREAT | os.O_WRONLY))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_300_000, help="Number of empty files to make (%(default)s).")
    parser.add_argument("--workers", type=int, default=2, help="Processes of the loader (%(default)s).")
    parser.add_argument("--objects", action="store_true", help="Keep the list as Python objects, a path each.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch, "cache"))
        photos = Path(scratch, "photos")
        photos.mkdir()
        make(photos, args.files)
        time.sleep(2.5)  # what has just been changed is not kept
        base = megabytes("self", "Rss")
        for which in ("first", "second"):
            begun, used = time.perf_counter(), time.process_time()
            source = FolderSource(str(photos))
            source.hold_out(64)
            count, _ = source.count(1, args.workers), source.fingerprint()
            took, cpu = time.perf_counter() - begun, time.process_time() - used
            print(f"{which} start: {count:,} files in {took:.1f} s, {cpu:.1f} s of a core")
        del source
        paths = list(find_photos(photos)) if args.objects else find_photos(photos)
        print(
            f"main process: {megabytes('self', 'Rss'):.0f} MB, {base:.0f} MB of them before it has listed anything; "
            f"{own(os.getpid()):.0f} MB are its own, the rest are pages of libraries, which processes share"
        )
        loader = ResumableLoader(
            Looked(paths), batch_size=1000, rank=0, world_size=1, seed=0, workers=args.workers, batches=None
        )
        for number, _ in enumerate(loader):
            if number in (10, len(loader) - 2):
                each = [f"{own(child.pid):.0f}" for child in multiprocessing.active_children()]
                print(f"after {number:,} of {len(loader):,} batches: own memory of the workers {', '.join(each)} MB")
        print(f"main process at the end: {megabytes('self', 'Rss'):.0f} MB")


if __name__ == "__main__":
    main()
