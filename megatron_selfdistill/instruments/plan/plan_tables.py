# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A plan as tables for the console."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_selfdistill.config import Config
from megatron_selfdistill.distributed.terminal import visible
from megatron_selfdistill.engines.vllm.engine_adapter import EngineAdapter
from megatron_selfdistill.instruments.plan.dry_run import Plan
from megatron_selfdistill.instruments.plan.host_memory import checkpoint_bytes
from megatron_selfdistill.instruments.plan.memory import (
    GIB,
    Memory,
    engine_weight_gib,
    factor_rules,
    named_teacher_bytes,
    resting_teacher_bytes,
)
from megatron_selfdistill.instruments.plan.stages import Stage
from megatron_selfdistill.instruments.plan.step_time import MFU, NETWORK, RATES, StepPart

_RUN_DIR = "runs/first"  # used if run_dir is not set
_SCRIPTS_GPUS_PER_NODE = 8  # the default of the scripts in examples/slurm

_WIDEST = 240
TRAINING, SAMPLING = "= while training", "= while sampling"


def show(plan: Plan, arguments: Sequence[str], console: Console | None = None) -> None:
    """Print the plan; ``arguments``: the arguments of the command line."""
    console = console or Console(width=_WIDEST)  # a log has no width, and a cut number would be useless
    title = f"\nGiB per GPU of each pipeline stage; there are {plan.config.cluster.memory_of_gpu:g}"
    commands = launch_commands(plan.config, arguments)
    for text in (
        *(visible(line) for line in summary(plan)),
        title,
        memory_table(plan),
        *((assumptions(plan), time_table(plan.parts), "") if plan.parts else ()),
        *(commands[::-1] if plan.config.cluster.num_gpus == 1 else commands),
    ):
        console.print(text, highlight=False, markup=False, soft_wrap=isinstance(text, str))


def summary(plan: Plan) -> list[str]:
    """Return the lines of the plan that concern no single stage."""
    config, p, cluster = plan.config, plan.config.parallel, plan.config.cluster
    vpp, num_gpus = p.virtual_pipeline_model_parallel_size, cluster.num_gpus or 1
    nodes = "1 node" if num_nodes(config) == 1 else f"{num_nodes(config)} nodes"
    experts = f", EP {p.expert_model_parallel_size}" if config.model.num_moe_experts else ""
    (student, teacher), run_data = plan.step.num_microbatches, plan.run_data
    reference = f"{student} reference, " if config.is_anchored else ""
    samples = config.rollout.num_samples
    what = f"problems x {samples} response{'s' * (samples > 1)} of at most {config.rollout.longest_trained} tokens"
    data = "data.path is not set" if run_data is None else f"{len(run_data.problems)} problems fit"
    if config.logged:
        what = "logged turns"
        data = data.replace("problems fit", "turns in the log")
    peak, misfit = max(stage.peak for stage in plan.memory), plan.misfit()
    fits = f"fits: {peak:.1f} of {cluster.memory_of_gpu:g} GiB per GPU"
    return [
        fits if misfit is None else f"does not fit: {misfit}",
        f"{counted(plan.parameters)} parameters on {num_gpus} GPU{'s' * (num_gpus > 1)} ({nodes}): "
        f"TP {p.tensor_model_parallel_size} x PP {p.pipeline_model_parallel_size}{f' (VPP {vpp})' if vpp else ''} x "
        f"CP {p.context_parallel_size} x DP {plan.step.dp_size}{experts}",
        f"a step: {config.data.global_batch_size} {what}; contexts of at most {plan.max_length} in packed "
        f"sequences of at most {plan.seq_length}; {data}",
        f"a replica's microbatches at full length: {student} student, {reference}{teacher} teacher, "
        f"{plan.step.pair_order}; bubble {plan.step.bubble:.1%} of the step",
        *([run_data.about_prompts] if run_data is not None and run_data.about_prompts else []),
        _engines(plan),
        *_teachers(plan),
        *_trained(plan),
        f"host memory of the fullest node: {plan.host} of {cluster.host_memory_gb:g} GiB; processes are not counted",
    ]


def counted(number: float) -> str:
    """Return a number of parameters: in millions below a tenth of a billion."""
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"


def _engines(plan: Plan) -> str:
    rollout, num_gpus = plan.config.rollout, plan.config.cluster.num_gpus or 1
    if not plan.config.samples:
        return "responses: from the log; nothing is sampled"
    sampled = "hints and evaluations" if plan.config.needs.asks_model else "evaluations"
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


