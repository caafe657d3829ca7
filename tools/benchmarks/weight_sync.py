# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure a weight sync to vLLM, as a ratio to a copy of the same bytes in one process.

    python tools/benchmarks/weight_sync.py --placement colocated                in an environment with vLLM
    torchrun --nproc-per-node 2 tools/benchmarks/weight_sync.py --placement colocated --tp 2 --engine-tp 2
    python tools/benchmarks/weight_sync.py --placement server ...               see server_sync.py beside it

The model is a random Llama in bfloat16.  Each sync comes after a copy of all tensors of the model into memory that has
been written before, so that both meet the same load of the machine; medians are compared.  Several ranks copy at once.

On a CPU vLLM packs every weight anew for oneDNN's products, which takes as long as several copies; ``--unpacked``
skips this work, as on a GPU, where layers compute with the parameters themselves.

With ``--adapter-rank`` the model has adapters of this rank, and a sync sends their factors alone.

``--profile`` also prints the parts of the time of one sync.  *Export* is the trainer's making of full tensors under
their Hugging Face names; *load* is vLLM's weight loaders, *process* the kernels' layout of a layer, and *place* the
copy into the tensors that CUDA graphs read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measuring_parser import measuring_parser
from wall_time import seconds_of

from megatron_selfdistill.distributed.terminal import silence_known_warnings


def main() -> None:
    """Measure the placement that ``--placement`` names and print the table."""
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument("--placement")
    known, others = place.parse_known_args()
    if known.placement == "server":
        import server_sync

        sys.argv[1:] = others
        server_sync.main()
        return
    arguments = _parser().parse_args()
    silence_known_warnings()
    torch.set_num_threads(1)
    from megatron_selfdistill.config import ParallelConfig
    from megatron_selfdistill.distributed import ranks

    cuts = ParallelConfig(tensor_model_parallel_size=arguments.tp, pipeline_model_parallel_size=arguments.pp)
    grid = ranks.initialize(cuts, seed=0)
    found = _measure(arguments, cuts, grid)
    if grid.is_reporter:
        print(_table(found, arguments, grid.device))
        if arguments.json:
            Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), **found}, indent=2))
    ranks.shutdown()


def _measure(arguments: argparse.Namespace, cuts: Any, grid: Any) -> dict[str, Any]:
    """Return the seconds of each sync and of the copy before it, the bytes of a sync, and the parts of its time."""
    from random_llama import RandomLlama

    from megatron_selfdistill.config import RolloutConfig
    from megatron_selfdistill.config.schema.adapter_config import AdapterConfig

    if arguments.unpacked:
        import vllm._custom_ops

        if not hasattr(vllm._custom_ops, "_supports_onednn"):
            sys.exit("--unpacked: this version of vLLM has no switch _custom_ops._supports_onednn; omit the option")
        vllm._custom_ops._supports_onednn = False
    llama = RandomLlama.of(
        cuts,
        grid,
        arguments.vocab,
        precision="bf16",
        num_layers=arguments.layers,
        hidden_size=arguments.hidden,
        num_query_groups=max(arguments.hidden // 256, arguments.engine_tp),
    )
    rollout = RolloutConfig(
        engine="vllm", engine_tp=arguments.engine_tp, kv_cache_gb=0.1, bucket_mb=arguments.bucket_mb
    )
    adapter = AdapterConfig(rank=arguments.adapter_rank)
    sampler = llama.colocated_sampler(llama.chunks(adapter), rollout, max_length=256, adapter=adapter)
    sampler.update_weights(0)
    sampler.metrics()
    sampler.update_weights(0)  # with adapters the first one sends the weights, too
    num_bytes = int(sampler.metrics()["rollout/sync_bytes"])
    source, target = (torch.ones(num_bytes, dtype=torch.uint8, device=grid.device) for _ in range(2))
    found: dict[str, Any] = {"copy": [], "sync": [], "bytes": num_bytes, "profile": {}}
    for version in range(1, arguments.repeats + 1):
        found["copy"].append(_seconds(lambda: target.copy_(source)))
        found["sync"].append(_seconds(lambda version=version: sampler.update_weights(version)))  # type: ignore[misc]
    if arguments.profile:
        with _profiled() as found["profile"]:
            found["profile"]["all"] = _seconds(lambda: sampler.update_weights(arguments.repeats + 1))
    sampler.close()
    return found


@contextmanager
def _profiled() -> Iterator[dict[str, float]]:
    """Yield a dict that fills with seconds by part while the context lasts."""
    from vllm.model_executor.model_loader.reload import layerwise

    from megatron_selfdistill.engines.vllm.colocated import ColocatedSampler

    found: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                found[name] = found.get(name, 0.0) + time.perf_counter() - began

        return call

    def exported(self: Any, buckets: Iterator[Any]) -> Iterator[Any]:
        stream = counted(self, buckets)
        advance = timed("export", lambda: next(stream, None))
        while (tensor := advance()) is not None:
            yield tensor

    counted = ColocatedSampler._counted
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(ColocatedSampler, "_counted", exported))
        for name, attribute in {
            "load, process and place": "_layerwise_process",
            "of which place": "_copy_and_restore_kernel_tensors",
        }.items():
            patched = timed(name, getattr(layerwise, attribute))
            stack.enter_context(mock.patch.object(layerwise, attribute, patched))
        yield found


def _seconds(work: Callable[[], Any]) -> float:
    """Return the wall seconds of ``work()`` on this rank, from the moment when all ranks begin."""
    dist.barrier()
    return seconds_of(work)


def _table(found: dict[str, Any], arguments: argparse.Namespace, device: torch.device) -> str:
    copy, sync = statistics.median(found["copy"]), statistics.median(found["sync"])
    size = found["bytes"] / 2**20
    lines = [
        f"{arguments.layers} layers of {arguments.hidden}, vocabulary {arguments.vocab}, bfloat16, {size:.1f} MiB; "
        f"TP {arguments.tp} x PP {arguments.pp}, engines of {arguments.engine_tp}; {device.type}"
        + (f"; factors of rank {arguments.adapter_rank} alone" if arguments.adapter_rank else ""),
        "",
        "| | seconds | GiB/s | to a copy |",
        "|---|---|---|---|",
        *(
            f"| {n} | {s:.3f} | {size / 1024 / s:.2f} | {s / copy:.2f} |"
            for n, s in {"copy": copy, "sync": sync}.items()
        ),
    ]
    if found["profile"]:
        lines += ["", "one sync, by part (seconds):"]
        lines += [f"  {name}: {seconds:.3f}" for name, seconds in found["profile"].items()]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = measuring_parser(
        __doc__,
        {
            "layers": 8,
            "hidden": 2048,
            "vocab": 32768,
            "tp": 1,
            "pp": 1,
            "engine-tp": 1,
            "repeats": 7,
            "adapter-rank": 0,
        },
    )
    parser.add_argument("--placement", required=True, choices=["colocated", "server"], help="where vLLM runs")
    parser.add_argument("--bucket-mb", type=float, default=1024.0, help="MiB of a bucket (default: 1024)")
    parser.add_argument(
        "--unpacked",
        action="store_true",
        help="on a CPU, let vLLM compute with the weights as they are, as on a GPU, and not with packed copies of them",
    )
    parser.add_argument("--profile", action="store_true", help="also print the parts of the time of one sync")
    return parser


if __name__ == "__main__":
    main()
