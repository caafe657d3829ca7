# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The seconds of the stages of CI beside the last recorded ones (.ci/stage_seconds.json).

    python tools/stage_times.py calibrate                   prints the seconds of a fixed piece of work
    python tools/stage_times.py expect STAGE CALIBRATION    prints the seconds of a stage here; 0 if unknown
    python tools/stage_times.py compare FILE CALIBRATION    prints a table; exits with 1 if a stage has grown by half
    python tools/stage_times.py record FILE CALIBRATION     records the seconds of the stages in FILE

FILE has a line for each stage: its name, a tab, its seconds.  CALIBRATION is what `calibrate` has printed.

Machines differ by a factor of two.  The recorded seconds are therefore multiplied by what the fixed work takes here,
divided by what it took when the seconds were recorded.  The share of the total would not do: the share of a stage that
is half of all hardly moves when the stage grows by half, and a growth of all stages together moves no share.  The work
runs in as many processes as the tests, so that it also feels how many cores there are and what else runs on them.  If a
stage seems to have grown, the work is measured once more, and the slower measurement counts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).resolve().parent.parent / ".ci" / "stage_seconds.json"
GROWTH = 1.5
"""The ratio to the recorded seconds from which on a stage has grown."""
SLACK_S = 30.0
"""The seconds that a stage may have more in any case: what a few seconds do to a short stage says nothing."""
FETCHING = ("virtual environment", "Chromium", "Slurm")
"""The beginnings of the names of stages that fetch packages, whose seconds are the network's: they never fail."""
NUM_PROCESSES = 3


def calibrate() -> float:
    """Return the wall seconds of a fixed piece of work in `NUM_PROCESSES` processes at once; the better of two."""
    seconds = []
    with ProcessPoolExecutor(NUM_PROCESSES) as pool:
        list(pool.map(_work, [1] * NUM_PROCESSES))  # the processes have started
        for _ in range(2):
            began = time.perf_counter()
            list(pool.map(_work, [100] * NUM_PROCESSES))
            seconds.append(time.perf_counter() - began)
    return min(seconds)


def _work(rounds: int) -> str:
    """Return a hash after ``rounds`` rounds of about 10 ms on one core: interpreted code, memory, and compiled code."""
    digest = b""
    for number in range(rounds):
        values = sorted((i * 7919 + number) % 10007 for i in range(20_000))
        text = ",".join(map(str, values)).encode()
        digest = hashlib.sha256(digest + text * 10).digest()
    return digest.hex()


def read_stages(file: Path) -> dict[str, float]:
    """Return the seconds of each stage; a stage that ran twice has the sum."""
    stages: dict[str, float] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        name, _, seconds = line.rpartition("\t")
        stages[name] = stages.get(name, 0.0) + float(seconds)
    return stages


def expected_stages(recorded: Mapping[str, Any], calibration: float) -> dict[str, float]:
    """Return the seconds that each recorded stage takes here.

    ``recorded``: the contents of `RECORDED`.  ``calibration``: the seconds of the fixed work here.
    """
    return {name: seconds * calibration / recorded["calibration"] for name, seconds in recorded["stages"].items()}


def grown(stages: Mapping[str, float], recorded: Mapping[str, Any], calibration: float) -> dict[str, float]:
    """Return the expected seconds here of each stage that has grown by half; the arguments as in `expected_stages`."""
    found = {}
    for name, expected in expected_stages(recorded, calibration).items():
        if name in stages and not name.startswith(FETCHING):
            seconds = stages[name]
            if seconds > GROWTH * expected and seconds > expected + SLACK_S:
                found[name] = expected
    return found


def table(stages: Mapping[str, float], recorded: Mapping[str, Any], calibration: float) -> list[str]:
    """Return one line for each stage: its seconds, and the recorded seconds as this machine would take them."""
    expected = expected_stages(recorded, calibration)
    lines = []
    for name, seconds in stages.items():
        beside = f"{expected[name]:,.0f} s recorded" if name in expected else "not recorded"
        lines.append(f"[ci] {name}: {seconds:,.0f} s, {beside}")
    return lines


def compare(stages: Mapping[str, float], recorded: Mapping[str, Any], calibration: float) -> list[str]:
    """Print the table; return one sentence for each stage that has grown."""
    if grown(stages, recorded, calibration):
        calibration = max(calibration, calibrate())
    print("\n".join(table(stages, recorded, calibration)))
    return [
        f"the stage '{name}' took {stages[name]:,.0f} s, expected about {expected:,.0f} s: make it faster, or record "
        "the new seconds with .ci/run --record and say why."
        for name, expected in grown(stages, recorded, calibration).items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command of the module's docstring; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("calibrate")
    for name, argument in (("expect", "stage"), ("compare", "file"), ("record", "file")):
        command = commands.add_parser(name)
        command.add_argument(argument, type=str if argument == "stage" else Path)
        command.add_argument("calibration", type=float)
    options = parser.parse_args(arguments)
    if options.command == "calibrate":
        print(f"{calibrate():.3f}")
        return 0
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    expected = expected_stages(recorded, options.calibration)
    if options.command == "expect":
        print(round(expected.get(options.stage, 0.0)))
        return 0
    stages = read_stages(options.file)
    if options.command == "record":  # a stage for which there was no time keeps its seconds
        contents = {name: round(seconds) for name, seconds in (expected | stages).items()}
        text = json.dumps({"calibration": options.calibration, "stages": contents}, indent=2)
        RECORDED.write_text(text + "\n", encoding="utf-8")
        return 0
    sentences = compare(stages, recorded, options.calibration)
    for sentence in sentences:
        print(f"[ci] {sentence}", file=sys.stderr)
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
