# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Foreign pickles: what Megatron's checkpoints hold comes back, and nothing else is ever looked up."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import io
import os
import pickle
import random
import signal
import sys
import tarfile
import types
import zipfile
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch

from megatron_selfdistill.compat import cpu  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.enums import ModelType
from megatron.core.transformer.enums import AttnBackend

from megatron_selfdistill.checkpoint.formats.unpickler import load_metadata, load_pickled, loads_pickled
from megatron_selfdistill.errors import CheckpointError


def test_what_megatron_stores_comes_back(tmp_path):
    enums = {"model_type": ModelType.encoder_or_decoder, "attention_backend": AttnBackend.auto}
    others = {"exit_signal": signal.SIGTERM, "data_cache_path": Path("cache"), "params_dtype": torch.bfloat16}
    random_states = {"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state()}
    random_states |= {"scalar": np.float64(2.5), "big": np.arange(3, dtype=">i8")}
    random_states |= {"torch_rng_state": torch.get_rng_state(), "rng_tracker_states": {"a": torch.get_rng_state()}}
    state = {
        "args": argparse.Namespace(num_layers=4, **enums, **others),
        "model": {"weight": torch.nn.Parameter(torch.arange(6.0).view(2, 3)), "half": torch.ones(2).bfloat16()},
        "rng_state": [random_states],
    }
    torch.save(state, tmp_path / "state.pt")
    for mmap in (False, True):
        loaded = load_pickled(tmp_path / "state.pt", mmap=mmap)
        assert loaded["args"] == state["args"]
        assert torch.equal(loaded["model"]["weight"], state["model"]["weight"])
        found = loaded["rng_state"][0]
        assert np.array_equal(found["np_rng_state"][1], random_states["np_rng_state"][1])
        assert found["random_rng_state"] == random_states["random_rng_state"]
        assert found["scalar"] == 2.5 and np.array_equal(found["big"], [0, 1, 2])
        np.random.set_state(found["np_rng_state"])
        assert type(pickle.loads(pickle.dumps(found["big"]))) is np.ndarray
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_pickled(tmp_path / "old.pt")["model"]["weight"], state["model"]["weight"])


