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
    TWO_RANKS,
    assert_equal_runs,
    assert_guided_by_the_teacher_of_the_loss,
    final_tensors,
    go_back_to_step,
    refusal,
    reproducible_metrics,
    train,
)

from megatron_selfdistill.checkpoint.formats.weights_digest import base_digest
from megatron_selfdistill.instruments.evaluate import evaluate_command as evaluate
from megatron_selfdistill.instruments.explorer import explore_command as explore
from megatron_selfdistill.instruments.explorer.given_models import initial_weights
from megatron_selfdistill.interop import convert_command as convert
from megatron_selfdistill.interop.describe import describe

ADAPTED = ("adapter.rank=4", "adapter.alpha=8", "checkpoint.save_every=1")
KEPT = (*ADAPTED, "num_steps=2")
"""The options of a run on random weights, which it keeps beside its checkpoints."""


@pytest.fixture(scope="module")
def adapted(start) -> tuple[str, ...]:
    return start, *ADAPTED, "num_steps=4"


@pytest.fixture(scope="module")
def whole(runs, adapted) -> Path:
    return runs(*adapted)


def weights(ranks, run: Path, step: int) -> dict[str, torch.Tensor]:
    (stored,) = ranks.run(final_tensors, run, step, world_size=1)
    return {key: value for key, value in stored.items() if key.startswith(("decoder.", "embedding.", "output_layer."))}


def assert_close_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert expected and expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def test_a_run_trains_its_adapters_alone_and_resumes_bit_for_bit(ranks, runs, adapted, whole):
    assert all(step["gradient_norm"] > 0 for step in reproducible_metrics(whole))
    factors = weights(ranks, whole, 4)
    assert factors and all("_adapter." in name and factor.any() for name, factor in factors.items())
    assert not (whole / "teacher").exists() and not (whole / "base").exists()
    runs.resumed(*adapted, step=3)


@pytest.mark.full
@pytest.mark.parametrize("teacher", ["frozen", "current"])
def test_guided_responses_are_sampled_from_the_target_of_the_loss(runs, adapted, teacher):
    """The sampler's teacher and reference are the base without adapters, and its student has them."""
    options = ["rollout.guidance=mixed", "target.match=student", "optimizer.lr=1e-1", "optimizer.lr_warmup_steps=0"]
    options += [f"teacher.weights={teacher}", "metrics.teacher_every=1", "metrics.show_samples=0", "num_steps=3"]
    assert_guided_by_the_teacher_of_the_loss(runs(*adapted, *options))


@pytest.mark.full
@pytest.mark.parametrize("layout", ["TP2", "PP2", "DP2"])
def test_a_run_goes_on_in_another_layout(ranks, runs, adapted, whole, layout):
    more = [f"tests.replay={whole}/responses.jsonl", *TWO_RANKS[layout], "checkpoint.resume=force"]
    halves = runs.continued(*adapted, step=3, more=more, then=2)
    assert_close_weights(weights(ranks, halves, 4), weights(ranks, whole, 4))


