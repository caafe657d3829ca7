# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Read pickles that others wrote: only the globals that a Megatron checkpoint needs; any other is refused by name.

A pickle may name any function of any installed package and call it, and may change any object that it names.
Checkpoints travel between labs, so this module is the only reader of pickles in the package: it looks up nothing but
`ALLOWED`, and a pickle can fill only the objects that it has made itself.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import io
import pickle
import tarfile
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.metadata import Metadata

from megatron_selfdistill.errors import CheckpointError


def load_pickled(path: Path, *, mmap: bool = False) -> Any:
    """Return what ``torch.load(path)`` returns on the CPU, refusing every global that is not in `ALLOWED`.

    ``mmap``: leave tensors on disk until they are touched.  Classes of ``megatron.*`` come back as themselves where
    they are enumerations that import here, else as inert objects that hold their state.
    Raises: CheckpointError naming the refused global, or what is wrong with the file.
    """
    try:
        with Path(path).open("rb") as stream:
            _refuse_other_formats(stream)
        return _torch_load(path, mmap=mmap or None)
    except _Refused as refused:
        raise CheckpointError(f"{path} is not read: {refused}") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise CheckpointError(f"{path} is damaged or no PyTorch file ({type(error).__name__}: {error})") from error


def loads_pickled(data: bytes | io.BytesIO, name: str) -> Any:
    """Return what ``data`` holds, a file of ``torch.save`` or a bare pickle, under the rules of `load_pickled`.

    ``name``: of the entry in the checkpoint, for messages.
    Raises: CheckpointError naming the refused global, or what is wrong with the data.
    """
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        if not _refuse_other_formats(stream):
            return _Unpickler(stream).load()
        return _torch_load(stream)
    except _Refused as refused:
        raise CheckpointError(f"{name} is not read: {refused}") from None
    except Exception as error:
        raise CheckpointError(f"{name} is damaged ({type(error).__name__}: {error})") from error


def load_metadata(path: Path) -> Metadata:
    """Return the ``.metadata`` of the torch_dist checkpoint in the directory ``path``, as PyTorch's reader does.

    Raises: CheckpointError naming the refused global, or what is wrong with the file; its text begins with ``path``.
    """
    try:
        with (Path(path) / ".metadata").open("rb") as stream:
            metadata = _Unpickler(stream).load()
    except _Refused as refused:
        raise CheckpointError(f"{path} has a .metadata that is not read: {refused}") from None
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no .metadata") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise CheckpointError(f"{path} has a damaged .metadata ({type(error).__name__}: {error})") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path} has a damaged .metadata (it holds a {type(metadata).__name__})")
    for place in metadata.storage_data.values():
        name = getattr(place, "relative_path", None)
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise CheckpointError(f"{path} has a .metadata that names the file {name!r}, expected one in its directory")
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
        *("builtins.object", "_io.BytesIO", "io.BytesIO"),
        *(f"pathlib.{name}" for name in "PosixPath PurePosixPath Path".split()),
        *("datetime.timedelta", "datetime.datetime", "signal.Signals"),
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
"""The globals that a Megatron checkpoint needs, besides `_REPLACED` and what `_STOOD_IN_FOR` and `_RECIPES` say."""

# A lab's arguments name enumerations and small classes of its own Megatron, of any version.
_STOOD_IN_FOR = "megatron."
# Transformer Engine's FP8 statistics name the recipe that they belong to: enumerations, and classes of numbers.
_RECIPES = "transformer_engine.common.recipe"

_ADVICE = "which no Megatron checkpoint needs; if you trust its writer, save it again without"


class _Refused(pickle.UnpicklingError):
    """Something that a pickle asks for and does not get."""


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


# Objects that a pickle may fill after it has made them: plain holders of data, none of which is shared.
_FILLED_BY_ATTRIBUTES = (
    *(argparse.Namespace, types.SimpleNamespace, OrderedDict),
    *(dcp.Metadata, dcp.MetadataIndex, dcp.StorageMeta, dcp.TensorStorageMetadata, dcp.BytesStorageMetadata),
    *(dcp.ChunkStorageMetadata, filesystem._StorageInfo, filesystem._StoragePrefix),
    *(planner.SavePlan, planner.WriteItem, planner.TensorWriteData),
)
_FILLED_BY_THEIR_OWN_METHOD: tuple[type, ...] = (
    torch.Tensor,
    np.ndarray,
    np.dtype,
    io.BytesIO,
    dcp.TensorProperties,
    StandIn,
)


# Names in the descriptions of tensors and arrays; as functions they take pointers and memory.
_NAMED_BUT_NOT_CALLED = (np.ndarray, torch.UntypedStorage, torch.TypedStorage)

