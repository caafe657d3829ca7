# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Visits that take several steps: none is dropped, none gets too old, and every step has its share."""

from __future__ import annotations

import json
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from megatron_selfdistill.data.problems import Problem, shard
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams
from megatron_selfdistill.rollout.vllm.engine import engine_request
from megatron_selfdistill.sources.partial import PartialOptions, is_enough
from megatron_selfdistill.sources.source import Visit

PROBLEM = Problem("p", ({"role": "user", "content": "?"},), "!", None, "here")


def response(length: int, finish_reason: str = "length", version: int | None = 3) -> Response:
    return replace(Response.unsampled([7] * length, finish_reason), weight_version=version)


def visit(step: int, length: int, limit: int) -> Visit:
    return Visit(step, PROBLEM, 0, (response(length, "stop" if length < limit else "length"),))


@given(st.data())
def test_in_any_order_of_ends_no_visit_gets_older_than_allowed_and_each_step_has_its_share(data):
    num_replicas, per_replica = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    staleness = data.draw(st.integers(1, 3))
    extra = data.draw(st.integers(1, staleness * per_replica * num_replicas))
    num_steps = data.draw(st.integers(1, 8))
    sizes = PartialOptions(num_replicas * per_replica, extra, 8, 2, staleness, num_steps)
    under_way: list[Visit] = []
    begun = trained = 0
    for step in range(num_steps):
        count = min(sizes.batch_size + extra, sizes.batch_size * (num_steps - step))
        begun += count - len(under_way)
        visits = under_way + [Visit(step, PROBLEM, 0, (None,)) for _ in range(count - len(under_way))]
        own = [shard(range(count), rank, num_replicas) for rank in range(num_replicas)]
        left = data.draw(st.permutations([i for i, one in enumerate(visits) if one.unfinished(8)]))
        while not all(is_enough([visits[i] for i in places], step, per_replica, sizes) for places in own):
            ended = left.pop()
            visits[ended] = replace(visits[ended], responses=(response(3, "stop"),))
        chosen = {i for places in own for i in [i for i in places if not visits[i].unfinished(8)][:per_replica]}
        assert len(chosen) == sizes.batch_size
        assert all(0 <= step - visits[i].step <= staleness for i in chosen)
        trained += len(chosen)
        under_way = [one for i, one in enumerate(visits) if i not in chosen]
    assert begun == trained == num_steps * sizes.batch_size and not under_way


def test_a_response_goes_on_until_its_last_token():
    assert visit(0, 8, 8).unfinished(8) == [] == visit(0, 5, 8).unfinished(8)
    begun = Visit(0, PROBLEM, 2, (None, response(4), response(4, "stop"), response(8)))
    assert begun.unfinished(8) == [0, 1]
    assert begun.key(1).sample_index == 3
    longer = begun.with_response(0, response(4)).with_response(1, response(2, "stop", version=5))
    assert longer.unfinished(8) == [0]
    joined = longer.responses[1]
    assert joined is not None and joined.finish_reason == "stop" and joined.token_ids == [7] * 6
    assert joined.weight_version == 3 and list(joined.weight_spans) == [(3, 4), (5, 2)]
    again = joined.continued_by(response(1, version=5))
    assert list(again.weight_spans) == [(3, 4), (5, 3)] and again.token_versions == [3] * 4 + [5] * 3
    same = response(2).continued_by(response(1))
    assert same.weight_spans == () and same.weight_version == 3


def test_a_visit_returns_from_a_checkpoint_without_responses_of_other_lengths():
    begun = Visit(4, PROBLEM, 2, (None, response(4), response(6), response(5, "stop")))
    stored = json.loads(json.dumps(begun.to_json()))
    found = Visit.from_json(stored, {"p": PROBLEM})
    assert [one and one.token_ids for one in found.responses] == [one and one.token_ids for one in begun.responses]
    assert (found.step, found.problem, found.first_sample) == (4, PROBLEM, 2)
    kept = found.without_odd_lengths(max_new_tokens=8, round_tokens=4)
    assert [one is None for one in kept.responses] == [True, False, True, False]


def test_each_part_of_a_response_has_random_numbers_of_its_own():
    params = SamplingParams(max_new_tokens=4)
    first = Request([1, 2], 9)
    seeds = [engine_request(one, params).sampling["seed"] for one in (first, replace(first, begun=4))]
    assert seeds[0] == 9 != seeds[1] < 2**63
    assert engine_request(replace(first, begun=8), params).sampling["seed"] not in seeds
