# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What ran, as rows of text: the facts of a run, its events, and the differences between runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_selfdistill.instruments.report.run_record import RunRecord

RESULTS = {
    "evaluation/greedy_accuracy": "accuracy, greedy",
    "evaluation/sampled_accuracy": "accuracy, sampled",
    "loss/mean": "loss, nats per token",
    "entropy/student": "entropy of the student, nats per token",
    "k/mean": "k, mean",
    "response/length_mean": "length of a response, tokens",
    "response/truncated_share": "responses that are cut",
    "response/loop_share": "responses that end in a loop",
    "gradient_norm": "norm of the gradient",
    "seconds/step": "seconds per step",
}
"""The metrics whose first and last values a report lists -> their names."""

ENDINGS = {
    "finished": "the run is complete",
    "stopped": "the run was asked to stop, and can be resumed",
    "guard": "a guard stopped the run",
    "engine": "an engine failed",
    "verifier": "a verifier, reward or hint of the user failed",
}
"""The events that end a launch of a run -> what each says about the run."""


def facts(run: RunRecord) -> list[list[str]]:
    """Return rows of (name, text): what ran, where, and how to repeat it."""
    launch = run.launches[-1] if run.launches else {}
    config = run.config
    rows = [
        ("model", config and _model(config)),
        ("start", _text(config.get("checkpoint.load") or "random weights") if config else None),
        ("method", config and _method(config)),
        ("recipe", launch.get("recipe")),
        ("layout", launch.get("layout")),
        ("data", config and _data(config)),
        ("seen so far", _seen(run)),
        ("optimizer", config and _optimizer(config)),
        ("seed", _text(config.get("seed")) if config else None),
        ("hardware", launch.get("hardware")),
        ("versions", _versions(launch.get("versions"))),
        ("git commit", launch.get("commit")),
        ("launches", str(len(run.launches)) if run.launches else None),
        ("command", launch.get("command")),
    ]
    return [[name, text] for name, text in rows if text and isinstance(text, str)]


def status(run: RunRecord) -> str:
    """Return one sentence: how far the run is, and how its last launch ended, if it ended."""
    total = run.config.get("num_steps")
    done = f"{run.last_step} of {total} steps" if total else f"{run.last_step} steps"
    last = run.events[-1]["event"] if run.events else None
    if last is None:
        return done
    return f"{done}; {ENDINGS.get(last, 'the run is training, or was killed')}"


def event_rows(run: RunRecord) -> list[list[str]]:
    """Return rows of (time, step, event, details) in the order of the events."""
    rows = []
    for event in run.events:
        name = "resumed" if event["event"] == "started" and event["step"] > 0 else event["event"]
        details = (event[key] for key in ("reason", "checkpoint", "start") if isinstance(event.get(key), str))
        rows.append([str(event["time"]), str(event["step"]), name, next(details, "")])
    return rows


def differences(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return tables that compare runs: keys of the configuration that differ first, then facts, then last values.

    A table has ``title``, and ``rows`` of a name with one text per run; for one run, the last values alone, with the
    first and the last value.
    """
    if len(runs) == 1:
        rows = [[name, _value(values[0]), _value(values[-1])] for name, (values,) in _results(runs)]
        return [{"title": "First and last values", "columns": ["first", "last"], "rows": rows}]
    labels = [run.label for run in runs]
    keys = sorted({key for run in runs for key in run.config} - {"run_dir"})  # which differs between any two runs
    # An empty section of one run, and its keys in another run, are one difference.
    keys = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    configured = [  # a key that a method lacks is as good as null
        [key, *("-" if run.config.get(key) is None else _text(run.config[key]) for run in runs)] for key in keys
    ]
    facts_of = [dict(facts(run)) for run in runs]
    # The recipe of a launch is not among them: it stands for keys, which the first table has.
    names = ("layout", "hardware", "versions", "git commit", "launches")
    known = [[name, *(of.get(name, "-") for of in facts_of)] for name in names]
    results = [[name, *(_value(values[-1] if values else None) for values in all_)] for name, all_ in _results(runs)]
    return [
        {"title": "Keys of the configuration that differ", "columns": labels, "rows": _that_differ(configured)},
        {"title": "Facts that differ", "columns": labels, "rows": _that_differ(known)},
        {"title": "Last values", "columns": labels, "rows": results},
    ]


def _results(runs: Sequence[RunRecord]) -> Iterator[tuple[str, list[list[float]]]]:
    for key, name in RESULTS.items():
        values = [run.values(key) for run in runs]
        if any(values):
            yield name, values


def _that_differ(rows: Sequence[list[str]]) -> list[list[str]]:
    return [row for row in rows if len(set(row[1:])) > 1]


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _text(value: Any) -> str:
    """Return a value of the configuration as YAML has it, on one line."""
    try:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # a date, for instance
        return str(value)


def _model(config: Mapping[str, Any]) -> str:
    if config.get("model.provider"):
        return f"model.provider={config['model.provider']}"
    parts = [
        f"{config.get('model.num_layers')} layers",
        f"hidden size {config.get('model.hidden_size')}",
        f"{config.get('model.num_attention_heads')} heads",
        f"vocabulary {config.get('model.vocab_size') or 'of the tokenizer'}",
    ]
    if config.get("model.num_moe_experts"):
        parts.append(f"{config['model.num_moe_experts']} experts")
    return ", ".join(parts)


def _method(config: Mapping[str, Any]) -> str:
    mixed = ("target.anchor", "target.teacher_weight", "target.k_max")
    mixes = config.get("target.rule") != "teacher_alone"
    names = ("method.name", "target.rule", *(mixed if mixes else ()), "loss.divergence", "teacher.weights")
    return ", ".join(f"{name}={_text(config[name])}" for name in names if name in config)


def _data(config: Mapping[str, Any]) -> str:
    batch, samples = config.get("data.global_batch_size"), config.get("rollout.num_samples")
    responses = "1 response" if samples == 1 else f"{samples} responses"
    return f"{_text(config.get('data.path'))}; {batch} problems per step, {responses} each"


def _seen(run: RunRecord) -> str | None:
    epochs, tokens = run.values("data/epoch"), run.values("tokens/response")
    parts = [f"{epochs[-1]:.3g} epochs"] if epochs else []
    parts += [f"{sum(tokens):,.0f} response tokens"] if tokens else []
    return ", ".join(parts) or None


def _optimizer(config: Mapping[str, Any]) -> str:
    names = ("optimizer.optimizer", "optimizer.precision", "optimizer.lr")
    return ", ".join(f"{name.partition('.')[2]}={_text(config[name])}" for name in names if name in config)


def _versions(versions: Any) -> str | None:
    if not isinstance(versions, dict):
        return None
    return ", ".join(f"{name} {version}" for name, version in versions.items() if isinstance(version, str))
