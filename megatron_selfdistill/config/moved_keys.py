# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The keys of earlier versions that have moved, for messages and for the resumption of runs that these have begun.

Version 0.1 described the published methods by global keys, such as ``policy.weight`` and ``distill.rule``.  These keys
are now settings of methods.  Up to version 0.2, fields that are only handed to Megatron each had a key, such as
``model.yarn_mscale``; now a mapping has them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from megatron_selfdistill.config.schema.model_config import YarnConfig
from megatron_selfdistill.config.schema.ranges import is_dotted
from megatron_selfdistill.config.schema.run_config import StartGuards
from megatron_selfdistill.config.schema.step_config import LearningRateDecay, OptimizerConstants, RecomputeConfig

_EVERY = ""  # stands for each method that has the setting

MOVED: dict[tuple[str, str], str] = {
    **{(_EVERY, name): f"policy.{name}" for name in ("weight", "reward", "advantage_std", "credit", "discount")},
    **{(_EVERY, name): f"policy.{name}" for name in ("clip_low", "clip_high", "ratio_cap")},
    **{("rltf", f"revision_{name}"): f"policy.revision_{name}" for name in ("weight", "warmup_steps", "baseline")},
    ("rltf", "revision_min_log_prob"): "policy.revision_min_log_prob",
    ("rltf", "reply_weight"): "policy.reply_weight",
    ("rltf", "reply_template"): "policy.reply_template",
    (_EVERY, "distill_weight"): "distill.weight",
    **{(name, "kl_weight"): "distill.weight" for name in ("grpo", "rltf", "ovd", "rlt")},
    (_EVERY, "signal"): "distill.signal",
    ("pi_distill", "alpha"): "distill.alpha",
    ("scope", "tau"): "distill.tau",
    **{("uni_opd", name): f"distill.{name}" for name in ("margin", "margin_gap", "max_log_ratio")},
    ("sod", "turn_gain"): "distill.turn_gain",
    (_EVERY, "select"): "rollout.select",
    (_EVERY, "view"): "rollout.view",
    ("sdpo", "hints"): "data.solutions",
    **{("skill_sd", name): f"hints.{name}" for name in ("summarizer", "summarizer_template", "keep", "exploration")},
    **{("openclaw", name): f"hints.{name}" for name in ("judge", "judge_template", "votes", "min_length")},
    **{("own_solutions", name): f"solutions.{name}" for name in ("refresh_every", "num_samples", "keep", "pick")},
    **{("own_solutions", name): f"solutions.{name}" for name in ("alpha", "ratio_weight")},
    **{("rlt", name): f"explanation.{name}" for name in ("closing_tag", "temperature", "alpha", "ratio_weight")},
    ("rlt", "missing_tag_penalty"): "explanation.missing_tag_penalty",
    **{("ovd", name): f"verbal.{name}" for name in ("template", "threshold", "step_separator")},
    **{("chat_logs", name): f"conversations.{name}" for name in ("min_log_prob", "unlikely")},
}
"""Method and setting -> the key of 0.1 with the same meaning."""

_SENTENCES = {
    "metrics.console": "is now metrics.console_every, whose value 0 shows nothing",
    "model.rope_scaling": "is now model.rope_scaling_factor, whose value null scales nothing",
    "model.allow_untested_fp8": "is now model.transformer.fp8, which alone chooses FP8",
    "objective": "is now method.name: sft, rft, grpo for policy_gradient, and default for self_distillation",
    "distill.rule": "is now method.name: default, scope, uni_opd, pi_distill or sod",
    "distill.teacher_prompt": "is now method.kl_weight of method.name=grpo and rlt, which sets the value same",
    "rollout.view": "is now method.view of method.name=default, and a part of method.name=pi_distill and rlt",
    "rollout.select": "is now method.select with a function of yours, and otherwise method.name: uni_opd for balance, "
    "caopd for confidence, ovd for verbal",
    "policy.reward": "is now method.reward with a function of yours, and otherwise method.name: rlt for explanation, "
    "ovd with method.use=reward for verbal",
}
_SOLUTIONS = {
    "own": "method.name=own_solutions",
    **{hints: f"method.name=sdpo with method.hints={hints}" for hints in ("peer", "feedback", "peer_or_feedback")},
    "skill": "method.name=skill_sd",
    "next_state": "method.name=openclaw",
}
HTTP_OPTIONS = {"url": None, "model": None, "api_key": None, "timeout_s": 60.0, "retries": 3, "concurrency": 16}
"""The keys of the section environment of 0.1 that are now entries of environment.options -> their defaults."""

