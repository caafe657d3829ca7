# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Read the pickles of a checkpoint with the globals that a Megatron checkpoint needs, and refuse any other by name.

A pickle can name and call any function of any installed package, and can change any object that it names.  Checkpoints
travel between labs, so this module is the only reader of pickles in the package.  It looks up only the globals that
`pickle_globals` allows, and a pickle can fill only the objects that the pickle itself has made.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_selfdistill.checkpoint.formats.pickle_globals import (
    ADVICE,
    FILLED_BY_ATTRIBUTES,
    FILLED_BY_THEIR_OWN_METHOD,
    NAMED_BUT_NOT_CALLED,
    RefusedPickle,
    allowed_global,
    described,
    is_recipe,
    require_plain_dtype,
)
from megatron_selfdistill.errors import CheckpointError


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
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no .metadata") from None
    except Exception as error:  # a corrupt pickle raises almost anything
        raise CheckpointError(f"{path} has a corrupt .metadata ({type(error).__name__}: {error})") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path} has a corrupt .metadata (it holds a {type(metadata).__name__})")
    for place in metadata.storage_data.values():
        name = getattr(place, "relative_path", None)
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise CheckpointError(f"{path} has a .metadata that names the file {name!r}, expected one in its directory")
    return metadata


_PythonUnpickler: Any = pickle._Unpickler


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
        """Call a global that makes an object."""
        self._require_maker(self.stack[-2])
        super().load_reduce()

    def load_newobj(self) -> None:
        """Make an object of a class without calling its ``__init__``."""
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


_OPERATIONS = "reduce newobj newobj_ex inst obj build setitem setitems append appends additems persid binpersid".split()
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


_LEGACY_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")


def _is_tar(stream: Any) -> bool:
    try:
        with tarfile.open(fileobj=stream, mode="r:"):
            return True
    except tarfile.TarError:
        return False
