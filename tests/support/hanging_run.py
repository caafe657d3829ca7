# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A tiny run under torchrun of which one rank hangs in its third step, or before any: ``hanging_run.py HOW RANK
key=value ...``.  Unseen: no rank shows by its frames that it waits, as on a GPU."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from typing import Any

WAYS = {
    "sleeps": lambda: time.sleep(600),
    "sleeps unseen": lambda: time.sleep(600),
    "sleeps in the start": lambda: time.sleep(600),
    "holds the interpreter": lambda: ctypes.PyDLL(None).sleep(600),
    "holds the interpreter at once": lambda: ctypes.PyDLL(None).sleep(600),
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


def main(how: str, rank: str, arguments: list[str]) -> int:
    from megatron_selfdistill import train
    from megatron_selfdistill.distributed import watchdog
    from megatron_selfdistill.learner import Learner
    from megatron_selfdistill.trainer import Trainer

    at_once, in_the_start = how.endswith("at once"), how.endswith("in the start")
    loop, pack, build = train.loop, Trainer.pack, Learner.__init__  # in the same phase as the others, who wait
    if how.endswith("unseen"):
        watchdog._WAITING = ("nowhere",)

    def pack_or_hang(self: Any, *args: Any) -> Any:
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

    Trainer.pack = pack_or_hang  # type: ignore[method-assign]
    Learner.__init__ = hang_or_build  # type: ignore[method-assign]
    train.loop = hang_or_loop
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
