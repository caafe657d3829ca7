# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""`ServerSampler` on servers that fail in every way: each request gets one response, from the right weights.

Otherwise every rank raises the same message.
"""

from __future__ import annotations

import json
import math
from typing import Any

import models
import pytest
import torch
from fake_server_sampler import GREEDY, MODEL, PATIENCE_S, sampler, tell
from fake_vllm import FakeVllm, tokens_behind

from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.errors import ConfigError, EngineError
from megatron_selfdistill.rollout.base import Request

ADAPTER = AdapterConfig(rank=3, alpha=6.0, layers=["linear_proj", "linear_fc2"])


def everybodys(count: int) -> list[Request]:
    return [Request([1 + i % 7, i], 1000 + i) for i in range(count)]


def wanted(requests: list[Request]) -> list[list[int]]:
    return [tokens_behind(request.prompt, GREEDY.max_new_tokens) for request in requests]


Step = tuple[list[list[int]], dict[str, float]] | tuple[str, str]


def steps(
    addresses: list[str],
    layout: dict[str, int],
    faults: list[list[dict[str, Any]]],
    options: dict[str, Any],
    count: int = 24,
    sync_from: int = 0,
) -> list[Step]:
    """Run a step for each of ``faults``, and return each step's tokens and metrics, or the error's class and message.

    Rank 0 sets the faults of the servers after that step's `update_weights`; in steps after ``sync_from``, before it.
    A fault "patience_s" is the patience with that server.
    """
    done: list[Step] = []
    with sampler(addresses, layout, **options) as (built, grid):
        mine = everybodys(count)[grid.dp_rank :: grid.dp_size]
        for version, fault in enumerate(faults):

            def begin(fault: list[dict[str, Any]] = fault) -> None:
                for server, each in zip(built._pool.servers, fault, strict=False):
                    server._http.timeout_s = each.pop("patience_s", PATIENCE_S)
                    tell(server.address, **each)
                torch.distributed.barrier()

            try:
                if version > sync_from:
                    begin()
                built.update_weights(version)
                if version <= sync_from:
                    begin()
                responses = built.generate(mine, GREEDY)
                assert {response.log_probs[0] for response in responses} <= {-0.5}
                done.append(([response.token_ids for response in responses], built.metrics()))
            except (EngineError, ValueError, ConfigError) as error:
                done.append((type(error).__name__, str(error)))
    return done


def run(
    ranks: Any,
    fakes: list[FakeVllm],
    faults: list[Any],
    world_size: int = 1,
    layout: dict[str, int] | None = None,
    options: dict[str, Any] | None = None,
    **more: Any,
) -> list[Step]:
    """Run `steps` on ranks, and join the responses of the replicas; all ranks must see the same metrics and errors."""
    arguments = ([fake.address for fake in fakes], layout or {}, faults, options or {})
    per_rank = ranks.run(steps, *arguments, world_size=world_size, **more)
    assert len({json.dumps([step[1] for step in rank_steps]) for rank_steps in per_rank}) == 1
    if world_size == 1 or layout or isinstance(per_rank[0][-1][0], str):
        return per_rank[0]
    return [
        ([step[i % world_size][0][i // world_size] for i in range(24)], step[0][1])
        for step in zip(*per_rank, strict=True)
    ]


@pytest.mark.parametrize(("layout", "world_size"), [({}, 1), ({"tp": 2, "pp": 2}, 4)])
def test_in_any_layout_all_requests_are_answered_once_with_the_weights_that_were_sent(ranks, fakes, layout, world_size):
    for tokens, metrics in run(ranks, fakes, [[], []], world_size, layout=layout):
        assert tokens == wanted(everybodys(24))
        assert metrics["rollout/servers_alive"] == 2 and metrics["rollout/requests_retried"] == 0
        assert metrics["rollout/sync_bytes"] == sum(t.nbytes for t in fakes[0].weights.values()) > 0
    answered = fakes[0].answered + fakes[1].answered
    assert len(answered) == 24 and set(answered.values()) == {2}
    assert fakes[0].answered and fakes[1].answered
    assert {fake.version for fake in fakes} == {"1"}
    assert fakes[0].weights["lm_head.weight"].shape == (models.VOCAB_SIZE, MODEL.hidden_size)
    assert torch.equal(
        fakes[0].weights["model.norm.weight"],
        models.full_weight("decoder.final_layernorm.weight", (MODEL.hidden_size,)),
    )


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"die_at": 5}, marks=pytest.mark.full),
        pytest.param({"hang_at": 5, "patience_s": 0.5}, marks=pytest.mark.full),
        {"status": 500, "says": "broken"},
        pytest.param({"log_prob": math.nan}, marks=pytest.mark.full),
        {"writes_version": "8"},
        {"restart": True},
    ],
    ids=lambda fault: next(iter(fault)),
)
def test_what_a_failing_server_does_not_answer_another_one_does(ranks, fakes, fault):
    [(tokens, metrics)] = run(ranks, fakes, [[fault]])
    assert tokens == wanted(everybodys(24))
    assert metrics["rollout/servers_alive"] == 1
    assert metrics["rollout/requests_retried"] > 0
    assert set(fakes[1].answered.values()) == {1}


def test_when_all_servers_fail_every_rank_says_so_and_why(ranks, fakes):
    [(kind, message)] = run(ranks, fakes, [[{"die_at": 3}, {"status": 500, "says": "no memory"}]], 2)
    assert kind == "EngineError"
    assert all(word in message for word in ("no memory", *(fake.address for fake in fakes)))


def test_a_server_that_comes_back_is_used_after_the_next_weights_and_not_before(ranks, fakes):
    back = {"restart": True, "die_at": 0}
    first, second = run(ranks, fakes, [[{"die_at": 1}], [back]])
    assert first[0] == second[0] == wanted(everybodys(24))
    assert first[1]["rollout/servers_alive"] == 1 and second[1]["rollout/servers_alive"] == 2
    assert fakes[0].version == "1" and fakes[0].answered


def test_when_no_server_takes_the_weights_every_rank_raises(ranks, fakes):
    fault = {"fail_at": "/finish_weight_update"}
    _, (kind, message) = run(ranks, fakes, [[], [fault, fault]], 2)
    assert kind == "EngineError" and all(fake.address in message for fake in fakes)


def test_in_a_group_the_others_get_the_weights_though_one_dies(ranks, fakes):
    options = {"transfer": "gloo"}
    _, (tokens, metrics) = run(ranks, fakes, [[], [{"fail_at": "/update_weights"}]], 2, options=options)
    assert tokens == wanted(everybodys(24))
    assert fakes[1].version == "1"
    assert metrics["rollout/servers_alive"] == 1


def test_a_server_that_fails_while_the_group_forms_keeps_nobody_waiting(ranks, fakes):
    """Not for the time after which a server counts as dead, which the hang watch might not wait for."""
    faults = [[{"fail_at": "/init_weight_transfer_engine"}]]
    [(tokens, metrics)] = run(ranks, fakes, faults, 2, options={"transfer": "gloo"}, sync_from=-1)
    assert tokens == wanted(everybodys(24)) and metrics["rollout/servers_alive"] == 1
    assert fakes[1].version == "0"


def test_weights_that_are_old_enough_to_be_wrong_are_refused_unless_staleness_is_allowed(ranks, fakes):
    """Both servers say that the step's weights are the previous ones."""
    stale = [{}, {"writes_version": "0"}]
    for allowed in (0, 1):
        _, (tokens, metrics) = run(ranks, fakes, [[], stale], options={"max_staleness": allowed})
        assert tokens == wanted(everybodys(24))
        assert metrics["rollout/servers_alive"] == 1 + allowed
        for fake in fakes:
            fake.writes_version = ""


