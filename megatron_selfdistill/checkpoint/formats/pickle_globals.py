# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The globals that the pickles of a checkpoint may name, and what the restricted unpickler gives for each of them.

`allowed_global` looks up the globals of `ALLOWED`.  It returns a narrower function for the globals in `_REPLACED` and
an inert `StandIn` for a class of Megatron, and refuses everything else.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import io
import pickle
import signal
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint import metadata as dcp

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
        *("builtins.object", "_io.BytesIO", "io.BytesIO"),
        *(f"pathlib.{name}" for name in "PosixPath PurePosixPath Path".split()),
        *("datetime.timedelta", "datetime.datetime"),
        # The exit signal of Megatron-LM's arguments: some versions of Python store it by its name.
        *("signal.Signals", *(f"signal.{name}" for name in signal.Signals.__members__)),
        # tensors
        *(f"torch._utils.{name}" for name in "_rebuild_tensor_v2 _rebuild_tensor _rebuild_parameter".split()),
        *("torch.Size", "torch.device", "torch.Tensor", "torch.nn.parameter.Parameter"),
        *("torch.serialization._get_layout",),
        *("torch.storage.UntypedStorage", "torch.storage.TypedStorage"),
        *(f"torch.{name}Storage" for name in _STORAGES),
        *(f"torch.{name}" for name in _DTYPES),
        # random states
        "numpy.ndarray",
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
"""The globals that a Megatron checkpoint needs, besides the keys of `_REPLACED`, the classes of modules that begin with
`_STOOD_IN_FOR`, and the recipes of `_RECIPES`."""

# The arguments of a lab name enumerations and small classes of the lab's own version of Megatron.
_STOOD_IN_FOR = "megatron."
# The FP8 statistics of Transformer Engine name their recipe: enumerations, and classes of numbers.
_RECIPES = "transformer_engine.common.recipe"

ADVICE = "which no Megatron checkpoint needs; if you trust its writer, save it again without that object"


class RefusedPickle(pickle.UnpicklingError):
    """A request of a pickle that the restricted unpickler refuses; the message names the request."""


class StandIn:
    """An inert object in place of an object of a class that is not imported: its arguments and its state, as data."""

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


# Types whose new objects a pickle may fill: plain holders of data that no other code shares.
FILLED_BY_ATTRIBUTES = (
    *(argparse.Namespace, types.SimpleNamespace, OrderedDict),
    *(dcp.Metadata, dcp.MetadataIndex, dcp.StorageMeta, dcp.TensorStorageMetadata, dcp.BytesStorageMetadata),
    *(dcp.ChunkStorageMetadata, filesystem._StorageInfo, filesystem._StoragePrefix),
    *(planner.SavePlan, planner.WriteItem, planner.TensorWriteData),
)
FILLED_BY_THEIR_OWN_METHOD: tuple[type, ...] = (
    torch.Tensor,
    np.ndarray,
    np.dtype,
    io.BytesIO,
    dcp.TensorProperties,
    StandIn,
)


# Types that the descriptions of tensors and arrays name; a call of them would take pointers and memory.
NAMED_BUT_NOT_CALLED = (np.ndarray, torch.UntypedStorage, torch.TypedStorage)

# Names of the same modules in Python 2, which protocols 0 to 2 use, and in Python 3.13 and newer.
_OTHER_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg", "pathlib._local": "pathlib"}


def allowed_global(module: str, name: str) -> Any:
    """Return the object that a pickle gets for the global ``module.name``.

    Raises: RefusedPickle with the name of the global where no Megatron checkpoint needs it.
    """
    module = _OTHER_NAMES.get(module, module)
    wanted = f"{module}.{name}"
    if wanted in _REPLACED:
        return _REPLACED[wanted]
    if wanted in ALLOWED:
        return getattr(importlib.import_module(module), name)
    if module.startswith(_STOOD_IN_FOR) and name.isidentifier():
        return _megatron_class(module, name)
    if module == _RECIPES and name.isidentifier() and (recipe := _recipe(name)) is not None:
        return recipe
    raise RefusedPickle(f"its pickle asks for {wanted}, {ADVICE}")


def described(value: Any) -> str:
    """Return the name of ``value``, an object of a pickle, for a message."""
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__} itself"
    return f"a {type(value).__module__}.{type(value).__qualname__}"


