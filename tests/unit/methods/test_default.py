# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The default method: the teacher sees the given solution, and all responses are trained on alike."""

from __future__ import annotations

import math

import pytest
import tiny
from made_methods import composed, made, named, shown
from term_arrays import signals

from megatron_selfdistill.config.schema.method_config import READ
from megatron_selfdistill.errors import ConfigError, VerifierError

GIVEN = tiny.given()


def test_given_solutions_are_shown_to_the_teacher_and_all_responses_are_trained_on():
    method = made([], GIVEN)
    rollouts = [tiny.rollout(text, prompts=method) for text in ("8$", "3")]
    assert shown(rollouts[0]) == "1+7|given:"
    assert method.select(0, rollouts) == method.texts(rollouts, rollouts) == (rollouts, {})
    assert (method.prepare, method.record, method.warnings, method.token_weights) == (None,) * 4
    assert method.coefficients(0, rollouts, []) is None and not method.weighs_tokens
    assert method.terms(0, rollouts, signals([0, 0], hinted=[True, False])).divergence.tolist() == [1.0, 0.0]
    assert method.state_dict() == {} and method.restored({"own": None}) is method
    for name in ("opsd", "sdft"):
        assert not made([f"method.name={name}"], GIVEN).weighs_tokens, "the default with other values"


def test_a_verifier_needs_an_answer_to_every_problem_before_the_start():
    problems = [tiny.problem(answer="8"), tiny.problem(location="file.jsonl:2")]
    made([], GIVEN, problems=problems)
    with pytest.raises((ConfigError, ValueError), match=r"^file.jsonl:2: "):
        made(["method.name=rft"], GIVEN, problems=problems)


WEIGHTS = "method.token_weights=hint_functions.published_weights"


def test_a_function_of_the_user_weighs_the_tokens_of_any_method_of_this_kind_and_changes_no_signal(monkeypatch):
    given = signals([0, 0], lengths=[3, 1])
    for name in ("default", "opsd", "pw_opsd"):
        method = made([f"method.name={name}", WEIGHTS], GIVEN)
        assert method.weighs_tokens and len(method.token_weights(given)) == 4
    found = made([WEIGHTS], GIVEN).token_weights(given)
    assert found[0] < found[1] < found[2] and found[3] == pytest.approx(0.25 + 0.75 / (1 + math.exp(-2)))
    overwriting = named(monkeypatch, lambda signals: signals.sampled_log_prob.fill_(1))
    made([f"method.token_weights={overwriting}"], GIVEN).token_weights(given)
    assert not given.sampled_log_prob.any()


@pytest.mark.parametrize("weights", [[1.0] * 3, [1, -1, 0, 0.5], [1, math.nan, 0, 0.5], "no tensor", None])
def test_weights_that_cannot_be_are_the_error_of_the_function(monkeypatch, weights):
    def weigh(signals):
        return weights if isinstance(weights, str) else signals.rewards.new_tensor(weights)

    method = made([f"method.token_weights={named(monkeypatch, weigh)}"], GIVEN)
    with pytest.raises(VerifierError):
        method.token_weights(signals([0, 0], lengths=[3, 1]))


REACH = "method.token_weights=reach"


def test_weights_with_a_name_read_log_probs_without_a_policy_term_or_a_known_sampler():
    for name in ("default", "opsd", "pw_opsd", "eopd"):
        needs = composed(f"method.name={name}", REACH).needs
        assert (
            needs.log_probs == READ
            and not needs.has_policy_term
            and not composed(f"method.name={name}").needs.log_probs
        )
    composed(REACH, "rollout.engine=vllm", "rollout.temperature=0.7"), composed(REACH, "loss.fused=keep_gradient")


REFUSED = [
    ("method.token_weights must be", ["method.token_weights=nearness"]),
    ("method.reach_exponent", [REACH, "method.reach_exponent=0"]),
    ("conversations.responses=logged", ["recipe=chat_logs", WEIGHTS]),
    ("method.min_log_prob", ["recipe=chat_logs", REACH, "method.min_log_prob=-1"]),
    ("method.token_weights", [REACH, "teachers.one={template: 'A{solution}|{problem}'}"]),
]


@pytest.mark.parametrize(("key", "overrides"), REFUSED)
def test_weights_that_no_run_can_have_are_refused_by_their_key(key, overrides):
    with pytest.raises(ConfigError, match=key):
        composed(*overrides)
