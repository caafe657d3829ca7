# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a step of a run does once, and how often it waits for the device."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import tiny_run
from tiny_run import overrides


def start_counting(arguments: Sequence[str], module: str, name: str, expected: int) -> int:
    """`tiny_run.start`, during which the function ``module.name`` must be called ``expected`` times."""
    owner, calls = importlib.import_module(module), []
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counted)
        status = tiny_run.start(arguments)
    assert len(calls) == expected
    return status


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_the_norm_of_the_gradient_is_taken_once_per_step(ranks, data, tmp_path, clip):
    arguments = overrides(data, tmp_path / "run", "num_steps=3", f"optimizer.clip_grad={clip}")
    counted = ("megatron.core.optimizer.optimizer", "get_grad_norm_fp32", 3)
    assert ranks.run(start_counting, arguments, *counted, world_size=1, init_process_group=False) == [0]
