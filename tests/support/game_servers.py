# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Servers of games, each a module of this directory that takes its port as the first argument."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from events import wait_until
from ports import free_port


@contextmanager
def serving(python: Path | str, module: str, *arguments: str) -> Iterator[str]:
    """Start the server of ``module`` with the interpreter ``python``, yield its address, and end it."""
    port = free_port()

    def answers() -> bool:
        assert server.poll() is None, "the server has ended"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    server = subprocess.Popen([python, Path(__file__).with_name(f"{module}.py"), str(port), *arguments])
    try:
        wait_until(answers)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
