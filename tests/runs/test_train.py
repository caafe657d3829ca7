# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The command: what it refuses and how, what it writes, when a guard stops it, and ``model=NAME`` of the hub."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import tiny_run
import torch
from tiny_run import assert_equal_runs, overrides, reproducible_metrics, saved_step, train, train_each

from megatron_selfdistill.config import load
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.distributed.roll_call import RollCall
from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.interop.hf_files import model_directory
from megatron_selfdistill.metrics.run_log import read_samples
from megatron_selfdistill.train import EXIT_NO_ROLLOUT, main
from megatron_selfdistill.trainer import Trainer

HELD_OUT = ("evaluation.path=HELD_OUT", "evaluation.every=6", "evaluation.verifier=exact_match")


@pytest.mark.parametrize(
    ("options", "last", "named"),
    [
        (["parallel.tensor_model_parallel_size=3"], {}, "multiple of TP x PP x CP"),
        (["data.chat_template='{% for m in messages %}x{% endfor %}'"], {}, "data.chat_template"),
        (["rollout.max_new_tokens=1000"], {}, "max_new_tokens"),
        (HELD_OUT, {"problem": "2-1="}, "held_out.jsonl:71"),
        (HELD_OUT, {"problem": "1" * 120, "answer": "9"}, "held_out.jsonl:71"),
    ],
    ids=["an odd world", "a hidden problem", "a response that cannot fit", "no answer", "a long held-out problem"],
)
def test_bad_input_is_one_message_and_status_2_before_any_process_group(data, tmp_path, capfd, options, last, named):
    records = [{"problem": "2-1=", "solution": "1", "answer": "1"}] * 70 + [{"solution": "9", **last}]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(it) + "\n" for it in records))
    options = [option.replace("HELD_OUT", f"{tmp_path}/held_out.jsonl") for option in options]
    assert main(overrides(data, tmp_path / "run", *options)) == 2
    assert not torch.distributed.is_initialized() and not (tmp_path / "run").exists()
    error = capfd.readouterr().err.strip()
    assert named in error and len(error.splitlines()) == 1


def test_a_rank_that_has_read_other_data_than_rank_0_ends_the_launch(data, tmp_path, capfd, monkeypatch):
    def of_other_data(self: RollCall, call: str, word: str = "", timeout_s: float = 1800.0) -> str:
        return RunData.load(load([*given, *more])).digest if call == "inputs" else word

    monkeypatch.setattr(RollCall, "answer", of_other_data)
    monkeypatch.setattr(Trainer, "__init__", lambda *_: 1 / 0)
    given = [*overrides(data, tmp_path / "run"), f"evaluation.path={data}/problems.jsonl"]
    for other in ("data.limit=39", "evaluation.limit=39", "data.student_template='Q{problem}'"):
        more = [other]
        assert main(given) == 2
        assert "other problems or prompts than rank 0" in capfd.readouterr().err
    more = []
    with pytest.raises(ZeroDivisionError):  # the run has started
        main(given)


def test_a_run_leaves_configuration_metrics_checkpoint_and_teacher(runs):
    run = runs("num_steps=3", "metrics.loggers=[tensorboard]", "metrics.teacher_every=1")
    assert (run / "config.yaml").is_file() and list(run.rglob("events.out.tfevents*"))
    assert saved_step(run) == 3
    assert (run / "teacher").is_dir(), "the frozen teacher is written once, beside the checkpoints"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["data/epoch"]) for line in lines] == [(1, 8 / 40), (2, 16 / 40), (3, 24 / 40)]
    assert lines[-1]["sampler/log_prob_max_abs_diff"] < 1e-4


def with_a_nan_gradient(arguments: list[str]) -> int:
    update = Trainer.update

    def spoilt(self, step):  # type: ignore[no-untyped-def]
        if self.step == 2:
            next(self.learner.chunks[0].parameters()).main_grad[0] = math.nan
        return update(self, step)

    return tiny_run.start_with(arguments, Trainer, "update", spoilt)


