# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The doors of the annexes: the main house imports nothing of an option until a run uses the option.

An annex is the folder of one option.  Its door is the class or the function that the main house calls.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

DOORS = {"teachers": "teachers.configured_teachers:ConfiguredTeachers"}
"""The name of an option -> the module and the name of its door, within the package."""


def door(option: str) -> Any:
    """Import the annex of ``option``, and return its door."""
    module, name = DOORS[option].split(":")
    return getattr(import_module(f"megatron_selfdistill.{module}"), name)
