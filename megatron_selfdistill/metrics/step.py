# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The metrics of one step over the global batch, with the same bits on every rank.

A decision that depends on these metrics is therefore the same on every rank.  Entropies, log-probs and divergences are
in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.data.packed_batch import Microbatch, PackedBatch
from megatron_selfdistill.distributed.host_to_device import to_device
from megatron_selfdistill.loss.sharded.vocab_parallel import TokenStats
from megatron_selfdistill.loss.target import Status
from megatron_selfdistill.metrics.further_summands import coefficient_values, measured_values
from megatron_selfdistill.metrics.guards import LOOPS, TRUNCATED, UNFINISHED
from megatron_selfdistill.metrics.leakage import LeakCounts, ends_in_loop
from megatron_selfdistill.rollout.base import Response

if TYPE_CHECKING:  # the metrics of a run are also read without Megatron
    from megatron_selfdistill.distributed.ranks import RankGrid
    from megatron_selfdistill.pipeline.token_losses import StepOutput

K_RESOLUTION = 0.01
"""The relative width of the bins of k; a percentile is off by at most half of it."""
K_RANGE = 2.0**10
"""The bound of the histogram of k, [1 / K_RANGE, K_RANGE]; a k beyond a bound counts as the bound."""
FORKS_ARE_ONE_IN = 10
"""The forks are one in this number of tokens: those at which the anchor is least certain."""
FORK_RESOLUTION = 0.02
"""The relative width of the bins of entropy, one of whose edges separates the forks from the other tokens."""
FORK_RANGE = 2.0**-20, 2.0**4
"""The lower edge of the second bin, and the upper edge of the last bin but one, in nats; the first bin begins at 0."""
SHORTEST_COMPARED = 8
"""The fewest tokens that a response has whose own mean difference from the sampler counts: fewer say too little."""
TENTHS = tuple(f"tenth_{number:02d}" for number in range(1, 11))
"""The names of the ten parts of a response."""

_NUM_FORK_BINS = 2 + math.ceil(math.log(FORK_RANGE[1] / FORK_RANGE[0]) / math.log1p(FORK_RESOLUTION))
_NUM_BINS = math.ceil(2 * math.log(K_RANGE) / math.log1p(K_RESOLUTION))

# The count that divides the sum of each mean, by key: all response tokens, the tokens with a target (a baseline has
# none), the tokens at which the teacher is measured, those with a log-prob of the sampler, those with a weight, those
# with a policy term, or those whose policy term may be clipped.
_OVER = {
    "loss/mean": "tokens/response",
    "student_nll": "tokens/response",
    "loss/reverse_kl": "targets",
    "entropy/student": "targets",
    "entropy/teacher": "measured",
    "entropy/target": "targets",
    "entropy/target_minus_student": "targets",
    "k/mean": "targets",
    **{f"status/{status.name.lower()}": "targets" for status in Status},
    "top1_agreement": "measured",
    "teacher_cross_entropy": "measured",
    "sampler/log_prob_mean_abs_diff": "sampled",
    "correction/weight_mean": "weighted",
    "correction/capped": "weighted",
    "terms/divergence_mean": "two_terms",
    "terms/policy_mean": "two_terms",
    "terms/policy_abs_mean": "two_terms",
    "terms/clipped_share": "may_be_clipped",
    "terms/silent_share": "two_terms",
    "target/mass_on_rare_student": "with_measures",
    "target/mass_on_rare_reference": "with_reference",
    "teacher/kl_to_anchor": "with_kl",
    "target/let_through": "kl_to_anchor",
    "control/general": "with_control",
    "control/specific": "with_control",
    "forks/entropy_student": "forks",
    "forks/entropy_target": "forks",
    "forks/capped": "forks",
    **{f"reverse_kl/{tenth}": tenth for tenth in TENTHS},
}
_SUMS = tuple(dict.fromkeys((*_OVER.values(), *_OVER)))


