# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Teacher and student microbatches through one pipeline-parallel ``forward_backward`` call of Megatron's own schedules.

A teacher microbatch runs under ``no_grad`` and keeps no activations; `GradientBridge` returns a zero gradient for it,
so that the schedule's sends and receives match.  On the last stage the teacher leaves its final hidden states at
response positions in a `TeacherHiddenStates`.  With a target that is anchored to a reference, there are also reference
microbatches: the student's contexts through the reference's weights, whose states are mixed with the teacher's or kept
beside them.  When the student's microbatch arrives, the states of all models are projected to logits, and the loss is
computed; a fused output layer does both in one piece (model/forward.py).
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from megatron_selfdistill.data.packed_batch import PackedBatch
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.distributed.signs_of_life import beat
from megatron_selfdistill.loss.sharded.anchor_share import share_anchor
from megatron_selfdistill.loss.sharded.subtracted_controls import subtract_controls
from megatron_selfdistill.loss.sharded.vocab_parallel import TokenOptions, TokenStats, VocabShard, chosen, vocab_entropy
from megatron_selfdistill.loss.target import Target, unit_mix
from megatron_selfdistill.loss.weighting import Coefficients
from megatron_selfdistill.model.forward import (
    ModelInputs,
    hidden_states,
    nonlinear,
    project,
    states_at,
    unwrapped,
    uses_local_attention,
)
from megatron_selfdistill.model.fused_loss import FusedLoss
from megatron_selfdistill.pipeline.batch import DeviceBatch, StudentMicrobatch, TeacherMicrobatch
from megatron_selfdistill.pipeline.joined_batches import gradients_of
from megatron_selfdistill.pipeline.partial_batches import Accumulated, PartialBatch
from megatron_selfdistill.pipeline.token_losses import StepOutput, TokenCoefficients, TokenLoss
from megatron_selfdistill.pipeline.token_measures import MeasuringObserver, OwnStates, TokenMeasurement, TokenMeasures

CONTROL_ROWS = 2048
"""The largest number of rows of the controls' logits that exist at a time where the loss takes all logits at once."""


@dataclass(frozen=True)
class KeptStates:
    """The states of the R response tokens of one student microbatch, ``[R, h / tp]`` each, on the device."""

    teacher: Tensor | None = None
    """The teacher's own states; None without a teacher, and where only the mix is needed."""
    reference: Tensor | None = None
    """The reference's states, where teacher and reference are projected apart, and where they are wanted anyway."""
    mix: Tensor | None = None
    """The states (w h_t + h_r) / (1 + w) of the mix, where one projection serves teacher and reference."""
    reference_entropy: Tensor | None = None
    """The reference's entropy [R] in nats, float64, where the target matches it."""
    controls: Tensor | None = None
    """The states of the teacher after the prompts of the K controls, [K, R, h / tp]; None without controls."""

    @property
    def of_teacher_logits(self) -> Tensor | None:
        """The states whose projection the loss takes as the teacher's logits: the mix, or else the teacher's own."""
        return self.teacher if self.mix is None else self.mix

    @property
    def unmixed_reference(self) -> Tensor | None:
        """The reference's states, whose projection is mixed into the teacher's logits; None if the mix holds them."""
        return self.reference if self.mix is None else None


