# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Every replica packs its own contexts, and all replicas get microbatches of one number and one length."""

from __future__ import annotations

import layouts
import models
import pytest
import torch

from megatron_selfdistill.distributed.ranks import initialize
from megatron_selfdistill.pipeline.batch import Packing, pack_everywhere, placement_everywhere

SHARES = [[3, 4], [0, 1, 2, 5, 6]]
"""The contexts of each of two replicas."""


def packed_share(
    shares: list[list[int]], pair_order: str, cuts: dict, with_reference: bool = False
) -> tuple[int, int, int, torch.Tensor]:
    """Return the length, numbers of microbatches, and response tokens in the order of the student's ids."""
    grid = initialize(models.parallel(**cuts), seed=1)
    packing = Packing(layouts.MAX_TOKENS, pair_order, True, with_reference)
    batch = pack_everywhere([layouts.contexts()[i] for i in shares[grid.dp_rank]], packing, grid)
    ids = torch.cat([microbatch.response_ids for microbatch in batch.student]).sort().values
    assert ids.equal(torch.arange(len(batch.response_tokens)))
    return batch.seq_length, len(batch.student), len(batch.teacher), batch.response_tokens


@pytest.mark.parametrize("pair_order", ["teacher_first", "alternating"])
@pytest.mark.parametrize("shares", [SHARES, [[], list(range(7))]], ids=["some each", "none on one"])
def test_replicas_with_different_contexts_get_microbatches_of_one_number_and_length(ranks, shares, pair_order):
    (one, other) = ranks.run(packed_share, shares, pair_order, {}, world_size=2)
    assert one[:3] == other[:3]
    assert min(one[1:3]) > 1, "there must be several microbatches to differ in"
    for share, (*_, tokens) in zip(shares, (one, other), strict=True):
        assert tokens.tolist() == [token for i in share for token in layouts.contexts()[i].response]


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("pair_order", ["teacher_first", "alternating"])
def test_the_interleaved_schedule_gets_a_multiple_of_its_stages(ranks, pair_order, with_reference):
    """A reference reads the student's microbatches, which then count twice."""
    arguments = [[0, 1, 2]], pair_order, {"pp": 2, "vpp": 2}, with_reference
    for _, num_student, num_teacher, _ in ranks.run(packed_share, *arguments, world_size=2):
        assert (num_student * (1 + with_reference) + num_teacher) % 2 == 0
        assert pair_order == "teacher_first" or num_student == num_teacher


def placements(shares: list[list[int]], pair_order: str) -> list[list[int]] | None:
    """Return the replicas of the contexts of each replica."""
    grid = initialize(models.parallel(), seed=1)
    packing = Packing(layouts.MAX_TOKENS, pair_order, True, attention_tokens=1000)
    return placement_everywhere([layouts.contexts()[i] for i in shares[grid.dp_rank]], packing, grid)


@pytest.mark.parametrize("pair_order", ["teacher_first", "alternating"])
def test_a_replica_with_too_much_to_do_gives_contexts_away(ranks, pair_order):
    (one, other) = ranks.run(placements, [[], list(range(7))], pair_order, world_size=2)
    assert one == other and one is not None
    work = [context.student_length for context in layouts.contexts()]
    moves = sum(cost for cost, replica in zip(work, one[1], strict=True) if replica == 0)
    assert one[0] == [] and abs(2 * moves - sum(work)) <= max(work)


@pytest.mark.parametrize("shares", [[[], []], [[3], [3]], [[3, 1], [1, 3]]], ids=["none", "one each", "equal"])
def test_contexts_stay_where_nothing_is_gained(ranks, shares):
    assert ranks.run(placements, shares, "teacher_first", world_size=2) == [None, None]
