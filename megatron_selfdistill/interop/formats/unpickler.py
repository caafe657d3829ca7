# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Read the pickles of a checkpoint with the globals that a Megatron checkpoint needs, and refuse any other by name.

A pickle can name and call any function of any installed package, and can change any object that it names.  Checkpoints
travel between labs, so this module is the only reader of pickles in the package.  It looks up only the globals that
`allowed_global` allows, and a pickle can fill only the objects that the pickle itself has made.

``torch.load(weights_only=True)`` with Megatron's ``SAFE_GLOBALS`` cannot take its place, as torch 2.13 shows:

- It changes the value of an enumeration's member, and makes arrays of objects, storages and arrays over memory, which
  are attacks of ``test_unpickler.py``.  With the types of random states it also fills a data type that turns numbers
  into pointers.
- It reads protocol 2 alone, and the ``.metadata`` of every torch_dist checkpoint has protocol 4.
- It refuses the classes of a lab's own Megatron, which this module turns into inert objects (`StandIn`).
"""

from __future__ import annotations

import argparse
import enum
import importlib
import io
import pickle
import signal
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
# Types whose new objects a pickle may fill: plain holders of data that no other code shares.
FILLED_BY_ATTRIBUTES = (
    *(argparse.Namespace, types.SimpleNamespace, OrderedDict),
    *(dcp.Metadata, dcp.MetadataIndex, dcp.StorageMeta, dcp.TensorStorageMetadata, dcp.BytesStorageMetadata),
    *(dcp.ChunkStorageMetadata, filesystem._StorageInfo, filesystem._StoragePrefix),
    *(planner.SavePlan, planner.WriteItem, planner.TensorWriteData),
)
# Types that the descriptions of tensors and arrays name; a call of them would take pointers and memory.
NAMED_BUT_NOT_CALLED = (np.ndarray, torch.UntypedStorage, torch.TypedStorage)
# Names of the same modules in Python 2, which protocols 0 to 2 use, and in Python 3.13 and newer.
_OTHER_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg", "pathlib._local": "pathlib"}
_PythonUnpickler: Any = pickle._Unpickler
_OPERATIONS = "reduce newobj newobj_ex inst obj build setitem setitems append appends additems persid binpersid".split()
_LEGACY_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")


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


FILLED_BY_THEIR_OWN_METHOD: tuple[type, ...] = (
    torch.Tensor,
    np.ndarray,
    np.dtype,
    io.BytesIO,
    dcp.TensorProperties,
    StandIn,
)


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
    "megatron.core.safe_globals.safe_load_from_bytes": _storage_of,  # Megatron puts it in the place of torch's function
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
    """Return the enumeration or dataclass ``name`` of Transformer Engine's recipes; None if there is none.

    Raises: RefusedPickle where Transformer Engine is not installed.
    """
    try:
        found = getattr(importlib.import_module(_RECIPES), name, None)
    except ImportError:
        why = "which Transformer Engine has: read it in an environment with Transformer Engine"
        raise RefusedPickle(f"its pickle asks for {_RECIPES}.{name}, {why}") from None
    is_data = isinstance(found, type) and (issubclass(found, enum.Enum) or hasattr(found, "__dataclass_fields__"))
    return found if is_data and found.__module__ == _RECIPES else None


def is_recipe(kind: type) -> bool:
    """Return whether ``kind`` is a dataclass of Transformer Engine's recipes."""
    return kind.__module__ == _RECIPES and not issubclass(kind, enum.Enum)


def load_pickled(path: Path, *, mmap: bool = False) -> Any:
    """Return the contents of a file of ``torch.save``, on the CPU; refuse every global that is not allowed.

    ``mmap``: leave tensors on disk until the caller touches them.  Enumerations of Megatron Core come back as
    themselves; other classes of ``megatron.*`` come back as inert objects that hold their state (`StandIn`).

    Raises: CheckpointError with the name of the refused global, or with the fault of the file.
    """
    try:
        with Path(path).open("rb") as stream:
            _refuse_other_formats(stream)
        return _torch_load(path, mmap=mmap or None)
    except RefusedPickle as refused:
        raise CheckpointError(f"{path} was refused: {refused}") from None
    except Exception as error:  # a corrupt pickle raises almost anything
        raise CheckpointError(f"{path} is corrupt or no PyTorch file ({type(error).__name__}: {error})") from error


def loads_pickled(data: bytes | io.BytesIO, name: str) -> Any:
    """Return the contents of ``data``, a file of ``torch.save`` or a bare pickle, by the rules of `load_pickled`.

    ``name``: the name of the entry in the checkpoint, for messages.

    Raises: CheckpointError with the name of the refused global, or with the fault of the data.
    """
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        if not _refuse_other_formats(stream):
            return _Unpickler(stream).load()
        return _torch_load(stream)
    except RefusedPickle as refused:
        raise CheckpointError(f"{name} was refused: {refused}") from None
    except Exception as error:
        raise CheckpointError(f"{name} is corrupt ({type(error).__name__}: {error})") from error


def load_metadata(path: Path) -> Metadata:
    """Return the ``.metadata`` of the torch_dist checkpoint in the directory ``path``.

    Raises: CheckpointError with the name of the refused global, or with the fault of the file; the message begins with
    ``path``.
    """
    try:
        with (Path(path) / ".metadata").open("rb") as stream:
            metadata = _Unpickler(stream).load()
    except RefusedPickle as refused:
        raise CheckpointError(f"{path} has a .metadata that was refused: {refused}") from None
    except Exception as error:  # a corrupt pickle raises almost anything
        raise CheckpointError(f"{path} has a corrupt .metadata ({type(error).__name__}: {error})") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path} has a corrupt .metadata (it holds a {type(metadata).__name__})")
    for place in metadata.storage_data.values():
        name = getattr(place, "relative_path", None)
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise CheckpointError(f"{path} has a .metadata that names the file {name!r}, expected one in its directory")
    return metadata


