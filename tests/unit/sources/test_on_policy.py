# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The requests of the on-policy source to the sampler, and its responses and token weights for training."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import tiny
import torch
from characters import ONE_RANK, Characters, text_of
from made_methods import given_with, made

from megatron_selfdistill.config.schema.data_config import judges_responses
from megatron_selfdistill.data.problem_sampler import ProblemSampler
from megatron_selfdistill.data.problems import ProblemSet
from megatron_selfdistill.evaluation.verify import exact_match
from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams
from megatron_selfdistill.rollout.sampling import sample_seed
from megatron_selfdistill.sources import on_policy
from megatron_selfdistill.sources.judge import Judge
from megatron_selfdistill.sources.on_policy import OnPolicy, OnPolicyOptions
from megatron_selfdistill.sources.source import SourceState
from megatron_selfdistill.sources.synced_sampler import SyncedSampler

PROBLEMS = [tiny.problem(name, f"hint {name}", name, id=name) for name in "abcd"]
SEED, STEP, SAMPLES = 7, 3, 2


class Sampler:
    """A sampler that answers a problem with its own text, right at even indices, and states two log-probs."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def update_weights(self, version: int) -> None:
        self.calls.append(version)

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        self.calls.append(list(requests))
        return [
            Response([request.prompt[0] if i % 2 == 0 else ord("?"), ord("$")], [-1.0, -2.0], [-3.0, -4.0 - i], "stop")
            for i, request in enumerate(requests)
        ]


def source_on(dp_rank: int, monkeypatch: pytest.MonkeyPatch, overrides: Sequence[str] = ()) -> OnPolicy:
    grid = SimpleNamespace(**(vars(ONE_RANK) | {"dp_rank": dp_rank, "dp_size": 2}))
    judge = Judge(exact_match, Characters(), grid)
    monkeypatch.setattr(Judge, "right", lambda self, rollouts: [i % 2 == 0 for i in range(len(rollouts))])
    monkeypatch.setattr(Judge, "rewards", lambda self, rollouts: [(i + 1) % 2 for i in range(len(rollouts))])
    method = made(overrides, given_with(Characters(), max_length=40), problems=PROBLEMS, grid=grid, judge=judge)
    problem_sampler = ProblemSampler(ProblemSet(PROBLEMS), batch_size=4, seed=1)
    judges = judges_responses(method.tools.config)
    options = OnPolicyOptions(Sampler(), Phases(), grid, SEED, SAMPLES, judges, 2.0, False, None, 0, None)
    return OnPolicy(SourceState(problem_sampler, method), options)


@pytest.mark.parametrize("dp_rank", [0, 1])
def test_the_sampler_gets_each_prompt_in_its_role_with_the_seed_of_the_sample(dp_rank, one_rank, monkeypatch):
    source = source_on(dp_rank, monkeypatch)
    batch = source.next_step(STEP, SamplingParams(8))
    version, requests = source._options.sampler.calls
    assert version == STEP, "the weights of this moment sample"
    share = source.state.problem_sampler.fork().next_batch()[dp_rank::2]
    assert [problem.id for problem in batch.problems] == [problem.id for problem in share]
    asked = [(problem.id, i) for problem in share for i in range(SAMPLES)]
    for request, (name, i) in zip(requests, asked, strict=True):
        assert request.seed == sample_seed(SEED, STEP, name, i)
        student = text_of(request.prompt)
        assert name in student and "hint" not in student and request.teacher_prompt is None
    for context, response in zip(batch.contexts, batch.responses, strict=True):
        assert context.response == response.token_ids
        assert "hint" not in text_of(context.student_prompt) and "hint" in text_of(context.teacher_prompt)


def test_only_right_responses_are_trained_on_with_their_own_log_probs(one_rank, monkeypatch):
    source = source_on(0, monkeypatch, overrides=["method.name=rft", "loss.rollout_correction=truncated"])
    batch = source.next_step(STEP, SamplingParams(8))
    assert len(batch.responses) == 4 and len(batch.contexts) == 2
    kept = [batch.responses[0], batch.responses[2]]
    assert [context.response for context in batch.contexts] == [response.token_ids for response in kept]
    assert batch.sampler_log_probs.tolist() == [-1.0, -2.0] * 2
    assert batch.token_coefficients.sampled_log_probs.tolist() == [-3.0, -4.0, -3.0, -6.0]
    student = torch.tensor([-3.5, -3.0, -9.0, -6.0], dtype=torch.float64)
    weights = batch.token_coefficients(student, torch.arange(4)).divergence
    torch.testing.assert_close(weights, torch.tensor([-0.5, 1.0, -6.0, 0.0]).double().exp().clamp(max=2.0))


def test_a_problem_that_comes_twice_in_a_batch_gets_samples_of_its_own():
    assert on_policy.first_sample_indices([PROBLEMS[i] for i in (0, 1, 0, 0)], SAMPLES) == [0, 0, 2, 4]


def test_each_version_of_the_weights_is_sent_once_and_its_time_is_counted():
    inner, phases = Mock(), Phases(torch.device("cpu"))
    sampler = SyncedSampler(lambda: inner, phases)
    for version in (3, 3, 4, 4, 3):
        sampler.update_weights(version)
    assert [call.args for call in inner.update_weights.call_args_list] == [(3,), (4,), (3,)]
    assert sampler.version == 3 and "seconds/sync" in phases.metrics()
    inner.update_weights.side_effect = RuntimeError("the engine died")
    with pytest.raises(RuntimeError, match="died"):
        sampler.update_weights(5)
    inner.update_weights.side_effect = None
    sampler.update_weights(5)
    assert inner.update_weights.call_count == 5 and sampler.version == 5, "what could not be sent is sent again"


def test_nothing_is_built_until_something_is_to_be_sampled_and_then_once():
    inner = Mock()
    build = Mock(return_value=inner)
    sampler = SyncedSampler(build, Phases(torch.device("cpu")))
    sampler.sleep()
    sampler.close()
    assert sampler.metrics() == {} and not build.called
    sampler.update_weights(7)
    inner.update_weights.assert_called_once_with(7)
    assert sampler.generate([], None) is inner.generate.return_value and sampler.metrics() is inner.metrics.return_value
    sampler.sleep()
    sampler.close()
    assert build.call_count == inner.sleep.call_count == inner.close.call_count == 1
