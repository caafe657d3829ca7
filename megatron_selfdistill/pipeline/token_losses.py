# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The losses of response tokens that a step trains on, further measures of these tokens, and the results of a step.

A loss is that of self-distillation, or of the next token for the baselines.

Only some steps take a `TokenMeasurement`.  Its numbers come from the logits that the loss reads, a few tokens at a
time, between its forward pass and its gradient.  With a reference these are the logits of the student and of the mix,
so the states of teacher and reference are projected, too.  The loss and its gradient do not change.

The partial batches of a step are several calls of the schedule, whose gradients add up to those of one call.  The
weights change only after the last partial batch, so a response may be trained on while others are still being
generated.  The loss of a step is a sum over response tokens, divided by their number N, which is known once the last
partial batch begins.  Earlier partial batches divide by an estimate N' and leave their gradients on the rank that
computed them; before the last partial batch begins, these gradients are multiplied by N' / N.  The last partial batch
divides by N, and Megatron Core then reduces and finalises all gradients at once, as in a step of one partial batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_selfdistill.loss.sharded.logit_summary import LogitSummary, summarise_logits
from megatron_selfdistill.loss.sharded.vocab_parallel import (
    NO_OPTIONS,
    TokenOptions,
    TokenStats,
    VocabShard,
    distillation_loss,
    solve_target,
    target_measures,
    vocab_entropy,
)
from megatron_selfdistill.loss.target import Divergence, Target, split_divergence
from megatron_selfdistill.loss.weighting import Coefficients
from megatron_selfdistill.model.forward import FusedLoss, Fusion, unwrapped
from megatron_selfdistill.pipeline.batch import StudentMicrobatch

CHUNK_TOKENS = 512
"""The largest number of tokens whose logits of teacher and reference exist at a time, besides those of the loss."""
_OF_TEACHER = ("teacher_entropy", "teacher_log_prob", "top1_agreement")


class OwnLogits(NamedTuple):
    """The logits of the models that a target with a reference mixes, ``[n, v / tp]`` each; None is not measured."""

    teacher: Tensor | None = None
    reference: Tensor | None = None


@dataclass(frozen=True)
class TokenMeasures:
    """The measures of R response tokens, [R] each if not stated, equal on all tensor-parallel ranks."""

    mass_on_rare_student: Tensor
    """The target's mass on tokens that are rare for the student, see `TargetMeasures`; float64."""
    mass_on_rare_reference: Tensor | None = None
    """The same for the reference; None without a reference."""
    kl_to_anchor: Tensor | None = None
    """KL(q || a) and KL(t || a) of target q, teacher t and anchor a, [R, 2] float64, see `TargetMeasures`; None where
    the teacher is not measured."""
    kl_of_others: Tensor | None = None
    """KL(q || a) in nats of each of `TokenMeasurement.other_targets`, [R, targets] float64; None without any."""
    reference_entropy: Tensor | None = None
    """The entropy of the reference in nats, float64; None without a reference, and where the loss takes it anyway."""
    teacher_entropy: Tensor | None = None
    """The entropy of the teacher in nats; None without a reference, where the loss takes it, and where the step does
    not measure the teacher."""
    teacher_log_prob: Tensor | None = None
    """The teacher's log-prob of the response token in nats; None if ``teacher_entropy`` is None."""
    top1_agreement: Tensor | None = None
    """Whether student and teacher have the same argmax, bool; None if ``teacher_entropy`` is None."""
    summary: LogitSummary | None = None
    """The summaries of the logits of student, teacher and, where there is one, reference; None unless asked for."""

    @classmethod
    def concatenate(cls, parts: Sequence[TokenMeasures]) -> TokenMeasures:
        """Return the measures of the tokens of all parts, at least one, in their order."""
        joined: dict[str, Any] = {}
        for field_name in (f.name for f in fields(cls)):
            values = [getattr(part, field_name) for part in parts]
            join = LogitSummary.concatenate if field_name == "summary" else torch.cat
            joined[field_name] = None if values[0] is None else join(values)
        return cls(**joined)

    @property
    def has_teacher(self) -> bool:
        """Whether the numbers that describe the teacher are measured."""
        return self.teacher_entropy is not None

    def with_teacher(self, stats: TokenStats) -> TokenStats:
        """Return ``stats`` with the numbers that describe the teacher, where they are measured."""
        if not self.has_teacher:
            return stats
        return replace(stats, **{name: getattr(self, name) for name in _OF_TEACHER})


