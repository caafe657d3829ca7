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


def groups_of(batches: list[StepBatch], joins: bool = False) -> list[dict[str, Any]]:
    """Return what each batch of this replica has; ``batches``: those of each replica."""
    grid = rank_groups.initialize(ParallelConfig(), seed=0)
    try:
        found = []
        for one in by_teacher(batches[grid.dp_rank], TEACHERS, grid, joins=joins):
            row = {"teacher": one.teacher, "ids": [it.problem_id for it in one.contexts], "share": one.share}
            row |= {"solutions": one.solutions, "ends": one.ends_step, "responses": len(one.responses)}
            row |= {"factors": [len(it.of_teachers) for it in one.contexts], "weights": None}
            if one.token_coefficients is not None:
                log_probs = torch.zeros(sum(one.response_lengths))
                weights = one.token_coefficients(log_probs, torch.arange(len(log_probs))).divergence
                row["weights"] = weights.tolist()
            found.append(row)
        return found
    finally:
        rank_groups.shutdown()


def divided(ranks: Any, *batches: StepBatch, joins: bool = False) -> list[list[dict[str, Any]]]:
    found: list[list[dict[str, Any]]] = ranks.run(
        groups_of, list(batches), joins, world_size=len(batches), init_process_group=False
    )
    return found


def fields(rows: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in ("teacher", *names)) for row in rows]


def test_all_replicas_have_the_same_teachers_in_the_order_of_the_names_and_some_have_no_contexts(ranks):
    first = batch_of(("math", 3), ("default", 1), ("math", 2))
    one, other = divided(ranks, first, batch_of(("default", 2), ("code", 4)))
    for found, of_teacher in ((one, ([], ["p1"], ["p0", "p2"])), (other, (["p1"], ["p0"], []))):
        code, default, math = of_teacher
        assert fields(found, "ids", "solutions", "share", "ends", "responses") == [
            ("code", code, code, 4 / 12, False, 1),
            ("default", default, default, 7 / 12, False, 0),
            ("math", math, math, 1.0, True, 0),
        ]


def test_a_step_without_contexts_is_one_batch_of_the_first_teacher(ranks):
    [found] = divided(ranks, batch_of())
    assert fields(found, "ids", "share", "ends", "responses") == [("code", [], 1.0, True, 1)]


BOTH = (TeacherPrompt("code", 0.25, [7]), TeacherPrompt("math", 0.75, [8, 9]))


def test_a_response_of_a_product_is_in_one_batch_with_its_teachers_and_has_no_coefficient(ranks):
    """Replicas agree on the products that any of them has."""
    mixed = batch_of(("code", 3), ("math", 1), ("code", 2))
    mixed = replace(mixed, contexts=[replace(mixed.contexts[0], of_teachers=BOTH), *mixed.contexts[1:]])
    found = divided(ranks, mixed, batch_of(("math", 2)), joins=True)
    one, other = (fields(rows, "ids", "factors", "share", "weights") for rows in found)
    assert one == [
        ("code", ["p2"], [0], 2 / 8, None),
        ("code+math", ["p0"], [2], 5 / 8, None),
        ("math", ["p1"], [0], 1.0, None),
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
