# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole runs whose tokens have weights with a name: in every layout, resumed, and with weights that are all 1 or 0."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiers import combinations
from tiny_run import (
    TWO_RANKS,
    assert_steps_equal,
    differences,
    final_tensors,
    reproducible_metrics,
    start_and_listen,
)

SHORT = ("optimizer.lr_warmup_steps=0", "checkpoint.save_every=1", "num_steps=2", "rollout.max_new_tokens=10")
FORWARD = ("loss.divergence=forward_kl", "data.on_long_context=drop")
REACH = "method.token_weights=reach"
ALONE = ("recipe=teacher_alone", *FORWARD, REACH)
CHUNKS = ("loss.fused=low_memory", "loss.fused_chunk_tokens=4")
LAYOUTS = {**TWO_RANKS, "CP2, fused": [*TWO_RANKS["CP2"], *CHUNKS]}
COMPARED = ("weights/mean", "reach/", "loss/", "correction/")


@combinations(layout=list(LAYOUTS), quick={"layout": ["CP2, fused"]}, strength=1)
def test_weights_and_gradients_of_runs_are_equal_in_every_layout(runs, start, layout):
    """The default has a reference, whose mix with the teacher is the q of the weights."""
    options = [start, *SHORT, *FORWARD, REACH]
    assert_steps_equal(runs(*options), runs.replayed(*options, more=LAYOUTS[layout]), COMPARED)
    for step in reproducible_metrics(runs(*options)):
        assert step["weights/mean"] == step["reach/mean"] < 0.9, "the teacher would not write these responses"
        assert step["weights/sum"] == pytest.approx(step["weights/mean"] * step["tokens/response"], rel=1e-9)
        assert step["correction/weight_mean"] == pytest.approx(1, rel=1e-6), "the sum of the weights is the divisor"


@pytest.mark.full
@pytest.mark.parametrize("options", [ALONE, ("recipe=iw_opd",), ("recipe=edge_opd", "data.on_long_context=drop")])
def test_a_run_with_weights_resumes_bit_for_bit(runs, start, options):
    runs.resumed(start, *SHORT, *options, step=1)


ONES = {
    "iw_opd": ("method.token_weights=iw_opd", "method.iw_gain=0"),
    "reach": (REACH, "method.reach_exponent=1e-30"),
}


@combinations(name=list(ONES), quick={"name": ["reach"]}, strength=1)
def test_weights_of_1_are_no_weights_bit_for_bit(ranks, runs, start, name):
    without, ones = (runs(start, *SHORT, *FORWARD, *more) for more in ((), ONES[name]))
    assert ranks.run(differences, without, ones, 2, world_size=1) == [[]]
    for plain, weighted in zip(reproducible_metrics(without), reproducible_metrics(ones), strict=True):
        assert weighted["weights/mean"] == 1
        assert plain.items() <= weighted.items()


def changed_weights(one: Path, other: Path) -> list[str]:
    """Return the weights that differ between the second step of a run and the sixth of another."""
    before, after = final_tensors(other, 6), final_tensors(one, 2)
    weights = [key for key, value in before.items() if isinstance(value, torch.Tensor) and "optimizer" not in key]
    assert len(weights) == 9
    return [key for key in weights if not torch.equal(before[key], after[key])]


def test_steps_whose_weights_sum_to_less_than_a_token_change_nothing_and_say_so(ranks, runs, finished, start, tmp_path):
    for margin in (0, 1000):
        own = [start, *SHORT, "method.token_weights=evidence", f"method.evidence_margin={margin}"]
        own += ["metrics.console_every=1"]
        arguments = runs.arguments(tmp_path / str(margin), *own)
        (status, output), _ = ranks.run(start_and_listen, arguments, world_size=2, init_process_group=False)
        assert status == 0 and output.count("changes nothing") == (2 if margin else 0), output
        assert re.search(r"step 2 of 2:.*  reach 0\.\d\d\d", output), "the mean reach has a column"
        (changed,) = ranks.run(changed_weights, tmp_path / str(margin), finished, world_size=1)
        assert bool(changed) == (margin == 0)
        for step in reproducible_metrics(tmp_path / str(margin)):
            assert (step["weights/sum"] == 0) == ("loss/mean" not in step) == (margin > 0)
