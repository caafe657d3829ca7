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
    ("rule", "names"),
    [
        (BOUND, "seed checkpoint.load target.teacher_weight rollout.temperature data.new_key model.rotary_base"),
        (BOUND, "environment.options.model model.transformer.attention_dropout"),
        (FREE, "loss.backend rollout.engine_args.max_num_seqs parallel.tensor_model_parallel_size optimizer.lr"),
        (FREE, "num_steps environment.options.url model.transformer.num_layers_in_first_pipeline_stage"),
        (FIXED, "teacher.weights"),
    ],
)
def test_the_longest_name_decides(rule, names):
    assert {name: rule_of(name) for name in names.split()} == dict.fromkeys(names.split(), rule)


def values(*overrides: str) -> dict:
    return stored_values(from_mapping(OmegaConf.from_dotlist(list(overrides))))


def rules(stored: dict, now: dict) -> dict[str, str]:
    """Return the keys that differ, with their rules."""
    return {one.key: one.rule for one in differences(stored, now)}


def test_items_of_free_form_keys_are_compared_one_by_one():
    one = values("rollout.engine_args.max_num_seqs=8", "model.transformer.attention_dropout=0.1")
    other = values("rollout.engine_args.max_num_seqs=16")
    assert differences(one, other) == [
        KeyDifference("model.transformer.attention_dropout", 0.1, None, BOUND),
        KeyDifference("rollout.engine_args.max_num_seqs", 8, 16, FREE),
    ]
    assert differences(one, one) == []


def test_a_key_that_an_older_program_did_not_know_had_its_default_and_one_that_is_gone_is_not_compared():
    older = values()
    del older["loss"]["divergence"], older["stop"]
    older["loss"]["of_yesterday"] = 1
    assert differences(older, values()) == []
    (found,) = differences(older, values("loss.divergence=jsd"))
    assert found == KeyDifference("loss.divergence", "reverse_kl", "jsd", BOUND)


TWO = "rollout.num_samples=2"


@pytest.mark.parametrize("judged", ["", "rft", "grpo", "sdpo", "uni_opd", "scope"])
@pytest.mark.parametrize("key", ["evaluation.verifier=exact_match", "evaluation.confidence=null"])
def test_what_judges_responses_is_bound_where_verdicts_decide_what_is_trained(judged, key):
    given = [f"method.name={judged}", *([TWO] if judged != "rft" else [])] if judged else []
    assert rules(values(*given), values(*given, key)) == {key.partition("=")[0]: BOUND if judged else FREE}


@pytest.mark.parametrize(
    ("given", "stored", "now", "rule"),
    [
        ("method.name=own_solutions", "method.distill_weight=1", "method.distill_weight=2", BOUND),
        ("method.name=own_solutions", "method.refresh_every=3", "method.refresh_every=7", FREE),
        ("method.name=sft", "target.anchor=student", "target.anchor=reference", FREE),  # a run without a target
        ("method.name=rft", "target.anchor=student", "target.anchor=reference", FREE),
        ("target.anchor=student", "target.teacher_weight=1", "target.teacher_weight=2", BOUND),
        ("method.name=rft rollout.guidance=mixed", "target.teacher_weight=1", "target.teacher_weight=2", BOUND),
    ],
)
def test_what_a_run_trains_towards_or_samples_from_is_bound(given, stored, now, rule):
    assert rules(values(*given.split(), stored), values(*given.split(), now)) == {stored.partition("=")[0]: rule}


def test_another_value_of_an_environment_variable_is_another_value(monkeypatch):
    written = ["checkpoint.load=${oc.env:BASE}/model", "rollout.transfer_dir=${oc.env:BASE}"]
    monkeypatch.setenv("BASE", "/models/first")
    first = values(*written)
    monkeypatch.setenv("BASE", "/models/second")
    assert rules(first, values(*written)) == {"checkpoint.load": BOUND, "rollout.transfer_dir": FREE}


def test_a_refusal_names_the_bound_keys_and_force_unless_force_cannot_help():
    assert refusal(differences(values(), values("optimizer.lr=1", "num_steps=7")), "iter_1") is None
    bound = refusal(differences(values(), values("seed=4", "target.k_max=null", "num_steps=7")), "iter_1")
    fixed = refusal(differences(values(), values("seed=4", "teacher.weights=ema")), "iter_1")
    assert all(name in bound for name in ("seed: 0", "now 4", "target.k_max: '1 + w'", "checkpoint.resume=force"))
    assert "num_steps" not in bound
    assert "teacher.weights" in fixed and "checkpoint.load=iter_1" in fixed and "force" not in fixed