class _Unpickler(_PythonUnpickler):
    """Python's unpickler in Python, with restricted operations; the unpickler in C allows no such restriction."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(_PythonUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Return a global that a checkpoint needs; refuse any other by its name."""
        return allowed_global(module, name)

    def get_extension(self, code: int) -> None:
        """Refuse the codes of ``copyreg``, which stand for globals without their names."""
        raise RefusedPickle(f"its pickle asks for extension {code} of copyreg, {ADVICE}")

    def load_reduce(self) -> None:
        self._require_maker(self.stack[-2])
        super().load_reduce()

    def load_newobj(self) -> None:
        self._require_maker(self.stack[-2])
        super().load_newobj()

    def load_newobj_ex(self) -> None:
        """Refuse keyword arguments, which no object of a checkpoint needs."""
        raise RefusedPickle(f"its pickle makes {described(self.stack[-3])} with keyword arguments, {ADVICE}")

    def load_inst(self) -> None:
        """Refuse the way in which Python 2 makes objects of its classes."""
        raise RefusedPickle(f"its pickle makes an object as Python 2 did, {ADVICE}")

    load_obj = load_inst

    def load_build(self) -> None:
        """Fill an object that the pickle has made.

        The object is never a class, a function, a module or a member of an enumeration.  The state goes into the
        object's dictionary: an assignment to an attribute could call a property.
        """
        state, filled = self.stack.pop(), self.stack[-1]
        kind = type(filled)
        if isinstance(filled, np.dtype):
            require_plain_dtype(state)
        if isinstance(filled, FILLED_BY_THEIR_OWN_METHOD) or is_recipe(kind):
            own = getattr(filled, "__setstate__", None)
            if own is not None:
                own(state)
                return
        elif kind not in FILLED_BY_ATTRIBUTES:
            raise RefusedPickle(f"its pickle fills {described(filled)}, {ADVICE}")
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise RefusedPickle(
                f"its pickle fills {described(filled)} with a {type(state).__name__}, expected a dict of names"
            )
        vars(filled).update(state)

    def load_setitem(self) -> None:
        self._require(self.stack[-3], dict)
        super().load_setitem()

    def load_setitems(self) -> None:
        self._require(self.metastack[-1][-1], dict)
        super().load_setitems()

    def load_append(self) -> None:
        self._require(self.stack[-2], list)
        super().load_append()

    def load_appends(self) -> None:
        self._require(self.metastack[-1][-1], list)
        super().load_appends()

    def load_additems(self) -> None:
        self._require(self.metastack[-1][-1], set)
        super().load_additems()

    def load_persid(self) -> None:
        """Refuse a storage that a text names; torch does not write such names."""
        raise RefusedPickle(f"its pickle names a storage by a text, {ADVICE}")

    def load_binpersid(self) -> None:
        """Load the storage of a tensor; torch's other persistent objects hold source code."""
        name = self.stack[-1]
        if not isinstance(name, tuple) or not name or name[0] not in ("storage", b"storage"):
            raise RefusedPickle(f"its pickle names {name!r}, expected the storage of a tensor")
        super().load_binpersid()

    def _require_maker(self, maker: Any) -> None:
        is_global = isinstance(maker, type | types.FunctionType | types.BuiltinFunctionType)
        if not is_global or (isinstance(maker, type) and issubclass(maker, NAMED_BUT_NOT_CALLED)):
            raise RefusedPickle(f"its pickle calls {described(maker)}, {ADVICE}")

    def _require(self, filled: Any, kind: type) -> None:
        if not isinstance(filled, kind):
            raise RefusedPickle(f"its pickle adds items to {described(filled)}, expected a {kind.__name__}")


for _operation in _OPERATIONS:
    _Unpickler.dispatch[getattr(pickle, _operation.upper())[0]] = getattr(_Unpickler, f"load_{_operation}")


def _torch_load(file: Any, **options: Any) -> Any:
    return torch.load(file, map_location="cpu", weights_only=False, pickle_module=_RESTRICTED, **options)


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


# The interface that torch.load expects of a "pickle module".
_RESTRICTED = types.SimpleNamespace(
    Unpickler=_Unpickler, load=_load, UnpicklingError=pickle.UnpicklingError, __name__="restricted pickle"
)


def _refuse_other_formats(stream: Any) -> bool:
    """Return whether ``stream`` is a file of ``torch.save``, in the format of today or of before 1.6.

    Torch's own functions tell the formats apart.  A bare pickle gives False.

    Raises: RefusedPickle for a format that ``torch.load`` reads by other means than an unpickler.
    """
    start = stream.tell()
    try:
        if torch.serialization._is_zipfile(stream):
            with torch.serialization._open_zipfile_reader(stream) as archive:
                if torch.serialization._is_torchscript_zip(archive):
                    raise RefusedPickle("it is a TorchScript program, expected a file of torch.save")
            return True
        if _is_tar(stream):
            raise RefusedPickle("it is a tar archive of the first versions of PyTorch, expected a file of torch.save")
        stream.seek(start)
        return _LEGACY_MAGIC in stream.read(32)
    finally:
        stream.seek(start)


def _is_tar(stream: Any) -> bool:
    try:
        with tarfile.open(fileobj=stream, mode="r:"):
            return True
    except tarfile.TarError:
        return False
