# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Run directories that no run has written: files of the right form with known values, for tests of reports."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_selfdistill import config as configuration
from megatron_selfdistill.metrics.run_log import EVALUATION_SAMPLES_FILE, EVENTS_FILE, METRICS_FILE, SAMPLES_FILE

NASTY = "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
"""A text that would become code in a page which shows it as markup."""


def write_run(directory: Path, num_steps: int = 30, *overrides: str, shift=0.0, changes=None, text=NASTY) -> Path:
    """Write a run of ``num_steps`` steps with evaluations every 10 steps, samples and events; return its directory.

    ``shift``: added to every loss.  ``changes``: (step, key) -> another value.  ``text``: stands in every response.
    """
    directory.mkdir(parents=True)
    config = dataclasses.replace(_composed(f"num_steps={num_steps}", *overrides), run_dir=str(directory))
    (directory / "config.yaml").write_text(configuration.to_yaml(config))
    lines = []
    for step in range(num_steps + 1):
        if step:
            lines.append({"step": step, **_metrics(step, num_steps, shift)})
        if step % 10 == 0:
            lines.append({"step": step, **_evaluation(step, num_steps)})
    for line in lines:
        line |= {key: value for (step, key), value in (changes or {}).items() if step == line["step"] and key in line}
    _write(directory / METRICS_FILE, [{key: _json(value) for key, value in line.items()} for line in lines])
    _write(
        directory / EVALUATION_SAMPLES_FILE, [a for step in range(0, num_steps + 1, 10) for a in _answers(step, text)]
    )
    _write(directory / SAMPLES_FILE, [_sample(step, text) for step in (1, num_steps)])
    _write(directory / EVENTS_FILE, _events(num_steps))
    return directory


def add_episodes(directory: Path, turns: Mapping[str, list[int]], text: str = NASTY) -> None:
    """Append the samples of one episode per problem to a run, at step 1; ``turns``: the turns that it has there.

    Turn n has the reward n / 4, and ``text`` in its response, its hint and its reply, which the last turn lacks.
    """
    lines = [
        _sample(1, text)
        | {"problem_id": problem_id, "prompt": f"prompt {turn} {text}", "episode": 2, "turn": turn, "reward": turn / 4}
        | {"hint": f"go {turn} {text}", "reply": f"room {turn} {text}" if turn < max(numbers) else None}
        for problem_id, numbers in turns.items()
        for turn in numbers
    ]
    with (directory / SAMPLES_FILE).open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def blocks_of(page: str) -> dict[str, Any]:
    """Return name -> value of the data blocks of a page."""
    found = re.findall(r'<script type="application/json\+deflate" id="data-([a-z0-9-]+)">([^<]*)</script>', page)
    return {name: json.loads(zlib.decompress(base64.b64decode(packed))) for name, packed in found}


@functools.cache
def _composed(*overrides: str) -> configuration.Config:
    return configuration.load(["data.path=problems.jsonl", *overrides])


def _metrics(step: int, num_steps: int, shift: float) -> dict[str, float]:
    left, wave = 1 - step / (num_steps + 1), math.sin(step * 12.9898) * 0.02
    found = {"loss/mean": 0.2 * left + wave + 0.03 + shift, "loss/reverse_kl": 0.2 * left + wave + 0.03}
    found |= {"entropy/student": 0.5 + 0.3 * left + wave, "entropy/teacher": 0.3 + 0.2 * left}
    found |= {"entropy/target": 0.4 + 0.2 * left, "k/mean": 1.6 + wave, "k/p01": 0.8 + wave, "k/p99": 1.75}
    found |= {"status/matched": 0.5, "status/capped": 0.4, "forks/capped": 0.3}
    found |= {"leak/hint_8grams": 0.01 + abs(wave) / 10, "gradient_norm": 0.5 + wave, "learning_rate": 1e-5}
    found |= {"response/length_mean": 100 + 100 * wave, "response/length_max": 180.0}
    found |= {"response/truncated_share": 0.02, "response/loop_share": 0.01, "sampler/log_prob_mean_abs_diff": 1e-7}
    found |= {"seconds/step": 2.0, "seconds/rollout": 1.2, "seconds/train": 0.5, "seconds/optimizer": 0.1}
    found |= {"tokens_per_second/rollout": 1000.0, "tokens_per_second/train": 9000.0, "memory/peak_gib": 50.0}
    return found


def _evaluation(step: int, num_steps: int) -> dict[str, float]:
    distances = {"greedy_accuracy": 0.0, "sampled_accuracy": -0.05, "pass_at_1": -0.05, "pass_at_4": 0.05}
    return {f"evaluation/{name}": 0.3 + 0.6 * step / num_steps + distance for name, distance in distances.items()}


def _answers(step: int, text: str) -> list[dict[str, Any]]:
    """Return answers to 30 problems: the first 10 are right at first, the first 20 later; problem 29 is cut."""
    return [
        {"step": step, "problem_id": f"problem {number}", "sample": sample, "prompt": f"What is {number} + {number}?"}
        | {"response": f"{text} {2 * number}", "correct": number < (10 if step == 0 else 20)}
        | {"length": 20 + number, "truncated": number == 29}
        for number in range(30)
        for sample in (None, 0)
    ]


def _sample(step: int, text: str) -> dict[str, Any]:
    tokens = [text, " two", " three", "<end>"]
    about = {"step": step, "problem_id": f"training problem {step}", "prompt": "What is 1 + 1?"}
    numbers = {"id": [1, 2, 3, 4], "text": tokens, "loss": [0.1, 0.2, 0.3, 0.0], "k": [1.5, 1.2, 1.75, 1.0]}
    numbers |= {"student_log_prob": [-0.1, -2.0, -3.0, "-inf"], "teacher_log_prob": [-2.6, -0.5, -3.1, -0.1]}
    numbers |= {"status": ["matched", "matched", "capped", "matched"]}
    about |= {"solution": f"hint {text}", "response": "".join(tokens), "truncated": False}
    return {**about, "tokens": numbers}


def _events(num_steps: int) -> list[dict[str, Any]]:
    half = num_steps // 2
    facts = {
        "recipe": "anchored",
        "command": "torchrun --nproc-per-node=8 -m megatron_selfdistill train recipe=anchored",
        "layout": "TP 2 x PP 1 x CP 1 x DP 4, EP 1; pair order teacher_first, layers: Transformer Engine",
        "hardware": "8 ranks on NVIDIA H200 (139 GiB)",
        "versions": {"Python": "3.11.7", "torch": "2.13.0"},
        "commit": "0123456789abcdef0123456789abcdef01234567",
    }
    events: list[dict[str, Any]] = [
        {"step": 0, "event": "started", "start": "starts from base", **facts},
        {"step": half, "event": "saved", "checkpoint": f"run/checkpoints/iter_{half:07d}"},
        {"step": half, "event": "stopped", "reason": "SIGTERM"},
        {"step": half, "event": "started", "start": f"resumes iter_{half:07d}", **facts},
        {"step": num_steps, "event": "saved", "checkpoint": f"run/checkpoints/iter_{num_steps:07d}"},
        {"step": num_steps, "event": "finished"},
    ]
    return [{"time": f"2026-01-01T00:{n:02d}:00+00:00", **event} for n, event in enumerate(events)]


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
