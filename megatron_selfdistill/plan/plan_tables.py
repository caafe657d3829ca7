# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A plan as tables for the console."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_selfdistill.config import Config
from megatron_selfdistill.data.problems import about_visits
from megatron_selfdistill.hidden_values import hidden
from megatron_selfdistill.needed_packages import described
from megatron_selfdistill.plan.dry_run import Plan
from megatron_selfdistill.plan.host_memory import checkpoint_bytes
from megatron_selfdistill.plan.launch import launch_commands, num_nodes
from megatron_selfdistill.plan.memory import Memory, engine_weight_gib
from megatron_selfdistill.plan.stages import Stage
from megatron_selfdistill.plan.step_time import StepTime
from megatron_selfdistill.plan.time_table import assumptions, shares, time_table
from megatron_selfdistill.terminal import visible

_WIDEST = 240
TRAINING, SAMPLING = "= while training", "= while sampling"


def show(plan: Plan, arguments: Sequence[str], console: Console | None = None) -> None:
    """Print the plan; ``arguments``: the arguments of the command line."""
    console = console or Console(width=_WIDEST)  # a log has no width, and a cut number would be useless
    title = f"\nGiB per GPU of each pipeline stage; there are {plan.config.cluster.memory_of_gpu:g}"
    for text in (
        *(visible(hidden(line)) for line in summary(plan)),
        title,
        memory_table(plan),
        *((assumptions(plan.time), time_table(plan.time), shares(plan.time), "") if plan.time else ()),
        *launch_commands(plan.config, arguments),
    ):
        console.print(text, highlight=False, markup=False, soft_wrap=isinstance(text, str))


def summary(plan: Plan) -> list[str]:
    """Return the lines of the plan that concern no single stage."""
    config, p, cluster = plan.config, plan.config.parallel, plan.config.cluster
    vpp, num_gpus = p.virtual_pipeline_model_parallel_size, cluster.num_gpus or 1
    nodes = "1 node" if num_nodes(config) == 1 else f"{num_nodes(config)} nodes"
    experts = f", EP {p.expert_model_parallel_size}" if config.model.num_moe_experts else ""
    student, teacher = plan.num_microbatches
    reference = f"{student} reference, " if config.is_anchored else ""
    samples = config.rollout.num_samples
    what = f"problems x {samples} response{'s' * (samples > 1)} of at most {config.rollout.max_new_tokens} tokens"
    data = "data.path is not set" if plan.num_problems is None else f"{plan.num_problems} problems fit"
    if config.logged:
        what = "logged turns"
        data = data.replace("problems fit", "turns in the log")
    return [
        f"{plan.parameters / 1e9:.2f} B parameters on {num_gpus} GPU{'s' * (num_gpus > 1)} ({nodes}): "
        f"TP {p.tensor_model_parallel_size} x PP {p.pipeline_model_parallel_size}{f' (VPP {vpp})' if vpp else ''} x "
        f"CP {p.context_parallel_size} x DP {plan.dp_size}{experts}",
        f"a step: {config.data.global_batch_size} {what}; contexts of at most {plan.max_length} in packed "
        f"sequences of at most {plan.seq_length}; {data}",
        f"a replica's microbatches at full length: {student} student, {reference}{teacher} teacher, "
        f"{plan.pair_order}; "
        f"bubble {plan.schedule.bubble:.1%} of the step",
        *_visits(plan),
        *([plan.about_prompts] if plan.about_prompts else []),
        str(plan.output_layer),
        _engines(plan),
        *_trained(plan),
        f"host memory of the fullest node: {plan.host} of {cluster.host_memory_gb:g}; processes are not counted",
        *_how_full(plan),
        *described(config),
    ]


def _visits(plan: Plan) -> list[str]:
    if plan.num_problems is None:
        return []
    what = "turns" if plan.config.logged else "problems"
    return about_visits(plan.config.num_steps, plan.config.data.global_batch_size, plan.num_problems, what)


def _engines(plan: Plan) -> str:
    rollout, num_gpus = plan.config.rollout, plan.config.cluster.num_gpus or 1
    if not plan.config.samples:
        return "responses: from the log; nothing is sampled"
    sampled = "hints and evaluations" if plan.config.asks_model else "evaluations"
    responses = f"responses: from the log; {sampled}" if plan.config.logged else "responses"
    if rollout.engine == "megatron":
        return f"{responses}: sampled in process, by the trainer's own weights"
    if rollout.placement == "colocated":
        return f"{responses}: {num_gpus // rollout.engine_tp} vLLM engines of {rollout.engine_tp} of these GPUs each"
    where = ", ".join(rollout.servers) or f"{rollout.num_servers} that the run starts"
    return (
        f"{responses}: vLLM servers ({where}) of {rollout.engine_tp} GPUs of their own, each with "
        f"{engine_weight_gib(plan.config, plan.parameters):.1f} GiB of weights"
    )


