"""From a command line to options, with errors of one line in the words of the command line."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace
from torch import nn

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null"}


def add_run_options(parser: ArgumentParser) -> None:
    """Adds the options of a run's folder and checkpoints."""
    parser.add_argument(
        "--out",
        type=str | None,
        default=None,
        help="Folder of the run; by default runs/METHOD-NUMBER with the first number that is free. A folder that holds "
        "a run already raises an error, unless --ckpt_path or --overwrite is given.",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="Delete the run in the folder --out, and begin a new one there."
    )
    parser.add_argument(
        "--ckpt_path",
        type=str | None,
        default=None,
        help="Checkpoint of a run that is continued, which needs the options that the run had: the path of a file; "
        "'last' for the newest checkpoint of the run in --out; or 'auto', which is 'last' if there is a checkpoint and "
        "otherwise begins the run, for jobs that a cluster starts again. By default a new run begins.",
    )
    parser.add_argument(
        "--extend_to",
        type=int | None,
        default=None,
        help="New total length of a run that --ckpt_path continues: in epochs, or in steps if the run was begun with "
        "trainer.max_steps; not less than before. From the continuation on, learning rate and momentum are those of a "
        "run that had this length from its start. By default the length stays.",
    )
    parser.add_argument(
        "--save_every_n_epochs",
        type=int,
        default=10,
        help="Number of epochs between two checkpoints that are kept, checkpoints/epoch=N.ckpt.",
    )
    parser.add_argument(
        "--save_every_n_steps",
        type=int,
        default=1000,
        help="Number of steps after which checkpoints/last.ckpt is written again, from which a stopped run goes on.",
    )


LIMIT = "--trainer.max_epochs or --trainer.max_steps is needed; with both, the run ends at what it reaches first."
TRAINER = {
    "trainer.limit_train_batches": "Share of an epoch's batches to train on, if it is a number with a point, or else "
    "their number. By default all.",
    "trainer.log_every_n_steps": "Number of steps between two rows of the log.",
    "trainer.enable_progress_bar": "Whether the progress bar is shown. By default it is.",
    "trainer.enable_model_summary": "Whether a table of the model's parts is printed at the start.",
    "trainer.accumulate_grad_batches": "Number of batches whose gradients make one step.",
    "trainer.max_epochs": f"Number of passes over the images after which the run ends. {LIMIT}",
    "trainer.max_steps": f"Number of steps after which the run ends; -1 sets no limit. {LIMIT}",
}


def correct_trainer_texts(parser: ArgumentParser) -> None:
    """Takes Lightning's defaults out of the texts of ``--trainer.*``, because a recipe has others; rewrites some."""
    for action in parser._actions:
        if action.dest.startswith("trainer.") and action.help:
            text = re.sub(r"\s*Default: (``.*?``|\d+)\.", "", action.help)
            action.help = TRAINER.get(action.dest, text)


def settings_of(config: Namespace, budget: dict[str, Any]) -> Namespace:
    """The options as a file that begins such a run again, or continues it with ``--ckpt_path last``."""
    settings = config.clone()
    for name, value in {"config": None, "ckpt_path": None, "overwrite": False, "extend_to": None, **budget}.items():
        settings[name] = value
    return settings


def without_small(method: type[nn.Module]) -> set[str]:
    """The options of small views, for methods that take none: ``forward(view1, view2)`` without ``*small``."""
    takes = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(method.forward).parameters.values())
    return set() if takes else {"small", "small_size", "small_scale"}


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """The options of a command line.

    Raises:
        ValueError: If an option is unknown, missing or of another type.
    """
    try:
        return parser.parse_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ValueError(_in_words(parser, " ".join(str(error).split()))) from error


def _in_words(parser: ArgumentParser, message: str) -> str:
    actions = {action.dest: action for action in parser._actions}
    of_key = re.match(r'Parser key "([\w.]+)": (.*)', message)
    if of_key and hasattr(actions.get(of_key[1]), "_typehint"):
        got = re.search(r"(?:Got value|Given value): (.*?)(?: Errors?:.*)?$", of_key[2])
        if got:
            return f"{of_key[1]}: expected {described(actions[of_key[1]]._typehint)}, got {got[1]}"
    if of_key:
        return f"{of_key[1]}: {of_key[2]}"
    foreign = re.match(r"(?:Group '(\w+)' does not accept option|Option) '([\w.-]+)'", message)
    if foreign:
        prefix = f"{foreign[1]}." if foreign[1] else ""
        own = [action.removeprefix(prefix) for action in actions if action.startswith(prefix)]
        close = [prefix + other for other in difflib.get_close_matches(foreign[2], own, n=2, cutoff=0.75)]
        otherwise = "--help lists those that it has; a file in configs/ names its recipe"
        hint = f"did you mean {' or '.join(close)}" if close else otherwise
        return f"{prefix}{foreign[2]}: this recipe has no such option; {hint}"
    flag = re.match(r"argument (--\w+): ignored explicit argument (.*)", message)
    if flag:
        return f"{flag[1][2:]}: expected no value, {flag[1]} alone, got {flag[2]}"
    unknown = re.match(r"unrecognized arguments: (--[\w.-]+)", message, re.IGNORECASE)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings if option[-1] != "+"]
        close = difflib.get_close_matches(unknown[1], known, n=2, cutoff=0.75)
        hint = f"did you mean {' or '.join(close)}" if close else "--help lists them"
        return f"{unknown[1]}: there is no such option; {hint}"
    return message


def described(kind: Any) -> str:
    """A type as a person reads it."""
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, types.UnionType):
        several = dict.fromkeys(described(part) for part in get_args(kind))
        return " or ".join(several)
    if get_origin(kind) is tuple:
        return f"a list of {len(get_args(kind))} numbers, as [{', '.join('1' * len(get_args(kind)))}]"
    return WORDS.get(kind, str(kind).replace("typing.", "").replace("collections.abc.", ""))
