# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Summaries of rows of logits, from which the target of any weight, rule and anchor can be computed again.

A summary has the largest logits of every model and, of the rest of the vocabulary, the first and second moments in a
few bins.  In a bin of c columns whose mix m has the mean mu and the variance v, the sum of e^(beta m) is about
c e^(beta mu + beta^2 v / 2), which is exact to the second order in beta; the error is of the third order in the width
of a bin.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard, gather_parts

TOP = 64
"""The number of largest logits of each model whose columns are candidates."""
EDGES = 7
"""The number of edges along each of the two axes of bins."""
NUM_BINS = (EDGES + 1) ** 2 + 1
"""The number of bins; the last one has the columns that are far below the maximum of a model."""
FAR = 50.0
"""The distance below a model's maximum, in nats, from which a column is far."""
AXIS_WEIGHT = 0.75
"""The weight of the teacher along the first axis of bins, which is the default of target.teacher_weight."""
_CHUNK = 2**20  # logits of a model that a rank summarises at a time
_EMPTY = -1


@dataclass(frozen=True)
class LogitSummary:
    """Summaries of T rows of M models' logits: C = M `TOP` candidates and B = `NUM_BINS` bins of the other columns.

    All tensors are float64 and equal on all ranks of the group.  All logits are relative to the maximum of their model
    and row.
    """

    ids: Tensor
    """[T, C] global ids of the candidates, ascending; the slots without a candidate come last and have -1."""
    logits: Tensor
    """[T, M, C] logits of the candidates; -inf in slots without a candidate."""
    counts: Tensor
    """[T, B] the number of columns of each bin; columns that a model excludes with -inf are in no bin."""
    means: Tensor
    """[T, M, B] the mean logit of each bin; 0 in an empty bin."""
    covariances: Tensor
    """[T, M (M + 1) / 2, B] the covariances of the models' logits within each bin, in the order (0, 0), (0, 1) ..
    (M - 1, M - 1); 0 in the last bin."""
    log_normalisers: Tensor
    """[T, M] log of the sum of e^logit over all columns of each model."""
    student_means: Tensor
    """[T, M] the mean of each model's logits under the distribution of model 0, the student."""

    def flat(self) -> Tensor:
        """Return everything as one tensor [T, F], float64; see `of_flat`."""
        return torch.cat([getattr(self, f.name).flatten(1) for f in fields(self)], 1)

    @classmethod
    def of_flat(cls, flat: Tensor, num_models: int) -> LogitSummary:
        """Return the summaries that `flat` has made one tensor [T, F] of."""
        sizes = list(shapes(num_models).values())
        parts = flat.split([torch.Size(size).numel() for size in sizes], 1)
        return cls(*(part.reshape(len(flat), *size) for part, size in zip(parts, sizes, strict=True)))

    @classmethod
    def width(cls, num_models: int) -> int:
        """Return F, the number of values per token in `flat`."""
        return sum(torch.Size(shape).numel() for shape in shapes(num_models).values())


