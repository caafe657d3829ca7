# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The key-value store of a launch, through which ranks exchange messages without a process group."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any


def launch_store(prefix: str, world_size: int, timeout_s: float, *, may_keep: bool = False) -> Any:
    """Return a new connection, a ``Store``, to the store of this launch, for keys under ``prefix``.

    The store is at MASTER_ADDR and MASTER_PORT.  torchrun keeps one store for all restarts of a launch, so the keys
    contain the number of the restart.  Without torchrun's store, the rank with ``may_keep`` keeps one in its process.
    A world of one rank gets a store of its own in memory.
    ``timeout_s``: the longest wait for the connection or a key, in seconds.
    """
    import torch.distributed as dist

    launch = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if world_size == 1:
        return dist.PrefixStore(f"{prefix}/{launch}", dist.HashStore())
    keeps = may_keep and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=keeps,
        wait_for_workers=False,
        multi_tenant=True,
        timeout=timedelta(seconds=timeout_s),
    )
    return dist.PrefixStore(f"{prefix}/{launch}", store)
