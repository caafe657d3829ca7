# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A summary of logits gives the target's k on nasty rows, for any weight and anchor, and is the same on shards."""

from __future__ import annotations

import math

import distributions as tool
import pytest
import torch
import torch.distributed as dist
from summed_target import log_sum, matching_beta, of_rows, weights_of
from torch import Tensor

from megatron_selfdistill.instruments.explorer.logit_summary import NUM_BINS, TOP, LogitSummary, summarise_logits
from megatron_selfdistill.loss import Target, VocabShard, mixed_target
from megatron_selfdistill.loss.definition import entropy

VOCAB_SIZE, PADDED_VOCAB_SIZE = 2300, 3200  # over 4 ranks: 800, 800, 700 and no valid columns
TARGETS = [
    Target(teacher_weight=w, k_max=k_max, anchor="student") for w in (0.25, 0.75, 3.0) for k_max in ("1 + w", None)
]
ANCHORED = [
    Target(teacher_weight=w, k_max=k_max, anchor="reference", match=match)
    for w in (0.25, 0.75, 3.0)
    for k_max in ("1 + w", None)
    for match in ("reference", "student")
]
BOUNDS = (1e-5, 3e-4, 2e-3)
"""The greatest relative errors of k that a summary may cause: the median, of 95 % of the rows, and of all rows."""
SWITCHED = (2e-5, 1e-3, 5e-2)
"""The same where the bins lie along another mix: that of the reference for the mix with the student."""


def pairs(num_columns: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return float64 logits of student and teacher: every class of the solver's benchmark, and masked columns."""
    drawn = [tool.draw(name, num_rows, num_columns, 3) for name in tool.DISTRIBUTIONS]
    student, teacher = (torch.cat([each[i].double() for each in drawn]) for i in range(2))
    generator = torch.Generator().manual_seed(5)
    for low in (-1e4, -math.inf):
        s = 2.2 * torch.randn(num_rows, num_columns, generator=generator).double()
        s[:, ::7] = low
        t = s + torch.randn(num_rows, num_columns, generator=generator)
        student, teacher = torch.cat([student, s]), torch.cat([teacher, t])
    return student, teacher


def triples(num_columns: int, num_rows: int) -> list[Tensor]:
    """Return `pairs` as reference and teacher, and a student near the reference, in the order of a summary."""
    reference, teacher = pairs(num_columns, num_rows)
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return [reference + 0.5 * noise, teacher, reference]


def errors_of_k(rows: list[Tensor], targets: list[Target]) -> Tensor:
    """Return the relative errors of k from summaries against `mixed_target` on whole rows, sorted."""
    summary = of_rows(rows, rows[0].shape[1])
    errors = []
    for target in targets:
        reference = rows[2] if target.is_anchored else None
        exact = mixed_target(rows[0], rows[1], target, reference).beta.tolist()
        wanted = entropy(rows[2 if target.matches_reference else 0].log_softmax(-1)).tolist()
        found = [matching_beta(summary, row, h, target) for row, h in enumerate(wanted)]
        errors += [abs(a / b - 1) for a, b in zip(found, exact, strict=True)]
    return torch.tensor(sorted(errors))


def check(errors: Tensor, bounds: tuple[float, float, float] = BOUNDS) -> None:
    median, most, worst = (float(errors[int(share * (len(errors) - 1))]) for share in (0.5, 0.95, 1))
    print(f"relative error of k: median {median:.1e}, 95 % {most:.1e}, worst {worst:.1e}")
    assert all(found <= bound for found, bound in zip((median, most, worst), bounds, strict=True))


def test_k_of_a_mix_with_a_reference_is_that_of_whole_rows():
    check(errors_of_k(triples(4096, 1), [ANCHORED[4]]))


@pytest.mark.full
@pytest.mark.parametrize("num_columns", [4096, 32768])
def test_k_is_that_of_whole_rows_with_any_anchor(num_columns):
    check(errors_of_k(list(pairs(num_columns, 1)), TARGETS))
    check(errors_of_k(triples(num_columns, 1), ANCHORED))
    check(errors_of_k(triples(num_columns, 1), TARGETS), SWITCHED)


def test_a_summary_counts_every_column_once_and_keeps_the_largest():
    student, teacher, reference = triples(1000, 1)
    masked = torch.isneginf(student).any(1)
    summary = of_rows([student, teacher, reference], 1000)
    assert summary.logits.shape == (len(student), 3, 3 * TOP) and summary.counts.shape == (len(student), NUM_BINS)
    for row in range(len(student)):
        ids = summary.ids[row][summary.ids[row] >= 0].long()
        assert len(set(ids.tolist())) == len(ids) >= TOP
        existing = 1000 - int(torch.isneginf(student[row]).sum())
        assert len(ids) + summary.counts[row].sum() == existing
        for model, logits in enumerate((student, teacher, reference)):
            relative = logits[row] - logits[row].max()
            torch.testing.assert_close(summary.logits[row, model, : len(ids)], relative[ids], rtol=0, atol=1e-12)
            assert relative[ids].sort().values[-TOP:].equal(relative.sort().values[-TOP:])
            assert float(summary.log_normalisers[row, model]) == pytest.approx(float(relative.logsumexp(0)), abs=1e-9)
            p = student[row].softmax(0)
            mean = torch.where(p > 0, p * relative, 0.0).sum()
            assert float(summary.student_means[row, model]) == pytest.approx(float(mean), rel=1e-9, abs=1e-9)
    assert masked.any()


def sharded() -> LogitSummary:
    """Return the summary from this rank's shard, with garbage in the padding."""
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    vocab = VocabShard.from_group(PADDED_VOCAB_SIZE, VOCAB_SIZE, group)
    columns = slice(vocab.start, vocab.start + vocab.size)
    rows = triples(VOCAB_SIZE, 1)
    padding = torch.full((len(rows[0]), PADDED_VOCAB_SIZE - VOCAB_SIZE), 77.0, dtype=torch.float64)
    return summarise_logits([torch.cat([logits, padding], 1)[:, columns] for logits in rows], vocab)


def test_a_summary_of_shards_is_that_of_whole_rows_and_so_is_a_flat_one(ranks):
    """Where logits are equal, the choice of candidates may differ; what follows from the summary may not."""
    whole = of_rows(triples(VOCAB_SIZE, 1), VOCAB_SIZE)
    back = LogitSummary.of_flat(whole.flat(), 3)
    assert all(torch.equal(getattr(back, name), values) for name, values in vars(whole).items())
    shards = ranks.run(sharded, world_size=4)
    for summary in shards[1:]:
        assert torch.equal(summary.flat().nan_to_num(), shards[0].flat().nan_to_num())
    distinct = [row for row, ids in enumerate(whole.ids) if torch.equal(ids, shards[0].ids[row])]
    assert len(distinct) > len(whole.ids) / 2
    for name, values in vars(whole).items():
        torch.testing.assert_close(getattr(shards[0], name)[distinct], values[distinct], rtol=1e-6, atol=1e-6)
    weights = weights_of(Target(anchor="student"), 3)
    for row in range(len(whole.ids)):
        expected = log_sum(whole, row, 0.5, weights)
        assert log_sum(shards[0], row, 0.5, weights) == pytest.approx(expected, rel=1e-4, abs=1e-4)
