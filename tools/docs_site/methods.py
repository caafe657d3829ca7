# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The pages of the methods, recipes/NAME.md in the site: made from the docstring of the method's file and its recipes.

The environment of the documentation has no torch, so this module reads the files of the methods and imports none.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import operator
import os
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from docs_site.configuration import escaped, shown
from megatron_selfdistill.config.methods import method_names

REPOSITORY = Path(__file__).resolve().parents[2]
_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
METHODS = "megatron_selfdistill.methods"
DIRECTORY = REPOSITORY / "docs" / "recipes"
"""Where the pages would stand, if they were files: their links lead from here."""
HEADINGS = ("Algorithm", "Equation", "Paper", "Differences", "Command", "Expected", "Known failure")
"""The parts of a docstring after its first sentence, in their order; each begins a paragraph with its name and ":"."""
COMMAND = (
    "selfdistill recipe={name} checkpoint.load=... data.tokenizer=... data.path=problems.jsonl run_dir=runs/{name}"
)
"""The command of a method whose docstring has no other one."""
NOTE = "<!-- tools/docs_site/methods.py makes this page from the file {name}.py of the methods and its recipes. -->"
LETTERS = (
    "Every response token has the loss `w D(p, q) + a (-log p)`, divided by the number N of response tokens of the "
    "step. rho = p / mu is the ratio of the student's probability of a token to its probability when it was sampled."
)
"""What precedes the equation of a method that has coefficients w and a."""


def pages() -> dict[str, str]:
    """Return each page's path in the site with its Markdown."""
    return {f"recipes/{name}.md": page(name) for name in method_names()}


def page(name: str) -> str:
    """Return the page of a method as Markdown."""
    summary, parts = taken_apart(docstring(name))
    out = [f"# Method: {name}", NOTE.format(name=name), markdown(summary)]
    if not re.search("^    ", parts["Command"], re.MULTILINE):
        parts["Command"] = f"{parts['Command']}\n\n    {COMMAND.format(name=name)}".lstrip("\n")
    for heading, text in parts.items():
        out.append(f"## {heading}")
        if heading == "Equation" and re.search(r"^ {4}.*\ba += ", text, re.MULTILINE):
            out.append(LETTERS)
        out.append(markdown(text))
    out += ["## Settings", *_settings(name)]
    return "\n\n".join(out) + "\n"


def docstring(name: str) -> str:
    """Return the docstring at the top of a method's file, without importing the file."""
    return ast.get_docstring(_parsed(f"{METHODS}.{name}")) or ""


def taken_apart(text: str) -> tuple[str, dict[str, str]]:
    """Return the first sentence of a docstring, and heading -> text of each part.

    The part Command is empty in a docstring without this part.
    Raises: ValueError unless each other part is there once, in the order of `HEADINGS`.
    """
    summary, *parts = re.split(rf"\n\n(?=(?:{'|'.join(HEADINGS)}):)", text)
    found = {heading: rest.lstrip(" ").strip("\n") for heading, _, rest in (one.partition(":") for one in parts)}
    wanted = [heading for heading in HEADINGS if heading in found or heading != "Command"]
    if [*found] != wanted or len(parts) != len(found):
        raise ValueError(f"expected the parts {', '.join(HEADINGS)}, got {', '.join(found)}: {summary}")
    return summary, {heading: found.get(heading, "") for heading in HEADINGS}


def markdown(text: str) -> str:
    """Return a part as Markdown: indented blocks are code, and the path of a page of docs/ is a link with its title."""
    out = []
    for block in re.split(r"\n\n+", text):
        if block.startswith("    "):
            lines = [line.removeprefix("    ") for line in block.splitlines()]
            out.append("\n".join(["```", *lines, "```"]))
        else:
            out.append(re.sub(r"\bdocs/[\w/]+\.md\b", _link, block))
    return "\n\n".join(out)


def _link(found: re.Match[str]) -> str:
    path = REPOSITORY / found[0]
    title = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
    return f"[{title}]({os.path.relpath(path, DIRECTORY)})"


