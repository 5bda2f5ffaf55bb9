"""The console command ``densessl``, also ``python -m densessl``: doors to the programs that exist."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from densessl import __version__

USAGE = """usage: densessl COMMAND ...

  densessl evaluate ...        scores a frozen backbone by published protocols; as python -m densessl.evaluation
  densessl export ...          writes a backbone for another framework; as python -m densessl.export
  densessl preview METHOD ...  shows what a recipe would see and cost, from a clone; as
                               python examples/pretrain/METHOD.py preview

Each command has its own --help; densessl --version tells the version."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Words of the command line after the program's name; None: those of this process.

    Returns:
        The exit status: 0 where all went well, 2 for a command that does not exist.
    """
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        print(f"densessl {__version__}")
        return 0
    if command == "evaluate":
        from densessl.evaluation._command import main as evaluate

        return evaluate(rest, "densessl evaluate")
    if command == "export":
        from densessl.export import main as export

        return export(rest, "densessl export")
    if command == "preview":
        return _preview(rest)
    print(f"densessl: expected evaluate, export or preview, got {command}\n\n{USAGE}", file=sys.stderr)
    return 2


def _preview(arguments: Sequence[str]) -> int:
    folder = Path("examples", "pretrain")
    methods = sorted(path.stem for path in folder.glob("[a-z]*.py"))
    if not methods:
        print(f"densessl preview: expected {folder} here: run it from a clone of densessl", file=sys.stderr)
        return 2
    method, *options = arguments or [""]
    if method not in methods:
        print(f"densessl preview: expected a method ({', '.join(methods)}), got {method or 'none'}", file=sys.stderr)
        return 2
    sys.argv = [str(folder / f"{method}.py"), "preview", *options]
    sys.path.insert(0, str(Path.cwd()))
    runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
