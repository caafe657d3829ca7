# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""An environment behind a real HTTP server: requests, replies, and one message for everything that can go wrong."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import pytest
from characters import ONE_RANK, Characters
from chat_server import chat_server, completion

from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.data.given_solutions import GivenSolutions
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompt_templates import PromptTemplates
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.environments import environment as environments
from megatron_selfdistill.environments.environment import HttpEnvironment
from megatron_selfdistill.environments.episodes import StatelessEpisodes
from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.rollout.base import Response
from megatron_selfdistill.rollout.sampling import SampleKey
from megatron_selfdistill.sources.rollouts import Rollout

PROBLEM = Problem("p7", ({"role": "user", "content": "3 - 4"},), "", "-1", "file:7")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Let attempts follow each other at once."""
    monkeypatch.setattr(environments, "_FIRST_PAUSE_SECONDS", 0.0)


def reply_to(script, said=("-1",), problem=PROBLEM, **options) -> tuple[Reply, list]:
    with chat_server(script) as (url, seen):
        return HttpEnvironment(url, **options).reply(problem, said), seen


def test_the_request_is_the_conversation_with_the_problem_in_the_metadata(monkeypatch):
    monkeypatch.setenv("LAB_KEY", "secret")
    said = ["-7", "No.", "-1"]
    _, (request,) = reply_to(lambda n, body: (200, completion(None)), said, model="judge", api_key_env="LAB_KEY")
    assert request["path"] == "/v1/chat/completions" and request["key"] == "Bearer secret"
    assert request["body"] == {
        "model": "judge",
        "messages": [
            {"role": "user", "content": "3 - 4"},
            {"role": "assistant", "content": "-7"},
            {"role": "user", "content": "No."},
            {"role": "assistant", "content": "-1"},
        ],
        "metadata": {"problem_id": "p7", "turn": "1", "answer": "-1"},
    }


def test_without_key_model_and_answer_the_request_names_none():
    unanswered = Problem("q", PROBLEM.messages, "", None, "file:8")
    _, (request,) = reply_to(lambda n, body: (200, completion(None)), problem=unanswered)
    assert request["key"] is None and "model" not in request["body"]
    assert request["body"]["metadata"] == {"problem_id": "q", "turn": "0"}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (completion("Look again.", reward=0.5, feedback="a hint", done=False), ("Look again.", "user", "a hint", 0.5)),
        (completion("3", role="tool", done=False, reward=1), ("3", "tool", None, 1.0)),
        (completion("Well.", role="user", done=False), ("Well.", "user", None, 0.0)),
    ],
)
def test_a_reply_has_text_role_feedback_and_reward(answer, expected):
    reply, _ = reply_to(lambda n, body: (200, answer))
    assert (reply.text, reply.role, reply.feedback, reply.reward) == expected and not reply.done


def test_missing_fields_have_the_defaults_of_a_reply():
    reply, _ = reply_to(lambda n, body: (200, {"choices": [{"message": {}}]}))
    assert reply == Reply()


@pytest.mark.parametrize("status", [500, 503, 429])
def test_an_attempt_that_fails_for_the_moment_is_repeated(status):
    reply, seen = reply_to(lambda n, body: (200, completion("ok")) if n == 2 else (status, "busy"))
    assert reply.text == "ok" and len(seen) == 3 and seen[0] == seen[2]


@contextlib.contextmanager
def bytes_server(parts: Iterable[bytes], pause_s: float) -> Iterator[str]:
    """Answer each request with ``parts``, after each of which there is a pause; yield the address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):  # the client has given up, or the test is over
                while True:
                    connected, _ = listening.accept()
                    with connected, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        request = b""
                        while not request.endswith(b"}"):
                            request += connected.recv(65536)
                        for part in parts:
                            connected.sendall(part)
                            time.sleep(pause_s)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.timing
@pytest.mark.parametrize(
    "parts",
    [
        [OK + b"Content-Length: 1000\r\n\r\n", *[b" "] * 1000],
        [OK + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\n \r\n"] * 1000],
        [OK, *[b"x"] * 1000],
        [b"HTTP/1.1 100 Continue\r\n\r\n"] * 1000,
    ],
    ids=["body", "chunks", "headers", "continue"],
)
def test_the_timeout_is_that_of_the_whole_answer(parts):
    began = time.monotonic()
    message = r"^environment.options.url=\S+: expected .* within 0.3 s, got none; attempts: 1, the last: TimeoutError"
    with bytes_server(parts, pause_s=0.02) as url, pytest.raises(RuntimeError, match=message):
        HttpEnvironment(url, timeout_s=0.3, retries=0).reply(PROBLEM, ["-1"])
    assert time.monotonic() - began < 10, "without a deadline, the answer takes 20 s"


@pytest.mark.parametrize(
    "parts",
    [
        [OK + b"Content-Length: 1000000000000\r\n\r\n"],
        [OK + b"Content-Length: 20\r\n\r\n", b" " * 20],
        [OK + b"\r\n", b" " * 20],
        [OK + b"Transfer-Encoding: chunked\r\n\r\n", *[b"5\r\n     \r\n"] * 4],
    ],
    ids=["announced", "sent", "without a length", "in chunks"],
)
def test_an_answer_that_is_too_long_is_refused_and_not_repeated(parts, monkeypatch):
    monkeypatch.setattr(environments, "MAX_BYTES", 19)
    with bytes_server(parts, pause_s=0) as url, pytest.raises(ValueError, match=r"at most 19 bytes, got a longer"):
        HttpEnvironment(url, timeout_s=20, retries=0).reply(PROBLEM, ["-1"])


def test_an_address_where_nothing_listens_is_one_message():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(RuntimeError, match=rf"environment.options.url={url}: .* ConnectionRefusedError"):
        HttpEnvironment(url, retries=0).reply(PROBLEM, ["-1"])


def test_a_key_that_no_header_may_have_is_not_shown(monkeypatch):
    monkeypatch.setenv("LAB_KEY", "secret\nkey")
    with pytest.raises(RuntimeError, match="HTTP does not allow a header of the request") as error:
        reply_to(lambda n, body: (200, completion("ok")), api_key_env="LAB_KEY", retries=0)
    assert "secret" not in str(error.value)


def test_threads_ask_the_endpoint_at_the_same_time_and_a_failure_names_the_problem():
    given = GivenSolutions(PromptBuilder(Characters(), PromptTemplates("{problem}|{solution}")), 40, 8, policy="error")
    response = Response([ord("1")], [0.0], [0.0], "length")
    pair = PromptPair("p", [1], [1])
    asked = [[Rollout(PROBLEM, pair, response, key=SampleKey(0, "p", i))] for i in range(8)]

    def episodes(url: str) -> StatelessEpisodes:
        return StatelessEpisodes(
            environment=HttpEnvironment(url, retries=0),
            given=given,
            grid=SimpleNamespace(**vars(ONE_RANK)),
            max_turns=2,
            threads=8,
            has_teacher=True,
        )

    meeting = threading.Barrier(8, timeout=20)

    def together(number, body):
        meeting.wait()  # breaks, unless seven other requests are under way
        return 200, completion("ok", reward=1.0)

    with chat_server(together) as (url, _):
        assert [reply.reward for reply in episodes(url).replies(asked)] == [1.0] * 8
    message = r"^file:7: the environment failed with RuntimeError: environment.options.url="
    with chat_server(lambda number, body: (400, "bad")) as (url, _), pytest.raises(EngineError, match=message):
        episodes(url).replies(asked)
