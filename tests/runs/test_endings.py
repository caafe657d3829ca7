# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The last lines of a run, and a second start of a complete run."""

from __future__ import annotations

import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from tiny_run import overrides, saved_step, train

from megatron_selfdistill import announcement
from megatron_selfdistill.config import load
from megatron_selfdistill.interop import convert_command as convert
from megatron_selfdistill.metrics.log import MetricsLog
from megatron_selfdistill.metrics.run_log import read_events

REPOSITORY = Path(__file__).resolve().parents[2]


def run_with_messages(arguments: list[str], path: Path, built: Path | None = None, press: bool = False) -> int:
    """Run and write the messages to ``path``, and a line to ``built`` when the model is built; return the exit status.

    ``press`` asks the run to stop in its second step.
    """
    import builtins
    import os

    from megatron_selfdistill.learner import Learner
    from megatron_selfdistill.trainer import Trainer

    message, build, update, show = MetricsLog.message, Learner.__init__, Trainer.update, builtins.print

    def note(self: Any, text: str) -> None:
        if self.enabled:
            with path.open("a") as file:
                file.write(text + "\n")
        message(self, text)

    def note_build(self: Any, *args: Any, **options: Any) -> None:
        if built is not None:
            built.touch()
        build(self, *args, **options)

    def pressed(self: Any, step: Any) -> Any:
        if press and self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, step)

    def note_print(*parts: Any, **options: Any) -> None:
        if "file" not in options:
            with path.open("a") as file:
                show(*parts, file=file)
        show(*parts, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "message", note)
        patch.setattr(Learner, "__init__", note_build)
        patch.setattr(Trainer, "update", pressed)
        patch.setattr(builtins, "print", note_print)
        return tiny_run.start(arguments)


@pytest.fixture(scope="module")
def ended(ranks, data, tmp_path_factory) -> tuple[Path, list[str]]:
    """Return the directory of a run of 2 steps on 2 ranks, and its messages."""
    directory = tmp_path_factory.mktemp("ended")
    arguments = overrides(data, directory / "run", "num_steps=2", "checkpoint.async_save=true")
    train(ranks, arguments, world_size=2, start=run_with_messages, path=directory / "messages")
    return directory / "run", (directory / "messages").read_text().splitlines()


def test_a_run_ends_with_its_checkpoint(ended):
    run, messages = ended
    checkpoint = run / "checkpoints" / "iter_0000002"
    done, train_on = messages[-2:]
    assert re.fullmatch(rf"done: 2 steps in \d+:\d\d; checkpoint: {checkpoint}", done)
    assert (checkpoint / "metadata.json").is_file()
    assert train_on == "next: the same command with a larger num_steps trains on from there"


def test_the_next_command_converts_a_model_that_came_from_hugging_face(tmp_path):
    run = tmp_path / "a run"
    (run / "huggingface").mkdir(parents=True)
    _, convert_it, _ = announcement.complete(load([f"run_dir='{run}'"]), 1, run / "checkpoints" / "iter_0000001")
    words = shlex.split(convert_it.removeprefix("next: selfdistill convert "))
    assert words == ["megatron-to-hf", "--megatron", str(run), "--out", f"{run}-hf"]
    assert convert._parser().parse_args(words).megatron == run


def test_a_complete_run_reports_it_builds_nothing_and_changes_nothing(ranks, data, ended, tmp_path):
    run, _ = ended
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    arguments = overrides(data, run, "num_steps=2", "checkpoint.async_save=true")
    train(ranks, arguments, world_size=2, start=run_with_messages, path=tmp_path / "messages", built=tmp_path / "built")
    messages = (tmp_path / "messages").read_text().splitlines()
    assert messages[0] == (
        f"complete: all 2 steps were done before, nothing is trained; checkpoint: {run}/checkpoints/iter_0000002"
    )
    assert not (tmp_path / "built").exists()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_complete_run_with_another_configuration_is_judged_as_any_other_and_reports_that_nothing_is_trained(
    ranks, data, ended, tmp_path
):
    run, _ = ended
    options = ["num_steps=2", "checkpoint.async_save=true", "metrics.console_every=2"]
    arguments = overrides(data, run, *options)
    train(ranks, arguments, start=run_with_messages, path=tmp_path / "messages", built=tmp_path / "built")
    assert (tmp_path / "built").exists()
    assert "\ncomplete: all 2 steps were done before, nothing is trained" in (tmp_path / "messages").read_text()


def test_a_run_that_was_stopped_shows_how_to_continue_and_ends_with_the_steps_of_both_launches(ranks, data, tmp_path):
    run = tmp_path / "run"
    arguments = overrides(data, run, "num_steps=3")
    train(ranks, arguments, start=run_with_messages, path=tmp_path / "first", press=True)
    assert saved_step(run) == 2
    assert (tmp_path / "first").read_text().splitlines()[-1] == (
        f"stopped after step 2 of 3: SIGINT; started again, the same command continues; checkpoint: "
        f"{run}/checkpoints/iter_0000002"
    )
    train(ranks, arguments, start=run_with_messages, path=tmp_path / "second")
    assert "\ndone: 3 steps (1 of them in this launch) in " in (tmp_path / "second").read_text()


def test_a_reward_that_fails_costs_no_finished_step(ranks, data, tmp_path):
    rewarded = ["method.name=opsd_rl", "method.reward=hint_functions.reward_that_leaves_late", "rollout.num_samples=2"]
    train(ranks, overrides(data, tmp_path / "run", "checkpoint.save_every=0", *rewarded), world_size=2, expected=4)
    assert saved_step(tmp_path / "run") >= 1
    event = read_events(tmp_path / "run")[-1]
    assert event["event"] == "verifier" and "reward_that_leaves_late tried to end the program" in event["reason"]
