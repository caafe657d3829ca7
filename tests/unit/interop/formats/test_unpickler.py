# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Foreign pickles: what Megatron's checkpoints hold comes back, and nothing else is ever looked up."""

from __future__ import annotations

import argparse
import enum
import importlib
import io
import os
import pickle
import random
import signal
import sys
import tarfile
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_selfdistill.compat import cpu  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.enums import ModelType
from megatron.core.transformer.enums import AttnBackend

from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.interop.formats.unpickler import ALLOWED, load_metadata, load_pickled, loads_pickled


def test_what_megatron_stores_comes_back(tmp_path):
    state = {
        "args": argparse.Namespace(
            num_layers=4,
            params_dtype=torch.bfloat16,
            model_type=ModelType.encoder_or_decoder,
            attention_backend=AttnBackend.auto,
            exit_signal=signal.SIGTERM,
            data_cache_path=Path("cache"),
        ),
        "model": {"weight": torch.nn.Parameter(torch.arange(6.0).view(2, 3)), "half": torch.ones(2).bfloat16()},
        "rng_state": [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": np.random.get_state(),
                "torch_rng_state": torch.get_rng_state(),
                "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
            }
        ],
    }
    torch.save(state, tmp_path / "state.pt")
    for mmap in (False, True):
        loaded = load_pickled(tmp_path / "state.pt", mmap=mmap)
        assert loaded["args"] == state["args"]
        assert torch.equal(loaded["model"]["weight"], state["model"]["weight"])
        assert np.array_equal(loaded["rng_state"][0]["np_rng_state"][1], state["rng_state"][0]["np_rng_state"][1])
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_pickled(tmp_path / "old.pt")["model"]["weight"], state["model"]["weight"])


@pytest.mark.parametrize("pickled", [b"csignal\nSIGTERM\n.", b"csignal\nSignals\n(I15\ntR."])
def test_a_signal_is_read_in_both_forms_in_which_versions_of_python_store_it(pickled):
    assert loads_pickled(pickled, "args") is signal.SIGTERM


