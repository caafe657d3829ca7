# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""RLT: explanations are found in responses, read after the right prompts, and rewarded as published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from characters import STOP, Characters
from made_methods import given_with, made, response_of
from term_arrays import tensor

from megatron_selfdistill.data.contexts import ContextPair, PromptPair
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.methods.rlt import explanation_in
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.sources.rollouts import Rollout

GIVEN = given_with(Characters())
BUILDER = GIVEN.builder
PROBLEM = Problem("a", ({"role": "user", "content": "2+2"},), "=4.", "4", "file:1")
PAIR = PromptPair("a", BUILDER.student_prompt(PROBLEM), BUILDER.teacher_prompt(PROBLEM), "=4.")
SOLUTION, POLICY = tensor(-0.2, -1.5, -0.1), tensor(-0.3, -0.1, -0.9, -0.2)
STUDENT = tensor(-0.5, -2.1, -0.8, -0.2)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("since</t>$", ("since", True)),
        (" since </t> and more$", ("since", True)),
        ("a</t>b</t>$", ("a", True)),
        ("</t>$", ("", True)),
        ("since$", ("since", False)),
        ("since", ("since", False)),
        ("since</t>", ("since", True)),
        ("$", ("", False)),
    ],
)
def test_the_explanation_ends_before_its_first_closing_tag(text, found):
    explanation = explanation_in(response_of(text), Characters(), "\n</t>\n")
    assert (explanation.text(Characters()), explanation.has_closing_tag) == found


def test_a_closing_tag_may_be_the_stop_token():
    assert explanation_in(response_of("since$"), Characters(), "$").has_closing_tag


class Pairs(Characters):
    """A tokenizer whose tokens are pairs of characters."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(f"{chr(i // 256)}{chr(i % 256)}" for i in ids)


def test_a_token_across_the_tag_does_not_belong_to_the_explanation():
    ids = [256 * ord(a) + ord(b) for a, b in ("ab", "c<", "/t", ">$")]
    explanation = explanation_in(Response(ids, [], [], "stop"), Pairs(), "</t>")
    assert (explanation.text(Pairs()), explanation.has_closing_tag) == ("ab", True)


class Reading:
    """Log-probs that are looked up by the text of the response; the calls are kept."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[ContextPair], float]] = []
        self.known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
            "=4.": (tensor(-9.0, -9.0, -9.0), SOLUTION),
            "why?": (POLICY, STUDENT),
            "": (tensor(), tensor()),
        }

    def read_tokens(self, contexts: Sequence[ContextPair], temperature: float) -> Any:
        self.calls.append((list(contexts), temperature))
        found = [self.known["".join(map(chr, context.response))] for context in contexts]
        return *(torch.cat([one[i] for one in found] or [tensor()]) for i in (0, 1)), None


def rollouts(*texts: str) -> list[Rollout]:
    return [Rollout(PROBLEM, PAIR, response_of(text)) for text in texts]


def rewards(*texts: str, **settings: Any) -> tuple[list[float], Any, Reading]:
    reading = Reading()
    overrides = [f"method.{name}={value}" for name, value in settings.items()]
    method = made(["recipe=rlt", "method.closing_tag='</t>'", *overrides], GIVEN, readers=reading)
    rewarded, metrics = method.rewarded(rollouts(*texts))
    return [one.reward for one in rewarded], metrics, reading


def test_rewards_of_the_worked_example(one_rank):
    found, metrics, _ = rewards("why?</t>$", "why?$", "</t>$")
    silent = -0.6 + 0.01 * -1.5  # r_KL of no token is 0
    assert found == pytest.approx([-2.25, -3.25, silent], abs=1e-12)
    assert metrics == pytest.approx(
        {
            "explanations/solution_log_prob": -0.615,
            "explanations/log_ratio": 2 * 0.545 / 3,
            "explanations/closing_tags": 2 / 3,
        }
    )


def test_every_setting_counts(one_rank):
    found, _, reading = rewards("why?$", alpha=0.5, ratio_weight=2.0, missing_tag_penalty=0.25, temperature=0.9)
    assert found == pytest.approx([-0.6 + 0.5 * -1.5 - 2 * (0.525 + 0.5 * 2.0) - 0.25], abs=1e-12)
    assert reading.calls[0][1] == 0.9


def test_the_policy_reads_after_the_solution_and_the_student_after_the_problem(one_rank):
    _, _, reading = rewards("why?</t>$", "why?$")
    (pairs, temperature) = reading.calls[0]
    texts = [tuple("".join(map(chr, ids)) for ids in (p.student_prompt, p.teacher_prompt, p.response)) for p in pairs]
    assert temperature == 0.7
    assert texts[:2] == [("2+2|=4.:", "2+2:", "why?")] * 2
    assert texts[2:] == [("2+2:why?</t>", "2+2:why?</t>", "=4.")] * 2


def test_no_rollouts_have_no_rewards(one_rank):
    assert rewards()[0] == []


@pytest.mark.parametrize("privileged", [True, False])
def test_both_models_may_read_after_the_prompt_of_the_sample(privileged):
    viewed = rollouts("why?$")[0].in_sampled_view(privileged=privileged)
    prompt = PAIR.teacher_prompt if privileged else PAIR.student_prompt
    assert viewed.prompts.student_prompt == viewed.prompts.teacher_prompt == prompt
    assert (viewed.privileged, viewed.hinted) == (privileged, True)
    assert viewed.response.token_ids[-1] == STOP