class TeacherHiddenStates:
    """The teacher's final hidden states at response positions: ``[R_j, h / tp]`` for each student microbatch j.

    The states of a student microbatch belong to the response tokens that this context-parallel rank's student holds, in
    the student's order; each tensor-parallel rank keeps a slice of the width, so that any choice of states is the same
    choice on all tensor-parallel ranks.  States beyond ``store_bytes`` rest in pinned host memory; neither direction
    waits for the device.

    With a reference, `add_reference` keeps the reference's states h_r beside the teacher's h_t.  Where both share one
    linear output layer, it replaces both by (w h_t + h_r) / (1 + w), whose projection is (w t + r) / (1 + w).

    Collectives, per teacher microbatch under context parallelism: one all-to-all that sends each state to the rank
    whose student holds the same response token.  No autograd.
    """

    def __init__(self, batch: DeviceBatch, grid: RankGrid, hidden_size: int, store_bytes: float) -> None:
        self.batch, self.grid, self.store_bytes = batch, grid, store_bytes
        self.width = hidden_size // grid.tp_size
        self.parts: list[dict[str, list[_Part]]] = [defaultdict(list) for _ in batch.num_states]
        """The parts of every student microbatch by reading (`_reading`), or field of `KeptStates`, of the states."""
        self.reference_entropies: dict[int, Tensor] = {}
        self.bytes_on_device = 0

    def put(self, index: int, hidden: Tensor) -> None:
        """Keep the response positions of teacher microbatch ``index``; ``hidden [s / cp (/ tp), 1, h]``."""
        microbatch = self.batch.teacher[index]
        states = self._slice(states_at(hidden, microbatch.positions.in_sequence, self.grid))
        if self.grid.cp_size > 1:
            states = self._exchange(microbatch, states)
        for route in microbatch.routes:
            chosen = states if route.chosen is None else states.index_select(0, route.chosen)
            self._keep(route.student_index, _reading(route.reading), chosen, route.place)

    def add_reference(
        self, index: int, states: Tensor, entropy: Tensor | None, *, mix_weight: float | None, keeps_both: bool = False
    ) -> None:
        """Keep the reference's ``states [R, 1, h]`` and ``entropy [R]`` of student microbatch ``index``.

        ``states`` are those of the teacher's response tokens, equal on all tensor-parallel ranks.  ``mix_weight``: the
        teacher's weight w, with which the states of the mix, rounded once to their dtype, take the place of both
        models' states, unless ``keeps_both``.  None keeps both models' states.
        """
        theirs = self._slice(states)
        if entropy is not None:
            self.reference_entropies[index] = entropy
        if mix_weight is None or keeps_both:
            self._keep(index, "reference", theirs)
        if mix_weight is None:
            return
        teacher = self.take_field(index, "teacher", theirs.dtype)
        self._keep(index, "mix", unit_mix(theirs, teacher, mix_weight).to(theirs.dtype))
        if keeps_both:
            self._keep(index, "teacher", teacher)

    def take(self, index: int, dtype: torch.dtype) -> KeptStates:
        """Return all states of student microbatch ``index``, and forget them.

        Raises: RuntimeError where a teacher microbatch with some of its response tokens has not run.
        """
        of_controls = [_reading(k) for k in range(1, 1 + self.batch.num_controls)]
        controls = [self.take_field(index, name, dtype) for name in of_controls]
        kept = set(self.parts[index])
        return KeptStates(
            **{name: self.take_field(index, name, dtype) for name in (kept if "mix" in kept else kept | {"teacher"})},
            reference_entropy=self.reference_entropies.pop(index, None),
            controls=torch.stack(controls) if controls else None,
        )

    def take_field(self, index: int, name: str, dtype: torch.dtype) -> Tensor:
        """Return the states ``[R, h / tp]`` of one field of `KeptStates` of a student microbatch, and forget them."""
        size, parts = self.batch.num_states[index], self.parts[index].pop(name, [])
        self.bytes_on_device -= sum(part.states.nbytes for part in parts if part.on_device)
        if sum(len(part.states) for part in parts) != size:
            raise RuntimeError(f"student microbatch {index} came before the {name}'s microbatches with its responses")
        loaded = [(part.states.to(self.grid.device, non_blocking=True), part.place) for part in parts]
        if len(loaded) == 1 and loaded[0][1] is None:
            return loaded[0][0]
        block = torch.empty(size, self.width, dtype=dtype, device=self.grid.device)
        for states, place in loaded:
            assert place is not None, "a part that is everything is the only one"
            block.index_copy_(0, place, states)
        return block

    def at_full_width(self, block: Tensor) -> Tensor:
        """Return the states ``[R, 1, h]`` of which every tensor-parallel rank holds a slice ``block [R, h / tp]``."""
        states: Tensor = gather_from_tensor_model_parallel_region(block, group=self.grid.tp_group)
        return states.unsqueeze(1)

    def _slice(self, states: Tensor) -> Tensor:
        """Return this rank's slice ``[R, h / tp]`` of the width of ``states [R, 1, h]``."""
        return states.squeeze(1).narrow(1, self.grid.tp_rank * self.width, self.width).contiguous()

    def _keep(self, index: int, name: str, states: Tensor, place: Tensor | None = None) -> None:
        on_device = self.bytes_on_device + states.nbytes <= self.store_bytes
        if on_device:
            self.bytes_on_device += states.nbytes
        else:
            on_host = torch.empty(states.shape, dtype=states.dtype, device="cpu", pin_memory=True)
            states = on_host.copy_(states, non_blocking=True)
        self.parts[index][name].append(_Part(states, place, on_device))

    def _exchange(self, microbatch: TeacherMicrobatch, states: Tensor) -> Tensor:
        received = states.new_empty(sum(microbatch.receive_counts), states.size(1))
        assert microbatch.send_order is not None
        dist.all_to_all_single(
            received,
            states.index_select(0, microbatch.send_order),
            microbatch.receive_counts,
            microbatch.send_counts,
            group=self.grid.cp_group,
        )
        return received


