# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Every replica packs its own contexts, and all replicas get microbatches of one number and one length."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import layouts
import models
import pytest
import torch

from megatron_selfdistill.config import load
from megatron_selfdistill.data.packed_batch import PackingRules
from megatron_selfdistill.distributed.ranks import initialize
from megatron_selfdistill.pipeline.batch import (
    Packing,
    StepPlan,
    budgets_of,
    counts_by_budget,
    pack_everywhere,
    raised_to_multiple,
)
from megatron_selfdistill.pipeline.configured_packing import configured_packing, packing_of_model
from megatron_selfdistill.pipeline.placement import _costs, placed, placement_everywhere

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


@pytest.mark.parametrize(
    ("store_gb", "cuts", "num_controls", "override", "stored"),
    [
        (0.125, "", 0, "", 16384),  # tokens, with 1024 values of teacher and reference each, in float32
        (0.125, "", 0, "target.anchor=student", 2 * 16384),
        (0.125, "", 1, "", 2 * 16384 / 3),
        (0.125, "tensor", 0, "", 2 * 16384),
        (0.0, "pipeline", 0, "", math.inf),
    ],
)
def test_the_teacher_comes_first_in_steps_whose_states_fit(store_gb, cuts, num_controls, override, stored):
    """Where the longest responses fit, the order is known before the first step."""
    keys = [f"schedule.teacher_store_gb={store_gb}", "data.global_batch_size=2", *filter(None, [override])]
    sizes = {f"{name}_parallel_size": 1 + (name[:-6] == cuts) for name in ("tensor_model", "context", "pipeline_model")}
    model = SimpleNamespace(hidden_size=1024, params_dtype=torch.float32, fp8=None, **sizes)

    def packing(*more: str) -> Packing:
        return configured_packing(load([*keys, *more]), SimpleNamespace(dp_size=2), model, num_controls)

    longest = "rollout.max_new_tokens={}".format
    most = int(min(stored, 32768))
    assert packing(longest(most)).pair_order == "teacher_first"
    assert packing(longest(most), "schedule.pair_order=alternating").pair_order == "alternating"
    beyond = packing(longest(most + 1), "data.max_length=65536", "schedule.max_tokens=65536")
    assert beyond.stored_tokens == pytest.approx(stored)
    assert beyond.pair_order == ("teacher_first" if cuts == "pipeline" else None)


def orders_of_steps(shares: list[list[int]], stored_tokens: list[int]) -> list[tuple[bool, int]]:
    """Return whether a step alternates, and its time in passes of a token, for each number of tokens that may wait."""
    grid = initialize(models.parallel(), seed=1)
    contexts, found = [layouts.contexts()[i] for i in shares[grid.dp_rank]], []
    for stored in stored_tokens:
        batch = pack_everywhere(contexts, Packing(layouts.MAX_TOKENS, None, True, stored_tokens=stored), grid)
        found.append((batch.paired, (3 * len(batch.student) + len(batch.teacher)) * batch.seq_length))
    return found


def test_the_replica_with_most_response_tokens_decides_the_order_of_a_step(ranks):
    """A replica with fewer tokens, which alone would take the other order, follows."""
    most = max(sum(len(layouts.contexts()[i].response) for i in share) for share in SHARES)
    one, other = ranks.run(orders_of_steps, SHARES, [most, most - 1], world_size=2)
    assert one == other
    (alternates, apart), (also, paired) = one
    assert not alternates and also
    assert apart < paired, "apart, the student's microbatches are fuller"


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("pair_order", ["teacher_first", "alternating"])
def test_the_interleaved_schedule_gets_a_multiple_of_its_stages(ranks, pair_order, with_reference):
    """A reference reads the student's microbatches, which then count twice."""
    arguments = [[0, 1, 2]], pair_order, {"pp": 2, "vpp": 2}, with_reference
    for _, num_student, num_teacher, _ in ranks.run(packed_share, *arguments, world_size=2):
        assert (num_student * (1 + with_reference) + num_teacher) % 2 == 0
        assert pair_order == "teacher_first" or num_student == num_teacher


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
def test_a_step_without_a_teacher_gets_a_multiple_of_its_stages(paired, with_reference):
    """The teachers of the key ``teachers`` that read apart leave a step to the student and its reference."""
    num_student, num_teacher = raised_to_multiple(3, 0, 4, paired=paired, with_reference=with_reference)
    assert (num_student, num_teacher) == (4, 0)


