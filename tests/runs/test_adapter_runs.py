# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs with adapters: they train the adapters alone, teach with the base, resume bit for bit, and refuse what lacks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import assert_resumes_equal, final_tensors, go_back_to_step, overrides, reproducible_metrics, train

from megatron_selfdistill.checkpoint.conversion import megatron_to_hf
from megatron_selfdistill.commands import evaluate, explore
from megatron_selfdistill.config import load
from megatron_selfdistill.errors import CheckpointError, ConfigError

ADAPTED = ("adapter.rank=4", "adapter.alpha=8")


@pytest.fixture(scope="module")
def base(ranks, data, tmp_path_factory) -> Path:
    """Return the run of which all others start."""
    run = tmp_path_factory.mktemp("base") / "run"
    train(ranks, overrides(data, run, "num_steps=1"))
    return run


def weights(ranks, run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the tensors of the model in a checkpoint of a run."""
    (stored,) = ranks.run(final_tensors, run, step, world_size=1)
    return {key: value for key, value in stored.items() if key.startswith(("decoder.", "embedding.", "output_layer."))}


def arguments(data: Path, run: Path, base: Path, *more: str) -> list[str]:
    return overrides(
        data, run, f"checkpoint.load={base}/checkpoints", *ADAPTED, "checkpoint.save_every=1", "num_steps=4", *more
    )


@pytest.fixture(scope="module")
def whole(ranks, data, base, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("adapted") / "run"
    train(ranks, arguments(data, run, base, f"rollout.record={run}/responses.jsonl"))
    return run


def test_a_run_trains_its_adapters_alone_and_resumes_bit_for_bit(ranks, data, base, whole):
    steps = reproducible_metrics(whole)
    assert all(step["gradient_norm"] > 0 for step in steps)
    before = weights(ranks, base, 1)
    after = weights(ranks, whole, 4)
    factors = {name for name in after if "_adapter." in name}
    assert factors and after.keys() - factors == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(after[name].any() for name in factors)
    assert not (whole / "teacher").exists()
    assert_resumes_equal(ranks, whole, lambda run: arguments(data, run, base), step=3, num_steps=4)


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
        pytest.param(["parallel.pipeline_model_parallel_size=2"], marks=pytest.mark.full),
        pytest.param([], marks=pytest.mark.full),
    ],
)
def test_every_layout_learns_alike(ranks, data, base, whole, tmp_path, layout):
    replay = f"rollout.replay={whole}/responses.jsonl"
    train(ranks, arguments(data, tmp_path / "run", base, replay, *layout), 2)
    for expected, found in zip(reproducible_metrics(whole), reproducible_metrics(tmp_path / "run"), strict=True):
        assert found["loss/mean"] == pytest.approx(expected["loss/mean"], rel=1e-3, abs=1e-6)
        assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-3)


@pytest.mark.parametrize("teacher", ["frozen", pytest.param("current", marks=pytest.mark.full)])
def test_guided_responses_are_sampled_from_the_target_of_the_loss(ranks, data, base, tmp_path, teacher):
    """The sampler's teacher and reference are the base without adapters, and its student has them."""
    recorded = tmp_path / "recorded.jsonl"
    options = ["rollout.guidance=mixed", "target.match=student", "optimizer.lr=1e-1", "optimizer.lr_warmup_steps=0"]
    options += [f"teacher.weights={teacher}", "metrics.teacher_every=1", "metrics.show_samples=0", "num_steps=3"]
    train(ranks, arguments(data, tmp_path / "run", base, *options, f"rollout.record={recorded}"))
    records = [json.loads(line) for line in recorded.read_text().splitlines()]
    for step, line in enumerate(reproducible_metrics(tmp_path / "run")):
        means = {}
        for name in ("log_probs", "teacher_log_probs"):
            values = [value for record in records if record["step"] == step for value in record[name]]
            means[name] = sum(values) / len(values)
        assert line["teacher_cross_entropy"] == pytest.approx(-means["teacher_log_probs"], abs=1e-4)
        assert line["sampler/log_prob_max_abs_diff"] < 1e-3
        assert step == 0 or abs(means["log_probs"] - means["teacher_log_probs"]) > 1e-3


@pytest.mark.full
def test_a_run_goes_on_in_another_layout(ranks, data, base, whole):
    halves = Path(shutil.copytree(whole, whole.with_name("run_in_another_layout")))
    go_back_to_step(3, halves)
    replay = f"rollout.replay={whole}/responses.jsonl"
    train(
        ranks,
        arguments(data, halves, base, replay, "parallel.tensor_model_parallel_size=2", "checkpoint.resume=force"),
        2,
    )
    expected, found = weights(ranks, whole, 4), weights(ranks, halves, 4)
    for name in (name for name in expected if "_adapter." in name):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def test_other_commands_read_the_adapters_or_refuse_them(ranks, data, base, whole, tmp_path):
    texts = ["--problem", "500-408:", "--solution", "092", "-o", str(tmp_path / "explored.html"), "optimizer=fp32"]
    assert ranks.run(explore.main, [str(whole), *texts], world_size=1, init_process_group=False) == [0]
    model = ["--megatron", str(whole / "checkpoints"), "--data", str(data / "problems.jsonl")]
    out = ["--out", str(tmp_path / "evaluated"), "--num-samples", "2", f"data.tokenizer={data}/tokenizer"]
    settings = ["optimizer=fp32", "rollout.max_new_tokens=8", "rollout.kv_cache_gb=0.1", *ADAPTED]
    arguments_of_evaluate = [*model, *out, *settings, "data.limit=2"]
    assert ranks.run(evaluate.main, arguments_of_evaluate, world_size=1, init_process_group=False) == [0]
    with pytest.raises(CheckpointError, match=r"_adapter\.a.* is unexpected"):
        megatron_to_hf(whole / "checkpoints", tmp_path / "hf")
    start = f"checkpoint.load={whole}/checkpoints"
    train(ranks, arguments(data, tmp_path / "run", base, start), expected=2)


@pytest.mark.parametrize(
    ("overriding", "words"),
    [
        (["teacher.weights=ema"], "the average of low-rank changes has full rank"),
        (["rollout.engine=vllm"], "only the sampler in process reads adapters"),
        (["checkpoint.load_optimizer=true", "checkpoint.load=x"], "trains the adapters alone"),
        (["adapter.alpha=0"], "adapter.alpha must be above 0"),
        (["adapter.layers=[]"], "adapter.layers must name at least one layer"),
        (["adapter.rank=-1"], "adapter.rank must be at least 0"),
    ],
)
def test_contradictions_are_one_sentence(overriding, words):
    with pytest.raises(ConfigError, match=words):
        load(["data.path=x", "data.tokenizer=t", *ADAPTED, *overriding])
