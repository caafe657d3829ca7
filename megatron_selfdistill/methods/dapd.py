# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""DAPD: responses and solutions are texts, and student and teacher read each of them after hints that match.

Algorithm: The student samples one response y per problem x; the solution z of the data is the other text. Each of
six terms pulls the student towards the frozen weights on one of the two texts. In two of them the student reads the
problem alone, as it will later. In four of them the student reads a text as well, so that it knows at least what the
teacher knows.

Equation:

    loss = sum over i of w_i mean over the tokens of text i of D
    D = KL( teacher(. | x, hint) || student(. | x, hint') )

    term                  text   teacher's hint   student's hint   w
    entangled_rollout     y      z                none             2/15
    inference_reference   z      none             z                2/15
    privileged_rollout    y      z                y                2/15
    entangled_reference   z      y                none             2/5
    inference_rollout     y      none             y                2/5
    privileged_reference  z      y                z                4/5

The weights are the settings of these names. A hint is shown in the teacher's wording, except y before y: there the
student reads x, then y, and then y again.

Paper: DAPD, Wu et al. (arXiv 2608.01735), of which the abstract was read; terms, weights and constants are those of the
authors' code (uanu2002/DAPD). Published are forward KL over the whole vocabulary, the base as the teacher, 1024 new
tokens, a learning rate of 5e-6 that falls linearly (with LoRA of rank 64), and a limit of .1 for the gradient's norm.

Differences: In the published code the teacher of both entangled terms is a copy of the student, renewed every 100
steps; ours is the start throughout, as in their first 100 steps. The temperature of 1.1, the sampling with top_p and
top_k, and both limits (.1 for the gradient, and .05 for each token of the vocabulary) are not taken over. The means are
over the whole step. A problem is left out if one of its six contexts is too long.

Expected: 100 steps of 32 responses raise the sampled accuracy from .57 to .67 on additions, and lower it from .37 to
.0008 on subtraction with worked solutions (seed 21, the tasks of docs/recipes/comparison.md, with their learning rate;
one run each). Without both terms whose teacher sees the response, subtraction ends at .09.

Known failure:
- Four terms train the student after prompts that it never gets later. Nothing says how much they change after x alone.
- The solution must have the form of a response: else the terms on z teach another style.
- A teacher that believes the responses it is shown teaches their errors. This is a part of what happens on the
  subtraction above, where most responses of the base are wrong; the rest is not explained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_selfdistill.config.schema.method_config import MethodSettings, Needs
from megatron_selfdistill.config.schema.ranges import NonNegativeFloat
from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.methods.default import Metrics, SelfDistillation
from megatron_selfdistill.rollout.base import Response, response_text
from megatron_selfdistill.sources.judge import over_replicas
from megatron_selfdistill.sources.rollouts import Rollout
from megatron_selfdistill.sources.signals import Signals, Terms

TERMS = (
    *("entangled_rollout", "inference_reference", "privileged_rollout"),
    *("entangled_reference", "inference_rollout", "privileged_reference"),
)
"""The terms, in the order of a response's six texts."""


@dataclass(frozen=True)
class DapdSettings(MethodSettings):
    """The settings of DAPD."""

    entangled_rollout: NonNegativeFloat = 2 / 15
    """Weight of the response, whose teacher sees the solution."""
    inference_reference: NonNegativeFloat = 2 / 15
    """Weight of the solution, which the student sees before it and the teacher does not."""
    privileged_rollout: NonNegativeFloat = 2 / 15
    """Weight of the response, which the student sees before it, and whose teacher sees the solution."""
    entangled_reference: NonNegativeFloat = 2 / 5
    """Weight of the solution, whose teacher sees the response."""
    inference_rollout: NonNegativeFloat = 2 / 5
    """Weight of the response, which the student sees before it and the teacher does not."""
    privileged_reference: NonNegativeFloat = 4 / 5
    """Weight of the solution, which the student sees before it, and whose teacher sees the response."""

    needs = Needs(contexts_per_sample=len(TERMS))
    required = (
        *("data.kind=problems", "data.solutions=given", "environment.max_turns=1"),
        *("loss.normalize=tokens", "loss.rollout_correction=none"),
    )


class Dapd(SelfDistillation):
    """Dual-anchored policy distillation."""

    Settings = DapdSettings

    def texts(self, rollouts: Sequence[Rollout], selected: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return the six texts of each response, and hints/share: the share of the responses whose contexts all fit.

        Collectives: one sum over the data-parallel ranks.
        """
        found = [self._six(rollout) for rollout in selected]
        known = [six for six in found if six is not None]
        num_known, number = over_replicas((len(known), len(found)), self.tools.grid)
        return [text for six in known for text in six], {"hints/share": num_known / max(number, 1)}

    def terms(self, step: int, rollouts: Sequence[Rollout], signals: Signals) -> Terms:
        """Return the divergence with the weights of `matched_weights`.

        Collectives: one sum over the data-parallel ranks.
        """
        of_term = torch.arange(len(rollouts)) % len(TERMS)
        counts = torch.zeros(len(TERMS), dtype=torch.int64).index_add_(0, of_term, signals.lengths)
        totals = torch.tensor(over_replicas(counts.tolist(), self.tools.grid), dtype=torch.float64)
        own = torch.tensor([getattr(self.settings, name) for name in TERMS], dtype=torch.float64)
        weights = matched_weights(totals, own)
        return Terms.of(signals.sampled_log_prob, divergence=signals.per_token(weights[of_term]))

    def _six(self, rollout: Rollout) -> list[Rollout] | None:
        """Return the texts of `TERMS` of one response, each with its prompts; None if one of them is too long."""
        given, run = self.tools.given, self.tools.run_data
        pair, tokenizer = rollout.prompts, run.tokenizer
        after_response = given.pair_with(rollout.problem, response_text(rollout.response, tokenizer))
        if after_response is None:
            return None
        solution = [*tokenizer.encode(rollout.problem.solution), run.stop_token_ids[0]][: given.max_new_tokens]
        response = rollout.response.token_ids
        nothing, shows_z, shows_y = pair.student_prompt, pair.teacher_prompt, after_response.teacher_prompt
        again = [*nothing, *response]
        if len(again) + len(response) > given.max_length:
            return None
        written = Response(solution, [0.0] * len(solution), [0.0] * len(solution), "stop")  # no ratio is taken

        def text(of: Response, student: list[int], teacher: list[int]) -> Rollout:
            prompts = PromptPair(pair.problem_id, student, teacher, pair.solution, pair.solution_truncated)
            is_sampled = of is rollout.response and student is nothing
            part = "response" if is_sampled else "view"
            return replace(rollout, prompts=prompts, response=of, part=part, privileged=student is not nothing)

        return [
            text(rollout.response, nothing, shows_z),
            text(written, shows_z, nothing),
            text(rollout.response, again, shows_z),
            text(written, nothing, shows_y),
            text(rollout.response, again, nothing),
            text(written, shows_z, shows_y),
        ]


def matched_weights(totals: Tensor, weights: Tensor) -> Tensor:
    """Return the weight of a token of each term, [6] float64: ``w_i N / N_i``, and 0 where a term has no token.

    ``totals``: the numbers N_i of tokens of the terms in the whole step, whose sum is N.  The loss divides by N, so
    that each term is w_i times the mean over its own tokens.
    """
    return torch.where(totals > 0, weights * totals.sum() / totals.clamp(min=1), 0.0)
