# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One server over HTTP: its answer counts when it is complete, and each failure has a message."""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fake_vllm import FakeVllm, answer_to, fake_servers, tokens_behind

from megatron_selfdistill.distributed import stop, watchdog
from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.rollout.base import SamplingParams
from megatron_selfdistill.rollout.vllm import patient_http
from megatron_selfdistill.rollout.vllm.client import RequestRefused, VllmServer
from megatron_selfdistill.rollout.vllm.engine import EngineRequest, response_of


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with fake_servers(1) as [server]:
        server.version = "7"
        yield server


def request_of(*prompt: int, max_tokens: int = 3) -> EngineRequest:
    return EngineRequest(list(prompt), {"max_tokens": max_tokens, "temperature": 0.0})


def test_a_response_is_tokens_log_probs_end_and_version(fake):
    [output] = VllmServer(fake.address).generate([request_of(4, 5)])
    assert output.token_ids == tokens_behind([4, 5], 3)
    assert output.log_probs == [-0.5] * 3
    assert (output.finish_reason, output.weight_version) == ("length", 7)


def test_many_requests_are_in_flight_at_once_and_answers_keep_their_order(fake):
    fake.together = 40
    prompts = [(7 * i % 40, 1) for i in range(40)]
    outputs = VllmServer(fake.address, timeout_s=20).generate([request_of(*prompt) for prompt in prompts])
    assert [output.token_ids for output in outputs] == [tokens_behind(list(prompt), 3) for prompt in prompts]


def changed(**choice: Any) -> str:
    answer = answer_to({"token_ids": [4, 5], "sampling_params": {"max_tokens": 3}}, ("7", "7"))
    answer["choices"][0].update(choice)
    return json.dumps(answer)


CONTENT = [{"token_id": token, "logprob": -0.5} for token in tokens_behind([4, 5], 3)]
OTHER = copy.deepcopy(CONTENT)
OTHER[1]["token_id"] = 60


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ("", "expected one choice"),
        ("{", "expected JSON"),
        ("[]", "expected one choice"),
        ('{"choices": []}', "expected one choice"),
        (changed(logprobs=None), "expected one choice"),
        (changed(token_ids=None), "expected one choice"),
        (changed(logprobs={"content": CONTENT[:2]}), "3 tokens and 2 log-probs"),
        (changed(logprobs={"content": OTHER}), "a log-prob each"),
        (changed(token_ids=[], logprobs={"content": []}), "got 0 tokens"),
        (changed(finish_reason="abort"), "'abort'"),
        (changed(token_ids=[9, 10], logprobs={"content": CONTENT[:2]}), "--max-model-len"),
    ],
)
def test_half_an_answer_is_an_error(fake, says, why):
    fake.says = says or " "
    with pytest.raises(EngineError, match=f"{fake.address}.*{why}") as error:
        VllmServer(fake.address).generate([request_of(4, 5)])
    assert not isinstance(error.value, RequestRefused)


@pytest.mark.parametrize(
    ("versions", "known"), [(["7"], 7), (["7", "8"], 7), (["default"], None), (["7", "loading"], None), ([], None)]
)
def test_the_version_is_that_of_the_oldest_weights_if_all_have_one(fake, versions, known):
    fake.says = changed(weight_versions=[{"version": version, "start": 0, "end": 1} for version in versions])
    [output] = VllmServer(fake.address).generate([request_of(4, 5)])
    assert output.weight_version == known


@pytest.mark.parametrize(
    ("reported", "spans"),
    [
        ([("7", 0, 3)], []),
        ([("7", 0, 1), ("9", 1, 3)], [(7, 1), (9, 2)]),
        ([("7", 0, 2), ("loading", 2, 2), ("8", 2, 3)], [(7, 2), (8, 1)]),
        ([("7", 0, 2), ("loading", 2, 3)], []),
    ],
)
def test_each_version_of_the_weights_has_its_tokens(fake, reported, spans):
    fake.says = changed(weight_versions=[{"version": v, "start": start, "end": end} for v, start, end in reported])
    [output] = VllmServer(fake.address).generate([request_of(4, 5)])
    assert output.weight_spans == spans
    versions = response_of(output, SamplingParams(max_new_tokens=3)).token_versions
    assert versions == [v for v, count in spans or [(output.weight_version, 3)] for _ in range(count)]


@pytest.mark.parametrize(("status", "kind"), [(400, RequestRefused), (401, RequestRefused), (500, EngineError)])
def test_a_refusal_is_told_from_a_failure(fake, status, kind):
    fake.status, fake.says = status, '{"error": {"message": "too long"}}'
    with pytest.raises(EngineError, match=rf"{fake.address}: .* answered {status}: too long$") as error:
        VllmServer(fake.address).generate([request_of(4)])
    assert type(error.value) is kind


