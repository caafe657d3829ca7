# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Every engine chooses among the ids that the tokenizer knows."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_selfdistill.config import load
from megatron_selfdistill.engines.vllm import configured_sampler
from megatron_selfdistill.rollout import factory

RUN_DATA: Any = SimpleNamespace(stop_token_ids=(1,), vocab_size=128, num_sampled_ids=97, max_length=64)


@pytest.mark.parametrize(("placement", "module"), [("server", "ServerSampler"), ("colocated", "ColocatedSampler")])
def test_vllm_has_rows_for_the_ids_of_the_tokenizer_alone(monkeypatch, placement, module):
    sizes = {}
    found = lambda _, size, *__: sizes.update(directory=size) or ("", [])  # noqa: E731
    monkeypatch.setattr(configured_sampler, "engine_directory", found)
    monkeypatch.setattr(configured_sampler, "EngineWeights", lambda *_, **__: None)
    fake = SimpleNamespace(**{module: lambda *_, vocab_size, **__: sizes.update(sampler=vocab_size)})
    name = {"server": "server_sampler", "colocated": "colocated"}[placement]
    monkeypatch.setitem(sys.modules, f"megatron_selfdistill.engines.vllm.{name}", fake)
    own = ["rollout.placement=server", "rollout.num_servers=1"] if placement == "server" else []
    config = load(["rollout.engine=vllm", "run_dir=run", *own])
    factory.make_sampler(config, RUN_DATA, [], SimpleNamespace())
    assert sizes == {"directory": 97, "sampler": 97}
