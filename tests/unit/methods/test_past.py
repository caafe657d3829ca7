# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""PAST: what the teacher sees, which texts train whom, and the losses of both parts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from characters import Characters, text_of
from made_methods import TextSampler, given_with, made, response_of, shown
from term_arrays import signals, tensor

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.methods.past import Past
from megatron_selfdistill.rollout.sampling import SampleKey
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.signals import Clip, signals_of
from megatron_selfdistill.sources.step_terms import RatioTerms

pytestmark = pytest.mark.usefixtures("one_rank")
STEP = 30
GIVEN = given_with(Characters(), max_length=60)
SHORT = "method.hint_template='{solution};{verdict};{attempt}'"
PROBLEM = Problem("p", ({"role": "user", "content": "1+7"},), "=8", "8", "file.jsonl:1")


def attempts(*texts: str) -> list[Rollout]:
    """Return attempts at one problem, of which those that say 8 are right."""
    pair = GIVEN.pair(PROBLEM)
    return [
        Rollout(PROBLEM, pair, response_of(text), 0, float(text == "8$"), key=SampleKey(STEP, "p", i))
        for i, text in enumerate(texts)
    ]


def method(*overrides: str, sampler: Any = None, step: int = STEP, max_length: int = 60) -> Past:
    options = ["recipe=past", "seed=5", SHORT, "method.num_retries=2", *overrides]
    past, metrics = made(options, replace(GIVEN, max_length=max_length), sampler=sampler).prepare(step, None, None)
    assert metrics == {}
    return past


def test_the_teacher_sees_solution_verdict_and_the_whole_attempt():
    chosen, metrics = method().select(STEP, attempts("8$", "think 7$", "9"))
    assert [shown(one) for one in chosen] == [
        "1+7|=8;right;8:",
        "1+7|=8;wrong;think 7:",
        "1+7|=8;wrong;9:",
    ]
    assert {text_of(one.prompts.student_prompt) for one in chosen} == {"1+7:"} and metrics == {"hints/share": 1}
    alone, _ = method("method.hint_template='{attempt}'").select(STEP, attempts("7$"))
    assert shown(alone[0]) == "1+7|7:"
    fitting, metrics = method(max_length=24).select(STEP, attempts("8$", "thinks 7$"))
    assert [one.key.sample_index for one in fitting if one.key] == [0] and metrics == {"hints/share": 0.5}


def test_right_attempts_are_kept_and_failed_ones_are_tried_again():
    sampler = TextSampler(STEP, "8$", "7$", "7$", "7$")
    past, sampled = method(sampler=sampler), attempts("8$", "7$", "9$")
    selected, _ = past.select(STEP, sampled)
    texts, metrics = past.texts(sampled, selected)
    assert texts[:3] == selected
    kept, *retries = texts[3:]
    assert kept.response == sampled[0].response and kept.privileged and kept.part == "view"
    for one in texts[3:]:
        assert text_of(one.prompts.student_prompt).startswith("1+7|=8;") and shown(one) == "1+7:"
    assert [text_of(one.response.token_ids) for one in retries] == ["8$", "7$", "7$", "7$"]
    assert [one.reward for one in retries] == [1, 0, 0, 0] and all(one.key is None for one in retries)
    assert [one.group for one in retries] == [1, 1, 2, 2] and all(one.problem is PROBLEM for one in retries)
    assert [text_of(one.prompt) for one in sampler.requests] == ["1+7|=8;wrong;7:"] * 2 + ["1+7|=8;wrong;9:"] * 2
    assert len({one.seed for one in sampler.requests}) == 4
    assert metrics == {"retries/reward_mean": 0.25, "retries/mixed_share": 0.5}


def test_the_first_steps_train_the_teacher_alone():
    past, sampled = method("method.teacher_steps=31", sampler=TextSampler(STEP)), attempts("8$")
    texts, _ = past.texts(sampled, past.select(STEP, sampled)[0])
    assert [one.privileged for one in texts] == [True]
    later, _ = method("method.teacher_steps=30", sampler=TextSampler(STEP)).texts(
        sampled, past.select(STEP, sampled)[0]
    )
    assert [one.privileged for one in later] == [False, True]


def test_a_teacher_that_is_not_adapted_samples_nothing():
    past, sampled = method("method.weight=0", "teacher.weights=frozen"), attempts("8$", "7$")
    selected, _ = past.select(STEP, sampled)
    assert past.texts(sampled, selected) == (selected, {})
    assert past.terms(STEP, selected, signals_of(selected)).divergence.tolist() == [1] * 4


