# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The configuration of a run is compared with that of its checkpoint."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest

from megatron_selfdistill.checkpoint.resumption import CONFIGURATION, _changed
from megatron_selfdistill.config import load
from megatron_selfdistill.config.bound_keys import stored_values


@pytest.mark.parametrize("key", ["hidden_size", "activation"])
def test_a_value_of_the_model_that_the_checkpoint_took_from_the_environment_is_compared_as_text(monkeypatch, key):
    values = {"hidden_size": ("64", "32"), "activation": ("silu", "gelu")}[key]
    monkeypatch.setenv("LAB_VALUE", values[0])
    before = load([f"model.{key}='${{oc.env:LAB_VALUE}}'"])
    now = load([f"model.{key}={values[1]}"])
    saved = SimpleNamespace(
        path="here", trainer_state={CONFIGURATION: stored_values(before)}, common={"args": argparse.Namespace()}
    )
    (found,) = (difference for difference in _changed(saved, now) if difference.key == f"model.{key}")
    assert (found.stored, str(found.now)) == ("${oc.env:LAB_VALUE}", values[1])