def placements(shares: list[list[int]], pair_order: str) -> list[list[int]] | None:
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


def flops(length: int, width: int) -> int:
    """Return the FLOPs of a layer: 24 h^2 per token, and 2 h L for the causal attention of a token of L."""
    return length * (24 * width**2 + 2 * width * length)


def packing_of(width: int, **more: Any) -> Packing:
    model = SimpleNamespace(hidden_size=width, fp8=None)
    return packing_of_model(model, **{"max_tokens": 8192, "pair_order": "teacher_first", "with_teacher": True} | more)


@pytest.mark.parametrize("width", [16, 1024])
@pytest.mark.parametrize(("with_reference", "passes"), [(False, 3), (True, 4)])
def test_the_cost_of_a_context_is_that_of_the_flops_of_its_layers(width, with_reference, passes):
    """The student's backward pass takes two; the reference reads the student's contexts, and the teacher its own."""
    packing = packing_of(width, with_reference=with_reference, num_controls=1)
    for student, *teachers in [(1, 2, 3), (width, 3 * width, width), (40 * width, 50 * width, 60 * width)]:
        expected = (passes * flops(student, width) + sum(flops(one, width) for one in teachers)) / (24 * width**2)
        *lengths, cost = _costs(packing, student, *teachers)
        assert lengths == [student, sum(teachers)] and expected - 1 < cost <= expected


def placements_of_turns() -> list[list[int]] | None:
    grid = initialize(models.parallel(), seed=1)
    packing = Packing(layouts.MAX_TOKENS, "teacher_first", True, joins_turns=True)
    return placement_everywhere(layouts.turns(3, num_episodes=4) if grid.dp_rank else [], packing, grid)


def test_the_turns_of_an_episode_go_to_one_replica(ranks):
    (one, other) = ranks.run(placements_of_turns, world_size=2)
    assert one == other and one is not None and one[0] == []
    episodes = [set(one[1][start : start + 3]) for start in range(0, 12, 3)]
    assert all(len(replicas) == 1 for replicas in episodes) and set.union(*episodes) == {0, 1}


@pytest.mark.full
@pytest.mark.parametrize("shares", [[[], []], [[3], [3]], [[3, 1], [1, 3]]], ids=["none", "one each", "equal"])
def test_contexts_stay_where_nothing_is_gained(ranks, shares):
    assert ranks.run(placements, shares, "teacher_first", world_size=2) == [None, None]


RULES = PackingRules(max_tokens=16384, cp_size=1, tp_size=1, paired=False)


def response_lengths(count: int, seed: int = 0) -> list[int]:
    """Return log-normal lengths with mean 1400, before they are cut at 4096."""
    generator, sigma = random.Random(seed), 0.8
    return [min(4096, math.ceil(generator.lognormvariate(math.log(1400) - sigma**2 / 2, sigma))) for _ in range(count)]


def shares(values: Sequence[int], replicas: Sequence[int], num_replicas: int) -> list[list[int]]:
    return [[v for v, r in zip(values, replicas, strict=True) if r == replica] for replica in range(num_replicas)]


