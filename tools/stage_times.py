# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The seconds of the stages of CI beside the last recorded ones (.ci/stage_seconds.json).

    python tools/stage_times.py expect STAGE FILE   prints the seconds that a stage will take here; 0 if unknown
    python tools/stage_times.py compare FILE        prints a table; exits with 1 if a stage has grown
    python tools/stage_times.py record FILE         records the seconds of the stages in FILE

FILE has a line for each stage that has ended: its name, a tab, its seconds.

The pace of a stage is its seconds divided by the recorded ones.  Machines differ by a factor of three, and a shared
one changes its speed within minutes: stages that nothing had changed had paces from 0.9 to 2.5 in one run, and a fixed
piece of work, timed at the start, says nothing about the next hour.  What a stage will take is therefore computed with
the median of the paces so far.  A stage has grown if its pace is 1.5 times that of every other long stage, so that
no moment of the machine explains it.  The limit of the whole run sees what slows all stages down together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

RECORDED = Path(__file__).resolve().parent.parent / ".ci" / "stage_seconds.json"
GROWTH = 1.5
"""The ratio to the pace of every other long stage from which on a stage has grown."""
LONG_S = 30.0
"""The recorded seconds from which on the pace of a stage says something about the machine."""
SLACK_S = 30.0
"""The seconds that a stage may have more in any case: what a few seconds do to a short stage says nothing."""
FETCHING = ("virtual environment", "Chromium", "Slurm")
"""The beginnings of the names of stages that fetch packages, whose seconds are the network's: they never fail."""


def read_stages(file: Path) -> dict[str, float]:
    """Return the seconds of each stage; a stage that ran twice has the sum."""
    stages: dict[str, float] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        name, _, seconds = line.rpartition("\t")
        stages[name] = stages.get(name, 0.0) + float(seconds)
    return stages


def paces(stages: Mapping[str, float], recorded: Mapping[str, float]) -> dict[str, float]:
    """Return the pace of each long stage that does not fetch packages."""
    judged = [name for name in stages if recorded.get(name, 0.0) >= LONG_S and not name.startswith(FETCHING)]
    return {name: stages[name] / recorded[name] for name in judged}


def expected_stages(stages: Mapping[str, float], recorded: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds that each recorded stage takes on the machine on which ``stages`` took theirs."""
    pace = statistics.median(paces(stages, recorded).values() or [1.0])
    return {name: seconds * pace for name, seconds in recorded.items()}


def compare(stages: Mapping[str, float], recorded: Mapping[str, float]) -> list[str]:
    """Print one line for each stage; return one sentence for each that has grown."""
    expected, found, grown = expected_stages(stages, recorded), paces(stages, recorded), []
    for name, seconds in stages.items():
        beside = f"{expected[name]:,.0f} s expected" if name in expected else "not recorded"
        print(f"[ci] {name}: {seconds:,.0f} s, {beside}")
        others = max((pace for other, pace in found.items() if other != name), default=float("inf"))
        if name in found and seconds > max(GROWTH * others * recorded[name], expected[name] + SLACK_S):
            grown.append(
                f"the stage '{name}' took {seconds:,.0f} s, {found[name]:.2f} times its recorded seconds, and every "
                f"other stage at most {others:.2f} times: make it faster, or record the new seconds with .ci/run "
                "--record and say why."
            )
    return grown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command of the module's docstring; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("expect", "compare", "record"):
        command = commands.add_parser(name)
        if name == "expect":
            command.add_argument("stage")
        command.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    recorded, stages = json.loads(RECORDED.read_text(encoding="utf-8")), read_stages(options.file)
    expected = expected_stages(stages, recorded)
    if options.command == "expect":
        print(round(expected.get(options.stage, 0.0)))
        return 0
    if options.command == "record":  # a stage for which there was no time keeps its seconds
        contents = {name: round(seconds) for name, seconds in (expected | stages).items()}
        RECORDED.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
        return 0
    sentences = compare(stages, recorded)
    for sentence in sentences:
        print(f"[ci] {sentence}", file=sys.stderr)
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
