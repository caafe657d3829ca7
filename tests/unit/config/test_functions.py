# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A function of a user that would end the program raises an error in its place, and signals still end it."""

from __future__ import annotations

import inspect
import os
import signal
import sys

import pytest

from megatron_selfdistill import train
from megatron_selfdistill.config import function_named, user_code
from megatron_selfdistill.errors import ProgramEndError

MODULE = """
import asyncio, sys

def ends(how):
    if how == "exit":
        sys.exit(0)
    raise {"interrupt": KeyboardInterrupt, "cancelled": asyncio.CancelledError}[how]("now")

class Made:
    def __init__(self, size=1):
        sys.exit()
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "functions_of_a_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("functions_of_a_user", None)


@pytest.fixture
def no_interrupts():
    """Handle Ctrl-C as a run does, without an exception."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    yield
    signal.signal(signal.SIGINT, before)


def load(name: str):
    return function_named("method.reward", f"functions_of_a_user.{name}", {})


@pytest.mark.parametrize("how", ["exit", "interrupt", "cancelled"])
def test_a_function_or_class_that_ends_the_program_raises_an_error_with_its_path(how, no_interrupts):
    with pytest.raises(ProgramEndError, match=r"^method.reward=functions_of_a_user.ends"):
        load("ends")(how)
    with pytest.raises(ProgramEndError, match=r"functions_of_a_user.Made"):
        load("Made")()
    assert list(inspect.signature(load("Made")).parameters) == ["size"]


def test_a_signal_still_ends_the_code_of_a_user():
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # A shell without job control lets the programs that it starts in the background ignore SIGINT.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as caught, user_code("a verifier"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.code == 143
        with pytest.raises(KeyboardInterrupt), user_code("a verifier"):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, ignored)


def test_a_program_that_ends_within_a_run_does_not_end_with_the_status_of_success(monkeypatch, data, tmp_path):
    monkeypatch.setattr(train, "train", lambda *arguments: sys.exit(0))
    with pytest.raises(ProgramEndError):
        train.main([f"data.path={data}/problems.jsonl", f"run_dir={tmp_path}/run"])
