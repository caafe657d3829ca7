# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The dry run without a launch: everything that can be known about a run without a GPU."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.checkpoint.formats.stored_model import with_stored_architecture
from megatron_selfdistill.checkpoint.vocabulary import require_same_tokenizer
from megatron_selfdistill.config import Config
from megatron_selfdistill.config.schema.target_config import planned_controls
from megatron_selfdistill.config.world_checks import check_world, longest_context
from megatron_selfdistill.data.controls import with_decided_target
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.instruments.plan.host_memory import HostMemory, host_memory
from megatron_selfdistill.instruments.plan.memory import (
    Load,
    Memory,
    engine_factors,
    engine_weight_gib,
    memory,
    update_bytes,
)
from megatron_selfdistill.instruments.plan.planned_gpus import planned_gpus
from megatron_selfdistill.instruments.plan.stages import PlannedModel, Stage, stages
from megatron_selfdistill.instruments.plan.step_time import StepPart, backward_passes, parts_of_step
from megatron_selfdistill.interop.hf.mapping import family_of_model
from megatron_selfdistill.model.architecture import padded_vocab_size, transformer_config
from megatron_selfdistill.pipeline.batch import raised_to_multiple
from megatron_selfdistill.pipeline.configured_packing import most_responses, pair_order_of_all_steps
from megatron_selfdistill.teachers.teacher_directories import (
    TeacherCopy,
    about_architecture,
    adapter_teachers,
    require_teachers,
    teacher_copies,
)

_ADVICE = "raise cluster.num_gpus or parallel.*, or choose other keys of docs/tuning.md, Memory"
_SERVED_SHARE = 0.8
"""The share of a server's GPU that weights may take; vLLM uses 0.9 of the GPU for weights, cache and activations."""


@dataclass(frozen=True)
class Plan:
    """The needs of a configuration on ``cluster.num_gpus`` ranks."""

    config: Config
    """The configuration, with the architecture of its checkpoint if the configuration names a checkpoint."""
    run_data: RunData | None
    """The problems whose contexts fit, or all logged turns; None if the configuration names no data."""
    stages: list[Stage]
    memory: list[Memory]
    """The memory of one GPU of each stage."""
    host: HostMemory
    """The host memory of the node whose ranks hold most."""
    parameters: int
    """The parameters of the whole model."""
    step: PlannedStep
    max_length: int
    """The longest context in tokens."""
    seq_length: int
    """The longest packed sequence in tokens."""
    update_bytes: int | None
    """The bytes that a vLLM engine receives after a step; None for another sampler, or without a sampler."""
    teachers: Mapping[str, PlannedModel]
    """The teachers of another architecture than the student's, by name."""
    parts: Sequence[StepPart]
    """The arithmetic of a step; empty for a run that learns from a log, whose lengths no key states."""

    @property
    def adapter_parameters(self) -> int:
        """The parameters of the adapters of the whole model; 0 where the run trains all weights."""
        return sum(stage.adapter_model_parameters for stage in self.stages)

    def misfit(self) -> str | None:
        """Return a message about a part that does not fit; None if everything fits.

        A stage, or a server's share of the weights, may exceed its GPU; the ranks of a node may exceed its host memory.
        """
        room, rollout = self.config.cluster.memory_of_gpu, self.config.rollout
        served = engine_weight_gib(self.config, self.parameters)
        on_servers = self.config.samples and rollout.engine == "vllm" and rollout.placement == "server"
        if on_servers and served > _SERVED_SHARE * room:
            return (
                f"a GPU of a rollout server would hold {served:.1f} GiB of weights, which leaves no room for a KV "
                f"cache in cluster.gpu_memory_gb={room:g}: raise rollout.engine_tp={rollout.engine_tp}"
            )
        stage, most = max(enumerate(self.memory), key=lambda item: item[1].peak)
        if most.peak > room:
            trains = most.training_peak >= most.rollout_peak
            largest = sorted((most.training if trains else most.rollout).items(), key=lambda part: -part[1])[:2]
            parts = " and ".join(f"{name} {size:.1f}" for name, size in largest)
            return (
                f"pipeline stage {stage} needs {most.peak:.1f} GiB per GPU while {'training' if trains else 'sampling'}"
                f" ({parts}), but cluster.gpu_memory_gb is {room:g}: {_ADVICE}"
            )
        if self.host.peak > self.config.cluster.host_memory_gb:
            return (
                f"the ranks of a node would hold {self.host} of host memory, but cluster.host_memory_gb is "
                f"{self.config.cluster.host_memory_gb:g}: {_ADVICE}"
            )
        return None


