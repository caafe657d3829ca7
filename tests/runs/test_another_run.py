# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A run that resumes with other settings: changes that are allowed are logged, and other changes are refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml
from tiny_run import bytes_of, overrides, reproducible_metrics, saved_step, start_and_listen

MORE_STEPS = ["num_steps=7"]


def started(ranks, data: Path, run: Path, *more: str) -> tuple[int, str]:
    """Start the run on one rank; return the exit status and the output."""
    arguments = overrides(data, run, *MORE_STEPS, "metrics.console_every=1", *more)
    (outcome,) = ranks.run(start_and_listen, arguments, world_size=1, init_process_group=False)
    return outcome


def test_what_decides_what_is_learned_is_refused_before_anything_is_built(ranks, run, data):
    changes = ["target=strict", "data.teacher_template='{problem}{solution}'", "rollout.temperature=0.5"]
    changes += ["method.name=sft", "+model.transformer.attention_dropout=0.1"]
    before = bytes_of(run)
    status, output = started(ranks, data, run, *changes)
    assert status == 2 and "Traceback" not in output
    (message,) = [line for line in output.splitlines() if "iter_0000006 was trained with another configuration" in line]
    for line in (
        "target.k_max: '1 + w' in the checkpoint, now null",
        "data.teacher_template: ",
        "rollout.temperature: 1.0 in the checkpoint, now 0.5",
        "method.name: 'default' in the checkpoint, now 'sft'",
        "model.transformer.attention_dropout: null in the checkpoint, now 0.1",
    ):
        assert line in message
    assert "num_steps" not in message, "what may change is no reason"
    assert message.endswith("checkpoint.resume=force")
    assert bytes_of(run) == before


def test_what_has_another_form_on_disk_is_refused_even_by_force(ranks, run, data):
    changes = ["teacher.weights=ema", "optimizer.use_distributed_optimizer=false", "checkpoint.resume=force"]
    status, message = started(ranks, data, run, *changes)
    assert status == 2 and "Traceback" not in message
    assert "teacher.weights: 'frozen' in the checkpoint, now 'ema'" in message
    assert "optimizer.use_distributed_optimizer, teacher.weights cannot change within a run" in message
    assert "checkpoint.load=" in message and "checkpoint.resume=force" not in message


def test_what_may_change_is_logged_line_by_line_once_and_the_run_goes_on(ranks, data, finished, run, tmp_path):
    text, same = (run / "config.yaml").read_text(), tmp_path / "same.jsonl"
    shutil.copyfile(data / "problems.jsonl", same)
    changes = ["optimizer.lr=5e-4", "schedule.max_tokens=128", "checkpoint.save_every=5", "loss.fused=low_memory"]
    changes += ["optimizer.precision=bf16", f"data.path={same}"]
    status, output = started(ranks, data, run, *changes)
    assert status == 0 and saved_step(run) == 7
    lines = [line for line in output.splitlines() if " in the checkpoint, now " in line]
    assert f"run_dir: '{finished}' in the checkpoint, now '{run}'" in lines, "the fixture has copied the directory"
    assert [line for line in lines if not line.startswith(("run_dir", "data.path"))] == [
        "checkpoint.save_every: 3 in the checkpoint, now 5",
        "loss.fused: null in the checkpoint, now 'low_memory'",
        "metrics.console_every: 0 in the checkpoint, now 1",
        "num_steps: 6 in the checkpoint, now 7",
        "optimizer.lr: 0.001 in the checkpoint, now 0.0005",
        "optimizer.precision: 'fp32' in the checkpoint, now 'bf16'",
        "schedule.max_tokens: 256 in the checkpoint, now 128",
    ]
    shown = [re.escape(str(path)[:70]) for path in (data, same)]  # a long value is cut
    assert re.search(rf"data\.path: '{shown[0]}.* in the checkpoint, now '{shown[1]}", output), output
    assert reproducible_metrics(run)[6]["learning_rate"] == pytest.approx(5e-4)
    assert (run / "config.until_step_6.yaml").read_text() == text, "the configuration of the earlier launch is kept"
    assert yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["lr"] == 5e-4
    status, output = started(ranks, data, run, *changes)
    assert status == 0 and " in the checkpoint, now " not in output and "force" not in output
    kept = sorted(file.name for file in run.glob("config*.yaml"))
    assert kept == ["config.until_step_6.yaml", "config.yaml"], "an equal one is not kept twice"


def shortened(data: Path, directory: Path) -> Path:
    """Write the problems without the last problem; return the file."""
    lines = (data / "problems.jsonl").read_text().splitlines(keepends=True)
    path = directory / "problems.jsonl"
    path.write_text("".join(lines[:-1]))
    return path


def test_other_problems_are_refused_wherever_they_lie(ranks, data, run, tmp_path):
    before = bytes_of(run)
    status, output = started(ranks, data, run, f"data.path={shortened(data, tmp_path)}")
    assert status == 2 and "Traceback" not in output
    assert "the problems that data.path gives (their digest): '" in output and "checkpoint.resume=force" in output
    assert bytes_of(run) == before


@pytest.mark.full
def test_force_continues_with_the_stored_state_and_starts_other_problems_from_their_beginning(
    ranks, data, run, tmp_path
):
    changes = ["target=strict", "rollout.temperature=0.5", f"data.path={shortened(data, tmp_path)}", "seed=3"]
    status, output = started(ranks, data, run, *changes, "checkpoint.resume=force")
    assert status == 0 and saved_step(run) == 7
    assert "target.k_max: '1 + w' in the checkpoint, now null" in output
    assert "rollout.temperature: 1.0 in the checkpoint, now 0.5" in output
    assert "checkpoint.resume=force: weights, optimizer and teacher are those of " in output
    assert [line["step"] for line in reproducible_metrics(run)] == [1, 2, 3, 4, 5, 6, 7]
    assert "the data starts from its beginning" in output
    state = trainer_state(run / "checkpoints" / "iter_0000007")
    assert state["problem_sampler"] | {"fingerprint": ""} == {"epoch": 0, "position": 8, "seed": 3, "fingerprint": ""}


def trainer_state(path: Path) -> dict:
    from megatron_selfdistill.checkpoint.formats.saved_run import read_saved_run

    return read_saved_run(path).trainer_state