def step_metrics(
    output: StepOutput,
    sampler_log_probs: Tensor | None,
    grid: RankGrid,
    weight_cap: float = math.inf,
    response_lengths: Sequence[int] | None = None,
) -> dict[str, float]:
    """Return the means over the response tokens of the global batch, under flat keys, equal on all ranks.

    ``sampler_log_probs`` [R_total], on the device: the sampler's raw log-prob of each of this replica's
    ``PackedBatch.response_tokens``, to compare with the student's in this forward pass; None if no sampler ran.
    A log-prob of infinity is left out.
    ``response_lengths``: the lengths of this replica's responses, in the order of these tokens; None leaves out the
    tenths.
    ``weight_cap``: the weight at which correction/capped counts a token.  docs/metrics.md defines all keys.

    A loss without a target (`next_token`) has only the first line.  With a reference, entropy/teacher and
    the two metrics of the teacher exist only on steps that measure the teacher.  The sampler's keys need
    ``sampler_log_probs``.  The correction's keys need coefficients without a policy term, and the keys of the terms
    need a policy term.  A token with NaN makes each mean that includes
    the token NaN; percentiles skip the token.
    Collectives over the world: as in `find_forks`, and as in `over_all_ranks` for 1,500 sums and 5 maxima; the host
    waits once; before them one sum over the context-parallel ranks, where responses are compared with the sampler.
    """
    stats = output.stats if holds_tokens(grid) else None
    forks = find_forks(None if stats is None else output.anchor_entropy, grid)
    by_key: dict[str, Tensor] = {}
    worst: Tensor | None = None
    if stats is not None:
        by_key = token_values(output, sampler_log_probs)
        if output.measures is not None:
            by_key |= measured_values(output.measures)
        if forks is not None:
            by_key |= fork_values(stats, forks)
        if response_lengths is not None and "targets" in by_key:
            tenths = to_device(response_tenths(response_lengths), grid.device)
            by_key |= tenth_values(stats, tenths[output.response_ids])
        if output.coefficients is not None:
            by_key |= coefficient_values(output.coefficients, weight_cap)
        if response_lengths is not None and "sampled" in by_key:
            worst = _worst_response(by_key, output.response_ids, response_lengths, grid)
    return _means(*over_all_ranks(*_sums_and_maxima(by_key, forks, worst, grid), grid))


def _worst_response(
    by_key: Mapping[str, Tensor], response_ids: Tensor, lengths: Sequence[int], grid: RankGrid
) -> Tensor:
    """Return the largest mean difference from the sampler over one of this replica's responses, a scalar in nats.

    It is -inf where no response has `SHORTEST_COMPARED` tokens with a log-prob of the sampler, and inf for NaN.
    """
    owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    owner = to_device(owners, grid.device)[response_ids]
    sums = torch.zeros(2, len(lengths), dtype=torch.float64, device=grid.device)
    sums[0].index_add_(0, owner, by_key["sampler/log_prob_mean_abs_diff"])
    sums[1].index_add_(0, owner, by_key["sampled"])
    if grid.cp_size > 1:  # each rank has a part of the tokens
        dist.all_reduce(sums, group=grid.cp_group)
    means = torch.where(sums[1] >= SHORTEST_COMPARED, sums[0] / sums[1], -math.inf)
    means = means.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    return means.max() if len(lengths) else torch.tensor(-math.inf, dtype=torch.float64, device=grid.device)


def _sums_and_maxima(
    by_key: Mapping[str, Tensor], forks: Forks | None, worst: Tensor | None, grid: RankGrid
) -> tuple[Tensor, Tensor]:
    """Return this rank's sums (`_SUMS`, then the histogram of k) and its maxima.

    The maxima are those of k, -k, the sampler's difference, the edge of the forks, and ``worst``.
    ``by_key``: the summands, empty on a rank whose tokens do not count.
    """
    nothing = torch.zeros(0, dtype=torch.float64, device=grid.device)
    k = by_key.get("k/mean", nothing)
    known = torch.isfinite(k)
    sums = torch.stack([by_key.get(key, nothing).sum() for key in _SUMS])
    differences = by_key.get("sampler/log_prob_mean_abs_diff", nothing)
    maxima = torch.full((5,), -math.inf, dtype=torch.float64, device=grid.device)
    for i, values in enumerate(
        (
            torch.where(known, k, -math.inf),
            torch.where(known, -k, -math.inf),
            differences.nan_to_num(nan=math.inf, posinf=math.inf),  # the maximum of NaN and a number depends on order
        )
    ):
        if values.numel():
            maxima[i] = values.max()
    if forks is not None:
        maxima[3] = forks.entropy_at_least
    if worst is not None:
        maxima[4] = worst
    return torch.cat([sums, _histogram(k, known)]), maxima


