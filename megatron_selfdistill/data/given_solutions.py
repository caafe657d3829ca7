# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The prompts that show the teacher the solutions of the data, and the contexts of responses after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_selfdistill.data.contexts import ContextPair, PromptPair, SampledResponse
from megatron_selfdistill.data.fitted_prompts import fit_teacher_prompt
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder


def build_contexts(prompt_pairs: Sequence[PromptPair], responses: Sequence[SampledResponse]) -> list[ContextPair]:
    """Return one context pair per response; ``responses[i]`` answers ``prompt_pairs[i]``.

    Several samples of a problem have the same pair.  The token ids of responses are those that were sampled.
    """
    return [
        ContextPair(
            pair.problem_id,
            pair.student_prompt,
            pair.teacher_prompt,
            list(response.token_ids),
            response.truncated,
            teacher=pair.teacher,
            of_teachers=pair.of_teachers,
        )
        for pair, response in zip(prompt_pairs, responses, strict=True)
    ]


@dataclass(frozen=True)
class GivenSolutions:
    """Prompts that show the teacher the solutions of the data, which nothing changes."""

    builder: PromptBuilder
    max_length: int
    """The greatest length of prompt and response together, in tokens."""
    max_new_tokens: int
    """The greatest length of a response in tokens."""
    policy: str
    """``data.on_long_context``, as `fit_teacher_prompt` takes it."""

    def pair(self, problem: Problem) -> PromptPair:
        """Return both prompts of a problem; the teacher's prompt shows ``problem.solution``."""
        if not problem.shares:
            student, teacher = self.builder.prompt_pair(problem)
            if max(len(student), len(teacher)) <= self.max_length - self.max_new_tokens:
                return PromptPair(problem.id, student, teacher, problem.solution, teacher=problem.teacher)
        pair = fit_teacher_prompt(
            self.builder, problem, max_length=self.max_length, max_new_tokens=self.max_new_tokens, policy=self.policy
        )
        assert pair is not None, "RunData.load kept only the problems that fit"
        return pair

    def pair_with(self, problem: Problem, solution: str) -> PromptPair | None:
        """Return both prompts of a problem with another solution for the teacher; None if they do not fit.

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
