# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The time of a planned step as a table and as lines, which the log of a run can be held against."""

from __future__ import annotations

from rich import box
from rich.table import Table

from megatron_selfdistill.plan.gpus import MFU, NETWORK, RATES
from megatron_selfdistill.plan.step_time import Part, StepTime

_COLUMNS = ("phase", "part", "work", "rate", "seconds", "how")


def assumptions(time: StepTime) -> str:
    """Return the line that names the rates and lengths of the arithmetic."""
    cluster, lengths = time.config.cluster, time.lengths
    gpu, num_gpus = RATES[cluster.gpu], cluster.num_gpus or 1
    return (
        f"\nseconds of a step in turns, by arithmetic and not measured (plan/step_time.py), on {num_gpus} x "
        f"{cluster.gpu}: {gpu.flops / 1e12:.0f} TFLOP/s with an MFU of {MFU:.0%}, {gpu.bandwidth / 1e12:.2f} TB/s with "
        f"{gpu.copied / 1e12:.2f} reached, {gpu.link / 1e9:.0f} GB/s within a node and {NETWORK / 1e9:.0f} between "
        f"nodes; mean prompts of {lengths.student_prompt:.0f} (student) and {lengths.teacher_prompt:.0f} (teacher) "
        f"tokens, responses of {lengths.response:.0f}, the longest {lengths.longest:.0f}"
    )


def time_table(time: StepTime) -> Table:
    """Return the table of the parts of a step, with their sum."""
    table = Table(box=box.SIMPLE)
    for name in _COLUMNS:
        table.add_column(name, justify="right" if name in ("work", "rate", "seconds") else "left", no_wrap=True)
    for place, part in enumerate(time.parts, 1):
        table.add_row(*cells(part), end_section=place == len(time.parts))
    table.add_row("", "= a step", "", "", seconds(time.seconds), "")
    return table


def shares(time: StepTime) -> str:
    """Return the line about the share of each phase, with the metrics to compare it with."""
    found = [f"{name} {spent / time.seconds:.1%}" for name, spent in time.phases.items()]
    line = f"shares of a step: {', '.join(found)}; a run logs seconds/PHASE of each, and seconds/step"
    rollout = time.config.rollout
    if time.engines is not None and (rollout.overlap == "stream" or rollout.ahead):
        line += "; its seconds/rollout are only what training waits for, because generation goes on beside training"
    if time.config.samples and time.engines is None:
        line += "; sampling in process is left out"
    return line


def cells(part: Part) -> tuple[str, ...]:
    """Return the cells of a row of `time_table`."""
    work = rate = ""
    if part.unit == "FLOP":
        work, rate = f"{part.work:.2e} FLOP", f"{part.rate / 1e12:.0f} TFLOP/s"
    elif part.work:
        work, rate = f"{part.work / 1e9:.1f} GB", f"{part.rate / 1e9:.0f} GB/s"
    return part.phase, part.name, work, rate, seconds(part.seconds), part.note


def seconds(value: float) -> str:
    """Return seconds for the table: two digits behind the point below 10, else one."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"
