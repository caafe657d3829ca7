# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The learnability of a text after Sakana's RLT.

`score_texts` reduces the numbers of a text's tokens to one learnability.  For a text y of n tokens that the student
sampled for the problem x, and a teacher's prompt x' that shows the reference as well:

    l_t = log p(y_t | x, y_<t)                    D_t = KL(p(. | x, y_<t) || p_teacher(. | x', y_<t))
    r_SS = mean_t l_t + alpha min_t l_t           high if the student could generate every token itself
    r_KL = mean_t D_t + alpha max_t D_t           low if the student foresees the teacher without the reference
    learnability = r_SS - ratio_weight r_KL

Source: Cetin, Zhao, Tang 2025 (arXiv 2506.08388, SakanaAI/RLT `teacher_rewards.py`), whose reward is r_SS - 3 r_KL with
alpha = 0.01; methods/rlt.py has this reward itself.  There a trained teacher generates an explanation;
r_SS scores the given *solution* conditioned on question and explanation, and r_KL scores the *explanation*.  Here the
candidate is both, since a model's own solution holds its reasoning and its answer: the student scores it conditioned on
the problem alone (r_SS), and both models score it conditioned on their prompts (r_KL).  RLT takes the sampled log-ratio
log p_teacher(y_t) - log p(y_t) for D_t, which estimates KL(teacher || student) for tokens that the teacher sampled.
For tokens that the student sampled the log-ratio estimates -KL(student || teacher), and the score would rise as the
teacher finds the text less likely.  Therefore D_t is the divergence over the whole vocabulary.

The reference in the teacher's prompt is the solution of the data or, where the data have no solution, the answer.  The
reference is never the candidate, which the teacher would only copy.  The score takes log-probs at temperature 1
(RLT: 0.7), nothing is clipped, and RLT's term for missing tags does not exist here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from megatron_selfdistill.config import Config
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.fitted_prompts import fit_teacher_prompt
from megatron_selfdistill.data.given_solutions import build_contexts
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.rollout.base import Response

ReadTokens = Callable[[Sequence[ContextPair]], Tensor]
"""A function that returns log p, log p_teacher and KL(p || p_teacher) of every response token, as `read_tokens`."""


@dataclass(frozen=True)
class Scores:
    """Statistics of log-probs and divergences of one text over its tokens, in nats per token."""

    mean_log_prob: float
    """Mean over t of l_t."""
    min_log_prob: float
    """Minimum over t of l_t."""
    mean_kl: float
    """Mean over t of D_t."""
    max_kl: float
    """Maximum over t of D_t."""

    def learnability(self, alpha: float, ratio_weight: float) -> float:
        """Return ``(mean l + alpha min l) - ratio_weight (mean D + alpha max D)``.

        A text with a greater value is easier to learn from.
        """
        solution = self.mean_log_prob + alpha * self.min_log_prob
        return solution - ratio_weight * (self.mean_kl + alpha * self.max_kl)


def score_texts(pairs: Sequence[ContextPair], read: ReadTokens) -> list[Scores]:
    """Return the `Scores` of each pair's response, of at least one token, its stop token included, one per pair.

    ``read``, memory, collectives, errors and the bits of the result: as for `read_tokens`.
    """
    values = read(pairs)
    lengths = [len(pair.response) for pair in pairs]
    return [_scores(own[0], own[2]) for own in values.split(lengths, dim=1)] if pairs else []


def learnabilities(
    candidates: Sequence[tuple[Problem, Response]],
    read: ReadTokens,
    config: Config,
    run_data: RunData,
    alpha: float,
    ratio_weight: float,
) -> list[float]:
    """Return the `Scores.learnability` of each response to its problem, in the contexts of `candidate_contexts`.

    ``alpha``, ``ratio_weight``: the arguments of `Scores.learnability`.

    Collectives and errors: as for `score_texts` and `candidate_contexts`.
    """
    pairs = candidate_contexts(candidates, config, run_data)
    return [scores.learnability(alpha, ratio_weight) for scores in score_texts(pairs, read)]


def candidate_contexts(
    candidates: Sequence[tuple[Problem, Response]], config: Config, run_data: RunData
) -> list[ContextPair]:
    """Return each candidate conditioned on its problem, and on the teacher's prompt with the problem's reference.

    The reference is the given solution, or the answer where the solution is empty.
    Raises: ValueError for a problem with neither solution nor answer, or one whose prompts leave no room.
    """
    max_length, max_new_tokens = run_data.max_length, config.rollout.max_new_tokens
    limits: dict[str, Any] = {
        "max_length": max_length,
        "max_new_tokens": max_new_tokens,
        "policy": config.data.on_long_context,
    }
    prompts = []
    for problem, _ in candidates:
        pair = fit_teacher_prompt(run_data.builder, with_reference(problem), **limits)
        if pair is None:
            raise ValueError(
                f"{problem.location}: expected prompts of at most {max_length - max_new_tokens} tokens, to which a "
                "candidate can be appended, got longer prompts; remove the problem."
            )
        prompts.append(pair)
    return build_contexts(prompts, [response for _, response in candidates])


def with_reference(problem: Problem) -> Problem:
    """Return ``problem`` with its reference, the text in the scoring teacher's prompt, as the solution.

    Raises: ValueError where the problem has neither solution nor answer.
    """
    reference = problem.solution or problem.answer
    if not reference:
        raise ValueError(
            f"{problem.location}: expected a solution or an answer, from which the teacher can foresee a text, got "
            "neither of them; choose method.pick=shortest, most_likely or random."
        )
    return replace(problem, solution=reference)


def _scores(log_probs: Tensor, divergences: Tensor) -> Scores:
    return Scores(log_probs.mean().item(), log_probs.min().item(), divergences.mean().item(), divergences.max().item())
