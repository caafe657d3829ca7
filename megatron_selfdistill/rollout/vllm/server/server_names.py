# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Names by which the trainer and a vLLM server know each other.

They are environment variables, the backend, arguments and addresses.  The module imports no torch, so that a server
refuses a wrong command line at once.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

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
