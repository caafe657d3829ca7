# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure a weight sync to a vLLM server, as a ratio to a copy of the same bytes in one process.

    python tools/benchmarks/server_sync.py --server-python .venv-vllm/bin/python --transfers shared_memory gloo

The trainer is this process, with a random Llama; the server is a real one, which this script starts and ends.  Before
each sync the script copies all weights into memory that has been written before, so that both meet the same load of the
machine; the medians are compared.  With ``--adapter-rank`` the model has adapters of this rank, and a sync sends their
factors alone.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measuring_parser import measuring_parser
from wall_time import seconds_of

from megatron_selfdistill.compat.known_warnings import silence_known_warnings

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

    cuts = ParallelConfig()
    grid = ranks.initialize(cuts, seed=0)
    llama = RandomLlama.of(cuts, grid, arguments.vocab, num_layers=arguments.layers, hidden_size=arguments.hidden)
    with llama.hf_directory() as directory:
        found = _measure(arguments, llama, directory)
    print(_table(found, arguments, grid.device))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), **found}, indent=2))
    ranks.shutdown()


def _measure(arguments: argparse.Namespace, llama: Any, directory: Path) -> dict[str, Any]:
    """Return, by transfer, the seconds of each sync and of the copy before it, and the bytes of one sync.

    ``directory`` has the config.json of ``llama``, and receives the logs of the servers.
    """
    from megatron_selfdistill.config import AdapterConfig, RolloutConfig
    from megatron_selfdistill.model.hf.adapter_rules import adapter_rules
    from megatron_selfdistill.rollout.vllm.client import VllmServer
    from megatron_selfdistill.rollout.vllm.engine_adapter import EngineAdapter
    from megatron_selfdistill.rollout.vllm.server.server_names import TOKEN_VARIABLE
    from megatron_selfdistill.rollout.vllm.server.server_process import start_servers, wait_until_healthy

    adapter = AdapterConfig(rank=arguments.adapter_rank)
    chunks = llama.chunks(adapter)
    os.environ[TOKEN_VARIABLE] = token = secrets.token_urlsafe(16)
    processes = start_servers(
        RolloutConfig(
            engine="vllm",
            placement="server",
            num_servers=arguments.servers,
            server_python=arguments.server_python,
            kv_cache_gb=0.2,
            engine_args={"max_num_seqs": 8},
            transfer="ipc" if "ipc" in arguments.transfers else None,
        ),
        directory=directory / "servers",
        hf_config=directory,
        token=token,
        dtype=llama.dtype,
        max_model_len=MAX_LENGTH,
        adapter=EngineAdapter.of(adapter, adapter_rules(llama.rules, adapter)) if adapter.rank else None,
    )
    found: dict[str, Any] = {"syncs": {}, "copies": {}, "bytes": 0}
    try:
        addresses = [one.address for one in processes]
        wait_until_healthy(processes, [VllmServer(address, token) for address in addresses], START_SECONDS)
        for transfer in arguments.transfers:
            rollout = RolloutConfig(
                engine="vllm",
                placement="server",
                servers=addresses,
                transfer=transfer,
                bucket_mb=arguments.bucket_mb,
            )
            syncs, copies, found["bytes"] = _syncs(llama, chunks, rollout, directory, arguments.repeats + 1, adapter)
            found["syncs"][transfer], found["copies"][transfer] = syncs[1:], copies[1:]  # the first ones warm up
    finally:
        for one in processes:
            one.stop()
        if arguments.show_log:
            print((directory / "servers" / "0.log").read_text()[-8000:], file=sys.stderr)
    return found


def _syncs(
    llama: Any, chunks: list[Any], rollout: Any, directory: Path, repeats: int, adapter: Any
) -> tuple[list[float], list[float], int]:
    """Return the seconds of each of ``repeats`` syncs and of the copy before it, and the bytes of the last sync."""
    from megatron_selfdistill.rollout.vllm.server_sampler import ServerSampler

    sampler = ServerSampler(
        chunks,
        llama.grid,
        directory,
        llama.rules,
        rollout,
        vocab_size=llama.vocab_size,
        max_length=MAX_LENGTH,
        run_dir=directory,
        adapter=adapter,
    )
    copy = _copy_of(chunks)
    syncs, copies = [], []
    num_bytes = 0
    for version in range(repeats):
        copies.append(seconds_of(copy))
        syncs.append(seconds_of(partial(sampler.update_weights, version)))
        num_bytes = int(sampler.metrics()["rollout/sync_bytes"])
    sampler.close()
    return syncs, copies, num_bytes


def _copy_of(chunks: Any) -> Callable[[], None]:
    """Return a function that copies all parameters of the model into memory of their size, written before."""
    sources = [parameter.detach() for chunk in chunks for parameter in chunk.parameters()]
    targets = [source.clone() for source in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    return copy


def _table(found: dict[str, Any], arguments: argparse.Namespace, device: torch.device) -> str:
    mib = found["bytes"] / 2**20
    lines = [
        f"{arguments.layers} layers of {arguments.hidden}, vocabulary {arguments.vocab}: {mib:.1f} MiB; "
        f"{arguments.servers} server(s), buckets of {arguments.bucket_mb} MiB; {device.type}, medians of "
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
        {"layers": 8, "hidden": 768, "vocab": 8192, "bucket-mb": 64, "servers": 1, "repeats": 5, "adapter-rank": 0},
    )
    parser.add_argument("--transfers", nargs="+", default=["shared_memory", "gloo"], help="as rollout.transfer")
    parser.add_argument("--server-python", help="the Python of the environment with vLLM; default: this one")
    parser.add_argument("--show-log", action="store_true", help="also show the end of the first server's log")
    return parser


if __name__ == "__main__":
    main()
