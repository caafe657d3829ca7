# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole runs with the output layer fused with the loss are the runs without."""

from __future__ import annotations

import pytest
import tiny_run
from tiny_run import overrides

from megatron_selfdistill.pipeline import schedule
from megatron_selfdistill.sources import learner_readings

# 20 tokens of a microbatch's 100 or so; rounding has moved no sampled token in these few steps
CHUNK_TOKENS = 20
FUSED = {
    mode: [f"loss.fused={mode}", f"loss.fused_chunk_tokens={CHUNK_TOKENS}"] for mode in ("keep_gradient", "low_memory")
}
TP2 = "parallel.tensor_model_parallel_size=2"


def start_counting(arguments: list[str]) -> tuple[int, int, int]:
    """Return the exit status, the number of projections of more than a chunk, and the number of scored responses."""
    projected: list[int] = []
    scored: list[int] = []
    project, read_tokens = schedule.project, learner_readings.read_tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "project", lambda *a: (projected.append(len(a[1])), project(*a))[1])
        counted = lambda a, *b: (scored.append(len(a)), read_tokens(a, *b))[1]  # noqa: E731
        patch.setattr(learner_readings, "read_tokens", counted)
        status = tiny_run.start(arguments)
    return status, sum(num_tokens > CHUNK_TOKENS for num_tokens in projected), sum(scored)


SCORING = [
    pytest.param(1, ["teacher.weights=ema"], id="ema"),
    pytest.param(2, ["teacher.weights=ema", TP2], id="ema, TP2", marks=pytest.mark.full),
    pytest.param(2, ["teacher.weights=current", TP2], id="current, TP2", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("world_size", "more"), SCORING)
def test_a_fused_run_never_projects_a_whole_microbatch_not_even_to_score_solutions(
    ranks, data, tmp_path, world_size, more
):
    own = ["method.name=own_solutions", "method.pick=learnable", "method.num_samples=6", "num_steps=1"]
    own += ["evaluation.verifier=tiny_run.starts_with_an_even_token", "checkpoint.save_every=0", *more]
    found = {}
    for mode, options in {"none": ["loss.fused=none"], "low_memory": FUSED["low_memory"]}.items():
        arguments = overrides(data, tmp_path / mode, *own, *options)
        found[mode] = ranks.run(start_counting, arguments, world_size=world_size, init_process_group=False)
    for (status, projected, scored), (fused_status, fused_projected, fused_scored) in zip(*found.values(), strict=True):
        assert status == fused_status == 0
        assert scored == fused_scored > 0 and projected > 0
        assert fused_projected == 0
