# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole runs with the output layer fused with the loss hold no logits of a whole microbatch."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_run
from tiers import combinations

CHUNK_TOKENS = 20  # of a microbatch's 100 or so
FUSED = ["loss.fused=low_memory", f"loss.fused_chunk_tokens={CHUNK_TOKENS}"]
TP2 = "parallel.tensor_model_parallel_size=2"


def start_counting(arguments: list[str]) -> tuple[int, int, int]:
    """Return the exit status, the number of projections of more than a chunk, and the number of scored responses."""
    from megatron_selfdistill.pipeline import schedule
    from megatron_selfdistill.sources import learner_readings

    projected, scored = list[int](), list[int]()

    def noted(sizes: list[int], original: Any, place: int) -> Any:
        return lambda *given: (sizes.append(len(given[place])), original(*given))[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "project", noted(projected, schedule.project, 1))
        patch.setattr(learner_readings, "read_tokens", noted(scored, learner_readings.read_tokens, 0))
        status = tiny_run.start(arguments)
    return status, sum(num_tokens > CHUNK_TOKENS for num_tokens in projected), sum(scored)


EMA = "teacher.weights=ema"
CASES = {"ema": [EMA, *FUSED], "ema, not fused": [EMA, "loss.fused=none"], "ema, TP2": [EMA, *FUSED, TP2]}
CASES |= {"current, TP2": ["teacher.weights=current", *FUSED, TP2]}


@combinations(more=CASES, quick={"more": ["ema"]})
def test_a_fused_run_alone_never_projects_a_whole_microbatch_not_even_to_score_solutions(ranks, data, tmp_path, more):
    own = ["method.name=own_solutions", "method.pick=learnable", "method.num_samples=6", "num_steps=1"]
    own += ["evaluation.verifier=tiny_run.starts_with_an_even_token", "checkpoint.save_every=0", *more]
    arguments = tiny_run.overrides(data, tmp_path / "run", *own)
    found = ranks.run(start_counting, arguments, world_size=1 + (TP2 in more), init_process_group=False)
    for status, num_whole, num_scored in found:
        assert status == 0 and num_scored > 0
        assert (num_whole == 0) == (FUSED[0] in more)
