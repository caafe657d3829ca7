# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The pages of the methods, docs/recipes/NAME.md: made from the docstring of the method's file, its recipes and keys.

The pages are committed, because a code host shows them, too.  After a change of a docstring, a recipe or a setting:

    python tools/docs_site/methods.py
"""

from __future__ import annotations

import ast
import functools
import os
import re
import sys
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tools")]

from docs_site.configuration import escaped, shown  # noqa: E402
from megatron_selfdistill.config import method_keys  # noqa: E402
from megatron_selfdistill.config.methods import method_names, settings_class  # noqa: E402

DIRECTORY = REPOSITORY / "docs" / "recipes"
HEADINGS = (
    *("Algorithm", "Equation", "Paper", "Differences"),
    *("Command", "Expected", "Cost", "Known failure"),
)
"""The parts of a docstring after its first sentence, in their order; each begins a paragraph with its name and ":"."""
NOTE = "<!-- tools/docs_site/methods.py makes this page from the file {name}.py of the methods and its recipes. -->"
LETTERS = (
    "Every response token has the loss `w D(p, q) + a (-log p)`, divided by the number N of response tokens of the "
    "step. rho = p / mu is the ratio of the student's probability of a token to its probability when it was sampled."
)
"""What precedes the equation of a method that has coefficients w and a."""


def pages() -> dict[str, str]:
    """Return each page's path in the repository with its Markdown."""
    return {f"docs/recipes/{name}.md": page(name) for name in method_names()}


def page(name: str) -> str:
    """Return the page of a method as Markdown."""
    summary, parts = taken_apart(docstring(name))
    out = [f"# Method: {name}", NOTE.format(name=name), markdown(summary)]
    for heading, text in parts.items():
        out.append(f"## {heading}")
        if heading == "Equation" and re.search(r"^ {4}.*\ba += ", text, re.MULTILINE):
            out.append(LETTERS)
        out.append(markdown(text))
    out += ["## Settings", *_settings(name)]
    return "\n\n".join(out) + "\n"


def docstring(name: str) -> str:
    """Return the docstring at the top of a method's file, without importing the file."""
    file = REPOSITORY / "megatron_selfdistill" / "methods" / f"{name}.py"
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def taken_apart(text: str) -> tuple[str, dict[str, str]]:
    """Return the first sentence of a docstring, and heading -> text of each part.

    Raises: ValueError unless each part is there once, in the order of `HEADINGS`; Cost may be missing.
    """
    summary, *parts = re.split(rf"\n\n(?=(?:{'|'.join(HEADINGS)}):)", text)
    found = {heading: rest.lstrip(" ").strip("\n") for heading, _, rest in (one.partition(":") for one in parts)}
    if list(found) not in (list(HEADINGS), [one for one in HEADINGS if one != "Cost"]) or len(parts) != len(found):
        raise ValueError(f"expected the parts {', '.join(HEADINGS)}, got {', '.join(found)}: {summary}")
    return summary, found


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
    own = settings_class(name).__annotations__
    keys = {key: fact for key, fact in method_keys(name).items() if key != "method.name"}
    shared = [f"`{key}`" for key in keys if key.partition(".")[2] not in own]
    rows = [
        f"| `{key}` | `{shown(default)}` | {_cell(meaning)} |"
        for key, (default, meaning) in keys.items()
        if f"`{key}`" not in shared
    ]
    if rows:
        out.append("The method has these settings of its own:")
        out.append("\n".join(["| key | default | meaning |", "|---|---|---|", *rows]))
    if shared:
        out.append(f"{'It shares' if rows else 'The method shares'} with other methods {', '.join(shared)}.")
    out.append(
        f"`selfdistill --keys method={name}` lists all settings with their ranges."
        if keys
        else "The method has no settings."
    )
    return out


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


def main() -> None:
    """Write the pages."""
    for path, text in pages().items():
        (REPOSITORY / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
