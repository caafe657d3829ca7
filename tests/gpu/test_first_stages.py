# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The first stages of ``make test-gpu`` can fail: a wrong gradient and a stale engine are failures."""

from __future__ import annotations

import json

import fused_layer
import pytest

from tests.gpu import colocated_stage, fused_stage


@pytest.mark.parametrize("mode", ["keep_gradient", pytest.param("low_memory", marks=pytest.mark.full)])
@pytest.mark.parametrize(("changed", "failed"), [(1, ["dgrad"]), pytest.param(None, [], marks=pytest.mark.full)])
def test_a_gradient_of_the_fused_layer_that_is_off_by_a_hundredth_fails(monkeypatch, mode, changed, failed):
    exact = fused_layer.fused

    def off(*arguments, **options):
        found = list(exact(*arguments, **options))
        if changed is not None:
            found[changed] = found[changed] * 1.01
        return found

    monkeypatch.setattr(fused_layer, "fused", off)
    figures = fused_stage.compared(mode).figures
    wrong = [figure.name for figure in figures if not figure.passed and figure.name.startswith("float32")]
    assert wrong == [f"float32: {name}, relative" for name in failed]


def test_an_engine_without_the_new_weights_or_a_run_that_stops_early_fails(tmp_path):
    def agreement(*differences: float) -> bool:
        (tmp_path / "metrics.jsonl").write_text(
            "".join(
                json.dumps({"step": step, "sampler/log_prob_mean_abs_diff": off}) + "\n"
                for step, off in enumerate(differences, 1)
            )
        )
        return colocated_stage.agreement(tmp_path, 3, bound=0.1).passed

    assert agreement(0.01, 0.02, 0.01)
    assert not agreement(0.01, 0.02, 0.4)
    assert not agreement(0.01, 0.02)
    assert not agreement()
