# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""``selfdistill evaluate``: whole evaluations of a tiny model, from both formats, on one rank and on two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
from rounded_json import assert_equal_but_for_rounding, read_lines
from tiers import combinations

from megatron_selfdistill.evaluation.evaluation_directory import PROBLEMS, RESPONSES, SUMMARY
from megatron_selfdistill.instruments.evaluate import evaluate_command as tool

TOOL = tiny_run.REPOSITORY / "tools" / "evaluate.py"
SETTINGS = (
    *("optimizer=fp32", "rollout.max_new_tokens=14", "rollout.kv_cache_gb=0.1"),
    "evaluation.verifier=tiny_run.starts_with_an_even_token",
)
OPTIONS = ("--pass-at-k", "1", "2", "4", "--majority-at-k", "3", "rollout.top_k=15")
TEMPLATE = "data.teacher_template='{problem}H{solution}|'"


def arguments(directory: Path, out: Path, *more: str, model: str = "megatron") -> list[str]:
    model_and_data = [f"--{model}", str(directory / model), "--data", str(directory / "problems.jsonl")]
    return [*model_and_data, "--out", str(out), "--num-samples", "4", *SETTINGS, *more]


def evaluate(ranks, *args, world_size: int = 1) -> list[int]:
    return ranks.run(tool.main, arguments(*args), world_size=world_size, init_process_group=False)


