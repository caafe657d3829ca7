# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Free ports of this machine."""

from __future__ import annotations

import socket


def neighbouring_ports() -> int:
    """Return a free port whose next port is free too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
