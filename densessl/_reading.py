"""Opens the files that training leaves behind, without running anything that they hold."""

from __future__ import annotations

import argparse
import importlib
import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first object in files of torch.save before 1.6
_UNSAFE = re.compile(r"(?:[Uu]nsupported (?:global: )?GLOBAL|Unsupported class|unrecognized function|but got) (\S+)")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class _Inert:
    """Stands for a class of OpenMMLab's logs, which holds the last losses; it keeps them and does nothing."""


def _numpy_globals() -> dict[str, Any]:
    """The classes that NumPy's arrays and scalars are pickled as, under all names that its versions write."""
    found: dict[str, Any] = {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}
    for package in ("numpy.core", "numpy._core"):
        found[f"{package}.multiarray._reconstruct"] = np.zeros(1).__reduce__()[0]
        found[f"{package}.multiarray.scalar"] = np.float64(1).__reduce__()[0]
    kinds = (np.dtype(kind) for kind in ("?", "b", "B", "h", "H", "i", "I", "q", "Q", "l", "L", "e", "f", "d", "U"))
    found |= {f"numpy.dtypes.{type(kind).__name__}": type(kind) for kind in kinds}
    return found


_NUMPY = _numpy_globals()


def clean(name: str) -> str:
    """A name without the wrappers that ``torch.compile``, FSDP and checkpointing put around modules, at any place."""
    return _WRAPPERS.sub("", name)


def read_entries(path: Path, root: str | None = None) -> dict[str, Any]:
    """The file's state dict, out of whatever it is wrapped in; dicts inside it are spread out to dotted names.

    Args:
        path: ``*.safetensors``, a plain pickle of arrays ``*.pkl``, or what ``torch.save`` wrote under any suffix.
        root: Where the caller looks. If it begins with a key of the outermost dict, and not with one inside the
            wrapper, no wrapper is taken off.

    Raises:
        ValueError: If the file is missing, damaged or refused as unsafe, or holds no dict.
        ImportError: If ``*.safetensors`` is to be read and that package is missing.
    """
    if not path.is_file():
        raise ValueError(f"path: there is no file {path}")
    content = _open(path)
    first = None if root is None else clean(root).partition(".")[0]
    for wrapper in ("state_dict", "model"):
        inner = content.get(wrapper) if isinstance(content, Mapping) else None
        if isinstance(inner, Mapping) and (first not in content or any(_first(key) == first for key in inner)):
            content = inner
    if not isinstance(content, Mapping):
        raise ValueError(f"path: {path}: expected a dict of tensors, got {type(content).__name__}")
    return dict(_spread(content, ""))


def _first(key: Any) -> Any:
    return clean(key).partition(".")[0] if isinstance(key, str) else key


def safetensors() -> Any:
    """The package, imported on use."""
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError("files *.safetensors need that package: pip install 'densessl[export]'") from error


def _spread(content: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = torch.from_numpy(np.array(value))  # a copy that is writable and owns its values
        if isinstance(value, Mapping) and _holds_tensors(value):
            yield from _spread(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _holds_tensors(content: Mapping[Any, Any]) -> bool:
    """Whether a dict holds named tensors, and is not an optimiser's state, which numbers its parameters."""
    if not all(isinstance(key, str) for key in content):
        return False
    return any(
        isinstance(value, (Tensor, np.ndarray)) or (isinstance(value, Mapping) and _holds_tensors(value))
        for value in content.values()
    )


def _open(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safetensors().load_file(path)
        if path.suffix == ".pkl":
            content = _unpickle(path.read_bytes())
            if content != _TORCH_MAGIC:
                return content
        # The published code saves its options as a Namespace; OpenMMLab 2.x keeps NumPy's scalars and a log.
        allowed: list[Any] = [argparse.Namespace, *((value, name) for name, value in _NUMPY.items())]
        allowed.append((_Inert, "mmengine.logging.history_buffer.HistoryBuffer"))
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:  # each reader has errors of its own for damaged files, some without a text
        unsafe = _UNSAFE.search(str(error))
        if unsafe is not None:
            raise ValueError(
                f"path: {path} holds a {unsafe[1]} and was refused as unsafe: only tensors and plain values are read "
                "(weights_only), because unpickling anything else can run code. If you trust the file, convert it "
                "once, where the library that wrote it is installed: content = torch.load(file, weights_only=False); "
                "torch.save(content['state_dict'], 'weights.pth'), or content.state_dict() where it is a module"
            ) from error
        detail = f"{type(error).__name__} {error}".splitlines()[0][:200]
        raise ValueError(f"path: {path} is no checkpoint, or is damaged ({detail})") from error


class _Unpickler(pickle.Unpickler):
    """Builds arrays and plain values, and refuses every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        known = {**_NUMPY, "collections.OrderedDict": OrderedDict, "_codecs.encode": _encode}
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"Unsupported class {module}.{name}")
        return known[f"{module}.{name}"]


def _encode(text: str, encoding: str) -> bytes:
    """Bytes as Python 2's protocols write them."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _unpickle(data: bytes) -> Any:
    if data[:2] == b"PK":  # a zip archive: torch.save's
        return _TORCH_MAGIC
    return _Unpickler(io.BytesIO(data), encoding="latin1").load()
