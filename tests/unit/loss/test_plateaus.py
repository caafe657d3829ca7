# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The loss finds its target also where H(beta) has a plateau: best columns that are nearly tied over a small tail."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import torch.distributed as dist
from plateaus import CLASSES, DIVERGENCES, TARGETS, assert_solved, draw, needing_the_third_pass, root
from ranks import RankPool
from torch import Tensor

from megatron_selfdistill.loss import Divergence, Status, Target, TokenStats, VocabShard, distillation_loss
from megatron_selfdistill.loss.sharded import shard_sums, token_statistics
from megatron_selfdistill.loss.sharded.shard_sums import BetaGrid, Shard

Inputs = tuple[Tensor, Tensor, Tensor]


def run(
    rows: Inputs, target: Target, kind: Divergence, group: dist.ProcessGroup | None = None
) -> tuple[TokenStats, Tensor]:
    """Return the statistics and the gradient of this rank's columns, in float32, so that it is not rounded."""
    student, teacher, tokens = rows
    vocab = VocabShard.from_group(student.shape[1], student.shape[1], group)
    columns = slice(vocab.start, vocab.start + vocab.size)
    leaf = student[:, columns].float().requires_grad_()
    stats = distillation_loss(leaf, teacher[:, columns], tokens, target=target, divergence=kind, vocab=vocab)
    stats.loss.sum().backward()
    stats = stats.detached()
    assert leaf.grad is not None
    return stats, leaf.grad


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("rule", TARGETS)
@pytest.mark.parametrize("name", CLASSES)
def test_every_row_is_matched_and_all_that_is_reported_belongs_to_its_beta(name: str, rule: str, kind: str) -> None:
    rows = draw(name, num_rows=16)
    assert_solved(*run(rows, TARGETS[rule], DIVERGENCES[kind]), rows, TARGETS[rule], DIVERGENCES[kind])


@pytest.mark.parametrize("rule", TARGETS)
def test_the_smallest_plateau_is_matched_at_k_1_32_and_is_not_capped(rule: str) -> None:
    student, teacher = torch.zeros(1, 4096), torch.zeros(1, 4096)
    student[:, :2], teacher[:, :2] = 16.6, 7.0
    stats, _ = run((student, teacher, torch.zeros(1, dtype=torch.int64)), TARGETS[rule], Divergence())
    assert stats.status == Status.MATCHED and 1 / stats.beta.item() == pytest.approx(1.3163, rel=1e-3)
    assert abs(stats.target_entropy - stats.student_entropy) <= 1e-6


SHARDED = ["third pass", "forks, teacher 6 nats less sure, bf16", "two tied tops", "levels"]
CASES = [(target, kind) for target in TARGETS.values() for kind in DIVERGENCES.values()]


def sharded_rows(name: str) -> Inputs:
    return needing_the_third_pass() if name == "third pass" else draw(name, num_columns=320)


def on_a_rank() -> dict[str, list[tuple[TokenStats, Tensor]]]:
    """Return the results of this rank for every class of `SHARDED` and every case of `CASES`."""
    return {name: [run(sharded_rows(name), *case, dist.group.WORLD) for case in CASES] for name in SHARDED}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.full)])
def of_ranks(ranks: RankPool, request: pytest.FixtureRequest) -> list[dict[str, list[tuple[TokenStats, Tensor]]]]:
    """Return the results of each of 2 and of 4 ranks."""
    return ranks.run(on_a_rank, world_size=request.param)


@pytest.mark.parametrize("name", SHARDED)
def test_shards_of_the_vocabulary_give_the_same_and_the_same_bits_on_every_rank(
    of_ranks: list[dict[str, list[tuple[TokenStats, Tensor]]]], name: str
) -> None:
    rows = sharded_rows(name)
    for (target, kind), *shards in zip(CASES, *(results[name] for results in of_ranks), strict=True):
        for field in fields(TokenStats):
            values = [getattr(stats, field.name) for stats, _ in shards]
            assert all(torch.equal(values[0], value) for value in values), field.name
        assert_solved(shards[0][0], torch.cat([gradient for _, gradient in shards], 1), rows, target, kind)


def third_pass_by_hand(rows: Inputs, target: Target) -> tuple[Tensor, Tensor]:
    """Return the statuses after the second pass and after the third."""
    student, teacher, tokens = rows
    grid = BetaGrid.of(target, torch.float32)
    shard = Shard(student, teacher, grid.mix_weights, torch.float32)
    sums, argmax = shard_sums.first_pass(shard, grid, tokens, 0)
    solver_state = token_statistics.solve_tokens(sums, grid)
    status, found = None, []
    for _ in range(2):
        sums = shard_sums.second_pass(shard, solver_state.constants, argmax, forward_kl=False, status=status)
        results, solver_state = token_statistics.finish_tokens(solver_state, sums, grid, tokens, student.shape[1])
        status = results.status
        found.append(status)
    return found[0], found[1]


@pytest.mark.parametrize("rule", TARGETS)
def test_a_row_that_two_passes_do_not_match_is_unconverged_until_the_third(rule: str) -> None:
    second, third = third_pass_by_hand(needing_the_third_pass(), TARGETS[rule])
    assert (second == Status.UNCONVERGED).tolist() == [True, False, True, False]
    assert (third[::2] == Status.MATCHED).all() and torch.equal(third[1::2], second[1::2])


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


def test_no_row_is_unconverged_on_any_class_of_distributions() -> None:
    import distributions as tool

    for name in tool.DISTRIBUTIONS:
        for target in TARGETS.values():
            student, teacher = tool.draw(name, 16, 1000, 11)
            assert (tool.measure(student, teacher, target).status != Status.UNCONVERGED).all(), name
