# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Stages of a step pass values, in any order and on any batch; contexts that move to other replicas change none."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from taught import write_records_of_teachers
from tiers import combinations
from tiny_run import overrides, with_trainer, write_chats

from _lib.pretraining import write_records
from megatron_selfdistill.sources.signals import MEASURED_SIGNALS

VERIFIED = "evaluation.verifier=tiny_run.starts_with_an_even_token"
TURNS = (
    *("recipe=chat_logs", "data.path=DATA/chats.jsonl", "data.chat_template=DATA/template.jinja"),
    *("method.min_log_prob=-4", "method.unlikely=down_weight"),
)
TERMS = ("recipe=scope", "rollout.num_samples=2", "loss.rollout_correction=truncated_sequence", VERIFIED)
GUIDED = ("rollout.guidance=mixed", "loss.rollout_correction=truncated")
PRODUCT = (
    *("data.path=DATA/shared.jsonl", "teachers.join=product", "teachers.other={template: '{problem}{solution}'}"),
    "teachers.one={template: 'A{solution}|{problem}', weight: 2}",
)
UNEVEN = ("schedule.max_tokens=48", "optimizer.use_distributed_optimizer=false", "metrics.teacher_every=1")
"""Contexts fill several microbatches, which few contexts share."""
SOURCES = {
    "on-policy, one k per batch": ["target=batch"],
    "on-policy, mixed with the student, one k per batch": ["target=batch", "target.anchor=student"],
    "own solutions": ["method.name=own_solutions", "method.num_samples=6", "data.on_long_context=drop", VERIFIED],
    "guided below a success rate": ["rollout.guidance=mixed", "rollout.guide_below=0.5", VERIFIED],
    "scope, which measures before it trains": ["recipe=scope", "rollout.num_samples=2", VERIFIED],
    "sft": ["method.name=sft"],
    "rft, on problems alone": ["method.name=rft", VERIFIED, "data.path=DATA/asked.jsonl"],
    "chat logs with weights": TURNS,
}


@pytest.fixture(scope="module")
def data(own_data: Path) -> Path:
    """Besides, logged replies of many lengths, problems without solutions and answers, and problems of two teachers."""
    write_chats(own_data, ["7" * (1 + 5 * number % 13) for number in range(40)])
    write_records_of_teachers(own_data, [{"one": 1, "other": 3}, {"one": 1, "other": 1}], "shared.jsonl")
    write_records(own_data / "asked.jsonl", [{"problem": f"{number:03d}-0="} for number in range(40)])
    return own_data


def arguments(data: Path, run_dir: Path, *options: str) -> list[str]:
    return overrides(data, run_dir, "num_steps=3", *(option.replace("DATA", str(data)) for option in options))


def gradients(trainer: Any, batch: Any) -> torch.Tensor:
    assert trainer.forward_backward(batch, trainer.pack(batch)).output is not None
    parameters = [parameter for chunk in trainer.learner.chunks for parameter in chunk.parameters()]
    return torch.cat([parameter.main_grad.flatten().clone() for parameter in parameters])


def gradients_in_and_out_of_order(overrides: Sequence[str]) -> list[list[bool]]:
    """Return whether the gradients of three batches are equal in another order, and the second time."""
    from megatron_selfdistill.loss.weighting import TruncatedImportance
    from megatron_selfdistill.sources.source import StepBatch

    def use(trainer: Any) -> list[list[bool]]:
        first = trainer.next_batch()
        trainer.source.commit(first)
        ahead = trainer.next_batch()
        assert [p.id for p in first.problems] != [p.id for p in ahead.problems]
        by_hand = StepBatch(contexts=[dataclasses.replace(c, response=c.response[:3]) for c in ahead.contexts])
        num_tokens = sum(len(context.response) for context in by_hand.contexts)
        weights = TruncatedImportance(torch.linspace(-9, -1, num_tokens, dtype=torch.float64), cap=1.5)
        batches = {"first": first, "ahead": ahead, "weighted": dataclasses.replace(by_hand, token_coefficients=weights)}
        in_order = {name: gradients(trainer, batch) for name, batch in batches.items()}
        assert all(gradient.abs().sum() > 0 for gradient in in_order.values())
        assert not in_order["weighted"].equal(gradients(trainer, by_hand)), "weights count"
        others = [("weighted", "ahead", "first"), ("ahead", "ahead", "weighted"), ("first", "first", "weighted")]
        return [[gradients(trainer, batches[name]).equal(in_order[name]) for name in order] for order in others]

    return with_trainer(overrides, use)


TP2, PP2 = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"


@pytest.mark.parametrize("layout", [(), pytest.param((PP2,), marks=pytest.mark.full)], ids=["one rank", "PP2"])
def test_a_batch_has_the_same_gradients_whatever_came_before_it(ranks, data, tmp_path, layout):
    of_run, world_size = arguments(data, tmp_path / "run", *layout), 2 if layout else 1
    of_ranks = ranks.run(gradients_in_and_out_of_order, of_run, world_size=world_size, init_process_group=False)
    assert of_ranks == [[[True] * 3] * 3] * world_size


def train_two_steps(overrides: Sequence[str]) -> None:
    """Train; each step asks for its batch twice, and only its end changes the state of the source."""

    def use(trainer: Any) -> None:
        trainer.run_directory.write()
        for _ in range(2):
            before = trainer.source.state_dict()
            batch, again = trainer.next_batch(), trainer.next_batch()
            assert (again.problems, again.contexts) == (batch.problems, batch.contexts)
            batch = trainer.balance(batch)
            step = [trainer.forward_backward(batch, trainer.pack(batch))]
            metrics = trainer.update(step)
            assert trainer.source.state_dict() == before
            trainer.finish_step(step, metrics)
            assert trainer.source.state_dict() != before

    with_trainer(overrides, use)


