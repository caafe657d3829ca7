# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The keys whose values are secrets, which no output shows, although a user has written them out."""

from __future__ import annotations

import re

from megatron_selfdistill.hidden_values import hidden

_SECRET = re.compile(
    r"(?:^|[._])(?:api_?key|access_key|secret_key|secret|password|passwd|(?:hf|api|auth|access|bearer)_token)$",
    re.IGNORECASE,
)


def is_secret(key: str) -> bool:
    """Return whether the value of ``key`` is a secret: environment.api_key, or an item of a free-form key.

    An item is a secret by its name, such as ``environment.options.password`` or ``rollout.server_env.HF_TOKEN``.
    """
    return _SECRET.search(key) is not None


def variable_for(key: str) -> str:
    """Return the environment variable that stands for the secret ``key`` in outputs: ENVIRONMENT_API_KEY."""
    return re.sub(r"\W", "_", key).upper()


def shown_value(key: str) -> str:
    """Return what outputs show in place of a secret: ``${oc.env:ENVIRONMENT_API_KEY}`` for environment.api_key."""
    return f"${{oc.env:{variable_for(key)}}}"


def is_written_out(key: str, value: object) -> bool:
    """Return whether ``value`` of ``key`` is a secret as text, and not null or a reference to a variable."""
    return is_secret(key) and isinstance(value, str) and value not in ("", "null", "???") and "${" not in value


def shown_argument(argument: str) -> str:
    """Return an argument of a command line as outputs show it: a secret is replaced by `shown_value`."""
    name, _, value = argument.partition("=")
    key = name.lstrip("+")
    return f"{name}={shown_value(key)}" if is_written_out(key, value) else hidden(argument)
