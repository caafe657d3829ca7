# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The functions of users that keys name by a dotted path."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from megatron_selfdistill.errors import ConfigError


def function_named(key: str, name: str, built_in: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Return the function ``name`` of ``built_in``, or import the function with the dotted path ``name``.

    ``key`` is the key of the configuration with the value ``name``, for messages.

    Raises: `ConfigError` if there is no such function.
    """
    if name in built_in:
        return built_in[name]
    choices = f"{', '.join(built_in)} or " if built_in else ""
    expected = f"{key} must be {choices}the dotted path of a function (package.module.function), got {name!r}"
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise ConfigError(expected)
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise ConfigError(
            f"{expected}; {module_name} cannot be imported: {error}; put its directory on PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"{expected}; {error}") from error
    if not callable(function):
        raise ConfigError(f"{expected}, which is a {type(function).__name__}")
    return function
