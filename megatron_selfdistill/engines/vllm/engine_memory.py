# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The part of a GPU's memory that a vLLM engine may take beside a trainer.

vLLM refuses to start where less than ``gpu_memory_utilization`` (0.92 by default) of a GPU is free, even where
``kv_cache_memory_bytes`` fixes the size of its KV cache.  A trainer leaves less, so an engine beside a trainer gets the
share that is free.  vLLM checks that share once, when its worker starts; waking from sleep checks nothing.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import dataclass

GIB = 2**30
MARGIN_BYTES = 2 * GIB
"""Bytes of the free memory that are not part of an engine's share.

The process groups of vLLM, which take NCCL's buffers, start after the memory was measured and before vLLM checks;
activations and CUDA graphs come later.
"""

# A context on a GPU takes hundreds of MiB until its process ends, so a process that ends at once looks.
_LOOK = "import json, sys, torch; print(json.dumps([torch.cuda.mem_get_info(i) for i in range(int(sys.argv[1]))]))"
_LOOK_SECONDS = 120.0


@dataclass(frozen=True)
class DeviceMemory:
    """The memory of one GPU, in bytes, or the least free and the largest total of several GPUs."""

    free: int
    """Bytes that no process holds."""
    total: int
    """Bytes of the device."""

    @property
    def share(self) -> float:
        """The value of ``gpu_memory_utilization`` with which vLLM takes the free memory less `MARGIN_BYTES`."""
        return (self.free - MARGIN_BYTES) / self.total


def device_memory() -> DeviceMemory:
    """Return the memory of this process's current GPU, after the blocks that torch caches have been given back."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    return DeviceMemory(*torch.cuda.mem_get_info())


def memory_of_visible_gpus(count: int) -> DeviceMemory:
    """Return the least free and the largest total memory of the first ``count`` GPUs that this process may see.

    The function leaves no CUDA context behind.  Raises: RuntimeError where torch finds fewer GPUs or no driver.
    """
    command = [sys.executable, "-c", _LOOK, str(count)]
    looked = subprocess.run(command, capture_output=True, text=True, timeout=_LOOK_SECONDS)
    if looked.returncode:
        last = (looked.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"expected {count} GPUs whose free memory can be read, got: {last}")
    free, total = zip(*json.loads(looked.stdout), strict=True)
    return DeviceMemory(min(free), max(total))
