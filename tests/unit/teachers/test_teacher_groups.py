# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A step is divided by teacher alike on all replicas, and nothing of it is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.data.contexts import ContextPair, TeacherPrompt
from megatron_selfdistill.distributed import ranks as rank_groups
from megatron_selfdistill.sources.source import StepBatch
from megatron_selfdistill.teachers.teacher_groups import by_teacher, teacher_metrics
from tests.unit.metrics.test_step import LAYOUTS, NUM_TOKENS, all_rows, output_of, share_of_rank

TEACHERS = {"math": None, "code": None, "never": None, "default": None}


def batch_of(*named: tuple[str, int]) -> StepBatch:
    """Return a batch with a context of the teacher and the number of response tokens of each of ``named``."""
    contexts = [
        ContextPair(f"p{i}", [1], [2], [3] * length, False, teacher=name) for i, (name, length) in enumerate(named)
    ]
    return StepBatch(contexts=contexts, solutions=[it.problem_id for it in contexts], responses=(None,))  # type: ignore[arg-type]


def groups_of(batches: list[StepBatch], teachers: Any = TEACHERS) -> list[tuple[Any, ...]]:
    """Return teacher, ids, solutions, share, whether it ends the step, and number of responses of each batch.

    ``batches``: those of each replica.
    """
    grid = rank_groups.initialize(ParallelConfig(), seed=0)
    try:
        return [
            (
                one.teacher,
                [it.problem_id for it in one.contexts],
                one.solutions,
                one.share,
                one.ends_step,
                len(one.responses),
            )
            for one in by_teacher(batches[grid.dp_rank], teachers, grid)
        ]
    finally:
        rank_groups.shutdown()


def divided(ranks: Any, *batches: StepBatch, **options: Any) -> list[list[tuple[Any, ...]]]:
    found: list[list[tuple[Any, ...]]] = ranks.run(
        groups_of, list(batches), world_size=len(batches), init_process_group=False, **options
    )
    return found


def test_all_replicas_have_the_same_teachers_in_the_order_of_the_names_and_some_have_no_contexts(ranks):
    first = batch_of(("math", 3), ("default", 1), ("math", 2))
    one, other = divided(ranks, first, batch_of(("default", 2), ("code", 4)))
    assert one == [
        ("code", [], [], 4 / 12, False, 1),
        ("default", ["p1"], ["p1"], 7 / 12, False, 0),
        ("math", ["p0", "p2"], ["p0", "p2"], 1.0, True, 0),
    ]
    assert other == [
        ("code", ["p1"], ["p1"], 4 / 12, False, 1),
        ("default", ["p0"], ["p0"], 7 / 12, False, 0),
        ("math", [], [], 1.0, True, 0),
    ]


def test_a_step_without_contexts_is_one_batch_of_the_first_teacher(ranks):
    assert divided(ranks, batch_of()) == [[("code", [], [], 1.0, True, 1)]]


def coefficients_of(batches: list[StepBatch]) -> list[tuple[str, list[list[int]], list[float]]]:
    """Return teacher, prompts, and the weight of each token of each batch; on every rank the batch of its replica."""
    grid = rank_groups.initialize(ParallelConfig(), seed=0)
    try:
        found = []
        for one in by_teacher(batches[grid.dp_rank], TEACHERS, grid):
            assert one.token_coefficients is not None
            log_probs = torch.zeros(sum(one.response_lengths))
            weights = one.token_coefficients(log_probs, torch.arange(len(log_probs))).divergence
            found.append((one.teacher, [it.teacher_prompt for it in one.contexts], weights.tolist()))
        return found
    finally:
        rank_groups.shutdown()


def test_a_response_with_several_teachers_is_in_the_batch_of_each_and_counts_once(ranks):
    """Of 3 + 1 tokens, 3 are read twice: the schedule counts 7, so that a weight of 7 / 4 is the share 1."""
    shared = batch_of(("code", 3))
    of_teachers = (TeacherPrompt("code", 0.25, [7]), TeacherPrompt("math", 0.75, [8, 9]))
    shared = replace(shared, contexts=[replace(shared.contexts[0], of_teachers=of_teachers)])
    alone = batch_of(("math", 1))
    one, other = ranks.run(coefficients_of, [shared, alone], world_size=2, init_process_group=False)
    assert one == [("code", [[7]], [0.25 * 7 / 4] * 3), ("math", [[8, 9]], [0.75 * 7 / 4] * 3)]
    assert other == [("code", [], []), ("math", [[2]], [7 / 4])]


def products_of(batches: list[StepBatch]) -> list[tuple[str, list[str], list[int], float, bool]]:
    """Return teacher, ids, numbers of teachers of the contexts, share and lack of coefficients of each batch."""
    grid = rank_groups.initialize(ParallelConfig(), seed=0)
    try:
        return [
            (
                one.teacher,
                [it.problem_id for it in one.contexts],
                [len(it.of_teachers) for it in one.contexts],
                one.share,
                one.token_coefficients is None,
            )
            for one in by_teacher(batches[grid.dp_rank], TEACHERS, grid, joins=True)
        ]
    finally:
        rank_groups.shutdown()


def test_a_response_of_a_product_is_in_one_batch_with_its_teachers_and_has_no_coefficient(ranks):
    """Replicas agree on the products that any of them has."""
    both = (TeacherPrompt("code", 0.25, [7]), TeacherPrompt("math", 0.75, [8, 9]))
    mixed = batch_of(("code", 3), ("math", 1), ("code", 2))
    mixed = replace(mixed, contexts=[replace(mixed.contexts[0], of_teachers=both), *mixed.contexts[1:]])
    one, other = ranks.run(products_of, [mixed, batch_of(("math", 2))], world_size=2, init_process_group=False)
    assert one == [
        ("code", ["p2"], [0], 2 / 8, True),
        ("code+math", ["p0"], [2], 5 / 8, True),
        ("math", ["p1"], [0], 1.0, True),
    ]
    assert [name for name, *_ in other] == ["code", "code+math", "math"] and other[1][1] == []


def test_a_context_without_a_known_teacher_is_an_error(ranks):
    with pytest.raises(Exception, match=r"problem 'p0' names the teacher '', expected one of code, default, math, nev"):
        divided(ranks, batch_of(("", 2)))


def of_teachers_in_layout(sizes: dict[str, int]) -> dict[str, float]:
    """Return the metrics of two teachers, the second of which reads two partial batches."""
    grid, output, _ = share_of_rank(sizes)
    output.measures_teacher = False
    whole = output_of(None if output.stats is None else output.stats)
    return teacher_metrics([("math", whole), ("code", output), ("math", whole)], grid)


@pytest.mark.parametrize(("world_size", "sizes"), LAYOUTS)
def test_the_metrics_of_each_teacher_are_the_means_over_its_tokens_in_every_layout(ranks, world_size, sizes):
    stats = all_rows()
    expected = {
        "teacher_tokens/code": NUM_TOKENS,
        "teacher_loss/code": float(stats.loss.mean()),
        "teacher_tokens/math": 2 * NUM_TOKENS,
        "teacher_loss/math": float(stats.loss.mean()),
        "teacher_top1_agreement/math": float(stats.top1_agreement.double().mean()),
    }
    for found in ranks.run(of_teachers_in_layout, sizes, world_size=world_size):
        assert found == pytest.approx(expected, rel=1e-12)
