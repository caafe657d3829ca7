# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The registry of methods: the one place where the core finds the class that ``method.name`` names.

A file of the package ``methods`` is a method of the project: its class, or where it has none the default method with
the values of a recipe.  A dotted path is a class of the user.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_selfdistill.config.functions import imported
from megatron_selfdistill.config.schema.field_checks import require
from megatron_selfdistill.config.schema.method_config import MethodSettings
from megatron_selfdistill.config.schema.ranges import is_dotted
from megatron_selfdistill.errors import ConfigError, first_few

_PACKAGE = "megatron_selfdistill.methods"


def method_names() -> list[str]:
    """Return the names of the project's methods."""
    files = (Path(__file__).resolve().parents[1] / "methods").glob("*.py")
    return sorted(file.stem for file in files if file.stem != "__init__")


@functools.cache
def method_class(name: str) -> type[Any]:
    """Return the class of the method ``name``, with its ``Settings``.

    Raises: `ConfigError` where there is no such method, or the class has no settings.
    """
    if is_dotted(name):
        found = imported("method.name", name, "class")
        settings: Any = getattr(found, "Settings", None)
        require(
            isinstance(found, type) and isinstance(settings, type) and issubclass(settings, MethodSettings),
            f"method.name={name} must be a class with an attribute Settings, a subclass of MethodSettings in "
            "megatron_selfdistill.config",
        )
        require(hasattr(found, "made"), f"method.name={name} must be a class with a class method made(settings, tools)")
        return found  # type: ignore[no-any-return]
    if name not in method_names():
        raise ConfigError(
            f"method.name must be one of {', '.join(method_names())} or the dotted path of a class of yours "
            f"(package.module.Class), got {name!r}"
        )
    module = importlib.import_module(f"{_PACKAGE}.{name}")
    own = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    return next((value for value in own if "Settings" in dir(value)), None) or method_class("default")


def settings_class(name: str) -> type[MethodSettings]:
    """Return the class of the settings of the method ``name``.  Raises: `ConfigError`, as `method_class`."""
    found: type[MethodSettings] = method_class(name).Settings
    return found


def settings_of(section: Mapping[str, Any]) -> MethodSettings:
    """Return the settings of a section ``method`` of plain values; keys that are missing have their defaults.

    Raises: `ConfigError` for an unknown method, key or value.
    """
    kind = settings_class(str(section.get("name", MethodSettings.name)))
    known = {name: value for name, value in section.items() if name in kind.__dataclass_fields__}
    unknown = sorted(set(section) - set(known))
    require(not unknown, f"unknown keys of method.name={section.get('name')}: {first_few(unknown, ', ')}")
    return kind(**known)
