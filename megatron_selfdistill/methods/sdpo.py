# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
r"""SDPO: the teacher sees a right response of a peer, or the environment's feedback, about the sampled response.

Algorithm: Each problem gets 8 responses, which evaluation.verifier or the environment judges. The teacher of a response
sees the first other right response of its group, without its thinking (the text up to `</think>`). With recipe
sdpo_feedback, it sees the environment's text about the response where there is no right peer, such as the output of a
compiler. A response without a hint is skipped. The data need no solutions.

Equation:

    w = min(rho, 2) for responses with a hint;   a = 0
    recipe=sdpo:           D = JSD with weight .5 of teacher and student
    recipe=sdpo_feedback:  D = KL(student || teacher)

Paper: SDPO (arXiv 2601.20802). Published are templates and sections, feedback only where there is no solution, both
divergences, EMA rate, correction, batch and learning rates.

Differences:
- Ours is the whole vocabulary, which is exact. Published are the student's 100 likeliest tokens (20 with feedback) and
  a bin for the rest.
- method.hints=feedback shows feedback alone, and needs neither answers nor rewards. The section with feedback begins
  with "The following is feedback from your unsuccessful earlier attempt:".

Command:

    selfdistill recipe=sdpo checkpoint.load=... data.tokenizer=... data.path=problems.jsonl run_dir=runs/sdpo
    selfdistill recipe=sdpo_feedback environment.name=your.module.Environment checkpoint.load=... data.tokenizer=... \
        data.path=problems.jsonl run_dir=runs/sdpo_feedback

Expected: 100 steps of 4 x 8 responses raise the sampled accuracy from .36 to .78 on subtraction, and with feedback from
.32 to .83 on another task. On additions the average breaks at the table's learning rate (.51 to .023), while
teacher.weights=frozen reaches .92 (docs/recipes/comparison.md).

Known failure:
- A group without any right response teaches nothing: `hints/share` is the share of responses with a hint.
- Feedback that names the answer leaks it.
- The change of a token's likelihood under hindsight is near chance as its credit (AUC .505, arXiv 2608.09263).
- A teacher that follows fast drifts with the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from megatron_selfdistill.config import Config, function_named
from megatron_selfdistill.config.schema.data_config import plays_episodes
from megatron_selfdistill.config.schema.method_config import FUNCTION, LATER, Needs
from megatron_selfdistill.config.schema.ranges import NonNegativeFloat, OneOf, is_dotted
from megatron_selfdistill.data.thoughts import final_part
from megatron_selfdistill.data.tokenizer import Tokenizer
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.methods.default import Metrics
from megatron_selfdistill.methods.parts.hints import HintedLater, chosen_with_hints
from megatron_selfdistill.methods.parts.selection import of_groups
from megatron_selfdistill.methods.parts.settings import DistillAndRewardSettings
from megatron_selfdistill.rollout.base import response_text
from megatron_selfdistill.sources.rollouts import Rollout

FEEDBACK_HEADING = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n"
"""The heading of an environment's feedback, after the problem."""
CLOSING = "\n\nCorrectly solve the original question."
TEMPLATES = {
    "feedback": "{problem}" + FEEDBACK_HEADING + "{solution}" + CLOSING,
    "peer_or_feedback": "{problem}{solution}" + CLOSING,
}
"""The teacher's wordings for hints that may be no solution."""

PEER_SECTION = "\nCorrect solution:\n\n{}"
"""SDPO's section with a peer in the teacher's prompt, between the problem and the closing sentence."""


