# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The host memory of the ranks of one node in GiB, part by part: the permanent parts, and the parts of a save.

The numbers are arithmetic, not measurement.  They do not include the interpreter, CUDA's libraries, the page cache and
vLLM's processes; a sleeping engine has a copy of its weights in host memory only where adapters are all that changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.config import Config
from megatron_selfdistill.instruments.plan.memory import (
    GIB,
    NAMED,
    Load,
    element_size,
    engine_weight_gib,
    optimizer_state_bytes,
    resting_teacher_bytes,
    teacher_state_bytes,
)
from megatron_selfdistill.instruments.plan.stages import Stage

_COPIES_OF_A_BUCKET = {"shared_memory": 2, "gloo": 1}
"""The transfer of weights to servers -> the number of copies of a bucket that rank 0 holds in host memory."""


@dataclass(frozen=True)
class HostMemory:
    """The host memory in GiB of the node whose ranks hold most; parts of 0 GiB are listed, too."""

    parts: dict[str, float]
    """The parts that always exist: the offloaded teacher and reference, the weights of named teachers, hidden states
    (pinned), buckets of weights, and the frozen weights of sleeping engines, which only adapters change.  Then those
    that a save adds: copies of the optimizer state and the weights.  A save in the background keeps the copies while
    the run trains."""

    @property
    def peak(self) -> float:
        """The GiB of all parts together."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        unit, times = ("GiB", 1) if self.peak >= 1 else ("MiB", 1024)
        shown = {name: times * size for name, size in self.parts.items() if round(times * size, 1)}
        listed = " + ".join(f"{name} {size:.1f}" for name, size in shown.items())
        return f"{listed or 'nothing'} = {times * self.peak:.1f} {unit}"


def host_memory(config: Config, transformer: TransformerConfig, stages: Sequence[Stage], load: Load) -> HostMemory:
    """Return the host memory of the fullest node of ``cluster.gpus_per_node`` ranks; consecutive ranks form a stage."""
    num_gpus = config.cluster.num_gpus or 1
    per_stage = [_resting(config, transformer, stage, load) | _saving(config, stage) for stage in stages]
    ranks_of_a_stage = num_gpus // len(stages)
    nodes = []
    for first in range(0, num_gpus, config.cluster.gpus_per_node):
        ranks = range(first, min(first + config.cluster.gpus_per_node, num_gpus))
        held = [per_stage[rank // ranks_of_a_stage] for rank in ranks]
        parts = {name: sum(of_rank[name] for of_rank in held) / GIB for name in held[0]}
        rollout = config.rollout
        if first == 0 and config.samples and rollout.engine == "vllm" and rollout.placement == "server":
            copies = _COPIES_OF_A_BUCKET.get(rollout.transfer or "", 0)
            parts["weight bucket"] += copies * rollout.bucket_mb * 2**20 / GIB
        nodes.append(HostMemory(parts))
    return max(nodes, key=lambda node: node.peak)


def _resting(config: Config, transformer: TransformerConfig, stage: Stage, load: Load) -> dict[str, float]:
    """Return the bytes that one rank of ``stage`` holds permanently."""
    teacher = config.teacher
    weights = reference = states = 0.0
    if config.keeps_teacher and teacher.offload == "cpu" and teacher.weights != "current" and not config.adapter.rank:
        weights = stage.parameters * (element_size(config) + (4 if teacher.weights == "ema" else 0))
    if config.has_teacher:
        if teacher.offload == "cpu" and config.copies_reference:
            reference = stage.parameters * element_size(config)
        if stage.projects:
            states = max(teacher_state_bytes(config, transformer, load) - config.schedule.teacher_store_gb * GIB, 0.0)
    resting = resting_teacher_bytes(config, stage)
    named = {NAMED: sum(resting.values())} if resting else {}
    rollout, engine = config.rollout, 0.0
    if config.adapter.rank and config.samples and rollout.is_colocated:
        engine = engine_weight_gib(config, load.model_parameters) * GIB + load.engine_factors * element_size(config)
    return {
        "teacher": weights,
        "reference": reference,
        **named,
        "teacher states": states,
        "engine weights": engine,
        "weight bucket": 0.0,
    }


def checkpoint_bytes(config: Config, parameters: float) -> float:
    """Return the bytes of a checkpoint that holds ``parameters`` trained parameters, with their optimizer state."""
    return sum(_saved_bytes(config).values()) * parameters


def _saved_bytes(config: Config) -> dict[str, float]:
    """Return the bytes that a checkpoint holds of each trained parameter, by part."""
    is_average = config.keeps_teacher and config.teacher.weights == "ema"
    distributed = config.optimizer.use_distributed_optimizer  # saves the float32 parameter in either precision
    return {
        "optimizer in a save": 12 if distributed else optimizer_state_bytes(config),
        "weights in a save": element_size(config),
        "teacher in a save": 4.0 if is_average else 0.0,
    }


def _saving(config: Config, stage: Stage) -> dict[str, float]:
    """Return the bytes that a save adds on one rank of ``stage``; each rank writes its share of replicated parts.

    With adapters these are all that is saved.  A frozen teacher, or the base of adapters, is written once before the
    rest and takes less.
    """
    trained = stage.dense_parameters / stage.dp_cp_size + stage.expert_parameters / stage.expert_dp_size
    if config.adapter.rank:
        trained = stage.adapter_parameters / stage.dp_cp_size
    return {part: size * trained for part, size in _saved_bytes(config).items()}