def _settings(name: str) -> list[str]:
    """Return what the recipes of the method set, and a table of the settings of the method."""
    out = []
    for recipe in sorted((REPOSITORY / "configs" / "recipe").glob("*.yaml")):
        text = recipe.read_text(encoding="utf-8")
        if _method_of(text) == name:
            lines = [line for line in text.splitlines() if not re.match(r"#|defaults:", line)]
            out.append("\n".join([f"`recipe={recipe.stem}` sets:\n", "```", *lines, "```"]))
    kind = settings(name)
    fields = [one for one in dataclasses.fields(kind) if one.name != "name"]
    shared = [f"`method.{one.name}`" for one in fields if one.name not in kind.__annotations__]
    rows = [
        f"| `method.{one.name}` | `{shown(one.default)}` | {_cell(one.metadata['meaning'])} |"
        for one in fields
        if one.name in kind.__annotations__
    ]
    if rows:
        out.append("The method has these settings of its own:")
        out.append("\n".join(["| key | default | meaning |", "|---|---|---|", *rows]))
    if shared:
        out.append(f"{'It shares' if rows else 'The method shares'} with other methods {', '.join(shared)}.")
    out.append(
        f"`selfdistill --keys method={name}` lists all settings with their ranges."
        if fields
        else "The method has no settings."
    )
    return out


def settings(name: str) -> type[Any]:
    """Return a dataclass with the fields of a method's settings; their metadata have the doc comments."""
    module = f"{METHODS}.{name}"
    named = [
        node.value.id
        for part in _parsed(module).body
        if isinstance(part, ast.ClassDef)
        for node in part.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Name)
        if ast.unparse(node).startswith("Settings")
    ]
    return _stand_in(module, named[0]) if named else settings("default")


@functools.cache
def _stand_in(module: str, name: str) -> type[Any]:
    """Return a dataclass with the bases and the fields of the dataclass ``name`` of ``module``."""
    body = _parsed(module).body
    constants: dict[str, Any] = {}
    for node in body:
        if isinstance(node, ast.ImportFrom) and name in [one.name for one in node.names]:
            return _stand_in(str(node.module), name)
        if not isinstance(node, ast.Assign):
            continue
        parts = getattr(node.value, "elts", [node.value])
        if all(isinstance(part, ast.Constant) for part in parts):
            target, value = node.targets[0], ast.literal_eval(node.value)
            of_each = zip(target.elts, value, strict=True) if isinstance(target, ast.Tuple) else [(target, value)]
            constants |= {ast.unparse(one): its for one, its in of_each}
    (found,) = (node for node in body if isinstance(node, ast.ClassDef) and node.name == name)
    bases = tuple(_stand_in(module, base.id) for base in found.bases if isinstance(base, ast.Name))
    fields: list[tuple[str, Any, Any]] = []
    for node, after in pairwise([*found.body, ast.Pass()]):
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            default = _value(node.value, constants)
            comment = ast.literal_eval(after.value) if isinstance(after, ast.Expr) else ""
            field = dataclasses.field(default=default, metadata={"meaning": " ".join(comment.split())})
            fields.append((ast.unparse(node.target), Any, field))
    return dataclasses.make_dataclass(name, fields, bases=bases)


def _value(node: ast.expr, constants: Mapping[str, Any]) -> Any:
    """Return the value of an expression of literals, names of ``constants`` and arithmetic."""
    if isinstance(node, ast.Name):
        return constants[node.id]
    if isinstance(node, ast.BinOp):
        return _ARITHMETIC[type(node.op)](_value(node.left, constants), _value(node.right, constants))
    return ast.literal_eval(node)


@functools.cache
def _parsed(module: str) -> ast.Module:
    return ast.parse((REPOSITORY / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


def _cell(meaning: str) -> str:
    """Return a doc comment as a cell; an underscore within a word is no markup."""
    return escaped(meaning).replace(r"\_", "_").replace("|", r"\|")


@functools.cache
def _method_of(recipe: str) -> str | None:
    """Return the method of the text of a recipe; None for a recipe of a real size, which has its own page."""
    values = yaml.safe_load(recipe)
    if "cluster" in values:
        return None
    return str(values.get("method", {}).get("name", "default"))
