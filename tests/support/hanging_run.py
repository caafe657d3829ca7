# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A tiny run under torchrun in which one rank hangs in its third step, or before its first step.

The command line is ``hanging_run.py HOW RANK key=value ...``.  With a way that ends in "unseen", the stack of a rank
does not show that the rank waits, as on a GPU.  Before the third step every rank reports progress several times per
second, so that a short timeout does not take a busy machine for a hang.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any


def fail() -> None:
    raise RuntimeError("only here")


WAYS: dict[str, Callable[[], object]] = {
    "sleeps": lambda: time.sleep(600),
    "sleeps unseen": lambda: time.sleep(600),
    "sleeps in the start": lambda: time.sleep(600),
    "holds the interpreter": lambda: ctypes.PyDLL(None).sleep(600),
    "holds the interpreter at once": lambda: ctypes.PyDLL(None).sleep(600),
    "raises": fail,
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


def main(how: str, rank: str, arguments: list[str]) -> int:
    """Train with ``arguments``, and let one rank hang in the way ``how``; return the exit status."""
    from megatron_selfdistill import train
    from megatron_selfdistill.distributed import signs_of_life, watchdog
    from megatron_selfdistill.learner import Learner
    from megatron_selfdistill.trainer import Trainer

    at_once, in_the_start = how.endswith("at once"), how.endswith("in the start")
    loop, pack, build = train.loop, Trainer.pack, Learner.__init__  # phases in which the other ranks wait
    if how.endswith("unseen"):
        watchdog._WAITING = ("nowhere",)  # type: ignore[assignment]

    third_step = threading.Event()

    def beat_until_the_third_step() -> None:
        while not third_step.wait(0.2):
            signs_of_life.beat()

    if not (at_once or in_the_start):
        threading.Thread(target=beat_until_the_third_step, daemon=True).start()

    def pack_or_hang(self: Any, *args: Any) -> Any:
        if self.step == 2:
            third_step.set()
        if self.step == 2 and not (at_once or in_the_start) and os.environ["RANK"] == rank:
            WAYS[how]()
        return pack(self, *args)

    def hang_or_loop(trainer: Any) -> None:
        if at_once and os.environ["RANK"] == rank:
            WAYS[how]()
        loop(trainer)

    def hang_or_build(self: Any, *args: Any, **options: Any) -> None:
        if in_the_start and os.environ["RANK"] == rank:
            WAYS[how]()
        build(self, *args, **options)

    patched: list[tuple[Any, str, Any]] = [
        (Trainer, "pack", pack_or_hang),
        (Learner, "__init__", hang_or_build),
        (train, "loop", hang_or_loop),
    ]
    for owner, name, replacement in patched:
        setattr(owner, name, replacement)
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
