# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure a weight sync to a vLLM server, as a ratio to a copy of the same bytes in one process.

    python tools/benchmarks/server_sync.py --server-python .venv-vllm/bin/python --transfers shared_memory gloo

The trainer is this process, with a random Llama; the server is a real one, which this script starts and ends.  Before
each sync the script copies all weights into memory that has been written before, so that both meet the same load of the
machine; the medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from wall_time import seconds_of

from megatron_selfdistill.compat.known_warnings import silence_known_warnings

START_SECONDS = 900.0


def main() -> None:
    """Start a server, send weights to it by every transfer, and print the table."""
    arguments = _parser().parse_args()
    silence_known_warnings()
    torch.set_num_threads(1)
    from megatron_selfdistill.config import ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.model.architecture import transformer_config
    from megatron_selfdistill.model.build import build_chunks
    from megatron_selfdistill.model.hf.mapping import family_of_model

    cuts = ParallelConfig()
    grid = ranks.initialize(cuts, seed=0)
    model = ModelConfig(
        vocab_size=arguments.vocab,
        num_layers=arguments.layers,
        hidden_size=arguments.hidden,
        num_attention_heads=arguments.hidden // 64,
        max_position_embeddings=4096,
    )
    precision = "bf16" if grid.device.type == "cuda" else "fp32"
    config = transformer_config(model, cuts, OptimizerConfig(precision=precision), ScheduleConfig())
    chunks = build_chunks(model, config, grid, arguments.vocab)
    family = family_of_model(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dtype = str(config.params_dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(family.hf_config(model, dtype)))
        found = _measure(arguments, chunks, grid, family.rules(model), folder, config.params_dtype)
    print(_table(found, arguments, grid.device))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), **found}, indent=2))
    ranks.shutdown()


def _measure(
    arguments: argparse.Namespace, chunks: Any, grid: Any, rules: Any, folder: Path, dtype: torch.dtype
) -> dict[str, Any]:
    """By transfer the seconds of each sync and of the copy before it, and the bytes of one sync."""
    from megatron_selfdistill.config import RolloutConfig
    from megatron_selfdistill.rollout.vllm.client import VllmServer
    from megatron_selfdistill.rollout.vllm.server.server_names import TOKEN_VARIABLE
    from megatron_selfdistill.rollout.vllm.server.server_process import start_servers, wait_until_healthy
    from megatron_selfdistill.rollout.vllm.server_sampler import ServerSampler

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
        directory=folder / "servers",
        hf_config=folder,
        token=token,
        dtype=dtype,
        max_model_len=256,
    )
    found: dict[str, Any] = {"syncs": {}, "copies": {}, "bytes": 0}
    try:
        addresses = [one.address for one in processes]
        wait_until_healthy(processes, [VllmServer(address, token) for address in addresses], START_SECONDS)
        for transfer in arguments.transfers:
            sampler = ServerSampler(
                chunks,
                grid,
                folder,
                rules,
                RolloutConfig(
                    engine="vllm",
                    placement="server",
                    servers=addresses,
                    transfer=transfer,
                    bucket_mb=arguments.bucket_mb,
                ),
                max_length=256,
                run_dir=folder,
            )
            copy = _copy_of(chunks)
            syncs, copies = [], []
            for version in range(arguments.repeats + 1):
                copies.append(seconds_of(copy))
                syncs.append(seconds_of(partial(sampler.update_weights, version)))
            found["bytes"] = int(sampler.metrics()["rollout/sync_bytes"] / (arguments.repeats + 1))
            sampler.close()
            found["syncs"][transfer], found["copies"][transfer] = syncs[1:], copies[1:]  # the first ones warm up
    finally:
        for one in processes:
            one.stop()
        if arguments.show_log:
            print((folder / "servers" / "0.log").read_text()[-8000:], file=sys.stderr)
    return found


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
        f"{arguments.repeats}",
        "",
        "| transfer | sync, s | copy, s | sync / copy |",
        "|---|---|---|---|",
    ]
    for transfer, syncs in found["syncs"].items():
        sync, copy = statistics.median(syncs), statistics.median(found["copies"][transfer])
        lines.append(f"| {transfer} | {sync:.3f} | {copy:.3f} | {sync / copy:.1f} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "layers": 8,
        "hidden": 768,
        "vocab": 8192,
        "bucket-mb": 64,
        "servers": 1,
        "repeats": 5,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--transfers", nargs="+", default=["shared_memory", "gloo"], help="as rollout.transfer")
    parser.add_argument("--server-python", help="the Python of the environment with vLLM; default: this one")
    parser.add_argument("--show-log", action="store_true", help="also show the end of the first server's log")
    parser.add_argument("--json", help="also write every measured time to this file")
    return parser


if __name__ == "__main__":
    main()