def _means(total: list[float], maximum: list[float]) -> dict[str, float]:
    named = dict(zip(_SUMS, total, strict=False))
    metrics = {"tokens/response": named["tokens/response"]}
    metrics |= {key: named[key] / named[over] for key, over in _OVER.items() if named[over]}
    counts = total[len(_SUMS) :]
    if sum(counts):
        for name, share in (("k/p01", 0.01), ("k/p99", 0.99)):
            metrics[name] = min(max(_percentile(counts, share), -maximum[1]), maximum[0])
    if named["sampled"]:
        metrics["sampler/log_prob_max_abs_diff"] = maximum[2]
    if named["forks"]:
        metrics["forks/entropy_at_least"] = maximum[3]
    if maximum[4] > -math.inf:
        metrics["sampler/log_prob_worst_response"] = maximum[4]
    return metrics


def rollout_metrics(
    responses: Sequence[Response],
    grid: RankGrid,
    packs: Sequence[PackedBatch] = (),
    leaks: LeakCounts | None = None,
    *,
    has_teacher: bool = True,
) -> dict[str, float]:
    """Return the lengths of the global batch's responses and the padding of its microbatches, equal on all ranks.

    ``responses`` and ``packs``, one per partial batch of the step, are this replica's, the same on each of its ranks.
    docs/metrics.md defines the keys.  Where responses are unfinished, nobody knows how many would be truncated, and
    response/unfinished_share takes the place of response/truncated_share.  ``leaks``: this rank's `leak_counts`.
    ``has_teacher``: whether the step has a teacher that reads its microbatches.
    Without any response and without ``leaks``, tokens/rollout is the only key.  Collectives as in `step_metrics`.
    """
    sums = torch.zeros(15, dtype=torch.float64, device=grid.device)
    longest = torch.zeros(1, dtype=torch.float64, device=grid.device)
    if grid.is_first_of_replica:
        lengths = [len(response.token_ids) for response in responses]
        num_cut = sum(response.truncated for response in responses)
        num_unfinished = sum(response.unfinished for response in responses)
        num_looping = sum(ends_in_loop(response.token_ids) for response in responses)
        student = [microbatch for pack in packs for microbatch in pack.student]
        teacher = [microbatch for pack in packs for microbatch in pack.teacher]
        numbers: list[float] = [len(lengths), sum(lengths), num_cut, num_unfinished, num_looping]
        numbers += [*_padding(student), *_padding(teacher)]
        sums[:9] += torch.tensor(numbers, dtype=torch.float64, device=grid.device)
        longest += max(lengths, default=0)
    if leaks is not None:
        sums[9:] += torch.tensor(astuple(leaks), dtype=torch.float64, device=grid.device)
    totals, (length_max,) = over_all_ranks(sums, longest, grid)
    count, tokens, truncated, unfinished, looping, *padding = totals[:9]
    metrics = {"tokens/rollout": tokens, **LeakCounts(*map(int, totals[9:])).metrics()}
    if count:
        metrics |= {"response/length_mean": tokens / count, "response/length_max": length_max}
        metrics |= {UNFINISHED: unfinished / count} if unfinished else {TRUNCATED: truncated / count}
        metrics[LOOPS] = looping / count
    if packs:
        read = 0.0
        for stream, padded, in_all in zip(("student", "teacher"), padding[::2], padding[1::2], strict=True):
            share = metrics[f"padding/{stream}"] = padded / in_all if in_all else 0.0
            if stream == "student" or has_teacher:
                read += sum(len(getattr(pack, stream)) * pack.seq_length for pack in packs) * (1 - share)
        metrics["tokens/read"] = grid.dp_size * read
    return metrics


