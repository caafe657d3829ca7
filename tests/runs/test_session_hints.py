# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The methods of the literature for agents, on sessions whose replies have a hint for the teacher at each turn."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import assert_resumes_equal, overrides, reproducible_metrics, train

METHODS = {
    "sod": [],
    "pi_distill": [],
    "skill_sd": ["method.keep=2", "method.summarizer=hint_functions.skill_of"],
    "rltf_sd": ["method.revision_min_log_prob=null"],
    "rltf_fm": ["method.reply_template='{problem}{response}'"],
    "openclaw": [
        *("data.kind=problems", "method.live=true", "method.min_length=0", "method.judge=hint_functions.hint_of"),
        "method.reward=hint_functions.reward_of_reply",
    ],
}
"""Recipe -> the overrides that it needs here."""
TEACHER_SEES_THE_HINTS = {"sod", "pi_distill"}
"""The teacher of skill_sd sees skills of earlier responses instead, that of openclaw the hints of its judge, and rltf
has no teacher."""
NUM_STEPS = 2


def arguments(data: Path, run_dir: Path, recipe: str, environment: str, *more: str) -> list[str]:
    """Return the arguments of a short run of ``recipe`` on sessions of a class of `sessions`."""
    tiny = overrides(data, run_dir, "data.global_batch_size=4", "rollout.num_samples=4", "rollout.max_new_tokens=10")
    tiny += ["data.on_long_context=drop", "rollout.temperature=1", "optimizer.lr_warmup_steps=0"]
    tiny += [f"environment.name=sessions.{environment}", "environment.max_turns=3", f"num_steps={NUM_STEPS}"]
    return [f"recipe={recipe}", *tiny, "data.teacher_template='{problem}H{solution}|'", *METHODS[recipe], *more]


@pytest.mark.full
@pytest.mark.parametrize("recipe", METHODS)
def test_a_method_for_agents_trains_on_sessions_with_hints(ranks, data, early, tmp_path, recipe):
    whole, plain = tmp_path / "run", tmp_path / "plain"
    train(ranks, arguments(data, whole, recipe, "Guiding", early, "checkpoint.save_every=1"))
    train(ranks, arguments(data, plain, recipe, "Session", early, "num_steps=1"))
    steps, without = reproducible_metrics(whole), reproducible_metrics(plain)
    assert steps[0]["gradient_norm"] > 0 and all(step["episodes/turns_mean"] > 1 for step in steps)
    assert (steps[0]["gradient_norm"] != without[0]["gradient_norm"]) == (recipe in TEACHER_SEES_THE_HINTS)
    assert_resumes_equal(
        ranks, whole, lambda run: arguments(data, run, recipe, "Guiding", early), step=1, num_steps=NUM_STEPS
    )
