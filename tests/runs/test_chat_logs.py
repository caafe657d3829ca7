# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs on logged conversations: nothing is sampled, nothing is quoted, unlikely turns are weighted in every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from rounded_json import read_lines
from tiny_run import TWO_RANKS, reproducible_metrics, train, write_chats, write_conversations

from megatron_selfdistill.metrics.run_log import read_samples

SECRET = "314-159:2653"  # of characters that the tokenizer knows
NUM_GOOD, NUM_LONG, NUM_BROKEN = 40, 20, 10
ALL_TURNS = ("num_steps=1", "data.global_batch_size=80", "checkpoint.save_every=0")
MIXED = ("data.path=LOGS/mixed.jsonl", "data.global_batch_size=18", "num_steps=4", "checkpoint.save_every=3")
"""Almost two epochs of all turns of the mixed log, so that some unusable ones come up twice."""


@pytest.fixture(scope="module")
def of(own_data) -> Callable[..., list[str]]:
    """Return a function to the options of a run on logs: with two turns each, or on a mixed log with unusable turns."""
    from _lib import subtraction

    chats = [
        (subtraction.problem_text(a, b), f"{i:03d};{b:03d}", "X", f"{SECRET};{subtraction.answer(a, b)}", "thanks")
        for i, (a, b) in enumerate(subtraction.distinct(40, "train", seed=1))
    ]
    write_conversations(own_data, [*chats, chats[0][:4], (SECRET, "1" * 300, "thanks")])
    *lines, too_long = (own_data / "chats.jsonl").read_text().splitlines(keepends=True)
    bad = json.dumps({"messages": [{"role": SECRET, "content": SECRET}]})
    (own_data / "chats.jsonl").write_text("".join([*lines, f"{bad}\n", too_long]))
    good = [f"{number:03d}" * (1 + number % 3) for number in range(NUM_GOOD)]
    write_chats(own_data, [*good, *["1" * 300] * NUM_LONG, *["1$1"] * NUM_BROKEN], "mixed.jsonl")
    own = ["recipe=chat_logs", "data.path=LOGS/chats.jsonl", "data.chat_template=LOGS/template.jinja"]
    return lambda *options: [option.replace("LOGS", str(own_data)) for option in (*own, *options)]


def start_where_no_sampler_can_be_built(arguments: list[str]) -> int:
    from megatron_selfdistill.sources import configured_source

    def refuse(*_: Any) -> Any:
        raise AssertionError("a sampler was built")

    return tiny_run.start_with(arguments, configured_source, "make_sampler", refuse)


def test_the_run_trains_on_the_logged_tokens_of_assistants_and_drops_unlikely_turns(runs, of):
    """All turns are in one batch, so the tokens are countable: 7 characters or 16, and the end of the turn."""
    off, none, all_ = (
        reproducible_metrics(runs(*of(*ALL_TURNS, f"method.min_log_prob={threshold}")))[0]
        for threshold in ("null", "-100", "0")
    )
    wrong, accepted = 40 * (7 + 1), 40 * (len(SECRET) + 4 + 1)
    assert off["tokens/response"] == off["tokens/rollout"] == wrong + accepted
    assert off["turns/accepted_token_share"] == pytest.approx(accepted / (wrong + accepted))
    assert none["gradient_norm"] == off["gradient_norm"] > 0
    assert (none["turns/unlikely_share"], all_["turns/unlikely_share"]) == (0, 1)
    assert all_["gradient_norm"] == 0 and all_["loss/mean"] == off["loss/mean"] > 0


@pytest.mark.parametrize("margin", [0, 1000])
def test_tokens_of_logged_turns_have_weights_and_turns_without_any_change_nothing(runs, of, margin):
    """Nobody knows who sampled them: the reach compares the target with the student."""
    weights = ["method.token_weights=reach"] if not margin else ["method.token_weights=evidence"]
    options = of("num_steps=2", "checkpoint.save_every=1", f"method.evidence_margin={margin}", *weights)
    for line in reproducible_metrics(runs(*options)):
        assert 0 < line["reach/mean"] < 1 and line["turns/skipped_bad"] >= 0
        assert (line["weights/sum"] == 0) == ("turns/count" not in line) == ("loss/mean" not in line) == (margin > 0)
        assert margin or line["correction/weight_mean"] == pytest.approx(1, rel=1e-6)
    runs.resumed(*options, step=1)


@pytest.mark.full
def test_turns_can_be_sampled_anew_evaluation_builds_a_sampler_and_turns_are_shown_if_the_user_asks(runs, of, data):
    evaluated = [f"evaluation.path={data}/problems.jsonl", "evaluation.every=1", "evaluation.limit=4"]
    sampled = runs(*of("num_steps=1", "conversations.responses=sampled"))
    records = read_lines(sampled / "responses.jsonl")
    assert len(records) == 8 and all(len(record["token_ids"]) <= 14 for record in records)
    assert all("sampler/log_prob_mean_abs_diff" in line for line in reproducible_metrics(sampled))
    shown = runs(*of("num_steps=1", "conversations.show_contents=true", *evaluated))
    assert "evaluation/greedy_accuracy" in reproducible_metrics(shown)[-1]
    samples = read_samples(shown)
    assert len(samples) == 2 and all(sample["solution"].startswith(f"{SECRET};") for sample in samples)
    assert all(sample["response"].endswith("$") and sample["tokens"]["teacher_log_prob"] for sample in samples)


