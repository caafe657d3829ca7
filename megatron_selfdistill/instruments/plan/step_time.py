# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The seconds of a step, part by part, under the names of the phases that a run logs: arithmetic, not measurement.

    seconds of a part = work in FLOP or bytes / rate + seconds that depend on no rate

    rollout    reads * weights of a GPU / copied bytes per second + reads * seconds of the layers, where
               reads = longest response * max(1, sequences / full); and the keys and values that each token reads
    sync       weights / rate of the links + the seconds in which a colocated engine wakes up
    train      2 FLOP per parameter and token of each pass and the products of attention / (GPUs * FLOP/s * `MFU`);
               the bubble of the pipeline; gradients / rate of the links
    optimizer  the optimizer's state / copied bytes per second; new weights / rate of the links

An engine reads all of its weights for every token of a batch.  Up to the balance of the machine the sequences share
this read, so one sequence takes as long as a full batch (`Engines.full`).

The arithmetic leaves out the work of the host (phase ``pack``), verifiers, evaluations and saves, the waiting of
replicas for the fullest one, and the exchange of tokens between experts.  Every layer counts as full attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megatron_selfdistill.config import Config
from megatron_selfdistill.config.schema.teachers_config import joins
from megatron_selfdistill.instruments.plan.engines import (
    MEAN,
    Engines,
    active_parameters,
    backward_passes,
    kv_cache_bytes,
)
from megatron_selfdistill.instruments.plan.gpus import (
    ALL_REDUCE_SECONDS,
    HOST_LINK,
    LAYER_SECONDS,
    MFU,
    NETWORK,
    RATES,
    WAKE_SECONDS,
)
from megatron_selfdistill.instruments.plan.memory import (
    GIB,
    Load,
    element_size,
    engine_weight_gib,
    parameter_bytes,
    resting_teacher_bytes,
)
from megatron_selfdistill.instruments.plan.stages import PlannedModel, Stage
from megatron_selfdistill.loss.target import Target


@dataclass(frozen=True)
class Lengths:
    """The tokens of the prompts and responses of a step."""

    student_prompt: float
    """The mean of the student's prompts."""
    teacher_prompt: float
    """The mean of the teacher's prompts."""
    response: float
    """The mean of the responses."""
    longest: float
    """The longest response."""

    @classmethod
    def assumed(cls, config: Config) -> Lengths:
        """Return means of a third (`MEAN`) of the longest prompts and responses that ``config`` allows."""
        longest = config.rollout.max_new_tokens
        prompt = MEAN * ((config.data.max_length or 2 * longest) - longest)
        return cls(prompt, prompt, MEAN * longest, longest)


@dataclass(frozen=True)
class Part:
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
    note: str = ""
    """How the work comes about."""

    @property
    def seconds(self) -> float:
        """The seconds of this part."""
        return self.work / self.rate + self.besides


