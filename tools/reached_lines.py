# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The lines that only a GPU reaches, from what programs on a CPU have executed.

    python tools/reached_lines.py run DIRECTORY -- python -m tests.gpu --device cpu
    python tools/reached_lines.py run DIRECTORY -- python -m pytest -q tests/unit/model
    python tools/reached_lines.py report DIRECTORY [--all]

``run`` executes a program and notes in DIRECTORY which lines of megatron_selfdistill/ and tests/gpu/ its processes
execute; several runs add up.  ``report`` lists each function with lines that no run has executed and that depend on the
device: lines behind a condition that names CUDA, NCCL, Transformer Engine or apex, and functions that are named in such
lines only.  ``--all`` lists every function with lines that no run has executed.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

REPOSITORY = Path(__file__).resolve().parent.parent
WATCHED = ("megatron_selfdistill", "tests/gpu")
DEVICE = re.compile(r"cuda|gpu|nccl|transformer_engine|have_te|apex|on_cpu|'cpu'|can_sleep", re.IGNORECASE)
"""What the condition of a branch for a device names."""


@dataclass(frozen=True, eq=False)
class Function:
    """The lines of one function that can be executed; those of its inner functions are lines of the inner ones."""

    path: str
    name: str
    """With its class, as in ``Teacher.update``."""
    lines: frozenset[int]
    of_device: frozenset[int]
    """The lines behind a condition that names a device."""
    names: dict[int, frozenset[str]]
    """The names in each line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a program and return its status, or print a report and return 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    parser.add_argument("--all", action="store_true", help="also the lines that do not depend on the device")
    own, program = _split(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(own)
    if options.what == "run":
        options.directory.mkdir(parents=True, exist_ok=True)
        return run(program, options.directory)
    functions = [function for path in sources() for function in functions_of(path)]
    for line in report(functions, reached(options.directory), everything=options.all):
        print(line)
    return 0


def _split(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Return the arguments before and after ``--``."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:place], arguments[place + 1 :]


def run(program: Sequence[str], directory: Path) -> int:
    """Run a program whose Python processes note in ``directory`` what they execute; return its exit status."""
    paths = [str(REPOSITORY / "tools" / "tracing"), os.environ.get("PYTHONPATH", "")]
    told = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "SELFDISTILL_REACHED": str(directory.resolve())}
    return subprocess.run(program, env=os.environ | told).returncode


def reached(directory: Path) -> dict[str, set[int]]:
    """Return the executed lines of each file, from all processes that have written to ``directory``."""
    found: dict[str, set[int]] = {}
    for file in directory.glob("*.lines"):
        for line in file.read_text(encoding="utf-8").splitlines():
            path, _, number = line.rpartition(":")
            found.setdefault(path, set()).add(int(number))
    return found


def sources() -> list[Path]:
    """Return the files whose lines are counted."""
    return [path for name in WATCHED for path in sorted((REPOSITORY / name).rglob("*.py")) if "test_" not in path.name]


def functions_of(path: Path) -> list[Function]:
    """Return the functions of a file, those in classes and in functions included."""
    text = path.read_text(encoding="utf-8")
    shown = path.relative_to(REPOSITORY).as_posix() if path.is_relative_to(REPOSITORY) else path.name
    executable = {code.co_firstlineno: _own_lines(code) for code in _code_objects(compile(text, str(path), "exec"))}
    found = []
    for name, node in _named(ast.parse(text), ""):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        body = {line for line in executable.get(first, set()) if line >= node.body[0].lineno}
        names = {line: frozenset(_names(text.splitlines()[line - 1])) for line in body}
        found.append(Function(shown, name, frozenset(body), frozenset(body & set(_of_device(node.body))), names))
    return found


def _code_objects(code: CodeType) -> Iterator[CodeType]:
    """Yield ``code`` and all code objects in it."""
    yield code
    for inner in _inner(code):
        yield from _code_objects(inner)


def _inner(code: CodeType) -> list[CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _own_lines(code: CodeType) -> set[int]:
    """Return the lines of a function's code, comprehensions included, which are code objects of their own."""
    lines = {line for _, _, line in code.co_lines() if line is not None}
    return lines.union(*(_own_lines(inner) for inner in _inner(code) if inner.co_name.startswith("<")))


def _named(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if isinstance(node, ast.FunctionDef):
                yield prefix + node.name, node
            yield from _named(node, f"{prefix}{node.name}.")
        else:
            yield from _named(node, prefix)


def _names(line: str) -> Iterable[str]:
    return re.findall(r"\b[A-Za-z_]\w*", line)


def _of_device(body: Sequence[ast.stmt]) -> Iterator[int]:
    """Yield the lines of statements behind a condition that names a device, or behind such a condition that returns."""
    behind = False
    for statement in body:
        if behind:
            yield from range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
            continue
        if isinstance(statement, ast.If) and DEVICE.search(ast.unparse(statement.test)):
            for branch in (*statement.body, *statement.orelse):
                yield from range(branch.lineno, (branch.end_lineno or branch.lineno) + 1)
            behind = isinstance(statement.body[-1], ast.Return | ast.Raise | ast.Continue)
            continue
        for name in ("body", "orelse", "finalbody"):
            inner = getattr(statement, name, None)
            if inner and not isinstance(statement, ast.FunctionDef | ast.ClassDef):
                yield from _of_device(inner)


def report(functions: Sequence[Function], executed: dict[str, set[int]], *, everything: bool) -> list[str]:
    """Return one line per function with lines that were not executed, and a line with their number."""
    missed = {f: f.lines - executed.get(f.path, set()) for f in functions}
    chosen = missed if everything else of_device(missed)
    shown = [f"{f.path}: {f.name}: {_ranges(lines)}" for f, lines in chosen.items() if lines]
    total, count = sum(len(f.lines) for f in functions), sum(map(len, chosen.values()))
    kind = "" if everything else " and depend on the device"
    return [*shown, f"{count} of {total} lines in {len(shown)} functions were not executed{kind}"]


def of_device(missed: dict[Function, frozenset[int]]) -> dict[Function, frozenset[int]]:
    """Return the missed lines that depend on the device.

    They are those behind a condition that names a device, and all lines of a function that was never executed and whose
    name occurs in such lines only.
    """
    chosen = {f: lines & f.of_device for f, lines in missed.items()}
    places: dict[str, set[tuple[Function, int]]] = {}
    for f in missed:
        for line, names in f.names.items():
            for name in names:
                places.setdefault(name, set()).add((f, line))

    def depends(f: Function) -> bool:
        named = places.get(f.name.rpartition(".")[2], set())
        return bool(named) and all(line in chosen[other] for other, line in named)

    while more := {f: m for f, m in missed.items() if m and m == f.lines and chosen[f] != m and depends(f)}:
        chosen |= more
    return chosen


def _ranges(lines: Iterable[int]) -> str:
    """Return numbers as ranges: "3-5, 9"."""
    found: list[list[int]] = []
    for line in sorted(lines):
        if found and line == found[-1][1] + 1:
            found[-1][1] = line
        else:
            found.append([line, line])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


if __name__ == "__main__":
    sys.exit(main())
