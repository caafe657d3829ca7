# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs on logged conversations: nothing is sampled, nothing is quoted, unlikely turns are weighted in every layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from tiny_run import assert_equal_runs, go_back_to_step_3, overrides, reproducible_metrics, train

from megatron_selfdistill.metrics import read_samples

TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}${% endif %}{% endfor %}"
SECRET = "314-159:2653"  # of characters that the tokenizer knows


@pytest.fixture(scope="module")
def data(own_data) -> Path:
    """Besides, 40 conversations of two assistant turns, and three bad ones."""
    from _lib import subtraction
    from _lib.pretraining import write_records

    data = own_data
    (data / "template.jinja").write_text(TEMPLATE)
    records: list[dict[str, Any]] = []
    for number, (a, b) in enumerate(subtraction.distinct(40, "train", seed=1)):
        turns = [
            subtraction.problem_text(a, b),
            f"{number:03d};{b:03d}",
            "X",
            f"{SECRET};{subtraction.answer(a, b)}",
            "thanks",
        ]
        records.append(
            {"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]}
        )
    bad = [{"messages": records[0]["messages"][:4]}, {"messages": [{"role": SECRET, "content": SECRET}]}]
    too_long = [
        {"role": "user", "content": SECRET},
        {"role": "assistant", "content": "1" * 300},
        records[0]["messages"][4],
    ]
    write_records(data / "chats.jsonl", [*records, *bad, {"messages": too_long}])
    return data


def chats(data: Path, run_dir: Path, *more: str) -> list[str]:
    logs = ["recipe=chat_logs", f"data.path={data}/chats.jsonl", f"data.chat_template={data}/template.jinja"]
    return overrides(data, run_dir, *logs, *more)


def start_where_no_sampler_can_be_built(arguments: list[str]) -> int:
    from megatron_selfdistill.sources import configured_source

    def refuse(*_: Any) -> Any:
        raise AssertionError("a sampler was built")

    return tiny_run.start_with(arguments, configured_source, "make_sampler", refuse)


def test_a_run_on_logs_builds_no_sampler_and_resumes_as_if_it_had_never_stopped(ranks, data, tmp_path):
    arguments = chats(data, tmp_path / "whole")
    train(ranks, arguments, start=start_where_no_sampler_can_be_built)
    lines = reproducible_metrics(tmp_path / "whole")
    assert len(lines) == 6 and all(line["turns/count"] == 8 for line in lines)
    assert all(0 < line["turns/accepted_token_share"] < 1 and "sampled" not in line for line in lines)
    assert all(line["turns/log_prob_min"] <= line["turns/log_prob_mean"] < 0 for line in lines)
    assert not any(key.startswith(("sampler/", "correction/", "turns/unlikely")) for line in lines for key in line)
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    go_back_to_step_3(tmp_path / "halves")
    train(ranks, chats(data, tmp_path / "halves"), start=start_where_no_sampler_can_be_built)
    assert_equal_runs(ranks, tmp_path / "whole", tmp_path / "halves")


def test_what_is_trained_on_are_the_logged_tokens_of_assistants_alone(ranks, data, tmp_path):
    """All turns are in one batch, so the tokens are countable: 7 characters or 16, and the end of the turn."""
    train(ranks, chats(data, tmp_path / "one", "data.global_batch_size=80", "num_steps=1"))
    [line] = reproducible_metrics(tmp_path / "one")
    wrong, accepted = 40 * (7 + 1), 40 * (len(SECRET) + 4 + 1)
    assert line["tokens/response"] == line["tokens/rollout"] == wrong + accepted
    assert line["turns/accepted_token_share"] == pytest.approx(accepted / (wrong + accepted))


def test_evaluation_builds_the_sampler_when_it_is_due(ranks, data, tmp_path):
    evaluated = [f"evaluation.path={data}/problems.jsonl", "evaluation.every=6", "evaluation.limit=4"]
    train(ranks, chats(data, tmp_path / "run", *evaluated))
    assert "evaluation/greedy_accuracy" in reproducible_metrics(tmp_path / "run")[-1]


def test_turns_can_be_sampled_anew(ranks, data, tmp_path):
    recorded = tmp_path / "recorded.jsonl"
    more = ["conversations.responses=sampled", f"rollout.record={recorded}", "num_steps=2"]
    train(ranks, chats(data, tmp_path / "run", *more))
    records = [json.loads(line) for line in recorded.read_text().splitlines()]
    assert len(records) == 16 and all(len(record["token_ids"]) <= 14 for record in records)
    assert all("sampler/log_prob_mean_abs_diff" in line for line in reproducible_metrics(tmp_path / "run"))


@pytest.fixture(scope="module")
def start(ranks, data, tmp_path_factory) -> str:
    """Return the override that starts every layout from the same weights."""
    folder = tmp_path_factory.mktemp("start")
    train(ranks, chats(data, folder, "num_steps=1", "optimizer.lr=0"))
    return f"checkpoint.load={folder}/checkpoints"


LAYOUTS = [
    pytest.param(2, (), id="dp", marks=pytest.mark.full),
    pytest.param(2, ("parallel.tensor_model_parallel_size=2",), id="tp", marks=pytest.mark.full),
    pytest.param(2, ("parallel.context_parallel_size=2",), id="cp"),
    pytest.param(2, ("parallel.pipeline_model_parallel_size=2",), id="pp", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS)
def test_unlikely_turns_are_the_same_in_every_layout(ranks, data, start, tmp_path, world_size, layout):
    lines = []
    weights = [start, "num_steps=2", "conversations.min_log_prob=-4", "conversations.unlikely=down_weight"]
    for name, world, more in (("one", 1, ()), ("many", world_size, layout)):
        train(ranks, chats(data, tmp_path / name, *weights, *more), world)
        lines.append(reproducible_metrics(tmp_path / name))
    for one, many in zip(*lines, strict=True):
        assert 0 < one["turns/unlikely_share"] < 1, "the threshold divides the turns"
        for key in (key for key in one if key.startswith(("turns/", "gradient_norm", "loss/"))):
            assert many[key] == pytest.approx(one[key], rel=2e-4), key


def test_dropping_all_turns_leaves_no_gradient_and_dropping_none_changes_nothing(ranks, data, tmp_path):
    found = {}
    for name, threshold in (("off", "null"), ("none", "-100"), ("all", "0")):
        train(ranks, chats(data, tmp_path / name, "num_steps=1", f"conversations.min_log_prob={threshold}"))
        [found[name]] = reproducible_metrics(tmp_path / name)
    assert found["none"]["gradient_norm"] == found["off"]["gradient_norm"] > 0
    assert (found["none"]["turns/unlikely_share"], found["all"]["turns/unlikely_share"]) == (0, 1)
    assert found["all"]["gradient_norm"] == 0 and found["all"]["loss/mean"] == found["off"]["loss/mean"] > 0


@pytest.mark.full
def test_nothing_that_was_said_reaches_metrics_console_or_the_run_folder(data, tmp_path):
    arguments = chats(data, tmp_path / "run", "metrics.console=true", "num_steps=1", "data.global_batch_size=81")
    finished = tiny_run.in_new_process(arguments)
    assert finished.returncode == 0, finished.stderr
    output = finished.stdout + finished.stderr
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
    failed = tiny_run.in_new_process([*arguments, "data.on_bad_record=error", f"run_dir={tmp_path}/other"])
    assert failed.returncode == 2 and "chats.jsonl:41: unresolved" in failed.stderr
    assert SECRET not in failed.stdout + failed.stderr


def test_turns_are_shown_where_the_user_says_so(ranks, data, tmp_path):
    train(ranks, chats(data, tmp_path / "run", "conversations.show_contents=true", "num_steps=1"))
    samples = read_samples(tmp_path / "run")
    assert len(samples) == 2 and all(sample["solution"].startswith(f"{SECRET};") for sample in samples)
    assert all(sample["response"].endswith("$") and sample["tokens"]["teacher_log_prob"] for sample in samples)


NUM_GOOD, NUM_LONG, NUM_BROKEN = 40, 20, 10


@pytest.fixture(scope="module")
def mixed(data) -> str:
    """Return the override that names a log of conversations with one turn each.

    Some replies are good, some are too long, and some contain the token that ends a turn.
    """
    from _lib.pretraining import write_records

    replies = [f"{number:03d}" * (1 + number % 3) for number in range(NUM_GOOD)] + ["1" * 300] * NUM_LONG
    replies += ["1$1"] * NUM_BROKEN
    turns = [[("user", f"{number:03d}-0="), ("assistant", reply)] for number, reply in enumerate(replies)]
    chats = [[{"role": role, "content": text} for role, text in [*turn, ("user", "thanks")]] for turn in turns]
    write_records(data / "mixed.jsonl", [{"messages": messages} for messages in chats])
    return f"data.path={data}/mixed.jsonl"


def lines_listed(run_dir: Path) -> list[int]:
    text = (run_dir / "skipped.txt").read_text()
    return [int(line.partition(", message 1: ")[0].rpartition(":")[2]) for line in text.splitlines()]


def test_unusable_turns_are_replaced_and_listed_once_and_a_resumed_run_goes_on_bit_for_bit(
    ranks, data, mixed, tmp_path
):
    """Almost two epochs of all turns, so that some unusable ones come up twice."""
    train(ranks, chats(data, tmp_path / "whole", mixed, "data.global_batch_size=12"))
    lines = reproducible_metrics(tmp_path / "whole")
    assert [line["turns/count"] for line in lines] == [12] * 6
    assert sum(line["turns/skipped_long"] for line in lines) > NUM_LONG
    assert sum(line["turns/skipped_bad"] for line in lines) > NUM_BROKEN
    assert sorted(lines_listed(tmp_path / "whole")) == list(range(NUM_GOOD + 1, NUM_GOOD + NUM_LONG + NUM_BROKEN + 1))
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    go_back_to_step_3(tmp_path / "halves")
    train(ranks, chats(data, tmp_path / "halves", mixed, "data.global_batch_size=12"))
    assert_equal_runs(ranks, tmp_path / "whole", tmp_path / "halves")
    assert lines_listed(tmp_path / "halves") == lines_listed(tmp_path / "whole"), "nothing is listed twice"


@pytest.mark.full
def test_the_turns_of_a_step_do_not_depend_on_the_number_of_replicas(ranks, data, start, mixed, tmp_path):
    found = {}
    for world_size in (1, 2, 3):
        run_dir = tmp_path / str(world_size)
        train(ranks, chats(data, run_dir, start, mixed, "num_steps=3", "data.global_batch_size=9"), world_size)
        found[world_size] = reproducible_metrics(run_dir)
    for many in (found[2], found[3]):
        for one_line, line in zip(found[1], many, strict=True):
            for key in (key for key in one_line if key.startswith(("turns/", "gradient_norm", "loss/mean", "tokens/"))):
                assert line[key] == pytest.approx(one_line[key], rel=2e-4), key


@pytest.mark.full
def test_shortened_solutions_are_counted(ranks, data, tmp_path):
    from _lib.pretraining import write_records

    conversation = [{"role": "user", "content": "1-0="}, {"role": "assistant", "content": "0"}]
    hint = {"role": "user", "content": "1" * 200, "accepted": True}
    write_records(data / "hints.jsonl", [{"messages": [*conversation, hint]}] * 8)
    more = [f"data.path={data}/hints.jsonl", "data.on_long_context=truncate_end", "num_steps=1"]
    train(ranks, chats(data, tmp_path / "run", *more), 2)
    [line] = reproducible_metrics(tmp_path / "run")
    assert (line["turns/shortened"], line["turns/count"], line["turns/skipped_long"]) == (8, 8, 0)


def refused_before_the_first_step(arguments: list[str]) -> str:
    """Return the message of a run that saw only good turns before its ranks met."""
    from megatron_selfdistill import run_data, trainer
    from megatron_selfdistill.config import load
    from megatron_selfdistill.errors import ConfigError
    from megatron_selfdistill.distributed.ranks import initialize, shutdown

    config = load(arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_data, "LOOKED_AT", 1)
        patch.setattr(
            run_data.random, "Random", lambda seed: type("First", (), {"sample": lambda self, all, n: all[:n]})()
        )
        read = run_data.RunData.load(config)
    grid = initialize(config.parallel, config.seed)
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError) as caught:
            patch.setattr(trainer, "Learner", lambda *_, **__: pytest.fail("a model was built"))
            trainer.Trainer(config, read, grid)
        return str(caught.value)
    finally:
        shutdown()


@pytest.mark.parametrize(
    ("policy", "line", "words"),
    [
        ("data.on_long_context=error", NUM_GOOD + 1, "raise data.max_length"),
        ("data.on_bad_record=error", NUM_GOOD + NUM_LONG + 1, "data.on_bad_record=skip"),
    ],
)
def test_a_turn_that_may_not_be_skipped_ends_the_run_on_all_ranks_before_a_model_is_built(
    ranks, data, mixed, tmp_path, policy, line, words
):
    arguments = chats(data, tmp_path / "run", mixed, policy)
    sentences = ranks.run(refused_before_the_first_step, arguments, world_size=2, init_process_group=False)
    assert sentences[0] == sentences[1] and "\n" not in sentences[0]
    assert f"mixed.jsonl:{line}, message 1: " in sentences[0] and words in sentences[0]


def test_a_dry_run_under_a_launcher_reads_and_lists_all_turns(ranks, data, mixed, tmp_path):
    train(ranks, chats(data, tmp_path / "run", mixed, "dry_run=true"), 2)
    unusable = NUM_LONG + NUM_BROKEN
    assert lines_listed(tmp_path / "run") == list(range(NUM_GOOD + 1, NUM_GOOD + unusable + 1))


def test_a_log_of_which_nothing_can_be_shown_is_refused_before_any_process_group(data, tmp_path):
    from megatron_selfdistill.config import load
    from megatron_selfdistill.errors import ConfigError
    from megatron_selfdistill.run_data import RunData

    with pytest.raises(
        ConfigError, match=r"none of 64 turns that were read can be used; the first: .*chats.jsonl:"
    ):
        RunData.load(load(chats(data, tmp_path / "run", "data.chat_template='{{ messages[0].content }}'")))