WEIGHTED = ("num_steps=2", "method.min_log_prob=-3.75", "method.unlikely=down_weight")


UNUSABLE = (MIXED[0], "num_steps=3", "data.global_batch_size=9")
IN_LAYOUTS = [(WEIGHTED, TWO_RANKS[layout], 2) for layout in ("DP2", "CP2", "PP2")]


@pytest.mark.full
@pytest.mark.parametrize(("options", "more", "world_size"), [*IN_LAYOUTS, (UNUSABLE, (), 3)])
def test_the_turns_of_a_step_and_their_weights_are_the_same_in_every_layout(runs, of, start, options, more, world_size):
    one, many = runs(*of(start, *options)), runs(*of(start, *options, *more), world_size=world_size)
    for expected, found in zip(reproducible_metrics(one), reproducible_metrics(many), strict=True):
        assert options != WEIGHTED or 0 < expected["turns/unlikely_share"] < 1, "the threshold divides the turns"
        for key in (key for key in expected if key.startswith(("turns/", "gradient_norm", "loss/mean", "tokens/"))):
            assert found[key] == pytest.approx(expected[key], rel=2e-4), key


@pytest.mark.full
def test_nothing_of_a_log_reaches_metrics_console_or_the_run_directory(ranks, runs, of, tmp_path):
    options = of("metrics.console_every=1", "num_steps=1", "data.global_batch_size=81")
    run, other = tmp_path / "run", tmp_path / "other"
    (status, output), (failed, refusal) = (
        ranks.run(tiny_run.start_and_listen, of_run, world_size=1, init_process_group=False)[0]
        for of_run in (runs.arguments(run, *options), runs.arguments(other, *options, "data.on_bad_record=error"))
    )
    assert status == 0, output
    skipped = (run / "skipped.txt").read_text()
    written = [output, skipped, *((run / name).read_text() for name in ("metrics.jsonl", "config.yaml"))]
    assert not any(SECRET in text or "thanks" in text for text in written)
    assert not (run / "samples.jsonl").exists()
    assert output.count("metrics.show_samples: no samples, since conversations.show_contents=false") == 1
    assert "skipped as unresolved: 1, as bad: 1" in output
    listed = [line.partition(": ")[0].rpartition("chats.jsonl:")[2] for line in skipped.splitlines()]
    assert listed == ["41", "42", "43, message 1"]
    [line] = reproducible_metrics(run)
    assert line["turns/skipped_long"] >= 1 and line["turns/skipped_bad"] == 0
    assert failed == 2 and "chats.jsonl:41: unresolved" in refusal and SECRET not in refusal


def lines_listed(run_dir: Path) -> list[int]:
    text = (run_dir / "skipped.txt").read_text()
    return [int(line.partition(", message 1: ")[0].rpartition(":")[2]) for line in text.splitlines()]


def test_a_run_on_logs_builds_no_sampler_lists_unusable_turns_once_and_resumes_bit_for_bit(runs, of):
    no_sampler = {"start": start_where_no_sampler_can_be_built}
    whole = runs(*of(*MIXED), **no_sampler)
    lines = reproducible_metrics(whole)
    assert [line["turns/count"] for line in lines] == [18] * 4
    assert all(line["turns/log_prob_min"] <= line["turns/log_prob_mean"] < 0 for line in lines)
    assert not any(key.startswith(("sampler/", "correction/", "turns/unlikely")) for line in lines for key in line)
    assert sum(line["turns/skipped_long"] for line in lines) > NUM_LONG
    assert sum(line["turns/skipped_bad"] for line in lines) > NUM_BROKEN
    assert sorted(lines_listed(whole)) == list(range(NUM_GOOD + 1, NUM_GOOD + NUM_LONG + NUM_BROKEN + 1))
    halves = runs.resumed(*of(*MIXED), step=3, **no_sampler)
    assert lines_listed(halves) == lines_listed(whole), "nothing is listed twice"


@pytest.mark.full
def test_a_dry_run_under_a_launcher_reads_and_lists_all_turns_and_one_that_may_not_be_skipped_ends_it(
    ranks, runs, of, tmp_path
):
    train(ranks, runs.arguments(tmp_path / "run", *of(MIXED[0], "dry_run=true")), 2)
    strict = runs.arguments(tmp_path / "other", *of(MIXED[0], "data.on_long_context=error"))
    assert f"mixed.jsonl:{NUM_GOOD + 1}, message 1: " in tiny_run.refusal(ranks, strict, 2)
    assert lines_listed(tmp_path / "run") == list(range(NUM_GOOD + 1, NUM_GOOD + NUM_LONG + NUM_BROKEN + 1))
