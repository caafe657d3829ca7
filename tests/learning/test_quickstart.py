# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The quickstart learns what it says, its baselines do not, the guard stops what collapses; every example runs."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from _lib import additions, pretraining, ragged_subtraction, subtraction, two_tasks, unsolved_subtraction, variants
from _lib.command_line import command
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


@pytest.fixture(scope="module")
def distilled(base, problems, root):
    variant = variants.SELF_DISTILLATION.on(problems, "num_steps=100", *NOT_EVALUATED)
    return variants.run_variant(variant, base, root / "variants")


@pytest.mark.full
def test_the_base_has_the_pupils_bugs_and_can_use_a_hint(base):
    before = measure(base)
    assert 0.2 < before.greedy < 0.5
    assert 0.15 < before.sampled < 0.45
    assert before.hinted > 0.95
    assert before.shows_work > 0.95


@pytest.mark.full
def test_self_distillation_from_answers_alone_learns_to_subtract(distilled):
    after = distilled.measurement
    assert distilled.status == 0
    assert after.greedy >= 0.85
    assert after.sampled >= 0.60
    assert after.shows_work > 0.95
    assert 21.5 < after.length < 22.5
    assert after.hinted > 0.9


@pytest.mark.full
def test_no_guard_would_stop_the_healthy_run_at_half_its_margin(distilled):
    """The default limits leave room: the same run passes limits that are twice as tight."""
    config = configuration.load()
    tight = dataclasses.replace(
        config.guards,
        entropy=dataclasses.replace(
            config.guards.entropy,
            min_ratio=2 * config.guards.entropy.min_ratio,
            max_ratio=config.guards.entropy.max_ratio / 2,
        ),
        min_length_ratio=2 * config.guards.min_length_ratio,
    )
    guards = Guards(tight)
    for line in read_metrics(distilled.run_dir):
        guards.check(line["step"], line)


@pytest.mark.full
def test_fine_tuning_on_the_hints_text_learns_nothing(base, problems, root, load_example):
    imitation = load_example("01_quickstart").IMITATION.on(problems, "num_steps=100", *NOT_EVALUATED)
    outcome = variants.run_variant(imitation, base, root / "variants")
    assert outcome.measurement.greedy <= 0.10
    assert outcome.measurement.shows_work <= 0.10


@pytest.mark.full
def test_the_literal_recipe_is_stopped_by_the_entropy_guard_with_status_3(base, problems, root, capsys):
    outcome = variants.run_variant(variants.LITERAL.on(problems, *NOT_EVALUATED), base, root / "variants")
    assert outcome.status == 3
    assert outcome.stopped
    assert "entropy explosion" in capsys.readouterr().out
    last = read_metrics(outcome.run_dir)[-1]["step"]
    assert last < 120
    assert (outcome.run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(last)


@pytest.mark.full
def test_the_printed_command_is_the_run(base, problems, root):
    """It exists, it composes to the configuration that the variant ran with, and it starts."""
    variant = variants.TEACHER_ALONE.on(problems)
    overrides = (*base.overrides, *variant.overrides, f"run_dir={root / 'by_hand'}", "dry_run=true")
    line = command(overrides)
    words = shlex.split(line)
    in_line = words[words.index("quickstart") + 1 :]
    assert configuration.load(in_line, "quickstart") == configuration.load(list(overrides), "quickstart")
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    python_path = words[0].removeprefix("PYTHONPATH=") + os.pathsep + str(REPOSITORY)
    line = line.replace(words[0], f"PYTHONPATH={shlex.quote(python_path)}")  # this package may not be installed
    done = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2000 problems" in done.stdout


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
def test_the_example_of_many_answers_runs_to_its_end(root, load_example, monkeypatch, shorten, capsys):
    shorten(additions, 30)
    monkeypatch.setattr(additions, "WEAK_PRETRAINING_STEPS", 10)
    example = load_example("04_many_answers")
    monkeypatch.setattr(example, "NUM_SAMPLES", 8)
    monkeypatch.setattr(example, "VARIANTS", (variants.SELF_DISTILLATION, example.IMITATION))
    monkeypatch.setattr(example, "WEAK_VARIANTS", (variants.SELF_DISTILLATION, variants.REJECTION))
    assert example.main(["--directory", str(root), "--steps", "2"]) == 0
    shown = capsys.readouterr().out
    assert "RFT with a verifier" in shown
    assert "different" in shown
    for part in ("strong", "weak"):
        assert (root / "many_answers" / "seed5" / part / "curves.png").exists()


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "options"), [("01_quickstart", ["--student-mix"]), ("02_wrong_hints", ["--shares", "0.6"])]
)
def test_the_other_examples_run_to_their_end(brief_root, load_example, name, options, capsys):
    assert load_example(name).main(["--directory", str(brief_root), "--steps", "2", *options]) == 0
    shown = capsys.readouterr().out
    assert "curves.png" in shown and "Mix with the student" in shown


@pytest.mark.full
def test_the_example_of_several_teachers_measures_both_tasks_of_every_model(root, load_example, shorten, capsys):
    shorten(two_tasks, 20)
    assert load_example("14_several_teachers").main(["--directory", str(root), "--steps", "2"]) == 0
    shown = capsys.readouterr().out
    for row in ("base", "specialist of additions", "specialist of subtraction", "student of both specialists"):
        assert re.search(rf"{row} +│? *[01]\.\d{{3}}", shown), row


@pytest.mark.full
def test_the_example_of_hard_problems_runs_to_its_end(root, load_example, monkeypatch, shorten, capsys):
    monkeypatch.setattr(subtraction, "NUM_HELD_OUT_HARD", 20)
    shorten(unsolved_subtraction, 20)
    example = load_example("03_hard_problems")
    monkeypatch.setattr(example, "NEVER_SOLVED", example.NEVER_SOLVED[:3])
    assert example.main(["--directory", str(root), "--steps", "2"]) == 0
    shown = capsys.readouterr().out
    assert "curves.png" in shown and "Fewer than one in twenty is right after: " in shown


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_says_what_it_shows_and_how_it_is_run(load_example, name, capsys):
    module = load_example(name)
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert f"python examples/{name}.py" in shown
