# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The reference page of the configuration, made from the schema, its doc comments and the rules for resuming."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_selfdistill import config as configuration
from megatron_selfdistill.config.bound_keys import BOUND, FIXED, FREE, JUDGE, RULES, rule_of
from megatron_selfdistill.config.key_list import config_dir, groups, sections
from megatron_selfdistill.config.schema.ranges import OneOf, described, taken_apart

INTRODUCTION = """\
# Configuration

Every key can stand in a YAML file or on the command line, as `key=value`. `selfdistill --keys` prints the same list,
`selfdistill --keys rollout` prints one section. An unknown key is an error, which names the nearest key.

The settings of a method are further keys of the section `method`. They stand at the end of the
[page of the method](../recipes/README.md), and `selfdistill --keys method=NAME` prints them.

The line under a key gives its values, its default, and whether a run with a checkpoint may resume with another value:
"""
WHEN_RESUMED = {
    FREE: "a resumed run may change it",
    BOUND: "a resumed run keeps it",
    FIXED: "a run never changes it",
    JUDGE: "a resumed run keeps it if it trains on verdicts",
}
"""Rule of config/bound_keys.py -> words for it under a key."""
MEANING = {
    FREE: "The key does not decide what is learned.",
    BOUND: "The key decides what is learned. Another value is refused unless `checkpoint.resume=force` is set.",
    FIXED: "The form of a checkpoint depends on the value. Not even `checkpoint.resume=force` allows another value.",
    JUDGE: "The key is bound if the run trains on verdicts; otherwise a resumed run may change it.",
}


def page() -> str:
    """Return the page as Markdown: the recipes, then every section with its groups and keys."""
    lines = [INTRODUCTION]
    lines += [f"- *{WHEN_RESUMED[rule]}*: {MEANING[rule]}" for rule in (FREE, BOUND, FIXED, JUDGE)]
    lines += [
        "",
        "## Recipes",
        "",
        "A recipe sets the keys of a whole run. Other keys of the same command override it.",
        "",
    ]
    lines += ["| recipe | what it is |", "|---|---|"]
    lines += [f"| `recipe={file.stem}` | {escaped(_first_sentence(file))} |" for file in sorted(_recipe_files())]
    listed, options = configuration.keys(), groups()
    sections = list(_sections())
    known = {name for name, _ in sections}
    further = {name: names for name, names in options.items() if name not in known and name != "recipe"}
    for name, title in sections:
        lines += ["", f"## {name or 'The run'}", "", f"{escaped(title)}.", ""]
        for group, names in ({name: options[name]} if name in options else {} if name else further).items():
            lines += [f"Options that set several keys at once: {', '.join(f'`{group}={one}`' for one in names)}.", ""]
        for key in listed:
            if key.rpartition(".")[0] == name:
                lines += [*_entry(key, *listed[key]), ""]
    return "\n".join(lines)


def values(kind: Any) -> str:
    """Return the values that a key of the type ``kind`` accepts, choices as code."""
    plain, ranges, nullable = taken_apart(kind)
    choices = [one for one in ranges if isinstance(one, OneOf)]
    if plain is not str or not choices or not choices[0].choices:
        return described(kind)
    dotted = ", a dotted path" * choices[0].or_dotted
    return ", ".join(f"`{one}`" for one in choices[0].choices) + dotted + " or null" * nullable


def shown(default: Any) -> str:
    """Return the YAML of a default."""
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return repr(default) if isinstance(default, str) and not default.strip() else str(default)


def _entry(key: str, default: Any, meaning: str, kind: Any) -> list[str]:
    rule = rule_of(key)
    parts = [values(kind), f"default `{shown(default)}`", WHEN_RESUMED[rule]]
    lines = [f"[`{key}`](#{key}){{ #{key} }}", f":   {' · '.join(parts)}", "", *_indented(escaped(meaning))]
    for other in WHEN_RESUMED:
        items = sorted(name for name, found in RULES.items() if name.startswith(f"{key}.") and found == other != rule)
        if items:
            names = ", ".join(f"`{name.removeprefix(key + '.')}`" for name in items)
            lines += ["", *_indented(f"For these items {WHEN_RESUMED[other]}: {names}.")]
    return lines


def escaped(text: str) -> str:
    """Return a doc comment as Markdown in which no character outside of `code` is markup."""
    code = re.split(r"(``.*?``|`.*?`)", text)
    return "".join(
        part if i % 2 else re.sub(r"([*_\[\\])", r"\\\1", part).replace("<", "&lt;") for i, part in enumerate(code)
    )


def _indented(text: str) -> list[str]:
    return [f"    {line}".rstrip() for line in text.splitlines()]


def _recipe_files() -> Iterator[Path]:
    return (config_dir() / "recipe").glob("*.yaml")


def _first_sentence(file: Path) -> str:
    """Return the first sentence of the comment at the top of a YAML file."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    text = " ".join(line.lstrip("# ").rstrip() for line in comment if "@package" not in line)
    return re.split(r"(?<=\.) ", text, maxsplit=1)[0]


def _sections() -> Iterator[tuple[str, str]]:
    """Yield the name of each section, "" for the keys of no section, and its title."""
    for name, cls in sections().items():
        yield name, (inspect.getdoc(cls) or "").splitlines()[0].rstrip(".")