def _trained(plan: Plan) -> list[str]:
    """Return the lines about the trained parameters: their number, what an engine gets of them, and a checkpoint."""
    config, lines = plan.config, []
    if config.adapter.rank:
        lines.append(
            f"trained: {plan.adapter_parameters / 1e6:.1f} M parameters of adapters of rank {config.adapter.rank}, "
            f"{plan.adapter_parameters / plan.parameters:.2%} of the model"
        )
    if plan.engines is not None:
        what = "the adapters" if config.adapter.rank else "all weights"
        lines.append(f"an update of the engines' weights sends {what}, {plan.engines.update_bytes / 1e9:.2f} GB")
    held = checkpoint_bytes(config, plan.adapter_parameters or plan.parameters)
    return [*lines, f"a checkpoint takes {held / 1e9:.1f} GB"]


def _how_full(plan: Plan) -> list[str]:
    """Return the lines about the sequences per engine, with a warning if there are too few sequences."""
    if plan.engines is None or plan.time is None:
        return []
    rollout, rest = plan.time.turns
    filled = (
        f"{plan.engines.sequences:g} sequences per engine and step; its KV cache holds about {plan.engines.capacity} "
        f"at a time; by arithmetic for {plan.config.cluster.gpu} GPUs (below) {rollout:.0f} s of rollout and "
        f"{rest:.0f} s of the rest of a step"
    )
    warning = [plan.time.warning] if plan.time.warning else []
    return [filled, *warning, *_overlap(plan, plan.time), *_continued(plan, plan.time)]


def _overlap(plan: Plan, time: StepTime) -> list[str]:
    """Return the line about the ways in which generation and training can share the time of a step.

    There is none for a run in which both must take turns.
    """
    streams = _is_possible(plan.config, overlap="stream", ahead=0, at_update="wait")
    goes_ahead = _is_possible(plan.config, overlap="none", wave_microbatches=None, ahead=1, max_staleness=1)
    if not (streams or goes_ahead):
        return []
    generation, training = time.turns
    turns, longer = generation + training, max(generation, training)
    ways = [f"{turns:.0f} s in turns"]
    choice = "rollout.ahead=1 gains the shorter of both, if responses of weights that are one step old will do"
    if streams:
        in_wave = plan.config.rollout.wave_microbatches or plan.config.parallel.pipeline_model_parallel_size
        last = training * min(1.0, in_wave / max(plan.num_microbatches[0], 1))
        ways.append(f"{longer + last:.0f} s with rollout.overlap=stream (the longer of both, and a last wave)")
        if longer + last < turns:
            choice = (
                "choose rollout.overlap=stream, which stays on-policy, and gains as long as rollout and training both "
                f"take longer than its last wave of {last:.0f} s"
            )
    if goes_ahead:
        ways.append(f"{longer:.0f} s with rollout.ahead=1")
    return [f"by the same arithmetic a step takes {', '.join(ways)}: {choice}"]


def _continued(plan: Plan, time: StepTime) -> list[str]:
    """Return the line about the step that does not wait for the longest responses; none where it has to wait."""
    batch = plan.config.data.global_batch_size
    extra = batch // 2
    possible = extra and not plan.config.rollout.extra_problems
    if not (possible and _is_possible(plan.config, extra_problems=extra, max_staleness=1)):
        return []
    generation, training = time.turns
    shorter, _ = time.with_extra_problems(extra).turns
    if shorter >= generation:
        return []
    return [
        f"by the same arithmetic a step takes {generation + training:.0f} s, and {shorter + training:.0f} s with "
        f"rollout.extra_problems={extra} and rollout.max_staleness=1, if some tokens of weights that are one step old "
        "will do"
    ]


def _is_possible(config: Config, **rollout: Any) -> bool:
    """Return whether ``config`` can have the values ``rollout`` of this section, with all its other keys."""
    try:
        replace(config, rollout=replace(config.rollout, **rollout))
    except ValueError:
        return False
    return True


def memory_table(plan: Plan) -> Table:
    """Return the table of the GiB on one GPU of each pipeline stage; equal neighbouring stages share a column.

    Sampling adds its parts to weights, gradients, optimizer and reserved memory, and to the teacher unless it is
    offloaded.
    """
    columns: list[tuple[str, tuple[tuple[str, str], ...]]] = []
    pairs = zip(plan.stages, plan.memory, strict=True)
    for cells, alike in groupby(pairs, key=lambda pair: _cells(*pair)):
        ranks = [stage.pp_rank for stage, _ in alike]
        columns.append((str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}", cells))
    table = Table(box=box.SIMPLE)
    table.add_column("stage", no_wrap=True)
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    names = [name for name, _ in columns[0][1] if any(dict(cells)[name] != "0.0" for _, cells in columns)]
    for name in names:
        table.add_row(
            name, *(dict(cells)[name] for _, cells in columns), end_section=name in ("parameters, B", TRAINING)
        )
    return table


def _cells(stage: Stage, memory: Memory) -> tuple[tuple[str, str], ...]:
    """Return (row, cell) of a stage's column, in order."""
    parts = {"layers": str(stage.num_layers), "parameters, B": f"{stage.parameters / 1e9:.2f}"}
    parts |= {name: f"{size:.1f}" for name, size in memory.training.items()}
    parts[TRAINING] = f"{memory.training_peak:.1f}"
    parts |= {name: f"{size:.1f}" for name, size in memory.rollout.items() if name not in memory.training}
    parts[SAMPLING] = f"{memory.rollout_peak:.1f}"
    return tuple(parts.items())
