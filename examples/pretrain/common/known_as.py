"""What a user calls a run: by the program that was started, and the method in words."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path


def known_as(method: type) -> str:
    """The run's name in logs and reports, as ``adapt.py (PixContrast with an instance loss)``.

    Where program and method have the same name, as in pixpro.py, the method's name alone.

    Args:
        method: Class of the method. Its attribute ``in_words`` says what it is; without one it is the class's name.
    """
    words = getattr(method, "in_words", method.__name__)
    try:
        program = Path(program_of(method))
    except (OSError, TypeError):  # a class that was written in a notebook
        return words
    return words if program.stem.replace("_", "") == words.lower() else f"{program.name} ({words})"


def program_of(method: type) -> str:
    """The file that runs the recipe: the program that is running, or the method's own where that is none.

    The two differ where a recipe trains another file's method, as adapt.py does.
    """
    running = sys.modules["__main__"]
    return running.__file__ if hasattr(running, "recipe") else inspect.getfile(method)
