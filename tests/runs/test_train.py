# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The command: what it refuses and how, what it writes, and when a guard stops it."""

from __future__ import annotations

import json
import math

import pytest
import tiny_run
import torch
from tiny_run import overrides, reproducible_metrics, saved_step, train, train_each

from megatron_selfdistill.config import load
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.distributed.roll_call import RollCall
from megatron_selfdistill.metrics.run_log import read_samples
from megatron_selfdistill.train import main
from megatron_selfdistill.trainer import Trainer

BAD_INPUT = {
    "a misspelt key": (["traget.rule=fixed"], "did you mean 'target.rule'"),
    "sizes that do not divide the world": (["parallel.tensor_model_parallel_size=3"], "multiple of TP x PP x CP"),
    "a template that hides the problem": (["data.chat_template='{% for m in messages %}x{% endfor %}'"], "to show the"),
    "a response that cannot fit": (["rollout.max_new_tokens=1000"], "max_new_tokens"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_message_and_status_2_before_any_process_group(data, tmp_path, capfd, name):
    options, expected = BAD_INPUT[name]
    assert main(overrides(data, tmp_path / "run", *options)) == 2
    assert not torch.distributed.is_initialized()
    error = capfd.readouterr().err.strip()
    assert expected in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("problem", "answer", "expected"), [("2-1=", None, "an answer"), ("1" * 120, "9", "114 tokens")]
)
def test_held_out_problems_are_checked_before_the_first_step(data, tmp_path, capfd, problem, answer, expected):
    records = [{"problem": "2-1=", "solution": "1", "answer": "1"}] * 70
    records.append({"problem": problem, "solution": "9"} | ({"answer": answer} if answer else {}))
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(it) + "\n" for it in records))
    options = [f"evaluation.path={tmp_path}/held_out.jsonl", "evaluation.every=6", "evaluation.verifier=exact_match"]
    assert main(overrides(data, tmp_path / "run", *options)) == 2
    error = capfd.readouterr().err
    assert expected in error and "held_out.jsonl:71" in error and not (tmp_path / "run").exists()


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


def test_a_run_leaves_configuration_metrics_checkpoint_and_teacher(ranks, data, tmp_path):
    options = ["num_steps=3", "metrics.loggers=[tensorboard]", "metrics.teacher_every=1"]
    train(ranks, overrides(data, tmp_path / "run", *options))
    run = tmp_path / "run"
    assert (run / "config.yaml").is_file() and list(run.rglob("events.out.tfevents*"))
    assert saved_step(run) == 3
    assert (run / "teacher").is_dir(), "the frozen teacher is written once, beside the checkpoints"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["data/epoch"] for line in lines] == [8 / 40, 16 / 40, 24 / 40]
    for key in (
        "loss/mean loss/reverse_kl entropy/student entropy/teacher entropy/target entropy/target_minus_student k/mean "
        "k/p01 k/p99 status/matched status/capped top1_agreement response/length_mean response/truncated_share "
        "gradient_norm learning_rate tokens_per_second/rollout tokens_per_second/train padding/student padding/teacher "
        "seconds/rollout seconds/train memory/rss_gib sampler/log_prob_mean_abs_diff sampler/log_prob_max_abs_diff"
    ).split():
        assert key in lines[-1], key
    assert lines[-1]["sampler/log_prob_max_abs_diff"] < 1e-4


