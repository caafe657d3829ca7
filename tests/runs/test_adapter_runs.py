# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs with adapters: they train the adapters alone, teach with the base, resume bit for bit, and refuse what lacks."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import (
    assert_equal_runs,
    assert_guided_by_the_teacher_of_the_loss,
    assert_resumes_equal,
    final_tensors,
    go_back_to_step,
    overrides,
    refusal,
    reproducible_metrics,
    train,
)

from megatron_selfdistill.checkpoint.formats.weights_digest import base_digest
from megatron_selfdistill.instruments.evaluate import evaluate_command as evaluate
from megatron_selfdistill.instruments.explorer import explore_command as explore
from megatron_selfdistill.interop import convert_command as convert
from megatron_selfdistill.interop.describe import describe

ADAPTED = ("adapter.rank=4", "adapter.alpha=8")


@pytest.fixture(scope="module")
def base(finished) -> Path:
    """Return the run of which all others start."""
    return finished


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
    train(ranks, arguments(data, run, base, f"tests.record={run}/responses.jsonl"))
    return run


def test_a_run_trains_its_adapters_alone_and_resumes_bit_for_bit(ranks, data, base, whole):
    steps = reproducible_metrics(whole)
    assert all(step["gradient_norm"] > 0 for step in steps)
    factors = weights(ranks, whole, 4)
    assert factors and all("_adapter." in name and factor.any() for name, factor in factors.items())
    assert not (whole / "teacher").exists() and not (whole / "base").exists()
    assert_resumes_equal(ranks, whole, lambda run: arguments(data, run, base), step=3, num_steps=4)


@pytest.mark.full
@pytest.mark.parametrize("teacher", ["frozen", "current"])
def test_guided_responses_are_sampled_from_the_target_of_the_loss(ranks, data, base, tmp_path, teacher):
    """The sampler's teacher and reference are the base without adapters, and its student has them."""
    recorded = tmp_path / "recorded.jsonl"
    options = ["rollout.guidance=mixed", "target.match=student", "optimizer.lr=1e-1", "optimizer.lr_warmup_steps=0"]
    options += [f"teacher.weights={teacher}", "metrics.teacher_every=1", "metrics.show_samples=0", "num_steps=3"]
    train(ranks, arguments(data, tmp_path / "run", base, *options, f"tests.record={recorded}"))
    assert_guided_by_the_teacher_of_the_loss(tmp_path / "run", recorded)


@pytest.mark.full
@pytest.mark.parametrize(
    "layout", [["parallel.tensor_model_parallel_size=2"], ["parallel.pipeline_model_parallel_size=2"], []]
)
def test_a_run_goes_on_in_another_layout(ranks, data, base, whole, tmp_path, layout):
    halves = Path(shutil.copytree(whole, tmp_path / "run"))
    go_back_to_step(3, halves)
    replay = f"tests.replay={whole}/responses.jsonl"
    train(ranks, arguments(data, halves, base, replay, *layout, "checkpoint.resume=force"), 2)
    expected, found = weights(ranks, whole, 4), weights(ranks, halves, 4)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.full
def test_other_commands_read_the_adapters(ranks, data, base, whole, tmp_path):
    texts = ["--problem", "500-408:", "--solution", "092", "-o", str(tmp_path / "explored.html"), "optimizer=fp32"]
    assert ranks.run(explore.main, [str(whole), *texts], world_size=1, init_process_group=False) == [0]
    model = ["--megatron", str(whole), "--data", str(data / "problems.jsonl")]
    out = ["--out", str(tmp_path / "evaluated"), "--num-samples", "2", f"data.tokenizer={data}/tokenizer"]
    settings = ["optimizer=fp32", "rollout.max_new_tokens=8", "rollout.kv_cache_gb=0.1"]
    arguments_of_evaluate = [*model, *out, *settings, "data.limit=2"]
    ((status, shown),) = ranks.run(evaluate_and_listen, arguments_of_evaluate, world_size=1, init_process_group=False)
    assert status == 0 and "computed in float32, the type of the weights\n" in shown
    started = refusal(ranks, arguments(data, tmp_path / "run", base, f"checkpoint.load={whole}/checkpoints"))
    assert "holds adapters alone, but a run begins at full weights: set checkpoint.load to their base" in started


