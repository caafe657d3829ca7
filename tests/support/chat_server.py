# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A real HTTP server on this machine that answers chat completions by a script."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[[int, dict[str, Any]], tuple[int, Any]]
"""A function of the number of the request, from 0, and its body; it returns the status and the body of the answer,
a text as it is and anything else as JSON."""


@contextlib.contextmanager
def chat_server(script: Script) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve answers by ``script``; yield the address and a list of the requests: path, authorization and body."""
    seen: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(seen)
                seen.append({"path": self.path, "key": self.headers["Authorization"], "body": body})
            status, answer = script(number, body)
            payload = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client may have given up
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def completion(content: str | None, role: str = "assistant", **fields: Any) -> dict[str, Any]:
    """Return the body of a completion with ``content`` and further fields beside its choices."""
    message = {"role": role, "content": content}
    return {"id": "1", "object": "chat.completion", "choices": [{"index": 0, "message": message}], **fields}
