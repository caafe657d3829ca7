# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs whose teacher is shown the model's own solutions."""

from __future__ import annotations

import json

from rounded_json import read_lines
from tiers import combinations
from tiny_run import reproducible_metrics, starts_with_an_even_token

from megatron_selfdistill.metrics.run_log import read_samples

OWN = [
    *("method.name=own_solutions", "method.refresh_every=2", "method.num_samples=6", "method.pick=learnable"),
    *("evaluation.verifier=tiny_run.starts_with_an_even_token", "data.on_long_context=drop", "num_steps=4"),
]
PP2 = "parallel.pipeline_model_parallel_size=2"


CASES = {"learnable": (1, []), "shortest": (1, ["method.pick=shortest"]), "PP2": (2, [PP2])}


@combinations(case=CASES, quick={"case": ["learnable"]})
def test_a_run_on_own_solutions_resumes_as_if_it_had_never_stopped(runs, data, tmp_path, case):
    world_size, options = case
    records = read_lines(data / "problems.jsonl")
    lines = [json.dumps({key: value for key, value in record.items() if key != "solution"}) for record in records]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines))
    options = [f"data.path={tmp_path}/problems.jsonl", *OWN, *options]
    whole = runs(*options, world_size=world_size)
    lines = reproducible_metrics(whole)
    assert [line["step"] for line in lines if "solutions/pass_rate" in line] == [1, 3]
    shares = [line["solutions/skipped_share"] for line in lines]
    assert max(shares) > 0 and max(shares) < 1
    assert all(0 < line["solutions/pass_rate"] < 1 for line in lines[::2])
    samples = read_samples(whole)
    assert samples and all(starts_with_an_even_token(sample["solution"], None) for sample in samples)
    assert all(sample["solution"] != sample["response"].rstrip("$") for sample in samples)
    runs.resumed(*options, step=3, world_size=world_size)
