"""Looks at a built wheel and sdist, and imports every module of the installed wheel.

Usage: python check_package.py DIST_FOLDER ENVIRONMENT_FOLDER
"""

import importlib
import importlib.util
import pkgutil
import sys
import tarfile
import zipfile
from pathlib import Path

import densessl

dist, environment = (Path(argument).resolve() for argument in sys.argv[1:])
(wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
with zipfile.ZipFile(wheel) as archive:
    in_wheel = archive.namelist()
with tarfile.open(sdist) as archive:
    in_sdist = archive.getnames()


def holds(names: list[str], ending: str, where: Path) -> None:
    if not any(name.endswith(ending) for name in names):
        sys.exit(f"{where.name}: {ending} is missing")


WEIGHTS = ("weights/README.md", "weights/pixpro_r10_study.safetensors")
for ending in ("densessl/__init__.py", "densessl/py.typed", "LICENSE", *(f"densessl/{name}" for name in WEIGHTS)):
    holds(in_wheel, ending, wheel)
TOP = ("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "hubconf.py")
for ending in ("densessl/py.typed", *TOP, *WEIGHTS):
    holds(in_sdist, ending, sdist)
stray = [name for name in in_wheel if not name.startswith(("densessl/", "densessl-"))]
if stray:
    sys.exit(f"{wheel.name}: unexpected {stray}")

if environment not in Path(densessl.__file__).resolve().parents:
    sys.exit(f"densessl was imported from {densessl.__file__}, not from the wheel")
modules = [module.name for module in pkgutil.walk_packages(densessl.__path__, "densessl.")]
if importlib.util.find_spec("triton") is None:
    modules.remove("densessl.propagation._triton")
for module in modules:
    importlib.import_module(module)
for name in densessl.hub.list_models():
    densessl.hub.load(name)
missing = [name for name in densessl.__all__ if not hasattr(densessl, name)]
if missing:
    sys.exit(f"densessl.__all__ names what is not there: {missing}")
print(f"{wheel.name}: {len(in_wheel)} files; {len(modules)} modules imported; version {densessl.__version__}")
