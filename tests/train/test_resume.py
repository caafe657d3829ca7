# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A run that was stopped, or killed, and resumed equals one that never stopped, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_run
from tiny_run import differences, in_new_process, overrides, reproducible_metrics

LAYOUTS = {
    "one rank": (1, []),
    "one rank, bf16, EMA teacher": (1, ["optimizer.precision=bf16", "teacher.weights=ema", "teacher.ema_decay=0.9"]),
    "one rank, current weights, one k per batch": (1, ["teacher.weights=current", "target=batch"]),
    "DP2, bf16, overlapped": (2, ["optimizer=overlapped", "optimizer.precision=bf16"]),
    "TP2+SP": (2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
    "PP2xVPP2, saved in the background": (
        2,
        [
            "parallel.pipeline_model_parallel_size=2",
            "parallel.virtual_pipeline_model_parallel_size=2",
            "checkpoint.async_save=true",
        ],
    ),
    "CP2": (2, ["parallel.context_parallel_size=2"]),
    "EP2": (
        2,
        [
            "parallel.expert_model_parallel_size=2",
            "model.num_moe_experts=4",
            "model.moe_ffn_hidden_size=32",
            "model.moe_router_enable_expert_bias=true",
            "model.moe_router_score_function=sigmoid",
        ],
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny_run.write_data(folder)
    return folder


def train(ranks, world_size: int, arguments: list[str], expected: int = 0) -> None:
    statuses = ranks.run(tiny_run.start, arguments, world_size=world_size, init_process_group=False)
    assert statuses == [expected] * world_size


def assert_equal_runs(ranks, one: Path, other: Path) -> None:
    assert reproducible_metrics(one) == reproducible_metrics(other)
    assert len(reproducible_metrics(one)) == 6
    assert ranks.run(differences, one, other, world_size=1) == [[]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_resumed_run_equals_one_that_never_stopped(ranks, data, tmp_path, name):
    world_size, options = LAYOUTS[name]
    train(ranks, world_size, overrides(data, tmp_path / "whole", *options))
    # The learning rate's schedule is that of the whole run: only the steps of this launch are fewer.
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "iter_0000006")
    (tmp_path / "halves" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")
    train(ranks, world_size, overrides(data, tmp_path / "halves", *options))
    assert_equal_runs(ranks, tmp_path / "whole", tmp_path / "halves")


@pytest.mark.parametrize("place", ["step", "save"])
def test_a_run_killed_in_the_middle_of(place, ranks, data, tmp_path):
    train(ranks, 1, overrides(data, tmp_path / "whole"))
    killed = in_new_process(overrides(data, tmp_path / "killed"), kill_at=place)
    assert killed.returncode == -9, killed.stderr
    latest = (tmp_path / "killed" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()
    assert latest.strip() == "3"
    train(ranks, 1, overrides(data, tmp_path / "killed"))
    assert_equal_runs(ranks, tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*")), "nothing of the killed save may stay behind"


OTHER_LAYOUTS = {
    "TP2": ["parallel.tensor_model_parallel_size=2"],
    "PP2": ["parallel.pipeline_model_parallel_size=2"],
    "DP2": ["optimizer.overlap_grad_reduce=true"],
    "CP2": ["parallel.context_parallel_size=2"],
}


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
def test_resuming_in_another_layout_goes_on_with_the_same_problems_responses_and_loss(ranks, data, tmp_path, name):
    """Data position, streams and teacher exactly; the first loss to 1e-5."""
    options = ["teacher.weights=ema", "checkpoint.keep_last=null"]
    train(ranks, 1, overrides(data, tmp_path / "whole", *options, f"rollout.record={tmp_path}/whole.jsonl"))
    shutil.copytree(tmp_path / "whole", tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "checkpoints" / "iter_0000006")
    (tmp_path / "other" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")
    options += OTHER_LAYOUTS[name] + [f"rollout.record={tmp_path}/other.jsonl"]
    train(ranks, 2, overrides(data, tmp_path / "other", *options))
    assert recorded(tmp_path / "other.jsonl", step=3) == recorded(tmp_path / "whole.jsonl", step=3)
    one, other = (reproducible_metrics(tmp_path / run)[3] for run in ("whole", "other"))
    assert other["loss/mean"] == pytest.approx(one["loss/mean"], abs=1e-5)
    assert other["teacher_cross_entropy"] == pytest.approx(one["teacher_cross_entropy"], abs=1e-5)


def recorded(path: Path, step: int) -> dict[tuple[str, int], list[int]]:
    import json

    records = map(json.loads, path.read_text().splitlines())
    return {(r["problem_id"], r["sample_index"]): r["token_ids"] for r in records if r["step"] == step}
