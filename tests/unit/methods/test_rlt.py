# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""RLT: an explanation is rewarded by what a student makes of it; the policy and the student read in two contexts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from characters import Characters, text_of
from made_methods import made, response_of
from term_arrays import tensor

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.methods.rlt import explanation_in
from megatron_selfdistill.rollout.base import Response

PROBLEM = tiny.problem("2+2", "=4.", "4", id="a")
SOLUTION, POLICY = tensor(-0.2, -1.5, -0.1), tensor(-0.3, -0.1, -0.9, -0.2)
STUDENT = tensor(-0.5, -2.1, -0.8, -0.2)


# The explanation of each text with a closing tag.
TAGGED = {"since</t>$": "since", " since </t> and more$": "since", "a</t>b</t>$": "a", "</t>$": "", "b</t>": "b"}


@pytest.mark.parametrize("text", [*TAGGED, "since$", "since", "$"])
def test_the_explanation_ends_before_its_first_closing_tag(text):
    explanation = explanation_in(response_of(text), Characters(), "\n</t>\n")
    assert explanation.text(Characters()) == TAGGED.get(text, text.removesuffix("$"))
    assert explanation.has_closing_tag == (text in TAGGED)


class Pairs(Characters):
    """A tokenizer whose tokens are pairs of characters."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(f"{chr(i // 256)}{chr(i % 256)}" for i in ids)


def test_a_token_across_the_tag_does_not_belong_to_the_explanation_and_the_tag_may_be_the_stop_token():
    ids = [256 * ord(a) + ord(b) for a, b in ("ab", "c<", "/t", ">$")]
    explanation = explanation_in(Response(ids, [], [], "stop"), Pairs(), "</t>")
    assert (explanation.text(Pairs()), explanation.has_closing_tag) == ("ab", True)
    assert explanation_in(response_of("since$"), Characters(), "$").has_closing_tag


class Reading:
    """Log-probs that are looked up by the text of the response; the calls are kept."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[ContextPair], float]] = []

    def read_tokens(self, contexts: Sequence[ContextPair], temperature: float) -> Any:
        self.calls.append((list(contexts), temperature))
        known = {"=4.": (tensor(-9.0, -9.0, -9.0), SOLUTION), "why?": (POLICY, STUDENT), "": (tensor(), tensor())}
        found = [known[text_of(context.response)] for context in contexts]
        return *(torch.cat([one[i] for one in found] or [tensor()]) for i in (0, 1)), None


def rewards(*texts: str, **settings: Any) -> tuple[list[float], Any, Reading]:
    reading = Reading()
    overrides = [f"method.{name}={value}" for name, value in settings.items()]
    method = made(["recipe=rlt", "method.closing_tag='</t>'", *overrides], tiny.given(), readers=reading)
    rewarded, metrics = method.rewarded([tiny.rollout(text, problem=PROBLEM) for text in texts])
    return [one.reward for one in rewarded], metrics, reading


def test_rewards_of_the_worked_example_where_policy_and_student_read_in_contexts_of_their_own(one_rank):
    found, metrics, reading = rewards("why?</t>$", "why?$", "</t>$")
    silent = -0.6 + 0.01 * -1.5  # r_KL of no token is 0
    assert found == pytest.approx([-2.25, -3.25, silent], abs=1e-12)
    means = {"solution_log_prob": -0.615, "log_ratio": 2 * 0.545 / 3, "closing_tags": 2 / 3}
    assert metrics == pytest.approx({f"explanations/{name}": mean for name, mean in means.items()})
    ((pairs, temperature),) = reading.calls
    texts = [tuple(map(text_of, (p.student_prompt, p.teacher_prompt, p.response))) for p in pairs]
    assert texts[:2] == [("2+2|=4.:", "2+2:", "why?")] * 2 and temperature == 0.7
    assert texts[3:5] == [("2+2:why?</t>", "2+2:why?</t>", "=4.")] * 2
    assert rewards()[0] == []


def test_every_setting_counts(one_rank):
    found, _, reading = rewards("why?$", alpha=0.5, ratio_weight=2.0, missing_tag_penalty=0.25, temperature=0.9)
    assert found == pytest.approx([-0.6 + 0.5 * -1.5 - 2 * (0.525 + 0.5 * 2.0) - 0.25], abs=1e-12)
    assert reading.calls[0][1] == 0.9
