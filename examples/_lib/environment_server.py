# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""An environment as an endpoint: for chat completions, which ``environment.name=http`` asks, or for sessions.

PYTHONPATH=examples python -m _lib.environment_server _lib.checker.Checker --port 8400

``environment.name=http_sessions`` asks for sessions, which a class with ``reset``, ``step`` and ``close`` has.
"""

from __future__ import annotations

import argparse
import json
import uuid
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from megatron_selfdistill.config import function_named
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.environments.environment import Environment, SessionLimits, has_sessions
from megatron_selfdistill.environments.session_processes import SessionProcesses


def server_of(environment: Environment | SessionProcesses, port: int) -> ThreadingHTTPServer:
    """Return a server of ``environment``, or of its sessions, on this machine; port 0 is any free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """Answer POST /v1/chat/completions, or /reset, /step and /close of sessions."""
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if isinstance(environment, SessionProcesses):
                status, answer = session_answer(environment, self.path.rpartition("/")[2], request)
            else:
                status, answer = 200, completion(environment, request)
            payload = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Print nothing."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def completion(environment: Environment, request: dict[str, Any]) -> dict[str, Any]:
    """Return the body of the answer: the reply to the last message of the request."""
    messages, metadata = request["messages"], request["metadata"]
    num_said = 2 * int(metadata["turn"]) + 1  # responses and replies by turns; the last one is a response
    asked, said = messages[:-num_said], [message["content"] for message in messages[-num_said:]]
    problem = Problem(metadata["problem_id"], tuple(asked), "", metadata.get("answer"), metadata["problem_id"])
    reply = environment.reply(problem, said)
    message = {"role": reply.role, "content": reply.text}
    fields = {"reward": reply.reward, "feedback": reply.feedback, "hint": reply.hint, "done": reply.done}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message}], **fields}


def session_answer(sessions: SessionProcesses, call: str, request: dict[str, Any]) -> tuple[int, Any]:
    """Return the status and the body of the answer to a call of a session."""
    if call == "reset":
        name, place = uuid.uuid4().hex, request["problem_id"]
        problem = Problem(place, tuple(request["messages"]), "", request["answer"], place)
        reply = sessions.reset(name, problem, request["seed"])
        begun = {"session": name, "text": reply.text, "hint": reply.hint}
        return (200, begun) if reply.failure is None else (500, reply.failure)
    if call == "step":
        return 200, asdict(sessions.step(request["session"], request["response"]))
    if request["session"] in sessions:  # a session whose episode is over has ended
        sessions.end(request["session"])
    return 200, {}


def main() -> None:
    """Serve the environment of the command line until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("environment", help="the dotted path of a class without arguments")
    parser.add_argument("--port", type=int, default=8400)
    arguments = parser.parse_args()
    make = function_named("environment", arguments.environment, {})
    environment = SessionProcesses(arguments.environment, {}, SessionLimits()) if has_sessions(make) else make()
    server_of(environment, arguments.port).serve_forever()


if __name__ == "__main__":
    main()
