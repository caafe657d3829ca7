# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""RLT: explanations that a policy writes after it has seen the solution, rewarded by a student that reads them.

Algorithm: The policy samples 64 explanations after the problem and its solution, and is trained after the same prompt.
The frozen weights of the start are the student S: they read the explanation e up to method.closing_tag and then the
solution, and the better they predict its m tokens y, the greater the reward. They are also the reference of the KL
penalty. Afterwards another student is fine-tuned on explanations of the trained policy.

Equation: With all log-probs of the reward at temperature .7:

    l_t  = log S(y_t | problem, e, tag, y_<t)
    d_t  = log pi(e_t | problem, solution, e_<t) - log S(e_t | problem, e_<t)
    r_SS = mean l + .01 min l          r_KL = mean d + .01 max d
    reward = r_SS - 3 r_KL             less 1 where the closing tag is missing
    w = .04,  D = KL(policy || frozen weights after the same prompt)
    a = A rho,  0 where the clip of .2 holds
    A = (reward - mean) / (std + 1e-6) over the 64 explanations of the problem

All tokens of a response have the same advantage, also those after the tag. w is method.kl_weight.

Paper: RLT, Cetin et al. (arXiv 2506.08388, code SakanaAI/RLT). Published are the reward with its constants, 64
explanations per problem and 1024 per step, w, a constant learning rate of 1e-6, 125 steps, and the warm-up by SFT.

Differences:
- The paper writes a KL per token for d_t, and its code takes the sampled difference, as this method does.
- Ours: S is the frozen weights (published: a student model of its own), and so is the reference (published: it moves to
  .9 of the policy every 32 steps). The KL penalty is over the whole vocabulary (published: the sampled token).
- Ours: explanations are sampled at temperature 1, because the loss takes p at temperature 1 and the clip would
  otherwise hold most tokens; the wording of the prompt; an explanation without tokens has r_KL = 0.

Command: `selfdistill explanations --help` explains the second command, which a kill does not harm. Its explanations end
in tag and solution, so that SFT trains on both. Problem, longest explanation, tag and solution must fit into
data.max_length together.

    selfdistill recipe=rlt checkpoint.load=... data.tokenizer=... data.path=problems.jsonl run_dir=runs/rlt
    selfdistill explanations --out explained.jsonl recipe=rlt checkpoint.load=runs/rlt/checkpoints ...
    selfdistill method.name=sft checkpoint.load=... data.tokenizer=... data.path=explained.jsonl run_dir=runs/student

Expected: A student that is fine-tuned on explanations of the trained policy reaches .91 sampled, from .32, and .79 on
explanations of the base (docs/recipes/comparison.md).

Known failure:
- r_SS is maximal for an explanation that quotes the solution, and only r_KL holds this back. The terms are
  `explanations/solution_log_prob` and `explanations/log_ratio`.
- A base that does not write the closing tag (`explanations/closing_tags`) starts with a penalty: warm it up by SFT.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_selfdistill.config.schema.method_config import SAME, TEACHER, Needs
from megatron_selfdistill.config.schema.ranges import NonNegativeFloat, PositiveFloat, Temperature, Text
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.tokenizer import Tokenizer
from megatron_selfdistill.methods.default import Metrics
from megatron_selfdistill.methods.grpo import Grpo, GrpoSettings
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.sources.judge import over_replicas
from megatron_selfdistill.sources.rollouts import Rollout


@dataclass(frozen=True)
class RltSettings(GrpoSettings):
    """The settings of RLT."""

    kl_weight: PositiveFloat = 0.04
    """Weight of the divergence from the frozen weights after the prompt of the samples, which holds the policy near the
    weights of the start."""
    closing_tag: Text = "</think>"
    """Text that ends an explanation.  The solution follows it when the frozen weights read the explanation, and in
    data sets of explanations.  White space at its ends is written there, and is not needed in a response."""
    temperature: Temperature = 0.7
    """Divisor of the logits of all log-probs of the reward."""
    alpha: NonNegativeFloat = 0.01
    """Weight of the least likely token of the solution in r_SS, and of the largest log-ratio of the explanation in
    r_KL."""
    ratio_weight: NonNegativeFloat = 3.0
    """Weight of r_KL, the log-ratio of the policy, which sees the solution, and the frozen weights, which do not."""
    missing_tag_penalty: NonNegativeFloat = 1.0
    """Number that is subtracted from the reward of an explanation without its closing tag."""

    required = ("teacher.weights=frozen", "environment.name=none", "data.kind=problems")

    @property
    def needs(self) -> Needs:
        """What the method needs from the core."""
        return replace(super().needs, teacher_prompt=SAME, samples=TEACHER, scores=True)


