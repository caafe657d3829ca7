# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The configuration names the variable that holds a secret, so that no run can write or print the secret."""

from __future__ import annotations

import os
from pathlib import Path

import tiny_run

from megatron_selfdistill.train import main

SECRET = "s3cr3t-0f-the-lab"


def files_with(text: str, directory: Path) -> list[str]:
    """Return the files below ``directory`` whose bytes hold ``text``."""
    return [str(file) for file in directory.rglob("*") if file.is_file() and text.encode() in file.read_bytes()]


def train_with(environment: dict[str, str], arguments: list[str]) -> tuple[int, str]:
    os.environ.update(environment)
    return tiny_run.start_and_listen(arguments)


def test_a_run_with_a_secret_writes_and_prints_none(ranks, data, tmp_path):
    run = tmp_path / "run"
    options = "environment.name=replying.Keyed environment.options.password_env=LAB_PASSWORD metrics.console_every=1 "
    options += "metrics.loggers=[tensorboard,recorded_logger.RecordedLogger] report.every=1 num_steps=1"
    arguments = tiny_run.overrides(data, run, *options.split())
    for _ in range(2):
        found = ranks.run(train_with, {"LAB_PASSWORD": SECRET}, arguments, world_size=1, init_process_group=False)
        [(status, output)] = found
        assert status == 0, output
        assert SECRET not in output
    assert (run / "checkpoints" / "iter_0000001").is_dir() and files_with("LAB_PASSWORD", run)
    assert files_with(SECRET, run) == []


def test_a_secret_that_is_written_out_is_one_message(data, tmp_path, capfd):
    named = ["environment.name=replying.Replying", f"environment.options.api_key={SECRET}"]
    assert main(tiny_run.overrides(data, tmp_path / "run", *named)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "name the variable with environment.options.api_key_env" in line and SECRET not in line
