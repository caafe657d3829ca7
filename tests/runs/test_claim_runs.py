# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The numbers of the method's claims in the log of a whole run without a reference, and of a baseline."""

from __future__ import annotations

import json

from tiny_run import overrides, reproducible_metrics, train_each

FORKS = {"forks/entropy_student", "forks/entropy_target", "forks/capped", "forks/entropy_at_least"}


def test_a_run_without_a_reference_logs_the_claims_and_a_baseline_does_not(ranks, data, tmp_path):
    common = ["metrics.teacher_every=2", "metrics.show_samples=0"]
    words = "metrics.leak_words=['0','1','2','3','4','5','6','7','8','9']"
    run, baseline, instructed = (tmp_path / name for name in ("run", "baseline", "instructed"))
    problems = [json.loads(line) for line in (data / "problems.jsonl").read_text().splitlines()]
    (tmp_path / "one_hint.jsonl").write_text("".join(json.dumps(one | {"solution": "12"}) + "\n" for one in problems))
    one_hint = [words, f"data.path={tmp_path}/one_hint.jsonl", "num_steps=1"]
    train_each(
        ranks,
        [
            overrides(data, run, *common, words, "target.anchor=student", "num_steps=3"),
            overrides(data, baseline, *common, "method.name=sft", "num_steps=1"),
            overrides(data, instructed, *common, *one_hint),
        ],
    )
    lines = reproducible_metrics(run)
    measured = [{key for key in line if key.startswith("target/")} for line in lines]
    assert measured == [{"target/mass_on_rare_student", "target/let_through"}] * 2 + [set()]
    assert all(0 < line["target/let_through"] < 1 for line in lines[:2])
    assert all(0 <= line["target/mass_on_rare_student"] < 1 for line in lines[:2])
    assert all(line.keys() >= FORKS and line["leak/words_per_1000"] > 0 for line in lines)
    claims = ("target/", "forks/", "reverse_kl/", "leak/")
    assert not any(key.startswith(claims) for line in reproducible_metrics(baseline) for key in line)
    (line,) = reproducible_metrics(instructed)
    assert "leak/hint_8grams" in line and "leak/words_per_1000" not in line, "one hint for all problems cannot leak"