@dataclass(frozen=True)
class SdpoSettings(DistillAndRewardSettings):
    """The settings of SDPO."""

    hints: Annotated[str, OneOf(("peer", "feedback", "peer_or_feedback"), or_dotted=True)] = "peer"
    """The hint that the teacher sees: peer (another right response among rollout.num_samples of the same step),
    feedback (the environment's text about the response), peer_or_feedback (a peer, or feedback where there is none,
    each under a heading) or the dotted path of a function ``hints(problem, responses)``.  The function gets the text
    and the reward of each response to the problem, and returns a text or None for each."""
    weight: NonNegativeFloat = 0.0
    """Weight of the advantages of rewards beside the teacher's part.  Above 0, responses without a hint are trained on
    for their rewards; with 0 they are skipped."""

    @property
    def needs(self) -> Needs:
        """What the method needs from the core."""
        compares = self.weight > 0 or self.hints in ("peer", "peer_or_feedback")
        return Needs(
            log_probs=self.log_probs,
            rewards=compares or self.hints != "feedback" or self.select is not None,
            group_size=2 if compares else 1,
            hint=FUNCTION if is_dotted(self.hints) else LATER,
        )

    @property
    def teacher_template(self) -> str | None:
        """The teacher's wording where data.teacher_template is null."""
        return TEMPLATES.get(self.hints)

    @property
    def required(self) -> Sequence[str]:
        """The keys with the values that the method needs: only feedback compares no responses to a problem."""
        return ("data.kind=problems", *["environment.max_turns=1"] * (self.hints != "feedback"))

    def require_start(self, config: Config) -> None:
        """Raise `ConfigError` also for feedback without an environment."""
        super().require_start(config)
        if self.hints in ("feedback", "peer_or_feedback") and not plays_episodes(config):
            raise ConfigError(
                f"method.hints={self.hints} shows the teacher the feedback of an environment: set environment.name to "
                "http or to the dotted path of your class"
            )


class Sdpo(HintedLater):
    """SDPO."""

    Settings = SdpoSettings

    def select(self, step: int, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return the rollouts with their hints, and hints/share, the share of all rollouts with a hint.

        Collectives: those of a hint function, and one sum over the data-parallel ranks.
        """
        selected, _ = super().select(step, rollouts)
        return chosen_with_hints(selected, self._hints(selected), self.tools, self.settings.weight > 0)

    def _hints(self, rollouts: Sequence[Rollout]) -> list[str | None]:
        """Return the hint of each rollout; None is no hint, and so is a text of white space.

        Raises: `VerifierError` on every rank where the function failed, or returned anything but one text or None for
        each response.
        """
        name, tokenizer = self.settings.hints, self.tools.run_data.tokenizer
        if name == "peer":
            return peer_hints(rollouts, tokenizer)
        if name == "feedback":
            return feedback_hints(rollouts)
        if name == "peer_or_feedback":
            return peer_or_feedback_hints(rollouts, tokenizer)
        function = function_named("method.hints", name, {})
        hints = of_groups(function, "hint function", rollouts, tokenizer, self.tools.grid)
        return [hint if hint is not None and hint.strip() else None for hint in hints]


def peer_hints(rollouts: Sequence[Rollout], tokenizer: Tokenizer) -> list[str | None]:
    """Return for each rollout the first other right response of its group, without thinking; None if there is none."""
    right: dict[int, list[int]] = {}
    for i, one in enumerate(rollouts):
        if one.correct:
            right.setdefault(one.group, []).append(i)
    peers = [next((j for j in right.get(one.group, ()) if j != i), None) for i, one in enumerate(rollouts)]
    texts = {j: final_part(response_text(rollouts[j].response, tokenizer)).strip() for j in peers if j is not None}
    return [None if peer is None else texts[peer] for peer in peers]


def feedback_hints(rollouts: Sequence[Rollout]) -> list[str | None]:
    """Return the environment's feedback on each response; None if there is none, or only white space."""
    return [one.feedback if one.feedback and one.feedback.strip() else None for one in rollouts]


def peer_or_feedback_hints(rollouts: Sequence[Rollout], tokenizer: Tokenizer) -> list[str | None]:
    """Return the peer of each response in `PEER_SECTION`, or else its feedback under `FEEDBACK_HEADING`."""
    sections: list[str | None] = []
    for peer, feedback in zip(peer_hints(rollouts, tokenizer), feedback_hints(rollouts), strict=True):
        if peer is not None:
            sections.append(PEER_SECTION.format(peer))
        else:
            sections.append(None if feedback is None else FEEDBACK_HEADING + feedback)
    return sections