def evaluate_and_listen(arguments: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stderr(io.StringIO()) as output, contextlib.redirect_stdout(output):
        return evaluate.main(arguments), output.getvalue()


def test_a_rank_in_the_description_that_no_factor_has_takes_no_memory(ranks, data, whole, tmp_path):
    path = shutil.copytree(whole, tmp_path / "run") / "checkpoints" / "iter_0000004"
    (path / "manifest.json").unlink()
    (path / "adapters.json").write_text((path / "adapters.json").read_text().replace('"rank": 4', '"rank": 50000'))
    command = ["--megatron", str(path), "--data", str(data / "problems.jsonl"), "--out", str(tmp_path / "evaluated")]
    command += [f"data.tokenizer={data}/tokenizer", "optimizer=fp32", "rollout.max_new_tokens=8"]
    command += ["rollout.kv_cache_gb=0.1", "checkpoint.verify=none"]
    ((status, output),) = ranks.run(evaluate_and_listen, command, world_size=1, init_process_group=False)
    fault = "iter_0000004 has factors of the ranks [4], but its adapters.json has the rank 50000"
    assert status == 2 and output.endswith(f"{fault}\n")


def test_every_command_of_the_page_takes_run_directories(base, whole, tmp_path, capsys):
    for command in (
        ["inspect", str(whole)],
        ["megatron-to-peft", "--megatron", str(whole), "--iteration", "3", "--out", str(tmp_path / "peft")],
        ["peft-to-megatron", "--peft", str(tmp_path / "peft"), "--base", str(base), "--out", str(tmp_path / "lora")],
        ["megatron-to-peft", "--megatron", str(tmp_path / "lora"), "--out", str(tmp_path / "again")],
    ):
        assert convert.main(command) == 0, capsys.readouterr().err


@pytest.mark.full
def test_the_base_may_move_but_not_change(ranks, data, base, whole, tmp_path, capsys):
    run, moved = shutil.copytree(whole, tmp_path / "run"), shutil.copytree(base, tmp_path / "moved")
    go_back_to_step(3, run)
    other = shutil.copytree(base, tmp_path / "other")
    manifest = other / "checkpoints" / "iter_0000006" / "manifest.json"
    manifest.write_text(re.sub('"checksum": "[0-9a-f]', '"checksum": "x', manifest.read_text()))
    expected, found = (base_digest(place / "checkpoints") for place in (base, other))
    message = refusal(ranks, arguments(data, run, other))
    assert "is not the base of the adapters in" in message
    assert f"it has the digest {found}, expected {expected}" in message
    train(ranks, arguments(data, run, moved))
    assert_equal_runs(ranks, whole, run, 4)
    described = describe(run / "checkpoints")
    assert described["adapters"].startswith("rank 4, alpha 8.0, scale alpha / rank, on linear_qkv, ")
    assert described["base"] == f"the checkpoint with the digest {expected}"
    assert described["place of the base"] == f"{moved}/checkpoints"
    assert described["parameters"].endswith("of the adapters alone")
    shutil.rmtree(moved)
    model = ["--megatron", str(run / "checkpoints"), "--data", str(data / "problems.jsonl")]
    assert evaluate.main([*model, "--out", str(tmp_path / "out"), f"data.tokenizer={data}/tokenizer"]) == 2
    assert f"whose base {expected} is not at {moved}/checkpoints" in capsys.readouterr().err


@pytest.mark.full
def test_a_run_begins_at_given_adapters(ranks, data, base, whole, tmp_path):
    begins = [f"adapter.load={whole}/checkpoints", "num_steps=1", "optimizer.lr=0", "metrics.teacher_every=1"]
    train(ranks, arguments(data, tmp_path / "run", base, *begins))
    expected, found = weights(ranks, whole, 4), weights(ranks, tmp_path / "run", 1)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
