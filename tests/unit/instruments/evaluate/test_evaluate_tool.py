# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""``selfdistill evaluate``: whole evaluations of a tiny model, from both formats, on one rank and on two."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hf_models
import pytest
import tiny_run
from rounded_json import assert_equal_but_for_rounding, read_lines
from tiers import combinations

from megatron_selfdistill.evaluation.evaluation_directory import PROBLEMS, RESPONSES, SUMMARY
from megatron_selfdistill.evaluation.evaluations import compare, read_evaluation
from megatron_selfdistill.instruments.evaluate import evaluate_command as tool
from megatron_selfdistill.instruments.evaluate.evaluation_tables import show_comparison
from tests.unit.evaluation.test_evaluations import write

TOOL = tiny_run.REPOSITORY / "tools" / "evaluate.py"
SETTINGS = (
    "optimizer=fp32",
    "rollout.max_new_tokens=14",
    "rollout.kv_cache_gb=0.1",
    "evaluation.verifier=tiny_run.starts_with_an_even_token",
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Problems, an untrained model as a Hugging Face directory with its tokenizer, and the same as a checkpoint."""
    from megatron_selfdistill.interop.conversion import hf_to_megatron

    directory = tmp_path_factory.mktemp("evaluate")
    tiny_run.write_data(directory, 12)
    hf_models.write("qwen3", directory / "hf", vocab_size=23)
    for path in (directory / "tokenizer").iterdir():
        shutil.copy(path, directory / "hf" / path.name)
    hf_to_megatron(directory / "hf", directory / "megatron")
    return directory


def arguments(
    directory: Path, out: Path, *more: str, model: str = "megatron", data: str = "problems.jsonl"
) -> list[str]:
    model_and_data = [f"--{model}", str(directory / model), "--data", str(directory / data)]
    return [*model_and_data, "--out", str(out), "--num-samples", "4", *SETTINGS, *more]


def evaluate(ranks, *args, world_size: int = 1, **kwargs) -> list[int]:
    return ranks.run(tool.main, arguments(*args, **kwargs), world_size=world_size, init_process_group=False)


@pytest.fixture(scope="module")
def alone(directory, ranks) -> Path:
    """Evaluate the checkpoint on one rank."""
    out = directory / "results" / "alone"
    assert evaluate(
        ranks, directory, out, "--pass-at-k", "1", "2", "4", "--majority-at-k", "3", "rollout.top_k=15"
    ) == [0]
    return out


def summary_of(out: Path) -> dict:
    return json.loads((out / SUMMARY).read_text())


def test_the_files_say_what_was_measured(directory, alone):
    summary, lines = summary_of(alone), [json.loads(line) for line in (alone / PROBLEMS).read_text().splitlines()]
    ids = [json.loads(line)["id"] for line in (directory / "problems.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ids and {len(line["samples"]) for line in lines} == {4}
    metrics, samples = summary["metrics"], [sample for line in lines for sample in line["samples"]]
    assert metrics["avg_at_4"] == sum(sample["correct"] for sample in samples) / 48 > 0
    assert metrics["greedy_accuracy"] == sum(line["greedy"]["correct"] for line in lines) / 12
    assert metrics["sampled_mean_length"] == sum(sample["length"] for sample in samples) / 48
    assert metrics["pass_at_2"] == pytest.approx(sum(line["pass_at_k"]["2"] for line in lines) / 12)
    assert {name for name in metrics if "_at_" in name} == set(
        "avg_at_4 pass_at_1 pass_at_2 pass_at_4 majority_at_3 pass_over_avg_at_2 pass_over_avg_at_4".split()
    )
    brier = sum((sample["confidence"] - sample["correct"]) ** 2 for sample in samples) / 48
    assert metrics["sampled_brier"] == pytest.approx(brier) and metrics["sampled_stated_confidence"] == 0
    assert 0 < min(sample["confidence"] for sample in samples) < max(sample["confidence"] for sample in samples) < 1
    assert metrics["distinct_4grams"] == pytest.approx(sum(line["distinct_4grams"] for line in lines) / 12)
    assert metrics["distinct_right"] == sum(line["distinct_right"] for line in lines) / 12 > 0
    assert summary["model"] == {"format": "megatron", "path": str(directory / "megatron" / "release"), "iteration": 0}
    assert summary["settings"]["top_k"] == 15 and "first_step" not in summary and summary["data"]["num_problems"] == 12
    assert {path.name for path in alone.iterdir()} == {SUMMARY, PROBLEMS}
    assert [path.name for path in alone.parent.iterdir() if path.name.startswith(".")] == []


@combinations(layout=["tensor", "pipeline", None], quick={"layout": ["tensor"]}, strength=1)
def test_two_ranks_write_the_same_files(directory, alone, ranks, layout, tmp_path):
    cut = [f"parallel.{layout}_model_parallel_size=2"] if layout else []
    options = ("--pass-at-k", "1", "2", "4", "--majority-at-k", "3", "rollout.top_k=15", *cut)
    assert evaluate(ranks, directory, tmp_path / "two", *options, world_size=2) == [0, 0]
    for name in (SUMMARY, PROBLEMS):
        assert_equal_but_for_rounding(*(read_lines(directory / name) for directory in (tmp_path / "two", alone)))


@pytest.mark.full
def test_a_hugging_face_directory_gives_the_results_of_its_checkpoint_and_leaves_nothing_behind(
    directory, alone, tmp_path
):
    options = ("--pass-at-k", "1", "2", "4", "--majority-at-k", "3", "rollout.top_k=15")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(TOOL)]
    command += arguments(directory, tmp_path / "results" / "hf", *options, model="hf")
    paths = os.pathsep.join([str(tiny_run.REPOSITORY), str(tiny_run.REPOSITORY / "tests" / "support")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("majority_at_3") == 1, "one rank prints"
    assert done.stderr.count("computed in float32, the type of the weights\n") == 1
    hf, megatron = summary_of(tmp_path / "results" / "hf"), summary_of(alone)
    assert hf.pop("model") == {"format": "hugging_face", "path": str(directory / "hf"), "iteration": None}
    megatron.pop("model")
    assert_equal_but_for_rounding(hf, megatron)
    assert_equal_but_for_rounding(*(read_lines(out / PROBLEMS) for out in (tmp_path / "results" / "hf", alone)))
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["hf"]


def test_another_seed_draws_others_and_responses_are_written_when_asked(directory, alone, ranks, tmp_path):
    options = ("rollout.top_k=15", "--responses", "2")
    assert evaluate(ranks, directory, tmp_path / "other", *options, "seed=1") == [0]
    samples, others = (
        [json.loads(line)["samples"] for line in (out / PROBLEMS).read_text().splitlines()]
        for out in (alone, tmp_path / "other")
    )
    assert samples != others
    responses = [json.loads(line) for line in (tmp_path / "other" / RESPONSES).read_text().splitlines()]
    assert [it["sample"] for it in responses] == [None, 0, 1, 2, 3] * 2
    assert responses[0]["prompt"].startswith(responses[0]["problem_id"])
    assert set(summary_of(tmp_path / "other")["metrics"]) >= {"pass_at_4", "majority_at_4"}


@pytest.mark.full
@pytest.mark.parametrize("environment", ["replying.Replying", "sessions.Session"])
def test_an_environment_plays_episodes_and_their_rewards_are_measured_and_compared(
    directory, ranks, tmp_path, capfd, environment
):
    played = (f"environment.name={environment}", "environment.max_turns=3", "--responses", "12")
    out = tmp_path / "out"
    assert evaluate(ranks, directory, out, *played, "--num-samples", "2") == [0]
    summary, lines = summary_of(out), read_lines(out / PROBLEMS)
    assert summary["settings"]["environment"] == f"{environment}, 3 turns"
    samples = [sample for line in lines for sample in line["samples"]]
    metrics, (low, high) = summary["metrics"], summary["intervals"]["sampled_mean_reward"]
    assert metrics["sampled_mean_reward"] == pytest.approx(sum(sample["reward"] for sample in samples) / 24)
    assert metrics["sampled_mean_turns"] == pytest.approx(sum(sample["turns"] for sample in samples) / 24)
    assert 1 < metrics["sampled_mean_turns"] <= 3 and low < metrics["sampled_mean_reward"] < high
    responses = read_lines(out / RESPONSES)
    verdicts = [verdict for line in lines for verdict in (line["greedy"], *line["samples"])]
    for said, verdict in zip(responses, verdicts, strict=True):
        turns = [part.partition("\n")[2] if i else part for i, part in enumerate(said["response"].split("\n--- turn "))]
        texts = [turn.partition("\n--- reply\n")[0] for turn in turns]
        rewards = [sum(map(ord, text)) % 2 == 0 for text in texts]
        assert len(turns) == verdict["turns"] and verdict["reward"] == sum(rewards) - (
            said["truncated"] and rewards[-1]
        )
    capfd.readouterr()
    assert tool.main(["compare", str(out), str(out)]) == 0
    assert "sampled_mean_reward" in capfd.readouterr().out


@pytest.mark.full
@pytest.mark.parametrize("layout", ["tensor", None])
def test_episodes_of_an_evaluation_are_the_same_on_two_ranks(directory, ranks, layout, tmp_path):
    cut = [f"parallel.{layout}_model_parallel_size=2"] if layout else []
    played = ("environment.name=sessions.Opened", "environment.max_turns=3")
    assert evaluate(ranks, directory, tmp_path / "one", *played) == [0]
    assert evaluate(ranks, directory, tmp_path / "two", *played, *cut, world_size=2) == [0, 0]
    assert_equal_but_for_rounding(*(read_lines(tmp_path / name / PROBLEMS) for name in ("two", "one")))


@pytest.mark.full
def test_with_hints_the_model_sees_the_hint_of_each_turn(directory, ranks, tmp_path):
    template = "data.teacher_template='{problem}H{solution}|'"
    played = (
        "--hinted",
        template,
        "environment.name=sessions.Hinting",
        "environment.max_turns=2",
        "--responses",
        "12",
        "--num-samples",
        "0",
    )
    assert evaluate(ranks, directory, tmp_path / "hinted", *played) == [0]
    for said in read_lines(tmp_path / "hinted" / RESPONSES):  # whose tokenizer writes _ for a letter
        assert said["prompt"].endswith("___H_____|"), "the text and the hint of the session: ' go' and 'north'"


def test_hinted_evaluation_shows_the_solution(directory, ranks, tmp_path):
    template = "data.teacher_template='{problem}H{solution}|'"
    options = ("--hinted", template, "--responses", "1", "--num-samples", "0")
    assert evaluate(ranks, directory, tmp_path / "hinted", *options) == [0]
    response = json.loads((tmp_path / "hinted" / RESPONSES).read_text())
    assert "H" in response["prompt"] and response["prompt"].endswith("|")
    metrics, first = (summary_of(tmp_path / "hinted")[name] for name in ("metrics", "first_step"))
    assert first["num_samples"] == 12 and 0 <= first["let_through"] < 1
    assert first["general_kl"] > 0 and first["specific_kl"] > 0 and first["why_no_controls"] is None
    names = (
        "accuracy",
        "mean_length",
        "truncated_share",
        "loop_share",
        "hint_8grams",
        "leak_words_per_1000",
        "quoted_hint_share",
    )
    names += ("ece", "brier", "ocg", "stated_confidence", *(["spr"] if 0 < metrics["greedy_accuracy"] < 1 else []))
    assert set(metrics) == {f"greedy_{name}" for name in names}


def test_two_evaluations_are_compared(directory, alone, ranks, tmp_path, capfd):
    assert evaluate(ranks, directory, tmp_path / "b", "seed=1", "--num-samples", "8", "rollout.temperature=0.5") == [0]
    assert tool.main(["compare", str(alone), str(tmp_path / "b"), "--out", str(tmp_path / "c" / "c.json")]) == 0
    shown = capfd.readouterr().out
    assert "avg_at_k" in shown and "temperature is 1.0 in A and 0.5 in B" in shown
    compared = json.loads((tmp_path / "c" / "c.json").read_text())
    of = {it["metric"]: it for it in compared["differences"]}
    assert of["avg_at_k"]["a"] == pytest.approx(summary_of(alone)["metrics"]["avg_at_4"])
    assert of["avg_at_k"]["b"] == pytest.approx(summary_of(tmp_path / "b")["metrics"]["avg_at_8"])
    assert of["avg_at_k"]["low"] <= of["avg_at_k"]["difference"] <= of["avg_at_k"]["high"]
    assert compared["num_problems"] == 12


def test_two_models_that_answer_nothing_are_not_called_equal(tmp_path, capsys):
    a, b = (write(tmp_path / name, [[False] * 5] * 6) for name in "ab")
    compared = compare(read_evaluation(a), read_evaluation(b))
    assert {it.probability_not_above for it in compared.differences if "_at_" in it.metric} == {None}
    show_comparison(compared)
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if "greedy_accuracy" in line or "_at_" in line]
    assert len(rows) == 4 and not any("1.0000" in row for row in rows)
    right = write(tmp_path / "c", [[False] * 5] * 5 + [[True] * 5])
    compared = compare(read_evaluation(a), read_evaluation(right))
    assert compared.differences[0].probability_not_above > 0
