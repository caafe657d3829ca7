# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The values that a run uses, but never writes or prints: what ``${oc.env:NAME}`` reads, and secrets."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.resolvers import oc

from megatron_selfdistill.terminal import hidden, hide

_SECRET = re.compile(
    r"(?:^|[._])(?:api_?key|access_key|secret_key|secret|password|passwd|(?:hf|api|auth|access|bearer)_token)$",
    re.IGNORECASE,
)


def is_secret(key: str) -> bool:
    """Return whether the value of ``key`` is a secret: an item of a free-form key with the name of a secret.

    Such names are ``environment.options.api_key`` and ``rollout.server_env.HF_TOKEN``.
    """
    return _SECRET.search(key) is not None


def variable_for(key: str) -> str:
    """Return the environment variable that stands for the secret ``key`` in outputs: ENVIRONMENT_OPTIONS_API_KEY."""
    return re.sub(r"\W", "_", key).upper()


def shown_value(key: str) -> str:
    """Return what outputs show in place of a secret, such as ``${oc.env:ENVIRONMENT_OPTIONS_API_KEY}``."""
    return f"${{oc.env:{variable_for(key)}}}"


def is_written_out(key: str, value: object) -> bool:
    """Return whether ``value`` of ``key`` is a secret as text, and not null or a reference to a variable."""
    return is_secret(key) and isinstance(value, str) and value not in ("", "null", "???") and "${" not in value


def shown_argument(argument: str) -> str:
    """Return an argument of a command line as outputs show it: a secret is replaced by `shown_value`."""
    name, _, value = argument.partition("=")
    key = name.lstrip("+")
    return f"{name}={shown_value(key)}" if is_written_out(key, value) else hidden(argument)


Place = tuple[Any, ...]
"""The place of a value in the configuration, such as ``("rollout", "engine_args", "hf_token")``."""


@dataclass(frozen=True)
class FromEnvironment:
    """One value of the configuration whose interpolation reads environment variables, or a secret as text."""

    interpolation: str
    """The interpolation in the configuration, such as ``Bearer ${oc.env:TOKEN}``; for a secret, its `shown_value`."""
    value: Any = field(repr=False)
    """The value to which the interpolation was resolved, or the secret."""
    is_written_out: bool = False
    """Whether the configuration has the value as text, so that the interpolation is only what outputs show."""


def environment_values(config: DictConfig | ListConfig, place: Place = ()) -> dict[Place, FromEnvironment]:
    """Return every value of ``config`` whose resolution reads an environment variable, and every secret as text.

    ``config`` is not resolved yet.  A value may read a variable through other keys.  A default, as in
    ``${oc.env:NAME,default}``, makes no difference.  Every variable that is read, and every secret, is hidden from then
    on (`terminal.hidden`).

    Raises: the error of omegaconf for a value that cannot be resolved.
    """
    return _values_of(config, OmegaConf.to_container(config, resolve=False), place)


def _values_of(config: DictConfig | ListConfig, written: Any, place: Place) -> dict[Place, FromEnvironment]:
    """Return the `environment_values` of ``config``, whose plain values without resolution are ``written``."""
    found: dict[Place, FromEnvironment] = {}
    for key, plain in written.items() if isinstance(written, dict) else enumerate(written):
        here = (*place, key)
        name = ".".join(map(str, here))
        if isinstance(plain, dict | list):
            found |= _values_of(config[key], plain, here)
        elif isinstance(plain, str) and "${" in plain and OmegaConf.is_interpolation(config, key):
            with _noticing() as names:
                value = config[key]
            if names or is_secret(name):  # which may refer to a secret that another key writes out
                value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
                found[here] = FromEnvironment(plain, value)
        elif is_written_out(name, plain):
            hide(variable_for(name), plain)
            found[here] = FromEnvironment(shown_value(name), plain, is_written_out=True)
    return found


def as_written(values: dict[str, Any], environment: Mapping[Place, FromEnvironment]) -> dict[str, Any]:
    """Return the nested ``values``, changed in place, with each value of ``environment`` replaced by its interpolation.

    A value that was replaced after the interpolation had been resolved stays as it is.
    """
    for place, found in environment.items():
        *parents, last = place
        node: Any = values
        with contextlib.suppress(KeyError, IndexError, TypeError):  # the section may have been replaced, too
            for part in parents:
                node = node[part]
            if node[last] == found.value:
                node[last] = found.interpolation
    return values


@contextlib.contextmanager
def _noticing() -> Iterator[list[str]]:
    """Yield a list to which each variable that ``oc.env`` reads in the meantime is added, set or not."""
    names: list[str] = []

    def env(name: str, *default: Any) -> Any:
        names.append(name)
        if name in os.environ:
            hide(name, os.environ[name])
        return oc.env(name, *default)

    OmegaConf.register_new_resolver("oc.env", env, replace=True)
    try:
        yield names
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
