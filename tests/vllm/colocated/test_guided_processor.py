# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The part of guided decoding that runs inside vLLM, without an engine: its checks and its store."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from vllm import SamplingParams as EngineParams
from vllm.v1.sample.logits_processor import BatchUpdate

from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.rollout.base import sample_uniforms
from megatron_selfdistill.rollout.vllm import pairs
from megatron_selfdistill.rollout.vllm.plugin import guided_processor
from megatron_selfdistill.rollout.vllm.plugin.guided_processor import PairStore
from megatron_selfdistill.rollout.vllm.protocol import PairHalf

VOCAB_SIZE = 64


def lone_half(name: str, role: str) -> dict[str, Any]:
    half = PairHalf(name, role, 7, 0, 40, 1, Target(anchor="student"), greedy=False)
    sampling = {"temperature": 0.0, "max_tokens": 40, "stop_token_ids": [1], "logprobs": 0, "ignore_eos": True}
    return {**sampling, "extra_args": half.extra_args()}


def make_vllm_config(**changes: Any) -> SimpleNamespace:
    """Return the settings that are checked, all valid but for ``changes``."""
    good: dict[str, Any] = {
        "async_scheduling": False,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "tensor_parallel_size": 1,
        "enable_prefix_caching": True,
        "block_size": 32,
        "scheduler_cls": pairs.GUIDED_ENGINE_ARGS["scheduler_cls"],
    }
    section = SimpleNamespace(**{**good, **changes})
    return SimpleNamespace(
        scheduler_config=section,
        parallel_config=section,
        cache_config=section,
        use_v2_model_runner=changes.get("use_v2_model_runner", False),
        speculative_config=changes.get("speculative_config"),
    )


@pytest.mark.parametrize(
    "change",
    [
        {"async_scheduling": True},
        {"use_v2_model_runner": True},
        {"speculative_config": "ngram"},
        {"pipeline_parallel_size": 2},
        {"data_parallel_size": 2},
        {"enable_prefix_caching": False},
        {"max_num_seqs": 63},
        {"scheduler_cls": None},
        {"max_num_batched_tokens": 63},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_engine_that_cannot_keep_halves_in_step_is_refused(change: dict[str, Any]) -> None:
    guided_processor.refuse_settings(make_vllm_config())
    with pytest.raises(ValueError, match=r"guidance=mixed needs an engine with: [^;]+$"):
        guided_processor.GuidedProcessor(make_vllm_config(**change), torch.device("cpu"), False)


def test_a_half_that_could_end_by_itself_is_refused() -> None:
    half = PairHalf("a", "anchor", 7, 0, 40, 1, Target(anchor="student"), greedy=False)
    fitting = {"temperature": 0.0, "max_tokens": 40, "stop_token_ids": [1], "extra_args": half.extra_args()}
    guided_processor.GuidedProcessor.validate_params(EngineParams(**fitting))
    guided_processor.GuidedProcessor.validate_params(EngineParams(temperature=0.7))
    for change in ({"temperature": 0.5}, {"stop_token_ids": [2]}, {"max_tokens": 41}, {"min_tokens": 3}):
        with pytest.raises(ValueError, match="half of a guided pair"):
            guided_processor.GuidedProcessor.validate_params(EngineParams(**{**fitting, **change}))


def test_a_pair_that_is_given_up_while_it_writes_leaves_the_next_ones_log_alone() -> None:
    """Its rows stay in the batch until the engine hears of it; their slot is another pair's by then."""

    def added(row: int, pair: str, role: str) -> tuple[int, Any, None, list[int]]:
        return row, EngineParams(**lone_half(pair, role)), None, []

    logits = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    logs = []
    for names in (["given up", "next"], ["next"]):
        processor = guided_processor.GuidedProcessor(make_vllm_config(), torch.device("cpu"), False)
        for name in names:
            row = 2 * ["next", "given up"].index(name)
            rows = [added(row, name, "anchor"), added(row + 1, name, "teacher")]
            processor.update_state(BatchUpdate(4, removed=[], added=rows, moved=[]))
            processor.apply(logits.clone())
            if name == "given up":
                processor.pop([name])
                processor.update_state(None)
                processor.apply(logits.clone())
        processor.update_state(None)
        processor.apply(logits.clone())
        logs.append(processor.pop(["next"])[0])
    assert logs[0].forced == logs[1].forced == [-1, -1]
    np.testing.assert_array_equal(logs[0].log_probs, logs[1].log_probs)


def make_half(name: str, max_tokens: int = 100) -> PairHalf:
    return PairHalf(name, "anchor", 5, 2, max_tokens, 1, Target(anchor="student"), greedy=False)


def test_the_store_forgets_what_nobody_pops_but_nothing_that_is_live() -> None:
    store = PairStore(torch.device("cpu"), max_bytes=32 * 100 * 12)
    for index in range(200):
        store.admit(make_half(f"dead-{index}"), live=())
    assert len(store) <= 32 and store.num_bytes <= 32 * 100 * 12
    live = [f"live-{index}" for index in range(100)]
    slots = [store.admit(make_half(name), live) for name in live]
    assert len(set(slots)) == 100
    assert None not in store.pop(live)


def test_the_store_keeps_each_pairs_uniforms_and_log_while_it_grows() -> None:
    store = PairStore(torch.device("cpu"))
    for index in range(40):
        half = replace(make_half(f"{index}", max_tokens=index + 1), seed=index)
        slot = store.admit(half, live=())
        assert store.admit(replace(half, role="teacher"), live=()) == slot
        np.testing.assert_array_equal(store.uniforms[slot, : index + 1], sample_uniforms(index, index + 3)[2:])
        store.log(np.array([slot]), np.array([0]), torch.full((1, 3), float(index)))
    logs = store.pop([f"{index}" for index in range(40)])
    assert [log.log_probs.tolist() for log in logs if log] == [[[float(index)] * 3] for index in range(40)]
    assert len(store) == store.num_bytes == 0
