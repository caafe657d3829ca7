# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The CUDA stream of the trainer before, during and after an engine's calls, with stand-ins for torch's streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from megatron_selfdistill.engines.vllm import in_process
from megatron_selfdistill.engines.vllm.in_process import trainer_state_kept


class Stream:
    """A stream that knows for which others it has waited."""

    def __init__(self) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


class Vllm:
    """The effect of vLLM on streams: it replaces ``set_stream``, makes a side stream, and remembers the current one."""

    def __init__(self) -> None:
        self.cached: Any = None
        previous = torch.cuda.set_stream

        def follow(stream: Any) -> None:
            self.cached = stream
            previous(stream)

        torch.cuda.set_stream = follow

    def current_stream(self) -> Any:
        if self.cached is None:
            torch.cuda.set_stream(Stream())
        return self.cached

    @contextmanager
    def on_another_stream(self) -> Iterator[None]:
        before = torch.cuda.current_stream()
        torch.cuda.set_stream(Stream())
        yield
        torch.cuda.set_stream(before)


@pytest.fixture
def default(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """Return the default stream, which is the current one."""
    default = Stream()
    current = [default]
    for name in ("is_available", "is_initialized", "get_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    monkeypatch.setattr(in_process, "_vllms_stream", None)
    return default


def test_the_trainer_is_on_its_own_stream_again_and_in_later_calls_vllm_on_the_one_that_it_remembers(default):
    set_stream = torch.cuda.set_stream
    with trainer_state_kept():
        vllm = Vllm()
        side = vllm.current_stream()
    assert torch.cuda.current_stream() is default is not side
    assert default.waited_for == [side] and torch.cuda.set_stream is set_stream
    with trainer_state_kept():
        assert vllm.current_stream() is torch.cuda.current_stream() is side
        assert side.waited_for == [default]
        with vllm.on_another_stream():
            assert vllm.current_stream() is torch.cuda.current_stream() is not side
        assert vllm.current_stream() is torch.cuda.current_stream() is side
    assert torch.cuda.current_stream() is default


def test_a_trainer_on_a_stream_of_its_own_stays_there_also_when_vllm_fails(default):
    own = Stream()
    torch.cuda.set_stream(own)
    with pytest.raises(RuntimeError, match="broke"), trainer_state_kept():
        side = Vllm().current_stream()
        raise RuntimeError("broke")
    assert torch.cuda.current_stream() is own and own.waited_for == [side]
