# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Ranks without a process group hear when all are ready, and when one has failed; each message has one speaker."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_selfdistill import train
from megatron_selfdistill.distributed import roll_call
from megatron_selfdistill.distributed.roll_call import OtherRankFailed, RollCall
from megatron_selfdistill.errors import ConfigError


def run(ranks: Any, function: Any, *arguments: Any, world_size: int = 3) -> list[Any]:
    return ranks.run(function, *arguments, world_size=world_size, init_process_group=False)


def patient() -> RollCall:
    """Return this rank's part, which connects for as long as the machine takes."""
    roll_call._CONNECT_S = 3600.0
    return RollCall()


def answers() -> tuple[str, float, float]:
    """Return the common answer, when this rank came, and when it had the answer; rank 2 comes late."""
    ranks = patient()
    if ranks.rank == 2:
        time.sleep(0.2)
    came = time.monotonic()  # one clock for all processes of a machine
    word = ranks.answer("directory", f"from {ranks.rank}")
    answered = time.monotonic()
    ranks.leave()
    return word, came, answered


def test_all_ranks_wait_for_the_last_one_and_get_rank_0s_word(ranks):
    words, came, answered = zip(*run(ranks, answers), strict=True)
    assert words == ("from 0",) * 3 and min(answered) >= max(came)


def fails(who: list[int], messages: list[str]) -> Any:
    ranks = patient()
    try:
        if ranks.rank in who:
            return ranks.failed(messages[ranks.rank], 4)
        ranks.answer("directory")
        ranks.answer("inputs")
    except OtherRankFailed as other:
        return other.status
    finally:
        ranks.leave()
    return "ready"


@pytest.mark.parametrize(
    ("who", "messages", "spoken"),
    [([0, 1, 2], ["a", "b", "a"], ["a", "b"]), ([1], ["", "b", ""], ["b"]), ([0], ["a", "", ""], ["a"])],
)
def test_a_failure_releases_the_others_and_each_message_has_one_speaker(ranks, who, messages, spoken):
    outcomes = run(ranks, fails, who, messages)
    assert sorted(messages[rank] for rank in who if outcomes[rank] is True) == spoken
    assert all(outcomes[rank] in (True, False) if rank in who else outcomes[rank] == 4 for rank in range(3))


def twice() -> list[str]:
    calls = [patient(), patient()]
    words = [ranks.answer("directory", f"run {number}") for number, ranks in enumerate(calls)]
    for ranks in calls:
        ranks.leave()
    return words


def test_two_runs_of_one_launch_do_not_hear_each_other(ranks):
    assert run(ranks, twice, world_size=2) == [["run 0", "run 1"]] * 2


def absent() -> str:
    ranks = patient()
    if ranks.rank == 1:
        return ""
    with pytest.raises(ConfigError) as caught:
        ranks.answer("inputs", timeout_s=0.2)
    return str(caught.value)


def test_a_rank_that_does_not_come_gives_a_message(ranks):
    assert run(ranks, absent, world_size=2)[0].startswith("waited 0.2 s for all 2 ranks to get ready (inputs)")


def test_a_store_that_cannot_be_reached_silences_nobody(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(roll_call, "_CONNECT_S", 0.2)
    ranks = RollCall()
    assert ranks.failed("a", 2)
    ranks.leave()


def failure(exitcode: int) -> ChildFailedError:
    return ChildFailedError("train", {1: ProcessFailure(local_rank=1, pid=1, exitcode=exitcode, error_file="none")})


@pytest.mark.parametrize(
    ("end", "status"), [(None, 0), (failure(3), 3), (failure(-9), 137), (SignalException("", signal.SIGTERM), 143)]
)
def test_a_launch_ends_with_the_status_of_the_first_failed_rank_or_of_the_signal(monkeypatch, end, status):
    started = []

    def run(options: Any) -> None:
        started.append(options)
        if end is not None:
            raise end

    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(torchrun, "run", run)
    monkeypatch.setattr(roll_call.signal, "signal", lambda *_: None)
    assert roll_call.launch(2, ["lr=1e-5", "--config-dir", "ours"]) == status
    (options,) = started
    assert options.standalone and options.nproc_per_node == "2" and options.module
    assert [options.training_script, *options.training_script_args] == [
        *("megatron_selfdistill.train", "lr=1e-5", "--config-dir", "ours")
    ]


def test_the_settings_are_checked_before_the_ranks_start(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(train, "launch", lambda *_: pytest.fail("ranks have started"))
    wrong = {"parallel.tensor=2": "'parallel.tensor'", "tp=2": "TP x PP x CP = 2", "steps=2": "none.jsonl"}
    for override, words in wrong.items():
        arguments = ["--ranks", "3", f"run_dir={tmp_path}/run", "data.path=none.jsonl", "data.tokenizer=none", override]
        assert train.main(arguments) == train.EXIT_BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line and "[rank" not in line
