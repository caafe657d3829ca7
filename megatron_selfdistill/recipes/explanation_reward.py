# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The reward of RLT for an explanation, with which reinforcement learning trains a teacher that sees the solution.

A policy reads a question and its solution and samples an explanation e of n tokens.  A student S, which is not trained,
reads the explanation.  With the m tokens y of the given solution:

    l_t = log S(y_t | question, e, y_<t)
    d_t = log policy(e_t | question, solution, e_<t) - log S(e_t | question, e_<t)
    r_SS = mean_t l_t + alpha min_t l_t           high if the student can produce the solution after the explanation
    r_KL = mean_t d_t + alpha max_t d_t           low if the student could have written the explanation itself
    reward = r_SS - ratio_weight r_KL - (missing_tag_penalty where the explanation lacks its closing tag)

Published: alpha = 0.01, ratio_weight = 3, missing_tag_penalty = 1, and log-probs at `TEMPERATURE` (Cetin, Zhao, Tang
2025, arXiv 2506.08388; code SakanaAI/RLT, `teacher_rewards.py`).  The paper writes a divergence in place of d_t, and
the code takes this sampled difference.  Its mean estimates KL(policy || S), because the policy itself has sampled the
explanation; `pipeline/score.py` scores texts of the student and therefore takes the divergence itself.

`log_probs` of `pipeline/score.py` returns the log-probs of both terms: l_t from pairs whose response is the solution,
and both parts of d_t from pairs whose response is the explanation.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

TEMPERATURE = 0.7
"""The number that divides the logits of all log-probs of the reward: the temperature at which RLT samples."""


@dataclass(frozen=True)
class ExplanationReward:
    """The reward of one explanation and its terms, in nats per token."""

    solution: float
    """r_SS."""
    divergence: float
    """r_KL."""
    has_closing_tag: bool
    """Whether the policy ended its explanation with the closing tag."""
    ratio_weight: float = 3.0
    """Weight of r_KL."""
    missing_tag_penalty: float = 1.0
    """Number that is subtracted where the closing tag is missing."""

    @property
    def total(self) -> float:
        """The reward: ``solution - ratio_weight divergence``, less the penalty where the tag is missing."""
        reward = self.solution - self.ratio_weight * self.divergence
        return reward if self.has_closing_tag else reward - self.missing_tag_penalty


def explanation_reward(
    solution_log_prob: Tensor,
    policy_log_prob: Tensor,
    student_log_prob: Tensor,
    *,
    has_closing_tag: bool,
    alpha: float = 0.01,
    ratio_weight: float = 3.0,
    missing_tag_penalty: float = 1.0,
) -> ExplanationReward:
    """Return the reward of one explanation, computed in float64.

    ``solution_log_prob`` [m]: l_t, the student's log-probs of the given solution's tokens after question and
    explanation.  ``policy_log_prob`` [n], ``student_log_prob`` [n]: the log-probs of the explanation's tokens under the
    policy, which sees the solution, and under the student, which sees the question alone.  All are in nats, and at
    `TEMPERATURE` for the published reward.  ``alpha``: the weight of the least likely token of the solution and of the
    largest ratio of the explanation.

    Collectives: none.  Raises: ValueError for a solution or an explanation without tokens, or log-probs of different
    explanations.
    """
    if solution_log_prob.numel() == 0 or policy_log_prob.numel() == 0:
        raise ValueError(
            "explanation_reward: expected a solution and an explanation of at least one token each, got "
            f"{solution_log_prob.numel()} and {policy_log_prob.numel()} tokens; leave the sample out."
        )
    if policy_log_prob.shape != student_log_prob.shape:
        raise ValueError(
            "explanation_reward: expected log-probs of the same explanation under policy and student, got shapes "
            f"{list(policy_log_prob.shape)} and {list(student_log_prob.shape)}."
        )
    solution = solution_log_prob.double()
    ratio = policy_log_prob.double() - student_log_prob.double()
    return ExplanationReward(
        solution=(solution.mean() + alpha * solution.min()).item(),
        divergence=(ratio.mean() + alpha * ratio.max()).item(),
        has_closing_tag=has_closing_tag,
        ratio_weight=ratio_weight,
        missing_tag_penalty=missing_tag_penalty,
    )
