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
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from megatron_selfdistill.config.methods import settings_class
from megatron_selfdistill.config.schema.field_checks import kinds_of
from megatron_selfdistill.config.schema.method_config import MethodSettings
from megatron_selfdistill.config.schema.whole_config import Config

_PACKAGE = Path(__file__).resolve().parents[1]

SHORT = {
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "ep": "parallel.expert_model_parallel_size",
    "lr": "optimizer.lr",
    "batch": "data.global_batch_size",
    "steps": "num_steps",
    "logger": "metrics.loggers",
}
"""The short name of a key on a command line -> the key."""


def config_dir() -> Path:
    """Return the directory with the hydra configs that the project ships, as an absolute path.

    The directory is ``<package>/configs`` in a wheel (``setup.py`` copies the files) and ``<repository>/configs`` in a
    checkout or an editable install.  The configs of a lab are found by hydra's search path, not here.
    """
    in_wheel = _PACKAGE / "configs"
    return in_wheel if in_wheel.is_dir() else _PACKAGE.parent / "configs"


class Key(NamedTuple):
    """What the schema says of one key."""

    default: Any
    doc: str
    """The documentation."""
    kind: Any
    """The type, with the range that it declares."""


@functools.cache
def keys(cls: type = Config, prefix: str = "") -> Mapping[str, Key]:
    """Return every key, depth first; ``prefix`` stands before each key.

    Of the section of the method, only the name is a key; `method_keys` has the settings of a method.
    """
    out: dict[str, Key] = {}
    for f in dataclasses.fields(cls):
        section = kinds_of(cls)[f.name]
        if dataclasses.is_dataclass(section):
            out |= keys(section, f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            out[prefix + f.name] = Key(default, field_docs(cls).get(f.name, ""), section)
    return out


def sections(cls: type = Config, prefix: str = "") -> dict[str, type]:
    """Return the name of every section -> its dataclass, depth first; the keys of no section have the name ""."""
    found: dict[str, type] = {prefix.rstrip("."): cls}
    for name, kind in kinds_of(cls).items():
        if dataclasses.is_dataclass(kind):
            found |= sections(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
    return found


def method_keys(name: str) -> dict[str, Key]:
    """Return every key of the method ``name``, ``method.name`` first.

    Raises: `ConfigError` where there is no such method.
    """
    found = keys(settings_class(name), "method.")  # type: ignore[arg-type]
    return {**found, "method.name": found["method.name"]._replace(default=name)}


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


def groups() -> dict[str, list[str]]:
    """Return group -> options of the configs that the project ships."""
    return {
        directory.name: sorted(file.stem for file in directory.glob("*.yaml"))
        for directory in sorted(config_dir().iterdir())
        if directory.is_dir()
    }


def long_names(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a command line with `SHORT` names replaced by those of the keys.

    ``logger=wandb`` is a list of one.
    """
    overrides = [re.sub(r"^logger=([\w.]+)$", r"logger=[\1]", override) for override in overrides]
    return [re.sub("^[a-z]+(?==)", lambda name: SHORT.get(name[0], name[0]), override) for override in overrides]


def is_key(key: str, known: Mapping[str, Key]) -> bool:
    """Return whether ``key`` is one of ``known``, a section of them, or an entry of a mapping or a list of theirs."""
    parents = (key.rsplit(".", number)[0] for number in range(1, key.count(".") + 1))
    in_mapping = any(isinstance(known[name].default, dict) for name in parents if name in known)
    return key in known or key in sections() or in_mapping


def unknown_key(key: str, method: str = MethodSettings.name) -> str | None:
    """Return a message that names the key nearest to ``key``, or None if ``key`` exists for the method ``method``.

    A key with the same last part in another section is nearer than one of a similar spelling.
    """
    key = key.split("[")[0]  # an element of a list
    known = {**keys(), **method_keys(method)}
    if not key or is_key(key, known):
        return None
    same_last = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    names = [*known] if "." in key else [*known, *filter(None, sections()), *groups()]
    near = difflib.get_close_matches(key, same_last or names, n=1, cutoff=0.0)[0]
    listing = f"selfdistill --keys method={method}" if key.startswith("method.") else "selfdistill --keys"
    return f"unknown configuration key {key!r}; did you mean {near!r}? (`{listing}` lists all)"