def placed_lengths(by_replica: Sequence[Sequence[int]]) -> list[list[int]]:
    lengths = [length for own in by_replica for length in own]
    homes = [replica for replica, own in enumerate(by_replica) for _ in own]
    return shares(lengths, placed([(length,) for length in lengths], homes, len(by_replica)), len(by_replica))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param([[3, 3], [3, 3]], [[3, 3], [3, 3]], id="equal lengths stay"),
        pytest.param([[7, 1], [5, 2]], [[7, 1], [5, 2]], id="nothing to gain stays"),
        pytest.param([[90, 4, 3], [2], [1]], [[90], [4, 2], [3, 1]], id="a giant is left alone"),
        pytest.param([[4, 4, 4], [], []], [[4], [4], [4]], id="replicas without contexts get some"),
        pytest.param([[5], [], [2, 2], []], [[5], [], [2, 2], []], id="fewer contexts than replicas"),
        pytest.param([[], []], [[], []], id="no contexts"),
        pytest.param([[0, 0, 6], [2]], [[0, 0, 6], [2]], id="costs of nothing"),
    ],
)
def test_contexts_leave_home_only_where_another_replica_has_less_to_do(before, after):
    assert placed_lengths(before) == after


def test_all_units_of_cost_are_balanced():
    """The replicas have equal sums of both units; the last unit, the whole cost, alone would accept the homes."""
    costs = [(8, 2, 10), (8, 2, 10), (2, 8, 10), (2, 8, 10)]
    assert placed(costs, [0, 0, 1, 1], 2) in ([0, 1, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1])


@pytest.mark.parametrize("seed", range(20))
def test_no_replica_exceeds_its_share_by_more_than_one_context(seed):
    """A context that leaves home goes to the emptiest replica, which has at most the mean before it arrives."""
    generator = random.Random(seed)
    num_replicas = generator.choice([2, 3, 8, 33])
    by_replica = [response_lengths(generator.randrange(9), seed + r) for r in range(num_replicas)]
    everything = sum(map(sum, by_replica))
    after = placed_lengths(by_replica)
    assert after == placed_lengths(by_replica), "the result is deterministic"
    assert sorted(n for own in after for n in own) == sorted(n for own in by_replica for n in own)
    longest = max((n for own in by_replica for n in own), default=0)
    assert max(map(sum, after)) <= everything / num_replicas + longest


def test_budgets_go_down_to_half_of_the_longest_in_few_steps():
    assert budgets_of(RULES, 256) == list(range(16384, 8191, -256))
    for rules in (PackingRules(5000, 2, 4, False), PackingRules(7, 1, 1, True), PackingRules(1, 1, 1, True)):
        budgets = budgets_of(rules)
        assert budgets[0] == rules.capacity and len(budgets) <= 34
        assert all(budget % rules.length_multiple == 0 and 2 * budget >= budgets[0] for budget in budgets)
        assert budgets == sorted(set(budgets), reverse=True)


def plan(student: list[int], teacher: list[int], max_tokens: int, multiple: int = 1) -> StepPlan:
    rules = PackingRules(max_tokens, 1, 1, paired=False)
    budgets = budgets_of(rules)
    counts = counts_by_budget(student, teacher, rules, budgets)
    grid = SimpleNamespace(virtual_pipeline_model_parallel_size=multiple, pp_size=multiple)
    return Packing(max_tokens, "teacher_first", bool(teacher)).cheapest(budgets, counts, grid)


def test_a_step_takes_the_budget_with_the_least_padding():
    found = plan([10] * 5, [10] * 5, 40)  # 2 microbatches of 40, or of 30
    assert (found.num_student, found.num_teacher) == (2, 2) and 30 <= found.budget < 32


def test_microbatches_that_the_schedule_needs_anyway_share_the_tokens():
    found = plan([10] * 8, [], 80, multiple=2)
    assert (found.num_student, found.budget // 10) == (2, 4)


def test_a_budget_holds_the_longest_context():
    found = plan([60, 10, 10], [60, 10, 10], 64)
    assert found.budget >= 60 and (found.num_student, found.num_teacher) == (2, 2)
    assert plan([], [], 64).num_student == 1