# Of the same modules in Python 2, whose names protocols 0 to 2 use, and from 3.13 on.
_OTHER_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg", "pathlib._local": "pathlib"}


_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class _Unpickler(_PythonUnpickler):
    """Python's own unpickler in Python, whose operations can be restricted one by one, unlike those of the C one."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(_PythonUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Return a global that a checkpoint needs; refuse any other by its name."""
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
        raise _Refused(f"its pickle asks for {wanted}, {_ADVICE}")

    def get_extension(self, code: int) -> None:
        """Refuse the codes of ``copyreg``, which name globals without a name."""
        raise _Refused(f"its pickle asks for extension {code} of copyreg, {_ADVICE}")

    def load_reduce(self) -> None:
        """Call a global to make an object."""
        self._require_maker(self.stack[-2])
        super().load_reduce()

    def load_newobj(self) -> None:
        """Make an object of a class without calling its ``__init__``."""
        self._require_maker(self.stack[-2])
        super().load_newobj()

    def load_newobj_ex(self) -> None:
        """Refuse arguments by name, which nothing in a checkpoint needs."""
        raise _Refused(f"its pickle makes {_shown(self.stack[-3])} with arguments by name, {_ADVICE}")

    def load_inst(self) -> None:
        """Refuse the classes of Python 2."""
        raise _Refused(f"its pickle makes an object as Python 2 did, {_ADVICE}")

    load_obj = load_inst

    def load_build(self) -> None:
        """Fill an object that the pickle has made: never a class, a function, a module or a member of an enumeration,
        and never by assigning attributes, which may be properties."""
        state, filled = self.stack.pop(), self.stack[-1]
        kind = type(filled)
        if isinstance(filled, np.dtype):
            _require_plain(state)
        if isinstance(filled, _FILLED_BY_THEIR_OWN_METHOD) or _is_recipe(kind):
            own = getattr(filled, "__setstate__", None)
            if own is not None:
                own(state)
                return
        elif kind not in _FILLED_BY_ATTRIBUTES:
            raise _Refused(f"its pickle fills {_shown(filled)}, {_ADVICE}")
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise _Refused(f"its pickle fills {_shown(filled)} with a {type(state).__name__}, expected a dict of names")
        vars(filled).update(state)

    def load_setitem(self) -> None:
        """Add one item to a dict."""
        self._require(self.stack[-3], dict)
        super().load_setitem()

    def load_setitems(self) -> None:
        """Add items to a dict."""
        self._require(self.metastack[-1][-1], dict)
        super().load_setitems()

    def load_append(self) -> None:
        """Append one item to a list."""
        self._require(self.stack[-2], list)
        super().load_append()

    def load_appends(self) -> None:
        """Append items to a list."""
        self._require(self.metastack[-1][-1], list)
        super().load_appends()

    def load_additems(self) -> None:
        """Add items to a set."""
        self._require(self.metastack[-1][-1], set)
        super().load_additems()

    def load_persid(self) -> None:
        """Refuse names of storages as text, which torch does not write."""
        raise _Refused(f"its pickle names a storage by a text, {_ADVICE}")

    def load_binpersid(self) -> None:
        """Load a tensor's storage; torch's other persistent objects compare and write source code."""
        name = self.stack[-1]
        if not isinstance(name, tuple) or not name or name[0] not in ("storage", b"storage"):
            raise _Refused(f"its pickle names {name!r}, expected the storage of a tensor")
        super().load_binpersid()

    def _require_maker(self, maker: Any) -> None:
        is_global = isinstance(maker, type | types.FunctionType | types.BuiltinFunctionType)
        if not is_global or (isinstance(maker, type) and issubclass(maker, _NAMED_BUT_NOT_CALLED)):
            raise _Refused(f"its pickle calls {_shown(maker)}, {_ADVICE}")

    def _require(self, filled: Any, kind: type) -> None:
        if not isinstance(filled, kind):
            raise _Refused(f"its pickle adds items to {_shown(filled)}, expected a {kind.__name__}")


for (
    _operation
) in "reduce newobj newobj_ex inst obj build setitem setitems append appends additems persid binpersid".split():
    _Unpickler.dispatch[getattr(pickle, _operation.upper())[0]] = getattr(_Unpickler, f"load_{_operation}")


def _torch_load(file: Any, **options: Any) -> Any:
    return torch.load(file, map_location="cpu", weights_only=False, pickle_module=_RESTRICTED, **options)


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


# What torch.load wants of a "pickle module".
_RESTRICTED = types.SimpleNamespace(
    Unpickler=_Unpickler, load=_load, UnpicklingError=pickle.UnpicklingError, __name__="restricted pickle"
)


