"""Which tar shards a pattern names."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any

SHARD = re.compile(
    r"\.(tar(\.(gz|bz2|xz|zst))?|tgz)}*$", re.IGNORECASE
)  # the end of a name, inside the braces of a pattern too


def is_shards(folder: str) -> bool:
    """Whether ``data.folder`` means tar shards: a command, an address, or a pattern whose files end as tar files do."""
    if folder.startswith("pipe:") or "://" in folder:
        return True
    return SHARD.search(Path(folder).name) is not None and not Path(folder).is_dir()


def find_shards(pattern: str, images: int | None, processes: int, workers: int) -> list[str]:
    """The shards of a pattern with braces or, on a disk, asterisks.

    Raises:
        ValueError: If a shard is missing, there are too few for all that read, or ``images`` is not given.
    """
    webdataset()
    from webdataset.shardlists import expand_urls

    if images is None or images < 1:
        raise ValueError(f"data.images: expected the number of images in all shards of {pattern}, got {images}")
    found = {url: [url] if ":" in url else sorted(glob.glob(url)) for url in expand_urls(pattern)}
    missing = [url for url, shards in found.items() if not shards]
    if missing:
        raise ValueError(
            f"data.folder: expected tar shards, found none at {', '.join(missing[:3])} "
            f"({len(missing)} of {len(found)} places in {pattern})"
        )
    shards = [shard for some in found.values() for shard in some]
    if len(shards) < processes * max(1, workers):
        raise ValueError(
            f"data.folder: expected a shard for each of {processes} processes x {max(1, workers)} workers, found "
            f"{len(shards)}: make smaller shards or lower data.workers"
        )
    return shards


def webdataset() -> Any:
    """The package, where it is installed."""
    try:
        import webdataset
    except ImportError as error:
        raise ImportError(
            "data.folder: webdataset reads tar shards; install the extra: pip install 'densessl[shards]'"
        ) from error
    return webdataset