def dry_run(config: Config, given: Collection[str] | None = None) -> Plan:
    """Check and plan ``config`` for ``cluster.num_gpus`` ranks, without allocating parameters or opening connections.

    The dry run reads the checkpoint's arguments, the tokenizer and the problems if the configuration names them.
    ``given``: as in `train.train`.  Raises: `ConfigError` for an impossible layout, model or sampler.  A plan that does
    not fit is no error; `Plan.misfit` states why the plan does not fit.
    """
    num_gpus = planned_gpus(config)
    config = with_stored_architecture(config, given)
    require_same_tokenizer(config)
    require_teachers(config)
    copies = teacher_copies(config)
    others = [model for model, _ in copies if model is not config.model]
    check_world(config, num_gpus, teaches_by_experts=any(model.num_moe_experts for model in others))
    max_length, seq_length = longest_context(config), longest_sequence(config)
    check_lengths(config, max_length)
    check_engine(config, num_gpus)
    run_data = RunData.load(config) if config.data.path and config.data.tokenizer else None
    if run_data is not None:
        config = with_decided_target(config, run_data.problems.problems)
    vocab_size = config.model.vocab_size if run_data is None else run_data.vocab_size
    if vocab_size is None:
        raise ConfigError("the vocabulary's size is not known: set model.vocab_size, or data.path and data.tokenizer")
    transformer = transformer_config(config.model, config.parallel, config.optimizer, config.schedule)
    sizes = vocab_size, num_gpus
    built = stages(config.model, transformer, config.parallel, *sizes, config.adapter, adapter_teachers(config))
    teachers = _planned_teachers(config, copies, *sizes)
    built = [
        replace(
            stage,
            teacher_copies=[
                {name: (teachers[name].stages[i] if name in teachers else stage).parameters for name in directories}
                for _, directories in copies
            ],
        )
        for i, stage in enumerate(built)
    ]
    student = PlannedModel(transformer, built)
    step = PlannedStep.of(config, num_gpus, transformer, max_length, seq_length)
    load = Load(
        seq_length=seq_length,
        response_tokens=step.response_tokens,
        in_flight=0,
        alternating=step.pair_order == "alternating",
        vocab_size=padded_vocab_size(
            vocab_size, config.model.make_vocab_size_divisible_by, config.parallel.tensor_model_parallel_size
        ),
        model_parameters=student.parameters,
        engine_factors=engine_factors(config, vocab_size),
        other_widths={name: teacher.transformer.hidden_size for name, teacher in teachers.items()},
    )
    needed = [
        memory(config, transformer, stage, replace(load, in_flight=in_flight))
        for stage, in_flight in zip(built, step.in_flight, strict=True)
    ]
    samples = config.samples and not config.logged and config.rollout.engine == "vllm"
    kv_cache_gib = min(each.rollout.get("KV cache", 0.0) for each in needed)
    parts = [] if config.logged else parts_of_step(config, student, teachers, load, step.bubble, kv_cache_gib)
    return Plan(
        config=config,
        run_data=run_data,
        stages=built,
        memory=needed,
        parameters=student.parameters,
        step=step,
        max_length=max_length,
        seq_length=seq_length,
        host=host_memory(config, transformer, built, load),
        update_bytes=update_bytes(config, load) if samples else None,
        teachers=teachers,
        parts=parts,
    )


def longest_sequence(config: Config) -> int:
    """Return the longest packed sequence, up to ``schedule.max_tokens``, that SP and CP can cut."""
    p = config.parallel
    multiple = p.tensor_model_parallel_size * (2 * p.context_parallel_size if p.context_parallel_size > 1 else 1)
    return config.schedule.max_tokens // multiple * multiple


def check_lengths(config: Config, max_length: int) -> None:
    """Raise `ConfigError` where contexts of ``max_length`` tokens leave no room for a prompt."""
    new = config.rollout.max_new_tokens
    if config.needs.samples is not None and config.samples and new >= max_length:
        raise ConfigError(
            f"rollout.max_new_tokens ({new}) leaves no room for a prompt in contexts of at most {max_length} tokens: "
            "raise data.max_length and schedule.max_tokens, or lower rollout.max_new_tokens"
        )


def check_engine(config: Config, num_gpus: int) -> None:
    """Raise `ConfigError` for options that vLLM would refuse once the GPUs exist."""
    rollout, heads = config.rollout, config.model.num_attention_heads
    if rollout.engine != "vllm" or not config.samples:
        return
    if rollout.placement == "colocated" and num_gpus % rollout.engine_tp:
        raise ConfigError(
            f"rollout.engine_tp={rollout.engine_tp} ranks form one engine, but cluster.num_gpus={num_gpus} is no "
            "multiple of it; choose a divisor"
        )
    per_node = min(num_gpus, config.cluster.gpus_per_node)
    if rollout.placement == "server" and rollout.engine_tp > per_node and rollout.engine_tp % per_node:
        raise ConfigError(
            f"rollout.engine_tp={rollout.engine_tp}: a server has GPUs of one node, at most {per_node}, or all GPUs of "
            f"several; choose a multiple of {per_node}"
        )
    if heads % rollout.engine_tp:
        raise ConfigError(
            f"rollout.engine_tp={rollout.engine_tp} must divide model.num_attention_heads ({heads}), which vLLM cuts"
        )
    if rollout.hf_config is None:
        family_of_model(config.model)


