# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""An environment as an endpoint for chat completions, which ``environment.name=http`` asks.

PYTHONPATH=examples python -m _lib.environment_server _lib.checker.Checker --port 8400
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from megatron_selfdistill.config import function_named
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.environments import Environment


def server_of(environment: Environment, port: int) -> ThreadingHTTPServer:
    """Return a server of ``environment`` on this machine; port 0 is any free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """Answer POST /v1/chat/completions."""
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            payload = json.dumps(completion(environment, request)).encode()
            self.send_response(200)
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
    fields = {"reward": reply.reward, "feedback": reply.feedback, "done": reply.done}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message}], **fields}


def main() -> None:
    """Serve the environment of the command line until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("environment", help="the dotted path of a class without arguments")
    parser.add_argument("--port", type=int, default=8400)
    arguments = parser.parse_args()
    server_of(function_named("environment", arguments.environment, {})(), arguments.port).serve_forever()


if __name__ == "__main__":
    main()
