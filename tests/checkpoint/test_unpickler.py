# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Foreign pickles: what Megatron's checkpoints hold comes back, and nothing else is ever looked up."""

from __future__ import annotations

import argparse
import enum
import os
import pickle
import random
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_selfdistill import cpu  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.enums import ModelType
from megatron.core.transformer.enums import AttnBackend

from megatron_selfdistill.checkpoint.errors import CheckpointError
from megatron_selfdistill.checkpoint.unpickler import load_metadata, load_pickled


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
    with pytest.raises(CheckpointError, match=rf"state.pt is not read: its pickle .*({named})"):
        load_pickled(tmp_path / "state.pt")
    assert not mark.exists()


def test_a_malicious_metadata_is_refused(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Calls(os.system, f"touch {tmp_path}/executed")))
    with pytest.raises(CheckpointError, match=r"\.metadata is not read: .*posix.system"):
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


def test_a_damaged_file_is_one_sentence(tmp_path):
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "state.pt")
    (tmp_path / "state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged or no PyTorch file"):
        load_pickled(tmp_path / "state.pt")