def _planned_teachers(
    config: Config, copies: Sequence[TeacherCopy], vocab_size: int, num_gpus: int
) -> dict[str, PlannedModel]:
    """Return the model of each teacher of another architecture than the student's, by name."""
    found: dict[str, PlannedModel] = {}
    for model, directories in copies:
        if model is not config.model:
            with about_architecture(f"teachers.{', '.join(directories)}"):
                transformer = transformer_config(model, config.parallel, config.optimizer, config.schedule)
                built = stages(model, transformer, config.parallel, vocab_size, num_gpus)
            found |= dict.fromkeys(directories, PlannedModel(transformer, built))
    return found


@dataclass(frozen=True)
class PlannedStep:
    """A step of one replica in which every context has the largest allowed length."""

    dp_size: int
    response_tokens: int
    num_microbatches: tuple[int, int]
    """The microbatches of student and teacher."""
    pair_order: str
    bubble: float
    """The share of a step's training in which a pipeline stage waits (`bubble`)."""
    in_flight: list[int]
    """The largest number of student microbatches, of one chunk each, whose activations each stage holds."""

    @classmethod
    def of(
        cls, config: Config, num_gpus: int, transformer: TransformerConfig, max_length: int, seq_length: int
    ) -> PlannedStep:
        """Return the step with contexts of ``max_length`` tokens, packed into sequences of ``seq_length`` tokens."""
        p = config.parallel
        pp_size = p.pipeline_model_parallel_size
        dp_size = num_gpus // (p.tensor_model_parallel_size * p.context_parallel_size * pp_size)
        contexts, longest = most_responses(config, dp_size)
        num_microbatches = microbatches(config, contexts, seq_length // max_length)
        controls = planned_controls(config)
        pair_order = pair_order_of_all_steps(config, dp_size, transformer, controls) or "alternating"
        num_student, num_teacher = num_microbatches
        passes = num_teacher + num_student * config.is_anchored  # a reference reads each student microbatch
        num_chunks = p.virtual_pipeline_model_parallel_size or 1
        pair = 1 + passes // num_student if pair_order == "alternating" else 1
        held = [in_flight(num_student, pair, pp_size, stage, num_chunks) for stage in range(pp_size)]
        waits = bubble(num_student, passes, pp_size, num_chunks, backward_passes(config))
        return cls(dp_size, contexts * longest, num_microbatches, pair_order, waits, held)


def microbatches(config: Config, contexts: int, per_sequence: int) -> tuple[int, int]:
    """Return the numbers of the student's and of the teacher's packed sequences for contexts of full length.

    ``per_sequence``: the contexts in each packed sequence.  With an interleaved schedule the sum is a multiple of the
    stages.
    """
    p = config.parallel
    multiple = p.pipeline_model_parallel_size if p.virtual_pipeline_model_parallel_size else 1
    num_student = math.ceil(contexts / per_sequence)
    readings = 1 + planned_controls(config)
    num_teacher = num_student * readings if config.has_teacher else 0
    paired = bool(num_teacher) and config.schedule.pair_order == "alternating"
    return raised_to_multiple(
        num_student, num_teacher, multiple, paired=paired, with_reference=config.is_anchored, num_readings=readings
    )


def bubble(num_student: int, num_others: int, pp_size: int, num_chunks: int, backward: float) -> float:
    """Return the share of a step in which a pipeline stage waits, with teacher_first: one fill and one drain.

    ``num_others``: the microbatches of teacher and reference.  ``backward``: the time of a student's backward pass;
    every forward pass takes 1.  It is a lower bound with alternating, and with few microbatches of several chunks.
    """
    busy = num_student * (1 + backward) + num_others
    waits = (pp_size - 1) * (1 + backward) / num_chunks
    return waits / (busy + waits)


def in_flight(num_student: int, pair: int, pp_size: int, stage: int, num_chunks: int) -> int:
    """Return the largest number of student microbatches, of one chunk each, whose activations a stage holds.

    1F1B, or with ``num_chunks > 1`` the interleaved schedule, makes as many forward passes before its first backward
    pass as its warm-up has, and one more.  ``pair``: of how many microbatches in sequence one is a student's, of
    which each further chunk may hold one more.
    """
    passes = pp_size - stage
    if num_chunks > 1:
        passes = 2 * passes - 1 + (num_chunks - 1) * pp_size
    held = math.ceil(passes / pair) + (num_chunks - 1 if pair > 1 else 0)
    return min(held, num_student * num_chunks)
