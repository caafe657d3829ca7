# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs on logged conversations: nothing is sampled, nothing is quoted, unlikely turns are weighted in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from tiny_run import (
    TWO_RANKS,
    assert_resumes_equal,
    overrides,
    reproducible_metrics,
    train,
    train_each,
    write_chats,
    write_conversations,
)

from megatron_selfdistill.metrics.run_log import read_samples

SECRET = "314-159:2653"  # of characters that the tokenizer knows


@pytest.fixture(scope="module")
def logs(own_data) -> Path:
    """Return ``own_data`` with 40 conversations of two assistant turns, and three bad ones."""
    from _lib import subtraction

    chats = [
        (subtraction.problem_text(a, b), f"{i:03d};{b:03d}", "X", f"{SECRET};{subtraction.answer(a, b)}", "thanks")
        for i, (a, b) in enumerate(subtraction.distinct(40, "train", seed=1))
    ]
    write_conversations(own_data, [*chats, chats[0][:4], (SECRET, "1" * 300, "thanks")])
    file = own_data / "chats.jsonl"
    *lines, too_long = file.read_text().splitlines(keepends=True)
    bad = json.dumps({"messages": [{"role": SECRET, "content": SECRET}]})
    file.write_text("".join([*lines, f"{bad}\n", too_long]))
    return own_data


def chats(logs: Path, run_dir: Path, *more: str) -> list[str]:
    options = ["recipe=chat_logs", f"data.path={logs}/chats.jsonl", f"data.chat_template={logs}/template.jinja"]
    return overrides(logs, run_dir, *options, *more)


def start_where_no_sampler_can_be_built(arguments: list[str]) -> int:
    from megatron_selfdistill.sources import configured_source

    def refuse(*_: Any) -> Any:
        raise AssertionError("a sampler was built")

    return tiny_run.start_with(arguments, configured_source, "make_sampler", refuse)


WEIGHTS = ["num_steps=2", "method.min_log_prob=-3.75", "method.unlikely=down_weight"]
ALL_TURNS = ["num_steps=1", "data.global_batch_size=80", "checkpoint.save_every=0"]


@pytest.fixture(scope="module")
def runs(ranks, logs, start, tmp_path_factory) -> Path:
    """Return a directory of short runs of one rank, which one process has made: its tests read the runs."""
    directory = tmp_path_factory.mktemp("runs")
    evaluated = [f"evaluation.path={logs}/problems.jsonl", "evaluation.every=1", "evaluation.limit=4"]
    sampled = ["conversations.responses=sampled", f"tests.record={directory}/recorded.jsonl"]
    options = {
        "weighted": [start, *WEIGHTS],
        **{
            f"unlikely below {threshold}": [*ALL_TURNS, f"method.min_log_prob={threshold}"]
            for threshold in ("null", "-100", "0")
        },
        "shown and evaluated": ["num_steps=1", "conversations.show_contents=true", *evaluated],
        "sampled": ["num_steps=1", *sampled],
    }
    train_each(ranks, [chats(logs, directory / name, *more) for name, more in options.items()])
    return directory


def test_the_run_trains_on_the_logged_tokens_of_assistants_alone(runs):
    """All turns are in one batch, so the tokens are countable: 7 characters or 16, and the end of the turn."""
    [line] = reproducible_metrics(runs / "unlikely below null")
    wrong, accepted = 40 * (7 + 1), 40 * (len(SECRET) + 4 + 1)
    assert line["tokens/response"] == line["tokens/rollout"] == wrong + accepted
    assert line["turns/accepted_token_share"] == pytest.approx(accepted / (wrong + accepted))


def test_evaluation_builds_the_sampler_when_it_is_due(runs):
    assert "evaluation/greedy_accuracy" in reproducible_metrics(runs / "shown and evaluated")[-1]


def test_turns_can_be_sampled_anew(runs):
    records = [json.loads(line) for line in (runs / "recorded.jsonl").read_text().splitlines()]
    assert len(records) == 8 and all(len(record["token_ids"]) <= 14 for record in records)
    assert all("sampler/log_prob_mean_abs_diff" in line for line in reproducible_metrics(runs / "sampled"))