def _teachers(plan: Plan) -> list[str]:
    """Return a line per teacher with weights of its own: their size on a rank, and their place."""
    sizes = [named_teacher_bytes(plan.config, stage) for stage in plan.stages]
    resting = resting_teacher_bytes(plan.config, plan.stages[0])
    lines = []
    for name in sizes[0]:
        largest = max(size[name] for size in sizes)
        kind = ", adapters on the start of the run" if name in plan.stages[0].teacher_parameters else ""
        if name in plan.teachers:
            kind = f", another model of {plan.teachers[name].parameters / 1e9:.3g} billion parameters"
        place = "in host memory, swapped in each step" if name in resting else "on the device"
        lines.append(f"teachers.{name}: {largest / GIB:.3g} GiB per rank {place}{kind}")
    return lines


def _trained(plan: Plan) -> list[str]:
    config, lines = plan.config, []
    if config.adapter.rank:
        lines.append(
            f"trained: {plan.adapter_parameters / 1e6:.1f} M parameters of adapters of rank {config.adapter.rank}, "
            f"{plan.adapter_parameters / plan.parameters:.2%} of the model"
        )
    if plan.update_bytes is not None:
        what = "the adapters" if config.adapter.rank else "all weights"
        lines.append(f"an update of the engines' weights sends {what}, {sized(plan.update_bytes, 2)}")
    held = checkpoint_bytes(config, plan.adapter_parameters or plan.parameters)
    return [*lines, f"a checkpoint takes {sized(held)}"]


