# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""An evaluation, and the comparison of two, as tables in the terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from megatron_selfdistill.evaluation.evaluation_directory import SUMMARY
from megatron_selfdistill.evaluation.evaluations import Comparison

if TYPE_CHECKING:  # torch, which takes seconds
    from megatron_selfdistill.instruments.evaluate.first_step import Readiness, Recommended


def first_metrics(names: Iterable[str]) -> list[str]:
    """Return the at most seven of ``names`` that a first look needs, in their order.

    They are the greedy accuracy, the mean accuracy of the samples, pass@k and majority@k for the largest k, and the
    length, the truncated share and, with an environment, the reward of the samples; without samples, of the greedy
    responses.
    """
    names = list(names)
    kind = "sampled" if "sampled_mean_length" in names else "greedy"
    first = {"greedy_accuracy", f"{kind}_mean_length", f"{kind}_truncated_share", f"{kind}_mean_reward"}
    first |= {name for name in names if name.startswith("avg_at_")}
    for rate in ("pass_at_", "majority_at_"):
        of_rate = [name for name in names if re.fullmatch(rf"{rate}\d+", name)]
        first |= set(sorted(of_rate, key=lambda name: int(name.removeprefix(rate)))[-1:])
    return [name for name in names if name in first]


def show_summary(summary: dict[str, Any], line: str) -> None:
    """Print the `first_metrics` of the ``summary`` of `write_evaluation` as a table, with ``line`` below it."""
    model, data, settings = summary["model"], summary["data"], summary["settings"]
    iteration = "" if model["iteration"] is None else f", iteration {model['iteration']}"
    problems = _counted(data["num_problems"], "problem")
    title = f"{model['path']}{iteration}\n{problems}, {_counted(settings['num_samples'], 'sample')} each"
    table = Table(title=title)
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("95 %", justify="right")
    intervals = summary["intervals"]
    table.caption = f"95 % intervals over the problems (bootstrap)\n{SUMMARY} has all metrics\n{line}"
    for name in first_metrics(dict.fromkeys([*intervals, *summary["metrics"]])):  # a single problem has no intervals
        interval = " to ".join(map(_shown, intervals.get(name, ())))
        table.add_row(name, _shown(summary["metrics"][name]), interval)
    console().print(table)


def show_readiness(ready: Readiness, target: Recommended) -> None:
    """Print the verdict of `readiness`, with ``target``, that of a run, or with what to change."""
    gain, plain = ready.gain, f"{ready.right} of {ready.num_problems}"
    hinted = f"{ready.right_hinted} of {ready.num_hinted}"
    print(f"without the hint  {ready.right / ready.num_problems:.2f} right ({plain})")
    print(f"with the hint     {ready.right_hinted / ready.num_hinted:.2f} right ({hinted})")
    number = _counted(ready.num_problems, "problem")
    print(f"gain             {gain.mean:+.2f} ({number}, 95 %: {gain.low:+.2f} to {gain.high:+.2f})")
    if ready.cause:
        print(f"do not train yet: with the hint {hinted} are right, without it {plain}")
        print(f"cause: {ready.cause}\nchange: {ready.change}\n")
    else:
        print(f"train: the hint helps\ntarget: {target}\n")


def show_first_step(first: Mapping[str, Any], advice: Sequence[str]) -> None:
    """Print the entry first_step of a summary as a table, with ``advice``, a sentence per line, below it."""
    samples, tokens = _counted(first["num_samples"], "sample"), _counted(first["num_tokens"], "token")
    table = Table(title=f"the first step of a run: {samples} without hints, {tokens}")
    table.add_column("number")
    table.add_column("all tokens", justify="right")
    table.add_column("top tenth", justify="right")
    table.add_row("mean log-prob, nats per token", _shown(first["log_prob_mean"]), "")
    table.add_row("entropy, nats per token", _shown(first["entropy_mean"]), "")
    table.add_row("share cut at rollout.max_new_tokens", _shown(first["truncated_share"]), "")
    table.add_row("share that ends in a loop", _shown(first["loop_share"]), "")
    table.add_row("accuracy without hints", _shown(first["accuracy"]), "")
    table.add_row("KL(teacher || reference), nats per token", _shown(first["teacher_kl"]), "")
    if first["general_kl"] is None:
        table.add_row(f"no controls: {first['why_no_controls']}", "-", "", end_section=True)
    else:
        general, specific = _shown(first["general_kl"]), _shown(first["specific_kl"])
        table.add_row("general: KL(other hints || reference), nats per token", general, "")
        table.add_row("specific: KL(teacher || other hints), nats per token", specific, "", end_section=True)
    shares = (first["let_through"], first["let_through_top_tenth"])
    table.add_row("let through", *("-" if share is None else _shown(share) for share in shares))
    table.caption = (
        "other hints: the mean after those of other problems (target.control)\n"
        "let through: KL(target || reference) / KL(teacher || reference)\n"
        "top tenth: of the tokens by KL(teacher || reference)\n"
        "target.anchor=student: the same until the first update"
    )
    console().print(table)
    for sentence in advice:
        console().print(sentence, style="yellow", markup=False)


def show_comparison(compared: Comparison) -> None:
    """Print the `first_metrics` of the comparison as a table, with a line for each setting that differs."""
    shown = first_metrics(it.metric for it in compared.differences)
    caption = f"paired bootstrap over {compared.num_problems} problems\n--out FILE writes all metrics"
    table = Table(title=f"A = {compared.a}\nB = {compared.b}", caption=caption)
    table.add_column("metric", no_wrap=True)
    for column in ("A", "B", "B - A", "95 %", "P(B <= A)"):
        table.add_column(column, justify="right")
    for it in (it for it in compared.differences if it.metric in shown):
        interval = f"{it.low:+.3f} to {it.high:+.3f}"
        probability = "-" if it.probability_not_above is None else f"{it.probability_not_above:.4f}"
        numbers = (_shown(it.a), _shown(it.b), f"{it.difference:+.3f}", interval, probability)
        table.add_row(it.metric, *numbers)
    console().print(table)
    for name, (a, b) in compared.other_settings.items():
        console().print(f"not the same in both: {name} is {a!r} in A and {b!r} in B", style="yellow", markup=False)


def console() -> Console:
    """Return the console of tables: as wide as the terminal, or 120 columns elsewhere."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _shown(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
