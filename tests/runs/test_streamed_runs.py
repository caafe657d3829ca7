# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs that train on finished responses while servers generate the others."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_run
from fake_vllm import FakeVllm, fake_servers
from served_runs import assert_same_steps, be_slow, metrics_of, on
from taught import write_records_of_teachers
from tiny_run import overrides, refusal, reproducible_metrics, saved_step, train

from megatron_selfdistill.train import EXIT_NO_ROLLOUT

pytestmark = pytest.mark.timing


@pytest.fixture
def fakes() -> Iterator[list[FakeVllm]]:
    with fake_servers(2) as servers:
        be_slow(servers, 0.5)
        yield servers


OVERLAPPED = ["optimizer.overlap_grad_reduce=true", "optimizer.use_distributed_optimizer=true"]
STREAM = ["rollout.overlap=stream", "rollout.partial_batch_microbatches=2"]


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        ([], 2),
        pytest.param(["parallel.pipeline_model_parallel_size=2"], 2, marks=pytest.mark.full),
        pytest.param(
            OVERLAPPED,
            2,
            marks=pytest.mark.full,
        ),
    ],
    ids=["DP2", "PP2", "DP2 with overlapped reduction"],
)
def test_a_streamed_run_takes_the_steps_of_one_that_waits_for_all_responses(
    ranks, fakes, data, tmp_path, layout, world_size
):
    train(ranks, on(fakes, data, tmp_path / "turns", *layout), world_size)
    train(ranks, on(fakes, data, tmp_path / "stream", *layout, *STREAM), world_size)
    assert_same_steps(tmp_path / "turns", tmp_path / "stream")
    partial_batches = [line["rollout/partial_batches"] for line in metrics_of(tmp_path / "stream")]
    assert max(partial_batches) > 1, "fast responses are trained on before slow ones come"
    shares = [line["overlap/share"] for line in metrics_of(tmp_path / "stream")]
    assert 0 < max(shares) < 1
    assert all(line["overlap/share"] < 0.1 for line in metrics_of(tmp_path / "turns"))


@pytest.mark.parametrize(
    "options",
    [[], pytest.param(["teachers.trained.transformer={masked_softmax_fusion: false}"], marks=pytest.mark.full)],
    ids=["its weights", "a model of its own"],
)
def test_a_streamed_run_divides_each_partial_batch_by_teacher(ranks, fakes, own_data, finished, tmp_path, options):
    """A replica may have no context of a teacher in a partial batch."""
    file = write_records_of_teachers(own_data, ["trained", None])
    taught = [f"data.path={file}", f"teachers.trained.load={finished}/checkpoints", "teachers.default.hint=given"]
    taught += options
    train(ranks, on(fakes, own_data, tmp_path / "turns", *taught), 2)
    train(ranks, on(fakes, own_data, tmp_path / "stream", *taught, *STREAM), 2)
    assert_same_steps(tmp_path / "turns", tmp_path / "stream")
    train(ranks, on(fakes, own_data, tmp_path / "default", f"data.path={file}"), 2)
    losses = [[line["loss/mean"] for line in metrics_of(tmp_path / name)] for name in ("turns", "default")]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3), "the other teacher counts"


def test_rewards_and_recorded_responses_are_those_of_whole_groups(ranks, fakes, data, tmp_path):
    recorded = tmp_path / "recorded.jsonl"
    rewards = ["method.name=grpo", "method.weight=1", "method.reward=tiny_run.starts_with_an_even_token"]
    train(ranks, on(fakes, data, tmp_path / "stream", *STREAM, *rewards, f"rollout.record={recorded}"))
    replay = [f"rollout.replay={recorded}", "rollout.engine=megatron", "rollout.placement=colocated"]
    train(ranks, [*on(fakes, data, tmp_path / "replay", *rewards), "rollout.servers=[]", *replay])
    for streamed, replayed in zip(
        reproducible_metrics(tmp_path / "stream"), reproducible_metrics(tmp_path / "replay"), strict=True
    ):
        for key in ("rewards/mean", "rewards/mixed_groups", "rewards/trained_share", "loss/mean"):
            assert streamed[key] == pytest.approx(replayed[key], rel=1e-5, abs=1e-7), key


def test_an_engine_that_fails_between_partial_batches_loses_nothing(ranks, fakes, data, tmp_path):
    """Step 2 fails after its first responses; the run that goes on redoes it and counts no response twice."""
    alone = fakes[:1]
    train(ranks, on(alone, data, tmp_path / "whole", *STREAM))
    alone[0].restart()
    alone[0].die_at = 16 + 12  # a step has 16 responses
    train(ranks, on(alone, data, tmp_path / "broken", *STREAM), expected=EXIT_NO_ROLLOUT)
    assert saved_step(tmp_path / "broken") == 1
    alone[0].die_at = 0
    alone[0].restart()
    train(ranks, on(alone, data, tmp_path / "broken", *STREAM))
    assert_same_steps(tmp_path / "whole", tmp_path / "broken")


def asked_to_stop_in_the_first_partial_batch(arguments: list[str]) -> int:
    """Send this process a signal in the second step, when its slow responses are still being generated."""
    from megatron_selfdistill.trainer import Trainer

    pack = Trainer.pack

    def pack_and_signal(self: Any, batch: Any) -> Any:
        if self.step == 1 and not batch.ends_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return pack(self, batch)

    return tiny_run.start_with(arguments, Trainer, "pack", pack_and_signal)


def test_a_signal_between_partial_batches_lets_the_step_finish(ranks, fakes, data, tmp_path):
    arguments = on(fakes, data, tmp_path / "stopped", *STREAM, "checkpoint.save_every=0")
    train(ranks, arguments, start=asked_to_stop_in_the_first_partial_batch)
    assert saved_step(tmp_path / "stopped") == 2 and (tmp_path / "stopped" / "stopped").exists()
    train(ranks, arguments)
    train(ranks, on(fakes, data, tmp_path / "whole", *STREAM))
    assert_same_steps(tmp_path / "whole", tmp_path / "stopped")


REFUSED: dict[str, tuple[list[str], str]] = {
    "an engine of the trainer": (["rollout.overlap=stream"], "needs rollout.engine=vllm and rollout.placement=server"),
    "a selection": (["method.select=hint_functions.without_last_character"], "looks at all responses of a step"),
    "balanced groups": (["method.name=uni_opd"], "method.name=uni_opd looks at all responses of a step"),
    "own solutions": (["method.name=own_solutions"], "method.name=own_solutions looks at all responses of a step"),
    "a mean over responses": (["loss.normalize=sequences"], "divides by the number of responses or problems"),
    "guidance": (["rollout.guidance=mixed"], "guided rollouts are sampled in process: set rollout.engine=megatron"),
    "a replay": (["rollout.replay=some.jsonl"], "this run samples none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_all_responses_of_a_step_is_refused(ranks, data, tmp_path, name):
    more, message = REFUSED[name]
    served = ["rollout.engine=vllm", "rollout.placement=server", "rollout.num_servers=1", "rollout.num_samples=2"]
    wanted = [*served, *STREAM] if name != "an engine of the trainer" else []
    assert message in refusal(ranks, overrides(data, tmp_path / "run", *wanted, *more))
