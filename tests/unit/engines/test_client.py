# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One server over HTTP: its answer counts when it is complete, and each failure has a message."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import fake_vllm
import psutil
import pytest
from events import wait_until
from fake_vllm import FakeVllm, answer_to, fake_servers, generated, tokens_behind

from megatron_selfdistill.distributed import signs_of_life, stop
from megatron_selfdistill.engines.vllm import client as client_module
from megatron_selfdistill.engines.vllm import patient_http
from megatron_selfdistill.engines.vllm.client import RequestRefused, VllmServer
from megatron_selfdistill.engines.vllm.coroutines import begin, run
from megatron_selfdistill.engines.vllm.engine import EngineRequest
from megatron_selfdistill.errors import EngineError


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with fake_servers(1) as [server]:
        server.version = "7"
        yield server


def client(address: str) -> VllmServer:
    return VllmServer(address, vocab_size=50)


def request_of(*prompt: int, max_tokens: int = 3) -> EngineRequest:
    return EngineRequest(list(prompt), {"max_tokens": max_tokens, "temperature": 0.0})


def test_many_requests_are_in_flight_at_once_and_answers_keep_their_order(fake):
    fake.together = 40
    prompts = [(7 * i % 40, 1) for i in range(40)]
    outputs = generated(client(fake.address), [request_of(*prompt) for prompt in prompts])
    assert [output.token_ids for output in outputs] == [tokens_behind(list(prompt), 3) for prompt in prompts]


def changed(**choice: Any) -> str:
    answer = answer_to({"token_ids": [4, 5], "sampling_params": {"max_tokens": 3}}, ("7", "7"))
    answer["choices"][0].update(choice)
    return json.dumps(answer)


CONTENT = [{"token_id": token, "logprob": -0.5} for token in tokens_behind([4, 5], 3)]


def of_log_probs(value: object) -> str:
    return changed(logprobs={"content": [{**entry, "logprob": value} for entry in CONTENT]})


def of_token(value: object, stated: object = None) -> str:
    """Return an answer whose last token is ``value``, and ``stated``, or the same, where it states the log-prob."""
    content = [*CONTENT[:2], {**CONTENT[2], "token_id": value if stated is None else stated}]
    return changed(token_ids=[*tokens_behind([4, 5], 2), value], logprobs={"content": content})


def of_spans(*spans: tuple[object, object, object]) -> str:
    return changed(weight_versions=[{"version": v, "start": start, "end": end} for v, start, end in spans])


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (" ", "form"),
        (changed(logprobs=None), "form"),
        (changed(logprobs={"content": CONTENT[:2]}), "2 log-probs"),
        (of_token(11, stated=60), "a log-prob per token"),
        (changed(token_ids=[], logprobs={"content": []}), "0 tokens"),
        (changed(token_ids=[9, 10], logprobs={"content": CONTENT[:2]}), "--max-model-len"),
        (changed(finish_reason="abort"), "'abort'"),
        (changed(finish_reason="stop"), "stop tokens 3, 4"),
        (of_log_probs(math.nan), "log-probs nan"),
        (of_log_probs(3.0), "log-probs 3.0"),
        (of_log_probs(-9999.0), "NaN"),
        (of_token(50), "token ids 50"),
        (of_token(-1), "token ids -1"),
        (of_spans(("7", 0, 2)), "0 to 2"),
        (of_spans(("7", 0, 1), ("7", 2, 3)), "0 to 1, 2 to 3"),
        ("[" * 100_000, "form"),
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
    fake.says = of_spans(*reported)
    [output] = generated(client(fake.address), [request_of(4, 5)])
    assert (output.weight_version, output.weight_spans) == (known, spans)


@pytest.mark.parametrize(("status", "kind"), [(400, RequestRefused), (401, RequestRefused), (500, EngineError)])
def test_a_refusal_is_told_from_a_failure(fake, status, kind):
    fake.status, fake.says = status, '{"error": {"message": "too long"}}'
    with pytest.raises(EngineError, match=rf"{fake.address}: .* answered {status}: too long$") as error:
        generated(client(fake.address), [request_of(4)])
    assert type(error.value) is kind