def shapes(num_models: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes, without T, of the tensors of a `LogitSummary` of so many models, by name."""
    m, c, pairs = num_models, num_models * TOP, num_models * (num_models + 1) // 2
    return {
        "ids": (c,),
        "logits": (m, c),
        "counts": (NUM_BINS,),
        "means": (m, NUM_BINS),
        "covariances": (pairs, NUM_BINS),
        "log_normalisers": (m,),
        "student_means": (m,),
    }


@torch.no_grad()
def summarise_logits(logits: Sequence[Tensor], vocab: VocabShard, with_controls: bool = False) -> LogitSummary:
    """Return the summaries of T tokens from the logits of their models, [T, vocab.size] each, any float dtype.

    ``logits``: of the student, the teacher, where there is one the reference, and ``with_controls`` their c.  The bins
    lie along a + 0.75 t and a - t, with t the teacher's logits, or t - c, and a the reference's, or the student's
    without a reference.
    Of equal logits any may be the last candidate.  A token with NaN in its logits gives NaN for this token only.
    Collectives over ``vocab.group``, per `_CHUNK` logits: three all-gathers, of the candidates, of the moments along
    the axes and of the sums of the bins; never of the logits.
    Raises: ValueError if shapes do not fit.
    """
    expected = (len(logits[0]), vocab.size)
    if len(logits) - with_controls not in (2, 3) or any(tuple(each.shape) != expected for each in logits):
        raise ValueError(
            f"summarise_logits: expected logits of 2 or 3 models{' and of controls' if with_controls else ''}, "
            f"[T, {vocab.size}] each, got {[tuple(each.shape) for each in logits]}."
        )
    if expected[0] == 0:
        return LogitSummary.of_flat(logits[0].new_empty(0, LogitSummary.width(len(logits))).double(), len(logits))
    step = max(1, _CHUNK // vocab.size)
    parts = []
    for start in range(0, expected[0], step):
        rows = [each[start : start + step, : vocab.num_valid].double() for each in logits]
        parts.append(_summary(torch.stack(rows, 1), vocab, with_controls).flat())
    return LogitSummary.of_flat(torch.cat(parts), len(logits))


def _summary(x: Tensor, vocab: VocabShard, with_controls: bool) -> LogitSummary:
    """Return the summaries of the logits ``x [n, M, v]``, the valid columns of this rank."""
    ids, logits = _candidates(x, vocab)
    top = logits.amax(2)
    top = torch.where(torch.isneginf(top), 0.0, top)
    x, logits = x - top[:, :, None], logits - top[:, :, None]
    own = _own(ids, x, vocab)
    rest = torch.isfinite(x).all(1) & ~own
    near = rest & (x > -FAR).all(1)
    anchor = x[:, 2] if x.shape[1] - with_controls == 3 else x[:, 0]
    told = x[:, 1] - x[:, -1] if with_controls else x[:, 1]
    axes = torch.stack([anchor + AXIS_WEIGHT * told, anchor - told], 1)
    place = _bins(axes, near, vocab)
    sums = gather_parts(_sums(x, place, rest)[None], vocab.group).sum(0)
    counts, means, covariances = _moments(sums[:, : -2 * x.shape[1]], x.shape[1])
    totals, weighted = sums[:, -2 * x.shape[1] :].chunk(2, 1)
    return LogitSummary(
        ids=ids.double(),
        logits=logits,
        counts=counts,
        means=means,
        covariances=covariances,
        log_normalisers=totals.log(),
        student_means=weighted / totals[:, :1],
    )


def _candidates(x: Tensor, vocab: VocabShard) -> tuple[Tensor, Tensor]:
    """Return the ids [n, C] int64 and the logits [n, M, C] of the candidates of all ranks."""
    n, num_models, width = x.shape
    local = min(TOP, width)
    found = x.new_full((n, 1 + num_models, num_models, TOP), -torch.inf)
    found[:, 0] = _EMPTY
    if local:
        columns = x.topk(local, dim=2).indices  # [n, M, local]: of each model its largest
        found[:, 0, :, :local] = (columns + vocab.start).double()
        for model in range(num_models):
            flat = x[:, model].gather(1, columns.flatten(1))
            found[:, 1 + model, :, :local] = flat.reshape(n, num_models, local)
    everywhere = torch.cat(gather_parts(found.flatten(1)[None], vocab.group).unbind(0), 1)
    everywhere = everywhere.reshape(n, -1, 1 + num_models, num_models, TOP)
    kept = []
    for model in range(num_models):  # of each model the largest of all ranks, with the ids and all models' logits
        of_model = everywhere[:, :, :, model].transpose(1, 2).flatten(2)  # [n, 1 + M, ranks * TOP]
        chosen = of_model[:, 1 + model].topk(TOP, dim=1).indices
        kept.append(of_model.gather(2, chosen[:, None].expand(-1, 1 + num_models, -1)))
    return _without_repetitions(torch.cat(kept, 2))


def _without_repetitions(found: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids [n, C] and logits [n, M, C] from ``found [n, 1 + M, C]``, each id once and in ascending order."""
    ids = found[:, 0].long()
    order = torch.where(ids < 0, torch.iinfo(torch.int64).max, ids)
    for _ in range(2):  # the second pass moves the repetitions, which the first pass finds, to the end
        order, places = order.sort(dim=1, stable=True)
        found = found.gather(2, places[:, None].expand_as(found))
        repeated = torch.zeros_like(order, dtype=torch.bool)
        repeated[:, 1:] = order[:, 1:] == order[:, :-1]
        order = order.masked_fill(repeated, torch.iinfo(torch.int64).max)
    is_empty = order == torch.iinfo(torch.int64).max
    return order.masked_fill(is_empty, _EMPTY), found[:, 1:].masked_fill(is_empty[:, None], -torch.inf)


def _own(ids: Tensor, x: Tensor, vocab: VocabShard) -> Tensor:
    """Return [n, v] bool: the candidates among this rank's columns."""
    n, _, width = x.shape
    columns = ids - vocab.start
    inside = (ids >= 0) & (columns >= 0) & (columns < width)
    marks = torch.zeros(n, width + 1, dtype=torch.bool, device=x.device)
    return marks.scatter_(1, torch.where(inside, columns, width), True)[:, :width]


def _bins(axes: Tensor, near: Tensor, vocab: VocabShard) -> Tensor:
    """Return the bin [n, v] int64 of every column, from its coordinates ``axes [n, 2, v]``; the last bin if not near.

    Along an axis four edges go from two standard deviations below the mean of the near columns to one above it, and
    three more from there to the maximum.
    """
    values = torch.where(near[:, None], axes, 0.0)
    count = near.sum(1).double()[:, None].expand(-1, 2)
    largest = torch.where(near[:, None], axes, -torch.inf)
    largest = largest.amax(2) if axes.shape[2] else axes.new_full(axes.shape[:2], -torch.inf)
    sums = torch.stack([count, values.sum(2), values.square().sum(2), largest], 2)
    gathered = gather_parts(sums.flatten(1)[None], vocab.group).reshape(-1, *sums.shape)
    count, total, squares = gathered[..., :3].sum(0).unbind(2)
    mean = total / count.clamp(min=1)
    deviation = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
    knee = mean + deviation
    reach = torch.maximum(gathered[..., 3].amax(0), knee + 1e-9) - knee
    low = torch.linspace(-3, 0, 4, dtype=torch.float64, device=axes.device)
    high = torch.arange(1, 4, dtype=torch.float64, device=axes.device) / 4
    edges = knee[..., None] + torch.cat([deviation[..., None] * low, reach[..., None] * high], 2)
    first, second = (torch.searchsorted(edges[:, i].contiguous(), values[:, i].contiguous()) for i in range(2))
    return torch.where(near, first * (EDGES + 1) + second, NUM_BINS - 1)


def _sums(x: Tensor, place: Tensor, rest: Tensor) -> Tensor:
    """Return per token the sums of the columns of this rank, [n, (1 + M + M (M + 1) / 2) B + 2 M].

    They are per bin the count, the sums of the logits and of their products; then the sums of e^x of each model, and of
    e^s x, with s the student's logits.
    """
    num_models = x.shape[1]
    finite = torch.where(rest[:, None], x, 0.0)
    # The logits of far columns may be so low that their squares would spoil the sums; their bin has no covariances.
    close = torch.where((place < NUM_BINS - 1)[:, None], finite, 0.0)
    products = [close[:, i] * close[:, j] for i, j in _pairs(num_models)]
    per_column = torch.stack([rest.double(), *finite.unbind(1), *products], 1)
    per_bin = x.new_zeros(len(x), per_column.shape[1], NUM_BINS)
    per_bin.scatter_add_(2, place[:, None].expand_as(per_column), per_column)
    weights = x.exp()
    student = weights[:, :1]
    weighted = torch.where(student == 0, 0.0, student * x)
    return torch.cat([per_bin.flatten(1), weights.sum(2), weighted.sum(2)], 1)


def _moments(sums: Tensor, num_models: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return counts [n, B], means [n, M, B] and covariances [n, M (M + 1) / 2, B] from the sums of the bins."""
    per_bin = sums.reshape(len(sums), -1, NUM_BINS)
    counts, totals, products = per_bin.split([1, num_models, per_bin.shape[1] - 1 - num_models], 1)
    means, squares = totals / counts.clamp(min=1), products / counts.clamp(min=1)
    covariances = squares - torch.stack([means[:, i] * means[:, j] for i, j in _pairs(num_models)], 1)
    covariances[..., -1] = 0.0
    return counts.squeeze(1), means, covariances


def _pairs(num_models: int) -> Iterator[tuple[int, int]]:
    """Yield the pairs of models in the order of `LogitSummary.covariances`."""
    return ((i, j) for i in range(num_models) for j in range(i, num_models))
