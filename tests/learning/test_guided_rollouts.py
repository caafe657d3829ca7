# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Guided rollouts are right from the first step on."""

from __future__ import annotations

import pytest

from _lib import subtraction, variants
from _lib.command_line import CONFIG_NAME
from megatron_selfdistill import config as configuration


def test_each_variant_has_a_guided_one(load_example, tmp_path):
    chosen = load_example("07_guided_rollouts").with_and_without_guidance((), tmp_path)
    guided = [configuration.load(variant.overrides, CONFIG_NAME) for variant in chosen if "guided" in variant.title]
    assert len(guided) == len(chosen) // 2 + 1 and all(c.rollout.guidance == "mixed" for c in guided)
    assert {c.target.anchor for c in guided} == {"student", "reference"}


@pytest.mark.full
def test_guided_rollouts_are_right_where_the_student_never_is(load_example, base, root, monkeypatch):
    example = load_example("07_guided_rollouts")
    monkeypatch.setattr(example, "llama_subtraction", subtraction)  # the base of the other examples
    monkeypatch.setattr(example, "VARIANTS", (variants.SELF_DISTILLATION,))
    monkeypatch.setattr(subtraction, "NUM_HELD_OUT_HARD", 40)
    assert example.main(["--steps", "2", "--directory", str(root)]) == 0
    directory = root / "guided_rollouts" / "seed5"
    answers = {record["id"]: record["answer"] for record in example.records(directory / "train.jsonl")}
    right = {}
    for title in ("self-distillation", "self-distillation-guided"):
        written = example.records(directory / f"{title}.jsonl")
        assert len(written) == 64 and all((r["teacher_log_probs"] is None) == ("guided" not in title) for r in written)
        right[title] = sum(example.is_right(r, answers[r["problem_id"]], base) for r in written) / len(written)
    assert right["self-distillation"] < 0.3 and right["self-distillation-guided"] > 0.6, right
