# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The arithmetic of a step, part by part, under the names of the phases that a run logs; nothing here is measured.

    seconds of a part = work in FLOP or bytes / rate + seconds that depend on no rate

    rollout    reads * weights of a GPU / copied bytes per second + reads * seconds of the layers, where
               reads = longest response * max(1, sequences / full); and the keys and values that each token reads
    sync       weights / rate of the links + the seconds in which a colocated engine wakes up
    train      2 FLOP per parameter and token of each pass and the products of attention / (GPUs * FLOP/s * `MFU`);
               the bubble of the pipeline; gradients / rate of the links
    optimizer  the optimizer's state / copied bytes per second; new weights / rate of the links

An engine reads all of its weights for every token of a batch.  Up to the balance of the machine the sequences share
this read, so one sequence takes as long as a full batch (`Engines.full`).  Mean prompts and responses are a third
(`MEAN`) of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_selfdistill.config import Config
from megatron_selfdistill.instruments.plan.engines import (
    MEAN,
    Engines,
    active_parameters,
    backward_passes,
    kv_cache_bytes,
)
from megatron_selfdistill.instruments.plan.gpus import (
    ALL_REDUCE_SECONDS,
    LAYER_SECONDS,
    MFU,
    NETWORK,
    RATES,
    WAKE_SECONDS,
)
from megatron_selfdistill.instruments.plan.memory import GIB, Load, element_size, engine_weight_gib, parameter_bytes
from megatron_selfdistill.instruments.plan.stages import PlannedModel
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.teachers.teachers_config import joins


@dataclass(frozen=True)
class StepPart:
    """One line of the arithmetic of a step."""

    phase: str
    """The phase of a step whose ``seconds/PHASE`` a run logs."""
    name: str
    work: float
    """The FLOP of all GPUs, or the bytes of one GPU; 0 for a part of fixed seconds."""
    unit: str
    """FLOP or B."""
    rate: float
    """The work per second."""
    besides: float = 0.0
    """The seconds that depend on no rate."""

    @property
    def seconds(self) -> float:
        """The seconds of this part."""
        return self.work / self.rate + self.besides


def parts_of_step(
    config: Config,
    student: PlannedModel,
    teachers: Mapping[str, PlannedModel],
    engines: Engines | None,
    load: Load,
    bubble: float,
) -> list[StepPart]:
    """Return the lines of the arithmetic, in the order of a step in which generation and training take turns.

    ``teachers``: those of another architecture than the student's, by name.  ``engines``: the vLLM engines; None leaves
    out the phases rollout and sync.  ``bubble``: the share of a step's training in which a pipeline stage waits.
    """
    generation = [] if engines is None else [*_rollout(config, student, engines, load), _sync(config, engines)]
    return [*generation, *_train(config, student, teachers, load, bubble), *_optimizer(config, student)]


def _lengths(config: Config) -> tuple[float, float]:
    """Return the mean tokens of a prompt and of a response."""
    longest = config.rollout.max_new_tokens
    return MEAN * ((config.data.max_length or 2 * longest) - longest), MEAN * longest


def _rollout(config: Config, student: PlannedModel, engines: Engines, load: Load) -> Iterator[StepPart]:
    """Yield the reads of an engine; a response reads its prompt and what it has written, for each of its tokens."""
    copied, (prompt, response) = RATES[config.cluster.gpu].copied, _lengths(config)
    reads = config.rollout.max_new_tokens * max(1.0, engines.sequences / engines.full)
    weights = engine_weight_gib(config, load.model_parameters) * GIB
    of_layer = LAYER_SECONDS + (2 * ALL_REDUCE_SECONDS if config.rollout.engine_tp > 1 else 0)
    yield StepPart(
        "rollout", "weights", reads * weights, "B", copied, reads * student.transformer.num_layers * of_layer
    )
    read = engines.sequences * response * (prompt + response / 2)
    yield StepPart("rollout", "keys and values", read * kv_cache_bytes(config, student.transformer), "B", copied)


def _sync(config: Config, engines: Engines) -> StepPart:
    """Return the update of the engines: over the links of a replica, or from one GPU to all servers."""
    p, size = config.parallel, engines.update_bytes
    if config.rollout.placement == "server":
        return StepPart("sync", "weights to servers", size, "B", NETWORK)
    apart = config.cluster.num_gpus or 1 if p.pipeline_model_parallel_size > 1 else p.tensor_model_parallel_size
    rate = _link(config, max(apart, p.expert_model_parallel_size))
    return StepPart("sync", "weights to engines", size / config.rollout.engine_tp, "B", rate, WAKE_SECONDS)