def memory_table(plan: Plan) -> Table:
    """Return the table of the GiB on one GPU of each pipeline stage; equal neighbouring stages share a column.

    Sampling adds its parts to weights, gradients, optimizer and reserved memory, and to the teacher unless it is
    offloaded.
    """
    columns: list[tuple[str, dict[str, str]]] = []
    pairs = zip(plan.stages, plan.memory, strict=True)
    for cells, alike in groupby(pairs, key=lambda pair: _cells(*pair)):
        ranks = [stage.pp_rank for stage, _ in alike]
        columns.append((str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}", cells))
    table = Table(box=box.SIMPLE)
    table.add_column("stage", no_wrap=True)
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for name in columns[0][1]:
        row = [cells[name] for _, cells in columns]
        if set(row) != {"0.0"}:
            table.add_row(name, *row, end_section=name in ("parameters", TRAINING))
    return table


def _cells(stage: Stage, memory: Memory) -> dict[str, str]:
    parts = {"layers": str(stage.num_layers), "parameters": counted(stage.parameters)}
    parts |= {name: f"{size:.1f}" for name, size in memory.training.items()}
    parts[TRAINING] = f"{memory.training_peak:.1f}"
    parts |= {name: f"{size:.1f}" for name, size in memory.rollout.items() if name not in memory.training}
    parts[SAMPLING] = f"{memory.rollout_peak:.1f}"
    return parts


def launch_commands(config: Config, arguments: Sequence[str]) -> tuple[str, str]:
    """Return the commands that launch the plan: with Slurm by this project's scripts, and without Slurm on each node.

    Keys and variables that are still missing are shown with a path to fill in.  References to the environment are shown
    as the user wrote them.
    """
    kept = [one for one in arguments if one.split("=")[0] not in ("dry_run", "run_dir")]
    for key, given, placeholder in (
        ("checkpoint.load", config.checkpoint.load, "/path/to/megatron/checkpoint"),
        ("data.tokenizer", config.data.tokenizer, "/path/to/tokenizer"),
        ("data.path", config.data.path, "/path/to/problems.jsonl"),
    ):
        kept += [f"{key}={placeholder}"] * (given is None)
    return _sbatch(config, kept), _torchrun(config, kept)


def num_nodes(config: Config) -> int:
    """Return the number of the trainer's nodes."""
    return -(-(config.cluster.num_gpus or 1) // config.cluster.gpus_per_node)


def _sbatch(config: Config, overrides: Sequence[str]) -> str:
    nodes = num_nodes(config)
    variables, options = {"RUN_DIR": config.run_dir or _RUN_DIR}, []
    script = "one_node" if nodes == 1 else "many_nodes"
    if _wants_servers(config, overrides):
        script = "rollout_nodes"
        variables |= _server_variables(config)
        nodes += int(variables["ROLLOUT_NODES"])
        # The script starts the servers, and passes their addresses to the run.
        overrides = [*(o for o in overrides if not o.startswith("rollout.num_servers=")), "rollout.num_servers=0"]
    if _ranks_per_node(config) != _SCRIPTS_GPUS_PER_NODE:
        variables["GPUS_PER_NODE"] = str(_ranks_per_node(config))
        options.append(f"--gpus-per-node={_ranks_per_node(config)}")
    if nodes > 1:
        options.append(f"--nodes={nodes}")
    environment = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    return " ".join([*environment, "sbatch", *options, f"examples/slurm/{script}.sbatch", *map(shlex.quote, overrides)])


def _wants_servers(config: Config, overrides: Sequence[str]) -> bool:
    """Return whether the run needs servers that have not been started yet."""
    on_servers = config.samples and config.rollout.engine == "vllm" and config.rollout.placement == "server"
    return on_servers and not any(override.startswith("rollout.servers=") for override in overrides)


def _server_variables(config: Config) -> dict[str, str]:
    rollout, per_node = config.rollout, _ranks_per_node(config)
    num_servers = rollout.num_servers or len(rollout.servers)
    variables = {
        "HF_CONFIG": rollout.hf_config or "/path/to/hf/config",
        "SERVER_PYTHON": rollout.server_python or "python",
        "SERVER_GPUS": str(rollout.engine_tp),
    }
    if config.adapter.rank:
        adapter = EngineAdapter.of(config.adapter, factor_rules(config, config.model.vocab_size or 1))
        variables["SERVER_ARGS"] = " ".join(adapter.server_args())
    if rollout.engine_tp <= per_node:
        return variables | {"ROLLOUT_NODES": str(-(-num_servers // (per_node // rollout.engine_tp)))}
    server_nodes = rollout.engine_tp // per_node
    return variables | {"SERVER_NODES": str(server_nodes), "ROLLOUT_NODES": str(num_servers * server_nodes)}


def _torchrun(config: Config, overrides: Sequence[str]) -> str:
    nodes, words = num_nodes(config), [f"run_dir={config.run_dir or _RUN_DIR}", *overrides]
    if config.cluster.num_gpus == 1:
        return shlex.join(["selfdistill", "train", *words])
    # c10d's rendezvous would number the ranks as nodes arrive, but neighbouring ranks should run on neighbouring nodes.
    where = "--standalone" if nodes == 1 else f'--nnodes {nodes} --node-rank "$NODE_RANK" --master-addr "$HEAD"'
    command = f"torchrun {where} --nproc-per-node {_ranks_per_node(config)} -m megatron_selfdistill.train"
    return " ".join([command, *map(shlex.quote, words)])


def _ranks_per_node(config: Config) -> int:
    return min(config.cluster.num_gpus or 1, config.cluster.gpus_per_node)


def assumptions(plan: Plan) -> str:
    """Return the line that names the rates of the arithmetic."""
    cluster = plan.config.cluster
    gpu, num_gpus = RATES[cluster.gpu], cluster.num_gpus or 1
    sampled = "" if plan.update_bytes is not None or not plan.config.samples else "; sampling in process is left out"
    return (
        f"\nseconds of a step in turns, by arithmetic and not measured (plan/step_time.py), on {num_gpus} x "
        f"{cluster.gpu}: {gpu.flops / 1e12:.0f} TFLOP/s with an MFU of {MFU:.0%}, {gpu.copied / 1e12:.1f} TB/s, "
        f"{gpu.link / 1e9:.0f} GB/s within a node and {NETWORK / 1e9:.0f} between "
        f"nodes; mean prompts and responses are a third of the longest{sampled}"
    )


def time_table(parts: Sequence[StepPart]) -> Table:
    """Return the table of the parts of a step, with their sum."""
    table = Table(box=box.SIMPLE)
    for name in ("phase", "part", "work", "time"):
        table.add_column(name, justify="left" if name in ("phase", "part") else "right", no_wrap=True)
    for place, part in enumerate(parts, 1):
        work = f"{part.work:.2e} FLOP" if part.unit == "FLOP" else sized(part.work)
        table.add_row(part.phase, part.name, work, seconds(part.seconds), end_section=place == len(parts))
    table.add_row("", "= a step", "", seconds(sum(part.seconds for part in parts)))
    return table


def seconds(value: float) -> str:
    """Return seconds with a digit behind the point, and with two below 10; below a tenth as milliseconds."""
    return f"{1000 * value:.2g} ms" if value < 0.1 else f"{value:.{1 + (value < 10)}f} s"


def sized(number: float, digits: int = 1) -> str:
    """Return a number of bytes in GB with ``digits`` behind the point; below a tenth of a GB in MB."""
    return f"{number / 1e9:.{digits}f} GB" if number >= 1e8 else f"{number / 1e6:.2g} MB"
