"""Unpickling of files from elsewhere without running anything: what is not plain data becomes an inert placeholder.

A pickle names functions and classes and says what to call them with, so loading one runs whatever its author wanted.
Here a name is looked up in a short list; of any other the name, the arguments and the state are kept as data.
"""

from __future__ import annotations

import io
import pickle
import re
import types
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_PLAIN = {("collections", "OrderedDict"): OrderedDict}
# What a tensor is pickled with by torch.save, beside its storage, which is torch.load's own business.
_TENSORS = {**_PLAIN, ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2}
# Where torch's zip files have their magic number, and what only TorchScript, which is a program, has in them.
_ZIP_MAGIC = b"PK\x03\x04"
_SCRIPT_MEMBER = b"/constants.pkl"


class Inert:
    """Stands for an object that was not made.

    Attributes:
        name: of what would have been called, with its module.
        args: what it would have been called with.
        state: what the object would have been filled with.
    """

    name = ""

    def __new__(cls, *args: Any, **named: Any) -> Inert:
        made = object.__new__(cls)
        made.args, made.state = args, None
        return made

    def __init__(self, *args: Any, **named: Any) -> None:
        """Takes any arguments, as `__new__` has kept them."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    # A pickle also adds elements to what would be a list, a set or a dictionary of some kind. None is needed.
    def append(self, element: Any) -> None: ...

    def extend(self, elements: Any) -> None: ...

    def add(self, element: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def attribute(self, name: str) -> Any:
        """An attribute that the object would have; None if it has none of this name."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class _Unpickler(pickle.Unpickler):
    """Finds nothing but what is ``allowed``, and collects the other names in ``skipped``."""

    allowed: Mapping[tuple[str, str], Any]
    skipped: set[str]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        self.skipped.add(f"{module}.{name}")
        # A class, since a pickle may ask for `cls.__new__` and the unpickler then demands one.
        return type("Inert", (Inert,), {"name": f"{module}.{name}"})


def _restricted(allowed: Mapping[tuple[str, str], Any], skipped: set[str]) -> type[_Unpickler]:
    """A class for one file: torch.load makes the unpickler itself."""
    return type("_Restricted", (_Unpickler,), {"allowed": allowed, "skipped": skipped})


def load_pickle(content: bytes) -> tuple[Any, set[str]]:
    """What a plain pickle holds, and the names of what was not looked up.

    Raises:
        ValueError: it is no pickle, or a damaged one.
    """
    skipped: set[str] = set()
    try:
        return _restricted(_PLAIN, skipped)(io.BytesIO(content)).load(), skipped
    # What a damaged or hostile pickle raises has no common type.
    except Exception as error:
        raise ValueError(_reason(error)) from error


def load_torch(content: bytes) -> tuple[Any, set[str]]:
    """The same of a file of `torch.save`, with its tensors, on the CPU.

    Raises:
        ValueError: it is no such file, or a damaged one, or of torch before 1.6, or a TorchScript program.
    """
    if not content.startswith(_ZIP_MAGIC):
        raise ValueError("not a file as torch has written them since version 1.6 (a zip file)")
    if _SCRIPT_MEMBER in content:
        raise ValueError("a TorchScript program")
    skipped: set[str] = set()
    restricted = types.SimpleNamespace(__name__="restricted", Unpickler=_restricted(_TENSORS, skipped))
    try:
        # Not weights_only: that refuses a file as a whole for the configuration that lies beside the tensors.
        loaded = torch.load(io.BytesIO(content), map_location="cpu", pickle_module=restricted, weights_only=False)
    except Exception as error:
        raise ValueError(_reason(error)) from error
    return loaded, skipped


def strings(value: Any) -> list[str] | None:
    """The elements of a pickled numpy array of text that `Inert` stands for; None if it stands for another thing."""
    if not isinstance(value, Inert) or not value.name.endswith(".multiarray._reconstruct"):
        return None
    if not isinstance(value.state, tuple) or len(value.state) != 5:
        return None
    _, _, dtype, _, data = value.state
    if isinstance(data, list):
        return list(data) if all(isinstance(element, str) for element in data) else None
    return _decoded(dtype, data)


def text(value: Any) -> str | None:
    """A pickled text, of Python's own kind or of numpy's; None if it is another thing."""
    if isinstance(value, Inert) and value.name.endswith(".multiarray.scalar") and len(value.args) == 2:
        found = _decoded(*value.args)
        return found[0] if found is not None and len(found) == 1 else None
    return value if isinstance(value, str) else None


def _decoded(dtype: Any, data: Any) -> list[str] | None:
    """Text as numpy lays it out in memory; ``dtype`` is an `Inert` too."""
    if not isinstance(dtype, Inert) or dtype.name != "numpy.dtype" or not isinstance(dtype.state, tuple):
        return None
    kind, order = str(dtype.args[0]) if dtype.args else "", dtype.state[1:2]
    if not isinstance(data, bytes) or not re.fullmatch(r"U[1-9]\d{0,5}", kind) or order not in (("<",), (">",)):
        return None
    try:
        return np.frombuffer(data, np.dtype(order[0] + kind)).tolist()
    except ValueError:
        return None


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
