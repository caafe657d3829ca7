# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A product of teachers with prompts, shares, widths and weights of their own keeps each of them with its teacher."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_selfdistill import learner
from megatron_selfdistill.data.contexts import ContextPair, TeacherPrompt
from megatron_selfdistill.learner import Learner
from megatron_selfdistill.loss import Target
from megatron_selfdistill.pipeline import schedule

NAMES = ["code", "default", "math"]
WIDTHS = {"code": 3, "default": 2, "math": 4}
OWN = {"code": 0.25, "default": 0.75, "math": 3.0}
"""The w of each teacher, of which `default` has that of the target."""
VOCAB = 5


def weight_of(name: str) -> Tensor:
    """Return the output weight [V, h] of a teacher, which no other teacher has."""
    return torch.arange(VOCAB * WIDTHS[name]).view(VOCAB, -1).float().sin() * (1 + NAMES.index(name))


def states_of(name: str, prompt: list[int], num_tokens: int) -> Tensor:
    """Return the states [R, h] of a teacher that has read ``prompt``."""
    rows = [[sum(prompt) + 2 * token + 3 * column for column in range(WIDTHS[name])] for token in range(num_tokens)]
    return torch.tensor(rows).float().cos() + NAMES.index(name)


def context(shares: list[float], num_tokens: int) -> ContextPair:
    of_teachers = tuple(
        TeacherPrompt(name, share, [7 * (1 + NAMES.index(name)) + num_tokens])
        for name, share in zip(NAMES, shares, strict=True)
    )
    response = [1] * num_tokens
    return ContextPair(
        "p", [1], of_teachers[0].prompt, response, False, teacher="+".join(NAMES), of_teachers=of_teachers
    )


class Bank:
    """The states of one teacher, as the schedule hands them on."""

    def __init__(self, states: Tensor) -> None:
        self.states = states

    def _take(self, index: int, name: str, dtype: torch.dtype) -> Tensor:
        return self.states


def stand_in(weights: dict[str, float]) -> Any:
    """Return what `Learner._joined` reads of a learner; its teachers are names."""
    target = Target(teacher_weight=OWN["default"])
    return SimpleNamespace(
        **{"target": target, "grid": SimpleNamespace(tp_size=1, device=torch.device("cpu")), "vocab": None},
        **{"other_widths": WIDTHS, "_width": 9, "chunks": [], "_teacher_store_bytes": 0.0, "_fetch": lambda name: None},
        target_models=lambda name: contextlib.nullcontext(SimpleNamespace(teacher=[name])),
        target_of=lambda name: target.with_teacher_weight(weights[name]),
        _packing_of=lambda config: learner.Packing(1, "alternating", True),
        _pack_alone=lambda prompts, contexts, packing: list(zip(prompts, contexts, strict=True)),
    )


@pytest.mark.parametrize("own", [OWN, dict.fromkeys(NAMES, OWN["default"])], ids=["own weights", "one weight"])
def test_every_teacher_of_a_product_keeps_its_prompt_its_share_its_columns_and_its_weight(monkeypatch, own):
    """The mix is sum of s_i w_i l_i + r, l_i the logits of teacher i on its own prompt."""
    contexts = [context([0.5, 0.2, 0.3], 2), context([0.1, 0.9, 0.0], 3)]

    def read_states(known: Any, teacher: list[str], packed: Any, reading: Any, *rest: Any, **options: Any) -> Bank:
        return Bank(torch.cat([states_of(teacher[0], prompt, len(it.response)) for prompt, it in reading]))

    monkeypatch.setattr(schedule, "read_states", read_states)
    monkeypatch.setattr(learner, "unwrapped", lambda name: SimpleNamespace(name=name, config=None, post_process=True))
    monkeypatch.setattr(learner, "output_weight", lambda last, empty: weight_of(last.name))
    joined = Learner._joined(stand_in(own), NAMES, None, contexts, "")  # type: ignore[arg-type]
    bank = object.__new__(schedule.JoinedHiddenStates)
    bank.joined, bank.batch = joined, SimpleNamespace(student=[SimpleNamespace(response_ids=torch.arange(5))])  # type: ignore[assignment]
    states, weight = bank._take(0, "teacher", torch.float64), joined.weight
    assert weight is not None
    of_token = own["default"] if joined.token_weights is None else joined.token_weights[:, None]
    expected = [
        sum(
            one.share
            * own[one.teacher]
            * states_of(one.teacher, one.prompt, len(it.response))
            @ weight_of(one.teacher).t()
            for one in it.of_teachers
        )
        for it in contexts
    ]
    torch.testing.assert_close(
        of_token * (states @ weight.double().t()), torch.cat(expected).double(), rtol=1e-5, atol=1e-5
    )
    assert (joined.token_weights is None) == (own is not OWN)
