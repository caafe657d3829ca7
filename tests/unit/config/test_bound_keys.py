# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Every key says whether a run is bound to it, and two configurations are compared key by key."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from megatron_selfdistill.config import from_mapping, keys
from megatron_selfdistill.config.bound_keys import (
    BOUND,
    FIXED,
    FREE,
    RULES,
    KeyDifference,
    differences,
    refusal,
    rule_of,
    stored_values,
)
from megatron_selfdistill.config.key_list import method_keys, sections
from megatron_selfdistill.config.methods import method_names

ITEMS = ("model.transformer.", "environment.options.", "environment.limits.")
"""The beginnings of the names of items of a mapping that have rules of their own."""


def test_every_rule_is_about_a_key_a_section_or_an_item_and_all_other_settings_of_methods_are_bound():
    settings = {name for method in method_names() for name in method_keys(method)}
    assert all(name in keys().keys() | settings | sections().keys() or name.startswith(ITEMS) for name in RULES)
    assert {rule_of(name) for name in settings - {"method.refresh_every"}} == {BOUND}


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("seed", BOUND),
        ("checkpoint.load", BOUND),
        ("target.teacher_weight", BOUND),
        ("loss.backend", FREE),
        ("rollout.temperature", BOUND),
        ("data.new_key", BOUND),
        ("rollout.engine_args.max_num_seqs", FREE),
        ("parallel.tensor_model_parallel_size", FREE),
        ("optimizer.lr", FREE),
        ("num_steps", FREE),
        ("environment.options.model", BOUND),
        ("environment.options.url", FREE),
        ("teacher.weights", FIXED),
        ("model.rotary_base", BOUND),
        ("model.transformer.attention_dropout", BOUND),
        ("model.transformer.num_layers_in_first_pipeline_stage", FREE),
    ],
)
def test_the_longest_name_decides(key, rule):
    assert rule_of(key) == rule


def values(*overrides: str) -> dict:
    return stored_values(from_mapping(OmegaConf.from_dotlist(list(overrides))))


def test_equal_configurations_do_not_differ():
    everything = ["optimizer.lr=3e-6", "data.fields.problem=question", "rollout.stop_token_ids=[1,2]"]
    assert differences(values(*everything), values(*everything)) == []


def test_items_of_free_form_keys_are_compared_one_by_one():
    one = values("rollout.engine_args.max_num_seqs=8", "model.transformer.attention_dropout=0.1")
    other = values("rollout.engine_args.max_num_seqs=16")
    assert differences(one, other) == [
        KeyDifference("model.transformer.attention_dropout", 0.1, None, BOUND),
        KeyDifference("rollout.engine_args.max_num_seqs", 8, 16, FREE),
    ]


def test_a_key_that_an_older_program_did_not_know_had_its_default_and_one_that_is_gone_is_not_compared():
    older = values()
    del older["loss"]["divergence"], older["stop"]
    older["loss"]["of_yesterday"] = 1
    assert differences(older, values()) == []
    (found,) = differences(older, values("loss.divergence=jsd"))
    assert found == KeyDifference("loss.divergence", "reverse_kl", "jsd", BOUND)


TWO = "rollout.num_samples=2"


@pytest.mark.parametrize(
    ("judged", "rule"),
    [
        ((), FREE),
        (("method.name=rft",), BOUND),
        (("method.name=grpo", TWO), BOUND),
        (("method.name=sdpo", TWO), BOUND),
        (("method.name=uni_opd", TWO), BOUND),
        (("method.name=scope", TWO), BOUND),
    ],
)
@pytest.mark.parametrize("key", ["evaluation.verifier=exact_match", "evaluation.confidence=null"])
def test_what_judges_responses_is_bound_where_verdicts_decide_what_is_trained(judged, rule, key):
    (found,) = differences(values(*judged), values(*judged, key))
    assert (found.key, found.rule) == (key.partition("=")[0], rule)


def test_the_settings_of_a_method_are_bound_but_for_how_often_it_searches():
    first = ("method.name=own_solutions", "method.weight=0")
    (found,) = differences(values(*first), values(*first, "method.distill_weight=2"))
    assert (found.key, found.rule) == ("method.distill_weight", BOUND)
    (found,) = differences(values(*first), values(*first, "method.refresh_every=7"))
    assert (found.key, found.rule) == ("method.refresh_every", FREE)


def test_settings_that_two_methods_do_not_share_are_compared_with_nothing():
    found = {one.key: (one.stored, one.now) for one in differences(values(), values("method.name=grpo", TWO))}
    assert found["method.name"] == ("default", "grpo") and found["method.weight"] == (None, 1.0)
    assert found["method.view"] == ("plain", None) and "method.select" not in found


@pytest.mark.parametrize("method", ["sft", "rft"])
def test_the_target_is_free_in_a_run_that_does_not_use_it(method):
    baseline = [f"method.name={method}", "target.anchor=student"]
    (found,) = differences(values(*baseline), values(baseline[0], "target.anchor=reference"))
    assert (found.key, found.rule) == ("target.anchor", FREE)
    found = {one.key: one.rule for one in differences(values(*baseline), values("target.anchor=student"))}
    assert found["method.name"] == BOUND


@pytest.mark.parametrize("first", [[], ["method.name=rft", "rollout.guidance=mixed"]])
def test_the_target_is_bound_in_a_run_that_trains_towards_it_or_samples_from_it(first):
    stored, now = (values(*first, "target.anchor=student", f"target.teacher_weight={w}") for w in (1, 2))
    (found,) = differences(stored, now)
    assert (found.key, found.rule) == ("target.teacher_weight", BOUND)


def test_another_value_of_an_environment_variable_is_another_value(monkeypatch):
    written = ["checkpoint.load=${oc.env:BASE}/model", "rollout.transfer_dir=${oc.env:BASE}"]
    monkeypatch.setenv("BASE", "/models/first")
    first = values(*written)
    monkeypatch.setenv("BASE", "/models/second")
    found = {one.key: one.rule for one in differences(first, values(*written))}
    assert found == {"checkpoint.load": BOUND, "rollout.transfer_dir": FREE}


def test_free_differences_are_no_reason_to_refuse():
    assert refusal(differences(values(), values("optimizer.lr=1", "num_steps=7")), "iter_1") is None


def test_a_refusal_names_key_both_values_and_force_unless_force_cannot_help():
    message = refusal(differences(values(), values("seed=4", "target.k_max=null", "num_steps=7")), "iter_1") or ""
    assert "seed: 0 in the checkpoint, now 4; target.k_max: '1 + w' in the checkpoint, now null" in message
    assert message.endswith("checkpoint.resume=force") and "num_steps" not in message
    message = refusal(differences(values(), values("seed=4", "teacher.weights=ema")), "iter_1") or ""
    assert "teacher.weights cannot change within a run" in message and "checkpoint.load=iter_1" in message
    assert "force" not in message
