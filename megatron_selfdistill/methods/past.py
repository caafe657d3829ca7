# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""PAST: the teacher also reads the finished attempt that it scores, and its weights learn to succeed after failed ones.

Algorithm: The student samples a response, which the verifier judges. The teacher's prompt shows the solution, the whole
response and its verdict, and the student learns what the teacher says at each token of the same response. The teacher
is trained, too. After its prompt with a right attempt it learns what the student says, so that right attempts stay as
they are. After its prompt with a failed attempt it answers again, and learns the rewards of these retries, near the
student. Teacher and student share the current weights, and differ in their prompts.

Equation:

    attempts, after the plain prompt:            w = N / N_S,            D = KL(teacher || student)
    right attempts, after the teacher's prompt:  w = preserve N / N_R,   D = KL(student || teacher)
    retries, after the teacher's prompt:         w = 0
        a = N / N_F rho ( A + proximity (log s - log t) ),  A with the clip of PPO
    A = (reward - mean) / (std + 1e-6) over the retries of one failed attempt

In each line the first distribution of D is a constant. s and t are the probabilities of a token under student and
teacher, and the second part of a is the gradient of the k3 estimator of KL(teacher || student). N_S, N_R and N_F count
the tokens of the three parts, and N all of them: each part is a mean over its own tokens. The other names are those of
the settings. The first method.teacher_steps steps leave the student's part out. With method.weight=0 the teacher's
parts are left out: then the teacher reads the attempt, and nothing adapts it.

Paper: PAST, Feng et al. (arXiv 2608.08726), of which the abstract was read, and a summary by others that has figures
of the text. No code of the authors was found. Published in the abstract are the finished attempt as a further hint,
prefixes of the student alone, the student's distribution for right attempts, an adaptation towards verified success
near the student for failed ones, and forward KL for the student. The gain over OPSD is 5.6 points of avg@12.
Second-hand: reading the attempt alone gives .6 of them and adapting the teacher alone .1, and failed attempts whose
retries all fail may be skipped.

Differences:
- The abstract states no loss of the teacher. Ours are both divergences in the directions above, rewards by policy
  gradients as in pi_distill, 4 retries, preserve = 1 and proximity = .25.
- Ours are shared weights, of which the first 25 steps train the teacher alone, and the others both. The abstract speaks
  of a frozen student, and a list of papers of an adaptation before the distillation, so that the published teacher
  probably has weights of its own.
- Ours are the wording and the verdict as a word (method.hint_template); without {solution} the attempt stands alone.

Expected: It breaks a base that has never read an attempt. On subtraction with one response to each of 32 problems, the
mean reward of the retries rises from .04 to .82 in the 25 steps that train the teacher alone, so that the adaptation
works. The student's sampled accuracy is .33 at step 15, .25 at step 30 and .01 at step 45 (3e-4, seed 5, one run of 60
steps). `loss/mean` of the teacher's part is 5.8 nats per token at the first step and 3.3 when the student begins to
learn: the prompt takes the teacher far from the student. No base that can read an attempt from the start was measured,
and the rows of docs/recipes/comparison.md have not run on its seeds.

Known failure:
- The attempt in its prompt lets the teacher copy it: then it confirms every token, also of a failed attempt. Only the
  rewards of the retries work against this.
- A teacher that cannot read its longer prompt breaks the student, although its own retries succeed: see `loss/mean` at
  the first step, which has the teacher's part alone.
- A failed attempt whose retries are all right or all wrong teaches the teacher nothing: `retries/mixed_share`.
- The student trains the teacher's weights, too, since they are its own, and may unlearn to read the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_selfdistill.config import Config
from megatron_selfdistill.config.schema.field_checks import require, require_slots
from megatron_selfdistill.config.schema.method_config import FUNCTION, MEASURED, Needs
from megatron_selfdistill.config.schema.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, Text
from megatron_selfdistill.data.problem_sampler import ProblemSampler
from megatron_selfdistill.data.prompts import filled
from megatron_selfdistill.methods.default import Metrics
from megatron_selfdistill.methods.parts.hints import HintedLater, chosen_with_hints, hinted_responses
from megatron_selfdistill.methods.parts.settings import AdvantageSettings, DistillSettings
from megatron_selfdistill.methods.parts.terms import uniform, weighted_advantages
from megatron_selfdistill.rollout.base import SamplingParams, response_text
from megatron_selfdistill.sources.judge import over_replicas
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.signals import Signals, Terms

