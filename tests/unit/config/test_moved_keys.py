# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The keys of earlier versions: a sentence for each of them, and the resumption of runs that these have begun."""

from __future__ import annotations

import copy
import functools
import json
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiers import combinations

from megatron_selfdistill.config import load
from megatron_selfdistill.config.bound_keys import BOUND, FREE, differences, stored_values
from megatron_selfdistill.config.key_list import unknown_key
from megatron_selfdistill.config.moved_keys import moved_key, moved_solutions, translated
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.train import EXIT_BAD_INPUT, main

STORED = json.loads((Path(__file__).parent / "stored_0_1.json").read_text(encoding="utf-8"))
MOVED_SECTIONS = ("solutions", "hints", "distill", "policy", "explanation", "verbal")

NEW_SPELLING = {
    "sft": ["method.name=sft"],
    "own": ["method.name=own_solutions", "method.pick=learnable"],
    "function_hints": ["method.name=sdpo", "method.hints=my.module.hints", "rollout.num_samples=2"],
    "feedback": ["method.name=sdpo", "method.hints=feedback", "environment.name=a.b.C"],
    "select": ["method.select=my.module.select"],
    "kl": ["method.name=grpo", "rollout.num_samples=4", "method.kl_weight=0.04"],
    "verbal_reward": ["method.name=ovd", "method.use=reward", "rollout.num_samples=4"],
    "reward": ["recipe=grpo", "method.reward=my.module.reward"],
    "http": [
        "recipe=grpo",
        "environment.name=http",
        "environment.options.url=http://h:1/v1",
        "environment.max_turns=2",
    ],
    "unlikely": ["recipe=chat_logs", "method.min_log_prob=-3"],
    # The recipe of 0.1 had one view, and samples of the whole distribution.
    "opsd": ["recipe=opsd", "~data.views", "rollout.temperature=1", "rollout.top_k=0", "rollout.top_p=1"],
    "sampled": ["method.name=opsd_rl", "method.weight=0", "method.signal=sampled"],
}
"""Case -> its arguments in the present version, where they are not those of 0.1."""


def stored(case: str) -> dict[str, Any]:
    """Return the configuration that version 0.1 has stored for a case."""
    values = copy.deepcopy(STORED["defaults"])
    for section, changed in STORED["cases"][case]["changed"].items():
        if isinstance(changed, dict):
            values[section] |= changed
        else:
            values[section] = changed
    return values


@functools.cache
def loaded(*arguments: str) -> dict[str, Any]:
    """Return the values that a run with these arguments stores; hydra takes a tenth of a second for them."""
    return stored_values(load(["run_dir=x", *arguments]))


def now(case: str, *more: str) -> dict[str, Any]:
    return loaded(*NEW_SPELLING.get(case, STORED["cases"][case]["arguments"]), *more)


@combinations(case=list(STORED["cases"]), quick={"case": ["default", "own", "sdpo", "caopd"]}, strength=1)
def test_a_stored_configuration_has_no_difference_from_the_new_spelling(case):
    old, new = stored(case), now(case)
    assert translated(old, new["method"]["name"])["method"].items() <= new["method"].items()
    assert differences(old, new) == []
    assert old == stored(case), "the stored values stay as they are"
    assert translated(new) == new


