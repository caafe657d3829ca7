# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""PAST: what the teacher sees, which texts train whom, and the losses of both parts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from characters import text_of
from made_methods import TextSampler, made, shown
from term_arrays import signals, tensor

from megatron_selfdistill.methods.past import Past
from megatron_selfdistill.rollout.sampling import SampleKey
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.signals import Clip, signals_of
from megatron_selfdistill.sources.step_terms import RatioTerms

pytestmark = pytest.mark.usefixtures("one_rank")
STEP, GIVEN = 30, tiny.given(60)
PROBLEM = tiny.problem("1+7", "=8", "8")


def attempts(*texts: str) -> list[Rollout]:
    """Return attempts at one problem, of which those that say 8 are right."""
    return [
        tiny.rollout(text, float(text == "8$"), prompts=GIVEN, problem=PROBLEM, key=SampleKey(STEP, "p", i))
        for i, text in enumerate(texts)
    ]


def method(*overrides: str, sampler: Any = None, max_length: int = 60) -> Past:
    short = "method.hint_template='{solution};{verdict};{attempt}'"
    options = ["recipe=past", "seed=5", short, "method.num_retries=2", *overrides]
    past, metrics = made(options, replace(GIVEN, max_length=max_length), sampler=sampler).prepare(STEP, None, None)
    assert metrics == {}
    return past


def test_the_teacher_sees_solution_verdict_and_the_whole_attempt():
    chosen, metrics = method().select(STEP, attempts("8$", "think 7$", "9"))
    hints = ["1+7|=8;right;8:", "1+7|=8;wrong;think 7:", "1+7|=8;wrong;9:"]
    assert list(map(shown, chosen)) == hints and metrics == {"hints/share": 1}
    assert {text_of(one.prompts.student_prompt) for one in chosen} == {"1+7:"}
    alone, _ = method("method.hint_template='{attempt}'").select(STEP, attempts("7$"))
    assert shown(alone[0]) == "1+7|7:"
    fitting, metrics = method(max_length=24).select(STEP, attempts("8$", "thinks 7$"))
    assert [one.key.sample_index for one in fitting if one.key] == [0] and metrics == {"hints/share": 0.5}


def test_right_attempts_are_kept_and_failed_ones_are_tried_again():
    sampler = TextSampler(STEP, "8$", "7$", "7$", "7$")
    past, sampled = method(sampler=sampler), attempts("8$", "7$", "9$")
    selected, _ = past.select(STEP, sampled)
    texts, metrics = past.texts(sampled, selected)
    kept, *retries = texts[3:]
    assert texts[:3] == selected
    assert kept.response == sampled[0].response and kept.privileged and kept.part == "view"
    for one in texts[3:]:
        assert text_of(one.prompts.student_prompt).startswith("1+7|=8;") and shown(one) == "1+7:"
    found = [(text_of(one.response.token_ids), one.reward, one.group, one.key, one.problem) for one in retries]
    assert found == [("8$", 1, 1, None, PROBLEM), *[("7$", 0, group, None, PROBLEM) for group in (1, 2, 2)]]
    assert [text_of(one.prompt) for one in sampler.requests] == ["1+7|=8;wrong;7:"] * 2 + ["1+7|=8;wrong;9:"] * 2
    assert len({one.seed for one in sampler.requests}) == 4
    assert metrics == {"retries/reward_mean": 0.25, "retries/mixed_share": 0.5}


@pytest.mark.parametrize(("teacher_steps", "privileged"), [(31, [True]), (30, [False, True])])
def test_the_first_steps_train_the_teacher_alone(teacher_steps, privileged):
    past, sampled = method(f"method.teacher_steps={teacher_steps}", sampler=TextSampler(STEP)), attempts("8$")
    texts, _ = past.texts(sampled, past.select(STEP, sampled)[0])
    assert [one.privileged for one in texts] == privileged


