# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Contexts that go to another replica leave the loss, the gradient and the metrics of their step as they are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from taught import write_records_of_teachers
from tiny_run import overrides, with_trainer, write_chats

VERIFIED = "evaluation.verifier=tiny_run.starts_with_an_even_token"
TERMS = ("recipe=scope", "rollout.num_samples=2", "loss.rollout_correction=truncated_sequence", VERIFIED)
GUIDED = ("rollout.guidance=mixed", "loss.rollout_correction=truncated")
TURNS = (
    *("recipe=chat_logs", "data.path=DATA/chats.jsonl", "data.chat_template=DATA/template.jinja"),
    *("method.min_log_prob=-4", "method.unlikely=down_weight"),
)
PRODUCT = (
    *("data.path=DATA/shared.jsonl", "teachers.join=product"),
    *(
        "teachers.one={template: 'A{solution}|{problem}', weight: 2}",
        "teachers.other={template: '{problem}{solution}'}",
    ),
)
TP2 = "parallel.tensor_model_parallel_size=2"


@pytest.fixture(scope="module")
def chats(own_data: Path) -> Path:
    """Return a directory that also has logged replies of many lengths."""
    write_chats(own_data, ["7" * (1 + 5 * number % 13) for number in range(40)])
    write_records_of_teachers(own_data, [{"one": 1, "other": 3}, {"one": 1, "other": 1}], "shared.jsonl")
    return own_data


def arguments(data: Path, run_dir: Path, *options: str) -> list[str]:
    """Return the overrides of a run in which contexts fill several microbatches, which few contexts share."""
    own = ["schedule.max_tokens=48", "optimizer.use_distributed_optimizer=false", "metrics.teacher_every=1"]
    return overrides(data, run_dir, *own, *(option.replace("DATA", str(data)) for option in options))


def trained(trainer: Any, batch: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the gradients on this rank, reduced over the replicas, and the metrics of the batch."""
    output = trainer.forward_backward(batch, trainer.pack(batch)).output
    gradients = [p.main_grad.flatten().double() for chunk in trainer.learner.chunks for p in chunk.parameters()]
    return torch.cat(gradients), trainer.source.metrics(batch, output)


def described(batch: Any) -> list[tuple[Any, ...]]:
    return sorted(zip(map(repr, batch.contexts), batch.solutions, strict=True))


def batch_before_and_after(overrides: Sequence[str], way: str) -> tuple[Any, ...]:
    """Return replica, contexts, relative difference of the gradients and metrics, before and after contexts move.

    ``way``: "balanced"; "dealt": one context after the other goes to another replica; or "swapped" by two replicas.
    """

    def use(trainer: Any) -> tuple[Any, ...]:
        from megatron_selfdistill.distributed.collectives import gather_objects
        from megatron_selfdistill.sources.moved_contexts import moved

        (batch,), grid = trainer.batches(), trainer.grid
        if trainer.config.logged:  # of which the user accepted every other reply
            trainer.source._turns.accepted = {one.id for one in trainer.run_data.problems.problems[::2]}
        counts = gather_objects(len(batch.contexts), grid.dp_group)
        rounds = {"dealt": [list(range(count)) for count in counts], "swapped": [[1] * count for count in counts]}
        if way == "balanced":
            after = trainer.balance(batch)
        else:
            to = [[(r + i) % grid.dp_size for i in steps] for r, steps in enumerate(rounds[way])]
            after = moved(batch, to, grid)
        (one, metrics), (other, metrics_after) = (trained(trainer, some) for some in (batch, after))
        difference = ((other - one).norm() / one.norm()).item()
        return grid.dp_rank, described(batch), described(after), difference, metrics, metrics_after

    return with_trainer(overrides, use)


@pytest.mark.parametrize(
    ("layout", "options", "way"),
    [
        pytest.param((), TERMS, "balanced", id="DP4, terms and weights of responses, balanced"),
        pytest.param((TP2,), TURNS, "dealt", id="DP2xTP2, weights of logged turns, dealt", marks=pytest.mark.full),
        pytest.param((TP2,), GUIDED, "balanced", id="DP2xTP2, guided, balanced", marks=pytest.mark.full),
        pytest.param((TP2,), PRODUCT, "dealt", id="DP2xTP2, a product of teachers, dealt", marks=pytest.mark.full),
        pytest.param((), PRODUCT, "balanced", id="DP4, a product of teachers, balanced", marks=pytest.mark.full),
        pytest.param((), TERMS, "dealt", id="DP4, terms and weights of responses, dealt", marks=pytest.mark.full),
    ],
)
def test_a_step_whose_contexts_move_has_the_same_gradient_and_metrics(ranks, chats, tmp_path, layout, options, way):
    """Sums over other tokens on each replica round differently in float32: 1e-6 is some 16 of its roundings (6e-8)."""
    of_ranks = ranks.run(
        batch_before_and_after,
        arguments(chats, tmp_path / "run", *layout, *options),
        way,
        world_size=4,
        init_process_group=False,
    )
    before = {replica: contexts for replica, contexts, *_ in of_ranks}
    after = {replica: contexts for replica, _, contexts, *_ in of_ranks}
    assert before != after, "some contexts must move"
    everything = [sorted(chain.from_iterable(contexts.values())) for contexts in (before, after)]
    assert everything[0] == everything[1]
    for replica, _, contexts, difference, metrics, metrics_after in of_ranks:
        assert contexts == after[replica], "the ranks of a replica have the same contexts"
        assert difference <= 1e-6
        assert metrics_after == pytest.approx(metrics, rel=1e-5, abs=1e-5)


def test_replicas_that_swap_their_contexts_have_equal_bits(ranks, data, tmp_path):
    """The sum over two replicas has the same two summands."""
    of_ranks = ranks.run(
        batch_before_and_after,
        arguments(data, tmp_path / "run", *TERMS),
        "swapped",
        world_size=2,
        init_process_group=False,
    )
    (_, first, first_after, *_), (_, second, second_after, *_) = of_ranks
    assert (first_after, second_after) == (second, first) and first != second
    assert [difference for *_, difference, _, _ in of_ranks] == [0.0, 0.0]


def what_one_replica_moves(overrides: Sequence[str]) -> bool:
    return with_trainer(overrides, lambda trainer: trainer.balance(batch := trainer.next_batch()) is batch)


def test_one_replica_keeps_its_batch(ranks, data, tmp_path):
    assert ranks.run(
        what_one_replica_moves, arguments(data, tmp_path / "run"), world_size=1, init_process_group=False
    ) == [True]