def evaluate_and_listen(arguments: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stderr(io.StringIO()) as output, contextlib.redirect_stdout(output):
        return evaluate.main(arguments), output.getvalue()


def evaluated(ranks, data: Path, model: Path, out: Path, *options: str) -> tuple[int, str]:
    command = ["--megatron", str(model), "--data", str(data / "problems.jsonl"), "--out", str(out), *options]
    command += [f"data.tokenizer={data}/tokenizer", "optimizer=fp32", "rollout.max_new_tokens=8"]
    command += ["rollout.kv_cache_gb=0.1"]
    return ranks.run(evaluate_and_listen, command, world_size=1, init_process_group=False)[0]


@pytest.mark.full
def test_other_commands_read_the_adapters(ranks, runs, data, adapted, whole, tmp_path):
    texts = ["--problem", "500-408:", "--solution", "092", "-o", str(tmp_path / "explored.html"), "optimizer=fp32"]
    assert ranks.run(explore.main, [str(whole), *texts], world_size=1, init_process_group=False) == [0]
    status, shown = evaluated(ranks, data, whole, tmp_path / "evaluated", "--num-samples", "2", "data.limit=2")
    assert status == 0 and "computed in float32, the type of the weights\n" in shown
    started = refusal(ranks, runs.arguments(tmp_path / "run", *adapted, f"checkpoint.load={whole}/checkpoints"))
    assert "holds adapters alone" in started


def test_a_rank_in_the_description_that_no_factor_has_takes_no_memory(ranks, data, whole, tmp_path):
    path = shutil.copytree(whole, tmp_path / "run") / "checkpoints" / "iter_0000004"
    (path / "manifest.json").unlink()
    (path / "adapters.json").write_text((path / "adapters.json").read_text().replace('"rank": 4', '"rank": 50000'))
    status, output = evaluated(ranks, data, path, tmp_path / "evaluated", "checkpoint.verify=none")
    assert status == 2 and "iter_0000004 has factors of the ranks [4]" in output


def test_every_command_of_the_page_takes_run_directories(finished, whole, tmp_path, capsys):
    peft, lora = tmp_path / "peft", tmp_path / "lora"
    for command in (
        f"inspect {whole}",
        f"megatron-to-peft --megatron {whole} --iteration 3 --out {peft}",
        f"peft-to-megatron --peft {peft} --base {finished} --out {lora}",
        f"megatron-to-peft --megatron {lora} --out {tmp_path}/again",
    ):
        assert convert.main(command.split()) == 0, capsys.readouterr().err


@pytest.mark.full
def test_the_base_may_move_but_not_change(ranks, runs, data, finished, adapted, whole, tmp_path, capsys):
    run, moved, other = (tmp_path / name for name in ("run", "moved", "other"))
    for copy, original in ((run, whole), (moved, finished), (other, finished)):
        shutil.copytree(original, copy)
    go_back_to_step(3, run)
    manifest = other / "checkpoints" / "iter_0000006" / "manifest.json"
    manifest.write_text(re.sub('"checksum": "[0-9a-f]', '"checksum": "x', manifest.read_text()))
    expected, found = (base_digest(place / "checkpoints") for place in (finished, other))
    message = refusal(ranks, runs.arguments(run, *adapted, f"checkpoint.load={other}/checkpoints"))
    assert expected in message and found in message
    train(ranks, runs.arguments(run, *adapted, f"checkpoint.load={moved}/checkpoints"))
    assert_equal_runs(ranks, whole, run, 4)
    described = describe(run / "checkpoints")
    assert expected in described["base"] and described["place of the base"] == f"{moved}/checkpoints"
    shutil.rmtree(moved)
    model = ["--megatron", str(run / "checkpoints"), "--data", str(data / "problems.jsonl")]
    assert evaluate.main([*model, "--out", str(tmp_path / "out"), f"data.tokenizer={data}/tokenizer"]) == 2
    assert f"whose base {expected} is not at {moved}/checkpoints" in capsys.readouterr().err


@pytest.mark.full
def test_a_run_begins_at_given_adapters(ranks, runs, adapted, whole):
    begins = [f"adapter.load={whole}/checkpoints", "num_steps=1", "optimizer.lr=0", "metrics.teacher_every=1"]
    expected, found = weights(ranks, whole, 4), weights(ranks, runs(*adapted, *begins), 1)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def stored_tensors(path: Path) -> dict[str, torch.Tensor]:
    from megatron.core.dist_checkpointing import load_plain_tensors

    found: dict[str, torch.Tensor] = load_plain_tensors(str(path))
    return found


@pytest.mark.full
def test_random_weights_below_adapters_are_kept_beside_the_checkpoints(ranks, runs):
    whole = runs(*KEPT)
    (kept,) = ranks.run(stored_tensors, whole / "base", world_size=1)
    assert kept.keys() >= {"embedding.word_embeddings.weight"} and not any("_adapter." in name for name in kept)
    assert initial_weights(whole) == whole / "base"
    runs.resumed(*KEPT, step=1)


@pytest.mark.full
def test_a_kept_base_is_used_again_after_a_kill_is_named_if_it_is_missing_and_may_be_given(ranks, runs, tmp_path):
    whole = runs(*KEPT)
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")  # as if it had been killed during its first save
    written = (run / "base").stat().st_ino
    train(ranks, runs.arguments(run, *KEPT))
    assert (run / "base").stat().st_ino == written
    assert_equal_runs(ranks, whole, run, 2)
    shutil.rmtree(run / "base")
    go_back_to_step(1, run)
    assert f"{run}/base does not exist" in refusal(ranks, runs.arguments(run, *KEPT))
    train(ranks, runs.arguments(run, *KEPT, f"checkpoint.load={whole}/base"))
    assert_equal_runs(ranks, whole, run, 2)


@pytest.mark.full
def test_a_base_that_virtual_stages_kept_serves_one_rank(ranks, runs, tmp_path):
    stages = ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]
    more = [*ADAPTED, "model.num_layers=4", "num_steps=3"]
    whole = runs(*more, *stages, world_size=2)
    halves = Path(shutil.copytree(whole, tmp_path / "halves"))
    go_back_to_step(2, halves)
    replay = [f"tests.replay={whole}/responses.jsonl", "checkpoint.resume=force"]
    train(ranks, runs.arguments(halves, *more, *replay))
    assert_close_weights(
        *({k: v for k, v in weights(ranks, run, 3).items() if "_adapter." in k} for run in (halves, whole))
    )