CHANGES = {
    "method.weight": ("opsd_rl", "method.weight=0.5"),
    "method.turn_gain": ("sod", "method.turn_gain=0.3"),
    "method.tau": ("scope", "method.tau=2"),
    "method.balance": ("uni_opd", "method.balance=false"),
    "method.hints": ("function_hints", "method.hints=my.module.others"),
    "method.kl_weight": ("kl", "method.kl_weight=0.05"),
    "method.use": ("verbal_reward", "method.use=filter"),
    "method.closing_tag": ("rlt", "method.closing_tag=END"),
    "method.min_log_prob": ("unlikely", "method.min_log_prob=-2"),
    "method.judge": ("openclaw", "method.judge=my.module.judge"),
    "method.revision_weight": ("rltf_sd", "method.revision_weight=0.2"),
    "method.reply_weight": ("rltf_fm", "method.reply_weight=0.2"),
    "environment.options.model": ("http", "environment.options.model=other"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_setting_is_a_bound_difference(key):
    case, change = CHANGES[key]
    assert [(one.key, one.rule) for one in differences(stored(case), now(case, change))] == [(key, BOUND)]


def test_another_method_is_a_bound_difference_and_how_often_a_search_is_made_is_free():
    found = {one.key: one.rule for one in differences(stored("grpo"), now("rft"))}
    assert found["method.name"] == BOUND
    [free] = differences(stored("own"), now("own", "method.refresh_every=7"))
    assert (free.key, free.stored, free.now, free.rule) == ("method.refresh_every", 50, 7, FREE)
    [address] = differences(stored("http"), now("http", "environment.options.url=http://other:1/v1"))
    assert (address.key, address.rule) == ("environment.options.url", FREE)


YARN = (
    *("rotary_scaling_factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale"),
    *("mscale_all_dim", "correction_range_round_to_int"),
)
OF_0_2 = {
    **{("model", f"yarn_{name}"): f"model.yarn.{name}" for name in YARN},
    **{("model", name): f"model.transformer.{name}" for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff")},
    ("model", "rope_scaling"): "model.rope_scaling_factor",
    ("metrics", "console"): "metrics.console_every",
    **{
        ("optimizer", name): f"optimizer.constants.{name}"
        for name in ("adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum")
    },
    **{
        ("schedule", f"recompute_{name}"): f"schedule.recompute.{name}"
        for name in ("granularity", "method", "num_layers", "modules")
    },
    **{("optimizer", f"lr_decay_{name}"): f"optimizer.lr_decay.{name}" for name in ("steps", "style")},
    **{("guards", name): f"guards.start.{name}" for name in ("identity_tolerance", "max_teacher_cross_entropy")},
    ("guards", "min_entropy_ratio"): "guards.entropy.min_ratio",
    ("guards", "max_entropy_ratio"): "guards.entropy.max_ratio",
    ("guards", "min_entropy_rise"): "guards.entropy.min_rise",
}
"""The keys of 0.1 that 0.2 had, too -> the present keys."""


def _at(values: dict[str, Any], path: Sequence[str]) -> Any:
    return functools.reduce(operator.getitem, path, values)


def old_keys() -> dict[str, Any]:
    """Return every key of version 0.1 that the present version does not have -> its default."""
    sections = {name: STORED["defaults"][name] for name in MOVED_SECTIONS}
    found = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    found |= {
        f"rollout.{name}": STORED["defaults"]["rollout"][name] for name in ("view", "select", "wave_microbatches")
    }
    found |= {
        f"conversations.{name}": STORED["defaults"]["conversations"][name] for name in ("min_log_prob", "unlikely")
    }
    http = ("url", "model", "api_key", "timeout_s", "retries", "concurrency")
    found |= {f"environment.{name}": STORED["defaults"]["environment"][name] for name in http}
    return (
        found
        | {"objective": "self_distillation", "model.allow_untested_fp8": False}
        | {".".join(path): _at(STORED["defaults"], path) for path in OF_0_2}
    )


def test_the_present_version_has_every_other_key_of_0_1():
    present, missing = loaded(), set()
    for section, values in STORED["defaults"].items():
        if section == "from_environment":
            continue
        names = [(section, name) for name in values] if isinstance(values, dict) else [(section,)]
        missing |= {".".join(path) for path in names if not _has(present, path)}
    assert missing == set(old_keys())


def _has(values: dict[str, Any], path: tuple[str, ...]) -> bool:
    for part in path:
        if part not in values:
            return False
        values = values[part]
    return True


@pytest.mark.parametrize("key", old_keys())
def test_an_old_key_is_one_sentence_that_names_the_new_one(key):
    expected = moved_key(key)
    assert expected is not None and unknown_key(key) == expected
    places = ("method", "environment.options", "rollout", "model", "metrics", "optimizer", "schedule", "guards")
    assert expected.startswith(tuple(f"{key} is now {place}." for place in places))
    path = tuple(key.split("."))
    assert path not in OF_0_2 or re.match(rf"{re.escape(f'{key} is now {OF_0_2[path]}')}(,|$)", expected)


@combinations(
    key=tuple(old_keys()), quick={"key": {key.partition(".")[0]: key for key in old_keys()}.values()}, strength=1
)
def test_an_old_key_on_the_command_line_is_that_sentence(key):
    """`make test` loads the last old key of each section: hydra takes a twentieth of a second for each."""
    expected = str(moved_key(key))
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        load([f"{key}=1"])


IN_FILES = {
    "objective": "objective: sft",
    "policy.weight": "policy: {weight: 1, clip_low: null}",
    "distill.rule": "distill: {rule: sod}",
    "hints.judge": "hints: {judge: model}",
    "solutions.keep": "solutions: {keep: 3}",
    "explanation.alpha": "explanation: {alpha: 0.5}",
    "verbal.threshold": "verbal: {threshold: 4}",
    "rollout.view": "rollout: {num_samples: 2, view: privileged}",
    "conversations.unlikely": "conversations: {unlikely: drop}",
    "environment.url": "environment: {url: null}",
    "model.yarn_mscale": "model: {yarn_mscale: 1.0}",
    "schedule.recompute_method": "schedule: {max_tokens: 8, recompute_method: uniform}",
}


@combinations(key=list(IN_FILES), quick={"key": ["objective", "policy.weight", "environment.url"]}, strength=1)
def test_an_old_key_in_a_file_is_the_same_sentence_with_the_name_of_the_file(key, tmp_path, capsys):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "old.yaml").write_text(f"# @package _global_\n{IN_FILES[key]}\n")
    assert main(["run_dir=x", "--config-dir", str(tmp_path), "recipe=old"]) == EXIT_BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(str(moved_key(key))) and "recipe/old" in line


@pytest.mark.parametrize(
    ("value", "new"),
    [
        ("own", "method.name=own_solutions"),
        ("peer", "method.name=sdpo with method.hints=peer"),
        ("feedback", "method.name=sdpo with method.hints=feedback"),
        ("peer_or_feedback", "method.name=sdpo with method.hints=peer_or_feedback"),
        ("my.module.hints", "method.name=sdpo with method.hints=my.module.hints"),
        ("skill", "method.name=skill_sd"),
        ("next_state", "method.name=openclaw"),
    ],
)
def test_an_old_value_of_the_solutions_is_one_sentence_that_names_the_method(value, new):
    assert moved_solutions(value) == f"data.solutions={value} is now {new}"
    with pytest.raises(ConfigError, match=rf"^data.solutions={value} is now {new}$"):
        load([f"data.solutions={value}"])


OTHER_VALUES = {
    "model.yarn_rotary_scaling_factor": (4.0, "model.yarn.rotary_scaling_factor=4"),
    "model.yarn_original_max_position_embeddings": (64, "model.yarn.original_max_position_embeddings=64"),
    "model.yarn_beta_fast": (2.0, "model.yarn.beta_fast=2"),
    "model.yarn_beta_slow": (0.5, "model.yarn.beta_slow=0.5"),
    "model.yarn_mscale": (0.7, "model.yarn.mscale=0.7"),
    "model.yarn_mscale_all_dim": (0.7, "model.yarn.mscale_all_dim=0.7"),
    "model.yarn_correction_range_round_to_int": (False, "model.yarn.correction_range_round_to_int=false"),
    "model.moe_aux_loss_coeff": (0.1, "model.transformer.moe_aux_loss_coeff=0.1"),
    "model.moe_z_loss_coeff": (0.1, "model.transformer.moe_z_loss_coeff=0.1"),
    "model.rope_scaling": (True, "model.rope_scaling_factor=8"),
    "metrics.console": (False, "metrics.console_every=0"),
    "optimizer.adam_beta1": (0.8, "optimizer.constants.adam_beta1=0.8"),
    "optimizer.adam_beta2": (0.99, "optimizer.constants.adam_beta2=0.99"),
    "optimizer.adam_eps": (1e-4, "optimizer.constants.adam_eps=1e-4"),
    "optimizer.sgd_momentum": (0.9, "optimizer.constants.sgd_momentum=0.9"),
    "schedule.recompute_granularity": ("full", "schedule.recompute.granularity=full"),
    "schedule.recompute_method": ("block", "schedule.recompute.method=block"),
    "schedule.recompute_num_layers": (2, "schedule.recompute.num_layers=2"),
    "schedule.recompute_modules": (["mlp"], "schedule.recompute.modules=[mlp]"),
    "optimizer.lr_decay_steps": (7, "optimizer.lr_decay.steps=7"),
    "optimizer.lr_decay_style": ("cosine", "optimizer.lr_decay.style=cosine"),
    "guards.identity_tolerance": (1e-3, "guards.start.identity_tolerance=1e-3"),
    "guards.max_teacher_cross_entropy": (5.0, "guards.start.max_teacher_cross_entropy=5"),
    "guards.min_entropy_ratio": (None, "guards.entropy.min_ratio=null"),
    "guards.max_entropy_ratio": (4.0, "guards.entropy.max_ratio=4"),
    "guards.min_entropy_rise": (0.2, "guards.entropy.min_rise=0.2"),
}
"""Key of 0.1 and 0.2 -> another value than its default, and what sets the value now."""


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_a_stored_value_of_a_key_of_0_2_is_the_value_of_the_new_key(key):
    value, argument = OTHER_VALUES[key]
    section, _, name = key.partition(".")
    of_0_1 = copy.deepcopy(STORED["defaults"]) | {"run_dir": "x"}
    of_0_1[section][name] = value
    of_0_2 = of_0_1 | {"method": translated(STORED["defaults"])["method"]}
    for old in (of_0_1, of_0_2):
        assert differences(old, loaded(argument)) == []
        (found,) = differences(old, loaded())
        expected = BOUND if section == "model" else FREE
        assert (found.key, found.rule) == (argument.partition("=")[0], expected)


def test_every_key_of_0_2_that_has_moved_has_another_value_above():
    assert {".".join(path) for path in OF_0_2} == set(OTHER_VALUES)


def test_other_keys_and_values_have_not_moved():
    assert moved_key("method.weight") is moved_key("rollout.num_samples") is moved_key("environment.name") is None
    assert moved_solutions("given") is moved_solutions("answer") is moved_solutions("other") is None
    assert str(moved_key("policy")).startswith("the keys of policy are now settings of methods")


def test_the_weight_of_a_penalty_beside_episodes_is_found_again():
    old = stored("rltf_sd") | {"objective": "self_distillation"}
    old["distill"] |= {"teacher_prompt": "same", "weight": 0.04}
    assert differences(old, now("rltf_sd", "method.kl_weight=0.04")) == []
    assert [one.key for one in differences(old, now("rltf_sd"))] == ["method.kl_weight"]
