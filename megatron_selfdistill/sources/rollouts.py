# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The responses of a step as values: each with its problem, its prompts, its reward and its place in an episode."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_selfdistill.data.contexts import EpisodeTurn, PromptPair
from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.rollout.sampling import SampleKey

Sample = tuple[SampleKey, Problem, PromptPair]
"""The name of a sample, its problem and the problem's prompts."""


@dataclass(frozen=True)
class Rollout:
    """A text that is trained on, the problem that it answers, and the two prompts that it is conditioned on."""

    problem: Problem
    """The problem, with the complete solution for the teacher."""
    prompts: PromptPair
    response: Response
    group: int = 0
    """The number of the group, counted from 0 on this replica: all responses of one visit to a problem."""
    reward: float | None = None
    """The reward of the response; None if nothing needs it."""
    hinted: bool = True
    """Whether the teacher's prompt shows a hint."""
    privileged: bool = False
    """Whether the response is trained on after the teacher's prompt, with the student's prompt as the teacher's."""
    episode: int | None = None
    """The number of the response's episode, counted from 0 on this replica; None for an episode of its own."""
    turn: int = 0
    """The number of the response within its episode, counted from 0."""
    feedback: str | None = None
    """The text of the reply about this response, which only a teacher may see; None if there is none."""
    part: str = "response"
    """The text that is trained on: response, revision (the last response of an episode after the problem alone), reply
    (what was replied, as a response to a request for it) or view (a text after other prompts)."""

    key: SampleKey | None = None
    """The name of the sample; None for a text that nobody has sampled."""
    reply: Reply | None = None
    """The reply to the response; None if nothing replies, and for a truncated response, which ends its episode with the
    reward 0."""
    opening: Reply | None = None
    """The reply before the first response, whose text ``problem`` shows; None for a later turn, and if
    the episode has no session."""

    @property
    def correct(self) -> bool:
        """Whether the response has a reward of at least 0.5."""
        return self.reward is not None and self.reward >= 0.5

    def episode_turn(self, has_teacher: bool) -> EpisodeTurn | None:
        """Return the place of the response in its episode, with its hint if ``has_teacher``; None for an added text."""
        if self.key is None or self.part != "response":
            return None
        reply = None if self.reply is None else self.reply.text
        hint = self.prompts.solution if has_teacher else ""
        return EpisodeTurn(self.key.sample_index, self.turn, self.reward or 0.0, hint, reply)

    def in_privileged_view(self) -> Rollout:
        """Return this rollout with both prompts exchanged."""
        pair = self.prompts
        exchanged = replace(pair, student_prompt=pair.teacher_prompt, teacher_prompt=pair.student_prompt)
        return replace(self, prompts=exchanged, privileged=True)

    def in_sampled_view(self, *, privileged: bool) -> Rollout:
        """Return this rollout with the prompt that it was sampled after as both prompts.

        ``privileged``: whether this prompt is the teacher's.
        """
        prompt = self.prompts.teacher_prompt if privileged else self.prompts.student_prompt
        pair = replace(self.prompts, student_prompt=prompt, teacher_prompt=prompt)
        return replace(self, prompts=pair, privileged=privileged)

    def without_hint(self) -> Rollout:
        """Return this rollout without a hint, and so without a teacher's part in its loss."""
        return replace(self, prompts=without_hint(self.prompts), hinted=False)


def without_hint(pair: PromptPair) -> PromptPair:
    """Return ``pair`` with the student's prompt as the teacher's."""
    return replace(pair, teacher_prompt=pair.student_prompt, solution="", solution_truncated=False)
