"""Results on disk, from which a run goes on, and as a table."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "densessl",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "torchmetrics",
    "scipy",
    "scikit-learn",
    "numpy",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on, where they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read_results(path: Path, what: Mapping[str, Any]) -> dict[str, Any]:
    """The results of an earlier run; none where there is no such file.

    Args:
        path: Path of the file.
        what: What was evaluated, which has to be the same.

    Raises:
        ValueError: If the file is no such report, or is of something else.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        before, results = content["what"], content["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--out: {path} is no report of this command ({error}): name another file") from error
    given = json.loads(json.dumps(what))
    different = [key for key in given if before.get(key) != given[key]]
    if different:
        key = different[0]
        raise ValueError(
            f"--out: {path} was made with {key} = {before.get(key)!r}, this run has {given[key]!r}: name another file"
        )
    return dict(results)


def write_results(path: Path, what: Mapping[str, Any], how: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Writes the report; a run that is stopped leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    content = {"what": what, "how": how, "results": results}
    part.write_text(json.dumps(content, indent=2, allow_nan=True) + "\n", encoding="utf-8")
    part.replace(path)


def table(results: Mapping[str, Any]) -> str:
    """The results in lines: protocol and data, scores, image size, number of images, seconds."""
    head = ("protocol", "data", "score", "images", "size", "seconds")
    rows = [head]
    for result in results.values():
        scores = ", ".join(f"{name} {value:.4f}" for name, value in result["scores"].items())
        images = " + ".join(f"{count:,}" for count in result["images"])
        size = "x".join(map(str, result["size"]))
        rows.append((result["protocol"], result["data"], scores, images, size, f"{result['seconds']:.1f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
