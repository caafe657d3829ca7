# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The doors, commands and packages of the annexes: the main house imports nothing of an option until a run uses it.

An annex is the folder of one option.  Its door is the module whose classes and functions the main house calls.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

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


class Command(NamedTuple):
    """One command: the module whose ``main`` runs the command, its purpose, and an example of its arguments.

    extra: the extra of setup.py that the command needs; None for a command that needs none.
    """

    module: str
    purpose: str
    example: str
    extra: str | None = "train"


OPTIONAL_COMMANDS = {
    "plan": Command(
        "instruments.plan.plan_command",
        "Show what a run will need on its GPUs, and how to launch it, before there is a GPU.",
        "recipe=qwen3_8b data.global_batch_size=64",
    ),
    "evaluate": Command(
        "instruments.evaluate.evaluate_command",
        "Evaluate a model on problems with answers, and compare two evaluations.",
        "--hf /models/Qwen3-8B --data test.jsonl --out results/before",
    ),
    "report": Command(
        "instruments.report.report_command",
        "Show runs in one HTML file: curves, differences, responses and events.",
        "runs/first runs/second -o comparison.html",
        extra="report",
    ),
    "explore": Command(
        "instruments.explorer.explore_command",
        "Write a page that shows the target of every token of a response.",
        '/models/Qwen3-8B --problem "What is 12 * 12?" --solution "12 * 12 = 144"',
    ),
    "convert": Command(
        "interop.convert_command",
        "Convert Hugging Face directories to Megatron checkpoints and back, and describe both.",
        "hf-to-megatron --hf /models/Qwen3-8B --out checkpoints/qwen3-8b",
    ),
    "solutions": Command(
        "methods.data_sets.solutions",
        "Sample solutions from a model, verify them, and write the best ones.",
        "--out own.jsonl --hf /models/Qwen3-8B data.path=problems.jsonl",
    ),
    "explanations": Command(
        "methods.data_sets.explanations",
        "Sample explanations of given solutions from a teacher that sees them, as data for a student.",
        "--out explained.jsonl recipe=rlt checkpoint.load=runs/rlt/checkpoints ..",
    ),
    "doctor": Command(
        "instruments.doctor.doctor_command",
        "Report what this node has and lacks, and let its GPUs verify what they compute.",
        "--ranks 8",
        extra=None,
    ),
    "serve": Command(
        "engines.vllm.server.serve",
        "Start a vLLM server for rollouts, where vLLM is installed.",
        "--hf-config /models/Qwen3-8B --max-model-len 4096",
        extra=None,  # beside vLLM the project is installed without its requirements
    ),
}
"""The name of a command of an option -> its `Command`; `cli.py` has the commands of the main house."""
OPTIONAL_PACKAGES = ("triton", "vllm")
"""The distributions that options import, whose versions a run records."""
