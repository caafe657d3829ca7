# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The last lines of a run, second launches, also with other settings, and a run as an object of Python."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import bytes_of, overrides, reproducible_metrics, saved_step, start_and_listen, train

from megatron_selfdistill import SelfDistiller
from megatron_selfdistill.commands import self_distiller
from megatron_selfdistill.metrics.run_log import read_events


def lines_of(ranks: Any, arguments: list[str], start: Any = start_and_listen) -> list[str]:
    shown = [*arguments, "metrics.console_every=1"]
    [(status, output)] = ranks.run(start, shown, world_size=1, init_process_group=False)
    assert status == 0, output
    return list(output.strip().splitlines())


def start_and_press(arguments: list[str]) -> tuple[int, str]:
    """Call `start_and_listen`; the run is asked to stop in its second step."""
    from megatron_selfdistill.trainer import Trainer

    update = Trainer.update

    def pressed(self: Any, step: Any) -> Any:
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", pressed)
        return start_and_listen(arguments)


def start_where_no_model_can_be_built(arguments: list[str]) -> tuple[int, str]:
    from megatron_selfdistill.learner import Learner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "__init__", None)
        return start_and_listen(arguments)


def test_a_stopped_run_says_how_to_continue_and_ends_and_a_complete_one_builds_and_changes_nothing(
    ranks, data, tmp_path
):
    run = tmp_path / "run"
    arguments = overrides(data, run, "num_steps=3", "checkpoint.async_save=true")
    (stopped,) = [line for line in lines_of(ranks, arguments, start_and_press) if line.startswith("stopped ")]
    assert "SIGINT" in stopped and f"{run}/checkpoints/iter_0000002" in stopped and saved_step(run) == 2
    checkpoint = run / "checkpoints" / "iter_0000003"
    (done,) = [line for line in lines_of(ranks, arguments) if line.startswith("done: ")]
    assert str(checkpoint) in done and (checkpoint / "metadata.json").is_file()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    lines = lines_of(ranks, arguments, start_where_no_model_can_be_built)
    assert any(line.startswith("complete: ") and str(checkpoint) in line for line in lines)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_reward_that_fails_costs_no_finished_step(ranks, data, tmp_path):
    rewarded = ["method.name=opsd_rl", "method.reward=hint_functions.reward_that_leaves_late", "rollout.num_samples=2"]
    train(ranks, overrides(data, tmp_path / "run", "checkpoint.save_every=0", *rewarded), world_size=2, expected=4)
    assert saved_step(tmp_path / "run") >= 1
    event = read_events(tmp_path / "run")[-1]
    assert event["event"] == "verifier" and "reward_that_leaves_late" in event["reason"]


def from_python(data: Path, run_dir: Path) -> dict[str, Any]:
    """Return what the methods return: train two steps, go on to the third, evaluate, and write the report."""
    words = overrides(data, run_dir)[1:]
    begun = SelfDistiller(*words, run_dir=run_dir, steps=2).train()
    run = SelfDistiller(*words, run_dir=run_dir, steps=3)
    last = run.train()
    summary = run.evaluate(data / "problems.jsonl", "--num-samples", "2", "evaluation.verifier=exact_match")
    with pytest.raises(RuntimeError, match="selfdistill train ended with status 2"):
        SelfDistiller(*words, "traget.rule=fixed", run_dir=run_dir).train()
    found = {"steps": (begun["step"], last["step"]), "losses": run.figures()["loss/mean"]}
    return found | {"summary": summary, "report": run.report().is_file()}


@pytest.mark.full
def test_an_object_trains_evaluates_and_reports_the_run_of_the_commands(ranks, data, finished, tmp_path):
    [found] = ranks.run(from_python, data, tmp_path / "python", world_size=1)
    assert found["steps"] == (2, 3) and found["report"]
    assert 0 <= found["summary"]["metrics"]["greedy_accuracy"] <= 1
    expected = [(line["step"], line["loss/mean"]) for line in reproducible_metrics(finished)[:3]]
    assert found["losses"] == expected


