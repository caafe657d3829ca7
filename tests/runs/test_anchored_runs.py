# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole runs whose target mixes the teacher with a frozen reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import assert_guided_by_the_teacher_of_the_loss, assert_resumes_equal, bytes_of, overrides, train

OPTIONS = ["target.anchor=reference", "metrics.teacher_every=3", "metrics.show_samples=0"]
TEACHER = {"entropy/teacher", "top1_agreement", "teacher_cross_entropy"}
RARE = {"target/mass_on_rare_student", "target/mass_on_rare_reference", "target/let_through"}
FORKS = {"forks/entropy_student", "forks/entropy_target", "forks/capped", "forks/entropy_at_least"}


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_equals_one_that_never_stopped_and_measures_the_teacher_when_due(ranks, data, tmp_path):
    """The teacher alone and the mass on rare tokens are measured at steps 1 and 3, also where the run was resumed."""
    whole, options = tmp_path / "whole", [*OPTIONS, "num_steps=4", "checkpoint.save_every=2"]
    train(ranks, overrides(data, whole, *options))
    assert_resumes_equal(ranks, whole, lambda run_dir: overrides(data, run_dir, *options), step=2, num_steps=4)

    lines = metrics(whole)
    measured = {line["step"] for line in lines if line.keys() >= TEACHER | RARE}
    assert measured == {1, 3}
    assert not any((TEACHER | RARE) & line.keys() for line in lines if line["step"] not in measured)
    assert all(line.keys() >= FORKS | {"reverse_kl/tenth_01", "reverse_kl/tenth_10"} for line in lines)
    assert all(line["leak/words_per_1000"] == line["leak/hint_8grams"] == 0 for line in lines), "hints are short"
    assert lines[-1]["entropy/target"] != pytest.approx(lines[-1]["entropy/student"], rel=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("teacher", ["ema", "current"])
def test_a_resumed_run_has_the_same_reference_beside_a_teacher_that_moves(ranks, data, tmp_path, teacher):
    """The reference is stored once, beside the checkpoints."""
    whole = tmp_path / "whole"
    options = [*OPTIONS, f"teacher.weights={teacher}", "teacher.ema_decay=0.5", "teacher.offload=cpu", "num_steps=3"]
    options += ["checkpoint.save_every=2", "optimizer.lr=1e-2"]
    train(ranks, overrides(data, whole, *options))
    halves = assert_resumes_equal(ranks, whole, lambda run_dir: overrides(data, run_dir, *options), step=2, num_steps=3)
    assert bytes_of(halves / "teacher") == bytes_of(whole / "teacher") != {}


@pytest.mark.full
def test_one_k_per_step_comes_from_the_references_entropy(ranks, data, tmp_path):
    train(ranks, overrides(data, tmp_path / "run", *OPTIONS, "target.rule=batch", "num_steps=2"))
    first, second = metrics(tmp_path / "run")
    assert first["k/mean"] == pytest.approx(1.75), "no step has solved k yet"
    assert second["k/mean"] != pytest.approx(1.75, rel=1e-4)


@pytest.mark.parametrize(
    "teacher", ["ema", *(pytest.param(other, marks=pytest.mark.full) for other in ("frozen", "current"))]
)
def test_the_sampler_of_guided_responses_has_the_teacher_and_the_student_of_the_loss(ranks, data, tmp_path, teacher):
    recorded = tmp_path / "recorded.jsonl"
    options = [f"teacher.weights={teacher}", "teacher.ema_decay=0.5", "teacher.offload=cpu", "target.match=student"]
    options += ["num_steps=3", "optimizer.lr=1e-2", "optimizer.lr_warmup_steps=0", "metrics.teacher_every=1"]
    options += ["rollout.guidance=mixed", f"tests.record={recorded}"]
    train(ranks, overrides(data, tmp_path / "run", *OPTIONS, *options))
    assert_guided_by_the_teacher_of_the_loss(tmp_path / "run", recorded)
