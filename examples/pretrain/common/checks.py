"""What the numbers of the command line must be: looked at before anything is made, with the option's whole name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jsonargparse import Namespace


def _at_least(least: int) -> tuple[str, Callable[[Any], bool]]:
    return f"at least {least}", lambda value: value >= least


def _is_scale(value: Sequence[float]) -> bool:
    return len(value) == 2 and 0 < value[0] <= value[1] <= 1


def _is_limit(value: float) -> bool:
    return 0 < value <= 1 if isinstance(value, float) else value >= 1


def _each_in_0_to_1(value: Sequence[float]) -> bool:
    return all(0 <= v <= 1 for v in value)


_SHARE = ("a share in 0..1", lambda value: 0 <= value <= 1)
_FINITE = ("finite numbers", lambda value: all(map(math.isfinite, value)))
# What is expected of an option, and whether its value is that. An option that a recipe lacks, or that is None, passes.
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "data.size": _at_least(1),
    "data.batch_size": _at_least(1),
    "data.workers": _at_least(0),
    "data.channels": _at_least(1),
    "data.images": _at_least(1),
    "data.redraws": _at_least(0),
    "data.scale": ("shares of the image's area, 0 < smallest <= largest <= 1", _is_scale),
    "data.small": _at_least(0),
    "data.small_size": _at_least(1),
    "data.small_scale": ("shares of the image's area, 0 < smallest <= largest <= 1", _is_scale),
    "data.max_unreadable": _SHARE,
    "data.mean": _FINITE,
    "data.std": ("positive numbers", lambda value: all(0 < v < math.inf for v in value)),
    "momentum": ("two numbers in 0..1", _each_in_0_to_1),
    "seed": ("a number in 0..4294967295", lambda value: 0 <= value < 2**32),
    "save_every_n_epochs": _at_least(1),
    "save_every_n_steps": _at_least(1),
    "extend_to": _at_least(1),
    "optimizer.warmup": ("a share of the steps in 0..1", lambda value: 0 <= value <= 1),
    "optimizer.weight_decay": ("a number of at least 0", lambda value: 0 <= value < math.inf),
    "method.hidden_dim": _at_least(1),
    "method.dim": _at_least(1),
    "method.queue": _at_least(1),
    "method.regions": _at_least(1),
    "method.prototypes": _at_least(1),
    "method.alpha": _at_least(0),
    "trainer.log_every_n_steps": _at_least(1),
    "trainer.accumulate_grad_batches": _at_least(1),
    "trainer.num_nodes": _at_least(1),
    "trainer.gradient_clip_val": ("a number of at least 0", lambda value: 0 <= value < math.inf),
    "trainer.limit_train_batches": ("a number of batches, or a share in 0..1 with a decimal point", _is_limit),
}


def check_options(config: Namespace) -> None:
    """Checks every option that has a range, and that the run has an end.

    Raises:
        ValueError: If an option is out of its range, by the option's whole name.
    """
    for name, (expected, holds) in RULES.items():
        value = config.get(name)
        if value is not None and not holds(value):
            raise ValueError(f"{name}: expected {expected}, got {plain(value)}")
    epochs, steps = config.trainer.max_epochs, config.trainer.max_steps
    if epochs == 0 or steps == 0 or max(epochs or -1, steps) < 1:
        raise ValueError(
            f"trainer: expected a budget, max_epochs or max_steps of at least 1, got max_epochs={epochs} and "
            f"max_steps={steps}"
        )


def plain(value: Any) -> Any:
    """A value as a person writes it: lists for tuples."""
    return list(value) if isinstance(value, tuple) else value


@contextmanager
def named(chapter: str, options: Sequence[str]) -> Iterator[None]:
    """Puts the chapter before the name of an argument, in errors that name the argument of a part alone.

    Args:
        chapter: The chapter of the command line, as ``method``.
        options: Names of its options.
    """
    try:
        yield
    except ValueError as error:
        if str(error).partition(":")[0] in options:
            raise ValueError(f"{chapter}.{error}") from error
        raise