def _member(cls: Any, name: str) -> Any:
    """Return a member of an enumeration, the only use of ``getattr`` in the pickles of some versions of Python."""
    if isinstance(cls, type) and issubclass(cls, enum.Enum):
        return cls[name]
    if isinstance(cls, type) and issubclass(cls, StandIn):
        return cls(name)
    raise RefusedPickle(f"its pickle reads the attribute {name!r} of {cls!r}, {ADVICE}")


def _object_of(cls: Any, base: Any, state: Any) -> Any:
    """Return a new object without state, as ``copyreg._reconstructor`` does for protocols 0 and 1."""
    known = cls in FILLED_BY_ATTRIBUTES or (isinstance(cls, type) and issubclass(cls, StandIn))
    if base is not object or not known:
        raise RefusedPickle(f"its pickle makes a {described(cls)} from a {described(base)}, {ADVICE}")
    return object.__new__(cls)


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Return the bytes that protocols 0 to 2 spell as ``text``."""
    if encoding not in ("latin1", "latin-1"):
        raise RefusedPickle(f"its pickle encodes a text as {encoding!r}, expected latin1")
    return text.encode("latin1")


def _dtype(name: Any, align: bool = False, copy: bool = True) -> np.dtype[Any]:
    """Return a new numeric data type of NumPy for the pickle to fill; other data types may hold pointers."""
    found: np.dtype[Any] = np.dtype(name, copy=True)
    if found.kind not in "biufc":
        raise RefusedPickle(f"its pickle has an array of {found}, expected numbers")
    return found


def require_plain_dtype(state: Any) -> None:
    """Raise `RefusedPickle` unless the state of a data type holds nothing but its byte order."""
    if not isinstance(state, tuple) or len(state) < 8 or state[1] not in ("<", ">", "=", "|"):
        raise RefusedPickle("its pickle fills a data type of NumPy with more than a byte order, expected plain numbers")
    if state[2:5] != (None, None, None) or tuple(state[5:8]) != (-1, -1, 0):
        raise RefusedPickle("its pickle fills a data type of NumPy with fields, expected numbers")


def _storage_of(data: bytes) -> Any:
    """Return the storage of a tensor that another pickle than ``torch.save``'s holds as bytes."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor_without_attributes(rebuild: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """Return a tensor without the Python attributes that its writer had given it."""
    if getattr(rebuild, "__module__", "") != "torch._utils" or kind not in (torch.Tensor, torch.nn.Parameter):
        raise RefusedPickle(f"its pickle makes a {described(kind)} by {described(rebuild)}, {ADVICE}")
    tensor = rebuild(*arguments)
    return tensor if kind is torch.Tensor else torch.nn.Parameter(tensor, requires_grad=tensor.requires_grad)


_REPLACED: dict[str, Callable[..., Any]] = {
    "builtins.getattr": _member,
    "copyreg._reconstructor": _object_of,
    "_codecs.encode": _latin1,
    "numpy.dtype": _dtype,
    "torch.storage._load_from_bytes": _storage_of,
    "torch._tensor._rebuild_from_type_v2": _tensor_without_attributes,
}


def _megatron_class(module: str, name: str) -> type:
    """Return the enumeration ``name`` of ``module`` where Megatron Core has it, else a new subclass of `StandIn`."""
    if module.startswith("megatron.core."):
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            found = None
        if isinstance(found, type) and issubclass(found, enum.Enum):
            return found
    return type(name, (StandIn,), {"__module__": module, "__qualname__": name})


def _recipe(name: str) -> type | None:
    """Return the enumeration or dataclass ``name`` of Transformer Engine's recipes; None where there is none."""
    try:
        found = getattr(importlib.import_module(_RECIPES), name, None)
    except ImportError:
        return None
    is_data = isinstance(found, type) and (issubclass(found, enum.Enum) or hasattr(found, "__dataclass_fields__"))
    return found if is_data and found.__module__ == _RECIPES else None


def is_recipe(kind: type) -> bool:
    """Return whether ``kind`` is a dataclass of Transformer Engine's recipes."""
    return kind.__module__ == _RECIPES and not issubclass(kind, enum.Enum)