def _refuse_other_formats(stream: Any) -> bool:
    """Raise `_Refused` for what ``torch.load`` would read by other means than an unpickler; return whether the file is
    one of ``torch.save``, of today or of before 1.6, and not a bare pickle.  Torch's own functions tell the formats."""
    start = stream.tell()
    try:
        if torch.serialization._is_zipfile(stream):
            with torch.serialization._open_zipfile_reader(stream) as archive:
                if torch.serialization._is_torchscript_zip(archive):
                    raise _Refused("it is a TorchScript program, expected a file of torch.save")
            return True
        if _is_tar(stream):
            raise _Refused("it is a tar archive of the first versions of PyTorch, expected a file of torch.save")
        stream.seek(start)
        return _LEGACY_MAGIC in stream.read(32)
    finally:
        stream.seek(start)


_LEGACY_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")


def _is_tar(stream: Any) -> bool:
    try:
        with tarfile.open(fileobj=stream, mode="r:"):
            return True
    except tarfile.TarError:
        return False


def _shown(value: Any) -> str:
    """Name a value of a pickle in a message."""
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__} itself"
    return f"a {type(value).__module__}.{type(value).__qualname__}"


# -- globals that a pickle gets in a narrower form ---------------------------------------------------------------


def _member(cls: Any, name: str) -> Any:
    """Return a member of an enumeration: all that ``getattr`` is needed for, by some versions of Python."""
    if isinstance(cls, type) and issubclass(cls, enum.Enum):
        return cls[name]
    if isinstance(cls, type) and issubclass(cls, StandIn):
        return cls(name)
    raise _Refused(f"its pickle reads the attribute {name!r} of {cls!r}, {_ADVICE}")


def _object_of(cls: Any, base: Any, state: Any) -> Any:
    """Return a new object without state, as ``copyreg._reconstructor`` makes those of protocols 0 and 1."""
    known = cls in _FILLED_BY_ATTRIBUTES or (isinstance(cls, type) and issubclass(cls, StandIn))
    if base is not object or not known:
        raise _Refused(f"its pickle makes a {_shown(cls)} from a {_shown(base)}, {_ADVICE}")
    return object.__new__(cls)


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Return bytes, which protocols 0 to 2 spell as a text."""
    if encoding not in ("latin1", "latin-1"):
        raise _Refused(f"its pickle encodes a text as {encoding!r}, expected latin1")
    return text.encode("latin1")


def _dtype(name: Any, align: bool = False, copy: bool = True) -> np.dtype[Any]:
    """Return a numeric data type of NumPy that nobody else has: the pickle fills it.  Others may hold pointers."""
    found = np.dtype(name, copy=True)
    if found.kind not in "biufc":
        raise _Refused(f"its pickle has an array of {found}, expected numbers")
    return found


def _require_plain(state: Any) -> None:
    """Raise `_Refused` unless the state of a data type says no more than its byte order."""
    if not isinstance(state, tuple) or len(state) < 8 or state[1] not in ("<", ">", "=", "|"):
        raise _Refused("its pickle fills a data type of NumPy with something else than a byte order")
    if state[2:5] != (None, None, None) or tuple(state[5:8]) != (-1, -1, 0):
        raise _Refused("its pickle fills a data type of NumPy with fields, expected numbers")


def _storage_of(data: bytes) -> Any:
    """Return a storage within a pickle that torch did not write itself."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor_without_attributes(rebuild: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """Return a tensor to which somebody had given attributes in Python; they are left where they are."""
    if getattr(rebuild, "__module__", "") != "torch._utils" or kind not in (torch.Tensor, torch.nn.Parameter):
        raise _Refused(f"its pickle makes a {_shown(kind)} by {_shown(rebuild)}, {_ADVICE}")
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
    """Return the enumeration of that name, where Megatron Core has it; else a stand-in."""
    if module.startswith("megatron.core."):
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            found = None
        if isinstance(found, type) and issubclass(found, enum.Enum):
            return found
    return type(name, (StandIn,), {"__module__": module, "__qualname__": name})


def _recipe(name: str) -> type | None:
    """Return an enumeration or a dataclass of Transformer Engine's recipes, where it is installed."""
    try:
        found = getattr(importlib.import_module(_RECIPES), name, None)
    except ImportError:
        return None
    is_data = isinstance(found, type) and (issubclass(found, enum.Enum) or hasattr(found, "__dataclass_fields__"))
    return found if is_data and found.__module__ == _RECIPES else None


def _is_recipe(kind: type) -> bool:
    return kind.__module__ == _RECIPES and not issubclass(kind, enum.Enum)
