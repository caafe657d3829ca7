# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a model does with hints of several levels, before any training, and a prediction of which of them teach it.

The model answers problems without a hint; these are the samples.  A hint level is a text in the place of the solution
in the teacher's prompt: the solution, the answer, a column of the records, another problem's solution or nothing.  With
p(y_t) the model after the problem, q(y_t) the model after the problem and the hint, and R = 1 for a right sample:

    utility     the accuracy of responses that see the hint, minus the accuracy of the samples
    divergence  the mean of KL(p || q) over all tokens, in nats
    contrast    the mean of log p(y_t) - log q(y_t) over the tokens of wrong samples, minus the mean over right samples
    gain        the covariance of R with G = sum over t of log q(y_t) - log p(y_t) + KL(p || q), over the samples

The gain is the derivative at e = 0 of the accuracy of the policy that follows p^(1 - e) q^e, normalised, at each token:
the derivative of a token's log-probability is log q - log p + KL(p || q), whose mean is 0, so that the derivative of
E[R] is E[R G] = Cov(R, G).  This is the direction of the first steps of a distillation from q on the model's own
samples.  It is exact for samples at temperature 1 without top-k and top-p.  A model that never solves a problem has
gains of 0: its samples cannot show what to raise (docs/rollouts.md).

Source of utility, divergence and contrast as predictors: arXiv 2610.22512, whose contrast is that of steps which a
judge finds wrong; here it is that of samples which the verifier finds wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from megatron_selfdistill.choices import HINT_LEVELS
from megatron_selfdistill.config import Config
from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.given_solutions import build_contexts
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.distributed.collectives import gather_items
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.evaluation.held_out import checked_prompts
from megatron_selfdistill.evaluation.inference import Inference
from megatron_selfdistill.evaluation.verify import Verifier, judged_by_all, right_response
from megatron_selfdistill.pipeline.score import read_tokens
from megatron_selfdistill.rollout.base import Response

MAX_PROBLEMS = 256
"""The largest number of problems with a sample; the first ones are taken."""


@dataclass(frozen=True)
class HintLevel:
    """The numbers of one hint level, the same on every rank; the docstring of the module has their equations."""

    name: str
    num_samples: int
    accuracy: float
    """The share of right samples, which saw no hint."""
    hinted_accuracy: float
    """The share of right responses that saw the hint."""
    utility: float
    divergence: float
    contrast: float | None
    """None if no sample, or every sample, is right."""
    gain: float


def at_level(config: Config, level: str) -> Config:
    """Return the configuration whose problems have the text of a hint level as the solution.

    A level that is none of `HINT_LEVELS` is a column of the records.
    """
    if level in HINT_LEVELS:
        return replace(config, data=replace(config.data, solutions=HINT_LEVELS[level]))
    fields = config.data.fields | {"solution": level}
    return replace(config, data=replace(config.data, solutions="given", fields=fields))


def measure_hint_levels(
    inference: Inference, config: Config, levels: Mapping[str, RunData], verifier: Verifier, grid: RankGrid
) -> list[HintLevel]:
    """Return the numbers of each level, from one sample without a hint and one with it for each problem.

    ``levels``: name -> the problems of the evaluation with the texts of this level as solutions, at most `MAX_PROBLEMS`
    of which are used.  The sampler sleeps afterwards.
    Every rank of the world calls this function.  Raises: `ConfigError`, `EngineError`, `VerifierError`.
    """
    first, mine = next(iter(levels.values())), slice(grid.dp_rank, None, grid.dp_size)
    problems, builder = first.evaluation[:MAX_PROBLEMS], first.builder
    plain = [builder.student_prompt(it) for it in problems]
    hinted = {
        name: checked_prompts(
            replace(of, evaluation=of.evaluation[:MAX_PROBLEMS]), verifier, config.rollout.max_new_tokens, hinted=True
        )
        for name, of in levels.items()
    }

    def sampled(prompts: Sequence[list[int]]) -> list[Response]:
        return inference.first_samples(problems, prompts, config.seed, grid)

    def judged(responses: Sequence[Response]) -> list[bool]:
        is_right = right_response(verifier, first.tokenizer, config.evaluation.confidence_pattern)
        asked = {it.id: (it, response) for it, response in zip(problems[mine], responses, strict=True)}
        verdicts = judged_by_all(asked, is_right, grid)
        return [verdicts[it.id] for it in problems]

    samples = sampled(plain)
    rights, hinted_rights = judged(samples), {name: judged(sampled(prompts)) for name, prompts in hinted.items()}
    inference.sampler.sleep()
    models = inference.as_both_models(config, chain(plain, *hinted.values()), grid)
    found = []
    for name, prompts in hinted.items():
        pairs = [PromptPair(it.id, own, other) for it, own, other in zip(problems, plain, prompts, strict=True)]
        contexts = build_contexts(pairs[mine], samples)
        sums = _sums(read_tokens(contexts, models), [len(it.response) for it in contexts])
        rows = [(it.id, row) for it, row in zip(problems[mine], sums.tolist(), strict=True)]
        of_id = dict(gather_items(rows if grid.replica_rank == 0 else []))
        ordered = torch.tensor([of_id[it.id] for it in problems], dtype=torch.float64)
        found.append(level_of(name, ordered, torch.tensor(rights), hinted_rights[name]))
    return found


def level_of(name: str, sums: Tensor, are_right: Tensor, hinted_right: Sequence[bool]) -> HintLevel:
    """Return the numbers of a level.

    ``sums`` [B, 3] float64: per sample, the sums over its tokens of log p - log q and KL(p || q), and its length.
    ``are_right`` [B] bool: which samples are right.  ``hinted_right``: which responses that saw the hint are right.
    """
    gap, kl, length = sums.unbind(1)
    right = are_right.double()
    accuracy, hinted_accuracy = right.mean().item(), sum(hinted_right) / len(hinted_right)
    contrast = None
    if 0 < accuracy < 1:
        of_wrong, of_right = (gap[chosen].sum() / length[chosen].sum() for chosen in (~are_right, are_right))
        contrast = (of_wrong - of_right).item()
    return HintLevel(
        name=name,
        num_samples=len(are_right),
        accuracy=accuracy,
        hinted_accuracy=hinted_accuracy,
        utility=hinted_accuracy - accuracy,
        divergence=(kl.sum() / length.sum()).item(),
        contrast=contrast,
        gain=((right - right.mean()) * (kl - gap)).mean().item(),
    )


def _sums(tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return [B, 3] float64 as `level_of` takes them, from log p, log q and KL(p || q) of every token, [3, R]."""
    log_p, log_q, kl = tokens
    parts = zip((log_p - log_q).split(list(lengths)), kl.split(list(lengths)), lengths, strict=True)
    rows = [[gap.sum().item(), own.sum().item(), length] for gap, own, length in parts]
    return torch.tensor(rows, dtype=torch.float64).view(-1, 3)