def _link(config: Config, span: int) -> float:
    """Return the bytes per second between ``span`` consecutive GPUs."""
    return RATES[config.cluster.gpu].link if span <= config.cluster.gpus_per_node else NETWORK


def _train(
    config: Config, student: PlannedModel, teachers: Mapping[str, PlannedModel], load: Load, bubble: float
) -> Iterator[StepPart]:
    """Yield the passes of all models, the projections, what the pipeline waits, and the sum of the gradients.

    Each of several teachers reads an equal share of the responses, and each teacher of a product reads all.  The
    projections are forward, and backward of hidden states and, except beside adapters, of the weight.  Teacher and
    reference are projected once as a mix, or once each where their weights differ; the match with the reference's
    entropy projects the reference once more.  A projection of another width counts by its width.
    """
    responses, (prompt, response) = config.data.global_batch_size * config.rollout.num_samples, _lengths(config)
    rate = (config.cluster.num_gpus or 1) * RATES[config.cluster.gpu].flops * MFU
    names, own = list(config.named_teachers), _projection(student, load)
    each = 1.0 if joins(config.teachers) or not names else 1.0 / len(names)
    alike = (len(names) - len(teachers)) * each if names else 1.0
    models = {"student": (1 + backward_passes(config), student)}
    taught = {"teacher": (alike, student)} if config.has_teacher and alike else {}
    taught |= {f"teacher {name}": (each, model) for name, model in teachers.items()}
    models |= taught | ({"reference": (1.0, student)} if config.is_anchored else {})
    parts = []
    for name, (passes, model) in models.items():
        work = passes * responses * _forward_flops(model, prompt + response, load)
        parts.append(StepPart("train", name, work, "FLOP", rate))
    passes = 2.0 if config.adapter.rank else 3.0
    passes += sum(share * _projection(model, load) / own for share, model in taught.values())
    if config.is_anchored:
        passes += config.projects_reference + Target.configured(config.target, None).needs_reference_entropy
    parts.append(StepPart("train", "output layer", passes * responses * response * 2 * own, "FLOP", rate))
    yield from parts
    if bubble:
        waited = sum(part.seconds for part in parts) * bubble / (1 - bubble)
        yield StepPart("train", "pipeline bubble", 0.0, "B", 1.0, waited)
    exchanged = 4 if config.optimizer.use_distributed_optimizer else 8  # an all-reduce also gathers the sums
    yield from _over_replicas(config, student, "train", "gradients over replicas", exchanged)


def _forward_flops(model: PlannedModel, length: float, load: Load) -> float:
    """Return the FLOP of all layers for one sequence of ``length`` tokens; attention is causal."""
    config = model.transformer
    width = config.kv_channels * 2
    if getattr(config, "multi_latent_attention", False):
        width = config.qk_head_dim + config.qk_pos_emb_head_dim + config.v_head_dim
    tables = 1 if model.model.share_embeddings_and_output_weights else 2
    parameters = active_parameters(config, model.stages) - tables * _projection(model, load)
    return 2.0 * parameters * length + float(config.num_layers * config.num_attention_heads * width) * length**2


def _projection(model: PlannedModel, load: Load) -> float:
    """Return the parameters of the output layer, padding included."""
    return float(model.transformer.hidden_size) * load.vocab_size


def _optimizer(config: Config, student: PlannedModel) -> Iterator[StepPart]:
    """Yield the optimizer's state, of which each value is read and written, and the exchange of the new weights."""
    fullest = max(student.stages, key=lambda stage: stage.parameters)
    state = 2 * parameter_bytes(config, fullest)["optimizer"]
    yield StepPart("optimizer", "state", state, "B", RATES[config.cluster.gpu].copied)
    if config.optimizer.use_distributed_optimizer:
        yield from _over_replicas(config, student, "optimizer", "weights over replicas", element_size(config))


def _over_replicas(
    config: Config, student: PlannedModel, phase: str, name: str, bytes_each: float
) -> Sequence[StepPart]:
    """Return the exchange of ``bytes_each`` per trained parameter between replicas; nothing if there is one."""
    stage = max(student.stages, key=lambda stage: stage.parameters)
    dense, experts = stage.dense_parameters, stage.expert_parameters
    if config.adapter.rank:
        dense, experts = stage.adapter_parameters, 0
    sharers = ((dense, stage.dp_cp_size), (experts, stage.expert_dp_size))
    sent = sum(parameters * (size - 1) / size for parameters, size in sharers)
    rate = _link(config, stage.dp_cp_size * config.parallel.tensor_model_parallel_size)
    return [StepPart(phase, name, bytes_each * sent, "B", rate)] if sent else []
