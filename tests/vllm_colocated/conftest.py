# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The real vLLM in the trainer's own processes: ``make test-vllm`` runs these where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs vLLM in this environment: make test-vllm"))