def _reading(number: int) -> str:
    """Return the name of a reading of the teacher, after its own prompt or after those of control ``number``."""
    return "teacher" if number == 0 else f"control {number}"


class _Part(NamedTuple):
    """The states [n, h / tp] of some or all of a student microbatch's R tokens."""

    states: Tensor
    place: Tensor | None
    """The places [n] among the R; None for all in order."""
    on_device: bool


class StepTeacher(Protocol):
    """The protocol of the teacher of one call of the schedule, on one rank."""

    @property
    def chunks(self) -> Sequence[torch.nn.Module]:
        """The chunks that run the teacher's microbatches, cut like the student's; empty if it has read before."""

    @property
    def output(self) -> GPTModel | Tensor:
        """The model whose output layer projects the teacher's states, or the output weight, on the last stage."""

    def states(self, batch: DeviceBatch, grid: RankGrid, hidden_size: int, store_bytes: float) -> TeacherHiddenStates:
        """Return the place of the teacher's states at the response tokens of ``batch``."""

    def token_weights(self, response_ids: Tensor) -> Tensor | None:
        """Return the weight w [R] float64 of each of these tokens; None if all have the weight of the target."""

    def after_last_pass(self) -> None:
        """Note that the layers have made their last forward pass of the call; the output layer is still needed."""


@dataclass(frozen=True)
class ScheduledTeacher:
    """A teacher whose microbatches are in the same schedule as those of the student."""

    chunks: Sequence[torch.nn.Module]
    """The teacher's chunks on this rank, cut like the student's; the student's own if the current weights teach."""
    fetch_next: Callable[[], None] | None = None
    """The function that is called once the layers have made their last forward pass; None calls nothing."""

    @property
    def output(self) -> GPTModel:
        """The model whose output layer projects the teacher's states, on the last stage."""
        return unwrapped(self.chunks[-1])

    def states(self, batch: DeviceBatch, grid: RankGrid, hidden_size: int, store_bytes: float) -> TeacherHiddenStates:
        """Return an empty place for the teacher's states."""
        return TeacherHiddenStates(batch, grid, hidden_size, store_bytes)

    def token_weights(self, response_ids: Tensor) -> None:
        """Return None: all tokens have the weight of the target."""

    def after_last_pass(self) -> None:
        """Call ``fetch_next``."""
        if self.fetch_next is not None:
            self.fetch_next()


