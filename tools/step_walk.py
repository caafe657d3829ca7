# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The walk of one training step: the files of the package that it enters, in order, and the calls that do nothing.

    python tools/step_walk.py                      the default recipe
    python tools/step_walk.py recipe=grpo ...      other options of `selfdistill train`
    python tools/step_walk.py --figures            the numbers of the default recipe alone; exits with 1 if one of them
                                                   is worse than its budget in tools/ring_budgets.toml

The tool trains three steps of a tiny model on one rank on the CPU, and traces the third one, which does not evaluate,
save or check anything that only a first step checks.  It prints

    files       the files of the package whose functions the step calls
    lines       the lines of these files
    executed    the lines among them that the step executes, outside of compat
    density     executed / lines: what a reader opens for a step, and needs for it
    jumps back  the calls from a file into another one whose functions the step has called before this file's
    empty calls the functions of another file that run nothing besides one return of a constant or of an argument

Each number counts a pair of files, or a function, once, however often the step makes the call.  Properties are read,
not called.  The packages `LOOKED_UP`, whose functions say what they do by their names, do not count as jumps.
"""

from __future__ import annotations

import ast
import functools
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "megatron_selfdistill"
for _directory in (REPOSITORY, REPOSITORY / "tests" / "support", REPOSITORY / "tools"):
    if str(_directory) not in sys.path:
        sys.path.insert(0, str(_directory))

import step_walk  # noqa: E402  this file as a module, which the rank imports, too
import tiny_run  # noqa: E402
from ranks import RankPool  # noqa: E402
from ring_budgets import BUDGETS  # noqa: E402

TRACED_STEP = 2
"""The number of steps before the traced one."""
LOOKED_UP = ("compat", "config", "distributed")
"""The packages of values and collectives that every other package uses, and of repairs of Megatron."""
NUM_STEPS = 100
"""The number of steps of the run, most of which are not made: the last one would save."""


class Walk:
    """The calls between files of the package, in the order of a step."""

    def __init__(self) -> None:
        self.entered: dict[str, int] = {}
        """File -> its place in the order of first entries."""
        self.jumps: dict[tuple[str, str], str] = {}
        """Files of a call into an earlier file -> the function that is called."""
        self.empty: dict[str, str] = {}
        """Function that does nothing -> the file that calls it."""
        self.executed: set[tuple[str, int]] = set()
        """File and number of every line that was executed."""

    def trace_lines(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Note the lines of a function of the package; a function for `sys.settrace`."""
        file = _file_at(frame.f_code.co_filename)
        if file is None:
            return None
        if event == "line":
            self.executed.add((file, frame.f_lineno))
        return self.trace_lines

    def trace(self, frame: FrameType, event: str, argument: Any) -> None:
        """Note a call; a function for `sys.setprofile`."""
        if event != "call":
            return
        file, caller = _file_of(frame.f_code), _calling_file(frame)
        if file is None or file.startswith("compat") or _is_property(frame.f_code):
            return
        place = self.entered.setdefault(file, len(self.entered))
        if caller is None or caller == file:
            return
        name = f"{file}:{frame.f_code.co_qualname}"
        looked_up = file.split("/")[0] in LOOKED_UP
        if place < self.entered.setdefault(caller, len(self.entered)) and not looked_up:
            self.jumps.setdefault((caller, file), name)
        if _does_nothing(frame.f_code):
            self.empty.setdefault(name, caller)

    def figures(self) -> dict[str, float]:
        """Return the numbers of the module's docstring."""
        lines = sum(len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) for file in self.entered)
        executed = sum(file in self.entered for file, _ in self.executed)
        return {
            "files": len(self.entered),
            "lines": lines,
            "executed": executed,
            "density": round(executed / lines, 3),
            "jumps back": len(self.jumps),
            "empty calls": len(self.empty),
        }

    def report(self) -> str:
        """Return the walk as text: every file, jump and empty call."""
        listed = [f"  {place + 1:3d}. {file}" for file, place in self.entered.items()]
        jumps = [f"  {caller} -> {name}" for (caller, _), name in self.jumps.items()]
        empty = [f"  {caller} -> {name}" for name, caller in self.empty.items()]
        return "\n".join(["files:", *listed, "jumps back:", *jumps, "empty calls:", *empty])


def misses(figures: Mapping[str, float], budgets: Mapping[str, float]) -> list[str]:
    """Return a sentence for each figure that is worse than its budget: a lower density, or more of anything else."""
    return [
        f"{name} of a step: {figures[name]:,} is worse than the budget of {budget:,} in tools/{BUDGETS.name}"
        for name, budget in budgets.items()
        if (figures[name] < budget if name == "density" else figures[name] > budget)
    ]


