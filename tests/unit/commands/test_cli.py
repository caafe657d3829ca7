# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The program ``selfdistill`` chooses the command, and ends as that command ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_selfdistill import cli

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("arguments", "called", "handed_on"),
    [
        ("train seed=1", "train", "seed=1"),
        ("--config-name other", "train", "--config-name other"),
        ("seed=1 convert", "train", "seed=1 convert"),
        ("evaluate compare a b", "instruments.evaluate.evaluate_command", "compare a b"),
        ("serve --port 1 -- train", "engines.vllm.server.serve", "--port 1 -- train"),
    ],
)
def test_the_first_word_chooses_who_gets_the_other_arguments(monkeypatch, arguments, called, handed_on):
    got = []

    def import_module(name: str) -> SimpleNamespace:
        return SimpleNamespace(main=lambda argv: got.append((name, argv)) or 7)

    monkeypatch.setattr(cli.importlib, "import_module", import_module)
    assert cli.main(arguments.split()) == 7
    assert got == [(f"megatron_selfdistill.{called}", handed_on.split())]


@pytest.mark.parametrize(("arguments", "ignored"), [(["train", "--recipes"], True), (["doctor", "--help"], False)])
def test_only_a_rank_that_trains_outlives_the_signal_by_which_torchrun_ends_the_others(arguments, ignored):
    code = (
        "import runpy, signal, sys\n"
        "try:\n    runpy.run_module('megatron_selfdistill', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "sys.exit(10 + (signal.getsignal(signal.SIGTERM) == signal.SIG_IGN))"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 10 + ignored, done.stderr
