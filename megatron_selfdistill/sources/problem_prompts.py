# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The prompts of a step's problems: the student's prompt, and the teacher's prompt, which also shows a solution."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from megatron_selfdistill.data.contexts import PromptPair, fit_teacher_prompt
from megatron_selfdistill.data.problems import Problem, ProblemSampler
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.data.tokenizer import Tokenizer
from megatron_selfdistill.evaluation.verify import Reward, Verifier, judge, judged_text, rewards
from megatron_selfdistill.rollout.base import Response, SamplingParams

if TYPE_CHECKING:
    from megatron_selfdistill.distributed.ranks import RankGrid


@dataclass(frozen=True)
class Answer:
    """A response, the problem that it answers, and the two prompts that it is conditioned on."""

    problem: Problem
    """The problem, with the complete solution for the teacher."""
    prompts: PromptPair
    response: Response
    group: int = 0
    """The number of the group, counted from 0 on this replica: all responses of one visit to a problem."""
    reward: float | None = None
    """The reward of the response; None where nothing needs it."""
    hinted: bool = True
    """Whether the teacher's prompt shows a hint."""
    privileged: bool = False
    """Whether the response is trained on after the teacher's prompt, with the student's prompt as the teacher's."""
    episode: int | None = None
    """The number of the episode, counted from 0 on this replica: the responses of one conversation with an environment.
    None where the response is an episode of its own."""
    turn: int = 0
    """The number of the response within its episode, counted from 0."""
    feedback: str | None = None
    """The text of the environment about this response, which only a teacher may see; None where there is none."""
    part: str = "response"
    """The text that is trained on: response, revision (the last response of an episode after the problem alone) or
    reply (the environment's reply, as a response to a request for it)."""

    @property
    def correct(self) -> bool:
        """Whether the response has a reward of at least 0.5."""
        return self.reward is not None and self.reward >= 0.5

    def in_privileged_view(self) -> Answer:
        """Return this answer with both prompts exchanged."""
        pair = self.prompts
        exchanged = replace(pair, student_prompt=pair.teacher_prompt, teacher_prompt=pair.student_prompt)
        return replace(self, prompts=exchanged, privileged=True)

    def in_sampled_view(self, *, privileged: bool) -> Answer:
        """Return this answer with the prompt that it was sampled after as both prompts.

        ``privileged``: whether this prompt is the teacher's.
        """
        prompt = self.prompts.teacher_prompt if privileged else self.prompts.student_prompt
        pair = replace(self.prompts, student_prompt=prompt, teacher_prompt=prompt)
        return replace(self, prompts=pair, privileged=privileged)

    def without_hint(self) -> Answer:
        """Return this answer without a hint, and so without a teacher's part in its loss."""
        return replace(self, prompts=without_hint(self.prompts), hinted=False)


def without_hint(pair: PromptPair) -> PromptPair:
    """Return ``pair`` with the student's prompt as the teacher's."""
    return replace(pair, teacher_prompt=pair.student_prompt, solution="", solution_truncated=False)


class Prompts(Protocol):
    """The making of prompts, as a value: the results of a step go into a new object and never change an old object."""

    def prepare(
        self, step: int, sampling: SamplingParams, problem_sampler: ProblemSampler
    ) -> tuple[Prompts, Mapping[str, float]]:
        """Return the prompts of the step that ``step`` optimizer steps precede, and metrics.

        ``problem_sampler`` samples the problems that come next; the caller's step begins with its first batch.
        Collective.
        """
        ...

    def pair(self, problem: Problem) -> PromptPair:
        """Return both prompts of a problem before it is answered."""
        ...

    def has_solution(self, problem: Problem) -> bool:
        """Return whether the teacher's prompt of `pair` shows a solution."""
        ...

    def is_guided(self, problem: Problem) -> bool:
        """Return whether ``problem`` is guided: its tokens have their own teacher weight and divergence.

        Its responses are sampled with guidance, except now and then, see `guides`.
        """
        ...

    def guides(self, problem: Problem) -> bool:
        """Return whether the next responses to ``problem`` are sampled with guidance."""
        ...

    def choose(self, answers: Sequence[Answer]) -> tuple[list[Answer], Mapping[str, float]]:
        """Return the answers that are trained on, with the prompts that they are trained with, and metrics.

        Collective over the data-parallel ranks.
        """
        ...

    def record(self, answers: Sequence[Answer], guided: Collection[str]) -> Prompts:
        """Return the prompts of later steps, once all ``answers`` of this replica are known.

        ``guided``: the ids of the problems with guided responses.  Collective.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the changes that steps have made, as plain values."""
        ...

    def restored(self, state: Mapping[str, Any]) -> Prompts:
        """Return these prompts with what `state_dict` returned."""
        ...


