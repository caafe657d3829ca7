# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""U-OPSD: a majority of the model's own responses is the hint for those that disagree, without any answer of the data.

Algorithm: Each problem gets 8 responses, and each votes with its final answer. A majority is an answer of at least the
share method.threshold of all responses, and of more than any other answer. The first response with it is the
pseudo-solution, which the teacher of every response with another answer, or with none, sees. The responses of the
majority, and groups without a majority, are not trained on.

Equation:

    w = c,   a = 0 for responses that disagree with a majority;   D = KL(student || teacher)

c is method.distill_weight; method.signal has further forms.

Paper: U-OPSD (arXiv 2608.06296), of which the abstract was read. Published are the majority vote under a threshold of
self-consistency, the pseudo-solution as the hint, and training on the responses that disagree.

Differences: Ours are 8 responses, the threshold of 1/2, the first response of the majority without its thinking as the
pseudo-solution, the frozen weights as the teacher, reverse KL and the wording. With evaluation.verifier=math_verify
equal expressions are one answer, and with every other verifier equal texts are. No verdict of a verifier is used.

Expected: 100 steps of 4 x 8 responses lower the sampled accuracy on subtraction from .37 to .010, because a base that
is mostly wrong teaches itself its errors. On additions no answer reaches half of the votes, nothing is trained, and
the accuracy stays at .57 (seed 21, the tasks of docs/recipes/comparison.md). No base that is mostly right was measured.

Known failure:
- A majority can be wrong, and nothing notices it: the teacher then shows the wrong solution to the right responses.
  Measure the greedy accuracy first, which the majority tends to follow: it was .37 for the subtraction above.
- Where all responses agree or none do, nothing is trained: `hints/share` is the share of responses with a hint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_selfdistill.config.schema.method_config import LATER, MEASURED, Needs
from megatron_selfdistill.config.schema.ranges import Share
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.thoughts import final_part
from megatron_selfdistill.evaluation.verify import judged_text, voted_answer
from megatron_selfdistill.methods.default import Metrics
from megatron_selfdistill.methods.parts.hints import HintedLater, chosen_with_hints
from megatron_selfdistill.methods.parts.selection import judged_groups
from megatron_selfdistill.methods.parts.settings import ClipSettings, SignalSettings
from megatron_selfdistill.methods.parts.terms import uniform
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.signals import Signals, Terms


@dataclass(frozen=True)
class UOpsdSettings(SignalSettings, ClipSettings):
    """The settings of U-OPSD."""

    threshold: Share = 0.5
    """Least share of the responses to a problem that must give the same answer, so that this answer is a majority."""

    required = ("environment.max_turns=1",)

    @property
    def needs(self) -> Needs:
        """What the method needs from the core."""
        return Needs(log_probs=None if self.signal == "full" else MEASURED, group_size=2, hint=LATER)


class UOpsd(HintedLater):
    """Unsupervised on-policy self-distillation."""

    Settings = UOpsdSettings

    def select(self, step: int, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return the rollouts that disagree with a majority, with their hints, and hints/share.

        Collectives: one all_gather_object over the world, and one sum over the data-parallel ranks.
        """
        judge, threshold = self.tools.judge, self.settings.threshold
        texts = [
            None if one.response.truncated else judged_text(one.response, judge.tokenizer, judge.confidence)[2]
            for one in rollouts
        ]

        def vote(problem: Problem, responses: list[str | None]) -> list[str | None]:
            answers = [None if text is None else voted_answer(text, judge.verifier) for text in responses]
            return pseudo_solutions(responses, answers, threshold)

        hints = judged_groups(rollouts, texts, vote, self.tools.grid, "majority vote")
        return chosen_with_hints(rollouts, hints, self.tools, keeps_unhinted=False)

    def terms(self, step: int, rollouts: Sequence[Rollout], signals: Signals) -> Terms:
        """Return the teacher's part in the form of the signal."""
        return uniform(signals, weight=self.settings.distill_weight, signal=self.settings.signal)


def pseudo_solutions(texts: Sequence[str | None], answers: Sequence[str | None], threshold: float) -> list[str | None]:
    """Return the hint of each response to one problem: the first text of the majority, for those that disagree.

    ``texts``, ``answers``: text and answer of each response; None is a truncated response or one without an answer,
    which votes for nothing and disagrees with every majority.  Without a majority every hint is None.
    """
    ranked = Counter(answer for answer in answers if answer is not None).most_common(2)
    counts = [count for _, count in ranked]
    if not counts or counts[0] < threshold * len(answers) or counts[0] == sum(counts[1:]):
        return [None] * len(answers)
    majority = ranked[0][0]
    solution = final_part(texts[answers.index(majority)] or "").strip()
    return [None if answer == majority else solution for answer in answers]
