# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Buckets through memory of a GPU to another process, with the receiver of real servers; needs a GPU, and no vLLM."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from megatron_selfdistill.engines.vllm import transfer_buckets
from megatron_selfdistill.engines.vllm.transfer_buckets import SharedGpuMemory

SERVER = """
import hashlib, json, sys, torch
from megatron_selfdistill.engines.vllm.plugin.receivers import make_receiver

receiver = make_receiver("ipc", torch.device("cuda", 0), 0, {})
for line in sys.stdin:
    request = json.loads(line)
    packed = receiver.receive(request["num_bytes"], request["where"])
    print(hashlib.sha256(packed.cpu().numpy().tobytes()).hexdigest(), flush=True)
"""


def through_ipc(num_bytes: int = 64 * 2**20, settings: str = "") -> dict[str, Any]:
    """Send three buckets through one buffer to another process, then make a buffer that nobody opens.

    ``settings`` are torch's settings of the allocator meanwhile.  Returns which buckets arrived to the last bit, and
    the bytes that torch counts as allocated afterwards beyond those of before.
    """
    settings_before = transfer_buckets._allocator_settings()
    transfer_buckets._set_allocator_settings(settings or settings_before)
    try:
        before = torch.cuda.memory_allocated()
        with subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdin is not None and server.stdout is not None
            buffer, arrived = SharedGpuMemory(num_bytes), []
            for seed in range(3):
                generator = torch.Generator(device="cuda").manual_seed(seed)
                buffer.memory.random_(generator=generator)
                torch.cuda.synchronize()
                server.stdin.write(json.dumps({"num_bytes": num_bytes, "where": buffer.handle}) + "\n")
                server.stdin.flush()
                wanted = hashlib.sha256(buffer.memory.cpu().numpy().tobytes()).hexdigest()
                arrived.append(server.stdout.readline().strip() == wanted)
            server.stdin.close()
        buffer.close()
        SharedGpuMemory(num_bytes).close()
        return {"arrived": arrived, "bytes_left": torch.cuda.memory_allocated() - before}
    finally:
        transfer_buckets._set_allocator_settings(settings_before)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", ["", "expandable_segments:True"])
def test_buckets_arrive_to_the_last_bit_and_no_memory_stays(settings):
    assert through_ipc(settings=settings) == {"arrived": [True] * 3, "bytes_left": 0}