def test_dropping_all_turns_leaves_no_gradient_and_dropping_none_changes_nothing(runs):
    off, none, all_ = (reproducible_metrics(runs / f"unlikely below {threshold}")[0] for threshold in ("null", -100, 0))
    assert none["gradient_norm"] == off["gradient_norm"] > 0
    assert (none["turns/unlikely_share"], all_["turns/unlikely_share"]) == (0, 1)
    assert all_["gradient_norm"] == 0 and all_["loss/mean"] == off["loss/mean"] > 0


def test_turns_are_shown_where_the_user_asks_for_it(runs):
    samples = read_samples(runs / "shown and evaluated")
    assert len(samples) == 2 and all(sample["solution"].startswith(f"{SECRET};") for sample in samples)
    assert all(sample["response"].endswith("$") and sample["tokens"]["teacher_log_prob"] for sample in samples)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["DP2", "CP2", "PP2"])
def test_unlikely_turns_are_the_same_in_every_layout(ranks, logs, start, runs, tmp_path, layout):
    train(ranks, chats(logs, tmp_path / "many", start, *WEIGHTS, *TWO_RANKS[layout]), 2)
    for one, many in zip(reproducible_metrics(runs / "weighted"), reproducible_metrics(tmp_path / "many"), strict=True):
        assert 0 < one["turns/unlikely_share"] < 1, "the threshold divides the turns"
        for key in (key for key in one if key.startswith(("turns/", "gradient_norm", "loss/"))):
            assert many[key] == pytest.approx(one[key], rel=2e-4), key


@pytest.mark.full
def test_nothing_of_a_log_reaches_metrics_console_or_the_run_directory(ranks, logs, tmp_path):
    arguments = chats(logs, tmp_path / "run", "metrics.console_every=1", "num_steps=1", "data.global_batch_size=81")
    failing = [*arguments, "data.on_bad_record=error", f"run_dir={tmp_path}/other"]
    (status, output), (failed, refusal) = (
        ranks.run(tiny_run.start_and_listen, of_run, world_size=1, init_process_group=False)[0]
        for of_run in (arguments, failing)
    )
    assert status == 0, output
    skipped = (tmp_path / "run" / "skipped.txt").read_text()
    written = [output, skipped, *((tmp_path / "run" / name).read_text() for name in ("metrics.jsonl", "config.yaml"))]
    assert not any(SECRET in text or "thanks" in text for text in written)
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    assert output.count("metrics.show_samples: no samples, since conversations.show_contents=false") == 1
    assert "41 conversations, the accepted answer of 0 marked in the log and of 41 found by the rule" in output
    assert "skipped as unresolved: 1, as bad: 1" in output
    assert [line.partition(": ")[0].rpartition("chats.jsonl:")[2] for line in skipped.splitlines()] == [
        "41",
        "42",
        "43, message 1",
    ]
    assert f"listed in {tmp_path}/run/skipped.txt" in output and "turns were read: 6" in output
    [line] = reproducible_metrics(tmp_path / "run")
    assert line["turns/skipped_long"] >= 1 and line["turns/skipped_bad"] == 0
    assert failed == 2 and "chats.jsonl:41: unresolved" in refusal and SECRET not in refusal


NUM_GOOD, NUM_LONG, NUM_BROKEN = 40, 20, 10


@pytest.fixture(scope="module")
def mixed(logs) -> str:
    """Return the override that names a log of conversations with one turn each.

    Some replies are good, some are too long, and some contain the token that ends a turn.
    """
    good = [f"{number:03d}" * (1 + number % 3) for number in range(NUM_GOOD)]
    write_chats(logs, [*good, *["1" * 300] * NUM_LONG, *["1$1"] * NUM_BROKEN], "mixed.jsonl")
    return f"data.path={logs}/mixed.jsonl"


def lines_listed(run_dir: Path) -> list[int]:
    text = (run_dir / "skipped.txt").read_text()
    return [int(line.partition(", message 1: ")[0].rpartition(":")[2]) for line in text.splitlines()]