@dataclass(frozen=True)
class TokenMeasurement:
    """The choice of what a step measures."""

    target: Target
    """The target of the step's loss, which has a teacher."""
    chunk_tokens: int = CHUNK_TOKENS
    """The largest number of tokens whose logits of teacher and reference exist at a time."""
    backend: str | None = None
    """The backend that computes the entropy of the reference and the numbers of the teacher."""
    summarises: bool = False
    """Whether the measures include the summaries of the logits."""
    other_targets: Sequence[Target] = ()
    """Targets that are measured beside ``target``; all of them, ``target`` too, mix the teacher with the student."""


@dataclass
class MeasuringObserver:
    """The `Observer` of the loss of R tokens that measures each chunk, a few tokens at a time."""

    measurement: TokenMeasurement
    """The choice of what is measured."""
    vocab: VocabShard
    """The columns of all logits on this rank."""
    response_tokens: Tensor
    """The response tokens [R] int64."""
    own_logits: Callable[[slice], OwnLogits]
    """The function that projects the states of teacher and reference of a slice of the R tokens."""
    teacher_weights: Tensor | None = None
    """The w of each token [R]; None is the target's."""
    parts: list[TokenMeasures] = field(default_factory=list)
    """The measures so far, in the order of the tokens."""

    @torch.no_grad()
    def __call__(self, tokens: slice, student_logits: Tensor, teacher_logits: Tensor, stats: TokenStats) -> None:
        """Measure the tokens of a chunk.

        Collectives over TP, per `TokenMeasurement.chunk_tokens` tokens: those of ``own_logits``, `target_measures`,
        `vocab_entropy`, `distillation_loss` and `summarise_logits`.
        """
        length = max(1, min(self.measurement.chunk_tokens, CHUNK_TOKENS))
        start = tokens.start
        for student, teacher, beta in zip(
            student_logits.split(length), teacher_logits.split(length), stats.beta.split(length), strict=True
        ):
            part = slice(start, start + len(beta))
            self.parts.append(self._measures(part, student, teacher, beta))
            start = part.stop

    def _measures(self, tokens: slice, student_logits: Tensor, teacher_logits: Tensor, beta: Tensor) -> TokenMeasures:
        """Return the measures of a slice of the R tokens."""
        target, backend, own = self.measurement.target, self.measurement.backend, self.own_logits(tokens)
        masses, kl_to_anchor = target_measures(
            student_logits,
            teacher_logits,
            beta,
            target=target,
            vocab=self.vocab,
            reference_logits=own.reference,
            own_teacher_logits=teacher_logits if own.reference is None else own.teacher,
            teacher_weights=None if self.teacher_weights is None else self.teacher_weights[tokens],
        )
        of_reference = entropy = None
        if own.reference is not None:
            of_reference = masses[:, 1]
            if not target.needs_reference_entropy:
                entropy = vocab_entropy(own.reference, self.vocab, backend=backend)
        of_teacher: dict[str, Tensor] = {}
        if own.teacher is not None:
            alone = distillation_loss(
                student_logits,
                own.teacher,
                self.response_tokens[tokens],
                target=Target("teacher_alone", anchor="student"),
                divergence=Divergence(),
                vocab=self.vocab,
                backend=backend,
            )
            of_teacher = {name: getattr(alone, name) for name in _OF_TEACHER}
        models = [student_logits, *((teacher_logits,) if own.reference is None else own)]
        summary = summarise_logits(models, self.vocab) if self.measurement.summarises else None
        others = [self._kl_to_student(it, student_logits, teacher_logits) for it in self.measurement.other_targets]
        return TokenMeasures(
            mass_on_rare_student=masses[:, 0],
            mass_on_rare_reference=of_reference,
            kl_to_anchor=kl_to_anchor,
            kl_of_others=torch.stack(others, 1) if others else None,
            reference_entropy=entropy,
            **of_teacher,
            summary=summary,
        )

    def _kl_to_student(self, target: Target, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return KL(q || p) [n] float64 of a target q that mixes the teacher with the student p."""
        beta = solve_target(student_logits, teacher_logits, target, self.vocab, backend=self.measurement.backend).beta
        found = target_measures(
            student_logits,
            teacher_logits,
            beta,
            target=target,
            vocab=self.vocab,
            own_teacher_logits=teacher_logits,
        )
        assert found.kl_to_anchor is not None, "the teacher's logits are given"
        return found.kl_to_anchor[:, 0]


class TokenLoss(Protocol):
    """The protocol of the losses of response tokens that read logits."""

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor | None,
        response_tokens: Tensor,
        vocab: VocabShard,
        options: TokenOptions = NO_OPTIONS,
        /,
    ) -> TokenStats:
        """Return the statistics of R tokens, whose ``loss`` has a gradient to ``student``.

        ``student``, ``teacher``: logits [R, V / tp]; None without a teacher.  ``response_tokens``: [R] int64.
        """
        ...


TokenCoefficients = Callable[[Tensor, Tensor], Coefficients]
"""(student_log_prob [R], response_ids [R]), both on the device -> the `Coefficients` of a microbatch's tokens.

The log-probs are detached, and the coefficients carry no gradient.

loss/weighting.py has such functions.
"""


@dataclass(frozen=True)
class GuidedTokens:
    """The teacher's weight and the divergence of the tokens of guided problems, where they have their own."""

    teacher_weight: float | None = None
    """w of these tokens, which needs a target that is anchored to a reference; None is the w of the target."""
    divergence: Divergence | None = None
    """The divergence of these tokens; None is the divergence of the loss."""

    def weights(self, microbatch: StudentMicrobatch, teacher_weight: float) -> Tensor | None:
        """Return w [R] float64 of a microbatch's tokens, of which the plain tokens have ``teacher_weight``.

        The result is None if all tokens have the w of the target.
        """
        if self.teacher_weight is None:
            return None
        num_plain = len(microbatch.response_tokens) - microbatch.num_guided
        weights = torch.full_like(microbatch.response_tokens, self.teacher_weight, dtype=torch.float64)
        weights[:num_plain] = teacher_weight
        return weights


def self_distillation(
    target: Target,
    divergence: Divergence,
    backend: str | None = None,
    *,
    fusion: Fusion | None = None,
) -> TokenLoss | FusedLoss:
    """Return the distillation loss with this target and divergence.

    It takes logits (vocab_parallel.py) or, with ``fusion``, hidden states (fused_linear.py).  ``backend``: as for
    `distillation_loss`.
    """
    if fusion is not None:
        return FusedLoss(target, divergence, fusion, backend)
    return self_distillation_of_logits(target, divergence, backend)


def self_distillation_of_logits(target: Target, divergence: Divergence, backend: str | None) -> TokenLoss:
    """Return the distillation loss that takes logits; the arguments are those of `self_distillation`."""

    def loss(
        student: Tensor,
        teacher: Tensor | None,
        response_tokens: Tensor,
        vocab: VocabShard,
        options: TokenOptions = NO_OPTIONS,
    ) -> TokenStats:
        assert teacher is not None
        stats = distillation_loss(
            student,
            teacher,
            response_tokens,
            target=target,
            divergence=split_divergence(divergence, len(response_tokens), options.guided),
            vocab=vocab,
            reference_entropy=options.reference_entropy,
            teacher_weights=options.teacher_weights,
            inplace_backward=True,
            backend=backend,
        )
        if options.observe is not None:
            options.observe(slice(0, len(response_tokens)), student, teacher, stats)
        return stats

    return loss


def next_token(
    student: Tensor,
    teacher: Tensor | None,
    response_tokens: Tensor,
    vocab: VocabShard,
    options: TokenOptions = NO_OPTIONS,
) -> TokenStats:
    """Return -log p(response token) over the valid vocabulary, in nats, by Megatron's vocab-parallel cross entropy.

    ``loss`` and ``student_log_prob``, the same number with the other sign, are differentiable.
    The function overwrites ``student``: the padding becomes -inf, and in float32 the logits become the softmax and then
    the gradient.  In bf16 the softmax and the gradient take the place of a float32 copy
    (`model.forward.next_token_copies`).
    """
    with torch.no_grad():
        student[:, vocab.num_valid :] = float("-inf")
    loss = vocab_parallel_cross_entropy(student.float().unsqueeze(1), response_tokens.unsqueeze(1)).squeeze(1)
    unknown = torch.full_like(loss.detach(), float("nan"))
    values = {f.name: unknown for f in fields(TokenStats)}
    values |= {"loss": loss, "student_log_prob": -loss, "status": torch.zeros_like(response_tokens)}
    values |= {"grid_betas": unknown[:0], "grid_entropies": unknown.new_empty(len(loss), 0)}
    return TokenStats(**values)


@dataclass(frozen=True)
class Accumulated:
    """The gradients in ``main_grad`` that the partial batches of a step have left so far; equal on all ranks."""

    num_response_tokens: int
    """Number of response tokens of these partial batches, over the global batch."""
    divisor: int
    """Number N' by which the sum of their losses is divided."""
    first_tokens: int
    """Number of response tokens of the first partial batch, over the global batch."""
    first_microbatches: int
    """Number of student microbatches with a response token in the first partial batch, over the global batch."""


@dataclass(frozen=True)
class PartialBatch:
    """The place of a partial batch in its step; the default is a step of one partial batch."""

    earlier: Accumulated | None = None
    """The gradients of the earlier partial batches; None in the first partial batch."""
    share: float = 1.0
    """An estimate of the share of the step's response tokens that are in the partial batches up to this one.  The first
    partial batch of several uses it; the gradient of the step does not depend on it."""
    is_last: bool = True
    """Whether the step ends with this partial batch."""
    next_teacher: str = ""
    """The name of the teacher whose weights the next partial batch probably needs; "" if none is known."""

    def accumulated(self, num_response_tokens: int, num_microbatches: int) -> Accumulated:
        """Return the gradients of the step up to this partial batch, whose numbers are counted before it runs.

        ``num_response_tokens``, ``num_microbatches``: the response tokens of this partial batch, and its student
        microbatches with a response token, over the global batch.
        """
        earlier = self.earlier or Accumulated(0, 0, num_response_tokens, max(num_microbatches, 1))
        total = earlier.num_response_tokens + num_response_tokens
        estimate = earlier.divisor or max(1, round(num_response_tokens / self.share))
        divisor = total if self.is_last else estimate
        return Accumulated(total, divisor, earlier.first_tokens, earlier.first_microbatches)


@contextlib.contextmanager
def gradients_of(partial_batch: PartialBatch, accumulated: Accumulated, chunks: Sequence[Any]) -> Iterator[None]:
    """Let a call of the schedule add the gradients of ``partial_batch``; leave the schedule's configuration as it was.

    ``chunks``: this rank's chunks of the student, in Megatron's DDP.
    The first microbatch of a later partial batch is not the first one after a change of the weights: with FP8,
    Transformer Engine would overwrite the earlier gradients with those of that microbatch.
    In the last partial batch, the earlier gradients are first divided by the same number as those of this one.
    In another partial batch, nothing is reduced over data-parallel ranks and nothing is finalised.
    """
    with contextlib.ExitStack() as stack:
        if partial_batch.earlier is not None:
            stack.enter_context(weights_unchanged(chunks))
        if partial_batch.is_last:
            if partial_batch.earlier is not None and partial_batch.earlier.divisor != accumulated.divisor:
                for chunk in chunks:
                    chunk.scale_gradients(partial_batch.earlier.divisor / accumulated.divisor)
            yield
            return
        config = unwrapped(chunks[0]).config
        before = config.no_sync_func, config.grad_sync_func, config.finalize_model_grads_func
        for chunk in chunks:  # once around the whole call: the exit of DDP's context switches the reduction on
            stack.enter_context(chunk.no_sync())
        # The schedule drains deferred gradients of the output layer only where it has a function that finalises.
        config.no_sync_func, config.grad_sync_func, config.finalize_model_grads_func = None, None, _finalise_nothing
        try:
            yield
        finally:
            config.no_sync_func, config.grad_sync_func, config.finalize_model_grads_func = before


@contextlib.contextmanager
def weights_unchanged(chunks: Sequence[Any]) -> Iterator[None]:
    """Keep a call of the schedule from marking its first microbatch, as Megatron Core's schedules do in every call.

    Layers with this mark quantise their weights anew and overwrite ``main_grad``, as they must once in a step.
    """
    for chunk in chunks:
        chunk.set_is_first_microbatch = _mark_nothing
    try:
        yield
    finally:
        for chunk in chunks:
            del chunk.set_is_first_microbatch


def _mark_nothing() -> None:
    """Leave the marks of first microbatches as they are."""


def _finalise_nothing(*args: object, **kwargs: object) -> None:
    """Leave the gradients as they are."""


@dataclass
class StepOutput:
    """The results of one step on this rank, for the R response tokens that this rank's student held.

    Only the last pipeline stage has response tokens: the same on its tensor-parallel ranks, and split over its
    context-parallel ranks.
    """

    num_response_tokens: int
    """Number of response tokens of the global batch in this output's partial batches; equal on all ranks."""
    response_ids: Tensor
    """Index of each of the R tokens in ``PackedBatch.response_tokens``, [R] int64 on the device."""
    stats: TokenStats | None
    """Statistics of the R tokens, detached, the loss without coefficients; None on the other stages."""
    coefficients: Coefficients | None = None
    """Coefficients of the R tokens; None if the loss of every token is its divergence."""
    measures_teacher: bool = True
    """Whether ``stats`` describe the teacher; False on a step with a `Reference` that does not measure the teacher."""
    measures: TokenMeasures | None = None
    """Further measures of the R tokens; None without a `TokenMeasurement`, and on the other stages."""
    anchor_entropy: Tensor | None = None
    """Entropy [R] in nats of the target's anchor, student or reference; None if it is unknown."""
    accumulated: Accumulated | None = None
    """The gradients of the step up to this output; None if the output is not that of a call of the schedule."""

    @classmethod
    def joined(cls, parts: Sequence[StepOutput], lengths: Sequence[int]) -> StepOutput:
        """Return the results of all ``parts``, the partial batches of a step, as those of one batch, in order.

        ``lengths``: the number of response tokens of this replica in each partial batch, by which ``response_ids``
        count on.
        """
        if len(parts) == 1:
            return parts[0]
        starts = [sum(lengths[:i]) for i in range(len(parts))]
        stats = [part.stats for part in parts if part.stats is not None]
        coefficients = [part.coefficients for part in parts if part.coefficients is not None]
        measures = [part.measures for part in parts if part.measures is not None]
        entropies = [part.anchor_entropy for part in parts if part.anchor_entropy is not None]
        return cls(
            num_response_tokens=sum(part.num_response_tokens for part in parts),
            response_ids=torch.cat([part.response_ids + start for part, start in zip(parts, starts, strict=True)]),
            stats=TokenStats.concatenate(stats) if stats else None,
            coefficients=Coefficients.concatenate(coefficients) if coefficients else None,
            measures_teacher=all(part.measures_teacher for part in parts),
            measures=TokenMeasures.concatenate(measures) if measures else None,
            anchor_entropy=torch.cat(entropies) if entropies else None,
            accumulated=parts[-1].accumulated,
        )
