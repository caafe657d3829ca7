# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole runs whose target mixes the teacher with a frozen reference, and runs whose responses the target guides."""

from __future__ import annotations

import pytest
from rounded_json import read_lines
from tiers import combinations
from tiny_run import (
    assert_guided_by_the_teacher_of_the_loss,
    bytes_of,
    recorded,
    reproducible_metrics,
    starts_with_an_even_token,
)

from _lib import subtraction

ANCHORED = ["target.anchor=reference", "metrics.teacher_every=3", "metrics.show_samples=0"]
TEACHER = {"entropy/teacher", "top1_agreement", "teacher_cross_entropy"}
RARE = {"target/mass_on_rare_student", "target/mass_on_rare_reference", "target/let_through"}
FORKS = {"forks/entropy_student", "forks/entropy_target", "forks/capped", "forks/entropy_at_least"}
AVERAGE = ["teacher.ema_decay=0.5", "teacher.offload=cpu", "num_steps=3", "optimizer.lr=1e-2"]


@pytest.mark.full
def test_a_resumed_run_equals_one_that_never_stopped_and_measures_the_teacher_when_due(runs):
    """The teacher alone and the mass on rare tokens are measured at steps 1 and 3, also where the run was resumed."""
    options = [*ANCHORED, "num_steps=3", "checkpoint.save_every=2"]
    lines = reproducible_metrics(runs(*options))
    measured = {line["step"] for line in lines if line.keys() >= TEACHER | RARE}
    assert measured == {1, 3}
    assert not any((TEACHER | RARE) & line.keys() for line in lines if line["step"] not in measured)
    assert all(line.keys() >= FORKS | {"reverse_kl/tenth_01", "reverse_kl/tenth_10"} for line in lines)
    assert all(line["leak/words_per_1000"] == line["leak/hint_8grams"] == 0 for line in lines), "hints are short"
    assert lines[-1]["entropy/target"] != pytest.approx(lines[-1]["entropy/student"], rel=1e-6)
    runs.resumed(*options, step=2)


@pytest.mark.full
@pytest.mark.parametrize("teacher", ["ema", "current"])
def test_a_resumed_run_has_the_same_reference_beside_a_teacher_that_moves(runs, teacher):
    """The reference is stored once, beside the checkpoints."""
    options = [*ANCHORED, f"teacher.weights={teacher}", *AVERAGE, "checkpoint.save_every=2"]
    halves = runs.resumed(*options, step=2)
    assert bytes_of(halves / "teacher") == bytes_of(runs(*options) / "teacher") != {}


@combinations(teacher=["ema", "frozen", "current"], quick={"teacher": ["ema"]})
def test_the_sampler_of_guided_responses_has_the_teacher_and_the_student_of_the_loss(runs, teacher):
    options = [f"teacher.weights={teacher}", *AVERAGE, "target.match=student", "rollout.guidance=mixed"]
    options += ["optimizer.lr_warmup_steps=0", "metrics.teacher_every=1"]
    assert_guided_by_the_teacher_of_the_loss(runs(*ANCHORED, *options))


@pytest.fixture(scope="module")
def below(data, tmp_path_factory) -> list[str]:
    """Return the options of a run on 8 problems, each of which is guided where the student has failed it."""
    problems = tmp_path_factory.mktemp("guided") / "problems.jsonl"
    problems.write_text("".join((data / "problems.jsonl").read_text().splitlines(keepends=True)[:8]))
    return [
        *("rollout.guidance=mixed", "rollout.guide_below=0.5", f"data.path={problems}", "num_steps=2"),
        *("evaluation.verifier=tiny_run.starts_with_an_even_token", "checkpoint.save_every=1"),
        *("target.teacher_weight=2", "loss.divergence=forward_kl", "target.anchor=reference", "model.num_layers=4"),
    ]


def test_guided_and_plain_problems_share_a_batch_and_a_resumed_run_guides_the_same(runs, below):
    """A problem is guided if its first response was wrong; there are 8 problems, so each is visited at every step."""
    kinds, right = {step: [] for step in range(2)}, {}
    for record in read_lines(runs(*below) / "responses.jsonl"):
        guided = record["teacher_log_probs"] is not None
        kinds[record["step"]].append(guided)
        text = "".join(subtraction.TASK.alphabet[token] for token in record["token_ids"][:-1])
        is_right = record["finish_reason"] == "stop" and starts_with_an_even_token(text, None)
        assert record["step"] == 0 or guided is not right[record["problem_id"]]
        right.setdefault(record["problem_id"], is_right)
    first, second = reproducible_metrics(runs(*below))
    assert not any(kinds[0]) and "guided/share" not in first
    assert 0 < second["guided/share"] == sum(kinds[1]) / len(kinds[1]) < 1
    runs.resumed(*below, step=1)


@pytest.mark.full
def test_a_resumed_run_guides_from_the_same_target_with_controls(runs):
    options = ["target.anchor=student", "target.num_controls=2", "rollout.guidance=mixed", "checkpoint.save_every=1"]
    controls = [*options, "target.control=other", "num_steps=2"]
    runs.resumed(*controls, step=1)
    others = runs(*options, "target.control=none", "num_steps=1")
    assert recorded(runs(*controls) / "responses.jsonl", step=0) != recorded(others / "responses.jsonl", step=0)