@pytest.fixture(scope="module")
def alone(untrained, ranks, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("results") / "alone"
    assert evaluate(ranks, untrained, out, *OPTIONS) == [0]
    return out


def summary_of(out: Path) -> dict:
    return json.loads((out / SUMMARY).read_text())


def test_the_files_say_what_was_measured(untrained, alone):
    summary, lines = summary_of(alone), read_lines(alone / PROBLEMS)
    ids = [line["id"] for line in read_lines(untrained / "problems.jsonl")]
    assert [line["id"] for line in lines] == ids and {len(line["samples"]) for line in lines} == {4}
    metrics, samples = summary["metrics"], [sample for line in lines for sample in line["samples"]]
    assert metrics["avg_at_4"] == sum(sample["correct"] for sample in samples) / 48 > 0
    assert metrics["greedy_accuracy"] == sum(line["greedy"]["correct"] for line in lines) / 12
    assert metrics["sampled_mean_length"] == sum(sample["length"] for sample in samples) / 48
    assert metrics["pass_at_2"] == pytest.approx(sum(line["pass_at_k"]["2"] for line in lines) / 12)
    names = "avg_at_4 pass_at_1 pass_at_2 pass_at_4 majority_at_3 pass_over_avg_at_2 pass_over_avg_at_4"
    assert {name for name in metrics if "_at_" in name} == set(names.split())
    brier = sum((sample["confidence"] - sample["correct"]) ** 2 for sample in samples) / 48
    assert metrics["sampled_brier"] == pytest.approx(brier) and metrics["sampled_stated_confidence"] == 0
    assert 0 < min(sample["confidence"] for sample in samples) < max(sample["confidence"] for sample in samples) < 1
    assert metrics["distinct_4grams"] == pytest.approx(sum(line["distinct_4grams"] for line in lines) / 12)
    assert metrics["distinct_right"] == sum(line["distinct_right"] for line in lines) / 12 > 0
    assert summary["model"] == {"format": "megatron", "path": str(untrained / "megatron" / "release"), "iteration": 0}
    assert summary["settings"]["top_k"] == 15 and "first_step" not in summary and summary["data"]["num_problems"] == 12
    assert {path.name for path in alone.iterdir()} == {SUMMARY, PROBLEMS}
    assert [path.name for path in alone.parent.iterdir()] == ["alone"]


@pytest.mark.full
@combinations(layout=["TP2", "PP2", "DP2"])
def test_two_ranks_write_the_same_files(untrained, alone, ranks, layout, tmp_path):
    options = (*OPTIONS, *tiny_run.TWO_RANKS[layout])
    assert evaluate(ranks, untrained, tmp_path / "two", *options, world_size=2) == [0, 0]
    for name in (SUMMARY, PROBLEMS):
        assert_equal_but_for_rounding(*(read_lines(directory / name) for directory in (tmp_path / "two", alone)))


@pytest.mark.full
def test_a_hugging_face_directory_gives_the_results_of_its_checkpoint_and_leaves_nothing_behind(
    untrained, alone, tmp_path
):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(TOOL)]
    command += arguments(untrained, tmp_path / "results" / "hf", *OPTIONS, model="hf")
    paths = os.pathsep.join([str(tiny_run.REPOSITORY), str(tiny_run.REPOSITORY / "tests" / "support")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("majority_at_3") == 1, "one rank prints"
    assert done.stderr.count("computed in float32, the type of the weights\n") == 1
    hf, megatron = summary_of(tmp_path / "results" / "hf"), summary_of(alone)
    assert hf.pop("model") == {"format": "hugging_face", "path": str(untrained / "hf"), "iteration": None}
    megatron.pop("model")
    assert_equal_but_for_rounding(hf, megatron)
    assert_equal_but_for_rounding(*(read_lines(out / PROBLEMS) for out in (tmp_path / "results" / "hf", alone)))
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["hf"]


def test_two_evaluations_are_compared_and_responses_are_written_when_asked(untrained, alone, ranks, tmp_path, capfd):
    out = tmp_path / "b"
    options = ("seed=1", "--num-samples", "8", "rollout.temperature=0.5", "--responses", "2")
    assert evaluate(ranks, untrained, out, *options) == [0]
    responses = read_lines(out / RESPONSES)
    assert [it["sample"] for it in responses] == [None, *range(8)] * 2
    assert responses[0]["prompt"].startswith(responses[0]["problem_id"])
    assert set(summary_of(out)["metrics"]) >= {"pass_at_4", "majority_at_4"}
    assert tool.main(["compare", str(alone), str(out), "--out", str(tmp_path / "c" / "c.json")]) == 0
    assert "temperature is 1.0 in A and 0.5 in B" in capfd.readouterr().out
    compared = json.loads((tmp_path / "c" / "c.json").read_text())
    avg = next(it for it in compared["differences"] if it["metric"] == "avg_at_k")
    assert avg["a"] == pytest.approx(summary_of(alone)["metrics"]["avg_at_4"])
    assert avg["b"] == pytest.approx(summary_of(out)["metrics"]["avg_at_8"])
    assert avg["low"] <= avg["difference"] <= avg["high"] and compared["num_problems"] == 12


@pytest.mark.full
@pytest.mark.parametrize("layout", ["TP2", "DP2"])
def test_episodes_of_an_evaluation_are_the_same_on_two_ranks(untrained, ranks, layout, tmp_path):
    played = ("environment.name=sessions.Opened", "environment.max_turns=3")
    assert evaluate(ranks, untrained, tmp_path / "one", *played) == [0]
    assert evaluate(ranks, untrained, tmp_path / "two", *played, *tiny_run.TWO_RANKS[layout], world_size=2) == [0, 0]
    assert_equal_but_for_rounding(*(read_lines(tmp_path / name / PROBLEMS) for name in ("two", "one")))


def test_hinted_evaluation_shows_the_solution(untrained, ranks, tmp_path):
    options = ("--hinted", TEMPLATE, "--responses", "1", "--num-samples", "0")
    assert evaluate(ranks, untrained, tmp_path / "hinted", *options) == [0]
    response = json.loads((tmp_path / "hinted" / RESPONSES).read_text())
    assert "H" in response["prompt"] and response["prompt"].endswith("|")
    metrics, first = (summary_of(tmp_path / "hinted")[name] for name in ("metrics", "first_step"))
    assert first["num_samples"] == 12 and 0 <= first["let_through"] < 1
    assert first["general_kl"] > 0 and first["specific_kl"] > 0 and first["why_no_controls"] is None
    assert "greedy_quoted_hint_share" in metrics and not any(name.startswith("sampled") for name in metrics)
