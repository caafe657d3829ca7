# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Further measures of response tokens, from the logits that the loss reads.

Only some steps take a `TokenMeasurement`.  Its numbers come from the logits that the loss reads, a few tokens at a
time, between its forward pass and its gradient.  With a reference these are the logits of the student and of the mix,
so the states of teacher and reference are projected, too.  The loss and its gradient do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from megatron_selfdistill.distributed.host_to_device import to_device
from megatron_selfdistill.loss.joint_anchor import joint_anchor
from megatron_selfdistill.loss.sharded.shard_sums import Chunk
from megatron_selfdistill.loss.sharded.target_measures import target_measures
from megatron_selfdistill.loss.sharded.vocab_parallel import TokenStats, VocabShard, distillation_loss, vocab_entropy
from megatron_selfdistill.loss.target import Divergence, Target

CHUNK_TOKENS = 512
"""The largest number of tokens whose logits of teacher and reference exist at a time, besides those of the loss."""


_OF_TEACHER = ("teacher_entropy", "teacher_log_prob", "top1_agreement")


class OwnLogits(NamedTuple):
    """The logits of the models that a target with a reference or controls mixes; None is not measured.

    All are ``[n, v / tp]``; of the controls the log of the mean of their probabilities.
    """

    teacher: Tensor | None = None
    reference: Tensor | None = None
    control: Tensor | None = None


@dataclass(frozen=True)
class OwnStates:
    """The states ``[R, h / tp]`` of the models that a target with a reference or controls mixes."""

    teacher: Tensor | None
    reference: Tensor | None
    controls: Tensor | None
    """The states ``[K, R, h / tp]`` of the controls."""
    of_teacher: Callable[[Tensor], Tensor]
    of_reference: Callable[[Tensor], Tensor]
    """The functions that return the logits ``[R, v / tp]`` of such states."""
    subtract_controls: Callable[[Tensor, Tensor], None]
    """The function that replaces the teacher's logits by t - c, of logits and the states of the controls."""

    def logits(self, tokens: Chunk) -> OwnLogits:
        """Return the logits of some of the tokens; those of a target that mixes no other models are none."""
        if self.reference is None and self.controls is None:
            return OwnLogits()
        assert self.teacher is not None, "a step that measures keeps the states of both"
        reference = None if self.reference is None else self.of_reference(self.reference[tokens])
        teacher, control = self.of_teacher(self.teacher[tokens]), None
        if self.controls is not None:
            contrast = teacher.clone()
            self.subtract_controls(contrast, self.controls[:, tokens])
            control = (teacher.float() - contrast).masked_fill(torch.isneginf(teacher), -torch.inf)
        return OwnLogits(teacher, reference, control)


