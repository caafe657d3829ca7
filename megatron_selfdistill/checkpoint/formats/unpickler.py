# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Read the pickles of a checkpoint with the globals that a Megatron checkpoint needs, and refuse any other by name.

A pickle can name and call any function of any installed package.  Checkpoints travel between labs, so this module is
the only reader of pickles in the package.  ``torch.load(weights_only=True)`` reads files of ``torch.save``, and
`_Unpickler` reads ``.metadata`` and Transformer Engine's FP8 statistics, whose protocol ``torch.load`` does not know.

Both readers look up names in one table, and fill only objects of the classes in the table.  The table has functions in
the place of enumerations and of NumPy's data types: a pickle could overwrite the member of an enumeration, and could
fill a data type so that numbers become pointers.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import enum
import functools
import importlib
import io
import pickle
import re
import signal
import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path, PosixPath
from typing import Any, ClassVar

import numpy as np
import torch
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.metadata import Metadata

from megatron_selfdistill.errors import CheckpointError

_ENUMERATIONS = (
    "megatron.core.enums.ModelType",
    *(f"megatron.core.transformer.enums.{name}" for name in ("AttnBackend", "CudaGraphScope", "CudaGraphModule")),
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
    *(f"megatron.core.rerun_state_machine.{name}" for name in ("RerunDiagnostic", "RerunMode", "RerunState")),
    "signal.Signals",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.planner.WriteItemType",
)
_CLASSES: tuple[type, ...] = (
    *(argparse.Namespace, types.SimpleNamespace, OrderedDict, set, frozenset, slice),
    *(io.BytesIO, datetime.timedelta, datetime.datetime, torch.Size),
    *(dcp.Metadata, dcp.MetadataIndex, dcp.StorageMeta, dcp.TensorStorageMetadata, dcp.BytesStorageMetadata),
    *(dcp.ChunkStorageMetadata, dcp.TensorProperties, filesystem._StorageInfo, filesystem._StoragePrefix),
    *(planner.SavePlan, planner.WriteItem, planner.TensorWriteData),
)
_RECIPES = "transformer_engine.common.recipe"
_LOCK = threading.Lock()
_PythonUnpickler: Any = pickle._Unpickler


def _member(enumeration: str, value: Any, by_name: bool = False) -> Any:
    """Return the member whose value, or name if ``by_name``, is ``value``; ``value`` without such an enumeration."""
    module, _, name = enumeration.rpartition(".")
    found = getattr(importlib.import_module(module), name, None)
    return value if found is None else found[value] if by_name else found(value)


def _member_by_name(enumeration: Any, name: str) -> Any:
    """Return the member ``name``, for which Python 3.11.2 stores a call of ``getattr``; refuse other calls."""
    if not isinstance(enumeration, functools.partial):  # `_allowed` makes one of each enumeration, and a pickle none
        raise pickle.UnpicklingError("GLOBAL getattr is not allowed")
    return enumeration(name, by_name=True)


class _NumpyType:
    """A data type of numbers, which a pickle fills with a byte order and nothing else."""

    def __init__(self, name: str, align: bool = False, copy: bool = True) -> None:
        self.numpy = np.dtype(name)
        if self.numpy.kind not in "biufc":
            raise pickle.UnpicklingError(f"it has an array of {self.numpy}, expected numbers")

    def __setstate__(self, state: Any) -> None:
        _, order, *further = state
        if further[:6] != [None, None, None, -1, -1, 0]:
            raise pickle.UnpicklingError("it fills a data type of NumPy with more than a byte order")
        self.numpy = self.numpy.newbyteorder(order)


class _Array(np.ndarray[Any, Any]):
    """An array of numbers, which a pickle fills; the pickle cannot name this class, and so cannot call it."""

    def __setstate__(self, state: Any) -> None:
        version, shape, dtype, is_fortran, data = state
        super().__setstate__((version, shape, dtype.numpy, is_fortran, data))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)  # a checkpoint never names this class


