# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One rank of gpu/layout_stage.py, which runs the cases in turn and saves its shards of the results.

    python -m tests.gpu.layout_rank GROUP BACKEND RANK WORLD_SIZE DIRECTORY NAME ...

BACKEND is staged or nccl on GPUs, and staged on a CPU; gloo is that of the references.  The cases of the group "step"
have the layers of a run, Transformer Engine's if it is installed; all others have Megatron's local ones.  The name
"reference/NAME" means that case's reference.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

if __name__ == "__main__" and (sys.argv[1] != "step" or sys.argv[2] == "gloo"):
    # Most cases are float32, which Transformer Engine's attention does not support: they compare the local layers.
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]


def main(group: str, backend: str, rank: int, world_size: int, directory: Path, names: list[str]) -> None:
    import torch
    import torch.distributed as dist

    from tests.gpu.leaving import leave

    on_gpu = torch.cuda.is_available()
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank if backend == "nccl" else 0),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    torch.set_num_threads(1)
    import layouts

    from tests.gpu import cases, staged

    assert staged.NAME.upper() in dist.Backend._plugins
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    for number, name in enumerate(names):
        compared = cases.GROUPS[group][name.removeprefix("reference/")]
        case = compared.reference if name.startswith("reference/") else compared.case
        torch.manual_seed(1234)
        dist.init_process_group(
            backend,
            store=dist.FileStore(str(directory / f"store {group} {backend} {world_size} {number}"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=90),
        )
        outcome = layouts.run(case)
        if on_gpu:
            refuse_local_layers(compared)
        path = directory / file_name(name, rank)
        torch.save((outcome.loss, outcome.grads, outcome.params), path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        leave(synchronize=True)


def refuse_local_layers(compared: Any) -> None:
    """Raise RuntimeError if a case that needs Transformer Engine has run with Megatron's local layers."""
    from megatron_selfdistill.model import architecture
    from tests.gpu import cases

    if cases.TE in compared.needs and not architecture.uses_transformer_engine():
        raise RuntimeError("expected Transformer Engine's layers, got Megatron's local ones")


def file_name(name: str, rank: int) -> str:
    return f"{name.replace('/', ' of ')} {rank}.pt"


if __name__ == "__main__":
    faulthandler.enable()
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]), sys.argv[6:])
