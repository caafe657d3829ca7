# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure a weight sync to a vLLM server, as a ratio to a copy of the same bytes in one process.

    python tools/benchmarks/server_sync.py --server-python .venv-vllm/bin/python --transfers shared_memory gloo
    torchrun --nproc-per-node 4 tools/benchmarks/server_sync.py --tp 2 --bucket-mb 4 ...

The trainer is this process, or all ranks of the launch, with a random Llama; the server is a real one, which this
script starts and ends.  Before each sync rank 0 copies as many bytes as a sync sends into memory that has been written
before, so that both meet the same load of the machine; the medians are compared.  With ``--adapter-rank`` the model has
adapters of this rank, and a sync sends their factors alone.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measuring_parser import measuring_parser
from wall_time import seconds_of

from megatron_selfdistill.distributed.terminal import silence_known_warnings

START_SECONDS = 900.0
MAX_LENGTH = 256


def main() -> None:
    """Start a server, send weights to it by every transfer, and print the table."""
    arguments = _parser().parse_args()
    silence_known_warnings()
    torch.set_num_threads(1)
    from random_llama import RandomLlama

    from megatron_selfdistill.config import ParallelConfig
    from megatron_selfdistill.distributed import ranks

    cuts = ParallelConfig(tensor_model_parallel_size=arguments.tp)
    grid = ranks.initialize(cuts, seed=0)
    llama = RandomLlama.of(cuts, grid, arguments.vocab, num_layers=arguments.layers, hidden_size=arguments.hidden)
    with llama.hf_directory() as directory:
        found = _measure(arguments, llama, directory)
    if grid.is_reporter:
        print(_table(found, arguments, grid))
        if arguments.json:
            Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), **found}, indent=2))
    ranks.shutdown()


def _measure(arguments: argparse.Namespace, llama: Any, directory: Path) -> dict[str, Any]:
    """Return, by transfer, the seconds of each sync and of the copy before it, and the bytes of one sync.

    ``directory`` has the config.json of ``llama``, and on rank 0 receives the logs of the servers.
    """
    from megatron_selfdistill.config import RolloutConfig
    from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
    from megatron_selfdistill.distributed.collectives import broadcast_object, run_long_on_rank_0
    from megatron_selfdistill.engines.vllm.client import VllmServer
    from megatron_selfdistill.engines.vllm.engine_adapter import EngineAdapter
    from megatron_selfdistill.engines.vllm.server.server_names import TOKEN_VARIABLE
    from megatron_selfdistill.engines.vllm.server.server_process import start_servers, wait_until_healthy
    from megatron_selfdistill.interop.hf.adapter_rules import adapter_rules

    adapter = AdapterConfig(rank=arguments.adapter_rank)
    chunks = llama.chunks(adapter)
    processes: list[Any] = []

    def start() -> None:
        os.environ[TOKEN_VARIABLE] = token = secrets.token_urlsafe(16)
        processes.extend(
            start_servers(
                RolloutConfig(
                    engine="vllm",
                    placement="server",
                    num_servers=arguments.servers,
                    server_python=arguments.server_python,
                    kv_cache_gb=0.2,
                    engine_args={"max_num_seqs": 8},
                ),
                directory=directory / "servers",
                hf_config=directory,
                token=token,
                dtype=llama.dtype,
                max_model_len=MAX_LENGTH,
                adapter=EngineAdapter.of(adapter, adapter_rules(llama.rules, adapter)) if adapter.rank else None,
            )
        )
        wait_until_healthy(processes, [VllmServer(one.address, token) for one in processes], START_SECONDS)

    found: dict[str, Any] = {"syncs": {}, "copies": {}, "bytes": 0}
    try:
        run_long_on_rank_0(start)
        addresses = broadcast_object([one.address for one in processes])
        for transfer in arguments.transfers:
            rollout = RolloutConfig(
                engine="vllm",
                placement="server",
                servers=addresses,
                transfer=transfer,
                bucket_mb=arguments.bucket_mb,
            )
            syncs, copies, found["bytes"] = _syncs(llama, chunks, rollout, directory, arguments.repeats, adapter)
            found["syncs"][transfer], found["copies"][transfer] = syncs, copies
    finally:
        for one in processes:
            one.stop()
        if arguments.show_log and processes:
            print((directory / "servers" / "0.log").read_text()[-8000:], file=sys.stderr)
    return found


