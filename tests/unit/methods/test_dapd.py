# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""DAPD: the prompts of the six texts of a response, their weights, and the loss of the published terms."""

from __future__ import annotations

import pytest
import torch
from characters import STOP, Characters
from made_methods import composed, given_with, made, response_of
from term_arrays import signals, tensor

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.methods.dapd import TERMS, matched_weights
from megatron_selfdistill.sources.rollouts import Rollout

pytestmark = pytest.mark.usefixtures("one_rank")
PROBLEM = Problem("p", ({"role": "user", "content": "1+7"},), "=8", None, "file.jsonl:1")
PUBLISHED = [2 / 15, 2 / 15, 2 / 15, 2 / 5, 2 / 5, 4 / 5]


def method(max_length: int = 40, *overrides: str):
    return made(["recipe=dapd", *overrides], given_with(Characters(), max_length=max_length))


def rollout(text: str = "eight", problem: Problem = PROBLEM) -> Rollout:
    return Rollout(problem, given_with(Characters()).pair(problem), response_of(f"{text}$"))


def test_the_six_texts_have_the_published_prompts():
    """A hint is worded as {problem}|{solution}, a colon ends each prompt, and y before y follows the plain prompt."""
    one, show = rollout(), Characters().decode
    texts, metrics = method().texts([one], [one])
    response, again = one.response.token_ids, show([*Characters().encode("1+7:"), *one.response.token_ids])
    found = [
        (text.response.token_ids, show(text.prompts.teacher_prompt), show(text.prompts.student_prompt))
        for text in texts
    ]
    solution = [*Characters().encode("=8"), STOP]
    assert found == [
        (response, "1+7|=8:", "1+7:"),
        (solution, "1+7:", "1+7|=8:"),
        (response, "1+7|=8:", again),
        (solution, "1+7|eight:", "1+7:"),
        (response, "1+7:", again),
        (solution, "1+7|eight:", "1+7|=8:"),
    ]
    assert [text.part for text in texts] == ["response", *["view"] * 5] and metrics == {"hints/share": 1.0}
    assert [text.privileged for text in texts] == [False, True, True, False, True, True]


def test_a_response_whose_contexts_do_not_fit_is_left_out():
    short, long = rollout("1"), rollout("eighteen")
    texts, metrics = method(max_length=16).texts([short, long], [short, long])
    assert len(texts) == len(TERMS) and texts[0].response == short.response and metrics == {"hints/share": 0.5}
    assert method(max_length=16).texts([long], [long]) == ([], {"hints/share": 0.0})


def test_a_solution_is_cut_at_the_length_of_a_response():
    long = rollout(problem=Problem("p", PROBLEM.messages, "=0123456789", None, "file.jsonl:1"))
    texts, _ = method(max_length=60).texts([long], [long])
    assert Characters().decode(texts[1].response.token_ids) == "=0123456", "8 new tokens at most"


def test_every_term_is_its_weight_times_the_mean_over_its_own_tokens():
    """Two responses with 3 and 1 tokens, whose solutions have 2 and 4: the loss divides by all 30 tokens."""
    lengths = [3, 2, 3, 2, 3, 2, 1, 4, 1, 4, 1, 4]
    terms = method().terms(0, [rollout()] * 12, signals([0.0] * 12, lengths=lengths))
    losses = torch.linspace(0.1, 2.0, sum(lengths), dtype=torch.float64)
    parts = losses.split(lengths)
    wanted = sum(w * torch.cat([parts[i], parts[6 + i]]).mean() for i, w in enumerate(PUBLISHED))
    assert (terms.divergence * losses).sum() / sum(lengths) == pytest.approx(float(wanted), rel=1e-12)
    assert not (terms.advantage.any() or terms.sampled_kl.any() or terms.likelihood.any())


def test_a_term_without_tokens_has_no_weight():
    found = matched_weights(tensor(2, 0, 2, 0, 2, 0), tensor(*PUBLISHED))
    assert found.tolist() == pytest.approx([0.4, 0, 0.4, 0, 1.2, 0])
    assert matched_weights(tensor(*[0.0] * 6), tensor(*PUBLISHED)).tolist() == [0.0] * 6


def test_the_recipe_has_the_published_weights():
    config = composed("recipe=dapd")
    assert [getattr(config.method, name) for name in TERMS] == pytest.approx(PUBLISHED, rel=1e-15)
    assert sum(PUBLISHED) == pytest.approx(2)
