# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sweep of the map: the share of responses without work after training, beside the closed form of the target."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from _lib.pretraining import Base
from _lib.variants import Variant
from _lib.watched_runs import QUIET, opened, train_one_step

if TYPE_CHECKING:  # torch and Megatron are imported by the functions that need them, so that --help answers at once
    from megatron_selfdistill.trainer import Trainer

Leaks = dict[str, float]
"""Problem or class -> probability of a response without work."""


def measured_leaks(
    variant: Variant, base: Base, run_dir: Path, steps: tuple[int, ...], rule: str, weight: float
) -> dict[str, Any]:
    """Train ``variant`` and return the leaks of each class of leak_classes.py among the base's held-out problems.

    ``rule`` is fixed (k = 1 + w) or matched, and ``weight`` is w, both as ``variant`` sets them.
    Returns: own and hint, the leaks of the base without and with the hint; predicted, the leaks of the target; leak,
    the leaks of the student at each of ``steps``.
    """
    settings = (f"num_steps={steps[-1]}", *QUIET, f"run_dir={run_dir}")
    leaks = []
    with opened((*base.overrides, *variant.overrides, *settings)) as trainer:
        own, hint = first_token_leaks(trainer), first_token_leaks(trainer, hinted=True)
        for step in range(1, steps[-1] + 1):
            train_one_step(trainer)
            if step in steps:
                leaks.append(by_class(first_token_leaks(trainer)))
    predicted = {problem: target_leak(own[problem], hint[problem], rule, weight) for problem in own}
    found = {"own": by_class(own), "hint": by_class(hint), "predicted": by_class(predicted)}
    return {**found, "step": list(steps), "leak": leaks}


def first_token_leaks(trainer: Trainer, hinted: bool = False) -> Leaks:
    """Return for each held-out problem the probability that the response begins with ';', that is without work.

    The first token is a fork between ';' and one digit, so one greedy token and its log-prob give both sides.
    """
    from megatron_selfdistill.rollout.base import Request

    run_data, params = trainer.run_data, dataclasses.replace(trainer.sampling, max_new_tokens=1, temperature=0.0)
    prompt_of = run_data.builder.teacher_prompt if hinted else run_data.builder.student_prompt
    trainer.sampler.update_weights(trainer.step)
    responses = trainer.sampler.generate([Request(prompt_of(p), 0) for p in run_data.evaluation], params)
    (leak,) = run_data.tokenizer.encode(";")
    found = {}
    for problem, response in zip(run_data.evaluation, responses, strict=True):
        likely = math.exp(response.log_probs[0])
        found[problem.id] = likely if response.token_ids[0] == leak else 1 - likely
    return found


def target_leak(own: float, hint: float, rule: str, weight: float) -> float:
    """Return the probability of the leak under the anchored target of a fork between the leak and work.

    ``own`` and ``hint``: the probabilities of the leak under reference and teacher.  A matched target has the entropy
    of the reference: it is the reference or its mirror image, except where k = 1 + w bounds it.
    """
    mix = weight * logit(hint) + logit(own)
    if rule == "fixed":
        return sigmoid(mix / (1 + weight))
    matched = math.copysign(abs(logit(own)), mix)
    return sigmoid(max(matched, mix / (1 + weight), key=abs))  # k <= 1 + w: at least as certain as with k = 1 + w


def logit(probability: float) -> float:
    """Return log(p / (1 - p)); a probability of 0 or 1 counts as 1e-7 away from it."""
    inside = min(max(probability, 1e-7), 1 - 1e-7)
    return math.log(inside / (1 - inside))


def sigmoid(value: float) -> float:
    """Return the probability whose logit is ``value``."""
    return 1 / (1 + math.exp(-value))


def by_class(leaks: Mapping[str, float]) -> Leaks:
    """Return the mean of each class over its problems, whose ids end with the class."""
    of_class = defaultdict(list)
    for problem, leak in leaks.items():
        of_class[problem[-2:]].append(leak)
    return {name: round(mean(of_class[name]), 4) for name in sorted(of_class)}