class Calls:
    """A pickle that calls a function when it is read."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function, arguments, named",
    [
        (os.system, ("touch {mark}",), "posix.system"),
        (exec, ("open('{mark}', 'w')",), "builtins.exec"),
        (eval, ("open('{mark}', 'w')",), "builtins.eval"),
        (getattr, (os, "system"), "os|getattr|pickle"),
        (__import__, ("os",), "builtins.__import__"),
        (torch.load, ("{mark}",), "torch.serialization.load"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_refused_global_is_named_and_not_called(tmp_path, function, arguments, named, zipped):
    mark = tmp_path / "executed"
    arguments = tuple(a.format(mark=mark) if isinstance(a, str) else "os" for a in arguments)
    state = {"args": Calls(function, *arguments)}
    torch.save(state, tmp_path / "state.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"state.pt was refused: its pickle .*({named})"):
        load_pickled(tmp_path / "state.pt")
    assert not mark.exists()


def test_a_malicious_metadata_is_refused(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Calls(os.system, f"touch {tmp_path}/executed")))
    with pytest.raises(CheckpointError, match=r"has a .metadata that was refused: .*posix.system"):
        load_metadata(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_getattr_reads_members_of_enumerations_only(tmp_path):
    torch.save({"a": Calls(getattr, AttnBackend, "flash")}, tmp_path / "member.pt")
    assert load_pickled(tmp_path / "member.pt")["a"] is AttnBackend.flash
    torch.save({"a": Calls(getattr, argparse.Namespace, "__init__")}, tmp_path / "attribute.pt")
    with pytest.raises(CheckpointError, match="reads the attribute '__init__'"):
        load_pickled(tmp_path / "attribute.pt")


def test_classes_of_another_megatron_become_inert(tmp_path, monkeypatch):
    module = types.ModuleType("megatron.training.of_a_lab")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    kind = enum.Enum("Kind", {"SWA": 3}, module=module.__name__)
    config = type("LabConfig", (), {"__module__": module.__name__})
    module.Kind, module.LabConfig = kind, config
    value = config()
    value.width = 5
    torch.save({"args": argparse.Namespace(kind=kind.SWA, config=value)}, tmp_path / "state.pt")
    monkeypatch.delitem(sys.modules, module.__name__)
    args = load_pickled(tmp_path / "state.pt")["args"]
    assert args.kind.made_from == (3,) and args.config.state == {"width": 5}
    assert "of_a_lab.Kind" in repr(args.kind)


def test_a_damaged_file_gives_one_message(tmp_path):
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "state.pt")
    (tmp_path / "state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"state\.pt is corrupt or no PyTorch file"):
        load_pickled(tmp_path / "state.pt")


# A pickle that is written by hand: what no object's __reduce__ can ask for.


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def plain(value: object) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


BYTEARRAY = named("builtins", "bytearray")
NAMESPACE = named("argparse", "Namespace")
STORAGE = named("torch.storage", "UntypedStorage")
BACKEND = named("megatron.core.transformer.enums", "AttnBackend")
NEW_NAMESPACE = NAMESPACE + b")\x81"


def by_slots(name: str) -> bytes:
    """Return a pickled state that sets the attribute ``name`` to the class bytearray."""
    return b"N}" + plain(name) + BYTEARRAY + b"s\x86"


def persistent(name: bytes) -> bytes:
    return name + b"Q"


ATTACKS = {
    "an attribute of a class": (NAMESPACE + by_slots("__init__") + b"b", "fills argparse.Namespace itself"),
    "an attribute of Path": (named("pathlib", "PosixPath") + by_slots("unlink") + b"b", "fills pathlib.*itself"),
    "a class by a dict": (NAMESPACE + b"}" + plain("__init__") + BYTEARRAY + b"sb", "Namespace itself"),
    "the defaults of a function": (
        named("torch._utils", "_rebuild_tensor_v2") + b"N" + plain({"__defaults__": (1,)}) + b"\x86b",
        "fills torch._utils._rebuild_tensor_v2 itself",
    ),
    "the value of an enumeration's member": (
        BACKEND + plain((1,)) + b"R" + plain({"_value_": 99}) + b"b",
        "fills a megatron.core.transformer.enums.AttnBackend",
    ),
    "an attribute of an object by its slots": (NEW_NAMESPACE + by_slots("__class__") + b"b", "with a tuple"),
    "the dict of a module": (named("sys", "modules") + plain("os") + plain(1) + b"s", "asks for sys.modules"),
    "the dict of a class": (
        named("builtins", "getattr") + NAMESPACE + plain("__dict__") + b"\x86R" + plain("x") + plain(1) + b"s",
        "reads the attribute '__dict__'",
    ),
    "an item of a class": (NAMESPACE + plain("a") + plain(1) + b"s", "adds items to argparse.Namespace itself"),
    "items of a class": (NAMESPACE + b"(" + plain("a") + plain(1) + b"u", "adds items to argparse.Namespace itself"),
    "an element of no list": (named("_io", "BytesIO") + b")R" + plain(b"x") + b"a", "adds items to a _io.BytesIO"),
    "elements of no list": (BYTEARRAY + b")R(" + plain(1) + b"e", "adds items to a builtins.bytearray"),
    "elements of no set": (b"\x80\x04" + NEW_NAMESPACE + b"(" + plain(1) + b"\x90", "expected a set"),
    "an extension of copyreg": (b"\x82\x01", "asks for extension 1 of copyreg"),
    "a reconstruction by copyreg": (
        named("copyreg", "_reconstructor") + named("pathlib", "PosixPath") + BYTEARRAY + b"N\x87R",
        "makes a pathlib.*itself from a builtins.bytearray itself",
    ),
    "a registration with copyreg": (named("copyreg", "add_extension"), "asks for copyreg.add_extension"),
    "a dotted global": (b"\x80\x04" + plain("argparse") + plain("Namespace.__init__") + b"\x93", "asks for argparse"),
    "objects in an array": (named("numpy", "dtype") + plain(("O", False, True)) + b"R", "an array of object"),
    "a data type that turns into pointers": (
        named("numpy", "dtype")
        + plain(("f8", False, True))
        + b"R"
        + plain((3, "|", None, None, None, -1, -1, 63))
        + b"b",
        "expected numbers",
    ),
    "a storage at an address": (
        b"\x80\x04" + STORAGE + plain((8,)) + plain({"allocator": 4096}) + b"\x92",
        "with keyword arguments",
    ),
    "a storage": (STORAGE + plain((8,)) + b"R", "calls torch.storage.UntypedStorage itself"),
    "an array over memory": (named("numpy", "ndarray") + plain(((1,),)) + b"\x81", "calls numpy.ndarray itself"),
    "a class of Python 2": (b"(iargparse\nNamespace\n", "as Python 2 did"),
    "an object of Python 2": (b"(" + NAMESPACE + b"o", "as Python 2 did"),
    "another codec": (named("_codecs", "encode") + plain(("x", "zip")) + b"R", "expected latin1"),
    "the result of a call": (NEW_NAMESPACE + plain(()) + b"R", "calls a argparse.Namespace"),
    "a module's source": (persistent(b"(" + plain("module") + NAMESPACE + b"NNt"), "expected the storage"),
    "a storage by a text": (b"Pstorage\n", "names a storage by a text"),
    "a tensor that is none": (
        named("torch._tensor", "_rebuild_from_type_v2")
        + (
            b"(" + named("builtins", "getattr") + BACKEND + BACKEND + plain("flash") + b"\x86" + plain({"x": 1}) + b"tR"
        ),
        "makes a megatron.core.transformer.enums.AttnBackend itself",
    ),
}


def attributes_of_what_is_allowed() -> dict[str, dict[str, Any]]:
    """Return the attributes of every class and function that a pickle may name, and of the members of enumerations."""
    found: dict[str, dict[str, Any]] = {}
    for name in [*ALLOWED, "megatron.core.transformer.enums.AttnBackend", "torch._tensor._rebuild_from_type_v2"]:
        module, _, attribute = name.rpartition(".")
        try:
            value = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError):
            continue
        found[name] = {key: v for key, v in getattr(value, "__dict__", {}).items() if not key.startswith("_abc")}
        found[name] |= {"defaults": getattr(value, "__defaults__", None)}
        if isinstance(value, type) and issubclass(value, enum.Enum):
            found |= {f"{name}.{member.name}": dict(vars(member)) for member in value}
    return found


@pytest.mark.parametrize("name", ATTACKS)
def test_a_pickle_changes_nothing_but_what_it_has_made(name):
    attack, message = ATTACKS[name]
    before = attributes_of_what_is_allowed()
    with pytest.raises(CheckpointError, match=f"rng_state was refused: its pickle .*{message}"):
        loads_pickled(b"\x80\x02" + attack + b".", "rng_state")
    assert attributes_of_what_is_allowed() == before


@pytest.mark.parametrize("name", ["an attribute of a class", "the dict of a module", "a module's source"])
def test_files_of_torch_save_and_metadata_are_read_by_the_same_rules(tmp_path, name):
    attack, message = ATTACKS[name]
    torch.save({"a": torch.zeros(2)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "state.pt", "w") as bad:
        for entry in good.namelist():
            data = b"\x80\x02" + attack + b"." if entry.endswith("data.pkl") else good.read(entry)
            bad.writestr(entry, data)
    with pytest.raises(CheckpointError, match=f"state.pt was refused: its pickle .*{message}"):
        load_pickled(tmp_path / "state.pt")
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + attack + b".")
    with pytest.raises(CheckpointError, match=f"has a .metadata that was refused: its pickle .*{message}"):
        load_metadata(tmp_path)


class _Module(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_programs_and_archives_are_not_read_as_checkpoints(tmp_path):
    torch.jit.script(_Module()).save(str(tmp_path / "program.pt"))
    with pytest.raises(CheckpointError, match=r"program.pt was refused: it is a TorchScript program"):
        load_pickled(tmp_path / "program.pt")
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        archive.add(tmp_path / "program.pt", "storages")
    with pytest.raises(CheckpointError, match=r"old.pt was refused: it is a tar archive"):
        load_pickled(tmp_path / "old.pt")
    (tmp_path / "both.pt").write_bytes((tmp_path / "old.pt").read_bytes() + (tmp_path / "program.pt").read_bytes())
    with pytest.raises(CheckpointError, match=r"both.pt was refused: it is a tar archive"):
        load_pickled(tmp_path / "both.pt")


def test_random_states_metadata_and_protocols_of_all_ages_come_back():
    states = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "scalar": np.float64(2.5),
        "big": np.arange(3, dtype=">i8"),
        "namespace": argparse.Namespace(width=5, names={"a", "b"}),
    }
    for protocol in range(5):
        loaded = loads_pickled(pickle.dumps([states], protocol), "rng_state")[0]
        assert loaded["random_rng_state"] == states["random_rng_state"]
        assert np.array_equal(loaded["np_rng_state"][1], states["np_rng_state"][1])
        assert loaded["scalar"] == 2.5 and loaded["namespace"] == states["namespace"]
        assert np.array_equal(loaded["big"], states["big"])
    saved = io.BytesIO()
    torch.save([states, torch.get_rng_state()], saved)
    saved.seek(0)
    assert torch.equal(loads_pickled(saved, "rng_state")[1], torch.get_rng_state())


@pytest.mark.parametrize("name", ["../__0_0.distcp", "/etc/passwd", "a/b.distcp", ".."])
def test_metadata_may_not_name_files_of_other_directories(tmp_path, name):
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    place = {MetadataIndex("weight"): _StorageInfo(name, 0, 1)}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data=place)))
    with pytest.raises(CheckpointError, match=r"names the file .*expected one in its directory"):
        load_metadata(tmp_path)


def test_recipes_of_transformer_engine_come_back_and_nothing_else_of_it(monkeypatch):
    """The shape of its FP8 statistics; the module is one of a test's own where it is not installed."""
    source = """
import dataclasses, enum, os

class Format(enum.Enum):
    HYBRID = 1

@dataclasses.dataclass
class DelayedScaling:
    margin: int = 0
    fp8_format: Format = Format.HYBRID

def helper():
    pass
"""
    module = types.ModuleType("transformer_engine.common.recipe")
    for name in ("transformer_engine", "transformer_engine.common", module.__name__):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(source, vars(module))
    state = {"recipe": module.DelayedScaling(3), "scale_fwd": torch.ones(4), "extra_fp8_variables": {"fp8": True}}
    loaded = loads_pickled(pickle.dumps(state), "_extra_state")
    assert loaded["recipe"] == state["recipe"] and torch.equal(loaded["scale_fwd"], torch.ones(4))
    for other in ("helper", "os"):
        with pytest.raises(CheckpointError, match=f"asks for transformer_engine.common.recipe.{other}"):
            loads_pickled(b"\x80\x02" + named(module.__name__, other) + b".", "_extra_state")


def test_a_recipe_of_a_transformer_engine_that_is_not_installed_names_the_environment_that_reads_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(CheckpointError, match="Transformer Engine has: read it in an environment"):
        loads_pickled(b"\x80\x02" + named("transformer_engine.common.recipe", "Format") + b".", "_extra_state")
