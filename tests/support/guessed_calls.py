# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A format of calls that a model without training writes by chance."""

from __future__ import annotations

from megatron_selfdistill.environments.tool_calls import ToolCall


def guessed(response: str) -> list[ToolCall]:
    """Return a guess of a digit, which an even first character decides; no call for an odd one and without one."""
    code = ord(response[0]) if response else 1
    return [] if code % 2 else [ToolCall("guess", {"digit": code % 10})]
