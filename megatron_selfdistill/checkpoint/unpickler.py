# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Reading pickles that others wrote: only the globals that a Megatron checkpoint needs; any other is refused by name.

A pickle may name any function of any installed package and call it.  Checkpoints travel between labs, so nothing
but what is listed here is ever looked up.
"""

from __future__ import annotations

import enum
import importlib
import pickle
import types
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_selfdistill.checkpoint.errors import CheckpointError


def load_pickled(path: Path, *, mmap: bool = False) -> Any:
    """``torch.load(path)`` on the CPU, refusing every global that is not in `ALLOWED`.

    ``mmap``: leave tensors on disk until they are touched.  Classes of ``megatron.*`` come back as themselves where
    they are enumerations that import here, else as inert objects that hold their state.
    Raises: CheckpointError naming the refused global, or what is wrong with the file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_RESTRICTED, mmap=mmap or None)
    except _Refused as refused:
        raise CheckpointError(f"{path} is not read: {refused}") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise CheckpointError(f"{path} is damaged or no PyTorch file ({type(error).__name__}: {error})") from error


def load_metadata(path: Path) -> Metadata:
    """The ``.metadata`` of the torch_dist checkpoint in the folder ``path``, as PyTorch's reader returns it.

    Raises: CheckpointError naming the refused global, or what is wrong with the file.
    """
    file = Path(path) / ".metadata"
    try:
        with file.open("rb") as stream:
            metadata = _Unpickler(stream).load()
    except _Refused as refused:
        raise CheckpointError(f"{file} is not read: {refused}") from None
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no .metadata") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise CheckpointError(f"{path} has a damaged .metadata ({type(error).__name__}: {error})") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path} has a damaged .metadata (it holds a {type(metadata).__name__})")
    return metadata


_STORAGES = "Float Double Half BFloat16 Long Int Short Char Byte Bool Untyped ComplexFloat ComplexDouble".split()
_DTYPES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu "
    "int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool complex64 complex128 strided"
).split()
_CHECKPOINT = "torch.distributed.checkpoint"

ALLOWED: frozenset[str] = frozenset(
    [
        *(f"builtins.{name}" for name in "set frozenset bytearray complex slice range int float str bool".split()),
        *("collections.OrderedDict", "collections.defaultdict", "argparse.Namespace", "types.SimpleNamespace"),
        *("_codecs.encode", "copyreg._reconstructor", "builtins.object", "_io.BytesIO", "io.BytesIO"),
        *(f"pathlib.{name}" for name in "PosixPath PurePosixPath Path".split()),
        *(f"pathlib._local.{name}" for name in "PosixPath PurePosixPath Path".split()),
        *("datetime.timedelta", "datetime.datetime", "signal.Signals"),
        # tensors
        *(f"torch._utils.{name}" for name in "_rebuild_tensor_v2 _rebuild_tensor _rebuild_parameter".split()),
        *("torch.Size", "torch.device", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.Generator"),
        *("torch.serialization._get_layout", "torch._tensor._rebuild_from_type_v2"),
        *("torch.storage.UntypedStorage", "torch.storage.TypedStorage", "torch.storage._load_from_bytes"),
        *(f"torch.{name}Storage" for name in _STORAGES),
        *(f"torch.{name}" for name in _DTYPES),
        # random states
        *(f"numpy.{name}" for name in ["ndarray", "dtype"]),
        *(f"numpy.{core}.multiarray.{name}" for core in ["core", "_core"] for name in ["_reconstruct", "scalar"]),
        *("numpy.dtypes.UInt32DType", "numpy.dtypes.Float64DType", "numpy.dtypes.Int64DType"),
        # .metadata of torch's distributed checkpoints
        *(f"{_CHECKPOINT}.metadata.{name}" for name in "Metadata MetadataIndex StorageMeta TensorProperties".split()),
        *(f"{_CHECKPOINT}.metadata.{name}" for name in "TensorStorageMetadata BytesStorageMetadata".split()),
        *(f"{_CHECKPOINT}.metadata.{name}" for name in "ChunkStorageMetadata _MEM_FORMAT_ENCODING".split()),
        *(f"{_CHECKPOINT}.filesystem.{name}" for name in "_StorageInfo _StoragePrefix".split()),
        *(f"{_CHECKPOINT}.planner.{name}" for name in "SavePlan WriteItem WriteItemType TensorWriteData".split()),
    ]
)
"""The globals that a Megatron checkpoint needs, besides what stands in `_STOOD_IN_FOR`."""

# A lab's arguments name enumerations and small classes of its own Megatron, of any version.
_STOOD_IN_FOR = "megatron."


class _Refused(pickle.UnpicklingError):
    """A global that is not in `ALLOWED`."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module
        if f"{module}.{name}" == "builtins.getattr":
            return _enumeration_member  # how some versions of Python pickle the members of an enumeration
        if f"{module}.{name}" == "torch.storage._load_from_bytes":
            return _load_from_bytes
        if f"{module}.{name}" in ALLOWED:
            return super().find_class(module, name)
        if module.startswith(_STOOD_IN_FOR) and "." not in name:
            return _megatron_class(module, name)
        raise _Refused(
            f"its pickle asks for {module}.{name}, which no Megatron checkpoint needs; if you trust its writer, save "
            "it again without"
        )


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


def _load_from_bytes(data: bytes) -> Any:
    """A storage within a pickle that torch did not write itself."""
    import io

    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


# What torch.load wants of a "pickle module".
_RESTRICTED = types.SimpleNamespace(
    Unpickler=_Unpickler, load=_load, UnpicklingError=pickle.UnpicklingError, __name__="restricted pickle"
)


def _enumeration_member(cls: Any, name: str) -> Any:
    """``getattr``, for members of enumerations only."""
    if isinstance(cls, type) and issubclass(cls, enum.Enum):
        return cls[name]
    if isinstance(cls, type) and issubclass(cls, StandIn):
        return cls(name)
    raise _Refused(f"its pickle reads the attribute {name!r} of {cls!r}, which no Megatron checkpoint needs")


class StandIn:
    """An object of a class that is not looked up: what it was made from, and its state, and nothing that runs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.made_from = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return hash(type(self).__qualname__)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"{type(self).__module__}.{type(self).__qualname__}{self.made_from}"


def _megatron_class(module: str, name: str) -> type:
    """The enumeration of that name, where Megatron Core has it; else a stand-in."""
    if module.startswith("megatron.core."):
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            found = None
        if isinstance(found, type) and issubclass(found, enum.Enum):
            return found
    return type(name, (StandIn,), {"__module__": module, "__qualname__": name})
