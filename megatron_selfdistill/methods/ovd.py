# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""OVD: the teacher scores responses with a digit, and low scores make way for responses after its own prompt.

Algorithm: The frozen weights read problem, solution and response, and say with one digit how good the response is
(method.template). A response with a score below method.threshold is replaced by a sample of the student after the
prompt with the solution. The policy then learns from the rewards of what is left, as in GRPO.

Equation: With the probabilities p of the ten digits as the first token of the teacher's answer:

    P(d) = p(d) / sum_e p(e)        S = sum_d d P(d)        a response is kept where S >= 5
    w = 0,   a = A min(rho, 2)
    A = (reward - mean) / (std + 1e-6) over the responses to the problem, replacements among them

For a replacement, mu is its probability after the privileged prompt, after which it was sampled; p is the student's
after the plain prompt.

Paper: OVD, on-policy verbal distillation (arXiv 2601.21968). Second-hand: the filter by digits from 0 to 9, the
replacement by a trajectory of the teacher, and GRPO with exact match as reward. Threshold and number of responses are
not public.

Differences:
- Ours: the score is the mean of the digit, which has no sampling noise (published: one sampled digit); the threshold 5;
  8 responses; the teacher is the frozen weights with the solution (published: another model); the student samples the
  replacement, and a ratio of at most 2 corrects for it.
- A later version of the paper continues a response from its last good step. With method.step_separator a replaced
  response keeps its beginning up to the last step whose score is at least the threshold. Ours: a step ends with a token
  that contains a line feed, and a beginning is kept only where data.max_length leaves room for a whole response.
- A step whose AUROC of scores and verdicts (`verbal/auroc`) does not exceed .5, or whose responses are all right or all
  wrong, is not filtered: `verbal/filters` is 0. Each digit must be one token of the tokenizer.

Expected: 100 steps of 4 x 8 responses raise the sampled accuracy from .32 to .50 where GRPO ends at .84
(docs/recipes/comparison.md).

Known failure:
- Scores inflate, and they favour long responses. `verbal/digit_mass` shows whether the teacher answers with a digit.
- A model that scores itself rates its own errors high: look at `verbal/auroc` before you trust a filter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from megatron_selfdistill.config.schema.field_checks import require_slots
from megatron_selfdistill.config.schema.method_config import Needs
from megatron_selfdistill.config.schema.ranges import OneOf, Text, at_least, at_most
from megatron_selfdistill.data.tokenizer import Tokenizer
from megatron_selfdistill.distributed.collectives import gather_items
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.methods.default import Metrics
from megatron_selfdistill.methods.grpo import Grpo, GrpoSettings
from megatron_selfdistill.rollout.base import Request, Response, response_text
from megatron_selfdistill.rollout.sampling import sample_seed
from megatron_selfdistill.sources.judge import over_replicas
from megatron_selfdistill.sources.rollouts import Rollout

DIGITS = "0123456789"
QUESTION = (
    "{problem}\n\nHere is the solution to this problem:\n\n{solution}\n\nHere is a response to it:\n\n{response}\n\n"
    "How good is the response, from 0 (useless) to 9 (flawless)? Answer with one digit."
)
"""The wording of the question where ``method.template`` is null."""
LARGEST = 9.0
"""The largest score."""


@dataclass(frozen=True)
class OvdSettings(GrpoSettings):
    """The settings of OVD."""

    use: Annotated[str, OneOf(("filter", "reward"))] = "filter"
    """The use of the scores, 0 to 9, that the teacher gives to responses: filter (a response with a score below
    threshold is replaced by one that is sampled after the teacher's prompt) or reward (a ninth of the score is the
    reward of the response)."""
    template: Text | None = None
    """Wording of the last user message with which the teacher is asked for a score.  It has the slots {problem} and
    {response}, and may have {solution}.  Null shows all three and asks for one digit from 0 to 9."""
    threshold: Annotated[float, at_least(0), at_most(9)] = 5.0
    """Score below which use=filter replaces a response."""
    step_separator: Text | None = None
    """Text in the token that ends a step of a response, such as a line feed.  Under use=filter a replaced response
    keeps its beginning up to its last step whose score is at least the threshold.  Null replaces whole responses."""

    required = ("environment.name=none", "rollout.guidance=none")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_slots("method.template", self.template, ("problem", "response"), ("solution",))

    @property
    def needs(self) -> Needs:
        """What the method needs from the core."""
        return replace(super().needs, scores=True)


