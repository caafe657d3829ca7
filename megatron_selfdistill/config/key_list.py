# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The keys of the configuration with their defaults, meanings and ranges, and the groups that set several keys."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_selfdistill.config.methods import method_names, settings_class
from megatron_selfdistill.config.schema.field_checks import kinds_of
from megatron_selfdistill.config.schema.whole_config import Config
from megatron_selfdistill.config.words import SHORT, WORDS
from megatron_selfdistill.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]


def config_dir() -> Path:
    """Return the directory with the hydra configs that the project ships, as an absolute path.

    The directory is ``<package>/configs`` in a wheel (``setup.py`` copies the files) and ``<repository>/configs`` in a
    checkout or an editable install.  The configs of a lab are found by hydra's search path, not here.
    """
    in_wheel = _PACKAGE / "configs"
    return in_wheel if in_wheel.is_dir() else _PACKAGE.parent / "configs"


def keys(cls: type = Config, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """Return every key -> (default, documentation), depth first; ``prefix`` stands before each key.

    A section within a section is one key, whose default is its dataclass.
    """
    out: dict[str, tuple[Any, str]] = {}
    docs = field_docs(cls)
    for f in dataclasses.fields(cls):
        section = kinds_of(cls)[f.name]
        if dataclasses.is_dataclass(section) and cls is Config:  # of a method, not its settings are keys, but its name
            out.update(keys(section, f"{prefix}{f.name}."))  # type: ignore[arg-type]
        else:
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            out[prefix + f.name] = (default, docs.get(f.name, ""))
    return out


def method_keys(name: str) -> dict[str, tuple[Any, str]]:
    """Return every key of the method ``name`` -> (default, documentation), ``method.name`` first.

    Raises: `ConfigError` where there is no such method.
    """
    found = keys(settings_class(name), "method.")
    return found | {"method.name": (name, found["method.name"][1])}


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Return name -> doc comment of each field of a dataclass: the string under the field."""
    docs = {}
    for part in (one for one in reversed(cls.__mro__) if dataclasses.is_dataclass(one)):
        body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0].body  # type: ignore[attr-defined]
        for node, after in pairwise(body):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
                docs[node.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return docs


@functools.cache
def entries() -> dict[str, dict[str, tuple[Any, str]]]:
    """Return each key that is a section within a section -> its entries -> (default, documentation)."""
    sections = {key: default for key, (default, _) in keys().items() if dataclasses.is_dataclass(default)}
    return {key: keys(type(default)) for key, default in sections.items()}


@functools.cache
def kinds() -> dict[str, Any]:
    """Return the type of each key, with the range that it declares; of a section within a section, that of entries."""

    def found(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, kind in kinds_of(cls).items():
            if dataclasses.is_dataclass(kind):
                yield from found(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
            elif prefix + name in keys() or prefix[:-1] in keys():
                yield prefix + name, kind

    return dict(found(Config, ""))


def method_kinds(name: str) -> dict[str, Any]:
    """Return the type of each key of the method ``name``, with the range that it declares."""
    return {f"method.{key}": kind for key, kind in kinds_of(settings_class(name)).items()}  # type: ignore[arg-type]


def groups() -> dict[str, list[str]]:
    """Return group -> options of the configs that the project ships."""
    return {
        directory.name: sorted(file.stem for file in directory.glob("*.yaml"))
        for directory in sorted(config_dir().iterdir())
        if directory.is_dir()
    }


def long_names(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a command line with `SHORT` names replaced by those of the keys.

    Raises: `ConfigError` where a key has two names in ``overrides``.
    """
    given = {override.partition("=")[0] for override in overrides}
    if both := [f"{short} and {key}" for short, key in SHORT.items() if {short, key} <= given]:
        raise ConfigError(f"{both[0]} are two names of one key: remove one of them")
    return [re.sub("^[a-z]+(?==)", lambda name: SHORT.get(name[0], name[0]), override) for override in overrides]


def unknown_key(key: str) -> str | None:
    """Return a message that names the key that ``key`` may mean, or None if the key exists."""
    key = key.split("[")[0]  # an element of a list
    known, (mapping, _, entry) = keys(), key.rpartition(".")
    if mapping in entries():
        listed = f"{mapping} has no entry {entry!r}: its entries are {', '.join(entries()[mapping])}"
        return None if entry in entries()[mapping] else listed
    if key.startswith("method.") and key not in known:
        known = {name: one for method in method_names() for name, one in method_keys(method).items()}
    free_form = [name for name, (default, _) in known.items() if isinstance(default, dict)]
    sections = {name.rsplit(".", i)[0] for name in known for i in range(1, name.count(".") + 1)}
    if not key or key in known or key in sections or any(key.startswith(f"{name}.") for name in free_form):
        return None
    if key in groups():
        return (
            f"a file of the group {key} must begin with the line `# @package _global_`: its keys are those of the run"
        )
    if key in SHORT:
        return f"{key} is short for {SHORT[key]} on a command line: a file has the whole name"
    if word := WORDS.get(key.rpartition(".")[2].replace("-", "_")):
        called, _, advice = word.partition(": ")
        return f"{key} is called {called} here{f': {advice}' if advice else ''}"
    names = [*known] if "." in key else [*known, *sections, *groups()]
    near = _nearest(key, names)
    return f"unknown configuration key {key!r}; did you mean {near!r}? (`selfdistill --keys` lists all)"


def meant_key(word: str) -> str:
    """Return the key that a word may mean, and after a colon what to do: its own, a short, another's or the nearest."""
    return SHORT.get(word) or WORDS.get(word) or (word if word in keys() else _nearest(word, [*keys()]))


def _nearest(key: str, names: Sequence[str]) -> str:
    """Return the name with the same last part in another section, or else the name with the most similar spelling."""
    last = key.rpartition(".")[2]
    same_last = [name for name in names if name.rpartition(".")[2] == last]
    return difflib.get_close_matches(key, same_last or names, n=1, cutoff=0.0)[0]
