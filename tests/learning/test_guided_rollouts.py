# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Guided rollouts are right from the first step on."""

from __future__ import annotations

import pytest

from _lib import subtraction, variants
from _lib.command_line import CONFIG_NAME
from megatron_selfdistill import config as configuration


def test_each_variant_has_a_guided_one(load_example):
    chosen = load_example("07_guided_rollouts").with_and_without_guidance(())
    guided = [configuration.load(variant.overrides, CONFIG_NAME) for variant in chosen if "guided" in variant.title]
    assert len(guided) == len(chosen) // 2 + 1 and all(c.rollout.guidance == "mixed" for c in guided)
    assert {c.target.anchor for c in guided} == {"student", "auto"}


@pytest.mark.full
@pytest.mark.usefixtures("base")
def test_guided_rollouts_are_right_where_the_student_never_is(load_example, root, monkeypatch):
    example = load_example("07_guided_rollouts")
    monkeypatch.setattr(example, "llama_subtraction", subtraction)  # the base of the other examples
    monkeypatch.setattr(example, "VARIANTS", (variants.SELF_DISTILLATION,))
    monkeypatch.setattr(subtraction, "NUM_HELD_OUT_HARD", 40)
    assert example.main(["--steps", "2", "--directory", str(root)]) == 0
    directory = root / "guided_rollouts" / "seed5"
    answers = {record["id"]: record["answer"] for record in example.records(directory / "train.jsonl")}
    right = {}
    for name in ("self-distillation", "self-distillation__guided"):
        samples = example.read_samples(directory / name)
        assert len(samples) == 64
        right[name] = sum(example.is_right(sample, answers[sample["problem_id"]]) for sample in samples) / 64
    assert right["self-distillation"] < 0.3 and right["self-distillation__guided"] > 0.6, right
