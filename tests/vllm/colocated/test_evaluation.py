# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""`selfdistill evaluate` with the real vLLM: greedy responses, verdicts and files as with the trainer's sampler."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import hf_models
import pytest
import tiny_run
from rounded_json import assert_equal_but_for_rounding, read_lines

from megatron_selfdistill.commands import evaluate as evaluate_command
from megatron_selfdistill.evaluation.evaluations import compare, read_evaluation

TIMEOUT = 600.0
SETTINGS = (
    "optimizer=fp32",
    "rollout.max_new_tokens=14",
    "rollout.kv_cache_gb=0.1",
    "evaluation.verifier=tiny_run.starts_with_an_even_token",
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("evaluation")
    tiny_run.write_data(directory, 12)
    hf_models.write("qwen3", directory / "hf", vocab_size=23, head_dim=32)  # vLLM on a CPU has no smaller heads
    for path in (directory / "tokenizer").iterdir():
        shutil.copy(path, directory / "hf" / path.name)
    return directory


def run_command(arguments: list[str]) -> int:
    return evaluate_command.main(arguments)


def evaluate(ranks, directory: Path, name: str, *options: str, world_size: int = 1) -> Path:
    arguments = [
        "--hf",
        str(directory / "hf"),
        "--data",
        str(directory / "problems.jsonl"),
        "--out",
        str(directory / name),
    ]
    arguments += ["--num-samples", "8", *SETTINGS, *options]
    assert (
        ranks.run(run_command, arguments, world_size=world_size, init_process_group=False, timeout=TIMEOUT)
        == [0] * world_size
    )
    return directory / name


def greedy_verdicts(out: Path) -> list[dict]:
    return [json.loads(line)["greedy"] for line in (out / "problems.jsonl").read_text().splitlines()]


def test_either_sampler_evaluates_a_hugging_face_directory(ranks, directory):
    trainers = evaluate(ranks, directory, "megatron")
    vllms = evaluate(ranks, directory, "vllm", "rollout.engine=vllm")
    on_two = evaluate(
        ranks, directory, "two", "rollout.engine=vllm", "parallel.tensor_model_parallel_size=2", world_size=2
    )
    assert_equal_but_for_rounding(greedy_verdicts(trainers), greedy_verdicts(vllms), relative=1e-2)
    assert any(verdict["answer"] for verdict in greedy_verdicts(vllms))
    assert_equal_but_for_rounding(*(read_lines(out / "problems.jsonl") for out in (vllms, on_two)), relative=1e-2)
    compared = compare(read_evaluation(trainers), read_evaluation(vllms))
    assert compared.other_settings == {"engine": ["megatron", "vllm colocated"]}
    sampled = next(it for it in compared.differences if it.metric == "sampled_mean_length")
    assert abs(sampled.difference) < 2, "one distribution, other random numbers"
