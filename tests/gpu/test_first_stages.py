# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The first stages of ``make test-gpu`` can fail: a wrong gradient, a stale engine and a slow loss are failures."""

from __future__ import annotations

import json
import os
import subprocess

import fused_layer
import pytest

from tests.gpu import cases, colocated_stage, fused_stage, launch, layout_stage, speed_stage, stages


@pytest.mark.parametrize("mode", ["keep_gradient", "low_memory"])
@pytest.mark.parametrize(("changed", "failed"), [(None, []), (1, ["dgrad"]), (2, ["wgrad"])])
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


def test_a_launched_run_sees_the_packages_of_pythonpath(monkeypatch):
    seen = {}

    def completed(command, env, **options):
        seen.update(env)
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setenv("PYTHONPATH", "/packages")
    monkeypatch.setattr(launch.subprocess, "run", completed)
    launch.launched(["script.py"], 1)
    assert seen["PYTHONPATH"].split(os.pathsep)[-1] == "/packages"


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


def test_a_loss_that_is_slower_than_a_small_multiple_of_its_reads_fails(monkeypatch):
    monkeypatch.setattr(speed_stage, "LOSS_SHAPE", (2, 64))
    monkeypatch.setattr(speed_stage, "MOST_OF_FLOOR", 8.0)
    monkeypatch.setattr(speed_stage, "copied_per_second", lambda: 7 * 2 * 64 * 2 / 1.0)
    for seconds, passes in ((7.9, True), (8.1, False)):
        monkeypatch.setattr(speed_stage, "seconds", lambda work, seconds=seconds: work() or seconds)
        assert speed_stage.speed_of_loss().passed is passes


def test_the_checks_of_the_engines_are_those_of_the_stage():
    assert tuple(colocated_stage.CHECKS.values()) == stages.COLOCATED


def test_a_case_whose_kernels_are_not_there_says_which_they_are(monkeypatch):
    nets = cases.AS_A_RUN["flash-linear-attention, gated delta nets"]
    monkeypatch.setattr(layout_stage, "ON_GPU", False)
    assert layout_stage.lacking(nets) == "the kernels of fla need an NVIDIA GPU, and this is a CPU"
    monkeypatch.setattr(layout_stage, "ON_GPU", True)
    monkeypatch.setattr(layout_stage, "is_installed", lambda module: module == cases.TE)
    assert layout_stage.lacking(nets) == "this environment has no fla"
    assert (
        layout_stage.lacking(cases.AS_A_RUN["bf16"]) == layout_stage.lacking(cases.AS_A_RUN["Transformer Engine"]) == ""
    )


def test_a_case_with_transformer_engine_is_none_without_its_layers(monkeypatch):
    """The rank refuses to report Megatron's local layers as those of Transformer Engine."""
    from tests.gpu import layout_rank

    monkeypatch.setattr("megatron_selfdistill.model.architecture.uses_transformer_engine", lambda: False)
    with pytest.raises(RuntimeError, match="expected Transformer Engine's layers"):
        layout_rank.refuse_local_layers(cases.AS_A_RUN["Transformer Engine"])
    layout_rank.refuse_local_layers(cases.AS_A_RUN["bf16"])
