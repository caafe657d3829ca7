# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The dry run without a launch: everything that can be known about a run without a GPU."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_selfdistill.checkpoint.vocabulary import require_same_tokenizer
from megatron_selfdistill.config import Config
from megatron_selfdistill.config.world_checks import check_world, longest_context
from megatron_selfdistill.data.contexts import LOOKED_AT
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.instruments.plan.engines import Engines, backward_passes, engine_factors, engines
from megatron_selfdistill.instruments.plan.host_memory import HostMemory, host_memory
from megatron_selfdistill.instruments.plan.memory import NAMED, Load, Memory, engine_weight_gib, memory
from megatron_selfdistill.instruments.plan.plan_checks import (
    UNKNOWN_VOCABULARY,
    check_engine,
    check_lengths,
    longest_sequence,
    planned_gpus,
)
from megatron_selfdistill.instruments.plan.stages import PlannedModel, Stage, stages
from megatron_selfdistill.instruments.plan.step_time import Lengths, StepTime
from megatron_selfdistill.interop.formats.stored_model import with_stored_architecture
from megatron_selfdistill.model.architecture import padded_vocab_size, transformer_config
from megatron_selfdistill.model.forward import OutputLayer, choose_output_layer
from megatron_selfdistill.pipeline.batch import raised_to_multiple
from megatron_selfdistill.run_data import RunData
from megatron_selfdistill.teachers.teacher_directories import (
    TeacherCopy,
    about_architecture,
    adapter_teachers,
    require_teachers,
    teacher_copies,
)

STUDENT, TEACHER = "student", "teacher"

_SERVED_SHARE = 0.8
"""The share of a server's GPU that weights may take; vLLM uses 0.9 of the GPU for weights, cache and activations."""

RECOMPUTE_ALL = "schedule.recompute.granularity=full schedule.recompute.method=uniform schedule.recompute.num_layers=1"
"""The keys with which a run keeps only the inputs of layers, in a form that can be pasted into a command."""
_WITHOUT_REFERENCE = "target.anchor=student, which needs no reference"
_WITHOUT_OWN_COPY = {
    "ema": f"set teacher.weights=frozen, whose copy of the weights is also the reference, or {_WITHOUT_REFERENCE}",
    "current": f"set {_WITHOUT_REFERENCE}",
}
"""The advice where a reference is a copy of the weights of its own, by the value of teacher.weights."""


