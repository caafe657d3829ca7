# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The receiving ends of every transfer, without vLLM."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_selfdistill.vllm_plugin.receivers import make_receiver

CPU = torch.device("cpu")

BLOCKED = """
import sys
sys.modules["vllm"] = None
from megatron_selfdistill.vllm_plugin import receivers
sys.exit(0 if len(receivers._RECEIVERS) == 4 else 1)
"""


def test_receivers_need_no_vllm():
    subprocess.run([sys.executable, "-c", BLOCKED], check=True)


def test_an_unknown_transfer_is_refused():
    with pytest.raises(ValueError, match=r"expected a transfer among shared_memory, .*, got 'pigeon'"):
        make_receiver("pigeon", CPU, 0, {})


def test_a_bucket_that_is_cut_short_is_refused(tmp_path):
    (tmp_path / "bucket").write_bytes(b"abc")
    receiver = make_receiver("shared_memory", CPU, 0, {})
    with pytest.raises(ValueError, match=r"expected 4 bytes in .*, got 3"):
        receiver.receive(4, {"path": str(tmp_path / "bucket")})
