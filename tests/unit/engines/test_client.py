# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One server over HTTP: its answer counts when it is complete, and each failure has a message."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import fake_vllm
import psutil
import pytest
from fake_vllm import FakeVllm, answer_to, fake_servers, generated, tokens_behind

from megatron_selfdistill.distributed import signs_of_life, stop
from megatron_selfdistill.engines.vllm import patient_http
from megatron_selfdistill.engines.vllm.client import RequestRefused, VllmServer
from megatron_selfdistill.engines.vllm.coroutines import run
from megatron_selfdistill.engines.vllm.engine import EngineRequest
from megatron_selfdistill.errors import EngineError


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with fake_servers(1) as [server]:
        server.version = "7"
        yield server


def client(address: str, timeout_s: float = 1200.0) -> VllmServer:
    return VllmServer(address, timeout_s=timeout_s, vocab_size=50)


def request_of(*prompt: int, max_tokens: int = 3) -> EngineRequest:
    return EngineRequest(list(prompt), {"max_tokens": max_tokens, "temperature": 0.0})


def test_a_response_is_tokens_log_probs_end_and_version(fake):
    [output] = generated(client(fake.address), [request_of(4, 5)])
    assert output.token_ids == tokens_behind([4, 5], 3)
    assert output.log_probs == [-0.5] * 3
    assert (output.finish_reason, output.weight_version) == ("length", 7)


def test_many_requests_are_in_flight_at_once_and_answers_keep_their_order(fake):
    fake.together = 40
    prompts = [(7 * i % 40, 1) for i in range(40)]
    outputs = generated(client(fake.address, timeout_s=20), [request_of(*prompt) for prompt in prompts])
    assert [output.token_ids for output in outputs] == [tokens_behind(list(prompt), 3) for prompt in prompts]


def changed(**choice: Any) -> str:
    answer = answer_to({"token_ids": [4, 5], "sampling_params": {"max_tokens": 3}}, ("7", "7"))
    answer["choices"][0].update(choice)
    return json.dumps(answer)


CONTENT = [{"token_id": token, "logprob": -0.5} for token in tokens_behind([4, 5], 3)]
OTHER = copy.deepcopy(CONTENT)
OTHER[1]["token_id"] = 60


def of_log_probs(value: object) -> str:
    return changed(logprobs={"content": [{**entry, "logprob": value} for entry in CONTENT]})


def of_token(value: object) -> str:
    """Return an answer whose last token is ``value``, also where it states the log-prob."""
    content = [*CONTENT[:2], {**CONTENT[2], "token_id": value}]
    return changed(token_ids=[*tokens_behind([4, 5], 2), value], logprobs={"content": content})


def of_spans(*spans: tuple[object, object]) -> str:
    return changed(weight_versions=[{"version": "7", "start": start, "end": end} for start, end in spans])


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (" ", "another form"),
        (changed(logprobs=None), "another form"),
        (changed(logprobs={"content": CONTENT[:2]}), "3 tokens and 2 log-probs"),
        (changed(logprobs={"content": OTHER}), "expected a log-prob per token"),
        (changed(token_ids=[], logprobs={"content": []}), "0 tokens, the last None"),
        (changed(token_ids=[9, 10], logprobs={"content": CONTENT[:2]}), "--max-model-len"),
        (changed(finish_reason="abort"), "'abort'"),
        (changed(finish_reason="stop"), "'stop', 3 tokens, the last 11, .* expected .* stop tokens 3, 4"),
        (of_log_probs(math.nan), "log-probs nan, nan, nan, expected numbers of at most"),
        (of_log_probs(3.0), "log-probs 3.0, 3.0, 3.0, expected .* weights whole"),
        (of_log_probs(-9999.0), "a server writes this number for NaN"),
        (of_log_probs(False), "another form"),
        (of_token(50), "token ids 50, expected 0 to 49: is it an engine of this run's model"),
        (of_token(-1), "token ids -1, expected"),
        (of_token(1.5), "another form"),
        (of_spans((0, 2)), "0 to 2, expected spans that cover the 3 tokens"),
        (of_spans((0, 1), (2, 3)), "0 to 1, 2 to 3, expected spans"),
        ("[" * 100_000, "another form"),
    ],
)
def test_what_no_model_can_have_generated_is_an_error_with_the_address(fake, says, why):
    fake.says = says
    request = EngineRequest([4, 5], {"max_tokens": 3, "stop_token_ids": [3, 4]})
    with pytest.raises(EngineError, match=f"{fake.address}.*{why}") as error:
        generated(client(fake.address), [request])
    assert not isinstance(error.value, RequestRefused), "another server may do the request"
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("value", [0, 5e-4, -9998.0, -7, -0.1])
def test_log_probs_are_believed_up_to_their_rounding(fake, value):
    fake.says = of_log_probs(value)
    [output] = generated(client(fake.address), [request_of(4, 5)])
    assert [one.hex() for one in output.log_probs] == [float(value).hex()] * 3, "nothing is rounded"