def holds_tokens(grid: RankGrid) -> bool:
    """Return whether this rank's tokens count: the last stage has tokens, the same on each tensor-parallel rank."""
    return grid.is_last_stage and grid.tp_rank == 0


def token_values(output: StepOutput, sampler_log_probs: Tensor | None) -> dict[str, Tensor]:
    """Return the summands of `_SUMS`, [R] float64 each, without the numbers that the loss of the step does not have."""
    stats, ids = output.stats, output.response_ids
    assert stats is not None, "only a rank with tokens has their values"
    student_log_prob = stats.student_log_prob.double()
    one = torch.ones_like(student_log_prob)
    values = {"tokens/response": one, "loss/mean": stats.loss.double(), "student_nll": -student_log_prob}
    if stats.grid_betas.numel():
        student_entropy, target_entropy = stats.student_entropy.double(), stats.target_entropy.double()
        values |= {
            "targets": one,
            "loss/reverse_kl": stats.reverse_kl.double(),
            "entropy/student": student_entropy,
            "entropy/target": target_entropy,
            "entropy/target_minus_student": target_entropy - student_entropy,
            "k/mean": 1 / stats.beta.double(),
        }
        if output.measures_teacher:
            measures = output.measures
            values |= {
                "measured": one if measures is None or not measures.has_teacher else measures.measured.double(),
                "entropy/teacher": stats.teacher_entropy.double(),
                "top1_agreement": stats.top1_agreement.double(),
                "teacher_cross_entropy": -stats.teacher_log_prob.double(),
            }
        values |= {f"status/{status.name.lower()}": (stats.status == status).double() for status in Status}
    if sampler_log_probs is not None:
        theirs = sampler_log_probs[ids].double()
        sampled = theirs != math.inf
        differences = torch.where(sampled, (theirs - student_log_prob).abs(), 0.0)
        values |= {"sampled": sampled.double(), "sampler/log_prob_mean_abs_diff": differences}
    return values


def _histogram(k: Tensor, known: Tensor) -> Tensor:
    """Return the histogram of the values of ``k`` that are ``known``, in bins of equal width in log k.

    bincount and indexing with a mask would make the host wait for the device.
    """
    bins = ((torch.where(known, k, 1.0) * K_RANGE).log() / math.log1p(K_RESOLUTION)).floor().clamp(0, _NUM_BINS - 1)
    return k.new_zeros(_NUM_BINS).index_add_(0, bins.long(), known.to(k.dtype))


def _percentile(counts: Sequence[float], share: float) -> float:
    """Return the middle of the bin with the nearest rank, the least value that ``share`` of all do not exceed."""
    wanted, seen, index = math.ceil(share * sum(counts)), counts[0], 0
    while seen < wanted:
        index += 1
        seen += counts[index]
    return float((1 + K_RESOLUTION) ** (index + 0.5) / K_RANGE)


def _padding(stream: Sequence[Microbatch]) -> tuple[int, int]:
    """Return (padding tokens, all tokens) of microbatches, whose masks are on the host."""
    masks = [microbatch.padding_mask for microbatch in stream]
    return sum(int(mask.numpy().sum()) for mask in masks), sum(mask.numel() for mask in masks)


def over_all_ranks(sums: Tensor, maxima: Tensor, grid: RankGrid) -> tuple[list[float], list[float]]:
    """Return sums and maxima over the world, with the same bits on every rank; waits for the device once.

    ``sums [n]``, ``maxima [m]``: float64, on the device.  A rank that repeats the values of another rank contributes
    zeros, and -inf for its maxima.  No maximum may be NaN.
    Collectives over the world: one sum of n + m * world_size values, in which the maxima of each rank have places of
    their own, and a broadcast of the sum.
    """
    if grid.world_size == 1:
        found = torch.cat([sums, maxima]).tolist()
        return found[: len(sums)], found[len(sums) :]
    places = maxima.new_zeros(grid.world_size, len(maxima))
    places[grid.rank] = maxima
    everything = torch.cat([sums, places.flatten()])
    dist.all_reduce(everything)
    dist.broadcast(everything, src=0)  # an all-reduce may give the ranks different bits
    found = everything.tolist()
    total, by_rank = found[: len(sums)], found[len(sums) :]
    return total, [max(by_rank[i :: len(maxima)]) for i in range(len(maxima))]