@dataclass(frozen=True)
class Reference:
    """The frozen model on the student's contexts, and its part of a target whose anchor it is, or has a share of it."""

    target: Target
    """The target, which has a reference."""
    chunks: Sequence[torch.nn.Module]
    """The reference's chunks on this rank, cut like the student's; the teacher's own where one copy serves as both."""
    chunk_tokens: int = 4096
    """The number of tokens whose logits of the reference exist at a time."""
    backend: str | None = None
    """As for `distillation_loss`."""

    @property
    def needs_entropy(self) -> bool:
        """Whether the target matches the entropy of the reference alone."""
        return self.target.needs_reference_entropy and self.target.is_anchored

    @property
    def last(self) -> GPTModel:
        """The model whose output layer projects the reference's states, on the last stage."""
        return unwrapped(self.chunks[-1])

    def mixes_states(self, teacher: GPTModel | Tensor) -> bool:
        """Return whether one projection of mixed hidden states gives the mix of both models' logits.

        It does where teacher and reference have the same output layer, this layer is linear, there are no controls, and
        the student is no part of the anchor.
        """
        shares = self.target.num_controls or self.target.reference_share
        return teacher is self.last and nonlinear(self.last) is None and not shares

    @torch.no_grad()
    def entropy(self, states: Tensor, vocab: VocabShard) -> Tensor:
        """Return the reference's entropy [R], in nats and float64, at its ``states [R, 1, h]``.

        Collectives: those of `vocab_entropy` per ``chunk_tokens`` tokens.
        """
        chunks = states.split(self.chunk_tokens)
        return torch.cat([vocab_entropy(project(self.last, chunk), vocab, backend=self.backend) for chunk in chunks])

    @torch.no_grad()
    def mix_into(self, teacher_logits: Tensor, states: Tensor, teacher_weights: Tensor | None = None) -> None:
        """Replace the teacher's logits t [R, v / tp] by (w t + r) / (1 + w), computed in float32 and rounded once.

        With controls the logits are t - c, and the result is w (t - c) + r.
        ``states [R, 1, h]``: the reference's states, which are projected to r ``chunk_tokens`` tokens at a time.
        ``teacher_weights [R]``: the w of each token; None is the target's.
        """
        for start in range(0, len(states), self.chunk_tokens):
            chunk = slice(start, start + self.chunk_tokens)
            weight = self.target.teacher_weight if teacher_weights is None else teacher_weights[chunk]
            # No name keeps the logits of one chunk while the next one is projected.
            anchor, is_contrast = project(self.last, states[chunk]).float(), self.target.num_controls > 0
            teacher_logits[chunk] = unit_mix(anchor, teacher_logits[chunk], weight, is_contrast=is_contrast)


class StepOptions(TypedDict, total=False):
    """The arguments of `run` in which steps differ."""

    reference: Reference | None
    measurement: TokenMeasurement | None
    token_coefficients: TokenCoefficients | None
    partial_batch: PartialBatch | None
    forward_only: bool


class NoResponseTokens(RuntimeError):
    """The global batch has no response token, so there is nothing to train on."""