_RENAMED = {
    "rollout.wave_microbatches": "rollout.partial_batch_microbatches",
    **{f"model.yarn_{name}": f"model.yarn.{name}" for name in YarnConfig.__dataclass_fields__},
    **{f"model.{name}": f"model.transformer.{name}" for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff")},
    **{f"optimizer.{name}": f"optimizer.constants.{name}" for name in OptimizerConstants.__dataclass_fields__},
    **{f"optimizer.lr_decay_{name}": f"optimizer.lr_decay.{name}" for name in LearningRateDecay.__dataclass_fields__},
    **{f"guards.{name}": f"guards.start.{name}" for name in StartGuards.__dataclass_fields__},
    "guards.min_entropy_ratio": "guards.entropy.min_ratio",
    "guards.max_entropy_ratio": "guards.entropy.max_ratio",
    "guards.min_entropy_rise": "guards.entropy.min_rise",
    **{f"schedule.recompute_{name}": f"schedule.recompute.{name}" for name in RecomputeConfig.__dataclass_fields__},
}
"""Keys of 0.1 and 0.2 with another name -> the name."""

_SECTIONS = ("solutions", "hints", "distill", "policy", "explanation", "verbal")


def renamed(key: str) -> str:
    """Return the present name of a key that has another name now; every other key stays as it is."""
    return _RENAMED.get(key, key)


def moved_key(key: str) -> str | None:
    """Return a sentence that names what has replaced ``key`` of an earlier version; None for every other key."""
    if key in _SENTENCES:
        return f"{key} {_SENTENCES[key]}"
    if key in _RENAMED:
        return f"{key} is now {_RENAMED[key]}"
    section, _, name = key.partition(".")
    if section == "environment" and name in HTTP_OPTIONS:
        return f"{key} is now environment.options.{name}"
    places = [(method, setting) for (method, setting), old in MOVED.items() if old == key]
    if key in _SECTIONS:
        return f"the keys of {key} are now settings of methods (`selfdistill --keys method`)"
    if not places:
        return None
    method, setting = places[0]
    of = f"method.name={method}" if method else "the methods that have it (`selfdistill --keys method=NAME`)"
    return f"{key} is now method.{setting}, a setting of {of}"


def moved_solutions(value: str) -> str | None:
    """Return what has replaced ``data.solutions=value`` of version 0.1; None for every other value."""
    new = _SOLUTIONS.get(value) or (f"method.name=sdpo with method.hints={value}" if is_dotted(value) else None)
    return None if new is None else f"data.solutions={value} is now {new}"


def translated(values: Mapping[str, Any], wanted: str = "default") -> dict[str, Any]:
    """Return a stored configuration in the keys of the present version; one that has them stays as it is.

    ``values``: the nested values of a checkpoint.  ``wanted``: the present method, which decides where version 0.1 knew
    no difference: opsd and sdft were the default method with other values of global keys.
    """
    new = copy.deepcopy(dict(values))
    _regroup(new)
    if "method" in new:
        return new
    name = method_of(values, wanted)
    new["method"] = {"name": name, **_settings(values, name)}
    for section in (*_SECTIONS, "objective"):
        new.pop(section, None)
    for section, moved in {"rollout": ("view", "select"), "conversations": ("min_log_prob", "unlikely")}.items():
        new[section] = {key: value for key, value in new.get(section, {}).items() if key not in moved}
    if new.get("data", {}).get("solutions") not in (None, "given", "answer"):
        new["data"]["solutions"] = "given"
    environment = new.get("environment", {})
    if environment.get("name") == "http":
        environment["options"] = {
            key: environment[key] for key, default in HTTP_OPTIONS.items() if environment.get(key, default) != default
        }
    new["environment"] = {key: value for key, value in environment.items() if key not in HTTP_OPTIONS}
    return new


def _regroup(new: dict[str, Any]) -> None:
    """Move in place what versions up to 0.2 have stored under keys with another name now."""
    metrics, model = new.get("metrics", {}), new.get("model", {})
    if not metrics.pop("console", True):
        metrics["console_every"] = 0
    if not model.pop("rope_scaling", True):
        model["rope_scaling_factor"] = None
    for renamed, present in _RENAMED.items():
        section, _, key = renamed.partition(".")
        if key not in new.get(section, {}):
            continue
        value = new[section].pop(key)
        *mapping, name = present.split(".")[1:]
        if "transformer" not in mapping or value:  # without an entry, Megatron has no such loss
            part = new[section].setdefault(mapping[0], {}) if mapping else new[section]
            part.setdefault(name, value)


def method_of(values: Mapping[str, Any], wanted: str = "default") -> str:
    """Return the name of the method that the keys of a configuration of 0.1 describe; see `translated`."""

    def old(key: str, default: Any = None) -> Any:
        return _old(values, key, default)

    objective, solutions = old("objective", "self_distillation"), old("data.solutions", "given")
    reward, select, rule = old("policy.reward"), old("rollout.select", "none"), old("distill.rule", "uniform")
    weighs = bool(old("policy.weight", 0))
    choices = {
        objective: objective in ("sft", "rft"),
        "own_solutions": solutions == "own",
        "skill_sd": solutions == "skill",
        "openclaw": solutions == "next_state",
        "sdpo": solutions not in ("given", "answer"),
        "rlt": reward == "explanation",
        "ovd": "verbal" in (reward, select),
        "caopd": select == "confidence",
        rule: rule != "uniform",
        "uni_opd": select == "balance",
        "rltf": bool(old("policy.revision_weight") or old("policy.reply_weight")),
        "grpo": objective == "policy_gradient" or (weighs and old("distill.teacher_prompt") == "same"),
        "opsd_rl": weighs or old("distill.signal", "full") != "full" or old("distill.weight", 1) != 1,
        "chat_logs": old("data.kind") == "conversations",
    }
    found = next((name for name, is_it in choices.items() if is_it), "default")
    return wanted if found == "default" and wanted in ("opsd", "sdft") else found


def _settings(values: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Return the settings of ``method`` that the keys of 0.1 had."""
    from megatron_selfdistill.config.methods import settings_class

    found = {}
    for setting in settings_class(method).__dataclass_fields__:
        key = MOVED.get((method, setting), MOVED.get((_EVERY, setting)))
        value = _old(values, key, _MISSING) if key else _MISSING
        if setting in ("reward", "select") and not (isinstance(value, str) and is_dotted(value)):
            value = None
        if value is not _MISSING:
            found[setting] = value
    if method == "uni_opd":
        found["balance"] = _old(values, "rollout.select", "none") == "balance"
    if method == "ovd":
        found["use"] = "reward" if _old(values, "policy.reward", None) == "verbal" else "filter"
    if method in ("grpo", "rltf", "ovd"):
        found["kl_weight"] = found["kl_weight"] if values.get("objective") == "self_distillation" else 0.0
    return found


_MISSING = object()


def _old(values: Mapping[str, Any], key: str, default: Any) -> Any:
    section, _, name = key.rpartition(".")
    return (values.get(section, {}) if section else values).get(name, default)