def _syncs(
    llama: Any, chunks: list[Any], rollout: Any, directory: Path, repeats: int, adapter: Any
) -> tuple[list[float], list[float], int]:
    """Return the seconds of each of ``repeats`` syncs and of the copy before it, and the bytes of one sync."""
    from megatron_selfdistill.engines.vllm.engine_weights import EngineWeights
    from megatron_selfdistill.engines.vllm.server_sampler import ServerSampler

    bucket_bytes = int(rollout.bucket_mb * 2**20)
    weights = EngineWeights(chunks, llama.grid, llama.rules, adapter, bucket_bytes=bucket_bytes, on_ranks=[0])
    sampler = ServerSampler(
        weights,
        llama.grid,
        directory,
        rollout,
        vocab_size=llama.vocab_size,
        max_length=MAX_LENGTH,
        run_dir=directory,
    )
    sampler.update_weights(0)
    sampler.metrics()
    sampler.update_weights(1)  # with adapters the first one sends the weights, too
    num_bytes = int(sampler.metrics()["rollout/sync_bytes"])
    copy = _copy_of(num_bytes if llama.grid.rank == 0 else 1, llama.grid.device)
    syncs, copies = [], []
    for version in range(2, repeats + 2):
        copies.append(_seconds(copy))
        syncs.append(_seconds(partial(sampler.update_weights, version)))
    sampler.close()
    return syncs, copies, num_bytes


def _copy_of(num_bytes: int, device: torch.device) -> Callable[[], None]:
    """Return a function that copies as many bytes into memory that has been written before."""
    source, target = (torch.ones(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))

    def copy() -> None:
        target.copy_(source)

    return copy


def _seconds(work: Callable[[], Any]) -> float:
    """Return the wall seconds of ``work()`` on this rank, from the moment when all ranks begin."""
    dist.barrier()
    return seconds_of(work)


def _table(found: dict[str, Any], arguments: argparse.Namespace, grid: Any) -> str:
    mib = found["bytes"] / 2**20
    lines = [
        f"{arguments.layers} layers of {arguments.hidden}, vocabulary {arguments.vocab}: {mib:.1f} MiB; "
        f"{arguments.servers} server(s), buckets of {arguments.bucket_mb} MiB; {grid.device.type}, "
        f"{grid.world_size} rank(s), TP {arguments.tp}, medians of "
        f"{arguments.repeats}"
        + (f"; factors of rank {arguments.adapter_rank} alone" if arguments.adapter_rank else ""),
        "",
        "| transfer | sync, s | copy, s | sync / copy |",
        "|---|---|---|---|",
    ]
    for transfer, syncs in found["syncs"].items():
        sync, copy = statistics.median(syncs), statistics.median(found["copies"][transfer])
        lines.append(f"| {transfer} | {sync:.3f} | {copy:.3f} | {sync / copy:.1f} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = measuring_parser(
        __doc__,
        {
            "layers": 8,
            "hidden": 768,
            "vocab": 8192,
            "bucket-mb": 64,
            "servers": 1,
            "tp": 1,
            "repeats": 5,
            "adapter-rank": 0,
        },
    )
    parser.add_argument("--transfers", nargs="+", default=["shared_memory", "gloo"], help="as rollout.transfer")
    parser.add_argument("--server-python", help="the Python of the environment with vLLM; default: this one")
    parser.add_argument("--show-log", action="store_true", help="also show the end of the first server's log")
    return parser


if __name__ == "__main__":
    main()
