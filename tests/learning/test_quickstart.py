# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The quickstart learns what it says, its baselines do not, the guard stops what collapses; every example runs."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from _lib import (
    additions,
    leaking_subtraction,
    pretraining,
    ragged_subtraction,
    subtraction,
    two_tasks,
    unsolved_subtraction,
    variants,
)
from _lib.measurement import measure
from megatron_selfdistill import config as configuration
from megatron_selfdistill.metrics.guards import Guards
from megatron_selfdistill.metrics.run_log import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
NOT_EVALUATED = ("evaluation.every=0", "evaluation.at_start=false")
EXAMPLES = sorted(path.stem for path in (REPOSITORY / "examples").glob("[0-9]*.py"))


@pytest.fixture(scope="module")
def problems(root):
    return pretraining.write_records(root / "train.jsonl", subtraction.training_problems(5))


@pytest.mark.full
def test_self_distillation_from_answers_alone_learns_to_subtract_far_from_the_limits_of_guards(base, problems, root):
    """The base has the pupil's bugs, and can use a hint.  The same run passes limits that are twice as tight."""
    before = measure(base)
    assert 0.2 < before.greedy < 0.5 and 0.15 < before.sampled < 0.45
    assert before.hinted > 0.95 and before.shows_work > 0.95
    variant = variants.SELF_DISTILLATION.on(problems, "num_steps=100", *NOT_EVALUATED)
    distilled = variants.run_variant(variant, base, root / "variants")
    after = distilled.measurement
    assert distilled.status == 0
    assert after.greedy >= 0.85 and after.sampled >= 0.60 and after.hinted > 0.9
    assert after.shows_work > 0.95 and 21.5 < after.length < 22.5
    limits = configuration.load().guards
    entropy = limits.entropy
    entropy = dataclasses.replace(entropy, min_ratio=2 * entropy.min_ratio, max_ratio=entropy.max_ratio / 2)
    tight = Guards(dataclasses.replace(limits, entropy=entropy, min_length_ratio=2 * limits.min_length_ratio))
    for line in read_metrics(distilled.run_dir):
        tight.check(line["step"], line)


@pytest.mark.full
def test_fine_tuning_on_the_hints_text_learns_nothing(base, problems, root, load_example):
    imitation = load_example("01_quickstart").IMITATION.on(problems, "num_steps=100", *NOT_EVALUATED)
    outcome = variants.run_variant(imitation, base, root / "variants")
    assert outcome.measurement.greedy <= 0.10 and outcome.measurement.shows_work <= 0.10


@pytest.mark.full
def test_the_literal_recipe_is_stopped_by_the_entropy_guard_with_status_3(base, problems, root, capsys):
    outcome = variants.run_variant(variants.LITERAL.on(problems, *NOT_EVALUATED), base, root / "variants")
    assert outcome.status == 3 and outcome.stopped
    assert "entropy explosion" in capsys.readouterr().out
    last = read_metrics(outcome.run_dir)[-1]["step"]
    assert last < 120
    assert (outcome.run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(last)


@pytest.mark.full
def test_variable_widths_are_learnt(root, load_example, shorten):
    shorten(ragged_subtraction, 800, num_held_out=100)
    load_example("05_variable_widths").main(["--directory", str(root), "--steps", "30", "--only"])
    run_dir = root / "variable_widths" / "seed5" / "self-distillation"
    lines = read_metrics(run_dir)
    accuracy = [line["evaluation/greedy_accuracy"] for line in lines if "evaluation/greedy_accuracy" in line]
    assert accuracy[-1] > accuracy[0] + 0.2
    assert (run_dir.parent / "curves.png").stat().st_size > 10_000


@pytest.mark.full
@pytest.mark.usefixtures("base")
def test_guided_rollouts_are_right_where_the_student_never_is(load_example, root, monkeypatch):
    example = load_example("07_guided_rollouts")
    monkeypatch.setattr(example, "llama_subtraction", subtraction)  # the base of the other examples
    monkeypatch.setattr(example, "VARIANTS", (variants.SELF_DISTILLATION,))
    monkeypatch.setattr(subtraction, "NUM_HELD_OUT_HARD", 40)
    assert example.main(["--steps", "2", "--directory", str(root)]) == 0
    directory = root / "guided_rollouts" / "seed5"
    answers = {record["id"]: record["answer"] for record in example.records(directory / "train.jsonl")}
    right = {}
    for name in ("self-distillation", "self-distillation__guided"):
        samples = example.read_samples(directory / name)
        assert len(samples) == 64
        right[name] = sum(example.is_right(sample, answers[sample["problem_id"]]) for sample in samples) / 64
    assert right["self-distillation"] < 0.3 and right["self-distillation__guided"] > 0.6, right


MODELS = ("base", "specialist of additions", "specialist of subtraction", "student of both specialists")
ENDS = {
    "01_quickstart": (["--student-mix"], ["curves.png", "Mix with the student"]),
    "02_wrong_hints": (["--shares", "0.6"], ["curves.png", "Mix with the student"]),
    "03_hard_problems": ([], ["curves.png", "Fewer than one in twenty is right after: "]),
    "04_many_answers": ([], ["RFT with a verifier", "different"]),
    "09_leaking_hint": (["--forward"], ["Anchored, forward KL", "Early stopping is the competitor"]),
    "14_several_teachers": ([], [rf"{row} +│? *[01]\.\d{{3}}" for row in MODELS]),
}
"""Example -> its options, and what it shows: 14 measures both tasks of every model."""


@pytest.mark.full
@pytest.mark.parametrize("name", ENDS)
def test_an_example_runs_to_its_end(base, load_example, tmp_path, monkeypatch, shorten, capsys, name):
    copy = Path(shutil.copytree(base.directory, tmp_path / "bases" / base.directory.name))
    few = base.held_out.read_text().splitlines(keepends=True)[:20]
    (copy / base.held_out.name).write_text("".join(few))
    for module in (additions, leaking_subtraction, two_tasks, unsolved_subtraction):
        shorten(module, 20)
    monkeypatch.setattr(additions, "WEAK_PRETRAINING_STEPS", 10)
    monkeypatch.setattr(subtraction, "NUM_HELD_OUT_HARD", 20)
    example, (options, shown) = load_example(name), ENDS[name]
    if name == "03_hard_problems":
        monkeypatch.setattr(example, "NEVER_SOLVED", example.NEVER_SOLVED[:3])
    if name == "04_many_answers":
        monkeypatch.setattr(example, "NUM_SAMPLES", 8)
        monkeypatch.setattr(example, "VARIANTS", (variants.SELF_DISTILLATION, example.IMITATION))
        monkeypatch.setattr(example, "WEAK_VARIANTS", (variants.SELF_DISTILLATION, variants.REJECTION))
    assert example.main(["--directory", str(tmp_path), "--steps", "2", *options]) == 0
    output = capsys.readouterr().out
    assert all(re.search(text, output) for text in shown)
    if name == "04_many_answers":
        assert len(list((tmp_path / "many_answers" / "seed5").glob("*/curves.png"))) == 2


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_says_what_it_shows_and_how_it_is_run(load_example, name, capsys):
    module = load_example(name)
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    assert f"python examples/{name}.py" in capsys.readouterr().out
