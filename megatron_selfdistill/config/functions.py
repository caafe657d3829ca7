# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Functions of the user's that a key names by their dotted path."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from megatron_selfdistill.errors import ConfigError


def function_named(key: str, name: str, built_in: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """One of ``built_in``, or the function at ``package.module.function``; its module is imported.

    Raises: `ConfigError` in one sentence, beginning with ``key``, if there is no such function.
    """
    if name in built_in:
        return built_in[name]
    choices = f"{', '.join(built_in)} or " if built_in else ""
    expected = f"{key} must be {choices}the dotted path of a function (package.module.function), got {name!r}"
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise ConfigError(expected)
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise ConfigError(
            f"{expected}; {module_name} cannot be imported: {error}; put its folder on PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"{expected}; {error}") from error
    if not callable(function):
        raise ConfigError(f"{expected}, which is a {type(function).__name__}")
    return function
