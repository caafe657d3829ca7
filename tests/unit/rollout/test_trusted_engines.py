# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""vLLM engines and servers run no Python code of a model's directory unless rollout.engine_args say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_selfdistill.engines.vllm import in_process
from megatron_selfdistill.engines.vllm.server import serve
from megatron_selfdistill.engines.vllm.server.server_names import as_arguments


@pytest.mark.parametrize(("engine_args", "trusted"), [({}, False), ({"trust_remote_code": True}, True)])
def test_an_engine_in_the_trainers_process_is_told_whether_to_trust_the_directory(
    tmp_path, monkeypatch, engine_args, trusted
):
    started: dict[str, Any] = {}
    monkeypatch.setattr(in_process, "_live", None)
    monkeypatch.setattr(in_process.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(in_process, "_started", lambda directory, arguments, *_, **__: started.update(arguments))
    settings = {"max_model_len": 8, **engine_args}
    (tmp_path / "config.json").write_text("{}")
    in_process.InProcessEngine(tmp_path, torch.device("cpu"), "x", engine_tp=1, settings=settings, vocab_size=8)
    assert started["trust_remote_code"] is trusted


def test_a_server_is_told_not_to_trust_the_directory_before_the_users_own_arguments():
    options = serve.parser().parse_args(["--hf-config=/model", "--max-model-len=9"])
    for on_cpu in (False, True):
        assert "--no-trust-remote-code" in serve.engine_arguments(options, on_cpu=on_cpu)
    assert as_arguments({"trust_remote_code": True}) == ["--trust-remote-code"], "which follow, and win"
