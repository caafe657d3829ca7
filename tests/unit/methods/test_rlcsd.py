# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""RLCSD: the contrast of right and wrong hints changes the size of advantages; both kinds of tokens have a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from characters import text_of
from made_methods import made
from term_arrays import tensor

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.methods.rlcsd import changed, changes, contrast_of, hints_of, mean_factors
from megatron_selfdistill.sources.signals import signals_of

pytestmark = pytest.mark.usefixtures("one_rank")
CONTRASTS = [0.0, 1e-9, 0.0007, -0.0007, 0.0009, -0.02, 0.02, 0.3, -5.0, 800.0, -1e300]
ADVANTAGES = [0.0, 1.2, -1.2, 0.3, -0.3, 1e-12, -1e-12, 40.0]


def expected(advantage: float, contrast: float, weight: float, scale: float, threshold: float) -> float:
    """Return the changed advantage of one token as published: the sign is the verifier's."""
    change = weight * math.tanh(contrast / scale)
    if abs(change) <= threshold or advantage == 0:
        return advantage
    return max(advantage + change, 0.0) if advantage > 0 else min(advantage + change, 0.0)


@pytest.mark.parametrize(("weight", "scale", "threshold"), [(0.5, 0.02, 0.02), (2.0, 1.0, 0.0), (0.1, 1e-3, 0.09)])
def test_the_contrast_changes_the_size_of_an_advantage_and_never_its_sign(weight, scale, threshold):
    pairs = [(advantage, contrast) for advantage in ADVANTAGES for contrast in CONTRASTS]
    change = changes(tensor(*(e for _, e in pairs)), weight=weight, scale=scale, threshold=threshold)
    wanted = [expected(a, e, weight, scale, threshold) for a, e in pairs]
    found = changed(tensor(*(a for a, _ in pairs)), change)
    torch.testing.assert_close(found, tensor(*wanted), rtol=1e-12, atol=1e-300)
    assert any(a > 0 and w == 0 for (a, _), w in zip(pairs, wanted, strict=True)), "some advantages are cut off"
    assert changes(tensor(math.inf, 0.0), weight=0.5, scale=1.0, threshold=0.5).tolist() == [0, 0]
    assert changes(tensor(math.inf, -math.inf), weight=0.5, scale=1.0, threshold=0.499).tolist() == [0.5, -0.5]


def test_wrong_hints_are_mixed_as_probabilities():
    rows = [tensor(-0.1, -800.0, -3.0), tensor(-2.0, -900.0, 0.0), tensor(-0.5, -901.0, -700.0)]
    wanted = [-0.1 - math.log((math.exp(-2.0) + math.exp(-0.5)) / 2), 0.0, -3.0 - math.log(0.5)]
    wanted[1] = -800.0 - (-900.0 + math.log((1 + math.exp(-1.0)) / 2))
    torch.testing.assert_close(contrast_of(rows), tensor(*wanted), rtol=1e-12, atol=0)
    assert torch.equal(contrast_of([rows[0], rows[0]]), torch.zeros(3, dtype=torch.float64)), "equal hints cancel"


def test_tokens_of_one_kind_alone_keep_their_values():
    none, all_of_them = tensor(0.0, 0.0), tensor(0.5, -0.5)
    assert mean_factors(none, (2, 0), 0.5).tolist() == mean_factors(all_of_them, (2, 2), 1.0).tolist() == [1.0] * 2
    assert mean_factors(none[:0], (0, 0), 1.0).tolist() == []


def group(kinds: str, number: int) -> list[tuple[Any, str]]:
    """Return rollouts, where r is right, w wrong, t truncated and wrong, and e empty and wrong, with their texts."""
    return [
        (tiny.rollout("x" + "$" * (k != "t"), float(k == "r"), number), "" if k == "e" else f"{number}{k}{i}")
        for i, k in enumerate(kinds)
    ]


