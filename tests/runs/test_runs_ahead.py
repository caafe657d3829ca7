# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs whose servers generate the responses of later steps while the trainer trains on those of the present step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_run
from fake_vllm import FakeVllm, fake_servers
from served_runs import assert_same_steps, be_slow, is_slow, metrics_of, on
from tiny_run import saved_step, train

from megatron_selfdistill.train import EXIT_NO_ROLLOUT

PER_STEP = 16
"""The number of responses of a step."""
AHEAD = ["rollout.ahead=1", "rollout.max_staleness=1"]
KEEP = [*AHEAD, "rollout.at_update=keep"]


@pytest.fixture
def fakes() -> Iterator[list[FakeVllm]]:
    with fake_servers(2) as servers:
        be_slow(servers, 0.3)
        yield servers


def wait_for_new_weights(servers: list[FakeVllm]) -> None:
    """Let slow responses take until their server gets other weights, or two seconds."""

    def seconds_of(prompt: list[int], server: FakeVllm) -> float:
        first, deadline = server.version, time.monotonic() + 2
        while is_slow(prompt) and server.version == first and time.monotonic() < deadline:
            time.sleep(0.01)
        return 0.0

    for server in servers:
        server.seconds_of = lambda prompt, server=server: seconds_of(prompt, server)


@pytest.mark.timing
@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        pytest.param([], 1, marks=pytest.mark.full),
        ([], 2),
        pytest.param(["parallel.pipeline_model_parallel_size=2"], 2, marks=pytest.mark.full),
    ],
    ids=["one rank", "DP2", "PP2"],
)
def test_each_step_trains_once_on_the_responses_that_it_has_asked_for(ranks, fakes, data, tmp_path, layout, world_size):
    """The tokens of these servers depend on the prompt alone, so that other weights do not change them."""
    train(ranks, on(fakes, data, tmp_path / "turns", *layout), world_size)
    train(ranks, on(fakes, data, tmp_path / "ahead", *layout, *AHEAD), world_size)
    assert_same_steps(tmp_path / "turns", tmp_path / "ahead")
    assert sum(sum(fake.answered.values()) for fake in fakes) == 2 * 3 * PER_STEP
    steps = metrics_of(tmp_path / "ahead")
    assert [step["rollout/staleness_mean"] for step in steps] == [0, 1, 1]
    assert [step["rollout/staleness_max"] for step in steps] == [0, 1, 1]
    assert all(step["rollout/mixed_share"] == 0 for step in steps)
    assert steps[0]["overlap/share"] > 0 and steps[1]["overlap/share"] > 0


@pytest.mark.timing
def test_responses_under_way_take_the_new_weights(ranks, fakes, data, tmp_path):
    evaluation = ["evaluation.every=1", f"evaluation.path={data}/problems.jsonl", "evaluation.limit=4"]
    train(ranks, on(fakes, data, tmp_path / "turns"))
    wait_for_new_weights(fakes)
    train(ranks, on(fakes, data, tmp_path / "keep", *KEEP, *evaluation))
    assert_same_steps(tmp_path / "turns", tmp_path / "keep")
    steps = metrics_of(tmp_path / "keep")
    assert steps[0]["rollout/staleness_max"] == 0 and steps[0]["rollout/mixed_share"] == 0
    # The slow responses of the first two steps begin together, and none is under way when the weights change.
    assert 0 < steps[2]["rollout/mixed_share"] < 1
    assert 0 < steps[2]["rollout/staleness_mean"] < 1 == steps[2]["rollout/staleness_max"]


@pytest.mark.timing
@pytest.mark.full
def test_the_age_is_never_above_the_number_of_steps_ahead(ranks, fakes, data, tmp_path):
    ahead = ["rollout.ahead=2", "rollout.max_staleness=2", "num_steps=4", "rollout.num_samples=1"]
    train(ranks, on(fakes, data, tmp_path / "run", *ahead))
    assert [step["rollout/staleness_mean"] for step in metrics_of(tmp_path / "run")] == [0, 1, 2, 2]


def asked_to_stop_with_a_batch_ahead(arguments: list[str]) -> int:
    """Send this process a signal in the second step, once all fast responses of the third one are finished."""
    from megatron_selfdistill.trainer import Trainer

    pack = Trainer.pack

    def pack_and_signal(self: Any, batch: Any) -> Any:
        if self.step == 1:
            work = self.source._tickets[2].batch
            num_fast = sum(not is_slow(request.prompt) for request in work.requests)
            work.wait_for(lambda finished: len(finished) >= num_fast or None)
            os.kill(os.getpid(), signal.SIGTERM)
        return pack(self, batch)

    return tiny_run.start_with(arguments, Trainer, "pack", pack_and_signal)


@pytest.mark.timing
def test_a_run_that_stops_keeps_the_finished_responses_of_later_steps(ranks, fakes, data, tmp_path):
    train(ranks, on(fakes, data, tmp_path / "turns"))
    whole = fakes[0].answered + fakes[1].answered
    for fake in fakes:
        fake.restart()
    be_slow(fakes, 3.0)
    arguments = on(fakes, data, tmp_path / "stopped", *AHEAD, "checkpoint.save_every=0")
    train(ranks, arguments, start=asked_to_stop_with_a_batch_ahead)
    assert saved_step(tmp_path / "stopped") == 2 and (tmp_path / "stopped" / "stopped").exists()
    be_slow(fakes, 0.0)
    train(ranks, arguments)
    assert_same_steps(tmp_path / "turns", tmp_path / "stopped")
    answered = fakes[0].answered + fakes[1].answered
    fast = {prompt for prompt in whole if not is_slow(eval(prompt))}
    assert {prompt: answered[prompt] for prompt in fast} == {prompt: whole[prompt] for prompt in fast}
    ages = [step["rollout/staleness_mean"] for step in metrics_of(tmp_path / "stopped")]
    assert ages[:2] == [0, 1] and 0 < ages[2] < 1, "responses that are generated again have the present weights"


@pytest.mark.timing
def test_an_engine_that_fails_with_a_batch_ahead_loses_nothing(ranks, fakes, data, tmp_path):
    """The only server dies with a part of the third step's responses, while the trainer trains on the second one."""
    alone = fakes[:1]
    train(ranks, on(alone, data, tmp_path / "whole"))
    alone[0].restart()
    alone[0].die_at = 2 * PER_STEP + 12
    train(ranks, on(alone, data, tmp_path / "broken", *AHEAD), expected=EXIT_NO_ROLLOUT)
    assert saved_step(tmp_path / "broken") == 2
    alone[0].die_at = 0
    alone[0].restart()
    train(ranks, on(alone, data, tmp_path / "broken", *AHEAD))
    assert_same_steps(tmp_path / "whole", tmp_path / "broken")
    assert sum(alone[0].answered.values()) < PER_STEP, "some of its responses were in the checkpoint"


@pytest.mark.timing
@pytest.mark.parametrize("mode", [pytest.param(AHEAD, marks=pytest.mark.full), KEEP], ids=["wait", "keep"])
def test_a_server_that_dies_with_a_batch_ahead_leaves_its_requests_to_the_others(ranks, fakes, data, tmp_path, mode):
    train(ranks, on(fakes, data, tmp_path / "turns"))
    fakes[0].restart()
    fakes[0].die_at = PER_STEP + 4  # of the 32 requests of two steps, the first server has half
    train(ranks, on(fakes, data, tmp_path / "ahead", *mode))
    assert_same_steps(tmp_path / "turns", tmp_path / "ahead")
    assert metrics_of(tmp_path / "ahead")[-1]["rollout/servers_alive"] == 1
