# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs on fake servers: those that generate the responses of later steps during the present step, and those that lie.

Servers hold some responses of a step back until the trainer trains on the step before, and the trainer waits there for
the others: no order of events depends on time.  No step is trained on a lie that can be seen, and a guard stops the run
for other lies.
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from fake_vllm import FakeVllm, answer_to, fake_servers
from rounded_json import read_lines
from tiers import combinations
from tiny_run import overrides, reproducible_metrics, saved_step, start_and_listen, train

from megatron_selfdistill.data.tokenizer_files import load_tokenizer
from megatron_selfdistill.train import EXIT_NO_ROLLOUT, EXIT_UNHEALTHY

PER_STEP, NUM_HELD = 16, 8
"""The responses of a step, and those of them that the servers hold back."""
AHEAD = ["rollout.ahead=1", "rollout.max_staleness=1"]
KEEP = [*AHEAD, "rollout.at_update=keep"]
PP2 = "parallel.pipeline_model_parallel_size=2"
RESPONSES = ("length_mean", "truncated_share", "loop_share", "quoted_hint_share")
"""The metrics of the responses that two runs of the same steps have alike."""


@contextmanager
def ending_servers() -> Iterator[list[FakeVllm]]:
    """Yield two fake servers whose responses end with a stop token."""
    with fake_servers(2) as servers:
        for server in servers:
            server.vocab_size, server.ends = 10, True
        yield servers


def hold_back(servers: list[FakeVllm], prompts: Any, held: Path, until: Callable[[FakeVllm], bool]) -> None:
    """Let servers hold back the responses to ``prompts`` until ``until(server)``; the first one makes ``held``."""

    def seconds_of(prompt: list[int], server: FakeVllm) -> float:
        deadline = time.monotonic() + 120
        if prompt in prompts:
            held.touch()
            while not until(server) and time.monotonic() < deadline:
                time.sleep(0.01)
        return 0.0

    for server in servers:
        server.seconds_of = lambda prompt, server=server: seconds_of(prompt, server)