@pytest.mark.parametrize(
    ("kinds", "num_wrong", "wanted"),
    [
        ("rwrw", 4, ["2|13", "2|3", "0|31", "0|1"]),
        ("rwww", 2, ["|12", "0|23", "0|31", "0|12"]),
        ("rrte", 4, ["1|", "0|", "0|", "0|"]),
        ("wwww", 1, ["|1", "|2", "|3", "|0"]),
        ("r", 4, ["|"]),
    ],
)
def test_no_response_is_its_own_hint_and_the_next_ones_come_first(kinds, num_wrong, wanted):
    first, last = group("rw", 2)
    rollouts, texts = zip(first, *group(kinds, 7), last, strict=True)
    found = hints_of(list(rollouts), list(texts), num_wrong)
    assert found[0] == ([], ["2w1"]) and found[-1] == (["2r0"], []), "the groups do not mix"
    assert ["|".join("".join(text[-1] for text in texts) for texts in both) for both in found[1:-1]] == wanted
    assert all(text[1] == "r" for right, _ in found[1:-1] for text in right)


def log_q(context: ContextPair) -> float:
    """Return the log-prob of the first token of the response: minus a number that the prompt decides."""
    return -(sum(context.teacher_prompt) % 7) / 8


class Models:
    """A teacher whose log-probs depend on its prompt and on the place of the token, and a student of another one."""

    def __init__(self) -> None:
        self.calls: list[list[ContextPair]] = []

    def read_tokens(self, contexts: Sequence[ContextPair]) -> Any:
        self.calls.append(list(contexts))
        rows = [log_q(context) - i / 8 for context in contexts for i in range(len(context.response))]
        return torch.full((len(rows),), 99.0, dtype=torch.float64), tensor(*rows), None


def rlcsd(*overrides: str, max_length: int = 40) -> tuple[Any, Models]:
    models = Models()
    return made(["recipe=rlcsd", *overrides], tiny.given(max_length), readers=models), models


def hint(context: ContextPair) -> str:
    return text_of(context.teacher_prompt).split("|")[1][0]


def test_the_terms_read_every_response_after_its_hints_and_scale_both_means():
    method, models = rlcsd("method.scale=1", "method.advantage_std=none")
    texts = [("8$", 1.0), ("hm</think>9$", 0.0), ("6$", 0.0), ("12$", 1.0, 1)]
    rollouts = [tiny.rollout(*sample) for sample in texts]
    selected, metrics = method.select(0, rollouts)
    assert selected == rollouts and metrics == {"hints/share": pytest.approx(2 / 4)}
    terms = method.terms(0, rollouts, signals_of(rollouts))
    (contexts,) = models.calls
    assert [(hint(one), len(one.response)) for one in contexts] == [("8", 12), ("6", 12), ("8", 2), ("9", 2)]
    assert all(one.student_prompt == rollouts[0].prompts.student_prompt for one in contexts)

    values = {hint(one): log_q(one) for one in contexts}
    contrast = [0.0] * 2 + [values["8"] - values["6"]] * 12 + [values["8"] - values["9"]] * 2 + [0.0] * 3
    pairs = list(zip([2 / 3] * 2 + [-1 / 3] * 14 + [0.0] * 3, contrast, strict=True))
    selected_tokens = [abs(0.5 * math.tanh(e)) > 0.02 for e in contrast]
    number = sum(selected_tokens)
    wanted = [
        expected(a, e, 0.5, 1.0, 0.02) * len(pairs) / (number if is_changed else len(pairs) - number)
        for (a, e), is_changed in zip(pairs, selected_tokens, strict=True)
    ]
    torch.testing.assert_close(terms.advantage, tensor(*wanted), rtol=1e-12, atol=1e-15)
    assert 0 < number < len(pairs) and not terms.divergence.any()


def test_a_hint_that_does_not_fit_is_left_out_and_a_replica_without_responses_takes_part_in_the_reading():
    method, models = rlcsd(max_length=20)
    rollouts = [tiny.rollout(*sample) for sample in (("8$", 1.0), ("9" * 30 + "$",), ("6$",), ("7$", 1.0))]
    method.terms(0, rollouts, signals_of(rollouts))
    hints = [(hint(one), len(one.response)) for one in models.calls[0]]
    assert hints == [("7", 2), ("6", 2), ("7", 31), ("6", 31), ("8", 2), ("6", 2)]
    assert method.select(0, [])[1] == {"hints/share": 0}
    assert method.terms(0, [], signals_of([])).advantage.tolist() == [] and models.calls[1:] == [[]]