def refused(addresses: list[str], prompt: list[int]) -> tuple[str, str]:
    try:
        with sampler(addresses, {}) as (built, _):
            built.update_weights(0)
            built.generate([Request(prompt, 0)], GREEDY)
    except (ConfigError, ValueError, EngineError) as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("length", "faults", "kind", "word"),
    [
        (61, {}, "ValueError", "61 tokens"),
        (1, {"max_model_len": 63}, "ConfigError", "--max-model-len 64"),
        (1, {"counts": False}, "ConfigError", "--disable-log-stats"),
        (1, {"token": "other"}, "EngineError", "401"),
        (1, {"status": 400, "says": "what is this"}, "EngineError", "400: what is this"),
    ],
)
def test_what_no_server_can_do_is_an_error_on_all_ranks(ranks, fakes, length, faults, kind, word):
    for fake in fakes:
        vars(fake).update(faults)
    first, second = ranks.run(refused, [fake.address for fake in fakes], [1] * length, world_size=2)
    assert first == second and first[0] == kind and word in first[1]


def adapted_updates(addresses: list[str], restarted: str, transfer: str) -> list[float]:
    """Return the bytes of two updates, between which a server was started anew."""
    sent = []
    with sampler(addresses, {}, adapter=ADAPTER, transfer=transfer) as (built, _):
        for version in range(2):
            built.update_weights(version)
            sent.append(built.metrics()["rollout/sync_bytes"])
            built.generate(everybodys(24), GREEDY)
            tell(restarted, **({"restart": True} if version == 0 else {}))
    return sent


@pytest.mark.parametrize("transfer", ["shared_memory", pytest.param("gloo", marks=pytest.mark.full)])
def test_a_server_keeps_frozen_weights_until_it_is_started_anew(ranks, fakes, transfer):
    addresses = [fake.address for fake in fakes]
    [sent] = ranks.run(adapted_updates, addresses, addresses[1], transfer, world_size=1)
    kept, restarted = fakes
    assert kept.weights and all(name.startswith("base_model.model.") for name in kept.weights)
    factors = sum(tensor.nbytes for tensor in kept.weights.values())
    everything = sum(tensor.nbytes for tensor in restarted.weights.values())
    assert kept.weights.keys() < restarted.weights.keys() and "model.norm.weight" in restarted.weights
    assert sent == [everything, factors + everything]
    assert kept.version == restarted.version == "1"
    expected = {"rank": 3, "alpha": 6.0, "rank_stabilised": False, "modules": ["down_proj", "o_proj"]}
    assert kept.adapter == restarted.adapter == expected
    assert set(kept.models) == {"selfdistill"}


def test_a_server_that_does_not_take_the_weights_is_dropped(ranks, fakes):
    _, (tokens, metrics) = run(ranks, fakes, [[], [{"fail_at": "/update_weights"}]])
    assert tokens == wanted(everybodys(24)) and metrics["rollout/servers_alive"] == 1
    assert fakes[0].version == "loading" and fakes[1].version == "1"


def asked_too_early(addresses: list[str]) -> None:
    with sampler(addresses, {}) as (built, _), pytest.raises(EngineError, match="call update_weights before generate"):
        built.generate(everybodys(2), GREEDY)


def test_nothing_is_sampled_before_the_first_weights(ranks, fakes):
    ranks.run(asked_too_early, [fakes[0].address], world_size=1)
