# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The watch of another process, with which a server and its workers end when that process has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_POLL_SECONDS = 0.5


def when_ended(is_alive: Callable[[], bool], end: Callable[[], None], name: str) -> None:
    """Call ``end()`` once ``is_alive()`` is false, in a daemon thread of this name; return at once."""

    def watch() -> None:
        while is_alive():
            time.sleep(_POLL_SECONDS)
        end()

    threading.Thread(target=watch, name=name, daemon=True).start()
