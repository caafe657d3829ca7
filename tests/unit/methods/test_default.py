# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The default method: the teacher sees the given solution, and all responses are trained on alike."""

from __future__ import annotations

import math
import sys

import pytest
from characters import Characters
from made_methods import given_with, made, response_of, shown
from term_arrays import signals

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.errors import ConfigError, VerifierError
from megatron_selfdistill.sources.rollouts import Rollout

PROBLEM = Problem("p", ({"role": "user", "content": "1+7"},), "given", "8", "file.jsonl:1")
GIVEN = given_with(Characters())


def test_given_solutions_are_shown_to_the_teacher_and_all_responses_are_trained_on():
    method = made([], GIVEN)
    rollouts = [Rollout(PROBLEM, method.prompts(PROBLEM), response_of(text)) for text in ("8$", "3")]
    assert shown(rollouts[0]) == "1+7|given:"
    assert method.select(0, rollouts) == method.texts(rollouts, rollouts) == (rollouts, {})
    assert (method.prepare, method.record, method.warnings) == (None, None, None)
    assert method.prepare is None
    assert method.coefficients(0, rollouts, []) is None and not method.weighs_tokens
    assert method.terms(0, rollouts, signals([0, 0], hinted=[True, False])).divergence.tolist() == [1.0, 0.0]
    assert method.state_dict() == {} and method.restored({"own": None}) is method


@pytest.mark.parametrize("name", ["opsd", "sdft"])
def test_methods_that_are_the_default_with_other_values_have_no_terms_of_their_own(name):
    assert not made([f"method.name={name}"], GIVEN).weighs_tokens


def test_a_verifier_needs_an_answer_to_every_problem_before_the_start():
    unanswered = Problem("q", PROBLEM.messages, "given", None, "file.jsonl:2")
    made([], GIVEN, problems=[unanswered])
    with pytest.raises((ConfigError, ValueError), match=r"^file.jsonl:2: expected an answer"):
        made(["method.name=rft"], GIVEN, problems=[PROBLEM, unanswered])


WEIGHTS = "method.token_weights=hint_functions.published_weights"


def test_a_function_of_the_user_weighs_the_tokens_of_any_method_of_this_kind(monkeypatch):
    given = signals([0, 0], lengths=[3, 1], hinted=[True, True])
    for name in ("default", "opsd", "pw_opsd"):
        method = made([f"method.name={name}", WEIGHTS], GIVEN)
        assert method.weighs_tokens and len(method.token_weights(given)) == 4
    found = made([WEIGHTS], GIVEN).token_weights(given)
    assert found[0] < found[1] < found[2] and found[3] == pytest.approx(0.25 + 0.75 / (1 + math.exp(-2)))
    assert made([], GIVEN).token_weights is None


def test_a_function_of_the_user_that_changes_its_signals_changes_no_signal_of_the_step(tmp_path, monkeypatch):
    (tmp_path / "overwriting.py").write_text("def weights(signals):\n    return signals.sampled_log_prob.fill_(1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    given = signals([0, 0], lengths=[3, 1])
    made(["method.token_weights=overwriting.weights"], GIVEN).token_weights(given)
    assert not given.sampled_log_prob.any()


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ("torch.ones(3)", r"got shape \(3,\)"),
        ("[1.0] * 4", "got list"),
        ("torch.tensor([1, -1, 0, 0.5])", "got -1 to 1"),
        ("torch.tensor([1, float('nan'), 0, 0.5])", "got nan"),
        ("1 / 0", "failed with ZeroDivisionError"),
    ],
)
def test_weights_that_cannot_be_are_one_sentence(tmp_path, monkeypatch, value, got):
    (tmp_path / "weighing.py").write_text(f"import torch\n\ndef weights(signals):\n    return {value}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "weighing", raising=False)
    method = made(["method.token_weights=weighing.weights"], GIVEN)
    with pytest.raises(VerifierError, match=got):
        method.token_weights(signals([0, 0], lengths=[3, 1]))