@dataclass(frozen=True)
class Plan:
    """The needs of a configuration on ``cluster.num_gpus`` ranks."""

    config: Config
    """The configuration, with the architecture of its checkpoint if the configuration names a checkpoint."""
    num_problems: int | None
    """The number of problems whose contexts fit, or of all logged turns; None if the configuration names no data."""
    about_prompts: str | None
    """The tokens that the teacher's prompts add; None without data or without a teacher."""
    stages: list[Stage]
    memory: list[Memory]
    """The memory of one GPU of each stage."""
    host: HostMemory
    """The host memory of the node whose ranks hold most."""
    parameters: int
    """The parameters of the whole model."""
    dp_size: int
    max_length: int
    """The longest context in tokens."""
    seq_length: int
    """The longest packed sequence in tokens."""
    num_microbatches: tuple[int, int]
    """The microbatches of student and teacher per step and replica, if every context has the largest allowed length."""
    pair_order: str
    schedule: Simulated
    output_layer: OutputLayer
    engines: Engines | None
    """The vLLM engines; None for another sampler, or without a sampler."""
    time: StepTime | None
    """The time of a step; None for a run that learns from a log, whose lengths no key states."""

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
        if most.peak <= room:
            return self._host_misfit()
        trains = most.training_peak >= most.rollout_peak
        largest = sorted((most.training if trains else most.rollout).items(), key=lambda part: -part[1])[:2]
        parts = " and ".join(f"{name} {size:.1f}" for name, size in largest)
        recompute = "" if self.config.schedule.recompute.granularity == "full" else f", set {RECOMPUTE_ALL}"
        advice = (
            f"raise parallel.* or cluster.num_gpus, lower schedule.max_tokens{recompute}"
            if trains
            else "raise rollout.engine_tp, lower rollout.kv_cache_gb, set teacher.offload=cpu, or sample on servers"
        )
        if self.config.copies_reference:
            advice += f", or {_WITHOUT_OWN_COPY[self.config.teacher.weights]}"
        return (
            f"pipeline stage {stage} needs {most.peak:.1f} GiB per GPU while {'training' if trains else 'sampling'} "
            f"({parts}), but cluster.gpu_memory_gb is {room:g}: {advice}"
        )

    def _host_misfit(self) -> str | None:
        room = self.config.cluster.host_memory_gb
        if self.host.peak <= room:
            return None
        advice = ["plan for more nodes (cluster.num_gpus)"]
        if self.host.resting["teacher"] or self.host.resting["reference"]:
            advice.append("set teacher.offload=none")
        if self.host.resting["reference"]:
            advice.append(_WITHOUT_OWN_COPY[self.config.teacher.weights])
        if self.host.resting.get(NAMED):
            advice.append("name fewer teachers")
        if self.host.resting["teacher states"]:
            advice.append("raise schedule.teacher_store_gb")
        return (
            f"the ranks of a node would hold {self.host} of host memory, but cluster.host_memory_gb is {room:g}: "
            f"{', or '.join(advice)}"
        )


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
    vocab_size = _vocab_size(config, run_data)
    transformer = transformer_config(config.model, config.parallel, config.optimizer, config.schedule)
    sizes = vocab_size, num_gpus
    built = stages(config.model, transformer, config.parallel, *sizes, config.adapter, adapter_teachers(config))
    teachers = _planned_teachers(config, copies, *sizes)
    built = [_with_teachers(stage, copies, teachers) for stage in built]
    step = _PlannedStep.of(config, num_gpus, max_length, seq_length)
    load = Load(
        seq_length=seq_length,
        response_tokens=step.response_tokens,
        in_flight=0,
        alternating=step.pair_order == "alternating",
        vocab_size=padded_vocab_size(
            vocab_size, config.model.make_vocab_size_divisible_by, config.parallel.tensor_model_parallel_size
        ),
        model_parameters=sum(stage.model_parameters for stage in built),
        engine_factors=engine_factors(config, vocab_size),
        other_widths={name: teacher.transformer.hidden_size for name, teacher in teachers.items()},
    )
    needed = [
        memory(config, transformer, stage, replace(load, in_flight=in_flight))
        for stage, in_flight in zip(built, step.schedule.in_flight, strict=True)
    ]
    samples = config.samples and not config.logged and config.rollout.engine == "vllm"
    kv_cache_gib = min(each.rollout.get("KV cache", 0.0) for each in needed)
    of_engines = engines(config, transformer, built, num_gpus, kv_cache_gib, load) if samples else None
    lengths = _lengths(config, run_data)
    time = StepTime(config, transformer, built, load, of_engines, step.schedule.bubble, lengths, teachers)
    return Plan(
        config=config,
        num_problems=len(run_data.problems) if run_data is not None else None,
        about_prompts=run_data.about_prompts if run_data is not None else None,
        stages=built,
        memory=needed,
        parameters=load.model_parameters,
        dp_size=step.dp_size,
        max_length=max_length,
        seq_length=seq_length,
        num_microbatches=step.num_microbatches,
        pair_order=step.pair_order,
        schedule=step.schedule,
        host=host_memory(config, transformer, built, load),
        output_layer=choose_output_layer(config, load.vocab_size),
        engines=of_engines,
        time=None if config.logged else time,
    )


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
            found |= dict.fromkeys(directories, PlannedModel(model, transformer, built))
    return found


def _with_teachers(stage: Stage, copies: Sequence[TeacherCopy], others: Mapping[str, PlannedModel]) -> Stage:
    sizes = [
        {name: (others[name].stages[stage.pp_rank] if name in others else stage).parameters for name in directories}
        for _, directories in copies
    ]
    return replace(stage, teacher_copies=sizes)


