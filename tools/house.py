# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The figures of the house: how many lines there are, and how many of them a training step needs.

    python tools/house.py figures             prints the figures beside their limits; ends with 1 above the air
    python tools/house.py walk                prints the files whose functions a step of the default recipe calls
    python tools/house.py walk recipe=grpo    does so with other options of `selfdistill train`
    python tools/house.py reruns              prints the tests that run once more if they fail; ends with 1 above 20

Every line of Python counts: comments, docstrings and empty lines, too.  The main house is the package without the
folders of `ANNEXES`, each of which is one option or one kind of tools.  The density of a step is the number of lines
that a step executes, divided by the lines of the files whose functions the step calls: what a reader needs for a step,
and what the reader opens for it.  Properties are read and not called.  The step is the third one of a tiny model on one
rank on the CPU, which does not evaluate, save or check anything that only a first step checks.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "megatron_selfdistill"
for _directory in (REPOSITORY, REPOSITORY / "tests" / "support", REPOSITORY / "tools"):
    if str(_directory) not in sys.path:
        sys.path.insert(0, str(_directory))

import house  # noqa: E402  this file as a module, which the rank imports, too
import tiny_run  # noqa: E402
from ranks import RankPool  # noqa: E402

LIMITS = {"main house": 29_420, "package": 58_830, "tests": 49_000, "density": 0.223}
"""The figures at which the house stands.  A commit that raises a limit says why."""
AIR = 0.02
"""The share of a limit by which a figure may miss it."""
ANNEXES = (
    *("adapters", "architectures", "chat_logs", "engines", "environments", "guidance"),
    *("instruments", "interop", "kernels", "methods", "overlap", "teachers"),
)
MOST_RERUNS = 20
TRACED_STEP = 2
"""The number of steps before the traced one."""


class Walk:
    """The files of the package that a step enters, in order, and the lines that it executes."""

    def __init__(self) -> None:
        self.entered: dict[str, None] = {}
        self.executed: set[tuple[str, int]] = set()

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Note the lines of a function of the package; a function for `sys.settrace`."""
        file = _file_at(frame.f_code.co_filename)
        if file is None or file.startswith("compat"):
            return None
        if event == "call" and not frame.f_code.co_name.startswith("<") and not _is_property(frame.f_code):
            self.entered.setdefault(file)
        if event == "line":
            self.executed.add((file, frame.f_lineno))
        return self.trace

    def density(self) -> float:
        """Return the executed lines divided by the lines of the entered files."""
        lines = sum(_lines(PACKAGE / file) for file in self.entered)
        return sum(file in self.entered for file, _ in self.executed) / lines


def main(arguments: Sequence[str]) -> int:
    """Run the command; return 1 if a figure misses its limit by more than the air, else 0."""
    command, *options = arguments or ["figures"]
    if command == "walk":
        walk = walk_of(options)
        for place, file in enumerate(walk.entered, 1):
            print(f"{place:3d}. {file:50} {_lines(PACKAGE / file):5,} lines")
        print(f"density {walk.density():.3f}")
        return 0
    if command == "reruns":
        tests = reruns()
        print("\n".join([*tests, f"{len(tests)} of at most {MOST_RERUNS}"]))
        return int(len(tests) > MOST_RERUNS)
    found, missed = figures(), False
    for name, limit in LIMITS.items():
        worse = limit - found[name] if name == "density" else found[name] - limit
        missed |= worse > AIR * limit
        print(f"{name:10} {found[name]:9,.5g} of {limit:9,}{'  MISSED' if worse > AIR * limit else ''}")
    return int(missed)


def figures() -> dict[str, float]:
    """Return the figures of `LIMITS`."""
    files = {file.relative_to(PACKAGE): _lines(file) for file in PACKAGE.rglob("*.py")}
    return {
        "main house": sum(number for file, number in files.items() if file.parts[0] not in ANNEXES),
        "package": sum(files.values()),
        "tests": sum(map(_lines, (REPOSITORY / "tests").rglob("*.py"))),
        "density": walk_of([]).density(),
    }


def reruns() -> list[str]:
    """Return the tests with the mark ``scheduling``, as FILE: NAME."""
    pattern = re.compile(r"pytest\.mark\.scheduling.*?\ndef (test_\w+)", re.DOTALL)
    files = sorted((REPOSITORY / "tests").rglob("test_*.py"))
    return [f"{file.relative_to(REPOSITORY)}: {name}" for file in files for name in pattern.findall(file.read_text())]


def walk_of(options: Sequence[str]) -> Walk:
    """Train the tiny model with ``options`` and return the walk of its third step."""
    with tempfile.TemporaryDirectory(prefix="selfdistill_walk_") as path:
        data, pool = Path(path) / "data", RankPool()
        try:
            tiny_run.write_data(data)
            # The last step would save, and is not made.
            options = ["num_steps=100", "checkpoint.save_every=0", *options]
            arguments = tiny_run.overrides(data, Path(path) / "run", *options)
            walk: Walk = pool.run(tiny_run.with_trainer, arguments, house.walked, world_size=1)[0]
        finally:
            pool.close()
    return walk


def walked(trainer: Any) -> Walk:
    """Return the walk of the third step; one rank calls it."""
    walk = Walk()
    for number in range(TRACED_STEP + 1):
        sys.settrace(walk.trace if number == TRACED_STEP else None)
        try:
            step: list[Any] = []
            for batch in trainer.batches():
                balanced = trainer.balance(batch)
                packed = trainer.pack(balanced)
                step.append(trainer.forward_backward(balanced, packed, step))
            trainer.finish_step(step, trainer.update(step))
        finally:
            sys.settrace(None)
    return walk


@functools.cache
def _file_at(place: str) -> str | None:
    """Return the path of a file of the package relative to it; None for another file."""
    return str(Path(place).relative_to(PACKAGE)) if Path(place).is_relative_to(PACKAGE) else None


@functools.cache
def _is_property(code: CodeType) -> bool:
    """Return whether the function is a property, which is read and not called."""
    following = Path(code.co_filename).read_text(encoding="utf-8").splitlines()[code.co_firstlineno - 1 :]
    decorators = itertools.takewhile(lambda line: line.strip().startswith("@"), following)
    return any(line.strip().endswith("property") for line in decorators)


@functools.cache
def _lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