class Rlt(Grpo):
    """GRPO on explanations, with a KL penalty."""

    Settings = RltSettings

    def check_data(self) -> None:
        """Accept all problems: the rewards need no answer."""

    def rewarded(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return the rollouts with their rewards, equal on all ranks of the replica, and the means of the terms.

        Collectives over the world: those of a pass of both models; one sum over the data-parallel ranks.
        """
        tag, tokenizer = self.settings.closing_tag, self.tools.given.builder.tokenizer
        explanations = [explanation_in(rollout.response, tokenizer, tag) for rollout in rollouts]
        pairs = [
            *(self._explaining(rollout, e.token_ids) for rollout, e in zip(rollouts, explanations, strict=True)),
            *(self._solving(rollout, e.token_ids) for rollout, e in zip(rollouts, explanations, strict=True)),
        ]
        with self.tools.phases("measure"):
            policy, student, _ = self.tools.models.read_tokens(pairs, self.settings.temperature)
        lengths = [len(pair.response) for pair in pairs]
        of_policy, of_student = policy.split(lengths), student.split(lengths)
        found = [
            self._reward(of_policy[i], of_student[i], of_student[len(rollouts) + i], explanation.has_closing_tag)
            for i, explanation in enumerate(explanations)
        ]
        rewarded = [replace(one, reward=reward) for one, (reward, _, _) in zip(rollouts, found, strict=True)]
        sums = sum(r_ss for _, r_ss, _ in found), sum(r_kl for _, _, r_kl in found)
        tags = sum(explanation.has_closing_tag for explanation in explanations)
        solution, divergence, num_tags, number = over_replicas((*sums, tags, len(found)), self.tools.grid)
        number = max(number, 1)
        return rewarded, {
            "explanations/solution_log_prob": solution / number,
            "explanations/log_ratio": divergence / number,
            "explanations/closing_tags": num_tags / number,
        }

    def _reward(
        self, policy: Tensor, student: Tensor, solution: Tensor, has_closing_tag: bool
    ) -> tuple[float, float, float]:
        """Return the reward of one explanation, r_SS and r_KL, in nats per token, computed in float64.

        ``policy``, ``student`` [n]: the log-probs of the explanation's tokens.  ``solution`` [m]: those of the solution
        after question and explanation, under the student.  An explanation without tokens has r_KL = 0.
        """
        own, foreseen, ratio = self.settings, solution.double(), policy.double() - student.double()
        r_ss = (foreseen.mean() + own.alpha * foreseen.min()).item()
        r_kl = (ratio.mean() + own.alpha * ratio.max()).item() if len(ratio) else 0.0
        penalty = 0.0 if has_closing_tag else own.missing_tag_penalty
        return r_ss - own.ratio_weight * r_kl - penalty, r_ss, r_kl

    def _explaining(self, rollout: Rollout, explanation: list[int]) -> ContextPair:
        """Return the explanation after the solution for the policy, and after the problem alone for S."""
        plain, hinted = rollout.prompts.student_prompt, rollout.prompts.teacher_prompt
        return ContextPair(rollout.problem.id, hinted, plain, explanation, rollout.response.truncated)

    def _solving(self, rollout: Rollout, explanation: list[int]) -> ContextPair:
        """Return the solution after problem, explanation and closing tag; of its two readers only S counts."""
        before = [*rollout.prompts.student_prompt, *explanation, *self._encoded(self.settings.closing_tag)]
        return ContextPair(rollout.problem.id, before, before, self._encoded(rollout.problem.solution), truncated=False)

    def _encoded(self, text: str) -> list[int]:
        return self.tools.given.builder.tokenizer.encode(text)


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