def test_a_teacher_that_is_not_adapted_and_a_replica_without_failed_attempts_sample_nothing():
    past, sampled = method("method.weight=0", "teacher.weights=frozen"), attempts("8$", "7$")
    selected, _ = past.select(STEP, sampled)
    assert past.texts(sampled, selected) == (selected, {})
    assert past.terms(STEP, selected, signals_of(selected)).divergence.tolist() == [1] * 4
    empty = method(sampler=TextSampler(STEP)).texts([], [])
    assert empty == ([], {"retries/reward_mean": 0, "retries/mixed_share": 0}), "it takes part in the sampling"


PRESERVE, PROXIMITY, WEIGHT, TAUGHT = 0.7, 0.3, 1.5, 2.0
KINDS, LENGTHS = ["student", "student", "right", "retry", "retry", "retry"], [2, 1, 2, 1, 2, 1]


def written(own: torch.Tensor, other: torch.Tensor, tokens: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
    """Return the loss of the page, where no ratio is clipped: the means over attempts, right ones and retries."""
    log_p, log_q = own.log_softmax(-1), other.log_softmax(-1)
    forward = (log_q.exp() * (log_q - log_p)).sum(-1)
    rows, parts, rewards = iter(range(9)), {kind: [] for kind in KINDS}, iter([1.0, 0.0, 0.0])
    spread = math.sqrt(((2 / 3) ** 2 + 2 * (1 / 3) ** 2) / 2) + 1e-6
    for kind, length in zip(KINDS, LENGTHS, strict=True):
        reward = next(rewards) if kind == "retry" else 0.0
        for _ in range(length):
            i = next(rows)
            chosen, wanted = log_p[i, tokens[i]], log_q[i, tokens[i]]
            ratio = (chosen - mu[i]).exp()
            if kind == "retry":
                k3 = PROXIMITY * (ratio * (wanted - chosen)).detach() * chosen
                parts[kind].append(-WEIGHT * (reward - 1 / 3) / spread * ratio - k3)
            else:
                parts[kind].append((TAUGHT if kind == "student" else PRESERVE) * forward[i])
    return sum(torch.stack(part).mean() for part in parts.values())  # type: ignore[return-value]


def test_the_gradient_is_that_of_the_written_losses():
    """The sampler's log-probs differ from the student's by less than the clip."""
    generator = torch.Generator().manual_seed(4)
    own, other = (torch.randn(9, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    tokens = torch.tensor([0, 3, 1, 2, 4, 0, 1, 3, 2])
    at = tokens[:, None]
    log_p, log_q = (rows.log_softmax(-1).gather(1, at)[:, 0] for rows in (own, other))
    mu = log_p + tensor(0.1, -0.1, 0.05, 0.0, 0.02, 0.15, -0.1, -0.05, 0.1)
    leaf, student = own.clone().requires_grad_(), own.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(written(leaf, other, tokens, mu), leaf)

    numbers = {"preserve": PRESERVE, "proximity": PROXIMITY, "weight": WEIGHT, "distill_weight": TAUGHT}
    past, (base,) = method(*(f"method.{name}={value}" for name, value in numbers.items())), attempts("8$")
    keys = [None if kind == "retry" else base.key for kind in KINDS]
    rollouts = [replace(base, privileged=k != "student", key=key) for k, key in zip(KINDS, keys, strict=True)]
    both = signals(
        *([1.0, 0.0, 1.0, 1.0, 0.0, 0.0], [0, 0, 1, 2, 2, 2], LENGTHS),
        privileged=[one.privileged for one in rollouts],
        **{"mu": mu.tolist(), "p": log_p.tolist(), "q": log_q.tolist()},
    )
    terms = past.terms(STEP, rollouts, both)
    found = RatioTerms(terms, mu, log_q, Clip(0.2, 0.2))(log_p, torch.arange(9))
    log_student, log_teacher = student.log_softmax(-1), other.log_softmax(-1)
    forward = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    loss = (found.divergence * forward - found.policy * log_student.gather(1, at)[:, 0]).sum() / 9
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-13)
    silent = torch.tensor([kind == "retry" for kind in KINDS]).repeat_interleave(torch.tensor(LENGTHS))
    assert not terms.divergence[silent].any() and not terms.advantage[~silent].any()
    assert (terms.divergence[~silent] > 0).all() and not terms.sampled_kl[~silent].any()