def test_a_gradient_that_is_not_finite_is_not_applied_and_stops_the_run_with_a_checkpoint(ranks, data, tmp_path):
    arguments = overrides(data, tmp_path / "run", "checkpoint.save_every=2", "num_steps=3")
    train(ranks, arguments, start=with_a_nan_gradient, expected=3)
    assert saved_step(tmp_path / "run") == 2
    train(ranks, arguments)  # the checkpoint is intact
    lines = reproducible_metrics(tmp_path / "run")
    assert len(lines) == 3 and all(math.isfinite(line["loss/mean"]) for line in lines)


def with_a_broken_teacher_pass(arguments: list[str]) -> int:
    """Let every teacher microbatch read its tokens one position late."""
    from megatron_selfdistill.pipeline.schedule import TeacherHiddenStates

    rows = TeacherHiddenStates.put

    def late(self, index, hidden):  # type: ignore[no-untyped-def]
        return rows(self, index, hidden.roll(1, 0))

    return tiny_run.start_with(arguments, TeacherHiddenStates, "put", late)


def test_guards_of_entropy_teacher_and_the_identity_law_stop_a_run(ranks, data, tmp_path):
    entropy = ["guards.reference_steps=1", "guards.patience=1", "guards.entropy.min_ratio=10"]
    canary = ["guards.start.max_teacher_cross_entropy=1e-6"]
    several = [overrides(data, tmp_path / "entropy", *entropy), overrides(data, tmp_path / "canary", *canary)]
    train_each(ranks, several, expected=3)
    assert len(reproducible_metrics(tmp_path / "entropy")) == 2
    assert not reproducible_metrics(tmp_path / "canary"), "before the first update"
    train(ranks, overrides(data, tmp_path / "run"), start=with_a_broken_teacher_pass, expected=3)


@pytest.mark.full
@pytest.mark.parametrize(("method", "world_size"), [("rft", 1), ("sft", 2)])
def test_a_baseline_runs_on_the_same_data_and_is_evaluated_at_the_start_and_at_the_end(runs, data, method, world_size):
    verified = ["evaluation.verifier=tiny_run.starts_with_an_even_token", f"evaluation.path={data}/problems.jsonl"]
    evaluated = ["evaluation.every=100", "evaluation.at_start=true", "evaluation.limit=5", "evaluation.num_samples=2"]
    options = [f"method.name={method}", *verified, *evaluated, "evaluation.pass_at_k=[1,2]", "checkpoint.save_every=0"]
    run = runs(*options, "num_steps=4", world_size=world_size)
    written = reproducible_metrics(run)
    assert [line["step"] for line in written if "evaluation/greedy_accuracy" in line] == [0, 4]
    assert "evaluation/pass_at_2" in written[0]
    lines = [line for line in written if "evaluation/greedy_accuracy" not in line]
    assert len(lines) == 4 and lines[-1]["loss/mean"] < lines[0]["loss/mean"] * 1.5
    assert not (run / "teacher").exists()
    samples = read_samples(run)
    assert samples and not any(sample["solution"] for sample in samples)
    for sample in samples:
        assert sample["response"] and set(sample["tokens"]["teacher_log_prob"]) == {None}
        assert all(value < 0 for value in sample["tokens"]["student_log_prob"])


def test_truncated_importance_weights_are_those_of_the_recorded_probabilities(runs, tmp_path):
    """Replayed log-probs are of 1.25 times or a third of the student's probability: the weights are .8 and the cap."""
    options = ["num_steps=1", "loss.rollout_correction=truncated", "loss.rollout_correction_cap=1.5"]
    [plain] = reproducible_metrics(runs(*options))
    assert plain["correction/weight_mean"] == pytest.approx(1, abs=1e-5) and plain["correction/capped"] == 0
    num_tokens, changed = [0, 0], tmp_path / "changed.jsonl"
    with changed.open("w") as lines:
        for number, line in enumerate((runs(*options) / "responses.jsonl").read_text().splitlines()):
            record, factor = json.loads(line), math.log(1.25 if number % 2 else 1 / 3)
            num_tokens[number % 2] += len(record["token_ids"])
            record["sampled_log_probs"] = [value + factor for value in record["log_probs"]]
            lines.write(f"{json.dumps(record)}\n")
    replay = [f"tests.replay={changed}", "guards.max_log_prob_distance=null"]
    [weighted] = reproducible_metrics(runs(*options, *replay, world_size=2))
    assert weighted["correction/capped"] == pytest.approx(num_tokens[0] / sum(num_tokens))
    mean = (1.5 * num_tokens[0] + num_tokens[1] / 1.25) / sum(num_tokens)
    assert weighted["correction/weight_mean"] == pytest.approx(mean, abs=1e-4)