class Clock:
    """The clock by which requests wait, which stands still until a test moves it."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock, wait = Clock(), patient_http._Wait
    monkeypatch.setattr(patient_http, "time", clock)
    monkeypatch.setattr(patient_http, "_Wait", lambda *given: wait(*given, since=clock.now))
    monkeypatch.setattr(patient_http, "_TICK_SECONDS", 0.01)
    return clock


GENERATE, LOAD, MODELS = "/inference/v1/generate", "/update_weights", "/v1/models"


def asking(server: VllmServer, path: str) -> Any:
    asks = {GENERATE: lambda: server.generate(request_of(1)), LOAD: server.update_weights, MODELS: server.max_model_len}
    return asks[path]()


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ({"hangs_at": GENERATE}, "no token within 1200 s"),
        ({"hangs_at": LOAD, "gets_on": True}, "no answer within 1200 s"),  # tokens do not excuse what takes none
        ({"drips_at": GENERATE}, "no token within 1200 s"),
        ({"drips_at": MODELS}, "no answer within 1200 s"),
    ],
    ids=str,
)
def test_a_silent_server_is_given_up(fake, clock, fault, why):
    path = fault.get("hangs_at") or fault["drips_at"]
    vars(fake).update(fault)
    answer = begin(asking(client(fake.address), path))
    wait_until(lambda: path in fake.calls)
    clock.now += 1201
    with pytest.raises(EngineError, match=f"{fake.address}: .*TimeoutError: {why}$"):
        answer.result()


@pytest.mark.parametrize("path", [LOAD, GENERATE])
def test_a_run_that_shall_end_does_not_wait_for_a_server_that_has_fallen_silent(fake, clock, path):
    """The signal may have ended the engine behind the server."""
    fake.hangs_at = path
    server = client(fake.address)
    with stop.listening():
        answer = begin(asking(server, path))
        wait_until(lambda: path in fake.calls)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: server._http._signalled is not None)
        clock.now += 16
        with pytest.raises(EngineError, match="within 15 s, and a signal has asked"):
            answer.result()


@pytest.mark.parametrize("sign", ["tokens", "tokens after a signal", "answers to others"])
def test_a_slow_server_is_waited_for_while_it_shows_signs_of_life(fake, clock, sign):
    fake.holds, fake.gets_on, fake.counts = [1], sign != "answers to others", sign != "answers to others"
    server, before = client(fake.address), signs_of_life._signs.count
    with stop.listening():
        response = begin(server.generate(request_of(1)))
        wait_until(lambda: fake.begun)
        if sign == "tokens after a signal":
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: server._http._signalled is not None)
        for _ in range(10):
            clock.now += (15 if sign == "tokens after a signal" else 1200) / 2
            if sign == "answers to others":
                run(server.health())
            wait_until(lambda: server._http._last_sign == clock.now)
        fake.holds = []
        assert len(response.result().token_ids) == 3
    assert signs_of_life._signs.count > before or sign == "answers to others"


def test_waiting_can_be_interrupted(fake):
    fake.hang_at = 1
    server = client(fake.address)
    response = begin(server.generate(request_of(1)))
    wait_until(lambda: fake.begun)
    server.interrupt()
    with pytest.raises(EngineError, match="given up"):
        response.result()


def test_the_count_of_tokens_is_of_prompts_and_responses(fake):
    assert run(VllmServer(fake.address).num_tokens()) == 10
    fake.counts = False
    assert run(VllmServer(fake.address).num_tokens()) is None


@pytest.mark.parametrize(
    ("path", "text", "ask", "why"),
    [
        (MODELS, '{"data": ["no model"]}', VllmServer.max_model_len, "no model"),
        ("/get_world_size", '{"world_size": "many"}', VllmServer.world_size, "many"),
        ("/health", "[" * 100_000, VllmServer.health, "form"),
        ("/metrics", "vllm:prompt_tokens_total many", VllmServer.num_tokens, "numbers of tokens"),
    ],
)
def test_an_answer_of_another_form_is_an_error_with_the_address(fake, path, text, ask, why):
    fake.texts = {path: text}
    with pytest.raises(EngineError, match=f"^{fake.address}: .*{why}") as error:
        run(ask(VllmServer(fake.address)))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("path", [MODELS, GENERATE])
def test_an_answer_without_an_end_is_read_up_to_a_limit(fake, monkeypatch, path):
    monkeypatch.setattr(client_module, "_FIXED_BYTES", 2**17)
    monkeypatch.setitem(patient_http.PatientHttp.answer.__kwdefaults__, "max_bytes", 2**17)
    fake.endless_at = path
    with pytest.raises(EngineError, match=f"^{fake.address}: .*expected an answer of at most [0-9]+ bytes, got a lon"):
        run(asking(client(fake.address), path))


def test_an_answer_that_breaks_off_is_an_error(fake, monkeypatch):
    def longer_than_it_is(handler: Any, name: str, value: str) -> None:
        """Send a header; one that states the length of the answer states 9 bytes more, and ends the connection."""
        is_length = name == "Content-Length"
        handler.close_connection = handler.close_connection or is_length
        BaseHTTPRequestHandler.send_header(handler, name, str(int(value) + 9) if is_length else value)

    monkeypatch.setattr(fake_vllm._Handler, "send_header", longer_than_it_is)
    with pytest.raises(EngineError, match=f"{fake.address}: .*RemoteProtocolError: peer closed connection"):
        run(VllmServer(fake.address).weight_version())


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


def test_no_descriptor_is_left_behind(fake):
    server = client(fake.address)
    run(server.health())
    before = psutil.Process().num_fds()
    assert len(generated(server, [request_of(i, max_tokens=50) for i in range(40)])) == 40
    wait_until(lambda: psutil.Process().num_fds() <= before)  # the thread of the event loop closes the sockets
