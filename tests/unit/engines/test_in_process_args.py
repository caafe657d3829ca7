# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The arguments of an engine in the trainer's processes, and the memory that it starts in, with a stand-in for vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_selfdistill.engines.vllm import in_process
from megatron_selfdistill.engines.vllm.server import serve
from megatron_selfdistill.engines.vllm.server.server_names import as_arguments

EXPANDING, FIXED = "expandable_segments:True", "expandable_segments:False"
NAME = "disable_custom_all_reduce"

Start = Callable[..., dict[str, Any]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Return a function that starts an engine, and returns its arguments and the allocator's settings at the start."""
    found: dict[str, Any] = {}

    def started(directory: Path, arguments: dict[str, Any], *_: Any, **__: Any) -> None:
        found["arguments"] = arguments
        found["allocator"] = in_process._allocator_settings()

    monkeypatch.setattr(in_process, "_live", None)
    monkeypatch.setattr(in_process.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(in_process, "_started", started)
    (tmp_path / "config.json").write_text("{}")

    def start(engine_tp: int, allocator: str, device: str = "cuda", **engine_args: Any) -> dict[str, Any]:
        torch._C._accelerator_setAllocatorSettings(allocator)
        settings = {"max_model_len": 8, **engine_args}
        device_ = torch.device(device)
        in_process.InProcessEngine(tmp_path, device_, "x", engine_tp=engine_tp, settings=settings, vocab_size=8)
        assert in_process._allocator_settings() == allocator
        return found

    before = in_process._allocator_settings()
    yield start
    torch._C._accelerator_setAllocatorSettings(before)


@pytest.mark.parametrize(
    ("engine_tp", "allocator", "device", "own", "made"),
    [
        (1, EXPANDING, "cuda", None, None),
        (2, "max_split_size_mb:512", "cuda", None, None),
        (2, EXPANDING, "cpu", None, None),
        (2, EXPANDING, "cuda", None, True),
        (2, EXPANDING, "cuda", False, True),  # a choice that would end the process
        (2, FIXED, "cuda", False, False),
    ],
)
def test_vllm_or_the_user_chooses_how_ranks_add_up_unless_segments_expand(
    start, engine_tp, allocator, device, own, made
):
    found = start(engine_tp, allocator, device, **({} if own is None else {NAME: own}))
    assert found["arguments"].get(NAME) is made
    assert found["allocator"] == allocator.replace(EXPANDING, FIXED)


@pytest.mark.usefixtures("start")
def test_memory_is_no_expandable_segment_and_other_settings_stay_also_when_an_engine_fails():
    torch._C._accelerator_setAllocatorSettings(before := "max_split_size_mb:512,expandable_segments: True")
    with pytest.raises(MemoryError), in_process.without_expandable_segments():
        assert in_process._allocator_settings() == f"max_split_size_mb:512,{FIXED}"
        raise MemoryError
    assert in_process._allocator_settings() == before


@pytest.mark.parametrize(("engine_args", "trusted"), [({}, False), ({"trust_remote_code": True}, True)])
def test_no_engine_runs_python_code_of_a_models_directory_unless_the_users_arguments_say_so(
    start, engine_args, trusted
):
    assert start(1, FIXED, "cpu", **engine_args)["arguments"]["trust_remote_code"] is trusted
    options = serve.parser().parse_args(["--hf-config=/model", "--max-model-len=9"])
    for on_cpu in (False, True):
        assert "--no-trust-remote-code" in serve.engine_arguments(options, on_cpu=on_cpu)
    assert as_arguments({"trust_remote_code": True}) == ["--trust-remote-code"], "which follow, and win"
