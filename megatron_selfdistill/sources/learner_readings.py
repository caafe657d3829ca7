# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the models of a learner read in given texts without training: scores, log-probs, and a loss that is to be 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.learner import Learner
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.metrics.step import step_metrics
from megatron_selfdistill.pipeline.batch import pack_everywhere
from megatron_selfdistill.pipeline.schedule import NoResponseTokens, ScheduledTeacher
from megatron_selfdistill.pipeline.score import ScoringModels, candidate_log_probs, read_tokens
from megatron_selfdistill.sources.signals import MEASURED_SIGNALS

IDENTITY_CONTEXTS = 8
"""Contexts per replica that `identity_loss` reads."""


@dataclass(frozen=True)
class LearnerReadings:
    """The models of a learner as `ReadingModels`; every method is collective over the world."""

    learner: Learner

    def token_signals(self, contexts: Sequence[ContextPair]) -> dict[str, Tensor]:
        """Return the `MEASURED_SIGNALS` of every response token by name, [R] float64 each, in nats, on the host.

        The tokens have the order of ``contexts``.  The weights are the present ones.  All are empty where no replica
        has a response token.
        Collectives over the world: those of a step's forward pass, and those of `Reading.numbers`.
        """
        try:
            reading = self.learner.read(contexts)
        except NoResponseTokens:
            return {name: torch.empty(0, dtype=torch.float64) for name in MEASURED_SIGNALS}
        statistics = ("loss" if name == "divergence" else name for name in MEASURED_SIGNALS)
        return dict(zip(MEASURED_SIGNALS, reading.numbers(*statistics), strict=True))

    def read_tokens(self, contexts: Sequence[ContextPair], temperature: float = 1.0) -> Tensor:
        """Return log p, log p_teacher and KL(p || p_teacher) of every response token (pipeline/score.py).

        An offloaded teacher leaves the device at the end.
        """
        learner = self.learner
        with learner.teachers.start.on_device() as teacher:
            models = ScoringModels(
                student=learner.chunks,
                teacher=teacher,
                grid=learner.grid,
                vocab=learner.vocab,
                max_tokens=learner.config.schedule.max_tokens,
                fusion=learner.output_layer.fusion,
                backend=learner.config.loss.backend,
                joins_turns=learner.packing.joins_turns,
            )
            return read_tokens(contexts, models, temperature)

    def candidate_log_probs(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> Tensor:
        """Return the teacher's log-probs of candidates for the next token, [B, n] (pipeline/score.py)."""
        learner = self.learner
        with learner.teachers.start.on_device() as teacher:
            return candidate_log_probs(
                prompts, token_ids, teacher, learner.grid, learner.vocab, max_tokens=learner.config.schedule.max_tokens
            )


def identity_loss(learner: Learner, contexts: Sequence[ContextPair]) -> float:
    """Return the mean loss of the first ``contexts`` where the student is its own teacher and reads one prompt.

    With a reference the student is its own reference, too.  The loss is 0 where sharding, packing and exchange work
    in this layout.  Collective.

    Raises: `NoResponseTokens` on all ranks where no replica has a response token.
    """
    answered = [context for context in contexts if context.response][:IDENTITY_CONTEXTS]
    same = [
        replace(
            context,
            teacher_prompt=context.student_prompt,
            control_prompts=(context.student_prompt,) * learner.packing.num_controls,
        )
        for context in answered
    ]
    anchor = "reference" if learner.config.is_anchored else "student"
    weight, num_controls = learner.config.target.teacher_weight, learner.packing.num_controls
    target = Target(teacher_weight=weight, anchor=anchor, num_controls=num_controls)
    packed, loss = pack_everywhere(same, learner.packing, learner.grid), learner.loss_towards(target)
    reference, teacher = learner.reference_of(target, learner.chunks), ScheduledTeacher(learner.chunks)
    output = learner.run_schedule(packed, teacher, loss, {"reference": reference, "forward_only": True})
    return step_metrics(output, None, learner.grid)["loss/mean"]
