# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Free ports of this machine."""

from __future__ import annotations

import itertools
import os
import socket

# Below the ports that systems give to connections, so that no connection takes a port between its choice and its use.
_FIRST, _NUM_PORTS = 15_000, 15_000
_CANDIDATES = itertools.count(os.getpid() * 97)  # another sequence in each process of the tests


def free_port() -> int:
    """Return a free port that this process has not returned before."""
    while not _is_free(port := _FIRST + next(_CANDIDATES) % _NUM_PORTS):
        pass
    return port


def neighbouring_ports() -> int:
    """Return a free port whose next port is free too; this process has returned neither of them before."""
    while (first := free_port()) + 1 != free_port():
        pass
    return first


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