def test_a_replica_without_failed_attempts_takes_part_in_the_sampling():
    past = method(sampler=TextSampler(STEP))
    assert past.texts([], []) == ([], {"retries/reward_mean": 0, "retries/mixed_share": 0})


PRESERVE, PROXIMITY, WEIGHT, TAUGHT = 0.7, 0.3, 1.5, 2.0
KINDS = ["student", "student", "right", "retry", "retry", "retry"]
LENGTHS = [2, 1, 2, 1, 2, 1]


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [9, 5] of the trained context of each token, and of the other context, which is a constant."""
    generator = torch.Generator().manual_seed(4)
    own, other = (torch.randn(9, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return own, other


def written(own: torch.Tensor, other: torch.Tensor, tokens: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
    """Return the loss of the page: the means over the tokens of the attempts, the right ones and the retries.

    The retries' rewards are 1, 0 and 0, and the retries are scored by p / mu with a constant p / mu where it appears as
    a weight.  No ratio is clipped.
    """
    log_p, log_q = own.log_softmax(-1), other.log_softmax(-1)
    forward = (log_q.exp() * (log_q - log_p)).sum(-1)
    rows, student, right, again = iter(range(9)), [], [], []
    rewards = iter([1.0, 0.0, 0.0])
    spread = math.sqrt(((2 / 3) ** 2 + 2 * (1 / 3) ** 2) / 2) + 1e-6
    for kind, length in zip(KINDS, LENGTHS, strict=True):
        reward = next(rewards) if kind == "retry" else 0.0
        for _ in range(length):
            i = next(rows)
            chosen, wanted = log_p[i, tokens[i]], log_q[i, tokens[i]]
            ratio = (chosen - mu[i]).exp()
            if kind == "student":
                student.append(TAUGHT * forward[i])
            elif kind == "right":
                right.append(PRESERVE * forward[i])
            else:
                k3 = PROXIMITY * (ratio * (wanted - chosen)).detach() * chosen
                again.append(-WEIGHT * (reward - 1 / 3) / spread * ratio - k3)
    return sum(torch.stack(part).mean() for part in (student, right, again))  # type: ignore[return-value]


def test_value_and_gradient_are_those_of_the_written_losses():
    """The sampler's log-probs differ from the student's by less than the clip."""
    own, other = logits()
    tokens = torch.tensor([0, 3, 1, 2, 4, 0, 1, 3, 2])
    at = tokens[:, None]
    log_p, log_q = (rows.log_softmax(-1).gather(1, at)[:, 0] for rows in (own, other))
    mu = log_p + tensor(0.1, -0.1, 0.05, 0.0, 0.02, 0.15, -0.1, -0.05, 0.1)
    leaf = own.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(written(leaf, other, tokens, mu), leaf)

    numbers = [f"method.preserve={PRESERVE}", f"method.proximity={PROXIMITY}", f"method.weight={WEIGHT}"]
    past = method(*numbers, f"method.distill_weight={TAUGHT}")
    key = SampleKey(STEP, "p", 0)
    base = attempts("8$")[0]
    rollouts = [replace(base, privileged=kind != "student", key=None if kind == "retry" else key) for kind in KINDS]
    both = signals(
        [1.0, 0.0, 1.0, 1.0, 0.0, 0.0],
        groups=[0, 0, 1, 2, 2, 2],
        lengths=LENGTHS,
        privileged=[one.privileged for one in rollouts],
        mu=mu.tolist(),
        p=log_p.tolist(),
        q=log_q.tolist(),
    )
    terms = past.terms(STEP, rollouts, both)
    found = RatioTerms(terms, mu, log_q, Clip(0.2, 0.2))(log_p, torch.arange(9))
    student = own.clone().requires_grad_()
    log_student, log_teacher = student.log_softmax(-1), other.log_softmax(-1)
    forward = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    loss = (found.divergence * forward - found.policy * log_student.gather(1, at)[:, 0]).sum() / 9
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-13)
    silent = torch.tensor([kind == "retry" for kind in KINDS]).repeat_interleave(torch.tensor(LENGTHS))
    assert not terms.divergence[silent].any() and not terms.advantage[~silent].any()
    assert (terms.divergence[~silent] > 0).all() and not terms.sampled_kl[~silent].any()