def test_a_stop_needs_no_stop_token_if_the_request_has_none(fake):
    fake.says = changed(finish_reason="stop")
    [output] = generated(client(fake.address), [request_of(4, 5)])
    assert output.finish_reason == "stop"


@pytest.mark.parametrize(
    ("reported", "known", "spans"),
    [
        ([], None, []),
        ([("default", 0, 3)], None, []),
        ([("7", 0, 3)], 7, []),
        ([("7", 0, 1), ("9", 1, 3)], 7, [(7, 1), (9, 2)]),
        ([("7", 0, 2), ("loading", 2, 2), ("8", 2, 3)], 7, [(7, 2), (8, 1)]),
        ([("7", 0, 2), ("loading", 2, 3)], None, []),
    ],
)
def test_each_version_of_the_weights_has_its_tokens_and_the_oldest_counts_if_all_have_one(fake, reported, known, spans):
    fake.says = changed(weight_versions=[{"version": v, "start": start, "end": end} for v, start, end in reported])
    [output] = generated(client(fake.address), [request_of(4, 5)])
    assert (output.weight_version, output.weight_spans) == (known, spans)


@pytest.mark.parametrize(("status", "kind"), [(400, RequestRefused), (401, RequestRefused), (500, EngineError)])
def test_a_refusal_is_told_from_a_failure(fake, status, kind):
    fake.status, fake.says = status, '{"error": {"message": "too long"}}'
    with pytest.raises(EngineError, match=rf"{fake.address}: .* answered {status}: too long$") as error:
        generated(client(fake.address), [request_of(4)])
    assert type(error.value) is kind


def test_a_server_that_is_not_there_is_an_error_with_its_address():
    with fake_servers(1) as [server]:
        address = server.address
    with pytest.raises(EngineError, match=address):
        run(VllmServer(address).health())


def test_a_connection_that_ends_without_an_answer_is_an_error(fake):
    fake.die_at = 2
    with pytest.raises(EngineError, match=fake.address):
        generated(client(fake.address), [request_of(i) for i in range(3)])


@pytest.mark.timing
def test_a_server_that_writes_no_token_is_given_up_in_time(fake):
    fake.hang_at = 1
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"no token within 1 s"):
        generated(client(fake.address, timeout_s=1.0), [request_of(1), request_of(2)])
    assert 1.0 <= time.monotonic() - started < 30


@pytest.mark.full
def test_a_slow_server_is_waited_for_while_it_writes_tokens(fake):
    fake.seconds, fake.gets_on = 4.0, True
    before = signs_of_life._signs.count
    assert len(generated(client(fake.address, timeout_s=3.0), [request_of(1), request_of(2)])) == 2
    assert signs_of_life._signs.count > before


@pytest.mark.full
def test_a_slow_server_is_waited_for_while_it_answers_others(fake):
    server = client(fake.address, timeout_s=3.0)
    fake.seconds, fake.counts = 4.0, False
    done = threading.Event()

    def others() -> None:
        while not done.wait(0.2):
            run(server.health())

    thread = threading.Thread(target=others)
    thread.start()
    try:
        assert len(generated(server, [request_of(1)])) == 1
    finally:
        done.set()
        thread.join()


def test_tokens_do_not_excuse_what_takes_none(fake):
    fake.gets_on, fake.hangs_at = True, "/update_weights"
    with pytest.raises(EngineError, match=r"no answer within 1 s"):
        run(VllmServer(fake.address, timeout_s=1.0).update_weights(complete=""))


def test_the_count_of_tokens_is_of_prompts_and_responses(fake):
    assert run(VllmServer(fake.address).num_tokens()) == 10
    fake.counts = False
    assert run(VllmServer(fake.address).num_tokens()) is None


@pytest.mark.timing
def test_waiting_can_be_interrupted(fake):
    fake.hang_at = 1
    server = client(fake.address, timeout_s=30)
    threading.Timer(0.2, server.interrupt).start()
    started = time.monotonic()
    with pytest.raises(EngineError, match="given up"):
        generated(server, [request_of(1)])
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


@pytest.mark.timing
@pytest.mark.parametrize("path", ["/update_weights", "/inference/v1/generate"])
def test_a_run_that_shall_end_does_not_wait_for_a_server_that_has_fallen_silent(fake, monkeypatch, path):
    """The signal may have ended the engine behind the server."""
    fake.hangs_at = path
    server, started = client(fake.address, timeout_s=600), time.monotonic()
    with preempted(monkeypatch, 1.0), pytest.raises(EngineError, match="within 1 s, and a signal has asked"):
        generated(server, [request_of(1)]) if "generate" in path else run(server.update_weights(complete=""))
    assert 1.0 < time.monotonic() - started < 60