class Calls:
    """A pickle that calls a function when it is read."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


CALLS = [
    (os.system, ("touch {mark}",), "posix.system"),
    (eval, ("open('{mark}', 'w')",), "eval"),
    (getattr, (argparse.Namespace, "__init__"), "getattr"),
    (__import__, ("os",), "__import__"),
    (torch.load, ("{mark}",), "torch.serialization.load"),
]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_refused_global_is_named_and_not_called(tmp_path, zipped):
    mark = tmp_path / "executed"
    for function, arguments, name in CALLS:
        given = tuple(a.format(mark=mark) if isinstance(a, str) else a for a in arguments)
        state = {"args": Calls(function, *given)}
        torch.save(state, tmp_path / "state.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=rf"state.pt was refused: .*{name}"):
            load_pickled(tmp_path / "state.pt")
        (tmp_path / ".metadata").write_bytes(pickle.dumps(state))
        with pytest.raises(CheckpointError, match=rf"a .metadata that was refused: .*{name}"):
            load_metadata(tmp_path)
        assert not mark.exists()


# A pickle that is written by hand: what no object's __reduce__ can ask for.


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def plain(value: object) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


SIZE = named("torch", "Size")
NAMESPACE = named("argparse", "Namespace")
STORAGE = named("torch.storage", "UntypedStorage")
BACKEND = named("megatron.core.transformer.enums", "AttnBackend")
GETATTR, PATH, DTYPE = named("builtins", "getattr"), named("pathlib", "PosixPath"), named("numpy", "dtype")
POINTERS = (3, "|", None, None, None, -1, -1, 63)
REBUILD, REBUILD_TYPE = named("torch._utils", "_rebuild_tensor_v2"), named("torch._tensor", "_rebuild_from_type_v2")


def by_slots(name: str) -> bytes:
    """Return a pickled state that sets the attribute ``name`` to the class of shapes."""
    return b"N}" + plain(name) + SIZE + b"s\x86"


def test_a_signal_is_read_in_both_forms_in_which_versions_of_python_store_it(tmp_path):
    for pickled in (named("signal", "SIGTERM"), named("signal", "Signals") + plain((15,)) + b"R"):
        assert load_pickled(torch_file(tmp_path / "state.pt", b"\x80\x02" + pickled + b".")) is signal.SIGTERM


@pytest.mark.parametrize("builtins", ["builtins", "__builtin__"])
def test_a_member_is_read_by_the_name_that_python_3_11_2_stores(tmp_path, monkeypatch, builtins):
    pickled = b"\x80\x02" + named(builtins, "getattr") + BACKEND + plain("flash") + b"\x86R."
    for read in (loads_pickled(pickled, "state"), load_pickled(torch_file(tmp_path / "state.pt", pickled))):
        assert read is AttnBackend.flash
    monkeypatch.delattr("megatron.core.transformer.enums.AttnBackend")
    assert loads_pickled(pickled, "state") == "flash"


def test_an_enumeration_of_another_megatron_becomes_its_value(tmp_path, monkeypatch):
    monkeypatch.delattr("megatron.core.transformer.enums.AttnBackend")
    assert load_pickled(torch_file(tmp_path / "state.pt", b"\x80\x02" + BACKEND + plain((1,)) + b"R.")) == 1


ATTACKS = {
    "an attribute of a class": NAMESPACE + by_slots("__init__") + b"b",
    "an attribute of Path": PATH + by_slots("unlink") + b"b",
    "a class by a dict": NAMESPACE + b"}" + plain("__init__") + SIZE + b"sb",
    "the defaults of a function": REBUILD + b"N" + plain({"__defaults__": (1,)}) + b"\x86b",
    "the value of an enumeration's member": BACKEND + plain((1,)) + b"R" + plain({"_value_": 99}) + b"b",
    "the value of a signal": named("signal", "SIGTERM") + plain({"_value_": 99}) + b"b",
    "the dict of a module": named("sys", "modules") + plain("os") + plain(1) + b"s",
    "the dict of a class": GETATTR + NAMESPACE + plain("__dict__") + b"\x86R" + plain("x") + plain(1) + b"s",
    "what is no member of an enumeration": GETATTR + BACKEND + plain("__class__") + b"\x86R",
    "an item of a class": NAMESPACE + plain("a") + plain(1) + b"s",
    "items of a class": NAMESPACE + b"(" + plain("a") + plain(1) + b"u",
    "an element of no list": named("_io", "BytesIO") + b")R" + plain(1) + b"a",
    "elements of no set": b"\x80\x04" + NAMESPACE + b")\x81(" + plain(1) + b"\x90",
    "an extension of copyreg": b"\x82\x01",
    "a reconstruction by copyreg": named("copyreg", "_reconstructor") + PATH + SIZE + b"N\x87R",
    "a registration with copyreg": named("copyreg", "add_extension"),
    "a dotted global": b"\x80\x04" + plain("argparse") + plain("Namespace.__init__") + b"\x93",
    "objects in an array": DTYPE + plain(("O", False, True)) + b"R",
    "a data type that turns into pointers": DTYPE + plain(("f8", False, True)) + b"R" + plain(POINTERS) + b"b",
    "a storage at an address": b"\x80\x04" + STORAGE + plain((8,)) + plain({"allocator": 4096}) + b"\x92",
    "an array over memory": named("numpy", "ndarray") + plain(((1,),)) + b"\x81",
    "another codec": named("_codecs", "encode") + plain(("x", "zip")) + b"R",
    "the result of a call": NAMESPACE + b")\x81" + plain(()) + b"R",
    "a module's source": b"(" + plain("module") + NAMESPACE + b"NNtQ",
    "a storage by a text": b"Pstorage\n",
    "a tensor that is none": REBUILD_TYPE + b"(" + BACKEND * 2 + plain((1,)) + plain({"_value_": 99}) + b"tR",
}
"""What a pickle asks for or changes -> the pickle."""


def held_by_the_process() -> list[dict[str, Any]]:
    """Return the attributes of classes, functions and members that a pickle of `ATTACKS` would change."""
    kinds = (argparse.Namespace, PosixPath, torch._utils._rebuild_tensor_v2, AttnBackend, *AttnBackend, signal.SIGTERM)
    return [
        {name: value for name, value in vars(kind).items() if not name.startswith("_abc")}
        | {"defaults": getattr(kind, "__defaults__", None)}
        for kind in kinds
    ]


def torch_file(path: Path, pickled: bytes) -> Path:
    """Write a file of ``torch.save`` with ``pickled`` in the place of its own pickle."""
    torch.save({"a": torch.zeros(2)}, path.with_suffix(".good"))
    with zipfile.ZipFile(path.with_suffix(".good")) as good, zipfile.ZipFile(path, "w") as bad:
        for entry in good.namelist():
            bad.writestr(entry, pickled if entry.endswith("data.pkl") else good.read(entry))
    return path


@pytest.mark.parametrize("name", ATTACKS)
def test_every_reader_refuses_a_pickle_that_changes_more_than_what_it_has_made(tmp_path, name):
    attack, before = b"\x80\x02" + ATTACKS[name] + b".", held_by_the_process()
    (tmp_path / ".metadata").write_bytes(attack)
    with pytest.raises(CheckpointError, match=r"has a .metadata that .*was refused"):
        load_metadata(tmp_path)
    with pytest.raises(CheckpointError, match=r"rng_state .*was refused"):
        loads_pickled(attack, "rng_state")
    with pytest.raises(CheckpointError, match=r"state.pt .*was refused"):
        load_pickled(torch_file(tmp_path / "state.pt", attack))
    assert held_by_the_process() == before


class _Module(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_programs_and_archives_are_not_read_as_checkpoints(tmp_path):
    torch.jit.script(_Module()).save(str(tmp_path / "program.pt"))
    with pytest.raises(CheckpointError, match=r"program.pt .*TorchScript"):
        load_pickled(tmp_path / "program.pt")
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        archive.add(tmp_path / "program.pt", "storages")
    with pytest.raises(CheckpointError, match=r"old.pt .*tar"):
        load_pickled(tmp_path / "old.pt")
    (tmp_path / "both.pt").write_bytes((tmp_path / "old.pt").read_bytes() + (tmp_path / "program.pt").read_bytes())
    with pytest.raises(CheckpointError, match=r"both.pt .*tar"):
        load_pickled(tmp_path / "both.pt")


def test_metadata_may_not_name_files_of_other_directories(tmp_path):
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    for name in ("../__0_0.distcp", "/etc/passwd", "a/b.distcp", ".."):
        place = {MetadataIndex("weight"): _StorageInfo(name, 0, 1)}
        (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data=place)))
        with pytest.raises(CheckpointError, match="names the file"):
            load_metadata(tmp_path)


def test_recipes_of_transformer_engine_come_back_and_nothing_else_of_it(monkeypatch):
    """The shape of its FP8 statistics, in a module of the test."""
    module = types.ModuleType("transformer_engine.common.recipe")
    for name in ("transformer_engine", "transformer_engine.common", module.__name__):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.Format = enum.Enum("Format", {"HYBRID": 1}, module=module.__name__)
    fields = [("margin", int), ("fp8_format", Any, module.Format.HYBRID)]
    module.DelayedScaling = dataclasses.make_dataclass("DelayedScaling", fields)
    module.DelayedScaling.__module__ = module.__name__
    module.os = os
    state = {"recipe": module.DelayedScaling(3), "scale_fwd": torch.ones(4), "extra_fp8_variables": {"fp8": True}}
    saved = io.BytesIO()
    torch.save(state, saved)
    for pickled in (pickle.dumps(state), saved.getvalue()):
        loaded = loads_pickled(pickled, "_extra_state")
        assert loaded["recipe"] == state["recipe"] and torch.equal(loaded["scale_fwd"], torch.ones(4))
    for attack in (named(module.__name__, "os"), plain(module.Format.HYBRID) + plain({"_value_": 9}) + b"b"):
        with pytest.raises(CheckpointError, match="was refused"):
            loads_pickled(b"\x80\x02" + attack + b".", "_extra_state")