def run(
    student: Sequence[torch.nn.Module],
    teacher: StepTeacher | None,
    batch: PackedBatch,
    token_loss: TokenLoss | FusedLoss,
    grid: RankGrid,
    vocab: VocabShard,
    *,
    reference: Reference | None = None,
    measurement: TokenMeasurement | None = None,
    token_coefficients: TokenCoefficients | None = None,
    teacher_store_bytes: float = float("inf"),
    forward_only: bool = False,
    partial_batch: PartialBatch | None = None,
    backend: str | None = None,
) -> StepOutput:
    """Run one forward and backward pass of the global batch; leave gradients in ``main_grad``, reduced and finalised.

    The gradient is that of ``sum(w * loss - a * student_log_prob) / N`` over the response tokens, with N the response
    tokens of the global batch, in every layout.  ``token_coefficients`` gives w and a, which are constants; without
    ``token_coefficients`` w is 1 and a is 0.  Coefficients without a policy term cost nothing in the loss.

    ``student``: this rank's chunks (DDP).  ``teacher``: None for a loss without a teacher, which ignores
    ``batch.teacher``.  ``reference``: with a target whose anchor has a reference, whose chunks run each student
    microbatch, too, without gradients.  ``measurement``: what the step measures beside its loss.  All ranks of a
    replica hold the same ``batch``; all replicas have the same number of microbatches and ``seq_length``.
    ``partial_batch``: the place of ``batch`` in a step of several partial batches (pipeline/partial_batches.py): only
    the last one reduces and finalises the gradients, and N counts the tokens of all; None is a step of one.
    ``backend``: as for `distillation_loss`, for the subtraction of controls.

    Collectives: one all-reduce of N over data-parallel ranks, then the collectives of the schedule and of the loss.
    Raises: ValueError for a policy term of a token loss whose ``student_log_prob`` has no gradient; `NoResponseTokens`
    on all ranks where N is 0, and in a partial batch without tokens that the step does not end with.
    """
    partial_batch = partial_batch or PartialBatch()
    num_response_tokens, num_weighted = _global_counts(batch, grid)
    accumulated = partial_batch.accumulated(num_response_tokens, num_weighted)
    if accumulated.num_response_tokens == 0 or (num_response_tokens == 0 and not partial_batch.is_last):
        raise NoResponseTokens("the global batch has no response tokens: every context was dropped or empty")
    reads = teacher is not None and bool(teacher.chunks)
    order = _order(batch, with_teacher=reads, with_reference=reference is not None)
    on_device = DeviceBatch.of(batch, grid, with_teacher=reads, local_attention=uses_local_attention(student))
    hidden_size = unwrapped(student[0]).config.hidden_size
    step = ScheduledStep(
        student=list(student),
        teacher=teacher,
        batch=on_device,
        token_loss=token_loss,
        reference=reference,
        measurement=measurement,
        token_coefficients=token_coefficients,
        grid=grid,
        vocab=vocab,
        loss_scale=len(order) * grid.dp_size / accumulated.divisor,
        states=None if teacher is None else teacher.states(on_device, grid, hidden_size, teacher_store_bytes),
        backend=backend,
    )
    # In a step of one partial batch this is len(order) * dp_size / num_weighted: each weighted microbatch counts alike.
    weighted = accumulated.first_microbatches * accumulated.divisor
    router_factor = len(order) * grid.dp_size * accumulated.first_tokens / weighted
    with contextlib.ExitStack() as stack:
        stack.enter_context(router_losses_per_weighted_microbatch(student, router_factor))
        if not (forward_only or partial_batch.is_whole):
            stack.enter_context(gradients_of(partial_batch, accumulated, student))
        step.run(order, batch.seq_length, forward_only)
    return step.collected(num_response_tokens, accumulated)


def _global_counts(batch: PackedBatch, grid: RankGrid) -> tuple[int, int]:
    """Return the response tokens and the student's microbatches with a weight in the global batch; one all-reduce."""
    num_weighted = sum(microbatch.num_sequences > 0 for microbatch in batch.student)
    totals = torch.tensor([len(batch.response_tokens), num_weighted], device=grid.device)
    dist.all_reduce(totals, group=grid.dp_group)
    num_response_tokens, num_weighted = totals.tolist()
    return num_response_tokens, num_weighted