@dataclass(frozen=True)
class Forks:
    """The fork tokens among R tokens."""

    mask: Tensor
    """Whether a token is a fork, [R] bool; False for an unknown entropy."""
    entropy_at_least: Tensor
    """The smallest entropy of a fork in nats, an edge of a bin; a float64 scalar, equal on all ranks."""


def find_forks(entropy: Tensor | None, grid: RankGrid) -> Forks | None:
    """Return the fork tokens: the tenth of the tokens of the global batch with the largest ``entropy``.

    ``entropy [R]``: nats, of this rank's tokens.  It is None if the rank's tokens do not count or their entropy is
    unknown, and then the result is None.  Tokens whose entropy is not finite are ignored.
    The forks are the tokens from an edge of a bin on, the largest edge that at least a tenth of the tokens reach, so
    that all tokens of one bin are forks or none is.  The choice does not depend on the layout.
    Collectives: a sum of 850 counts over the world.
    """
    counts = torch.zeros(_NUM_FORK_BINS, dtype=torch.float64, device=grid.device)
    if entropy is not None:
        entropy = entropy.double()
        known = torch.isfinite(entropy)
        bins = 1 + (torch.where(known, entropy, 0.0) / FORK_RANGE[0]).log().div(math.log1p(FORK_RESOLUTION)).floor()
        bins = bins.clamp(0, _NUM_FORK_BINS - 1).long()
        counts.index_add_(0, bins, known.double())
    if grid.world_size > 1:
        dist.all_reduce(counts)  # sums of integers, which are equal on all ranks
    if entropy is None:
        return None
    reached = counts.flip(0).cumsum(0).flip(0)
    first = (reached >= (reached[0] / FORKS_ARE_ONE_IN).ceil()).sum() - 1
    edge = FORK_RANGE[0] * (1 + FORK_RESOLUTION) ** (first - 1).double()
    return Forks(known & (bins >= first), torch.where(first > 0, edge, 0.0))


def fork_values(stats: TokenStats, forks: Forks) -> dict[str, Tensor]:
    """Return the summands [R] float64 of the means over the forks, and under "forks" the forks that they divide by."""
    values = {
        "forks": torch.ones_like(forks.mask),
        "forks/entropy_student": stats.student_entropy,
        "forks/entropy_target": stats.target_entropy,
        "forks/capped": stats.status == Status.CAPPED,
    }
    return {key: torch.where(forks.mask, value.double(), 0.0) for key, value in values.items()}


def response_tenths(lengths: Sequence[int]) -> Tensor:
    """Return the tenth of its response in which each token lies, from 0 to 9, [sum of lengths] int64 on the host.

    Token i of a response of n tokens, counted from 0, lies in tenth floor(10 i / n), so a response of fewer than ten
    tokens leaves some tenths empty.
    """
    tenths = [torch.arange(length) * len(TENTHS) // length for length in lengths if length]
    return torch.cat(tenths) if tenths else torch.empty(0, dtype=torch.int64)


def tenth_values(stats: TokenStats, tenths: Tensor) -> dict[str, Tensor]:
    """Return the summands [R] float64 of the reverse KL in each tenth, with the counts; ``tenths [R]`` from 0 on."""
    values: dict[str, Tensor] = {}
    for number, tenth in enumerate(TENTHS):
        here = tenths == number
        values |= {tenth: here.double(), f"reverse_kl/{tenth}": torch.where(here, stats.reverse_kl.double(), 0.0)}
    return values
