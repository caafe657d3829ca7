# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The checks that every section of the configuration makes of its own fields."""

from __future__ import annotations

import functools
import os
from dataclasses import fields
from typing import Any, get_type_hints

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
    kinds = kinds_of(values.__class__)
    for field in fields(values):
        kind, value = kinds[field.name], getattr(values, field.name)
        plain, ranges, nullable = taken_apart(kind)
        if value == "" and plain is str and nullable:
            object.__setattr__(values, field.name, value := None)
        elif isinstance(value, str) and any(isinstance(one, AnyText) and one.is_path for one in ranges):
            object.__setattr__(values, field.name, value := os.path.expanduser(value))
        require_range(f"{section}.{field.name}".lstrip("."), kind, value)


@functools.cache
def kinds_of(cls: type) -> dict[str, Any]:
    """Return the type of each field of a section, with the ranges that it declares."""
    return get_type_hints(cls, include_extras=True)
