# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The last lines of a run, and a second start of a complete run."""

from __future__ import annotations

import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_run import overrides, saved_step, start_and_listen, train

from megatron_selfdistill.commands import announcement
from megatron_selfdistill.config import load
from megatron_selfdistill.interop import convert_command as convert
from megatron_selfdistill.metrics.run_log import read_events


def lines_of(ranks: Any, arguments: list[str], world_size: int = 1, start: Any = start_and_listen) -> list[str]:
    """Start a run that must end with status 0; return the lines that rank 0 prints."""
    shown = [*arguments, "metrics.console_every=1"]
    ends = ranks.run(start, shown, world_size=world_size, init_process_group=False)
    assert {status for status, _ in ends} == {0}, ends
    return list(ends[0][1].strip().splitlines())


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


@pytest.fixture(scope="module")
def ended(ranks, data, tmp_path_factory) -> tuple[Path, list[str]]:
    """Return the directory of a run of 2 steps on 2 ranks, and its messages."""
    directory = tmp_path_factory.mktemp("ended")
    arguments = overrides(data, directory / "run", "num_steps=2", "checkpoint.async_save=true")
    return directory / "run", lines_of(ranks, arguments, 2)


def test_a_run_ends_with_its_checkpoint(ended):
    run, messages = ended
    checkpoint = run / "checkpoints" / "iter_0000002"
    done, train_on = (line for line in messages if line.startswith(("done: ", "next: ")))
    assert re.fullmatch(rf"done: 2 steps in \d+:\d\d; checkpoint: {checkpoint}", done)
    assert (checkpoint / "metadata.json").is_file()
    assert train_on == "next: the same command with a larger num_steps trains on from there"


@pytest.mark.parametrize(("adapters", "kind"), [([], "hf"), (["adapter.rank=4"], "peft")])
def test_the_next_command_converts_a_model_that_came_from_hugging_face(tmp_path, adapters, kind):
    run = tmp_path / "a run"
    (run / "huggingface").mkdir(parents=True)
    config = load([f"run_dir='{run}'", *adapters])
    _, convert_it, _ = announcement.complete(config, 1, run / "checkpoints" / "iter_0000001")
    words = shlex.split(convert_it.removeprefix("next: selfdistill convert "))
    assert words == [f"megatron-to-{kind}", "--megatron", str(run), "--out", f"{run}-{kind}"]
    assert convert._parser().parse_args(words).megatron == run


def start_where_no_model_can_be_built(arguments: list[str]) -> tuple[int, str]:
    from megatron_selfdistill.learner import Learner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "__init__", None)
        return start_and_listen(arguments)


def test_a_complete_run_reports_it_builds_nothing_and_changes_nothing(ranks, data, ended):
    run, _ = ended
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    arguments = overrides(data, run, "num_steps=2", "checkpoint.async_save=true")
    lines = lines_of(ranks, arguments, 2, start_where_no_model_can_be_built)
    complete = "complete: all 2 steps were done before, nothing is trained"
    assert f"{complete}; checkpoint: {run}/checkpoints/iter_0000002" in lines
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_run_that_was_stopped_shows_how_to_continue_and_ends_with_the_steps_of_both_launches(ranks, data, tmp_path):
    run = tmp_path / "run"
    arguments = overrides(data, run, "num_steps=3")
    lines = lines_of(ranks, arguments, start=start_and_press)
    assert saved_step(run) == 2
    (stopped,) = [line for line in lines if line.startswith("stopped ")]
    assert stopped == (
        f"stopped after step 2 of 3: SIGINT; started again, the same command continues; checkpoint: "
        f"{run}/checkpoints/iter_0000002"
    )
    assert any(line.startswith("done: 3 steps (1 of them in this launch) in ") for line in lines_of(ranks, arguments))


def test_a_reward_that_fails_costs_no_finished_step(ranks, data, tmp_path):
    rewarded = ["method.name=opsd_rl", "method.reward=hint_functions.reward_that_leaves_late", "rollout.num_samples=2"]
    train(ranks, overrides(data, tmp_path / "run", "checkpoint.save_every=0", *rewarded), world_size=2, expected=4)
    assert saved_step(tmp_path / "run") >= 1
    event = read_events(tmp_path / "run")[-1]
    assert event["event"] == "verifier" and "reward_that_leaves_late tried to end the program" in event["reason"]
