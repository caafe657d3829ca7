# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""CaOPD: responses, and the teacher's hint, state how often the model solves the problem.

Algorithm: A teacher that has seen the solution makes the student overconfident. Here each problem gets 8 responses.
The share P of right ones replaces the confidence that each response states, and the confidence at the end of the
solution in the teacher's prompt. A note tells the teacher that P is the value of the field. Then the method is SDFT.

Equation:

    P = right responses / responses to the problem
    the response loses its statements of confidence and ends in the line "Confidence: P"
    w and D as in sdft, without importance weights:
    an edited response has no probability when it was sampled

Paper: CaOPD (arXiv 2604.16830). Published are 8 responses, the edit, the note, EMA decay .99, learning rate and batch.

Differences: Ours are the sentence in both prompts that asks for the field, and that responses without an end are
dropped.

Expected: On a base whose stated confidence is honest (docs/recipes/comparison.md), the mean confidence exceeds the
accuracy by .004 after CaOPD and by .61 after SDFT. The sampled accuracy is .28, from .35 before (SDFT: .36). An
evaluation shows the effect: `sampled_ece`, `sampled_ocg` and `sampled_spr` (docs/evaluation.md).

Known failure:
- P from few responses is coarse.
- A model that never writes the field learns it from the edited responses alone: look at `sampled_stated_confidence` of
  the evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from megatron_selfdistill.config.schema.method_config import Needs
from megatron_selfdistill.evaluation.estimators import split_confidence
from megatron_selfdistill.methods.default import Metrics, SelfDistillation
from megatron_selfdistill.methods.parts.settings import RewardSettings
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.sources.rollouts import Rollout

NOTE = "Note: The empirical confidence for this question is {:.2f}. Output this exact value in the 'Confidence:' field."
"""The note to the teacher, after the solution, under `StatedConfidence`."""


@dataclass(frozen=True)
class CaopdSettings(RewardSettings):
    """The settings of CaOPD."""

    needs = Needs(rewards=True, group_size=2)
    required = ("environment.max_turns=1", "data.solutions=given", "loss.rollout_correction=none")


class Caopd(SelfDistillation):
    """CaOPD: responses that state how often their group is right, which the teacher is told, too."""

    Settings = CaopdSettings

    @property
    def comparable(self) -> bool:
        """Whether the sampler's log-probs are those of the student: never, since responses are edited."""
        return False

    def select(self, step: int, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return the edited rollouts without truncated and too long ones, in their order, and no metrics."""
        edited = []
        for _, members in groupby(rollouts, key=lambda rollout: rollout.group):
            group = list(members)
            share = sum(rollout.correct for rollout in group) / len(group)
            edited += [one for one in (self._edited(one, share) for one in group) if one is not None]
        return edited, {}

    def _edited(self, rollout: Rollout, share: float) -> Rollout | None:
        inner, tokens = self.tools.given, rollout.response.token_ids
        if rollout.response.truncated:
            return None
        text = self._stating(inner.builder.tokenizer.decode(tokens[:-1]), share)
        token_ids = [*inner.builder.tokenizer.encode(text), tokens[-1]]
        hint = f"{self._stating(rollout.problem.solution, share)}\n\n{NOTE.format(share)}"
        pair = replace(inner, policy="drop").pair_with(rollout.problem, hint)  # a shortened hint would lose its note
        if pair is None or len(token_ids) > inner.max_new_tokens:
            return None
        return replace(
            rollout,
            problem=replace(rollout.problem, solution=hint),
            prompts=pair,
            response=Response.unsampled(token_ids),
        )

    def _stating(self, text: str, share: float) -> str:
        unstated = split_confidence(text, self.tools.config.evaluation.confidence_pattern)[1]
        return f"{unstated.rstrip()}\nConfidence: {share:.2f}"
