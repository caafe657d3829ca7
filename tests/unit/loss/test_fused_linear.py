# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The fused output layer equals float64 and the materialised path in every chunking and split."""

from __future__ import annotations

import itertools
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.distributed as dist
from called_collectives import GATHER, REDUCE_SCATTER, called_collectives
from fused_layer import (
    CHUNK,
    NUM_TOKENS,
    PADDED_VOCAB_SIZE,
    VOCAB_SIZE,
    WIDTH,
    Example,
    call,
    every_mode,
    every_tying,
    fused,
    materialised,
    reference,
    relative,
)
from ranks import RankPool
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.choices import FUSED_MODES
from megatron_selfdistill.loss import Divergence, Target, TokenStats, VocabShard
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss


@combinations(chunk_tokens=[1, 3, 4, 7, 12, 13, 14, 100], mode=FUSED_MODES, tied=[True, False], strength=2)
def test_every_chunking_equals_the_materialised_path(chunk_tokens: int, mode: str, tied: bool) -> None:
    """A chunk of 7 gives two chunks: there is room for the teacher behind the first, and none behind the second."""
    example = Example(tied)
    expected = materialised(example, Target(anchor="student"), Divergence())
    got = fused(example, Target(anchor="student"), Divergence(), mode, chunk_tokens)
    for field in fields(TokenStats):
        value = getattr(expected[0], field.name)
        torch.testing.assert_close(getattr(got[0], field.name), value, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(got[1:], expected[1:], strict=True):
        assert theirs is not None and relative(mine, theirs) < 2e-6


@every_tying
@every_mode
@pytest.mark.parametrize("chunk_tokens", [CHUNK, 100])
def test_an_observer_sees_the_logits_and_statistics_of_every_chunk_and_changes_no_bit(
    chunk_tokens: int, mode: str, tied: bool
) -> None:
    example = Example(tied)
    expected = fused(example, Target(anchor="student"), Divergence(), mode, chunk_tokens)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def observe(tokens: slice, student_logits: Tensor, teacher_logits: Tensor, stats: TokenStats) -> None:
        assert tokens.start == sum(len(beta) for *_, beta in seen) and tokens.stop - tokens.start == len(stats.beta)
        seen.append((student_logits.clone(), teacher_logits.clone(), stats.beta))

    got = fused(example, Target(anchor="student"), Divergence(), mode, chunk_tokens, observe=observe)
    student_logits, teacher_logits, beta = map(torch.cat, zip(*seen, strict=True))
    of_teacher = example.weight if example.teacher_weight is None else example.teacher_weight
    torch.testing.assert_close(student_logits, example.student @ example.weight.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(teacher_logits, example.teacher @ of_teacher.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(beta, got[0].beta)
    assert all(
        torch.equal(getattr(got[0], field.name), getattr(expected[0], field.name)) for field in fields(TokenStats)
    )
    assert all(map(torch.equal, got[1:], expected[1:]))


@every_mode
def test_bf16_gradients_are_as_near_to_float64_as_the_materialised_paths(mode: str) -> None:
    example = Example(False, torch.bfloat16, num_tokens=200)
    _, dgrad, wgrad = reference(example, Target(anchor="student"), Divergence())
    of_path = []
    for got in (
        materialised(example, Target(anchor="student"), Divergence()),
        fused(example, Target(anchor="student"), Divergence(), mode, 64),
    ):
        assert got[1].dtype == got[2].dtype == torch.bfloat16
        of_path.append((relative(got[1], dgrad), relative(got[2][:VOCAB_SIZE], wgrad)))
    for theirs, ours in zip(*of_path, strict=True):
        assert theirs < 0.05 and ours < 1.5 * theirs


class Recorder:
    """A `WeightGradient` that sums by itself."""

    def __init__(self) -> None:
        self.total, self.calls = torch.zeros(PADDED_VOCAB_SIZE, WIDTH), 0

    def add(self, hidden: Tensor, gradient: Tensor) -> None:
        assert hidden.is_contiguous() and gradient.is_contiguous()
        self.total += gradient.T @ hidden
        self.calls += 1

    def for_autograd(self) -> Tensor:
        return torch.full_like(self.total, 7.0)


@pytest.mark.parametrize(("mode", "calls"), [("keep_gradient", 1), ("low_memory", 3)])
def test_a_given_weight_gradient_takes_all_of_it_in_backward_and_hands_autograd_something_else(
    mode: str, calls: int
) -> None:
    example = Example(False)
    _, dgrad, wgrad = fused(example, Target(anchor="student"), Divergence(), mode)
    recorder = Recorder()
    hidden, weight = example.student.clone().requires_grad_(), example.weight.clone().requires_grad_()
    for done in range(3):  # microbatches
        loss = call(example, hidden, weight, mode=mode, weight_gradient=recorder).loss
        assert recorder.calls == done * calls, "nothing is added in forward"
        (loss * example.row_weights).sum().backward()
        assert recorder.calls == (done + 1) * calls
    assert wgrad is not None and relative(recorder.total, 3 * wgrad) < 1e-6
    assert hidden.grad is not None and relative(hidden.grad, 3 * dgrad) < 1e-6
    assert weight.grad is not None and (weight.grad == 3 * 7.0).all()


def split_over_ranks(num_tokens: int, dtype: torch.dtype) -> list[tuple[TokenStats, Tensor, Tensor, dict[str, int]]]:
    """Run each (tied, mode, form of hidden states) on this rank, and count how often it calls each collective."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    cut = slice(rank * WIDTH // size, (rank + 1) * WIDTH // size)
    owner = (torch.arange(num_tokens) * 7 // 3) % size if num_tokens > 1 else torch.full((num_tokens,), size - 1)
    counts = torch.bincount(owner, minlength=size)
    places = torch.stack([(owner[:i] == owner[i]).sum() for i in range(num_tokens)]) if num_tokens else owner
    found = []
    for tied, mode, sequence_parallel in itertools.product([True, False], FUSED_MODES, [False, True]):
        example = Example(tied, dtype, num_tokens)
        options: dict[str, Any] = {}
        if sequence_parallel:
            longest = int(counts.max())
            own = torch.full((longest, WIDTH), torch.nan, dtype=dtype)
            own[: counts[rank]] = example.student[owner == rank]
            options = {"hidden": own, "gather_indices": owner * longest + places}
            options["teacher_hidden"] = example.teacher[:, cut]
        with called_collectives() as called:
            stats, dgrad, wgrad = fused(example, Target(anchor="student"), Divergence(), mode, group=group, **options)
        calls = {name: called.count(name) for name in (GATHER, "all_reduce", REDUCE_SCATTER)}
        assert dgrad is not None and wgrad is not None
        if sequence_parallel:  # back into the order of tokens
            assert (dgrad[counts[rank] :] == 0).all(), "rows that no token needs"
            whole = torch.zeros_like(example.student)
            whole[owner == rank] = dgrad[: counts[rank]]
            dist.all_reduce(whole)
            dgrad = whole
        found.append((stats, dgrad, wgrad, calls))
    return found


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_every_split_equals_one_rank(ranks: RankPool, world_size: int) -> None:
    per_rank = ranks.run(split_over_ranks, NUM_TOKENS, torch.float32, world_size=world_size)
    cases = list(itertools.product([True, False], FUSED_MODES, [False, True]))
    num_chunks = -(-NUM_TOKENS // CHUNK)
    for (tied, mode, sequence_parallel), *shards in zip(cases, *per_rank, strict=True):
        case = (tied, mode, sequence_parallel)
        stats, dgrad, wgrad = fused(Example(tied), Target(anchor="student"), Divergence(), mode)
        for shard in shards:
            for field in fields(TokenStats):
                first, value = getattr(shards[0][0], field.name), getattr(shard[0], field.name)
                assert torch.equal(first, value), (case, "the same bits on every rank")
                torch.testing.assert_close(value, getattr(stats, field.name), rtol=1e-5, atol=1e-5)
            assert relative(shard[1], dgrad) < 2e-6, case
        assert relative(torch.cat([shard[2] for shard in shards]), wgrad) < 2e-6, case
        again = mode == "low_memory"
        assert shards[0][3] == {
            # The loss's three, in forward only; the teacher's rows; the student's, once more in backward.
            GATHER: 3 * num_chunks + (num_chunks * (1 + again) + 2) * sequence_parallel,
            "all_reduce": 1 - sequence_parallel,
            REDUCE_SCATTER: 1 * sequence_parallel,
        }, case


@pytest.mark.full
def test_the_weights_gradient_of_many_chunks_in_bf16_is_as_exact_as_that_of_one() -> None:
    generator = torch.Generator().manual_seed(5)
    states = [torch.randn(256, 16, generator=generator).bfloat16() for _ in range(2)]
    weight, tokens = torch.randn(64, 16, generator=generator).bfloat16(), torch.arange(256) % 64
    found = {}
    for chunk_tokens in (256, 2):
        leaf = weight.clone().requires_grad_()
        stats = fused_distillation_loss(
            *states,
            leaf,
            None,
            tokens,
            target=Target(anchor="student"),
            divergence=Divergence("forward_kl"),
            vocab=VocabShard(0, 64, 64),
            chunk_tokens=chunk_tokens,
            mode="low_memory",
        )
        (found[chunk_tokens],) = torch.autograd.grad(stats.loss.sum(), leaf)
    assert found[2].dtype == torch.bfloat16
    assert relative(found[2].float(), found[256].float()) < 2.0**-8, "each is rounded once to a bf16 number"


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_ranks_without_rows_of_their_own(ranks: RankPool, num_tokens: int) -> None:
    per_rank = ranks.run(split_over_ranks, num_tokens, torch.float32, world_size=2)
    cases = itertools.product([True, False], FUSED_MODES, [False, True])
    for (tied, mode, _), *shards in zip(cases, *per_rank, strict=True):
        _, dgrad, wgrad = fused(Example(tied, num_tokens=num_tokens), Target(anchor="student"), Divergence(), mode)
        for shard in shards:
            torch.testing.assert_close(shard[1], dgrad, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(torch.cat([shard[2] for shard in shards]), wgrad, rtol=2e-6, atol=1e-6)
        nothing = not any(sum(shard[3].values()) for shard in shards)
        assert num_tokens or (nothing and not wgrad.any()), "DDP counts on every weight having a gradient"


@every_mode
def test_what_backward_has_used_up_cannot_be_used_again(mode: str) -> None:
    example = Example(True)
    loss = call(example, example.student.clone().requires_grad_(), example.weight, mode=mode).loss.sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_hidden_states_that_do_not_fit_are_refused() -> None:
    example = Example(True)
    few = (example.student[:5], example.weight)
    for options, named in (({}, "teacher_hidden"), ({"gather_indices": torch.zeros(4).long()}, "gather_indices")):
        with pytest.raises(ValueError, match=rf"{named} must be \["):
            call(example, *few, mode="low_memory", **options)