def test_a_run_on_logs_builds_no_sampler_lists_unusable_turns_once_and_resumes_bit_for_bit(
    ranks, logs, mixed, tmp_path
):
    """Almost two epochs of all turns, so that some unusable ones come up twice."""

    def arguments(run_dir: Path) -> list[str]:
        return chats(logs, run_dir, mixed, "data.global_batch_size=18", "num_steps=4", "checkpoint.save_every=3")

    no_sampler = {"start": start_where_no_sampler_can_be_built}
    train(ranks, arguments(tmp_path / "whole"), **no_sampler)
    lines = reproducible_metrics(tmp_path / "whole")
    assert [line["turns/count"] for line in lines] == [18] * 4
    assert all(line["turns/log_prob_min"] <= line["turns/log_prob_mean"] < 0 for line in lines)
    assert not any(key.startswith(("sampler/", "correction/", "turns/unlikely")) for line in lines for key in line)
    assert sum(line["turns/skipped_long"] for line in lines) > NUM_LONG
    assert sum(line["turns/skipped_bad"] for line in lines) > NUM_BROKEN
    assert sorted(lines_listed(tmp_path / "whole")) == list(range(NUM_GOOD + 1, NUM_GOOD + NUM_LONG + NUM_BROKEN + 1))
    halves = assert_resumes_equal(ranks, tmp_path / "whole", arguments, step=3, num_steps=4, **no_sampler)
    assert lines_listed(halves) == lines_listed(tmp_path / "whole"), "nothing is listed twice"


@pytest.mark.full
def test_the_turns_of_a_step_do_not_depend_on_the_number_of_replicas(ranks, logs, start, mixed, tmp_path):
    found = {}
    for world_size in (1, 3):
        run_dir = tmp_path / str(world_size)
        train(ranks, chats(logs, run_dir, start, mixed, "num_steps=3", "data.global_batch_size=9"), world_size)
        found[world_size] = reproducible_metrics(run_dir)
    for one_line, line in zip(found[1], found[3], strict=True):
        for key in (key for key in one_line if key.startswith(("turns/", "gradient_norm", "loss/mean", "tokens/"))):
            assert line[key] == pytest.approx(one_line[key], rel=2e-4), key


def refused_before_the_first_step(arguments: list[str]) -> str:
    """Return the message of a run that saw only good turns before its ranks met."""
    from megatron_selfdistill import trainer
    from megatron_selfdistill.chat_logs import configured_logs
    from megatron_selfdistill.config import load
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed.ranks import initialize, shutdown
    from megatron_selfdistill.errors import ConfigError

    config = load(arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configured_logs, "LOOKED_AT", 1)
        patch.setattr(
            configured_logs.random, "Random", lambda seed: type("First", (), {"sample": lambda self, all, n: all[:n]})()
        )
        read = RunData.load(config)
    grid = initialize(config.parallel, config.seed)
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError) as caught:
            patch.setattr(trainer, "Learner", lambda *_, **__: pytest.fail("a model was built"))
            trainer.Trainer(config, read, grid)
        return str(caught.value)
    finally:
        shutdown()


@pytest.mark.full
def test_a_turn_that_may_not_be_skipped_ends_the_run_on_all_ranks_before_a_model_is_built(ranks, logs, mixed, tmp_path):
    arguments = chats(logs, tmp_path / "run", mixed, "data.on_long_context=error")
    messages = ranks.run(refused_before_the_first_step, arguments, world_size=2, init_process_group=False)
    assert messages[0] == messages[1] and "\n" not in messages[0]
    assert f"mixed.jsonl:{NUM_GOOD + 1}, message 1: " in messages[0] and "raise data.max_length" in messages[0]


@pytest.mark.full
def test_a_dry_run_under_a_launcher_reads_and_lists_all_turns(ranks, logs, mixed, tmp_path):
    train(ranks, chats(logs, tmp_path / "run", mixed, "dry_run=true"), 2)
    unusable = NUM_LONG + NUM_BROKEN
    assert lines_listed(tmp_path / "run") == list(range(NUM_GOOD + 1, NUM_GOOD + unusable + 1))