def main(arguments: Sequence[str]) -> int:
    """Run the command; return 1 if a figure is worse than its budget, else 0."""
    only_figures = list(arguments) == ["--figures"]
    walk = walk_of([] if only_figures else arguments)
    figures = walk.figures()
    if not only_figures:
        print(walk.report())
    print(", ".join(f"{name} {value:,}" for name, value in figures.items()))
    found = misses(figures, budgets()) if only_figures else []
    for sentence in found:
        print(sentence, file=sys.stderr)
    return 1 if found else 0


def budgets() -> dict[str, float]:
    """Return the budget of each figure."""
    read: dict[str, float] = tomllib.loads(BUDGETS.read_text(encoding="utf-8"))["step"]
    return read


def walk_of(options: Sequence[str]) -> Walk:
    """Train the tiny model with ``options`` and return the walk of its third step."""
    with tempfile.TemporaryDirectory(prefix="selfdistill_walk_") as path:
        data, pool = Path(path) / "data", RankPool()
        try:
            data.mkdir()
            tiny_run.write_data(data)
            arguments = tiny_run.overrides(
                data, Path(path) / "run", f"num_steps={NUM_STEPS}", "checkpoint.save_every=0", *options
            )
            walk: Walk = pool.run(tiny_run.with_trainer, arguments, step_walk.walked, world_size=1)[0]
        finally:
            pool.close()
    return walk


def walked(trainer: Any) -> Walk:
    """Return the walk of the third step; one rank calls it."""
    walk = Walk()
    for number in range(TRACED_STEP + 1):
        sys.setprofile(walk.trace if number == TRACED_STEP else None)
        sys.settrace(walk.trace_lines if number == TRACED_STEP else None)
        try:
            step: list[Any] = []
            for batch in trainer.batches():
                balanced = trainer.balance(batch)
                packed = trainer.pack(balanced)
                step.append(trainer.forward_backward(balanced, packed, step))
            trainer.finish_step(step, trainer.update(step))
        finally:
            sys.setprofile(None)
            sys.settrace(None)
    return walk


def _file_of(code: CodeType) -> str | None:
    return None if code.co_name.startswith("<") else _file_at(code.co_filename)


@functools.cache
def _file_at(place: str) -> str | None:
    """Return the path of a file of the package relative to it; None for another file."""
    return str(Path(place).relative_to(PACKAGE)) if Path(place).is_relative_to(PACKAGE) else None


def _calling_file(frame: FrameType) -> str | None:
    """Return the nearest file of the package that led to this call."""
    caller = frame.f_back
    while caller is not None:
        if (file := _file_of(caller.f_code)) is not None:
            return file
        caller = caller.f_back
    return None


@functools.cache
def _definitions(path: str) -> dict[int, ast.FunctionDef]:
    """Return the functions of a file by the line of their first decorator or of their definition."""
    nodes = ast.walk(ast.parse(Path(path).read_text(encoding="utf-8")))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    return {min([node.lineno, *(one.lineno for one in node.decorator_list)]): node for node in functions}


def _is_property(code: CodeType) -> bool:
    definition = _definitions(code.co_filename).get(code.co_firstlineno)
    decorators = [] if definition is None else definition.decorator_list
    return any(ast.unparse(one).endswith("property") for one in decorators)


def _does_nothing(code: CodeType) -> bool:
    """Return whether the function of ``code`` returns a constant, or an argument as it is, and does nothing else."""
    definition = _definitions(code.co_filename).get(code.co_firstlineno)
    if definition is None:
        return False
    is_text = [isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant) for one in definition.body]
    body = [one for one, text in zip(definition.body, is_text, strict=True) if not text]
    if len(body) != 1 or not isinstance(body[0], ast.Pass | ast.Return):
        return not body
    value = getattr(body[0], "value", None)
    parts = value.elts if isinstance(value, ast.Tuple) else [value]
    return all(_is_plain(part) for part in parts)


def _is_plain(value: ast.expr | None) -> bool:
    """Return whether an expression is a constant, a name, an empty literal, or a copy of a name as a list."""
    if isinstance(value, ast.Call):
        return ast.unparse(value.func) == "list" and all(isinstance(one, ast.Name) for one in value.args)
    empty = (isinstance(value, ast.Dict) and not value.keys) or (isinstance(value, ast.List) and not value.elts)
    return value is None or empty or isinstance(value, ast.Constant | ast.Name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
