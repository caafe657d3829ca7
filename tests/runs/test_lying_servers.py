# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs whose servers lie: no step is trained on a lie that can be seen, and a guard stops the run for other lies."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from fake_vllm import FakeVllm, answer_to, fake_servers
from served_runs import metrics_of, on
from tiny_run import saved_step, start_and_listen

from megatron_selfdistill.data.tokenizer_files import load_tokenizer
from megatron_selfdistill.train import EXIT_NO_ROLLOUT, EXIT_UNHEALTHY

GUARDED = "guards.max_log_prob_distance=1.0"


@pytest.fixture
def fakes() -> Iterator[list[FakeVllm]]:
    with fake_servers(2) as servers:
        for server in servers:
            server.vocab_size, server.ends = 10, True
        yield servers


def output_of(ranks: Any, arguments: list[str], expected: int) -> str:
    """Start a run on one rank, which must end with the status ``expected``; return what it prints."""
    shown = [*arguments, "metrics.console_every=1", "metrics.show_samples=0"]
    [(status, output)] = ranks.run(start_and_listen, shown, world_size=1, init_process_group=False)
    assert status == expected, output
    assert "Traceback" not in output
    return str(output)


def test_a_server_with_the_log_probs_of_another_model_stops_the_run_and_is_named(ranks, fakes, data, tmp_path):
    for fake in fakes:
        fake.log_prob = -30.0
    output = output_of(ranks, on(fakes, data, tmp_path / "run", "num_steps=5", GUARDED), EXIT_UNHEALTHY)
    assert output.count("warning: the log-probs that") == 1
    assert all(output.count(fake.address) == 2 for fake in fakes), "in the warning and in the reason of the stop"
    assert "step 3: the log-probs that" in output and "old weights, or another model, tokenizer" in output
    assert saved_step(tmp_path / "run") == len(metrics_of(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ({"vocab_size": 10**6}, "token ids"),
        pytest.param({"log_prob": math.nan}, "log-probs nan", marks=pytest.mark.full),
        pytest.param(
            {"texts": {"/v1/models": '{"data": 7}'}}, "expected an answer of another form", marks=pytest.mark.full
        ),
        pytest.param({"endless_at": "/inference/v1/generate"}, "expected an answer of at", marks=pytest.mark.full),
    ],
    ids=["token ids", "log-probs", "form", "endless response"],
)
def test_a_run_ends_before_it_trains_on_an_answer_that_cannot_be_true(ranks, fakes, data, tmp_path, fault, why):
    for fake in fakes:
        vars(fake).update(fault)
    output = output_of(ranks, on(fakes, data, tmp_path / "run"), EXIT_NO_ROLLOUT)
    assert why in output and any(fake.address in output for fake in fakes)
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not metrics_of(tmp_path / "run")


@pytest.mark.full
def test_a_token_that_only_pads_the_output_layer_is_refused_and_the_last_token_is_not(ranks, fakes, data, tmp_path):
    vocab_size = load_tokenizer(str(data / "tokenizer")).vocab_size
    assert vocab_size % 8, "the output layer is padded to a multiple of 8"
    for fake in fakes:
        fake.says = always(vocab_size - 1)
    output_of(ranks, on(fakes, data, tmp_path / "run", "num_steps=1"), 0)
    for fake in fakes:
        fake.restart()
        fake.says = always(vocab_size)
    output = output_of(ranks, on(fakes, data, tmp_path / "other", "num_steps=1"), EXIT_NO_ROLLOUT)
    assert f"expected 0 to {vocab_size - 1}" in output


def always(token: int) -> str:
    """Return the answer of a server that repeats a token, with the first weights."""
    answer = answer_to({"token_ids": [1], "sampling_params": {"max_tokens": 14}}, ("0", "0"))
    choice = answer["choices"][0]
    choice["token_ids"] = [token] * 14
    choice["logprobs"]["content"] = [{"token_id": token, "logprob": -0.5}] * 14
    return json.dumps(answer)