@combinations(name=list(SOURCES), quick={"name": ["own solutions", "chat logs with weights"]})
def test_a_batch_that_is_asked_for_twice_is_the_same_and_only_the_end_of_a_step_moves_the_source_on(
    ranks, data, tmp_path, name
):
    of_run = arguments(data, tmp_path / "run", *SOURCES[name])
    ranks.run(train_two_steps, of_run, world_size=1, init_process_group=False)


def signals_after_a_step(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the measured signals of a batch after a step, those of two independent ways, and what they change."""
    from megatron_selfdistill.sources.learner_readings import LearnerReadings

    def use(trainer: Any) -> dict[str, Any]:
        trainer.run_directory.write()
        first = trainer.next_batch()
        step = [trainer.forward_backward(first, trainer.pack(first))]
        trainer.finish_step(step, trainer.update(step))
        batch, readings = trainer.next_batch(), LearnerReadings(trainer.learner)
        contexts, before = batch.contexts, gradients(trainer, batch)
        measured = {name: values.tolist() for name, values in readings.token_signals(contexts).items()}
        found = {"contexts": [context.response for context in contexts], "sampler": batch.sampler_log_probs}
        found |= {"signals": measured, "loss": {}}
        output = trainer.learner.measure(contexts)
        if output.stats is not None:
            for name, own in measured.items():
                values = torch.zeros(len(own))
                values[output.response_ids] = getattr(output.stats, "loss" if name == "divergence" else name)
                found["loss"][name] = values.tolist()
        same = dataclasses.replace(contexts[0], teacher_prompt=contexts[0].student_prompt)
        found["with one prompt"] = {name: x.tolist() for name, x in readings.token_signals([same]).items()}
        found["gradients"] = gradients(trainer, batch).equal(before)
        return found

    return with_trainer(overrides, use)


EMA = "teacher.weights=ema"


@pytest.mark.parametrize(
    "options",
    [(), *(pytest.param(it, marks=pytest.mark.full) for it in ((EMA,), (EMA, TP2), (PP2, "loss.fused=low_memory")))],
    ids=str,
)
def test_the_measured_signals_are_those_of_sampler_and_loss_and_train_nothing(ranks, data, tmp_path, options):
    """The teacher is frozen and also the reference, or an average beside a reference."""
    of_run = arguments(data, tmp_path / "run", *options, "optimizer.lr_warmup_steps=0")
    world_size = 2 if {TP2, PP2} & {*options} else 1
    found = ranks.run(signals_after_a_step, of_run, world_size=world_size, init_process_group=False)
    for of_rank in found:
        assert of_rank["gradients"], "the step has the same gradients before and after"
        signals, one = of_rank["signals"], of_rank["with one prompt"]
        assert signals == found[0]["signals"] and signals.keys() == set(MEASURED_SIGNALS)
        student, target = signals["student_log_prob"], signals["target_log_prob"]
        assert student == pytest.approx(of_rank["sampler"].tolist(), abs=1e-4)
        assert target != pytest.approx(student, abs=0.1)
        own = one["student_log_prob"]
        assert own == pytest.approx(student[: len(own)], abs=1e-5)
        assert one["target_log_prob"] != own, "the student has moved, and the target has weights of its own"
    assert found[-1]["loss"].keys() == set(MEASURED_SIGNALS)
    for name, values in found[-1]["loss"].items():
        assert found[-1]["signals"][name] == pytest.approx(values, abs=1e-5) and len(set(values)) > 1, name


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
            assert grid.dp_size > 1 or after is batch, "one replica keeps its batch"
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
def test_a_step_whose_contexts_move_has_the_same_gradient_and_metrics(ranks, data, tmp_path, layout, options, way):
    """Sums over other tokens on each replica round differently in float32: 1e-6 is some 16 of its roundings (6e-8)."""
    of_run = arguments(data, tmp_path / "run", *UNEVEN, *layout, *options)
    of_ranks = ranks.run(batch_before_and_after, of_run, way, world_size=4, init_process_group=False)
    before = {replica: contexts for replica, contexts, *_ in of_ranks}
    after = {replica: contexts for replica, _, contexts, *_ in of_ranks}
    assert before != after, "some contexts must move"
    everything = [sorted(chain.from_iterable(contexts.values())) for contexts in (before, after)]
    assert everything[0] == everything[1]
    for replica, _, contexts, difference, metrics, metrics_after in of_ranks:
        assert contexts == after[replica], "the ranks of a replica have the same contexts"
        assert difference <= 1e-6
        assert metrics_after == pytest.approx(metrics, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("way", "world_size"), [("swapped", 2), ("balanced", 1)])
def test_replicas_that_swap_their_contexts_and_one_replica_alone_have_equal_bits(
    ranks, data, tmp_path, way, world_size
):
    """The sum over two replicas has the same two summands."""
    of_run = arguments(data, tmp_path / "run", *UNEVEN, *TERMS)
    of_ranks = ranks.run(batch_before_and_after, of_run, way, world_size=world_size, init_process_group=False)
    before, after = ([one[place] for one in of_ranks] for place in (1, 2))
    assert after == before[::-1] and len({str(contexts) for contexts in before}) == world_size
    assert {difference for *_, difference, _, _ in of_ranks} == {0.0}
