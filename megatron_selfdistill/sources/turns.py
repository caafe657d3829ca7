# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Logged turns in a step: their likelihood under the student, and their weights in the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from megatron_selfdistill.config import ConversationsConfig
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.loss.weighting import LikelyTurns, TokenOwners, down_weighted, dropped
from megatron_selfdistill.metrics.step import over_all_ranks
from megatron_selfdistill.model.host_to_device import to_device_in_one_copy
from megatron_selfdistill.pipeline.batch import over_last_stage
from megatron_selfdistill.pipeline.step_output import StepOutput


@dataclass(frozen=True)
class Turns:
    """The logged turns of one step on this replica, in the order of ``PackedBatch.response_tokens``."""

    lengths: list[int]
    """Tokens of each reply."""
    accepted: Sequence[bool]
    """Whether each reply is the one that the user accepted."""

    @classmethod
    def of(cls, problems: Sequence[Problem], contexts: Sequence[ContextPair]) -> Turns:
        """Return the turns of ``problems``, where ``contexts[i]`` holds the logged reply of ``problems[i]``."""
        accepted = [problem.reply is not None and problem.reply.accepted for problem in problems]
        return cls([len(context.response) for context in contexts], accepted)

    @property
    def ids(self) -> torch.Tensor:
        """The turn of each response token, counted from 0: [sum of lengths] int64 on the host."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths, dtype=torch.int64))


def turn_weights(wanted: ConversationsConfig, turns: Turns, grid: RankGrid) -> LikelyTurns | None:
    """Return the weights of tokens that ``conversations.min_log_prob`` asks for; None where the key is null."""
    if wanted.min_log_prob is None:
        return None
    weight = {"drop": dropped, "down_weight": down_weighted}[wanted.unlikely]
    owners = TokenOwners.of(turns.lengths, partial(over_last_stage, grid=grid))
    return to_device_in_one_copy(LikelyTurns(owners, wanted.min_log_prob, weight), grid.device)


def turn_metrics(output: StepOutput, turns: Turns, weighted: bool, grid: RankGrid) -> dict[str, float]:
    """Return metrics over the turns of the global batch, under flat keys; equal on all ranks.

    ``weighted``: whether the loss had `turn_weights`.  The keys:

        turns/count
        turns/log_prob_mean, turns/log_prob_min   mean and minimum of each turn's mean log-prob per token, nats, student
        turns/accepted_share, turns/accepted_token_share   accepted turns per turn, their tokens per token
        turns/unlikely_share, turns/unlikely_token_share   the same of turns whose weight is below 1 (``weighted``)

    Collectives: one sum over CP and one broadcast over TP for the sums per turn, then `over_all_ranks`.
    """
    totals = torch.zeros(7, dtype=torch.float64, device=grid.device)
    minus_lowest = torch.full((1,), -math.inf, dtype=torch.float64, device=grid.device)
    if output.stats is not None:
        sums = torch.zeros(2, len(turns.lengths), dtype=torch.float64, device=grid.device)
        turn_ids, tokens, accepted = to_device_in_one_copy(
            (
                turns.ids,
                torch.tensor(turns.lengths, dtype=torch.float64),
                torch.tensor(turns.accepted, dtype=torch.float64),
            ),
            grid.device,
        )
        ids = turn_ids[output.response_ids]
        sums[0].index_add_(0, ids, output.stats.student_log_prob.double())
        if output.coefficients is not None:
            sums[1].index_add_(0, ids, (output.coefficients.divergence < 1).double())
        sums = over_last_stage(sums, grid)
        if grid.tp_rank == 0 and grid.cp_rank == 0 and turns.lengths:
            means, unlikely = sums[0] / tokens, (sums[1] > 0).double()
            parts = (torch.ones_like(tokens), tokens, means, accepted, accepted * tokens, unlikely, unlikely * tokens)
            totals += torch.stack([part.sum() for part in parts])
            minus_lowest[0] = -means.min()
    sums_over_all, (minus_lowest_of_all,) = over_all_ranks(totals, minus_lowest, grid)
    count, num_tokens, log_prob, num_accepted, accepted_tokens, num_unlikely, unlikely_tokens = sums_over_all
    if not count:
        return {}
    metrics = {
        "turns/count": count,
        "turns/log_prob_mean": log_prob / count,
        "turns/log_prob_min": -minus_lowest_of_all,
        "turns/accepted_share": num_accepted / count,
        "turns/accepted_token_share": accepted_tokens / num_tokens,
    }
    if weighted:
        metrics["turns/unlikely_share"] = num_unlikely / count
        metrics["turns/unlikely_token_share"] = unlikely_tokens / num_tokens
    return metrics
