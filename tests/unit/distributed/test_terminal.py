# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""No text of a foreign file steers the terminal through a warning, a traceback or a line about responses."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.distributed.terminal import _Pipe, guard_standard_error
from megatron_selfdistill.evaluation.evaluation_result import Overlooked


@pytest.fixture(autouse=True)
def restored():
    before = logging.lastResort.formatter, sys.excepthook
    yield
    logging.lastResort.setFormatter(before[0])
    sys.excepthook = before[1]


def test_a_warning_shows_control_characters_as_escapes(capsys):
    guard_standard_error()
    record = {"msg": "%s is not there", "args": ("\x1b]52;c;eA==\x07/x",), "levelno": logging.WARNING}
    logging.lastResort.handle(logging.makeLogRecord(record))
    assert capsys.readouterr().err == "\\x1b]52;c;eA==\\x07/x is not there\n"


def test_a_traceback_shows_control_characters_as_escapes(capsys):
    guard_standard_error()
    try:
        raise KeyError("inner") from LookupError("\x1b]52;c;eA==\x07 of x")
    except KeyError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    printed = capsys.readouterr().err
    assert "LookupError: \\x1b]52;c;eA==\\x07 of x\n" in printed
    assert printed.endswith("\nKeyError: 'inner'\n") and printed.count("Traceback (most recent call last):") == 1


WITHOUT_READERS = """
import os, sys
from megatron_selfdistill.distributed.stop import _say
from megatron_selfdistill.distributed.terminal import guard_standard_error
guard_standard_error()
sys.stdin.readline()
for stream in (sys.stdout, sys.stderr):
    for _ in range(3):
        print("x" * 100_000, file=stream, flush=True)
_say("Ctrl-C")
os.write(2, b"another writer of the process")
print("left in a buffer")
sys.exit(7)
"""


def test_a_reader_of_the_console_that_ends_costs_only_its_text():
    pipe, environment = subprocess.PIPE, {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WITHOUT_READERS]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)
    process.stdout.close()
    process.stderr.close()
    process.stdin.write(b"go\n")
    process.stdin.close()
    assert process.wait() == 7


def test_a_console_that_is_a_full_disk_is_still_an_error():
    with open("/dev/full", "wb") as full, pytest.raises(OSError, match="No space left"):
        _Pipe(full.fileno(), "w", closefd=False).write(b"x")


def test_a_response_that_is_quoted_below_an_evaluation_does_not_steer_the_terminal():
    problem = Problem("p", ({"role": "user", "content": "?"},), "", "4\x9b", "a\x1b[2Jb.jsonl:1")
    _, line = Overlooked(1, 1, [(problem, "so\x9b2J\u202e")]).lines("exact_match")
    assert line == r'  a\x1b[2Jb.jsonl:1: the answer "4\x9b", the end of the response "so\x9b2J\u202e"'
