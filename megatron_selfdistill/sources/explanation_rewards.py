# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Explanations that a policy writes after it has seen the solution, and their rewards, as in RLT (arXiv 2506.08388)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_selfdistill.config.schema.policy_config import ExplanationConfig
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.data.tokenizer import Tokenizer
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.recipes.explanation_reward import ExplanationReward, explanation_reward
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.sources.problem_prompts import Answer
from megatron_selfdistill.sources.reward_metrics import over_replicas

LogProbs = Callable[[Sequence[ContextPair], float], tuple[Tensor, Tensor]]
"""A function of this replica's contexts and of a temperature that returns the log-probs of every response token under
the student after the student's prompt, and under the teacher after the teacher's prompt, [R] float64 each, on the host.
Collective over the world."""


@dataclass(frozen=True)
class Explanation:
    """The explanation in a response: its tokens before the closing tag."""

    token_ids: list[int]
    has_closing_tag: bool

    def text(self, tokenizer: Tokenizer) -> str:
        """Return the explanation without special tokens and without white space at its ends."""
        return tokenizer.decode(self.token_ids, skip_special_tokens=True).strip()


def explanation_in(response: Response, tokenizer: Tokenizer, closing_tag: str) -> Explanation:
    """Return the explanation in ``response``: the tokens before the first ``closing_tag``.

    A token that holds the end of the explanation and the beginning of the tag belongs to the tag.  Without a tag the
    explanation is the whole response without its stop token.
    """
    ids = response.token_ids
    position = tokenizer.decode(ids).find(closing_tag.strip())
    if position < 0:
        return Explanation(ids if response.truncated else ids[:-1], has_closing_tag=False)
    count = bisect_right(range(len(ids) + 1), position, key=lambda end: len(tokenizer.decode(ids[:end]))) - 1
    return Explanation(ids[:count], has_closing_tag=True)


@dataclass(frozen=True)
class ExplanationRewards:
    """The rewards of explanations, as recipes/explanation_reward.py defines them: a `Rewarder`.

    The policy reads an explanation after the teacher's prompt, which shows the solution.  The frozen weights S read it
    after the student's prompt, and the solution after prompt, explanation and closing tag.  An explanation without
    tokens has r_KL = 0.
    """

    settings: ExplanationConfig
    builder: PromptBuilder
    log_probs: LogProbs
    """The log-probs of the policy as the student and of S as the teacher."""
    grid: RankGrid

    @property
    def phase(self) -> str:
        """The phase of a step that the passes of both models belong to."""
        return "measure"

    def rewarded(self, answers: Sequence[Answer]) -> tuple[list[Answer], Mapping[str, float]]:
        """Return the answers with their rewards, equal on all ranks of the replica, and the means of the terms.

        Collectives over the world: those of ``log_probs``; one sum over the data-parallel ranks.
        """
        tag, tokenizer = self.settings.closing_tag, self.builder.tokenizer
        explanations = [explanation_in(answer.response, tokenizer, tag) for answer in answers]
        pairs = [
            *(self._explaining(answer, e.token_ids) for answer, e in zip(answers, explanations, strict=True)),
            *(self._solving(answer, e.token_ids) for answer, e in zip(answers, explanations, strict=True)),
        ]
        policy, student = self.log_probs(pairs, self.settings.temperature)
        lengths = [len(pair.response) for pair in pairs]
        of_policy, of_student = policy.split(lengths), student.split(lengths)
        found = [
            self._reward(of_policy[i], of_student[i], of_student[len(answers) + i], explanation.has_closing_tag)
            for i, explanation in enumerate(explanations)
        ]
        rewarded = [replace(answer, reward=reward.total) for answer, reward in zip(answers, found, strict=True)]
        return rewarded, self._metrics(found)

    def _reward(self, policy: Tensor, student: Tensor, solution: Tensor, has_closing_tag: bool) -> ExplanationReward:
        settings = self.settings
        silent = len(policy) == 0
        return explanation_reward(
            solution,
            policy.new_zeros(1) if silent else policy,
            student.new_zeros(1) if silent else student,
            has_closing_tag=has_closing_tag,
            alpha=settings.alpha,
            ratio_weight=settings.ratio_weight,
            missing_tag_penalty=settings.missing_tag_penalty,
        )

    def _explaining(self, answer: Answer, explanation: list[int]) -> ContextPair:
        """Return the explanation after the solution for the policy, and after the problem alone for S."""
        plain, hinted = answer.prompts.student_prompt, answer.prompts.teacher_prompt
        return ContextPair(answer.problem.id, hinted, plain, explanation, answer.response.truncated)

    def _solving(self, answer: Answer, explanation: list[int]) -> ContextPair:
        """Return the solution after problem, explanation and closing tag; of its two readers only S counts."""
        before = [*answer.prompts.student_prompt, *explanation, *self._encoded(self.settings.closing_tag)]
        return ContextPair(answer.problem.id, before, before, self._encoded(answer.problem.solution), truncated=False)

    def _encoded(self, text: str) -> list[int]:
        return self.builder.tokenizer.encode(text)

    def _metrics(self, found: Sequence[ExplanationReward]) -> dict[str, float]:
        sums: list[float] = [sum(reward.solution for reward in found), sum(reward.divergence for reward in found)]
        sums += [sum(reward.has_closing_tag for reward in found), len(found)]
        solution, divergence, tags, number = over_replicas(sums, self.grid)
        number = max(number, 1)
        return {
            "explanations/solution_log_prob": solution / number,
            "explanations/log_ratio": divergence / number,
            "explanations/closing_tags": tags / number,
        }


def check_room_for_solutions(
    problems: Sequence[Problem], builder: PromptBuilder, closing_tag: str, *, max_length: int, max_new_tokens: int
) -> None:
    """Raise `ConfigError` where a problem, an explanation, the closing tag and the solution are together too long.

    ``max_length``: the largest number of tokens of a context; ``max_new_tokens``: that of an explanation.
    """
    tokenizer = builder.tokenizer
    prompts = tokenizer.encode_batch([builder.student_text(problem) for problem in problems])
    solutions = tokenizer.encode_batch([problem.solution for problem in problems])
    tag = len(tokenizer.encode(closing_tag))
    for problem, prompt, solution in zip(problems, prompts, solutions, strict=True):
        length = len(prompt) + max_new_tokens + tag + len(solution)
        if not solution or length > max_length:
            raise ConfigError(
                f"{problem.location}: policy.reward=explanation reads the solution after the prompt, an explanation of "
                f"up to {max_new_tokens} tokens and explanation.closing_tag: expected a solution of at least one token "
                f"and at most {max_length} tokens together, got {len(solution)} and {length}; raise data.max_length, "
                "lower rollout.max_new_tokens or remove the problem"
            )