def test_a_server_that_is_not_there_is_an_error_with_its_address():
    with fake_servers(1) as [server]:
        address = server.address
    with pytest.raises(EngineError, match=address):
        VllmServer(address).health()


def test_a_connection_that_ends_without_an_answer_is_an_error(fake):
    fake.die_at = 2
    with pytest.raises(EngineError, match=fake.address):
        VllmServer(fake.address).generate([request_of(i) for i in range(3)])


def test_a_server_that_writes_no_token_is_given_up_in_time(fake):
    fake.hang_at = 1
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"no token within 1 s"):
        VllmServer(fake.address, timeout_s=1.0).generate([request_of(1), request_of(2)])
    assert 1.0 <= time.monotonic() - started < 30


def test_a_slow_server_is_waited_for_while_it_writes_tokens(fake):
    fake.seconds, fake.gets_on = 4.0, True
    before = watchdog._signs.count
    assert len(VllmServer(fake.address, timeout_s=3.0).generate([request_of(1), request_of(2)])) == 2
    assert watchdog._signs.count > before


def test_a_slow_server_is_waited_for_while_it_answers_others(fake):
    server = VllmServer(fake.address, timeout_s=3.0)
    fake.seconds, fake.counts = 4.0, False
    done = threading.Event()

    def others() -> None:
        while not done.wait(0.2):
            server.health()

    thread = threading.Thread(target=others)
    thread.start()
    try:
        assert len(server.generate([request_of(1)])) == 1
    finally:
        done.set()
        thread.join()


def test_tokens_do_not_excuse_what_takes_none(fake):
    fake.gets_on, fake.hangs_at = True, "/update_weights"
    with pytest.raises(EngineError, match=r"no answer within 1 s"):
        VllmServer(fake.address, timeout_s=1.0).update_weights(complete="")


def test_the_count_of_tokens_is_of_prompts_and_responses(fake):
    assert VllmServer(fake.address).num_tokens() == 10
    fake.counts = False
    assert VllmServer(fake.address).num_tokens() is None


def test_waiting_can_be_interrupted(fake):
    fake.hang_at = 1
    server = VllmServer(fake.address, timeout_s=30)
    threading.Timer(0.2, server.interrupt).start()
    started = time.monotonic()
    with pytest.raises(EngineError, match="given up"):
        server.generate([request_of(1)])
    assert time.monotonic() - started < 10


@contextmanager
def preempted(monkeypatch: pytest.MonkeyPatch, patience_s: float) -> Iterator[None]:
    """Send SIGTERM to this process shortly, as Slurm does to a run and its servers when it preempts the job."""
    monkeypatch.setattr(patient_http, "_LEAVING_SECONDS", patience_s)
    with stop.listening():
        signal_comes = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
        signal_comes.start()
        yield
        signal_comes.join()
        assert stop.asked()


@pytest.mark.parametrize("path", ["/update_weights", "/inference/v1/generate"])
def test_a_run_that_shall_end_does_not_wait_for_a_server_that_has_fallen_silent(fake, monkeypatch, path):
    """The signal may have ended the engine behind the server."""
    fake.hangs_at = path
    server, started = VllmServer(fake.address, timeout_s=600), time.monotonic()
    with preempted(monkeypatch, 1.0), pytest.raises(EngineError, match="within 1 s, and a signal has asked"):
        server.generate([request_of(1)]) if "generate" in path else server.update_weights(complete="")
    assert 1.0 < time.monotonic() - started < 60


def test_a_run_that_shall_end_waits_for_a_server_that_writes_tokens(fake, monkeypatch):
    fake.seconds, fake.gets_on = 4.5, True
    with preempted(monkeypatch, 3.0):
        assert len(VllmServer(fake.address, timeout_s=600).generate([request_of(1), request_of(2)])) == 2


def test_the_token_is_sent_and_never_shown(fake):
    fake.token = "secret"
    server = VllmServer(fake.address, "secret")
    assert server.weight_version() == "7"
    assert "secret" not in repr(server)
    with pytest.raises(RequestRefused, match="401") as error:
        VllmServer(fake.address, "secres").weight_version()
    assert "secre" not in str(error.value)


def test_a_method_gets_its_arguments_and_gives_the_first_workers_result(fake):
    server = VllmServer(fake.address)
    assert server.call("pop", ["a"], 2) == {"method": "pop", "args": [["a"], 2]}
