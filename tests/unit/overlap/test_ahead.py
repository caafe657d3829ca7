# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Finished responses of later steps survive every checkpoint until the step that trains on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch

from megatron_selfdistill.config import RolloutConfig
from megatron_selfdistill.data.problem_sampler import ProblemSampler
from megatron_selfdistill.data.problems import Problem, ProblemSet
from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.overlap.ahead import AheadOnPolicy, synced_sampler
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams
from megatron_selfdistill.sources.source import SourceState
from megatron_selfdistill.sources.synced_sampler import SyncedSampler

PROBLEMS = [Problem(name, ({"role": "user", "content": name},), "hint", name, f"file:{name}") for name in "ab"]
STORED = {key: Response([7, 9], [-1.0, -2.0], [-1.0, -2.0], "stop", weight_version=3) for key in ("one", "two")}
NEW = {"three": Response([8], [-0.5], [-0.5], "length", weight_version=4)}


class Engines:
    """A sampler whose tickets are dictionaries of finished responses: the known ones of a request, and `NEW`."""

    def update_weights(self, version: int) -> None:
        pass

    def __init__(self) -> None:
        self.lengths: dict[int, int] = {}

    def start(
        self, requests: Sequence[Request], params: SamplingParams, used_at: int, known: Mapping[str, Response]
    ) -> dict[str, Response]:
        self.lengths[used_at] = params.max_new_tokens
        return {**known, **NEW}

    def finished(self, ticket: dict[str, Response]) -> dict[str, Response]:
        return ticket


class Stateless:
    """A method that keeps nothing from step to step."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def restored(self, state: Mapping[str, Any]) -> Stateless:
        return self


@pytest.fixture
def source(monkeypatch) -> AheadOnPolicy:
    """Return the source of a run that asks for nothing by itself."""
    monkeypatch.setattr(AheadOnPolicy, "_asked", lambda self, *_: SimpleNamespace(samples=[]))
    state = SourceState(ProblemSampler(ProblemSet(PROBLEMS), batch_size=1, seed=1), cast(Any, Stateless()))
    sampler = SyncedSampler(cast(Any, Engines), Phases(torch.device("cpu")))
    options = SimpleNamespace(sampler=sampler, horizon_at=[9, 3, 4, 5, 6, 6].__getitem__, adapts_horizon=False)
    return AheadOnPolicy(state, cast(Any, options), ahead=1, num_steps=6)


def stored(source: AheadOnPolicy) -> dict[str, Any]:
    return dict(source.state_dict()["ahead"])


def resumed(source: AheadOnPolicy) -> AheadOnPolicy:
    source.load_state_dict({**source.state_dict(), "ahead": {key: asdict(one) for key, one in STORED.items()}})
    return source


def test_a_stop_before_the_first_step_after_a_resume_stores_the_responses_of_the_earlier_checkpoint(source):
    assert stored(source) == {}
    assert stored(resumed(source)) == {key: asdict(response) for key, response in STORED.items()}


def test_a_stop_after_a_resumed_step_has_begun_stores_the_known_and_the_new_responses(source):
    resumed(source)._ticket(4, SamplingParams(8))
    assert stored(source) == {key: asdict(response) for key, response in {**STORED, **NEW}.items()}


def test_responses_have_the_horizon_of_the_step_that_trains_on_them(source):
    source._ticket(2, SamplingParams(8))
    source._ticket(3, SamplingParams(5))
    assert cast(Any, source._engines).lengths == {2: 4, 3: 5, 4: 5}


def test_new_weights_wait_for_the_responses_under_way_where_they_are_to_keep_the_old_ones():
    inner, phases = Mock(), Phases(torch.device("cpu"))
    sampler = synced_sampler(RolloutConfig(at_update="wait"))(lambda: inner, phases)
    for version in (3, 3, 4):
        sampler.update_weights(version)
    assert [name for name, *_ in inner.method_calls] == ["settle", "update_weights"] * 2
    assert {"seconds/rollout", "seconds/sync"} <= phases.metrics().keys(), "waiting for responses is no sync"
