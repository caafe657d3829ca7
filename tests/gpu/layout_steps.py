# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A training step in a layout on the device, compared with the same step of one CPU rank in float32."""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
import torch.distributed as dist
from children import Ranks

from megatron_selfdistill.architectures.gated_delta_net import installed_kernels
from megatron_selfdistill.commands.installation import is_installed
from megatron_selfdistill.distributed import ranks
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model import architecture
from tests.gpu import cases, staged  # noqa: F401  (registers a backend)

BOUNDS = {True: 1e-4, False: 1e-5}
"""On a GPU or not: another device sums float32 values in another order, and its exponentials have other last bits."""
KNOWN: dict[str, bytes] = {}
"""The references that this process has computed: several layouts have the same one."""


def check(
    one: cases.Compared,
    on: Ranks,
    reference: Ranks,
    store: Path,
    keeps: Callable[..., None],
    *,
    backend: str,
    on_gpu: bool,
) -> None:
    """Compare gradients, or changes of parameters, and the loss with the reference; skip what cannot run here."""
    if one.needs and not on_gpu:
        pytest.skip(f"the kernels of {one.needs[0]} need an NVIDIA GPU")
    if absent := [module for module in one.needs if not is_installed(module)]:
        pytest.skip(f"this environment has no {' and no '.join(absent)}")
    shards = on.run(step, one, backend, store.with_name("of the device"))
    if isinstance(shards[0], str):
        pytest.skip(shards[0])
    [(worst, where, off, loss, smallest)] = reference.run(differences, one, shards, store)
    bound = one.bound or BOUNDS[on_gpu]
    keeps(f"{where}: relative difference", worst, cases.PARAMETER_BOUND if one.parameters else bound)
    keeps("loss, relative difference", off, cases.BF16_LOSS_BOUND if one.bound else BOUNDS[on_gpu])
    keeps("the loss itself, nats per token", loss, at_least=0.05)  # else the test could not fail
    keeps("smallest norm that was compared", smallest, at_least=1e-12)


def step(rank: int, one: cases.Compared, backend: str, store: Path) -> bytes | str:
    """Return this rank's loss and shards, or why the step is not possible on this GPU."""
    if cases.LINEAR in one.needs:
        try:
            installed_kernels()
        except ConfigError as error:
            return str(error)
    return saved(rank, one, backend, one.world_size, store, is_reference=False)


def differences(
    rank: int, one: cases.Compared, shards: list[bytes], store: Path
) -> tuple[float, str, float, float, float]:
    """Return the worst difference of a tensor and its name, that of the loss, the loss, and the smallest norm."""
    key = repr((one.reference, one.parameters))
    if key not in KNOWN:
        KNOWN[key] = saved(rank, one, "gloo", 1, store, is_reference=True)
    (loss, right), (losses, own) = load(KNOWN[key]), zip(*map(load, shards), strict=True)
    found, wanted = layouts.join(list(own)), layouts.join([right])
    if one.parameters:
        initial = {key: layouts.models.full_weight(key, tensor.shape) for key, tensor in wanted.items()}
        found, wanted = ({key: tensor - initial[key] for key, tensor in all.items()} for all in (found, wanted))
    worst, where = layouts.worst_difference({key: tensor.float() for key, tensor in found.items()}, wanted)
    off = max(abs(other - loss) / loss for other in losses)
    return worst, where, off, loss, min(float(tensor.norm()) for tensor in wanted.values())


def load(shard: bytes) -> Any:
    return torch.load(io.BytesIO(shard), weights_only=False, map_location="cpu")


def saved(rank: int, one: cases.Compared, backend: str, size: int, store: Path, *, is_reference: bool) -> bytes:
    """Run the step in a process group of its own, which finds its ranks by the file ``store``."""
    os.environ |= {
        **{"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank if backend == "nccl" else 0)},
        **{"CUDA_DEVICE_MAX_CONNECTIONS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"},
    }
    torch.set_num_threads(1)
    torch.manual_seed(1234)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    files, limit = dist.FileStore(str(store), size), timedelta(seconds=90)
    dist.init_process_group(backend, store=files, rank=rank, world_size=size, timeout=limit)
    outcome = layouts.run(one.reference if is_reference else one.case)
    if cases.TE in one.needs and not is_reference and not architecture.uses_transformer_engine():
        raise RuntimeError("expected Transformer Engine's layers, got Megatron's local ones")
    shard = io.BytesIO()
    torch.save((outcome.loss, outcome.params if one.parameters else outcome.grads), shard)
    dist.barrier()
    ranks.shutdown()
    gc.collect()
    return shard.getvalue()
