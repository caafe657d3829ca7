# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""`ServerSampler` with adapters and a real vLLM server: the weights go once, and the factors at each update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import models
import pytest
from adapted import other_factors
from real_servers import Across, across_an_update, assert_new_weights_go_on, sampler, started
from responses import own, tokens
from trained import FAMILY, GREEDY, MAX_LENGTH, MODEL, Reach, requests

from megatron_selfdistill.adapters.low_rank_adapters import add_adapters
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.engines.vllm.engine_adapter import EngineAdapter
from megatron_selfdistill.interop.hf.adapter_rules import adapter_rules
from megatron_selfdistill.rollout.base import Response, SamplingParams
from megatron_selfdistill.rollout.megatron.megatron_sampler import MegatronSampler

TIMEOUT = 600.0
ADAPTER = AdapterConfig(rank=3, alpha=0.5, rank_stabilised=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reach]:
    described = EngineAdapter.of(ADAPTER, adapter_rules(FAMILY.rules(MODEL), ADAPTER))
    with started(tmp_path_factory.mktemp("adapted"), 1, described) as found:
        yield found.reach


def adapted(layout: dict[str, int]) -> tuple[list[Any], Any]:
    chunks, grid = models.build(MODEL, models.parallel(**layout))
    add_adapters(chunks, ADAPTER, grid)
    return chunks, grid


def in_process() -> list[list[Response]]:
    chunks, grid = adapted({})
    found = []
    for seed in (1, 2):
        other_factors(chunks, seed)
        it = MegatronSampler(chunks, grid, models.VOCAB_SIZE, MAX_LENGTH, 0.1)
        found.append(it.generate(requests(8), GREEDY))
    return found


def on_servers(server: Reach, layout: dict[str, int], transfer: str) -> tuple[list[list[Response]], list[float]]:
    """Return the responses of the server with the same factors, and the bytes of each update."""
    chunks, grid = adapted(layout)
    found, sent = [], []
    with sampler(chunks, grid, server, adapter=ADAPTER, transfer=transfer, bucket_mb=0.06) as built:
        for version, seed in enumerate((1, 2)):
            other_factors(chunks, seed)
            built.update_weights(version)
            sent.append(built.metrics()["rollout/sync_bytes"])
            found.append(built.generate(own(grid, requests(8)), GREEDY))
    return found, sent


@pytest.mark.parametrize(("layout", "world_size", "transfer"), [({"tp": 2}, 2, "shared_memory"), ({}, 1, "gloo")])
def test_an_update_sends_the_factors_alone_and_gives_the_trainers_tokens(ranks, server, layout, world_size, transfer):
    (theirs,) = ranks.run(in_process, world_size=1)
    for found, sent in ranks.run(on_servers, server, layout, transfer, world_size=world_size, timeout=TIMEOUT):
        assert sent[1] < sent[0] / 3, sent
        for version, (batch, expected) in enumerate(zip(found, theirs, strict=True)):
            assert tokens(batch) == tokens(expected)
            assert {response.weight_version for response in batch} == {version}
            for response, other in zip(batch, expected, strict=True):
                assert response.log_probs == pytest.approx(other.log_probs, abs=1e-4)
    assert tokens(theirs[0]) != tokens(theirs[1])


def kept(server: Reach) -> Across:
    chunks, grid = adapted({})
    with sampler(chunks, grid, server, adapter=ADAPTER, max_staleness=1) as built:
        return across_an_update(built, SamplingParams(max_new_tokens=150), lambda seed: other_factors(chunks, seed + 1))


def test_responses_under_way_go_on_with_new_factors(ranks, server):
    assert_new_weights_go_on(*ranks.run(kept, server, world_size=1, timeout=TIMEOUT)[0])