@pytest.mark.full
def test_a_run_that_shall_end_waits_for_a_server_that_writes_tokens(fake, monkeypatch):
    fake.seconds, fake.gets_on = 4.5, True
    with preempted(monkeypatch, 3.0):
        assert len(generated(client(fake.address, timeout_s=600), [request_of(1), request_of(2)])) == 2


@pytest.mark.parametrize(
    ("path", "text", "ask", "why"),
    [
        ("/v1/models", '{"data": ["no model"]}', VllmServer.max_model_len, "another form, got .*no model"),
        ("/get_world_size", '{"world_size": "many"}', VllmServer.world_size, "another form, got .*many"),
        ("/health", "[" * 100_000, VllmServer.health, "another form"),
        ("/metrics", "vllm:prompt_tokens_total many", VllmServer.num_tokens, "expected numbers of tokens"),
    ],
)
def test_an_answer_of_another_form_is_an_error_with_the_address(fake, path, text, ask, why):
    fake.texts = {path: text}
    with pytest.raises(EngineError, match=f"^{fake.address}: .*{why}") as error:
        run(ask(VllmServer(fake.address)))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("path", ["/v1/models", "/inference/v1/generate", "/metrics"])
def test_an_answer_without_an_end_is_read_up_to_a_limit(fake, path):
    fake.endless_at = path
    server = client(fake.address)
    asked = {"/v1/models": server.max_model_len, "/metrics": server.num_tokens}
    ask = asked.get(path, lambda: server.generate(request_of(4)))
    with pytest.raises(EngineError, match=f"^{fake.address}: .*expected an answer of at most [0-9]+ bytes, got a lon"):
        run(ask())


@pytest.mark.timing
@pytest.mark.parametrize("path", ["/v1/models", "/inference/v1/generate"])
def test_headers_that_come_byte_by_byte_are_given_up_in_time(fake, path):
    fake.drips_at, started = path, time.monotonic()
    server = client(fake.address, timeout_s=0.5)
    with pytest.raises(EngineError, match=rf"{fake.address}: .*TimeoutError: no (answer|token) within 0.5 s"):
        generated(server, [request_of(1)]) if "generate" in path else run(server.max_model_len())
    assert time.monotonic() - started < 20, "the headers take minutes"


def test_an_answer_that_breaks_off_is_an_error(fake, monkeypatch):
    monkeypatch.setattr(fake_vllm._Handler, "send_header", longer_than_it_is)
    with pytest.raises(EngineError, match=f"{fake.address}: .*RemoteProtocolError: peer closed connection"):
        run(VllmServer(fake.address).weight_version())


def longer_than_it_is(handler: Any, name: str, value: str) -> None:
    """Send a header; one that states the length of the answer states 9 bytes more, and ends the connection."""
    is_length = name == "Content-Length"
    handler.close_connection = handler.close_connection or is_length
    BaseHTTPRequestHandler.send_header(handler, name, str(int(value) + 9) if is_length else value)


def test_the_limit_grows_with_the_response(fake):
    [output] = generated(client(fake.address), [request_of(4, max_tokens=40_000)])
    assert len(output.token_ids) == 40_000, "an answer of 3 MB"


def test_the_token_is_sent_and_never_shown(fake):
    fake.token = "secret"
    server = VllmServer(fake.address, "secret")
    assert run(server.weight_version()) == "7"
    assert "secret" not in repr(server)
    with pytest.raises(RequestRefused, match="401") as error:
        run(VllmServer(fake.address, "secres").weight_version())
    assert "secre" not in str(error.value)
    with pytest.raises(EngineError, match="HTTP does not allow a header of the request") as impossible:
        run(VllmServer(fake.address, "secret\nline").weight_version())
    assert "secre" not in str(impossible.value)


def test_a_method_gets_its_arguments_and_gives_the_results_of_all_workers(fake):
    assert run(VllmServer(fake.address).call_all("pop", ["a"], 2)) == [{"method": "pop", "args": [["a"], 2]}]


def test_no_descriptor_is_left_behind(fake):
    server = client(fake.address, timeout_s=60)
    run(server.health())
    before = psutil.Process().num_fds()
    assert len(generated(server, [request_of(i, max_tokens=50) for i in range(40)])) == 40
    for _ in range(3000):  # the sockets close when the thread of the event loop comes to it
        if psutil.Process().num_fds() > before:
            time.sleep(0.01)
    assert psutil.Process().num_fds() <= before
