# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Names by which the trainer and a vLLM server know each other.

They are environment variables, the backend, arguments and addresses.  The module imports no torch, so that a server
refuses a wrong command line at once.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

_POLL_SECONDS = 0.5


def when_ended(is_alive: Callable[[], bool], end: Callable[[], None], name: str) -> None:
    """Call ``end()`` once ``is_alive()`` is false, in a daemon thread of this name; return at once."""

    def watch() -> None:
        while is_alive():
            time.sleep(_POLL_SECONDS)
        end()

    threading.Thread(target=watch, name=name, daemon=True).start()


TOKEN_VARIABLE = "SELFDISTILL_SERVER_TOKEN"
"""Environment variable with the token that a server demands."""
PARENT_VARIABLE = "SELFDISTILL_SERVER_PARENT"
"""Environment variable with the process id of a server's parent; the server ends with it."""
SERVER_VARIABLE = "SELFDISTILL_SERVER_PROCESS"
"""Environment variable with the process id of the server, for its children."""
BACKEND = "selfdistill"
"""Name of this package's backend among vLLM's weight-transfer backends."""


def own_address(host: str, port: int) -> str:
    """Return the address of this machine on the way to ``host``."""
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # a datagram socket: nothing is sent
        return str(probe.getsockname()[0])


def as_arguments(engine_args: Mapping[str, Any]) -> list[str]:
    """Return ``{"max_num_seqs": 8, "enable_prefix_caching": False}`` as vLLM's command line spells it."""
    arguments = []
    for name, value in engine_args.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            arguments.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, (list, tuple)):
            arguments += [option, *map(str, value)]
        else:
            arguments.append(f"{option}={json.dumps(value) if isinstance(value, Mapping) else value}")
    return arguments
