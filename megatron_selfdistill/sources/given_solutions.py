# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The prompts of problems: the student's prompt, and the teacher's prompt, which also shows a solution."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_selfdistill.data.contexts import PromptPair, fit_teacher_prompt
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder


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