def _counted(order: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Yield the microbatches of ``order``, each of which is a sign of progress when it begins."""
    for number, microbatch in enumerate(order, 1):
        beat(number, len(order))
        yield microbatch


def _order(batch: PackedBatch, *, with_teacher: bool, with_reference: bool) -> list[tuple[str, int]]:
    students = [("student", i) for i in range(len(batch.student))]
    if not with_teacher and not with_reference:
        return students
    teachers = [("teacher", i) for i in range(len(batch.teacher))] if with_teacher else []
    references = [("reference", i) for i in range(len(batch.student))] if with_reference else []
    if not batch.paired:
        return teachers + references + students
    readings = 1 + batch.num_controls
    of_each = [*([teachers[k::readings] for k in range(readings)] if teachers else []), references, students]
    return [item for items in zip(*filter(None, of_each), strict=True) for item in items]


@dataclass
class ScheduledStep:
    """The forward step of one call of the schedule, and the results that its last stage collects."""

    student: list[torch.nn.Module]
    teacher: StepTeacher | None
    batch: DeviceBatch
    token_loss: TokenLoss | FusedLoss
    reference: Reference | None
    measurement: TokenMeasurement | None
    token_coefficients: TokenCoefficients | None
    grid: RankGrid
    vocab: VocabShard
    loss_scale: float
    states: TeacherHiddenStates | None
    """The states of teacher and reference at the response tokens; None without a teacher."""
    backend: str | None = None
    ids: list[Tensor] = field(default_factory=list)
    stats: list[TokenStats] = field(default_factory=list)
    coefficients: list[Coefficients] = field(default_factory=list)
    measures: list[TokenMeasures] = field(default_factory=list)

    def run(self, order: Sequence[tuple[str, int]], seq_length: int, forward_only: bool) -> None:
        """Run the microbatches of ``order``, each a role and an index, through Megatron's schedule.

        ``seq_length``: the tokens of a microbatch.
        """
        chunks, iterators = self.student, [_counted(order) for _ in self.student]
        with torch.set_grad_enabled(not forward_only):
            get_forward_backward_func()(
                forward_step_func=self.forward,
                data_iterator=iterators if len(chunks) > 1 else iterators[0],
                model=chunks if len(chunks) > 1 else chunks[0],
                num_microbatches=len(order),
                seq_length=seq_length,
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def forward(self, iterator: Iterator[tuple[str, int]], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        """Run the next microbatch through ``chunk``; return its output and the function that computes its loss."""
        role, index = next(iterator)
        if role == "student":
            return self._student(index, chunk)
        return self._teacher(index, chunk) if role == "teacher" else self._reference(index, chunk)

    def _student(self, index: int, chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        model = unwrapped(chunk)
        microbatch = self.batch.student[index]
        hidden = hidden_states(chunk, microbatch.inputs, self.grid)

        def loss_func(hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            stats = self._stats(index, model, hidden, microbatch)
            losses = stats.loss
            if self.token_coefficients is not None:
                log_prob = stats.student_log_prob
                coefficients = self.token_coefficients(log_prob.detach(), microbatch.response_ids)
                if coefficients.policy is not None and torch.is_grad_enabled() and not log_prob.requires_grad:
                    raise ValueError(
                        "token_coefficients has a policy term, whose gradient the token loss does not have"
                    )
                losses = coefficients.token_losses(stats.loss, log_prob)
                self.coefficients.append(coefficients)
            loss = losses.sum() * self.loss_scale
            self.ids.append(microbatch.response_ids)
            self.stats.append(stats.detached())
            return loss, {}

        return hidden, loss_func

    def _stats(self, index: int, model: GPTModel, hidden: Tensor, microbatch: StudentMicrobatch) -> TokenStats:
        """Return the loss of the microbatch's response tokens; ``hidden [s / cp (/ tp), 1, h]``."""
        kept = KeptStates() if self.states is None else self.states.take(index, model.config.params_dtype)
        positions, tokens, measuring = microbatch.positions, microbatch.response_tokens, None
        weights = None if self.teacher is None else self.teacher.token_weights(microbatch.response_ids)
        if self.measurement is not None:
            of_models = self._teacher_logits, self._reference_logits, self._subtract_controls
            own = OwnStates(kept.teacher, kept.reference, kept.controls, *of_models)
            measuring = MeasuringObserver(self.measurement, self.vocab, tokens, own.logits, weights)
        options = TokenOptions(reference_entropy=kept.reference_entropy, teacher_weights=weights, observe=measuring)
        states, apart, controls = kept.of_teacher_logits, kept.unmixed_reference, kept.controls
        share = 0.0 if self.reference is None else self.reference.target.reference_share
        if isinstance(self.token_loss, FusedLoss):
            assert states is not None, "a fused distillation loss has a teacher"
            reference = None if apart is None else (self._reference_model, apart)
            models, place = (model, self._teacher_output), (self.vocab, self.grid)
            stats = self.token_loss(*models, hidden, positions, states, tokens, *place, reference, controls, options)
        else:
            unshared = None if share else apart
            teacher_logits = None if states is None else self._teacher_logits(states, unshared, weights, controls)
            student_logits = project(model, states_at(hidden, positions.in_sequence, self.grid))
            if share:
                assert self.reference is not None and teacher_logits is not None and apart is not None
                states_of_reference, last = self._kept.at_full_width(apart), self.reference.last
                entropy = share_anchor(
                    student_logits,
                    teacher_logits,
                    lambda rows: project(last, states_of_reference[rows]),
                    self.reference.target,
                    self.vocab,
                    backend=self.reference.backend,
                    chunk_tokens=self.reference.chunk_tokens,
                    wants_entropy=self.reference.target.needs_reference_entropy,
                )
                options = replace(options, reference_entropy=entropy)
            stats = self.token_loss(student_logits, teacher_logits, tokens, self.vocab, options)
        if measuring is None:
            return stats
        self.measures.append(TokenMeasures.concatenate(measuring.parts))
        return self.measures[-1].with_teacher(stats)

    @torch.no_grad()
    def _teacher_logits(
        self,
        states: Tensor,
        reference_states: Tensor | None = None,
        teacher_weights: Tensor | None = None,
        controls: Tensor | None = None,
    ) -> Tensor:
        """Return the logits [R, v / tp] of ``states``, those of teacher or mix, with the reference mixed in.

        ``controls``: the states [K, R, h / tp] of the controls, whose c is subtracted first.
        """
        logits = self._projected(states)
        if controls is not None:
            self._subtract_controls(logits, controls)
        if reference_states is not None:
            assert self.reference is not None
            self.reference.mix_into(logits, self._kept.at_full_width(reference_states), teacher_weights)
        return logits

    def _subtract_controls(self, logits: Tensor, controls: Tensor) -> None:
        """Replace the teacher's ``logits [R, v / tp]`` by t - c; ``controls``: the states [K, R, h / tp]."""
        subtract_controls(
            logits,
            lambda rows: self._projected(controls[:, rows].flatten(0, 1)).view(len(controls), -1, logits.size(1)),
            logits.new_empty(len(controls), len(logits), dtype=torch.float32),
            vocab=self.vocab,
            backend=chosen(self.backend, logits, logits),
            chunk_tokens=CONTROL_ROWS,
        )

    def _projected(self, states: Tensor) -> Tensor:
        """Return the teacher's logits [R, v / tp] of its ``states [R, h / tp]``."""
        teacher, full = self._teacher_output, self._kept.at_full_width(states)
        return full.squeeze(1) @ teacher.t() if isinstance(teacher, Tensor) else project(teacher, full)

    def _reference_logits(self, states: Tensor) -> Tensor:
        return project(self._reference_model, self._kept.at_full_width(states))

    @property
    def _teacher_output(self) -> GPTModel | Tensor:
        assert self.teacher is not None, "only a step with a teacher projects the teacher's states"
        return self.teacher.output

    @property
    def _reference_model(self) -> GPTModel:
        assert self.reference is not None, "only a step with a reference keeps the reference's states"
        return self.reference.last

    @property
    def _kept(self) -> TeacherHiddenStates:
        assert self.states is not None, "only a step with a teacher has teacher and reference microbatches"
        return self.states

    def _teacher(self, index: int, chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        assert self.teacher is not None
        inputs, chunks = self.batch.teacher[index].inputs, self.teacher.chunks
        result = self._without_gradient(chunks, inputs, chunk, lambda hidden: self._kept.put(index, hidden))
        # Every schedule runs the last microbatch of a rank's last chunk after all others of the same role.
        if chunk is self.student[-1] and index == len(self.batch.teacher) - 1:
            self.teacher.after_last_pass()
        return result

    def _reference(self, index: int, chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        microbatch, reference = self.batch.student[index], self.reference
        assert reference is not None

        def keep(hidden: Tensor) -> None:
            states = states_at(hidden, microbatch.positions.in_sequence, self.grid)
            self._kept.add_reference(
                index,
                states,
                reference.entropy(states, self.vocab) if reference.needs_entropy else None,
                mix_weight=reference.target.teacher_weight if reference.mixes_states(self._teacher_output) else None,
                keeps_both=self.measurement is not None,
            )

        return self._without_gradient(reference.chunks, microbatch.inputs, chunk, keep)

    def _without_gradient(
        self,
        frozen: Sequence[torch.nn.Module],
        inputs: ModelInputs,
        chunk: torch.nn.Module,
        keep: Callable[[Tensor], None],
    ) -> tuple[Tensor, Any]:
        """Run the chunk of ``frozen`` in the student's place; on the last stage ``keep`` receives the final states."""
        model = unwrapped(chunk)
        # The schedule gave the received activations to the student's chunk; the other chunk reads the same tensor.
        input_tensor = None if model.pre_process else model.decoder.input_tensor
        edge = torch.zeros((), device=self.grid.device) if input_tensor is None else input_tensor
        if torch.is_grad_enabled():
            edge.requires_grad_(True)
        runs = frozen[self.student.index(chunk)]
        if runs is not chunk and input_tensor is not None:
            unwrapped(runs).set_input_tensor(input_tensor)
        with torch.no_grad():
            hidden = hidden_states(runs, inputs, self.grid)
        if not model.post_process:
            return GradientBridge.apply(hidden, edge), None  # type: ignore[no-untyped-call]

        def loss_func(hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            keep(hidden)
            return GradientBridge.apply(torch.zeros((), device=self.grid.device), edge), {}  # type: ignore[no-untyped-call]

        return hidden, loss_func

    def collected(self, num_response_tokens: int, accumulated: Accumulated) -> StepOutput:
        """Return the results of all student microbatches of this rank."""
        if not self.stats:
            none = torch.empty(0, dtype=torch.int64, device=self.grid.device)
            return StepOutput(num_response_tokens, none, None, accumulated=accumulated)
        stats = TokenStats.concatenate(self.stats)
        measures = TokenMeasures.concatenate(self.measures) if self.measures else None
        reads_teacher = self.reference is None and not self.batch.num_controls  # as `Target.reads_teacher`
        anchor_entropy: Tensor | None = stats.wanted_entropy
        if self.reference is not None and not self.reference.target.needs_reference_entropy:
            anchor_entropy = None if measures is None else measures.anchor_entropy
        return StepOutput(
            num_response_tokens=num_response_tokens,
            response_ids=torch.cat(self.ids),
            stats=stats,
            coefficients=Coefficients.concatenate(self.coefficients) if self.coefficients else None,
            measures_teacher=reads_teacher or (measures is not None and measures.has_teacher),
            measures=measures,
            anchor_entropy=anchor_entropy,
            accumulated=accumulated,
        )


class GradientBridge(torch.autograd.Function):
    """A value computed under ``no_grad``, with an autograd edge to ``edge`` that carries a zero gradient.

    Autograd, and so the schedule, treats a teacher microbatch like any other.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, edge: Tensor) -> Tensor:
        """Return ``value``."""
        ctx.edge = edge.shape, edge.dtype, edge.device
        return value.detach()  # it has no `_base`, so the schedule may deallocate it

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        """Return no gradient for the value, and zeros for the edge."""
        shape, dtype, device = ctx.edge
        return None, torch.zeros(shape, dtype=dtype, device=device)


@contextlib.contextmanager
def router_losses_per_weighted_microbatch(chunks: Sequence[torch.nn.Module], factor: float) -> Iterator[None]:
    """Raise the coefficients of router losses, so that each is the mean over the weighted student microbatches.

    Megatron divides router losses by all microbatches and data-parallel ranks.  Teacher microbatches have no router
    losses (no gradient), and weightless microbatches should have none.
    """
    configs = {id(c): c for c in (unwrapped(chunk).config for chunk in chunks)}.values()
    before = [(c, c.moe_aux_loss_coeff, c.moe_z_loss_coeff) for c in configs]
    for config, aux, z in before:
        config.moe_aux_loss_coeff = [a * factor for a in aux] if isinstance(aux, list) else aux and aux * factor
        config.moe_z_loss_coeff = z and z * factor
    try:
        yield
    finally:
        for config, aux, z in before:
            config.moe_aux_loss_coeff, config.moe_z_loss_coeff = aux, z