@dataclass(frozen=True)
class StepTime:
    """The time of a step in which generation and training take turns."""

    config: Config
    transformer: Any
    """Megatron's configuration of the model."""
    stages: Sequence[Stage]
    load: Load
    engines: Engines | None
    """The vLLM engines; None without them, which leaves out the phases ``rollout`` and ``sync``."""
    bubble: float
    """The share of a step's training in which a pipeline stage waits."""
    lengths: Lengths
    teachers: Mapping[str, PlannedModel] = field(default_factory=dict)
    """The teachers of another architecture than the student's, by name."""

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The lines of the arithmetic, in the order of a step."""
        generation = (*self._rollout(self.engines), self._sync(self.engines)) if self.engines is not None else ()
        return (*generation, *self._train(), *self._optimizer())

    @property
    def phases(self) -> dict[str, float]:
        """The phases -> their seconds, in the order of a step."""
        names = dict.fromkeys(part.phase for part in self.parts)
        return {name: sum(part.seconds for part in self.parts if part.phase == name) for name in names}

    @property
    def turns(self) -> tuple[float, float]:
        """The seconds of the rollout, and those of the rest of the step."""
        rollout = self.phases.get("rollout", 0.0)
        return rollout, self.seconds - rollout

    @property
    def seconds(self) -> float:
        """The seconds of the step."""
        return sum(part.seconds for part in self.parts)

    @property
    def warning(self) -> str | None:
        """A warning if the rollout takes most of the step and further sequences would take no more time; else None."""
        share = self.turns[0] / self.seconds
        if self.engines is None or share <= 0.5 or self.engines.sequences >= self.engines.full:
            return None
        return (
            f"warning: {self.engines.sequences:g} sequences per engine leave the engines nearly idle, and sampling "
            f"responses takes about {share:.0%} of a step; {self.engines.full:.0f} sequences take about as long: raise "
            f"data.global_batch_size to {self._enough(self.engines)}, or rollout.num_samples by the same factor"
        )

    def _enough(self, engines: Engines) -> int:
        """Return the batch at which engines are full or the rollout takes half of the step, as a power of two.

        The reads of weights and the fixed seconds do not grow with the batch; the other parts do.
        """
        seconds = {part.name: part.seconds for part in self.parts}
        grows = seconds["student"] + seconds.get("reference", 0) + seconds["output layer"]
        grows += sum(seconds[name] for name in self._taught)
        grows += seconds.get("pipeline bubble", 0.0)
        reads, cache = seconds["weights"], seconds["keys and values"]
        rest = self.seconds - reads - cache - grows
        factor = engines.full / engines.sequences
        if grows > cache:
            factor = min(factor, (reads - rest) / (grows - cache))
        batch: int = 2 ** math.ceil(math.log2(max(1.0, self.config.data.global_batch_size * factor)))
        return batch

    # -- the parts -----------------------------------------------------------------------------------------------

    @property
    def _num_gpus(self) -> int:
        return self.config.cluster.num_gpus or 1

    @property
    def _responses(self) -> int:
        return self.config.data.global_batch_size * self.config.rollout.num_samples

    def _link(self, span: int) -> float:
        """Return the bytes per second between ``span`` consecutive GPUs."""
        within = span <= self.config.cluster.gpus_per_node
        return RATES[self.config.cluster.gpu].link if within else NETWORK

    def _rollout(self, engines: Engines) -> Iterator[Part]:
        """Yield the reads of an engine."""
        config, gpu, tokens = self.config, RATES[self.config.cluster.gpu], self.lengths
        reads = tokens.longest * max(1.0, engines.sequences / engines.full)
        weights = engine_weight_gib(config, self.load.model_parameters) * GIB
        layers = self.transformer.num_layers
        of_layer = LAYER_SECONDS + (2 * ALL_REDUCE_SECONDS if config.rollout.engine_tp > 1 else 0)
        note = (
            f"{reads:.0f} reads of {weights / 1e9:.1f} GB, and of {layers} layers of {of_layer * 1e6:.0f} us; at least "
            f"{reads * weights / gpu.bandwidth:.1f} s at {gpu.bandwidth / 1e12:.2f} TB/s"
        )
        yield Part("rollout", "weights", reads * weights, "B", gpu.copied, reads * layers * of_layer, note)
        # A response reads its prompt and what it has written, for each of its tokens.
        read = tokens.response * (tokens.student_prompt + tokens.response / 2)
        work = engines.sequences * read * kv_cache_bytes(config, self.transformer)
        note = f"{engines.sequences:g} sequences per engine"
        yield Part("rollout", "keys and values", work, "B", gpu.copied, note=note)

    def _sync(self, engines: Engines) -> Part:
        """Return the update of the engines: over the links of a replica, or from one GPU to all servers."""
        p, size = self.config.parallel, engines.update_bytes
        if self.config.rollout.placement == "server":
            return Part("sync", "weights to servers", size, "B", NETWORK, note="one sender")
        stages_apart = self._num_gpus if p.pipeline_model_parallel_size > 1 else p.tensor_model_parallel_size
        rate = self._link(max(stages_apart, p.expert_model_parallel_size))
        note = f"and {WAKE_SECONDS:g} s of sleeping and waking"
        return Part("sync", "weights to engines", size / self.config.rollout.engine_tp, "B", rate, WAKE_SECONDS, note)

    def _train(self) -> Iterator[Part]:
        config, tokens = self.config, self.lengths
        rate = self._num_gpus * RATES[config.cluster.gpu].flops * MFU

        def flops(name: str, passes: float, prompt: float, model: PlannedModel = self._student) -> Part:
            length = prompt + tokens.response
            work = passes * self._responses * self._forward_flops(model, length)
            note = f"{passes:.3g} x {self._responses} contexts of {length:.0f} tokens"
            return Part("train", name, work, "FLOP", rate, note=note)

        parts = [flops("student", 1 + backward_passes(config), tokens.student_prompt)]
        parts += [flops(name, passes, tokens.teacher_prompt, model) for name, (passes, model) in self._taught.items()]
        if config.is_anchored:
            parts.append(flops("reference", 1, tokens.student_prompt))
        parts.append(self._output_layer(rate))
        if swapped := resting_teacher_bytes(config, self._fullest):
            beside = self._fetched_bytes(swapped, parts[0].seconds)
            note = f"{len(swapped)} teachers from host memory; {beside / 1e9:.3g} GB more beside the student's passes"
            work = sum(swapped.values()) - beside
            parts.append(Part("train", "teachers' weights", work, "B", HOST_LINK, note=note))
        yield from parts
        if self.bubble:
            waited = sum(part.seconds for part in parts) * self.bubble / (1 - self.bubble)
            yield Part("train", "pipeline bubble", 0.0, "B", 1.0, waited, f"{self.bubble:.1%} of the step's training")
        exchanged = 4 if config.optimizer.use_distributed_optimizer else 8  # an all-reduce also gathers the sums
        yield from self._over_replicas("train", "gradients over replicas", exchanged)

    def _fetched_bytes(self, swapped: Mapping[str, float], seconds: float) -> float:
        """Return the bytes of ``swapped`` that are copied beside the student's passes, which take ``seconds``.

        They are the layers of full weights, without embedding and output layer; within a product, those of one teacher.
        """
        stage, config = self._fullest, self.config
        if config.teacher.offload == "cpu":
            return 0.0
        own, layers = element_size(config) / config.parallel.tensor_model_parallel_size, []
        for name in swapped.keys() - stage.teacher_parameters.keys():
            model = self.teachers.get(name, self._student)
            tied = model.model.share_embeddings_and_output_weights
            tables = 1 if tied else stage.embeds + stage.projects
            layers.append(max(0.0, swapped[name] - tables * self._projection(model) * own))
        fetched = sum(layers) / (len(layers) if layers and joins(config.teachers) else 1)
        return min(fetched, seconds * HOST_LINK)

    @property
    def _student(self) -> PlannedModel:
        return PlannedModel(self.config.model, self.transformer, self.stages)

    @cached_property
    def _taught(self) -> dict[str, tuple[float, PlannedModel]]:
        """The part of the step that each architecture of teachers takes -> its passes over the responses, and a model.

        Each of several teachers reads an equal share of the responses, and each teacher of a product reads all.
        """
        config, names = self.config, list(self.config.named_teachers)
        each = 1.0 if joins(config.teachers) or not names else 1.0 / len(names)
        own = (len(names) - len(self.teachers)) * each if names else 1.0
        found = {"teacher": (own, self._student)} if config.has_teacher and own else {}
        return found | {f"teacher {name}": (each, model) for name, model in self.teachers.items()}

    def _forward_flops(self, model: PlannedModel, length: float) -> float:
        """Return the FLOP of all layers for one sequence of ``length`` tokens; attention is causal."""
        config = model.transformer
        width = config.kv_channels * 2
        if getattr(config, "multi_latent_attention", False):
            width = config.qk_head_dim + config.qk_pos_emb_head_dim + config.v_head_dim
        tables = 1 if model.model.share_embeddings_and_output_weights else 2
        parameters = active_parameters(config, model.stages) - tables * self._projection(model)
        attention = float(config.num_layers * config.num_attention_heads * width)
        return 2.0 * parameters * length + attention * length**2

    def _projection(self, model: PlannedModel) -> float:
        """Return the parameters of the output layer, padding included."""
        return float(model.transformer.hidden_size) * self.load.vocab_size

    def _output_layer(self, rate: float) -> Part:
        """Return the projections: forward, and backward of hidden states and, except beside adapters, of the weight.

        Teacher and reference are projected once as a mix, or once each where their weights differ; the match with the
        reference's entropy projects the reference once more.  A projection of another width counts by its width.
        """
        config, own = self.config, self._projection(self._student)
        passes = 1.0 + (1 if config.adapter.rank else 2)
        passes += sum(share * self._projection(model) / own for share, model in self._taught.values())
        if config.is_anchored:
            passes += config.projects_reference + Target.configured(config.target, None).needs_reference_entropy
        positions = self._responses * self.lengths.response
        note = f"{passes:.3g} x {positions:.0f} positions"
        return Part("train", "output layer", passes * positions * 2 * own, "FLOP", rate, note=note)

    def _optimizer(self) -> Iterator[Part]:
        stage = self._fullest
        state = 2 * parameter_bytes(self.config, stage)["optimizer"]
        yield Part(
            "optimizer", "state", state, "B", RATES[self.config.cluster.gpu].copied, note="each value read and written"
        )
        if self.config.optimizer.use_distributed_optimizer:
            yield from self._over_replicas("optimizer", "weights over replicas", element_size(self.config))

    @property
    def _fullest(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.parameters)

    def _over_replicas(self, phase: str, name: str, bytes_each: float) -> Iterator[Part]:
        """Yield the exchange of ``bytes_each`` per trained parameter between replicas; nothing where there is one."""
        stage, p = self._fullest, self.config.parallel
        dense, experts = stage.dense_parameters, stage.expert_parameters
        if self.config.adapter.rank:
            dense, experts = stage.adapter_parameters, 0
        sharers = ((dense, stage.dp_cp_size), (experts, stage.expert_dp_size))
        sent = sum(parameters * (size - 1) / size for parameters, size in sharers)
        if sent:
            rate = self._link(stage.dp_cp_size * p.tensor_model_parallel_size)
            note = f"{bytes_each:g} bytes per parameter, {stage.dp_cp_size} ranks"
            yield Part(phase, name, bytes_each * sent, "B", rate, note=note)