def on(servers: list[FakeVllm], data: Path, run_dir: Path, *more: str) -> list[str]:
    """Return the overrides of a run of three steps on ``servers``, whose log-probs are not those of the trainer."""
    addresses = ",".join(server.address for server in servers)
    options = [f"rollout.servers=[{addresses}]", "rollout.engine=vllm", "rollout.placement=server"]
    options += ["rollout.transfer=gloo", "rollout.num_samples=2", "num_steps=3", "checkpoint.save_every=1"]
    options += ["schedule.max_tokens=64", "guards.max_log_prob_distance=null"]
    return overrides(data, run_dir, *options, *more)


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return all metrics of each step, without those of evaluations."""
    return [line for line in read_lines(run_dir / "metrics.jsonl") if "loss/mean" in line]


def assert_same_steps(one: Path, other: Path) -> None:
    """Assert that two runs have the same losses, norms and weights, up to the order of sums."""
    runs = [[line for line in reproducible_metrics(run) if "loss/mean" in line] for run in (one, other)]
    pairs = list(zip(*runs, strict=True))
    assert len(pairs) == 3
    for first, second in pairs:
        for key in ("loss/mean", "gradient_norm", "entropy/student", "entropy/target"):
            assert first[key] == pytest.approx(second[key], rel=1e-4), key
        for key in ("tokens/response", "tokens/rollout", *(f"response/{name}" for name in RESPONSES)):
            assert first[key] == second[key], key


@pytest.fixture
def fakes() -> Iterator[list[FakeVllm]]:
    with ending_servers() as servers:
        yield servers


@pytest.fixture(scope="module")
def turns(ranks, data, tmp_path_factory) -> Callable[..., tuple[Path, Counter[str]]]:
    """Return a function to a run in which servers and trainer take turns, and to the number of answers by prompt."""

    @functools.cache
    def finished(*layout: str, world_size: int = 1) -> tuple[Path, Counter[str]]:
        run = tmp_path_factory.mktemp("turns") / "run"
        with ending_servers() as servers:
            train(ranks, on(servers, data, run, *layout, f"tests.record={run}/responses.jsonl"), world_size)
            return run, servers[0].answered + servers[1].answered

    return finished


@pytest.fixture(scope="module")
def prompts(turns, data) -> dict[int, list[list[int]]]:
    """Return the prompts of each step, of which the servers hold back the first half."""
    texts = {record["id"]: record["problem"] for record in read_lines(data / "problems.jsonl")}
    tokenizer, found = load_tokenizer(data / "tokenizer"), {step: [] for step in range(3)}
    for record in read_lines(turns()[0] / "responses.jsonl"):
        if record["sample_index"] == 0:
            found[record["step"]].append(tokenizer.encode(texts[record["problem_id"]]))
    return found


def start_and_meet(arguments: list[str], step: int, held: Path, met: Path, stop: bool) -> int:
    """Train; in ``step``, wait until servers hold responses of the next one; write ``met``, and stop if ``stop``."""
    from megatron_selfdistill.trainer import Trainer

    pack = Trainer.pack

    def pack_and_meet(self: Any, batch: Any) -> Any:
        if self.step == step and (work := self.source._tickets[step + 1].batch) is not None:
            work.wait_for(lambda finished: len(finished) >= PER_STEP - NUM_HELD or None)
            while not held.exists():
                time.sleep(0.01)
            met.touch()
            if stop:
                os.kill(os.getpid(), signal.SIGTERM)
        return pack(self, batch)

    return tiny_run.start_with(arguments, Trainer, "pack", pack_and_meet)


@pytest.mark.full
@pytest.mark.parametrize(("layout", "world_size"), [([], 1), ([], 2), ([PP2], 2)], ids=["one rank", "DP2", "PP2"])
def test_each_step_trains_once_on_the_responses_that_it_has_asked_for(
    ranks, fakes, turns, prompts, data, tmp_path, layout, world_size
):
    """The tokens of these servers depend on the prompt alone, so that other weights do not change them."""
    held, met = tmp_path / "held", tmp_path / "met"
    hold_back(fakes, prompts[1][: NUM_HELD // 2], held, lambda server: met.exists())
    how = {"start": start_and_meet, "step": 0, "held": held, "met": met, "stop": False}
    train(ranks, on(fakes, data, tmp_path / "ahead", *layout, *AHEAD), world_size, **how)
    one, answered = turns(*layout, world_size=world_size)
    assert_same_steps(one, tmp_path / "ahead")
    assert fakes[0].answered + fakes[1].answered == answered and sum(answered.values()) == 3 * PER_STEP
    steps = metrics_of(tmp_path / "ahead")
    assert [step["rollout/staleness_mean"] for step in steps] == [0, 1, 1]
    assert [step["rollout/staleness_max"] for step in steps] == [0, 1, 1]
    assert all(step["rollout/mixed_share"] == 0 for step in steps)
    assert steps[0]["overlap/share"] > 0


@pytest.mark.full
def test_responses_under_way_take_the_new_weights(ranks, fakes, turns, prompts, data, tmp_path):
    """An evaluation between two steps asks for others."""
    held, tokenizer = tmp_path / "held", load_tokenizer(data / "tokenizer")
    hold_back(fakes, prompts[2][: NUM_HELD // 2], held, lambda server: server.version == "2")
    asked = read_lines(data / "problems.jsonl")
    others = [record for record in asked if tokenizer.encode(record["problem"]) not in prompts[2]]
    (tmp_path / "held_out.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in others))
    evaluation = ["evaluation.every=1", f"evaluation.path={tmp_path}/held_out.jsonl", "evaluation.limit=4"]
    how = {"start": start_and_meet, "step": 1, "held": held, "met": tmp_path / "met", "stop": False}
    train(ranks, on(fakes, data, tmp_path / "keep", *KEEP, *evaluation), **how)
    assert_same_steps(turns()[0], tmp_path / "keep")
    steps = metrics_of(tmp_path / "keep")
    assert steps[0]["rollout/staleness_max"] == 0 and steps[0]["rollout/mixed_share"] == 0
    assert steps[2]["rollout/mixed_share"] == NUM_HELD / PER_STEP
    assert 0 < steps[2]["rollout/staleness_mean"] < 1 == steps[2]["rollout/staleness_max"]


def test_a_run_that_stops_keeps_the_finished_responses_of_later_steps(ranks, fakes, turns, prompts, data, tmp_path):
    held, released = tmp_path / "held", threading.Event()
    hold_back(fakes, prompts[2][: NUM_HELD // 2], held, lambda server: released.is_set())
    arguments = on(fakes, data, tmp_path / "stopped", *AHEAD, "checkpoint.save_every=0")
    train(ranks, arguments, start=start_and_meet, step=1, held=held, met=tmp_path / "met", stop=True)
    assert saved_step(tmp_path / "stopped") == 2 and (tmp_path / "stopped" / "stopped").exists()
    released.set()
    train(ranks, arguments)
    one, whole = turns()
    assert_same_steps(one, tmp_path / "stopped")
    answered, again = fakes[0].answered + fakes[1].answered, list(map(json.dumps, prompts[2][: NUM_HELD // 2]))
    fast = whole.keys() - set(again)
    assert len(again) == NUM_HELD // 2 and {p: answered[p] for p in fast} == {p: whole[p] for p in fast}
    ages = [step["rollout/staleness_mean"] for step in metrics_of(tmp_path / "stopped")]
    assert ages[:2] == [0, 1] and 0 < ages[2] < 1, "responses that are generated again have the present weights"


@pytest.mark.full
def test_an_engine_that_fails_with_a_batch_ahead_loses_nothing(ranks, fakes, turns, prompts, data, tmp_path):
    """The only server dies with a part of the third step's responses, while the trainer trains on the second one."""

    def dies(server: FakeVllm) -> bool:
        server.dead |= sum(server.answered.values()) >= 3 * PER_STEP - NUM_HELD
        return server.dead

    alone, arguments = fakes[:1], on(fakes[:1], data, tmp_path / "broken", *AHEAD)
    hold_back(alone, prompts[2][: NUM_HELD // 2], tmp_path / "held", dies)
    train(ranks, arguments, expected=EXIT_NO_ROLLOUT)
    assert saved_step(tmp_path / "broken") == 2
    hold_back(alone, [], tmp_path / "held", dies)
    alone[0].restart()
    train(ranks, arguments)
    assert_same_steps(turns()[0], tmp_path / "broken")
    assert 0 < sum(alone[0].answered.values()) < PER_STEP, "some of its responses were in the checkpoint"


@pytest.mark.full
@pytest.mark.parametrize("mode", [AHEAD, KEEP], ids=["wait", "keep"])
def test_a_server_that_dies_with_a_batch_ahead_leaves_its_requests_to_the_others(
    ranks, fakes, turns, data, tmp_path, mode
):
    fakes[0].die_at = PER_STEP + 4  # of the 32 requests of two steps, the first server has half
    train(ranks, on(fakes, data, tmp_path / "ahead", *mode))
    assert_same_steps(turns()[0], tmp_path / "ahead")
    assert metrics_of(tmp_path / "ahead")[-1]["rollout/servers_alive"] == 1


def output_of(ranks: Any, arguments: list[str], expected: int) -> str:
    shown = [*arguments, "metrics.console_every=1", "metrics.show_samples=0"]
    [(status, output)] = ranks.run(start_and_listen, shown, world_size=1, init_process_group=False)
    assert status == expected and "Traceback" not in output, output
    return str(output)


def test_a_server_with_the_log_probs_of_another_model_stops_the_run_and_is_named(ranks, fakes, data, tmp_path):
    for fake in fakes:
        fake.log_prob = -30.0
    guarded = on(fakes, data, tmp_path / "run", "num_steps=5", "guards.max_log_prob_distance=1.0")
    output = output_of(ranks, guarded, EXIT_UNHEALTHY)
    assert output.count("warning: the log-probs that") == 1 and "step 3: the log-probs that" in output
    assert all(output.count(fake.address) == 2 for fake in fakes), "in the warning and in the reason of the stop"
    assert saved_step(tmp_path / "run") == len(metrics_of(tmp_path / "run")) == 3


FAULTS = {"token ids": {"vocab_size": 10**6}, "log-probs": {"log_prob": math.nan}}
FAULTS |= {"form": {"texts": {"/v1/models": '{"data": 7}'}}, "endless": {"endless_at": "/inference/v1/generate"}}


@combinations(fault=FAULTS, quick={"fault": ["token ids"]})
def test_a_run_ends_before_it_trains_on_an_answer_that_cannot_be_true(ranks, fakes, data, tmp_path, fault):
    for fake in fakes:
        vars(fake).update(fault)
    output = output_of(ranks, on(fakes, data, tmp_path / "run"), EXIT_NO_ROLLOUT)
    assert any(fake.address in output for fake in fakes)
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not metrics_of(tmp_path / "run")


@pytest.mark.full
def test_a_token_that_only_pads_the_output_layer_is_refused_and_the_last_token_is_not(ranks, fakes, data, tmp_path):
    vocab_size = load_tokenizer(str(data / "tokenizer")).vocab_size
    assert vocab_size % 8, "the output layer is padded to a multiple of 8"
    for token, expected in ((vocab_size - 1, 0), (vocab_size, EXIT_NO_ROLLOUT)):
        answer = answer_to({"token_ids": [1], "sampling_params": {"max_tokens": 14}}, ("0", "0"))
        choice = answer["choices"][0]
        choice["token_ids"] = [token] * 14
        choice["logprobs"]["content"] = [{"token_id": token, "logprob": -0.5}] * 14
        for fake in fakes:
            fake.restart()
            fake.says = json.dumps(answer)
        output = output_of(ranks, on(fakes, data, tmp_path / str(token), "num_steps=1"), expected)
    assert f"expected 0 to {vocab_size - 1}" in output


@pytest.mark.full
def test_responses_ahead_have_the_horizon_of_the_step_that_trains_on_them(ranks, data, tmp_path):
    with fake_servers(2) as fakes:
        fakes[0].vocab_size = fakes[1].vocab_size = 10
        train(ranks, on(fakes, data, tmp_path / "run", *AHEAD, "rollout.horizon=[3,9,2]"))
    steps = metrics_of(tmp_path / "run")
    assert [step["response/length_max"] for step in steps] == [step["rollout/horizon"] for step in steps] == [3, 6, 9]
    assert all(step["response/unfinished_share"] == 1 for step in steps)
