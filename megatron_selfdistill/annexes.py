# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The doors of the annexes: the main house imports nothing of an option until a run uses the option.

An annex is the folder of one option.  Its door is the module whose classes and functions the main house calls.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

DOORS = {
    "adapters": "adapters.configured_adapters",
    "architectures": "architectures.configured_layers",
    "chat_logs": "chat_logs.configured_logs",
    "environments": "environments.configured_episodes",
    "kernels": "kernels.triton_backend",
    "hugging_face": "interop.hf_files",
    "interop": "interop.foreign_models",
    "guidance": "guidance.configured_guidance",
    "logged_responses": "chat_logs.logged_responses",
    "overlap": "overlap.ahead",
    "explorer": "instruments.explorer.explored",
    "plan": "instruments.plan.plan_command",
    "report": "instruments.report.report_command",
    "teachers": "teachers.configured_teachers",
    "teachers_config": "teachers.teachers_config",
    "taught_records": "teachers.taught_records",
    "vllm": "engines.vllm.configured_sampler",
}
"""The name of an option, or of a part of it -> the module of the package that is its door."""


def door(option: str) -> Any:
    """Import the annex of ``option``, and return the module that is its door."""
    return import_module(f"megatron_selfdistill.{DOORS[option]}")