@pytest.mark.full
def test_the_share_of_quotes_is_that_of_the_responses_that_were_made_to_quote(ranks, data, tmp_path):
    """A response is 8 tokens of the teacher's prompt that the student's prompt has not, or 7 of them."""
    recording, replayed = tmp_path / "recording.jsonl", tmp_path / "replayed.jsonl"
    short = ["num_steps=2", "checkpoint.save_every=0"]
    train(ranks, overrides(data, tmp_path / "first", *short, f"tests.record={recording}"))
    run_data = RunData.load(load(overrides(data, tmp_path / "run")))
    prompts = {it.id: run_data.builder.prompt_pair(it) for it in run_data.problems.problems}
    lines, num_quoting = [], [0, 0]
    for number, response in enumerate(map(json.loads, recording.read_text().splitlines())):
        student, teacher = prompts[response["problem_id"]]
        quote = teacher[-8:] if number % 3 == 0 else teacher[-7:]
        assert str(teacher[-8:])[1:-1] not in str(student)
        num_quoting[response["step"]] += number % 3 == 0
        unknown = [0.0] * len(quote)
        lines.append(response | {"token_ids": quote, "log_probs": unknown, "sampled_log_probs": unknown})
    replayed.write_text("".join(json.dumps(line | {"finish_reason": "stop"}) + "\n" for line in lines))
    options = [*short, f"tests.replay={replayed}", "guards.max_log_prob_distance=null"]
    train(ranks, overrides(data, tmp_path / "run", *options), world_size=2)
    shares = [line["response/quoted_hint_share"] for line in reproducible_metrics(tmp_path / "run")]
    assert shares == [count / 8 for count in num_quoting] and num_quoting == [3, 3]


def test_a_dry_run_checks_and_builds_and_does_nothing(ranks, data, tmp_path):
    train(ranks, overrides(data, tmp_path / "run", "dry_run=true"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def with_a_nan_gradient(arguments: list[str]) -> int:
    """Make one gradient NaN at the third step."""
    from megatron_selfdistill.trainer import Trainer

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


def test_the_entropy_guard_stops_a_run_and_the_teacher_canary_does_so_before_the_first_update(ranks, data, tmp_path):
    entropy = ["guards.reference_steps=1", "guards.patience=1", "guards.entropy.min_ratio=10"]
    canary = ["guards.start.max_teacher_cross_entropy=1e-6"]
    runs = [overrides(data, tmp_path / "entropy", *entropy), overrides(data, tmp_path / "canary", *canary)]
    train_each(ranks, runs, expected=3)
    assert len(reproducible_metrics(tmp_path / "entropy")) == 2
    assert not reproducible_metrics(tmp_path / "canary")


def with_a_broken_teacher_pass(arguments: list[str]) -> int:
    """Let every teacher microbatch read its tokens one position late."""
    from megatron_selfdistill.pipeline.schedule import TeacherHiddenStates

    rows = TeacherHiddenStates.put

    def late(self, index, hidden):  # type: ignore[no-untyped-def]
        return rows(self, index, hidden.roll(1, 0))

    return tiny_run.start_with(arguments, TeacherHiddenStates, "put", late)


def test_the_identity_law_is_checked_at_the_start(ranks, data, tmp_path):
    train(ranks, overrides(data, tmp_path / "run"), start=with_a_broken_teacher_pass, expected=3)


@pytest.mark.parametrize(("method", "world_size"), [("rft", 1), ("sft", 2)])
def test_a_baseline_runs_on_the_same_data_and_is_evaluated_at_the_start_and_at_the_end(
    ranks, data, tmp_path, method, world_size
):
    options = [
        f"method.name={method}",
        "evaluation.verifier=tiny_run.starts_with_an_even_token",
        f"evaluation.path={data}/problems.jsonl",
        "evaluation.every=100",
        "evaluation.at_start=true",
        "evaluation.limit=5",
        "evaluation.num_samples=2",
        "evaluation.pass_at_k=[1,2]",
        "num_steps=4",
        "checkpoint.save_every=0",
    ]
    train(ranks, overrides(data, tmp_path / "run", *options), world_size)
    written = reproducible_metrics(tmp_path / "run")
    assert [line["step"] for line in written if "evaluation/greedy_accuracy" in line] == [0, 4]
    assert "evaluation/pass_at_2" in written[0]
    lines = [line for line in written if "evaluation/greedy_accuracy" not in line]
    assert len(lines) == 4 and lines[-1]["loss/mean"] < lines[0]["loss/mean"] * 1.5
    assert not (tmp_path / "run" / "teacher").exists()
    samples = read_samples(tmp_path / "run")
    assert samples and not any(sample["solution"] for sample in samples)
    for sample in samples:
        assert sample["response"] and set(sample["tokens"]["teacher_log_prob"]) == {None}
        assert all(value < 0 for value in sample["tokens"]["student_log_prob"])