class UnguidedPrompts:
    """Prompts of problems whose responses are all sampled from the student alone."""

    def is_guided(self, problem: Problem) -> bool:
        """Return False: no problem is guided."""
        return False

    def guides(self, problem: Problem) -> bool:
        """Return False: responses are sampled from the student alone."""
        return False


@dataclass(frozen=True)
class GivenSolutions(UnguidedPrompts):
    """Prompts that show the teacher the solutions of the data, which nothing changes."""

    builder: PromptBuilder
    max_length: int
    """The greatest length of prompt and response together, in tokens."""
    max_new_tokens: int
    """The greatest length of a response in tokens."""
    policy: str
    """``data.on_long_context``, as `fit_teacher_prompt` takes it."""

    def prepare(
        self, step: int, sampling: SamplingParams, problem_sampler: ProblemSampler
    ) -> tuple[Prompts, Mapping[str, float]]:
        """Return these prompts and no metrics."""
        return self, {}

    def pair(self, problem: Problem) -> PromptPair:
        """Return both prompts of a problem; the teacher's prompt shows ``problem.solution``."""
        pair = fit_teacher_prompt(
            self.builder,
            problem,
            max_length=self.max_length,
            max_new_tokens=self.max_new_tokens,
            policy=self.policy,
        )
        assert pair is not None, "RunData.load kept only the problems that fit"
        return pair

    def pair_with(self, problem: Problem, solution: str) -> PromptPair | None:
        """Return both prompts of a problem with another solution for the teacher; None where they do not fit.

        The policy "error" concerns the data of the user, and another solution can only be skipped, so "error" acts as
        "drop".
        """
        return fit_teacher_prompt(
            self.builder,
            replace(problem, solution=solution),
            max_length=self.max_length,
            max_new_tokens=self.max_new_tokens,
            policy="drop" if self.policy == "error" else self.policy,
        )

    def has_solution(self, problem: Problem) -> bool:
        """Return True: the data give a solution to every problem."""
        return True

    def choose(self, answers: Sequence[Answer]) -> tuple[list[Answer], Mapping[str, float]]:
        """Return all answers as they are."""
        return list(answers), {}

    def record(self, answers: Sequence[Answer], guided: Collection[str]) -> Prompts:
        """Return these prompts: no answer changes them."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return null for the parts that only decorated prompts have."""
        return {"success": None, "own": None}

    def restored(self, state: Mapping[str, Any]) -> Prompts:
        """Return these prompts, which have no state."""
        return self


class Rewarder(Protocol):
    """The rewards of a step's answers."""

    @property
    def phase(self) -> str:
        """The phase of a step that the work of `rewarded` belongs to."""
        ...

    def rewarded(self, answers: Sequence[Answer]) -> tuple[list[Answer], Mapping[str, float]]:
        """Return the answers of this replica with their rewards, and metrics of the rewards.

        All ranks of the replica give the same answers and get the same rewards; the metrics are equal on all ranks.
        Collective over the world.
        """
        ...


@dataclass(frozen=True)
class Judge:
    """The verdicts of a verifier on the answers of all replicas."""

    verifier: Verifier
    tokenizer: Tokenizer
    grid: RankGrid
    reward: Reward | None = None
    """The function that rewards responses; None is 1 for the verdict right, else 0."""
    confidence: re.Pattern[str] | None = None
    """The pattern of a stated confidence, which verifier and reward function do not see; None hides nothing."""

    @property
    def phase(self) -> str:
        """The phase of a step that verdicts belong to: that of the responses."""
        return "rollout"

    def right(self, answers: Sequence[Answer]) -> list[bool]:
        """Return whether each answer of this replica is right, equal on all ranks of the replica.

        A truncated response is wrong.  Collective over the world.
        """
        return judge(self._questions(answers), self.verifier, self.grid)

    def rewards(self, answers: Sequence[Answer]) -> list[float]:
        """Return the reward of each answer of this replica, equal on all ranks of the replica.

        A truncated response has 0.  Collective over the world.
        """
        return rewards(self._questions(answers), self.reward or self.verifier, self.grid)

    def rewarded(self, answers: Sequence[Answer]) -> tuple[list[Answer], Mapping[str, float]]:
        """Return the answers with their `rewards`, and no metrics of its own.  Collective over the world."""
        found = self.rewards(answers)
        return [replace(answer, reward=reward) for answer, reward in zip(answers, found, strict=True)], {}

    def _questions(self, answers: Sequence[Answer]) -> list[tuple[Problem, str | None]]:
        return [(answer.problem, None if answer.response.truncated else self._text(answer)) for answer in answers]

    def _text(self, answer: Answer) -> str:
        return judged_text(answer.response, self.tokenizer, self.confidence)[2]
