# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The checks that the sections of the schema share; each check raises `ConfigError` and names the key."""

from __future__ import annotations

import difflib
import math
import os
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from megatron_selfdistill.errors import ConfigError

PATHS = frozenset(
    "run_dir data.path data.tokenizer data.chat_template checkpoint.load adapter.load adapter.base "
    "evaluation.path rollout.hf_config rollout.server_python rollout.transfer_dir rollout.replay rollout.record".split()
)
"""The keys whose values are paths: a leading ``~`` in such a value stands for the user's home directory."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def normalise(section: str, values: Any) -> None:
    """Change the values of a section in place: an empty text becomes null, and ``~`` in a path the home directory.

    ``values`` is the section's frozen dataclass, and ``section`` its name, "" for the keys that belong to no section.

    Raises: `ConfigError` for a number that is not finite.
    """
    for field in fields(values):
        key, value = f"{section}.{field.name}".lstrip("."), getattr(values, field.name)
        if value == "" and field.type == "str | None":
            object.__setattr__(values, field.name, None)
        elif key in PATHS and isinstance(value, str):
            object.__setattr__(values, field.name, os.path.expanduser(value))
        _require_finite(key, value)


def at_least(least: float, section: str, values: Any, names: str) -> None:
    """Raise `ConfigError` unless each of the section's fields in ``names`` is null or at least ``least``.

    ``names`` separates the fields by spaces.
    """
    for name in names.split():
        value = getattr(values, name)
        require(value is None or value >= least, f"{section}.{name} must be at least {least}, got {value}")


def one_of(key: str, value: Any, choices: Sequence[str]) -> None:
    """Raise `ConfigError`, which lists the choices and names the nearest one, unless ``value`` is a choice."""
    spelt = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(str(value).lower(), spelt, n=1)
    hint = f"; did you mean {spelt[near[0]]!r}?" if near else ""
    require(value in choices, f"{key} must be one of {', '.join(choices)}, got {value!r}{hint}")


def is_dotted(value: str) -> bool:
    """Return whether ``value`` has the form of a dotted path, package.module.function."""
    parts = value.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def one_of_or_dotted(key: str, value: str, choices: Sequence[str]) -> None:
    """Raise `ConfigError`, as `one_of` does, unless ``value`` is a choice or has the form of a dotted path."""
    if not is_dotted(value):
        one_of(key, value, (*choices, "a dotted path (package.module.function)"))


def require_address(key: str, address: str, example: str) -> None:
    """Raise `ConfigError`, without a password, unless ``address`` is one of http or https that names no user."""
    shown = re.sub(r"^(\w+://)?[^/]*@", r"\1***@", address)
    try:
        place = urllib.parse.urlsplit(address)
        good = place.scheme in ("http", "https") and bool(place.hostname) and place.port != 0
        good = good and not (place.query or place.fragment)  # requests add their own path at the end
    except ValueError:  # half of an IPv6 address, or a port out of range
        good = False
    require(good, f"{key} must be an address such as {example}, got {shown!r}")
    require(
        "@" not in place.netloc,
        f"{key} must be an address without a user and a password, since no request would send them and the files of "
        f"the run would show them, got {shown!r}: remove the part before the host",
    )


def _require_finite(key: str, value: Any) -> None:
    if isinstance(value, dict):
        for name, entry in value.items():
            _require_finite(f"{key}.{name}", entry)
    elif isinstance(value, list):
        for entry in value:
            _require_finite(key, entry)
    require(not isinstance(value, float) or math.isfinite(value), f"{key} must be a finite number, got {value}")
