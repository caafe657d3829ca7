# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The checks that every section of the configuration makes of its own fields."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, get_type_hints

from megatron_selfdistill.config.schema.ranges import AnyText, faults, taken_apart
from megatron_selfdistill.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def require_range(key: str, kind: Any, value: Any) -> None:
    """Raise `ConfigError` unless ``value`` lies in the range that the type ``kind`` declares."""
    for message in faults(key, kind, value):
        raise ConfigError(message)


def check_fields(section: str, values: Any) -> None:
    """Change the values of a section in place, and require that each lies in the range that its field declares.

    An empty text becomes null if the field accepts null, and ``~`` in a path the home directory.  ``values`` is the
    section's frozen dataclass, and ``section`` its name, "" for the keys that belong to no section.

    Raises: `ConfigError` for a value outside of its range.
    """
    for field in fields(values):
        kind, value = kinds_of(values.__class__)[field.name], getattr(values, field.name)
        plain, ranges, nullable = taken_apart(kind)
        if value == "" and plain is str and nullable:
            object.__setattr__(values, field.name, value := None)
        elif isinstance(value, str) and any(isinstance(one, AnyText) and one.is_path for one in ranges):
            object.__setattr__(values, field.name, value := os.path.expanduser(value))
        require_range(f"{section}.{field.name}".lstrip("."), kind, value)


class Part:
    """A section of the configuration, which checks its own keys, and itself against the other sections."""

    _section: ClassVar[str]
    free: ClassVar[Sequence[str]]
    """The keys and items that decide where, how fast and how long a run trains: a resumed run may change them."""
    fixed: ClassVar[Sequence[str]]
    """The keys that decide the form of a checkpoint: not even checkpoint.resume=force changes them within a run."""
    frees: ClassVar[Mapping[str, str]] = {}
    """A key -> a key of another section that decides nothing where the first one is set."""
    binds: ClassVar[Mapping[str, str]] = {}
    """A key -> a section, or the rule of some keys, which decides what is learned if the key is not at its default."""

    def __init_subclass__(cls, section: str, free: str = "", fixed: str = "") -> None:
        """Remember the name of the ``section``, with which its keys begin; in ``free``, ``*`` stands for all keys."""
        cls._section = section
        cls.free, cls.fixed = ([f"{section}.{key}".removesuffix(".*") for key in it.split()] for it in (free, fixed))

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a value outside of its range."""
        check_fields(self._section, self)

    def check(self, config: Any) -> None:
        """Raise `ConfigError` where other sections of the `Config` ``config`` contradict this section."""


_SLOT = re.compile(r"(?<!\{)\{([A-Za-z_]\w*)\}(?!\})")


def require_slots(key: str, template: str | None, needed: Sequence[str], allowed: Sequence[str] = ()) -> None:
    """Raise `ConfigError` unless ``template`` is null, or has the slots ``needed`` and no others than ``allowed``."""
    found = set(_SLOT.findall(template or ""))
    may = f", and may have {_shown_slots(allowed)}" if allowed else " and no others"
    require(
        template is None or set(needed) <= found <= {*needed, *allowed},
        f"{key} must have the slots {_shown_slots(needed)}{may}, got {_shown_slots(sorted(found))}; write {{{{name}}}} "
        "for literal braces",
    )


def _shown_slots(slots: Sequence[str]) -> str:
    return ", ".join(f"{{{slot}}}" for slot in slots) or "none"


def require_address(key: str, address: str, example: str) -> None:
    """Raise `ConfigError`, without a password, unless ``address`` is one of http or https that names no user."""
    shown = re.sub(r"^(\w+://)?[^/]*@", r"\1***@", re.sub(r"[?#].*", "?***", address))
    require(
        re.fullmatch(r"https?://[^/@?#\s]+(/[^@?#\s]*)?", address) is not None,
        f"{key} must be an address such as {example}, without a user and a password, which the files of the run would "
        f"show, and without ? and #, got {shown!r}",
    )


@functools.cache
def kinds_of(cls: type) -> dict[str, Any]:
    """Return the type of each field of a section, with the ranges that it declares."""
    return get_type_hints(cls, include_extras=True)