def test_the_settings_of_a_file_are_those_of_the_evaluation(tmp_path, monkeypatch):
    (tmp_path / "my.yaml").write_text("rollout: {top_k: 5}\ndata: {path: a.jsonl}\n")
    (tmp_path / "summary.json").write_text("{}")
    seen = []
    monkeypatch.setattr(self_distiller, "_run", lambda *words: seen.extend(words))
    SelfDistiller(f"{tmp_path}/my.yaml", run_dir="run").evaluate("test.jsonl", out=tmp_path)
    assert "rollout.top_k=5" in seen and "data.path='a.jsonl'" not in seen


def started(ranks, data: Path, run: Path, *more: str) -> tuple[int, str]:
    arguments = overrides(data, run, "num_steps=7", "metrics.console_every=1", *more)
    (outcome,) = ranks.run(start_and_listen, arguments, world_size=1, init_process_group=False)
    return outcome


@pytest.fixture
def shortened(data, tmp_path) -> str:
    lines = (data / "problems.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "problems.jsonl").write_text("".join(lines[:-1]))
    return f"data.path={tmp_path}/problems.jsonl"


LEARNED = ["target=strict", "rollout.temperature=0.5", "method.name=sft", "+model.transformer.attention_dropout=0.1"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (LEARNED, ["target.k_max", "rollout.temperature", "method.name", "model.transformer.attention_dropout"]),
        (["teacher.weights=ema", "checkpoint.resume=force"], ["teacher.weights"]),
        (["SHORTENED"], ["data.path"]),
    ],
    ids=["what decides what is learned", "another form on disk, even by force", "other problems"],
)
def test_such_changes_are_refused_before_anything_is_built(ranks, run, data, shortened, changes, named):
    before = bytes_of(run)
    status, output = started(ranks, data, run, *(change.replace("SHORTENED", shortened) for change in changes))
    assert status == 2 and "Traceback" not in output and "num_steps" not in output, "what may change is no reason"
    assert all(key in output for key in named)
    assert ("checkpoint.resume=force" in output) == ("checkpoint.resume=force" not in changes), "where it helps"
    assert bytes_of(run) == before


@pytest.mark.full
def test_what_may_change_is_logged_line_by_line_once_and_the_run_goes_on(ranks, data, run, tmp_path):
    text, same = (run / "config.yaml").read_text(), tmp_path / "same.jsonl"
    shutil.copyfile(data / "problems.jsonl", same)
    changes = ["optimizer.lr=5e-4", "schedule.max_tokens=128", "checkpoint.save_every=5", f"data.path={same}"]
    status, output = started(ranks, data, run, *changes, "optimizer.precision=bf16")
    assert status == 0 and saved_step(run) == 7
    keys = [line.partition(":")[0] for line in output.splitlines() if " in the checkpoint, now " in line]
    named = "run_dir data.path checkpoint.save_every metrics.console_every num_steps optimizer.lr optimizer.precision"
    assert sorted(keys) == sorted([*named.split(), "schedule.max_tokens"])
    assert "optimizer.lr: 0.001 in the checkpoint, now 0.0005" in output
    assert reproducible_metrics(run)[6]["learning_rate"] == pytest.approx(5e-4)
    assert (run / "config.until_step_6.yaml").read_text() == text, "the configuration of the earlier launch is kept"
    assert yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["lr"] == 5e-4
    status, output = started(ranks, data, run, *changes, "optimizer.precision=bf16")
    assert status == 0 and " in the checkpoint, now " not in output and "force" not in output
    kept = sorted(file.name for file in run.glob("config*.yaml"))
    assert kept == ["config.until_step_6.yaml", "config.yaml"], "an equal one is not kept twice"


@pytest.mark.full
def test_force_continues_with_the_stored_state_and_starts_other_problems_from_their_beginning(
    ranks, data, run, shortened
):
    from megatron_selfdistill.checkpoint.formats.saved_run import read_saved_run

    changes = ["target=strict", "rollout.temperature=0.5", shortened, "seed=3", "checkpoint.resume=force"]
    status, output = started(ranks, data, run, *changes)
    assert status == 0 and saved_step(run) == 7
    assert all(f"{key} in the checkpoint" in output for key in ("target.k_max: '1 + w'", "rollout.temperature: 1.0"))
    assert [line["step"] for line in reproducible_metrics(run)] == [1, 2, 3, 4, 5, 6, 7]
    state = read_saved_run(run / "checkpoints" / "iter_0000007").trainer_state["problem_sampler"]
    assert state | {"fingerprint": ""} == {"epoch": 0, "position": 8, "seed": 3, "fingerprint": ""}
