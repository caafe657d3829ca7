# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""`ColocatedSampler` with the real vLLM where an engine fails, and where the settings cannot work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import models
import pytest
import torch
from colocated import DRAWN, MODELS, TIMEOUT, requests, sampler, streamed
from responses import own, tokens

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.engines.vllm.in_process import InProcessEngine
from megatron_selfdistill.errors import ConfigError, EngineError
from megatron_selfdistill.rollout.base import Request, SamplingParams


def refusals() -> list[str]:
    """Return the errors of a broken engine on this rank, and whether the next batch is right again."""
    chunks, grid = models.build(MODELS["gqa"], ParallelConfig())
    messages = []
    mine = own(grid, requests())
    with sampler(MODELS["gqa"], chunks, grid) as it:
        engine = it._engine

        def refused(kind: type, share: list[Request], params: SamplingParams = DRAWN) -> None:
            with pytest.raises(kind) as error:
                it.generate(share, params)
            assert type(error.value) is kind
            messages.append(str(error.value))

        refused(EngineError, mine)
        it.update_weights(4)
        right = it.generate(mine, DRAWN)
        refused(ValueError, [*mine, Request([], 1)] if grid.rank else mine)
        refused(ValueError, [Request([1] * 310, 1)] if grid.rank else mine)
        llm = engine._llm
        if grid.rank == 1:
            with pytest.MonkeyPatch.context() as patch:
                steps = iter(range(3))
                step = llm.llm_engine.step
                patch.setattr(llm.llm_engine, "step", lambda: step() if next(steps, None) is not None else 1 / 0)
                refused(EngineError, mine)
            generate = llm.generate
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(llm, "generate", lambda *a, **k: generate(*a, **k)[:-1])
                refused(EngineError, mine)
            llm.update_weight_version("3")
        else:
            refused(EngineError, mine)
            refused(EngineError, mine)
        refused(EngineError, mine)
        it._max_staleness = 1
        late = it.generate(mine, DRAWN)
        assert {response.weight_version for response in late} <= {3, 4}
        it._max_staleness = 0
        with pytest.raises(EngineError, match=r"refused the weights: .*breaks off"):
            engine.load(breaking_off(it), 4)
        refused(EngineError, mine)
        it.update_weights(5)
        again = it.generate(mine, DRAWN)
        assert tokens(again) == tokens(late) == tokens(right)
        assert {response.weight_version for response in again} == {5}
    it.close()
    with pytest.raises(EngineError, match="is closed"):
        it._engine.generate([None])  # type: ignore[list-item]
    return messages


def breaking_off(it: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Other weights, up to the middle of a layer, on every rank alike."""
    whole = True
    for name, tensor in streamed(it):
        whole = whole and not name.endswith("1.self_attn.k_proj.weight")
        if whole:
            yield name, 2 * tensor
    raise RuntimeError("the export breaks off")


REFUSALS = [
    "call update_weights before generate",
    "rank 1: .* empty prompt",
    "rank 1: .* 310 tokens and max_new_tokens is 24, .* 320",
    "rank 1: .* division by zero",
    "rank 1: .* asked for 4 responses and gave 3",
    r"rank 1: .* version 3, expected 4 \(rollout.max_staleness=0\)",
    "rank 0: .* their update has failed; rank 1: .* their update has failed",
]


def test_an_engine_that_fails_is_one_message_on_all_ranks_and_the_next_batch_is_whole(ranks):
    first, second = ranks.run(refusals, world_size=2, timeout=TIMEOUT)
    assert first == second
    for message, expected in zip(first, REFUSALS, strict=True):
        assert re.search(expected, message), message


STARTS = InProcessEngine.__init__


def fails_to_start(self: Any, *arguments: Any, **options: Any) -> None:
    STARTS(self, *arguments, **options)
    self.close()
    raise MemoryError("no room")


def settings_refused() -> list[str]:
    chunks, grid = models.build(MODELS["gqa"], ParallelConfig())
    messages = []
    for options in ({"kv_cache_gb": 3e-4}, {"engine_args": {"max_num_sequences": 3}}):
        with pytest.raises(ConfigError) as error, sampler(MODELS["gqa"], chunks, grid, **options):
            pass
        messages.append(str(error.value))
    with pytest.MonkeyPatch.context() as patch:
        if grid.rank == 1:
            patch.setattr("megatron_selfdistill.engines.vllm.in_process.InProcessEngine.__init__", fails_to_start)
        with pytest.raises(EngineError) as failure, sampler(MODELS["gqa"], chunks, grid, engine_args={"seed": 1}):
            pass
        messages.append(str(failure.value))
    with sampler(MODELS["gqa"], chunks, grid, engine_args={"max_num_seqs": 2}) as it:
        it.update_weights(1)
        assert len(it.generate(requests(), DRAWN)) == 8
    return messages


def test_settings_that_cannot_work_are_one_message_and_leave_room_for_those_that_do(ranks):
    words = ["rollout.kv_cache_gb", "'max_num_sequences'", "rank 1: MemoryError"]
    for messages in ranks.run(settings_refused, world_size=2, timeout=TIMEOUT):
        assert all(word in message for word, message in zip(words, messages, strict=True))
