# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The metric keys that docs/metrics.md explains, and the metric keys that the package can log."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "megatron_selfdistill"
PAGE = REPOSITORY / "docs" / "metrics.md"

ROOMS = ("rollout", "engines", "sources", "environments", "methods")
SOURCES = [
    PACKAGE / "trainer.py",
    *(PACKAGE / "evaluation" / name for name in ("held_out.py", "evaluation_result.py")),
    *(PACKAGE / "metrics" / name for name in ("step.py", "leakage.py", "phases.py")),
    *(file for room in ROOMS for file in sorted((PACKAGE / room).rglob("*.py"))),
]
NO_KEYS = {"application/json"}


@functools.cache
def documented() -> tuple[str, ...]:
    """Return the keys in the first column of the page's last table; N and K stand for numbers, NAME for a teacher's."""
    table = PAGE.read_text().partition("## Every key of metrics.jsonl")[2]
    return tuple(re.findall(r"^\| `([a-z0-9_/]+(?:NAME|[NK])?)` \| [^|]+ \|$", table, re.MULTILINE))


def undocumented(keys: Iterable[str]) -> set[str]:
    """Return the keys that the page does not explain."""
    known = re.compile(
        "|".join(key.replace("NAME", r"[\w+-]+").replace("_N", r"_\d+").replace("_K", r"_\d+") for key in documented())
    )
    return {key for key in keys if not known.fullmatch(key.replace("evaluation_hinted/", "evaluation/"))}


def in_sources() -> set[str]:
    """Return every key that stands in the sources, or that the sources make from a name in them."""
    from megatron_selfdistill.evaluation.calibration import Calibration
    from megatron_selfdistill.evaluation.evaluation_result import EvaluationResult
    from megatron_selfdistill.loss import Status
    from megatron_selfdistill.metrics.step import _OVER

    found = {key for path in SOURCES for key in _spelt(ast.parse(path.read_text()))} - NO_KEYS
    found |= {"step", *(f"status/{status.name.lower()}" for status in Status)}
    found |= {re.sub(r"_\d+$", "_N", key) for key in _OVER}
    found |= {f"teacher_{what}/NAME" for what in ("tokens", "loss", "top1_agreement")}
    rates = {f.name for f in fields(EvaluationResult) if f.type in ("float", "float | None")}
    rates |= {f"{kind}_{f.name}" for kind in ("greedy", "sampled") for f in fields(Calibration)}
    rates |= {"avg_at_N", "pass_at_K", "majority_at_K", "pass_over_avg_at_K"}
    return found | {f"evaluation/{name}" for name in rates}


def dynamic() -> set[str]:
    """Return the f-strings of the sources that look like keys, with * for each value."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values)
                if re.fullmatch(r"[a-z_*]+/[a-z0-9_*]+|[a-z_]+_at_\*", text):
                    found.add(text)
    return found


def _spelt(tree: ast.AST) -> Iterator[str]:
    """Yield the complete keys of a file, and the keys of its timers, counters and item assignments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and re.fullmatch(r"[a-z0-9_]+/[a-z0-9_]+", str(node.value)):
            yield str(node.value)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            prefix = {"phases": "seconds", "_phases": "seconds", "_count": "rollout"}.get(_name(node.func))
            if prefix:
                yield f"{prefix}/{node.args[0].value!s}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "self.phases.metrics":
            yield from (f"tokens_per_second/{keyword.arg}" for keyword in node.keywords)
        elif isinstance(node, ast.For) and ast.unparse(node.iter).startswith("zip(('student', 'teacher')"):
            yield from ("padding/student", "padding/teacher")
        elif (
            isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.slice, ast.Constant)
        ):
            yield from [str(node.slice.value)] if _name(node.value) == "metrics" else []


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
