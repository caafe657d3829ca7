# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A product of teachers with prompts, shares, widths and weights of their own keeps each of them with its teacher."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_selfdistill.data.contexts import ContextPair, TeacherPrompt
from megatron_selfdistill.loss import Target
from megatron_selfdistill.pipeline.batch import Packing
from megatron_selfdistill.teachers import configured_teachers
from megatron_selfdistill.teachers.configured_teachers import ConfiguredTeachers
from megatron_selfdistill.teachers.joined import JoinedHiddenStates
from megatron_selfdistill.teachers.teachers_config import NamedTeacher

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

    def take_field(self, index: int, name: str, dtype: torch.dtype) -> Tensor:
        return self.states


def teachers_with(weights: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> ConfiguredTeachers:
    """Return teachers that are names, with the weight w of each, on one rank."""
    found = object.__new__(ConfiguredTeachers)
    found.config = SimpleNamespace(  # type: ignore[assignment]
        target=Target(teacher_weight=OWN["default"]), schedule=SimpleNamespace(teacher_store_gb=0.0)
    )
    found.grid = SimpleNamespace(tp_size=1, device=torch.device("cpu"))  # type: ignore[assignment]
    found.vocab, found.student, found._other_widths, found._width = None, [], WIDTHS, 9  # type: ignore[assignment]
    found._settings = {name: NamedTeacher(weight=weight) for name, weight in weights.items()}
    replaced = {
        "_on_device": lambda name, stack: [name],
        "_fetch": lambda name: None,
        "_pack_alone": lambda prompts, contexts, packing: list(zip(prompts, contexts, strict=True)),
    }
    for name, function in replaced.items():
        monkeypatch.setattr(found, name, function)
    monkeypatch.setattr(configured_teachers, "configured_packing", lambda *_: Packing(1, "alternating", True))
    return found


@pytest.mark.parametrize("own", [OWN, dict.fromkeys(NAMES, OWN["default"])], ids=["own weights", "one weight"])
def test_every_teacher_of_a_product_keeps_its_prompt_its_share_its_columns_and_its_weight(monkeypatch, own):
    """The mix is sum of s_i w_i l_i + r, l_i the logits of teacher i on its own prompt."""
    contexts = [context([0.5, 0.2, 0.3], 2), context([0.1, 0.9, 0.0], 3)]

    def read_states(known: Any, teacher: list[str], packed: Any, reading: Any, *rest: Any, **options: Any) -> Bank:
        return Bank(torch.cat([states_of(teacher[0], prompt, len(it.response)) for prompt, it in reading]))

    monkeypatch.setattr(configured_teachers, "read_states", read_states)
    model = SimpleNamespace(config=None, post_process=True)
    monkeypatch.setattr(configured_teachers, "unwrapped", lambda name: SimpleNamespace(name=name, **vars(model)))
    monkeypatch.setattr(configured_teachers, "output_weight", lambda last, empty: weight_of(last.name))
    joined = teachers_with(own, monkeypatch)._joined(NAMES, None, contexts, "")  # type: ignore[arg-type]
    bank = object.__new__(JoinedHiddenStates)
    bank.joined, bank.batch = joined, SimpleNamespace(student=[SimpleNamespace(response_ids=torch.arange(5))])  # type: ignore[assignment]
    states, weight = bank.take_field(0, "teacher", torch.float64), joined.output_weight
    assert weight is not None
    of_token = own["default"] if joined.weights is None else joined.weights[:, None]
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
    assert (joined.weights is None) == (own is not OWN)
