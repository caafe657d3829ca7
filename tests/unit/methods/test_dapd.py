# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""DAPD: the prompts of the six texts of a response, their weights, and the loss of the published terms."""

from __future__ import annotations

import pytest
import tiny
import torch
from characters import STOP, Characters
from made_methods import composed, made
from term_arrays import signals, tensor

from megatron_selfdistill.methods.dapd import TERMS, matched_weights

pytestmark = pytest.mark.usefixtures("one_rank")
PROBLEM = tiny.problem("1+7", "=8")
PUBLISHED = [2 / 15, 2 / 15, 2 / 15, 2 / 5, 2 / 5, 4 / 5]
encode, decode = Characters().encode, Characters().decode


def method(max_length: int = 40):
    return made(["recipe=dapd"], tiny.given(max_length))


def test_the_six_texts_have_the_published_prompts():
    """A hint is worded as {problem}|{solution}, a colon ends each prompt, and y before y follows the plain prompt."""
    one = tiny.rollout("eight$", problem=PROBLEM)
    texts, metrics = method().texts([one], [one])
    response, solution = one.response.token_ids, [*encode("=8"), STOP]
    again = decode([*encode("1+7:"), *response])
    expected = [
        (response, "1+7|=8:", "1+7:", False),
        (solution, "1+7:", "1+7|=8:", True),
        (response, "1+7|=8:", again, True),
        (solution, "1+7|eight:", "1+7:", False),
        (response, "1+7:", again, True),
        (solution, "1+7|eight:", "1+7|=8:", True),
    ]
    for text, wanted in zip(texts, expected, strict=True):
        prompts = decode(text.prompts.teacher_prompt), decode(text.prompts.student_prompt)
        assert (text.response.token_ids, *prompts, text.privileged) == wanted
    assert [text.part for text in texts] == ["response", *["view"] * 5] and metrics == {"hints/share": 1.0}


def test_a_response_whose_contexts_do_not_fit_is_left_out_and_a_solution_is_cut_at_the_length_of_a_response():
    short, long = (tiny.rollout(text, problem=PROBLEM) for text in ("1$", "eighteen$"))
    texts, metrics = method(max_length=16).texts([short, long], [short, long])
    assert len(texts) == len(TERMS) and texts[0].response == short.response and metrics == {"hints/share": 0.5}
    assert method(max_length=16).texts([long], [long]) == ([], {"hints/share": 0.0})
    cut = tiny.rollout("eight$", problem=tiny.problem("1+7", "=0123456789"))
    assert decode(method(max_length=60).texts([cut], [cut])[0][1].response.token_ids) == "=0123456", "8 new tokens"


def test_every_term_is_its_published_weight_times_the_mean_over_its_own_tokens():
    """Two responses with 3 and 1 tokens, whose solutions have 2 and 4: the loss divides by all 30 tokens."""
    lengths = [3, 2, 3, 2, 3, 2, 1, 4, 1, 4, 1, 4]
    rollouts = [tiny.rollout("eight$", problem=PROBLEM)] * 12
    terms = method().terms(0, rollouts, signals([0.0] * 12, lengths=lengths))
    losses = torch.linspace(0.1, 2.0, sum(lengths), dtype=torch.float64)
    parts = losses.split(lengths)
    wanted = sum(w * torch.cat([parts[i], parts[6 + i]]).mean() for i, w in enumerate(PUBLISHED))
    assert (terms.divergence * losses).sum() / sum(lengths) == pytest.approx(float(wanted), rel=1e-12)
    assert not (terms.advantage.any() or terms.sampled_kl.any() or terms.likelihood.any())
    settings = composed("recipe=dapd").method
    assert [getattr(settings, name) for name in TERMS] == pytest.approx(PUBLISHED, rel=1e-15)


def test_a_term_without_tokens_has_no_weight():
    found = matched_weights(tensor(2, 0, 2, 0, 2, 0), tensor(*PUBLISHED))
    assert found.tolist() == pytest.approx([0.4, 0, 0.4, 0, 1.2, 0])
    assert matched_weights(tensor(*[0.0] * 6), tensor(*PUBLISHED)).tolist() == [0.0] * 6
