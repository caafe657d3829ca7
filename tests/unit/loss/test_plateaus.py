# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The loss finds its target also where H(beta) has a plateau: best columns that are nearly tied over a small tail."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import torch.distributed as dist
from kernel_cases import BACKEND, DEVICE, every_backend, on_cpu
from plateaus import CLASSES, DIVERGENCES, TARGETS, assert_solved, draw, needing_the_third_pass, root
from ranks import RankPool
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.loss import Divergence, Status, Target, TokenStats, VocabShard, distillation_loss
from megatron_selfdistill.loss.sharded import token_statistics
from megatron_selfdistill.loss.sharded.shard_sums import Shard

Inputs = tuple[Tensor, Tensor, Tensor]


def run(
    rows: Inputs, target: Target, kind: Divergence, group: dist.ProcessGroup | None = None
) -> tuple[TokenStats, Tensor]:
    """Return the statistics and the gradient of this rank's columns, in float32, so that it is not rounded."""
    student, teacher, tokens = rows
    vocab = VocabShard.from_group(student.shape[1], student.shape[1], group)
    columns = slice(vocab.start, vocab.start + vocab.size)
    leaf = student[:, columns].float().to(DEVICE).requires_grad_()
    arguments = {"target": target, "divergence": kind, "vocab": vocab, "backend": BACKEND}
    stats = distillation_loss(leaf, teacher[:, columns].to(DEVICE), tokens.to(DEVICE), **arguments)
    stats.loss.sum().backward()
    assert leaf.grad is not None
    return on_cpu(stats), leaf.grad.cpu()


def rows_of(name: str) -> Inputs:
    return needing_the_third_pass() if name == "third pass" else draw(name, num_rows=16, num_columns=320)


@every_backend(cases=8)
@combinations(name=["third pass", *CLASSES], rule=list(TARGETS), kind=list(DIVERGENCES), strength=1, full_strength=2)
def test_every_row_is_matched_and_all_that_is_reported_belongs_to_its_beta(name: str, rule: str, kind: str) -> None:
    rows = rows_of(name)
    assert_solved(*run(rows, TARGETS[rule], DIVERGENCES[kind]), rows, TARGETS[rule], DIVERGENCES[kind])


CASES = [(target, kind) for target in TARGETS.values() for kind in DIVERGENCES.values()]
SHARDED = ["third pass", "forks, teacher 6 nats less sure, bf16", "two tied tops", "levels"]


def on_a_rank() -> list[list[tuple[TokenStats, Tensor]]]:
    return [[run(rows_of(name), *case, dist.group.WORLD) for case in CASES] for name in SHARDED]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_shards_of_the_vocabulary_give_the_same_and_the_same_bits_on_every_rank(
    ranks: RankPool, world_size: int
) -> None:
    for name, *of_ranks in zip(SHARDED, *ranks.run(on_a_rank, world_size=world_size), strict=True):
        for (target, kind), *shards in zip(CASES, *of_ranks, strict=True):
            for field in fields(TokenStats):
                values = [getattr(stats, field.name) for stats, _ in shards]
                assert all(torch.equal(values[0], value) for value in values), (name, field.name)
            gradient = torch.cat([gradient for _, gradient in shards], 1)
            assert_solved(shards[0][0], gradient, rows_of(name), target, kind)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_third_pass_reads_the_rows_that_need_it_and_no_other(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[int]] = []
    plain = Shard.chunks

    def chunks(self: Shard, needed: Tensor | None = None) -> list[slice | Tensor]:
        found = list(plain(self, needed))
        read.extend([] if needed is None else [row.tolist() for row in found])
        return found

    monkeypatch.setattr(Shard, "chunks", chunks)
    rows = needing_the_third_pass()
    stats, gradient = run(rows, Target(anchor="student"), DIVERGENCES[kind])
    assert read == [[0, 2]]
    assert_solved(stats, gradient, rows, Target(anchor="student"), DIVERGENCES[kind])


@pytest.mark.parametrize("rule", TARGETS)
def test_a_solver_that_misses_its_root_is_unconverged_and_not_capped(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = draw("two tied tops", num_rows=16)
    has_root = ~torch.isnan(root(rows[0], rows[1], TARGETS[rule]))
    monkeypatch.setattr(token_statistics, "_root_between", lambda left, right, wanted, max_entropy: left.beta)
    stats, _ = run(rows, TARGETS[rule], Divergence())
    assert (stats.status[has_root] == Status.UNCONVERGED).double().mean() > 0.8
    assert (stats.status[has_root] != Status.CAPPED).all()
