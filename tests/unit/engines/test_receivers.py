# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The receiving ends of every transfer, without vLLM."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock, call

import pytest
import torch

from megatron_selfdistill.engines.vllm.plugin.receivers import FileReceiver
from megatron_selfdistill.engines.vllm.transfer import MappedFile

CPU = torch.device("cpu")


def test_a_bucket_that_is_cut_short_is_refused(tmp_path):
    (tmp_path / "bucket").write_bytes(b"abc")
    receiver = FileReceiver(CPU, 0)
    with pytest.raises(ValueError, match=r"expected 4 bytes in .*, got 3"):
        receiver.receive(4, {"path": str(tmp_path / "bucket")})


def test_a_mapped_bucket_is_the_trainers_memory_and_one_that_is_gone_is_let_go(tmp_path):
    receiver = FileReceiver(CPU, 0)
    files = [MappedFile(tmp_path, size) for size in (8, 12)]
    for turn, file in enumerate([*files, *files]):
        file.memory.fill_(turn)
        assert receiver.receive(6, {"path": str(file.path), "mapped": True}).tolist() == [turn] * 6
    files[0].close()
    larger = MappedFile(tmp_path, 16)
    receiver.receive(16, {"path": str(larger.path), "mapped": True})
    assert set(receiver._mapped) == {str(files[1].path), str(larger.path)}


@pytest.mark.parametrize("status", [0, 712])
def test_on_a_gpu_node_a_mapped_bucket_is_pinned_until_it_goes_or_the_log_says_why_not(
    tmp_path, monkeypatch, caplog, status
):
    cudart, raised = Mock(**{"cudaHostRegister.return_value": status}), list[str]()

    def first_kernel(*_: Any, device: str) -> None:
        raised.append(device)
        raise RuntimeError("CUDA error: the driver's")

    monkeypatch.setattr(torch, "zeros", first_kernel)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    file = MappedFile(tmp_path, 2**20)
    assert raised == ([] if status == 0 else ["cuda"]), "or a kernel of the step raises the driver's error"
    assert cudart.cudaHostRegister.call_args.args[:2] == (file.memory.data_ptr(), 2**20)
    assert [record.message for record in caplog.records] == (
        [] if status == 0 else ["CUDA cannot pin 1 MiB of a bucket (error 712): copies are slower"]
    )
    address = file.memory.data_ptr()
    file.close()
    file.close()
    assert cudart.cudaHostUnregister.mock_calls == ([call(address)] if status == 0 else [])


@pytest.mark.gpu
def test_a_pinned_bucket_reaches_a_gpu_to_the_last_bit(tmp_path):
    file = MappedFile(tmp_path, 2**20)
    receiver = FileReceiver(torch.device("cuda", 0), 0)
    wanted = torch.randint(256, (2**20,), dtype=torch.uint8, device="cuda")
    file.memory.copy_(wanted)
    arrived = receiver.receive(2**20, {"path": str(file.path), "mapped": True})
    assert arrived.is_cuda and torch.equal(arrived, wanted)
    receiver.close()
    file.close()