@dataclass(frozen=True)
class TokenMeasures:
    """The measures of R response tokens, [R] each if not stated, equal on all tensor-parallel ranks."""

    measured: Tensor
    """Whether a token is measured, bool; the other fields are 0 at a token that is not."""
    mass_on_rare_student: Tensor
    """The target's mass on tokens that are rare for the student, see `TargetMeasures`; float64."""
    mass_on_rare_reference: Tensor | None = None
    """The same for an anchor with a reference; None without a reference."""
    kl_to_anchor: Tensor | None = None
    """KL(q || a) and KL(t || a) of target q, teacher t and anchor a, [R, 2] float64, see `TargetMeasures`; None where
    the teacher is not measured."""
    kl_of_control: Tensor | None = None
    """KL(c || a) and KL(t || c), [R, 2] float64, see `TargetMeasures`; None without controls."""
    reference_entropy: Tensor | None = None
    """The entropy of an anchor with a reference in nats, float64; None where the loss takes it anyway."""
    teacher_entropy: Tensor | None = None
    """The entropy of the teacher in nats; None without a reference, where the loss takes it, and where the step does
    not measure the teacher."""
    teacher_log_prob: Tensor | None = None
    """The teacher's log-prob of the response token in nats; None if ``teacher_entropy`` is None."""
    top1_agreement: Tensor | None = None
    """Whether student and teacher have the same argmax, bool; None if ``teacher_entropy`` is None."""
    summary: Tensor | None = None
    """The rows [R, F] of `TokenMeasurement.summarise`; None without it."""

    @classmethod
    def concatenate(cls, parts: Sequence[TokenMeasures]) -> TokenMeasures:
        """Return the measures of the tokens of all parts, at least one, in their order."""
        columns = ([getattr(part, f.name) for part in parts] for f in fields(cls))
        joined: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
        return cls(*joined)

    def spread(self, num_tokens: int, places: Tensor) -> TokenMeasures:
        """Return the measures of ``num_tokens`` tokens, of which those at ``places`` are measured."""

        def at_places(values: Tensor) -> Tensor:
            spread = values.new_zeros(num_tokens, *values.shape[1:])
            spread[places] = values
            return spread

        return replace(self, **{name: at_places(values) for name, values in vars(self).items() if values is not None})

    @property
    def has_teacher(self) -> bool:
        """Whether the numbers that describe the teacher are measured."""
        return self.teacher_entropy is not None

    @property
    def anchor_entropy(self) -> Tensor | None:
        """The ``reference_entropy``, -inf at tokens that are not measured."""
        entropy = self.reference_entropy
        return None if entropy is None else entropy.masked_fill(~self.measured, -torch.inf)

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
    summarise: Callable[[Sequence[Tensor], VocabShard], Tensor] | None = None
    """The function that returns rows [n, F] from the logits of student, teacher and, where there is one, reference."""
    every: int = 1
    """The number of tokens of which one is measured; 1 measures all tokens."""
    phase: int = 0
    """The number that chooses this token: over ``every`` successive phases each token is measured once."""

    def places(self, tokens: range, num_tokens: int) -> list[int]:
        """Return the measured ones among ``tokens``, of ``num_tokens``: one in each block of ``every`` tokens.

        Blocks, from 0 on, choose different places, since the lengths of responses may be multiples of ``every``.
        """
        starts = range(tokens.start // self.every * self.every, tokens.stop, self.every)
        found = [at + (crc32(b"%d" % at) + self.phase) % min(self.every, num_tokens - at) for at in starts]
        return [token for token in found if token in tokens]


@dataclass
class MeasuringObserver:
    """The `Observer` of the loss of R tokens that measures each chunk, a few tokens at a time."""

    measurement: TokenMeasurement
    """The choice of what is measured."""
    vocab: VocabShard
    """The columns of all logits on this rank."""
    response_tokens: Tensor
    """The response tokens [R] int64."""
    own_logits: Callable[[Chunk], OwnLogits]
    """The function that projects the states of teacher and reference of some of the R tokens."""
    teacher_weights: Tensor | None = None
    """The w of each token [R]; None is the target's."""
    parts: list[TokenMeasures] = field(default_factory=list)
    """The measures so far, in the order of the tokens."""

    @torch.no_grad()
    def __call__(self, tokens: slice, student_logits: Tensor, teacher_logits: Tensor, stats: TokenStats) -> None:
        """Measure the tokens of a chunk.

        Collectives over TP, per `TokenMeasurement.chunk_tokens` tokens: those of ``own_logits``, `target_measures`,
        `vocab_entropy`, `distillation_loss` and `TokenMeasurement.summarise`.
        """
        every = self.measurement.every
        length = every * max(1, min(self.measurement.chunk_tokens, CHUNK_TOKENS))
        start = tokens.start
        for student, teacher, beta in zip(
            student_logits.split(length), teacher_logits.split(length), stats.beta.split(length), strict=True
        ):
            number = len(beta)
            if every == 1:
                self.parts.append(self._measures(slice(start, start + number), student, teacher, beta))
            else:
                chosen = self.measurement.places(range(start, start + number), len(self.response_tokens))
                places = to_device(torch.tensor(chosen, dtype=torch.int64) - start, beta.device)
                found = self._measures(places + start, student[places], teacher[places], beta[places])
                self.parts.append(found.spread(number, places))
            start += number

    def _measures(self, tokens: Chunk, student_logits: Tensor, teacher_logits: Tensor, beta: Tensor) -> TokenMeasures:
        """Return the measures of some of the R tokens."""
        target, backend, own = self.measurement.target, self.measurement.backend, self.own_logits(tokens)
        anchor = None if own.reference is None else joint_anchor(student_logits, own.reference, target)
        masses, kl_to_anchor, kl_of_control = target_measures(
            student_logits,
            teacher_logits,
            beta,
            target=target,
            vocab=self.vocab,
            reference_logits=anchor,
            own_teacher_logits=teacher_logits if target.reads_teacher else own.teacher,
            teacher_weights=None if self.teacher_weights is None else self.teacher_weights[tokens],
            control_log_probs=own.control,
        )
        of_reference = entropy = None
        if anchor is not None:
            of_reference = masses[:, 1]
            if not target.needs_reference_entropy:
                entropy = vocab_entropy(anchor, self.vocab, backend=backend)
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
        of_others = (teacher_logits,) if target.reads_teacher else own
        models = [student_logits, *(logits for logits in of_others if logits is not None)]
        summarise = self.measurement.summarise
        return TokenMeasures(
            measured=torch.ones_like(beta, dtype=torch.bool),
            mass_on_rare_student=masses[:, 0],
            mass_on_rare_reference=of_reference,
            kl_to_anchor=kl_to_anchor,
            kl_of_control=kl_of_control,
            reference_entropy=entropy,
            **of_teacher,
            summary=None if summarise is None else summarise(models, self.vocab),
        )