@dataclass(frozen=True)
class _PlannedStep:
    """A step of one replica in which every context has the largest allowed length."""

    dp_size: int
    response_tokens: int
    num_microbatches: tuple[int, int]
    """The microbatches of student and teacher."""
    pair_order: str
    schedule: Simulated

    @classmethod
    def of(cls, config: Config, num_gpus: int, max_length: int, seq_length: int) -> _PlannedStep:
        """Return the step with contexts of ``max_length`` tokens, packed into sequences of ``seq_length`` tokens."""
        p = config.parallel
        pp_size = p.pipeline_model_parallel_size
        dp_size = num_gpus // (p.tensor_model_parallel_size * p.context_parallel_size * pp_size)
        # A log has one reply per turn; a reply may fill its context.
        num_samples, longest = (
            (1, max_length) if config.logged else (config.rollout.num_samples, config.rollout.max_new_tokens)
        )
        per_sample = config.environment.max_turns * config.needs.contexts_per_sample
        contexts = math.ceil(config.data.global_batch_size / dp_size) * num_samples * per_sample
        num_microbatches = microbatches(config, contexts, seq_length // max_length)
        pair_order = config.schedule.pair_order or ("teacher_first" if pp_size > 1 else "alternating")
        schedule = simulate(
            order(*num_microbatches, pair_order, with_reference=config.is_anchored),
            pp_size,
            p.virtual_pipeline_model_parallel_size or 1,
            Times(backward=backward_passes(config)),
        )
        return cls(dp_size, contexts * longest, num_microbatches, pair_order, schedule)


def microbatches(config: Config, contexts: int, per_sequence: int) -> tuple[int, int]:
    """Return the numbers of the student's and of the teacher's packed sequences for contexts of full length.

    ``per_sequence``: the contexts in each packed sequence.  With an interleaved schedule the sum is a multiple of the
    stages.
    """
    p = config.parallel
    multiple = p.pipeline_model_parallel_size if p.virtual_pipeline_model_parallel_size else 1
    num_student = math.ceil(contexts / per_sequence)
    num_teacher = num_student if config.has_teacher else 0
    paired = bool(num_teacher) and config.schedule.pair_order == "alternating"
    return raised_to_multiple(num_student, num_teacher, multiple, paired=paired, with_reference=config.is_anchored)


def _lengths(config: Config, run_data: RunData | None) -> Lengths:
    """Return the assumed lengths, with the means of the first problems' prompts if the data are known.

    The teacher's prompts count as assumed if any of these problems has no solution yet.
    """
    assumed = Lengths.assumed(config)
    if run_data is None or config.logged:
        return assumed
    looked_at = run_data.problems.problems[:LOOKED_AT]
    student = statistics.fmean(len(run_data.builder.student_prompt(problem)) for problem in looked_at)
    if not all(problem.solution for problem in looked_at):
        return replace(assumed, student_prompt=student)
    teacher = statistics.fmean(len(run_data.builder.teacher_prompt(problem)) for problem in looked_at)
    return replace(assumed, student_prompt=student, teacher_prompt=teacher)


def _vocab_size(config: Config, run_data: RunData | None) -> int:
    """Return the size of the vocabulary, without padding."""
    vocab_size = run_data.vocab_size if run_data is not None else config.model.vocab_size
    if vocab_size is None:
        raise ConfigError(UNKNOWN_VOCABULARY)
    return vocab_size


@dataclass(frozen=True)
class Times:
    """The times of one microbatch in one stage, in any unit."""

    forward: float = 1.0
    """The time of the student's forward pass."""
    backward: float = 2.0
    """The time of the student's backward pass."""
    teacher: float = 1.0
    """The time of the teacher's forward pass."""


@dataclass(frozen=True)
class Simulated:
    """The result of the simulation of one step."""

    time: float
    """The time from the first forward to the last backward, in the unit of `Times`."""
    bubble: float
    """The share of ``time`` in which a stage waits, as the mean over the stages."""
    in_flight: tuple[int, ...]
    """The largest number of student microbatches (of one chunk each) whose activations a stage holds, per stage."""


def order(num_student: int, num_teacher: int, pair_order: str, *, with_reference: bool = False) -> list[str]:
    """Return the roles of the microbatches of a step, in the order in which schedule.py gives them to Megatron.

    ``with_reference``: a reference reads each student microbatch; it takes the time of a teacher, and has its role.
    """
    references = [TEACHER] if with_reference else []
    if pair_order == "alternating" and num_teacher:
        return [TEACHER, *references, STUDENT] * num_student
    return [TEACHER] * num_teacher + references * num_student + [STUDENT] * num_student


def simulate(streams: Sequence[str], pp_size: int, num_chunks: int = 1, times: Times | None = None) -> Simulated:
    """Simulate 1F1B, or with ``num_chunks > 1`` the interleaved schedule, on ``pp_size`` stages; messages take no time.

    The interleaved schedule needs a multiple of ``pp_size`` microbatches, and each chunk takes 1 / ``num_chunks`` of
    `Times`.
    """
    times = times or Times()
    stages = [operations(len(streams), pp_size, stage, num_chunks) for stage in range(pp_size)]
    last_chunk = num_chunks - 1
    done: dict[tuple[int, str, int, int], float] = {}
    clock, position = [0.0] * pp_size, [0] * pp_size
    while any(at < len(ops) for at, ops in zip(position, stages, strict=True)):
        for stage, ops in enumerate(stages):
            while position[stage] < len(ops):
                kind, microbatch, chunk = ops[position[stage]]
                if kind == "F":
                    awaited = (
                        (stage - 1, kind, microbatch, chunk) if stage else (pp_size - 1, "F", microbatch, chunk - 1)
                    )
                    first = stage == 0 and chunk == 0
                else:
                    last = stage == pp_size - 1
                    awaited = (0, kind, microbatch, chunk + 1) if last else (stage + 1, kind, microbatch, chunk)
                    first = last and chunk == last_chunk  # its own forward precedes it in this stage
                if not first and awaited not in done:
                    break
                start = max(clock[stage], 0.0 if first else done[awaited])
                clock[stage] = start + _duration(streams[microbatch], kind, times) / num_chunks
                done[stage, kind, microbatch, chunk] = clock[stage]
                position[stage] += 1
    total = max(clock)
    busy = sum(_duration(stream, kind, times) for stream in streams for kind in "FB")
    return Simulated(total, 1 - busy / total, tuple(_most_in_flight(ops, streams) for ops in stages))


def operations(num_microbatches: int, pp_size: int, stage: int, num_chunks: int) -> list[tuple[str, int, int]]:
    """Return (F or B, microbatch, chunk) of one stage, in the order of Megatron Core's schedules."""
    total = num_microbatches * num_chunks
    warmup = pp_size - stage - 1
    if num_chunks > 1:
        warmup = 2 * warmup + (num_chunks - 1) * pp_size
    warmup = min(warmup, total)
    group = pp_size * num_chunks
    virtual = [((k // group) * pp_size + k % pp_size, k % group // pp_size) for k in range(total)]
    if num_chunks == 1:
        virtual = [(k, 0) for k in range(total)]
    forward = [("F", microbatch, chunk) for microbatch, chunk in virtual]
    backward = [("B", microbatch, num_chunks - 1 - chunk) for microbatch, chunk in virtual]
    steady = [op for pair in zip(forward[warmup:], backward[: total - warmup], strict=True) for op in pair]
    return forward[:warmup] + steady + backward[total - warmup :]


def _duration(stream: str, kind: str, times: Times) -> float:
    if stream == TEACHER:
        return times.teacher if kind == "F" else 0.0
    return times.forward if kind == "F" else times.backward


def _most_in_flight(ops: Sequence[tuple[str, int, int]], streams: Sequence[str]) -> int:
    held = most = 0
    for kind, microbatch, _ in ops:
        if streams[microbatch] == STUDENT:
            held += 1 if kind == "F" else -1
            most = max(most, held)
    return most