HINT_TEMPLATE = "Correct solution:\n\n{solution}\n\nAn earlier attempt, which is {verdict}:\n\n{attempt}"
"""What the teacher sees; ``method.hint_template`` replaces it."""


@dataclass(frozen=True)
class PastSettings(DistillSettings, AdvantageSettings):
    """The settings of PAST."""

    weight: NonNegativeFloat = 1.0
    """Weight of the advantages of the teacher's retries; with 0 there are none, and the teacher is not adapted."""
    preserve: NonNegativeFloat = 1.0
    """Weight of the divergence that holds the teacher at the student after a right attempt."""
    proximity: NonNegativeFloat = 0.25
    """Weight of KL(teacher || student), in its form for the sampled token, which holds the retries near the student."""
    teacher_steps: NonNegativeInt = 25
    """Number of steps at the start of the run that train the teacher alone; the student learns after them."""
    num_retries: PositiveInt = 4
    """Number of the teacher's responses after each failed attempt."""
    hint_template: Text | None = None
    """What the teacher sees in the place of a solution, with the slot {attempt}, and {solution} and {verdict} (right or
    wrong) if wanted.  Null takes the wording in methods/past.py."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_slots("method.hint_template", self.hint_template, ("attempt",), ("solution", "verdict"))

    @property
    def adapts(self) -> bool:
        """Whether the teacher is trained."""
        return self.weight > 0

    @property
    def needs(self) -> Needs:
        """What the method needs from the core."""
        return Needs(
            log_probs=MEASURED if self.adapts else None,
            rewards=True,
            contexts_per_sample=1 + self.num_retries if self.adapts else 1,
            asks_model=self.adapts,
            hint=FUNCTION,
        )

    required = ("data.kind=problems", "environment.name=none", "loss.normalize=tokens", "loss.rollout_correction=none")

    teacher_template = (
        "{problem}\n\nThe following is for your eyes only:\n\n{solution}\n\n"
        "Correctly solve the original question, in your own words."
    )

    def check(self, config: Config) -> None:
        """Raise `ConfigError` for a teacher that would not adapt."""
        super().check(config)
        weights = config.teacher.weights
        require(
            not self.adapts or (weights != "frozen" and self.num_retries > 1),
            "method.name=past adapts the teacher, which shares the student's weights, by comparing retries: it needs "
            "teacher.weights=current or ema and at least 2 for method.num_retries, or method.weight=0, got "
            f"{weights} and {self.num_retries}",
        )


@dataclass(frozen=True)
class Past(HintedLater):
    """Privileged adaptation from student trajectories."""

    Settings = PastSettings
    step: int = 0
    """The step that is under way."""

    def prepare(self, step: int, sampling: SamplingParams, problem_sampler: ProblemSampler) -> tuple[Past, Metrics]:
        """Return the method of the step, and no metrics."""
        return replace(self, step=step), {}

    def select(self, step: int, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return the attempts whose teacher sees them, and hints/share, the share of the attempts that fit.

        Collectives: one sum over the data-parallel ranks.
        """
        template, tokenizer = self.settings.hint_template or HINT_TEMPLATE, self.tools.run_data.tokenizer

        def hint(one: Rollout) -> str:
            verdict, attempt = "right" if one.correct else "wrong", response_text(one.response, tokenizer)
            return filled(template, {"solution": one.problem.solution, "verdict": verdict, "attempt": attempt})

        return chosen_with_hints(rollouts, list(map(hint, rollouts)), self.tools, keeps_unhinted=False)

    def texts(self, rollouts: Sequence[Rollout], selected: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return the attempts, the right ones after the teacher's prompt, and the retries, with metrics of these.

        The first method.teacher_steps steps leave out the attempts after the plain prompt, which train the student.

        The metrics: retries/reward_mean, and retries/mixed_share, the share of the failed attempts whose retries have
        different rewards.
        Collectives over the world: those of the sampler and of the judge; one sum over the data-parallel ranks.
        """
        if not self.settings.adapts:
            return list(selected), {}
        problems = {one.key: one.problem for one in rollouts}  # those of ``selected`` have the hint as their solution
        failed = [replace(one, problem=problems[one.key]) for one in selected if not one.correct]
        right = [replace(one.in_privileged_view(), part="view") for one in selected if one.correct]
        groups = self._retries(failed, first_group=1 + max((one.group for one in rollouts), default=0))
        num_mixed = sum(len({one.reward for one in group}) > 1 for group in groups)
        retries = [one for group in groups for one in group]
        total = sum(one.reward or 0.0 for one in retries)
        counts = over_replicas((total, len(retries), num_mixed, len(failed)), self.tools.grid)
        reward, number, mixed, num_failed = counts
        metrics = {"retries/reward_mean": reward / max(number, 1), "retries/mixed_share": mixed / max(num_failed, 1)}
        learned = selected if self.step >= self.settings.teacher_steps else []
        return [*learned, *right, *retries], metrics

    def terms(self, step: int, rollouts: Sequence[Rollout], signals: Signals) -> Terms:
        """Return the terms of `terms_of_parts`, or those of the student alone where the teacher is not adapted.

        Collectives: one sum over the data-parallel ranks.
        """
        own = self.settings
        if not own.adapts:
            return uniform(signals, weight=own.distill_weight, signal="full")
        retried = torch.tensor([one.key is None for one in rollouts], dtype=torch.bool)
        part = torch.where(retried, 2, signals.privileged.long())
        counts = torch.zeros(3, dtype=torch.int64).index_add_(0, part, signals.lengths)
        totals = torch.tensor(over_replicas(counts.tolist(), self.tools.grid), dtype=torch.float64)
        return terms_of_parts(signals, part, weighted_advantages(signals, own), totals, own)

    def _retries(self, failed: Sequence[Rollout], first_group: int) -> list[list[Rollout]]:
        """Return the rewarded retries of each failed attempt, in a group of its own, after the teacher's prompt."""
        number = self.settings.num_retries
        views = [replace(one.in_privileged_view(), key=None, part="view") for one in failed]
        asked = [replace(view, group=first_group + i) for i, view in enumerate(views) for _ in range(number)]
        with self.tools.phases("rollout"):
            responses = hinted_responses(self.tools, failed, number, "retry", self.step)
            answered = [replace(one, response=response) for one, response in zip(asked, responses, strict=True)]
            retries, _ = self.tools.judge.rewarded(answered)
        return [retries[i : i + number] for i in range(0, len(retries), number)]


def terms_of_parts(signals: Signals, part: Tensor, advantages: Tensor, totals: Tensor, settings: PastSettings) -> Terms:
    """Return terms under which a sum over N is the sum of three means, each over the tokens of its own part.

    ``part [B]``: 0 for an attempt after the plain prompt, 1 for a right one after the teacher's, 2 for a retry, for
    which alone ``advantages [B]`` counts.  ``totals [3]``: the numbers N_S, N_R and N_F of tokens of the global batch,
    whose sum is N.
    """
    factors = (totals.sum() / totals.clamp(min=1))[part]

    def weighted(*of_parts: float) -> Tensor:
        return signals.per_token(factors * torch.tensor(of_parts, dtype=torch.float64)[part])

    return Terms.of(
        signals.sampled_log_prob,
        divergence=weighted(settings.distill_weight, settings.preserve, 0.0),
        advantage=weighted(0.0, 0.0, 1.0) * signals.per_token(advantages),
        sampled_kl=weighted(0.0, 0.0, settings.proximity),
    )