class Ovd(Grpo):
    """GRPO on responses that the teacher has scored."""

    Settings = OvdSettings

    def check_data(self) -> None:
        """Raise `ConfigError` where a digit is no token, or an answer is missing."""
        if self.settings.use == "filter":
            super().check_data()
        digit_tokens(self.tools.run_data.tokenizer)

    @property
    def comparable(self) -> bool:
        """Whether the sampler's log-probs are those of the student: not where responses are replaced."""
        return bool(self.settings.use == "reward")

    def rewarded(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return the rollouts with their rewards: verdicts, or under use=reward a ninth of the score; and metrics."""
        if self.settings.use == "filter":
            return super().rewarded(rollouts)
        with self.tools.phases("measure"):
            scores, metrics = self._scores(rollouts)
        return [replace(one, reward=score / LARGEST) for one, score in zip(rollouts, scores, strict=True)], metrics

    def select(self, step: int, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return the rollouts, some of them replaced, and metrics.

        Collectives over the world: those of the teacher, of the sampler and of the judge; one all-gather of objects and
        one sum over the data-parallel ranks.
        """
        if self.settings.use == "reward":
            return list(rollouts), {}
        scores, metrics = self._scores(rollouts)
        pooled = gather_items([*zip(scores, (one.correct for one in rollouts), strict=True)], self.tools.grid.dp_group)
        area = auroc([score for score, _ in pooled], [right for _, right in pooled])
        filters = area is not None and area > 0.5
        metrics = {**metrics, "verbal/filters": float(filters), "verbal/replaced": 0.0}
        if area is not None:
            metrics["verbal/auroc"] = area
        if not filters:
            return list(rollouts), metrics
        low = [i for i, score in enumerate(scores) if score < self.settings.threshold]
        kept = self._kept([rollouts[i] for i in low])
        replaced = self._replacements(step, [rollouts[i] for i in low], kept)
        chosen = list(rollouts)
        for i, rollout in zip(low, replaced, strict=True):
            chosen[i] = rollout
        num_replaced, number, num_continued = over_replicas(
            (len(low), len(rollouts), sum(count > 0 for count in kept)), self.tools.grid
        )
        metrics["verbal/replaced"] = num_replaced / max(number, 1)
        if self.settings.step_separator is not None:
            metrics["verbal/continued"] = num_continued / max(num_replaced, 1)
        return chosen, metrics

    def _kept(self, rollouts: Sequence[Rollout]) -> list[int]:
        """Return the number of tokens that each replaced response keeps.  Collective, as `_scores` is."""
        if self.settings.step_separator is None:
            return [0] * len(rollouts)
        ends = [self._step_ends(rollout) for rollout in rollouts]
        beginnings = [
            replace(rollout, response=Response.unsampled(rollout.response.token_ids[:end], "length"))
            for rollout, of_answer in zip(rollouts, ends, strict=True)
            for end in of_answer
        ]
        scores = iter(self._scores(beginnings)[0])
        return [
            max((end for end in of_answer if next(scores) >= self.settings.threshold), default=0) for of_answer in ends
        ]

    def _step_ends(self, rollout: Rollout) -> list[int]:
        """Return the lengths of the beginnings of a response that end with a step and leave room for a response."""
        ids, decode = rollout.response.token_ids, self.tools.run_data.tokenizer.decode
        room = (
            self.tools.run_data.max_length
            - len(rollout.prompts.teacher_prompt)
            - self.tools.config.rollout.max_new_tokens
        )
        last = min(room, len(ids) - 1)
        return [end for end in range(1, last + 1) if str(self.settings.step_separator) in decode([ids[end - 1]])]

    def _replacements(self, step: int, rollouts: Sequence[Rollout], kept: Sequence[int]) -> list[Rollout]:
        seen: Counter[tuple[str, int]] = Counter()
        requests = []
        for rollout, count in zip(rollouts, kept, strict=True):
            own = rollout.problem.id, rollout.group
            name = f"verbal/{rollout.problem.id}"
            prompt = [*rollout.prompts.teacher_prompt, *rollout.response.token_ids[:count]]
            requests.append(Request(prompt, sample_seed(self.tools.config.seed, step, name, seen[own])))
            seen[own] += 1
        responses = self.tools.generate(step, requests)
        sampled = [
            replace(
                rollout,
                response=_continued(rollout.response, count, rest, self.tools.config.rollout.max_new_tokens),
                reward=None,
            )
            for rollout, count, rest in zip(rollouts, kept, responses, strict=True)
        ]
        return self.rewarded(sampled)[0]

    def warnings(self, metrics: Metrics) -> list[str]:
        """Return a warning if the teacher's scores of a step do not filter its responses."""
        if metrics.get("verbal/filters") != 0:
            return []
        area = metrics.get("verbal/auroc")
        found = "responses of one kind only" if area is None else f"an AUROC of {area:.2f}"
        return [
            "warning: the teacher's scores did not filter the responses of this step, because they must tell right "
            f"from wrong responses with an AUROC above .5: got {found}"
        ]

    def _scores(self, rollouts: Sequence[Rollout]) -> tuple[list[float], Mapping[str, float]]:
        """Return the score of each rollout of this replica, 0 to 9, and metrics.

        The scores are equal on all ranks of the replica, and the metrics on all ranks.
        Collectives over the world: those of the teacher's pass; one sum over the data-parallel ranks.
        """
        digits = digit_tokens(self.tools.run_data.tokenizer)
        log_probs = self.tools.models.candidate_log_probs([self._question(rollout) for rollout in rollouts], digits)
        found: list[float] = verbal_scores(log_probs).tolist()
        total, mass, number = over_replicas((sum(found), log_probs.exp().sum().item(), len(found)), self.tools.grid)
        number = max(number, 1)
        return found, {"verbal/score_mean": total / number, "verbal/digit_mass": mass / number}

    def _question(self, rollout: Rollout) -> list[int]:
        """Return the prompt that asks for the score; a response that is too long loses its beginning."""
        run_data = self.tools.run_data
        response = response_text(rollout.response, run_data.tokenizer)
        while True:
            slots = {"solution": rollout.prompts.solution, "response": response}
            prompt = run_data.builder.filled_prompt(rollout.problem, self.settings.template or QUESTION, slots)
            excess = len(prompt) + 1 - run_data.max_length  # the digit follows
            if excess <= 0 or not response:
                return prompt
            response = response[excess:]


def _continued(response: Response, count: int, rest: Response, limit: int) -> Response:
    """Return the first ``count`` tokens of ``response`` with ``rest`` after them, cut to ``limit`` tokens."""
    if count == 0:
        return rest
    token_ids = [*response.token_ids[:count], *rest.token_ids]
    return replace(
        rest,
        token_ids=token_ids[:limit],
        log_probs=[*response.log_probs[:count], *rest.log_probs][:limit],
        sampled_log_probs=[*response.sampled_log_probs[:count], *rest.sampled_log_probs][:limit],
        finish_reason=rest.finish_reason if len(token_ids) <= limit else "length",
    )


def verbal_scores(log_probs: Tensor) -> Tensor:
    """Return S [B] float64 of the log-probs of the digits 0 to 9, ``[B, 10]``."""
    shares = log_probs.double().softmax(-1)
    return shares @ torch.arange(len(DIGITS), dtype=torch.float64, device=shares.device)


def auroc(scores: Sequence[float], right: Sequence[bool]) -> float | None:
    """Return the share of (right, wrong) pairs in which the right response has the larger score; equal scores are half.

    The result is None without right or without wrong responses.  It is the same for S and for log S.
    """
    of = torch.tensor(scores, dtype=torch.float64)
    is_right = torch.tensor(right, dtype=torch.bool)
    differences = of[is_right][:, None] - of[~is_right][None, :]
    if differences.numel() == 0:
        return None
    return float(((differences > 0).double() + 0.5 * (differences == 0).double()).mean())


def digit_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of the digits 0 to 9.  Raises: `ConfigError` where a digit is not one token of its own."""
    encoded = [tokenizer.encode(digit) for digit in DIGITS]
    for digit, ids in zip(DIGITS, encoded, strict=True):
        if len(ids) != 1 or encoded.count(ids) > 1:
            raise ConfigError(
                f"data.tokenizer={tokenizer.name}: the scores of method.name=ovd are "
                f"read from the tokens of ten digits: expected one token for {digit}, got the tokens {ids}; choose "
                "another method"
            )
    return [ids[0] for ids in encoded]
