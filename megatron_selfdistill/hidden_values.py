# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The values of environment variables that a configuration has read: no message, log or file may show them."""

from __future__ import annotations

import os

SHORTEST_HIDDEN = 6
"""Characters of the shortest value that is hidden: shorter values are numbers and names that occur everywhere."""

_values: dict[str, str] = {}  # the name of every hidden variable -> its value, in this process


def hide(name: str, value: str) -> None:
    """Let `hidden` replace the ``value`` of the environment variable ``name`` from now on, in this process."""
    _values[name] = value


def hidden(text: str) -> str:
    """Return ``text`` with each value that `hide` was given replaced by ``${oc.env:NAME}``.

    Values of less than `SHORTEST_HIDDEN` characters stay, and so do the paths of files that exist: a command that a
    message shows can then be pasted.
    """
    for name, value in sorted(_values.items(), key=lambda item: (-len(item[1]), item[0])):
        is_a_place = os.path.isabs(value) and os.path.exists(value)
        if len(value) >= SHORTEST_HIDDEN and not is_a_place:
            for spelling in dict.fromkeys((value, repr(value)[1:-1])):
                text = text.replace(spelling, f"${{oc.env:{name}}}")
    return text