def _storage_of(data: bytes) -> Any:
    """Return the storage of a tensor that another pickle than ``torch.save``'s holds as bytes."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _allowed() -> dict[str, Any]:
    """Return what a pickle gets for each global that a Megatron checkpoint needs."""
    table: dict[str, Any] = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _CLASSES}
    table |= {name: functools.partial(_member, name) for name in _ENUMERATIONS}
    table |= {f"signal.{name}": member for name, member in signal.Signals.__members__.items()}
    table |= {"pathlib.PosixPath": PosixPath, "pathlib._local.PosixPath": PosixPath, "io.BytesIO": io.BytesIO}
    table |= dict.fromkeys(("builtins.getattr", "__builtin__.getattr"), _member_by_name)
    table["megatron.core.optimizer.optimizer_config.OptimizerConfig"] = types.SimpleNamespace
    for core in ("numpy.core.multiarray", "numpy._core.multiarray"):
        table[f"{core}._reconstruct"] = lambda *_: np.ndarray.__new__(_Array, (0,))
        table[f"{core}.scalar"] = lambda dtype, data: np.frombuffer(data, dtype.numpy)[0]
    table |= {"numpy.ndarray": None, "numpy.dtype": _NumpyType, "array": _Array}  # a pickle's names have a dot
    recipes = sys.modules.get(_RECIPES)  # Transformer Engine is imported where a model has its layers
    for name, value in vars(recipes).items() if recipes is not None else ():
        if isinstance(value, type) and value.__module__ == _RECIPES:
            path = f"{_RECIPES}.{name}"
            table[path] = functools.partial(_member, path) if issubclass(value, enum.Enum) else value
    return table


def _allowed_in_bare_pickles() -> dict[str, Any]:
    """Return `_allowed`, and the parts of tensors, which ``torch.load`` knows itself."""
    table = _allowed()
    table |= {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    for function in (torch._utils._rebuild_tensor_v2, torch.serialization._get_layout):
        table[f"{function.__module__}.{function.__qualname__}"] = function
    names = ("torch.storage._load_from_bytes", "megatron.core.safe_globals.safe_load_from_bytes")
    return table | dict.fromkeys(names, _storage_of)


class _Unpickler(_PythonUnpickler):
    """Python's unpickler with a table of globals, which fills no class, function or member of an enumeration."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(_PythonUnpickler.dispatch)

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._table = _allowed_in_bare_pickles()

    def find_class(self, module: str, name: str) -> Any:
        """Return the object that the table has for a global."""
        if f"{module}.{name}" not in self._table:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not allowed")
        return self._table[f"{module}.{name}"]

    def load_build(self) -> None:
        """Fill an object whose class is in the table."""
        if type(self.stack[-2]) not in self._table.values():
            raise pickle.UnpicklingError(f"it fills {self.stack[-2]!r}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


@contextlib.contextmanager
def _only_allowed_globals() -> Iterator[None]:
    """Make ``torch.load`` know the table of this module, in place of the classes that Megatron Core has registered."""
    with _LOCK:
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            with torch.serialization.safe_globals([(value, name) for name, value in _allowed().items()]):
                yield
        finally:
            torch.serialization.add_safe_globals(others)


def load_pickled(path: Path, *, mmap: bool = False) -> Any:
    """Return the contents of a file of ``torch.save``, on the CPU; refuse every global that is not allowed.

    ``mmap``: leave tensors on disk until the caller touches them.

    Raises: CheckpointError with the name of the refused global, or with the fault of the file.
    """
    try:
        with _only_allowed_globals():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap or None)
    except Exception as error:  # a corrupt pickle raises almost anything
        raise CheckpointError(f"{path} {_fault(error)}") from error


def loads_pickled(data: bytes | io.BytesIO, name: str) -> Any:
    """Return the contents of ``data``, a file of ``torch.save`` or a bare pickle, by the rules of `load_pickled`.

    ``name``: the name of the entry in the checkpoint, for messages.

    Raises: CheckpointError with the name of the refused global, or with the fault of the data.
    """
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        if not torch.serialization._is_zipfile(stream):
            return _Unpickler(stream).load()
        with _only_allowed_globals():
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{name} {_fault(error)}") from error


def load_metadata(path: Path) -> Metadata:
    """Return the ``.metadata`` of the torch_dist checkpoint in the directory ``path``.

    Raises: CheckpointError with the name of the refused global, or with the fault of the file; the message begins with
    ``path``.
    """
    try:
        with (Path(path) / ".metadata").open("rb") as stream:
            metadata: Metadata = _Unpickler(stream).load()
        names = {place.relative_path for place in metadata.storage_data.values()}
        if outside := [name for name in names if name in ("", ".", "..") or "/" in name or "\\" in name]:
            raise ValueError(f"it names the file {outside[0]!r}, expected one in its directory")
    except Exception as error:
        raise CheckpointError(f"{path} has a .metadata that {_fault(error)}") from error
    return metadata


def _fault(error: Exception) -> str:
    """Return the end of a message about a pickle, without the advice of torch to trust the file."""
    if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"was refused: its pickle asks for {asked[1]}, which no Megatron checkpoint needs"
    reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]
    return f"is corrupt or was refused ({type(error).__name__}: {reason})"
