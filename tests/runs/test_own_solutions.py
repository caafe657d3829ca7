# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs whose teacher is shown the model's own solutions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import assert_resumes_equal, overrides, reproducible_metrics, starts_with_an_even_token, train

from megatron_selfdistill.metrics.run_log import read_samples

OWN = [
    "method.name=own_solutions",
    "method.refresh_every=2",
    "method.num_samples=6",
    "evaluation.verifier=tiny_run.starts_with_an_even_token",
    "data.on_long_context=drop",
]


@pytest.fixture(scope="module")
def data(own_data) -> Path:
    """Remove the solutions from a copy of the problems; return the directory of the copy."""
    records = [json.loads(line) for line in (own_data / "problems.jsonl").read_text().splitlines()]
    lines = [json.dumps({key: value for key, value in record.items() if key != "solution"}) for record in records]
    (own_data / "problems.jsonl").write_text("\n".join(lines) + "\n")
    return own_data


PP2 = "parallel.pipeline_model_parallel_size=2"


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        pytest.param(1, ["method.pick=learnable"], id="learnable"),
        pytest.param(1, ["method.pick=shortest"], id="shortest", marks=pytest.mark.full),
        pytest.param(2, ["method.pick=learnable", PP2], id="learnable, PP2", marks=pytest.mark.full),
    ],
)
def test_a_run_on_own_solutions_resumes_as_if_it_had_never_stopped(ranks, data, tmp_path, world_size, options):
    def arguments(run_dir: Path) -> list[str]:
        return overrides(data, run_dir, *OWN, *options, "num_steps=4")

    train(ranks, arguments(tmp_path / "whole"), world_size)
    lines = reproducible_metrics(tmp_path / "whole")
    assert [line["step"] for line in lines if "solutions/pass_rate" in line] == [1, 3]
    shares = [line["solutions/skipped_share"] for line in lines]
    assert max(shares) > 0 and max(shares) < 1
    assert all(0 < line["solutions/pass_rate"] < 1 for line in lines[::2])
    samples = read_samples(tmp_path / "whole")
    assert samples and all(starts_with_an_even_token(sample["solution"], None) for sample in samples)
    assert all(sample["solution"] != sample["response"].rstrip("$") for sample in samples)
    assert_resumes_equal(ranks, tmp_path / "whole", arguments, world_size, step=3, num_steps=4)
