"""Says in words how the entries of a file differ from those of a model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

SHOWN = 3  # names in a message
TRIED = 12  # missing entries for which a name like theirs is looked for


def misfit(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The first entry that is too much, has another shape or is missing, in words; None if all fit.

    Counters of batches may be missing or superfluous: older files and frozen norms have none, and nothing reads them.
    """
    for name, value in weights.items():
        if name not in expected and not _counts(name):
            return f"there is no place for entry {name!r}"
        if name in expected and value.shape != expected[name].shape:
            return f"entry {name!r} is {tuple(value.shape)}, expected {tuple(expected[name].shape)}"
    first = next(iter(missing(weights, expected)), None)
    return None if first is None else f"entry {first!r} is missing"


def missing(weights: Iterable[str], expected: Iterable[str]) -> list[str]:
    """The expected entries that are not there, in their order, without counters of batches."""
    there = set(weights)
    return [name for name in expected if name not in there and not _counts(name)]


def differences(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], unused: Mapping[str, Tensor], prefix: str
) -> str:
    """How many entries differ by name, with examples; empty where a single one does, which ``misfit`` has named.

    Args:
        weights: What of the file would go into the model, under the model's names.
        expected: The entries that the model needs.
        unused: All other entries of the file, under the file's names.
        prefix: What stands before the model's names in the file.
    """
    lacking, extra = missing(weights, expected), missing(expected, weights)
    if len(lacking) + len(extra) < 2:
        return ""
    if not lacking:
        return f"; there is none for {len(extra)} of the file's entries, among them {_listed(extra)}"
    tried = {name: _closest(name, expected[name], unused, prefix) for name in lacking[:TRIED]}
    alike = {name: close for name, close in tried.items() if close is not None}
    text = f"; the file lacks {len(lacking)} of {len(missing((), expected))} entries, such as "
    if alike:
        closest = list(dict.fromkeys([*alike.values()][:SHOWN]))
        are = "are" if len(closest) > 1 else "is"
        return f"{text}{_listed([*alike])}; the closest that it has {are} {_listed(closest)}"
    others = [name for name in unused if not _counts(name)]
    return f"{text}{_listed(lacking)}" + (f"; in their place it has {_listed(others)}" if others else "")


def _counts(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _closest(name: str, like: Tensor, unused: Mapping[str, Tensor], prefix: str) -> str | None:
    """The entry of this shape whose name behind the prefix is most alike; None if none is."""
    ends = {full.removeprefix(prefix): full for full, value in unused.items() if value.shape == like.shape}
    close = difflib.get_close_matches(name, ends, 1, cutoff=0.75)
    return ends[close[0]] if close else None


def _listed(names: Sequence[str]) -> str:
    """The first of the names, in words."""
    *first, last = map(repr, names[:SHOWN])
    return f"{', '.join(first)} and {last}" if first else last
