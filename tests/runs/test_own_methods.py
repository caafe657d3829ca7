# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A method of the user trains and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_run import assert_resumes_equal, overrides, reproducible_metrics, start, train

MODULE = '''
from dataclasses import dataclass

from megatron_selfdistill.methods.default import DefaultSettings, SelfDistillation
from megatron_selfdistill.methods.parts.terms import uniform


@dataclass(frozen=True)
class MySettings(DefaultSettings):
    """The settings of my method."""

    share: float = 1.0
    """Weight of the divergence."""


class MyMethod(SelfDistillation):
    """The divergence with a weight of its own."""

    Settings = MySettings
    weighs_tokens = True

    def terms(self, step, rollouts, signals):
        return uniform(signals, weight=self.settings.share, signal="full")
'''


def start_with_path(arguments: list[str], directory: str) -> int:
    """Call `tiny_run.start` with ``directory`` on the path of imports, as PYTHONPATH puts it there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        return start(arguments)


def test_a_method_of_the_user_trains_and_resumes_with_a_setting_of_its_own(ranks, data, tmp_path):
    (tmp_path / "my_module.py").write_text(MODULE)
    options: dict[str, Any] = {"start": start_with_path, "directory": str(tmp_path)}

    def arguments(run_dir: Path, share: float = 0.5) -> list[str]:
        own = ["method.name=my_module.MyMethod", f"method.share={share}", "num_steps=2", "checkpoint.save_every=1"]
        return overrides(data, run_dir, *own, "optimizer.clip_grad=0")

    train(ranks, arguments(tmp_path / "one", 1.0), **options)
    train(ranks, arguments(tmp_path / "half"), **options)
    one, half = (reproducible_metrics(tmp_path / name)[0] for name in ("one", "half"))
    assert half["gradient_norm"] == pytest.approx(one["gradient_norm"] / 2, rel=1e-4) != 0
    assert_resumes_equal(ranks, tmp_path / "half", arguments, step=1, num_steps=2, **options)