OF_HUB = "steps=2 data.teacher_template={problem}H{solution}| batch=4 rollout.max_new_tokens=8 report.every=0".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tiny.model_with_data(tmp_path_factory.mktemp("models"), 40, checkpoint=False)
    return (directory / "hf").rename(directory / "Tiny")


def started(model: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_selfdistill", "train", f"data.path={model.parent}/problems.jsonl"]
    environment = os.environ | {"PYTHONPATH": "."}
    return subprocess.run([*command, *OF_HUB, *words], env=environment, capture_output=True, text=True)


@pytest.mark.full
def test_a_run_converts_a_model_once_beside_itself_trains_and_exports_it(model, tmp_path):
    first = started(model, f"model={model}", f"run_dir={tmp_path}/first", "export=true")
    assert first.returncode == 0, first.stderr
    [converted] = tmp_path.glob("Tiny-*-megatron")
    assert f"converts {model} to {converted}, once" in first.stdout
    assert first.stdout.endswith(f"exported: {tmp_path}/first/hf\n")
    assert {path.name for path in model.iterdir()} <= {path.name for path in (tmp_path / "first" / "hf").iterdir()}
    second = started(model, "--ranks", "2", f"model={model}", f"run_dir={tmp_path}/second")
    assert second.returncode == 0 and "once" not in second.stdout, second.stderr
    losses = [[step["loss/mean"] for step in reproducible_metrics(tmp_path / name)] for name in ("first", "second")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    namesake = Path(shutil.copytree(model, tmp_path / "other" / "Tiny"))
    third = started(model, f"model={namesake}", f"run_dir={tmp_path}/third", "steps=1", "adapter.rank=2", "export=true")
    assert f"converts {namesake} to " in third.stdout and (tmp_path / "third/hf/adapter_config.json").exists()
    for word in ("optimizer.lrr=1", "data.path=none.jsonl"):
        ended = started(model, f"model={model}", f"run_dir={tmp_path}/empty/run", word)
        assert ended.returncode == 2 and not (tmp_path / "empty").exists(), "no conversion"
    longer = started(model, f"model={model}", f"run_dir={tmp_path}/first", "steps=3", "export=true")
    assert (longer.returncode, f"{tmp_path}/first/hf" in longer.stderr) == (2, True), "the export is that of step 2"


def test_a_name_of_the_hub_is_downloaded_or_the_command_is_named(tmp_path, monkeypatch):
    def downloaded(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert name == "some/model" and "*.py" in allow_patterns, "or a tokenizer lacks the code of its auto_map"
        return str(tmp_path)

    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", downloaded)
    assert model_directory(Path("some/model")) == tmp_path and model_directory(tmp_path) == tmp_path
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"`hf download some/model --local-dir DIR`"):
        model_directory(Path("some/model"))


def start_with_an_engine_that_dies_in_the_fifth_step(arguments):
    from megatron_selfdistill.errors import EngineError
    from megatron_selfdistill.rollout.megatron.megatron_sampler import MegatronSampler

    generate, calls = MegatronSampler.generate, []

    def generate_or_die(self, requests, params):
        calls.append(requests)
        if len(calls) == 5:
            raise EngineError("the engine on rank 0 died: expected 8 responses, got 3")
        return generate(self, requests, params)

    return tiny_run.start_with(arguments, MegatronSampler, "generate", generate_or_die)


@pytest.mark.full
def test_a_run_whose_engine_died_goes_on_as_if_it_had_not(ranks, runs, data, tmp_path):
    start, broken = start_with_an_engine_that_dies_in_the_fifth_step, overrides(data, tmp_path / "broken")
    train(ranks, broken, world_size=2, start=start, expected=EXIT_NO_ROLLOUT)
    assert saved_step(tmp_path / "broken") == 4, "the four steps that were done are kept"
    train(ranks, broken, world_size=2)
    assert_equal_runs(ranks, runs(world_size=2), tmp_path / "broken")
