# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The work that a step of a run does only once, and the number of its waits for the device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from host_traffic import host_traffic
from tiny_run import overrides

READS = ("tolist ", "_local_scalar_dense ", "nonzero ", "masked_select ", "bincount ", "equal ", "cpu ")
# Where host tensors become a `DeviceBatch`, and the optimizer that GPUs have from elsewhere.
NOT_ON_THE_DEVICE = (
    "megatron_selfdistill/data/packed_batch.py",
    "megatron_selfdistill/pipeline/batch.py",
    "megatron_selfdistill/model/local_attention.py",
    "megatron/core/optimizer/optimizer.py",
    "megatron/core/utils.py",
)


def start_recording(arguments: Sequence[str], path: Path) -> int:
    """`tiny_run.start`; what each part of the second step exchanges with the device goes to ``path``."""
    from megatron_selfdistill.trainer import Trainer

    found: dict[str, list[str]] = {}

    def recorded(name: str, original: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            second = self.step == 1
            with host_traffic() as traffic:
                outcome = original(self, *args, **kwargs)
            if second:
                found[name] = [line for line in traffic if not line.rpartition(":")[0].endswith(NOT_ON_THE_DEVICE)]
            return outcome

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("pack", "forward_backward", "update", "finish_step"):
            patch.setattr(Trainer, name, recorded(name, getattr(Trainer, name)))
        status = tiny_run.start(arguments)
    path.write_text(json.dumps(found, indent=1))
    return status


def test_a_step_reads_from_the_device_six_times_beside_sampling(ranks, data, tmp_path):
    """Count the reads of a step without sampling.

    The step reads the lengths and counts of all replicas, the number of response tokens, the metrics, the norm of the
    gradient, and the metrics of the rollout.  Reads of the optimizer, which is torch's on this machine, do not count.
    """
    arguments = overrides(data, tmp_path / "run", "num_steps=3", "checkpoint.save_every=0")
    arguments += ["loss.rollout_correction=truncated"]
    found = tmp_path / "found.json"
    assert ranks.run(start_recording, arguments, found, world_size=1, init_process_group=False) == [0]
    traffic = {
        part: [line.rpartition(":")[0].rpartition("/")[2] for line in lines if line.startswith(READS)]
        for part, lines in json.loads(found.read_text()).items()
    }
    assert traffic == {
        "pack": ["integers.py", "integers.py"],
        "forward_backward": ["schedule.py"],
        "update": ["step.py", "clip_grads.py"],
        "finish_step": ["step.py"],
    }
