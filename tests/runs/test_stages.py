# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The stages of a step pass values: in any order, on any batch, and without keeping anything for the next stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import overrides, with_trainer, write_chats

from _lib.pretraining import write_records
from megatron_selfdistill.sources.signals import MEASURED_SIGNALS

CONTAINERS = (list, tuple, set, dict)
SCALARS = (str, int, float, bool, type(None))
OWN = ["method.name=own_solutions", "method.num_samples=6", "data.on_long_context=drop"]
VERIFIED = "evaluation.verifier=tiny_run.starts_with_an_even_token"
SOURCES = {
    "on-policy, one k per batch": ["target=batch"],
    "on-policy, mixed with the student, one k per batch": ["target=batch", "target.anchor=student"],
    "own solutions": [*OWN, VERIFIED],
    "guided below a success rate": ["rollout.guidance=mixed", "rollout.guide_below=0.5", VERIFIED],
    "scope, which measures before it trains": ["recipe=scope", "rollout.num_samples=2", VERIFIED],
    "sft": ["method.name=sft"],
    "rft, on problems alone": ["method.name=rft", VERIFIED, "data.path=DATA/asked.jsonl"],
    "chat logs with weights": [
        *("recipe=chat_logs", "data.path=DATA/chats.jsonl", "data.chat_template=DATA/template.jinja"),
        *("method.min_log_prob=-4", "method.unlikely=down_weight"),
    ],
}
QUICK = ("on-policy, one k per batch", "own solutions", "chat logs with weights")
# What a stage may change, by "object.attribute": everything else must be as it was.
CHANGES = {
    "next_batch": {"sampler.version"},
    "balance": set(),
    "pack": set(),
    "forward_backward": set(),
    "update": {
        *("trainer.checked", "trainer.sampling"),
        *("learner.batch_k", "learner.target", "learner.distillation_loss"),
    },
    "finish_step": {
        *("trainer.step", "trainer.saved_step", "source._state", "guards.sums", "guards.counts", "guards.violations"),
    },
}


@pytest.fixture(scope="module")
def data(own_data: Path) -> Path:
    """Besides, logged conversations of one turn each, and problems without solutions and answers."""
    write_chats(own_data, [f"{number:03d}" for number in range(40)])
    write_records(own_data / "asked.jsonl", [{"problem": f"{number:03d}-0="} for number in range(40)])
    return own_data


def arguments(data: Path, run_dir: Path, *options: str) -> list[str]:
    return overrides(data, run_dir, "num_steps=3", *(option.replace("DATA", str(data)) for option in options))


def gradients(trainer: Any, batch: Any) -> torch.Tensor:
    """Return all gradients of this rank after one batch."""
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


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(1, (), id="one rank"),
        pytest.param(2, ("parallel.pipeline_model_parallel_size=2",), id="PP2", marks=pytest.mark.full),
    ],
)
def test_a_batch_has_the_same_gradients_whatever_came_before_it(ranks, data, tmp_path, world_size, layout):
    of_ranks = ranks.run(
        gradients_in_and_out_of_order,
        arguments(data, tmp_path / "run", *layout),
        world_size=world_size,
        init_process_group=False,
    )
    assert of_ranks == [[[True] * 3] * 3] * world_size


def snapshot(value: Any) -> Any:
    """Return what tells that ``value`` has changed: contents of containers, the identity of anything else."""
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, CONTAINERS):
        return [snapshot(item) for item in value]
    return value if isinstance(value, SCALARS) else id(value)


def attributes(trainer: Any) -> dict[str, Any]:
    """Return the attributes of the trainer's parts, by "object.attribute"."""
    parts = {
        "trainer": trainer,
        "learner": trainer.learner,
        "source": trainer.source,
        "sampler": trainer.sampler,
        "guards": trainer.guards,
        "run_directory": trainer.run_directory,
        "teacher": trainer.learner.teachers.start,
    }
    return {f"{name}.{key}": snapshot(value) for name, part in parts.items() for key, value in vars(part).items()}


def changes_of_two_steps(overrides: Sequence[str]) -> list[dict[str, list[str]]]:
    """Return what each stage changes in each of two steps; a batch that is requested twice must be the same."""

    def use(trainer: Any) -> list[dict[str, list[str]]]:
        trainer.run_directory.write()
        found: list[dict[str, list[str]]] = []
        for _ in range(2):
            changed: dict[str, list[str]] = {}

            def stage(name: str, *values: Any, changed: dict[str, list[str]] = changed) -> Any:
                before = attributes(trainer)
                result = getattr(trainer, name)(*values)
                after = attributes(trainer)
                changed[name] = [key for key in after if key not in before or before[key] != after[key]]
                return result

            committed = trainer.source.state_dict()
            batch = stage("next_batch")
            again = trainer.next_batch()
            assert (again.problems, again.contexts) == (batch.problems, batch.contexts)
            balanced = stage("balance", batch)
            packed = stage("pack", balanced)
            step = [stage("forward_backward", balanced, packed)]
            metrics = stage("update", step)
            assert trainer.source.state_dict() == committed, "the state is the one before the step"
            stage("finish_step", step, metrics)
            assert trainer.source.state_dict() != committed
            found.append(changed)
        return found

    return with_trainer(overrides, use)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.full]) for name in SOURCES]
)
def test_no_stage_keeps_anything_for_the_next_one(ranks, data, tmp_path, name):
    [steps] = ranks.run(
        changes_of_two_steps, arguments(data, tmp_path / "run", *SOURCES[name]), world_size=1, init_process_group=False
    )
    for changed in steps:
        for stage, keys in changed.items():
            assert set(keys) <= CHANGES[stage], f"{stage} changes {sorted(set(keys) - CHANGES[stage])}"
        assert {"trainer.step", "source._state"} <= set(changed["finish_step"])


def one_step(trainer: Any) -> None:
    batch = trainer.next_batch()
    step = [trainer.forward_backward(batch, trainer.pack(batch))]
    trainer.finish_step(step, trainer.update(step))


def signals_after_a_step(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the measured signals of a batch after a step, those of two independent ways, and what they change."""
    from megatron_selfdistill.sources.learner_readings import LearnerReadings

    def use(trainer: Any) -> dict[str, Any]:
        trainer.run_directory.write()
        one_step(trainer)
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


TEACHERS = {"frozen, also the reference": [], "an average beside a reference": ["teacher.weights=ema"]}
TP2, PP2 = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"


@pytest.mark.parametrize(
    ("teacher", "layout"),
    [
        ("frozen, also the reference", []),
        *(pytest.param("an average beside a reference", layout, marks=pytest.mark.full) for layout in ([], [TP2])),
        pytest.param("frozen, also the reference", [PP2, "loss.fused=low_memory"], marks=pytest.mark.full),
    ],
)
def test_the_measured_signals_are_those_of_sampler_and_loss_and_train_nothing(ranks, data, tmp_path, teacher, layout):
    found = ranks.run(
        signals_after_a_step,
        arguments(data, tmp_path / "run", *TEACHERS[teacher], *layout, "optimizer.lr_warmup_steps=0"),
        world_size=2 if layout else 1,
        init_process_group=False,
    )
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
