# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""`ColocatedSampler` with adapters on the real vLLM: factors that travel alone, beside weights that stay."""

from __future__ import annotations

from typing import Any

import models
import pytest
from adapted import other_factors
from colocated import GREEDY, MAX_LENGTH, MODELS, TIMEOUT, requests, sampler
from responses import own, tokens

from megatron_selfdistill.adapters.low_rank_adapters import add_adapters
from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.rollout.megatron.megatron_sampler import MegatronSampler

STABILISED = AdapterConfig(rank=3, alpha=0.5, rank_stabilised=True)
"""A rank that vLLM does not have, and a scale that is no power of two."""


def adapted(kind: str, parallel: ParallelConfig, adapter: AdapterConfig, seed: int = 0) -> tuple[list[Any], Any]:
    """Return a model with adapters whose factors are large; another ``seed`` changes the factors alone."""
    chunks, grid = models.build(MODELS[kind], parallel)
    add_adapters(chunks, adapter, grid)
    other_factors(chunks, seed)
    return chunks, grid


def in_process(kind: str, adapter: AdapterConfig, seeds: tuple[int, ...]) -> list[list[Response]]:
    chunks, grid = adapted(kind, ParallelConfig(), adapter)
    found = []
    for seed in seeds:
        other_factors(chunks, seed)
        it = MegatronSampler(chunks, grid, models.VOCAB_SIZE, MAX_LENGTH)
        found.append(it.generate(own(grid, requests()), GREEDY))
    return found


def on_vllm(
    kind: str, adapter: AdapterConfig, parallel: ParallelConfig, engine_tp: int, seeds: tuple[int, ...]
) -> tuple[list[list[Response]], list[float], int, int]:
    """Return the same from vLLM, with the bytes of each update, and the bytes of all weights and of the factors."""
    chunks, grid = adapted(kind, parallel, adapter)
    found, sent = [], []
    with sampler(MODELS[kind], chunks, grid, adapter=adapter, engine_tp=engine_tp, bucket_mb=0.05) as it:
        for version, seed in enumerate(seeds):
            other_factors(chunks, seed)
            it.update_weights(version)
            sent.append(it.metrics()["rollout/sync_bytes"])
            found.append(it.generate(own(grid, requests()), GREEDY))
        sizes = [
            sum(tensor.nbytes for bucket in stream for _, tensor in bucket)
            for stream in (it._weights.stream(), it._weights.stream_factors())
        ]
    return found, sent, *sizes


CASES = {
    "gqa": ("gqa", models.parallel(), 1, 1, STABILISED),
    "tied, TP2 to an engine of 2": ("tied", models.parallel(tp=2), 2, 2, AdapterConfig(rank=8, alpha=0.5)),
}


@pytest.mark.parametrize("case", CASES)
def test_an_update_sends_the_factors_alone_and_gives_the_trainers_tokens_and_log_probs(ranks, case):
    kind, parallel, world_size, engine_tp, adapter = CASES[case]
    seeds = (1, 2)
    (theirs,) = ranks.run(in_process, kind, adapter, seeds, world_size=1)
    per_rank = ranks.run(on_vllm, kind, adapter, parallel, engine_tp, seeds, world_size=world_size, timeout=TIMEOUT)
    for found, sent, all_bytes, factor_bytes in per_rank:
        assert sent == [all_bytes + factor_bytes, factor_bytes] and factor_bytes < all_bytes / 2
        assert [{response.weight_version for response in batch} for batch in found] == [{0}, {1}]
        for batch, expected in zip(found, theirs, strict=True):
            assert tokens(batch) == tokens(expected)
            for response, other in zip(batch, expected, strict=True):
                assert response.log_probs == pytest.approx(other.log_probs, abs=1e-4)
    assert tokens(theirs[0]) != tokens(theirs[1])
