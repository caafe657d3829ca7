# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Values that ``${oc.env:NAME}`` reads from the environment: a run uses them, but never writes or prints them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.resolvers import oc

SHORTEST_HIDDEN = 6
"""Shorter values are not hidden in messages: they are numbers and names that occur everywhere."""

Place = tuple[Any, ...]
"""Where a value is in the configuration: ``("rollout", "engine_args", "hf_token")``, ``("rollout", "servers", 0)``."""

_read: dict[str, str] = {}  # every variable that an interpolation has read in this process, with its value


@dataclass(frozen=True)
class FromEnvironment:
    """One value of the configuration whose interpolation reads environment variables."""

    written: str
    """The interpolation as it was written, such as ``Bearer ${oc.env:TOKEN}``."""
    value: Any = field(repr=False)
    """What the interpolation resolved to."""


def environment_values(config: DictConfig | ListConfig, place: Place = ()) -> dict[Place, FromEnvironment]:
    """Return every value of ``config`` whose resolution reads an environment variable, also through other keys.

    ``config`` is not resolved yet.  A default, as in ``${oc.env:NAME,default}``, makes no difference.  Every variable
    that is read is hidden from then on (`hidden`).  Raises the error of omegaconf for a value that cannot be resolved.
    """
    found: dict[Place, FromEnvironment] = {}
    written: Any = OmegaConf.to_container(config, resolve=False)
    keys: Iterable[Any] = config if isinstance(config, DictConfig) else range(len(config))
    for key in keys:
        here = (*place, key)
        if OmegaConf.is_interpolation(config, key):
            with _noticing() as names:
                value = config[key]
            if names:
                plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
                found[here] = FromEnvironment(str(written[key]), plain)
        elif not OmegaConf.is_missing(config, key) and OmegaConf.is_config(config[key]):
            found |= environment_values(config[key], here)
    return found


def as_written(values: dict[str, Any], environment: Mapping[Place, FromEnvironment]) -> dict[str, Any]:
    """Return the nested ``values``, changed in place, with each value of ``environment`` replaced by its interpolation.

    A value that somebody has replaced since the interpolation was resolved stays as it is.
    """
    for place, found in environment.items():
        *parents, last = place
        node: Any = values
        with contextlib.suppress(KeyError, IndexError, TypeError):  # the section may have been replaced, too
            for part in parents:
                node = node[part]
            if node[last] == found.value:
                node[last] = found.written
    return values


def hidden(text: str) -> str:
    """Return ``text`` with the values of all variables that interpolations have read replaced by ``${oc.env:NAME}``.

    Values of less than `SHORTEST_HIDDEN` characters stay, and so do paths that exist: a command that a message shows
    can then be pasted.
    """
    for name, value in sorted(_read.items(), key=lambda item: (-len(item[1]), item[0])):
        is_a_place = os.path.isabs(value) and os.path.exists(value)
        if len(value) >= SHORTEST_HIDDEN and not is_a_place:
            for spelling in dict.fromkeys((value, repr(value)[1:-1])):
                text = text.replace(spelling, f"${{oc.env:{name}}}")
    return text


@contextlib.contextmanager
def _noticing() -> Iterator[list[str]]:
    """Yield a list to which each variable that ``oc.env`` reads in the meantime is added, set or not."""
    names: list[str] = []

    def env(name: str, *default: Any) -> Any:
        names.append(name)
        if name in os.environ:
            _read[name] = os.environ[name]
        return oc.env(name, *default)

    OmegaConf.register_new_resolver("oc.env", env, replace=True)
    try:
        yield names
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
