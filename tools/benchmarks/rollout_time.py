# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure tokens per second of both samplers, guided ones in process, and seconds and bytes of a weight sync.

    python tools/benchmarks/rollout_time.py                                  in an environment with vLLM
    torchrun --nproc-per-node 2 tools/benchmarks/rollout_time.py --tp 2 --engine-tp 2
    python tools/benchmarks/rollout_time.py --no-vllm                        the sampler in process alone

All samplers have the same random Llama, the same prompts and the same number of new tokens.  Calls of the samplers take
turns, so that other load on the machine affects all of them, and the medians are compared.  A guided response counts
once, although the model reads two contexts for it.  The sampler in process, which alone guides, also does so with a
target that is anchored to a reference, for which a second copy of the weights reads two of three contexts.  *graphs* is
the sampler in process with rollout.cuda_graphs=true; on a CPU its passes have fixed shapes, and nothing is recorded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measuring_parser import measuring_parser
from wall_time import seconds_of

from megatron_selfdistill.distributed.terminal import silence_known_warnings


def main() -> None:
    """Run both samplers in turn and print the table."""
    arguments = _parser().parse_args()
    silence_known_warnings()
    torch.set_num_threads(1)
    from random_llama import RandomLlama

    from megatron_selfdistill.config import ParallelConfig, RolloutConfig
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.guidance.guided_sampler import GuidedSampler
    from megatron_selfdistill.rollout.base import RoleWeights

    cuts = ParallelConfig(tensor_model_parallel_size=arguments.tp, pipeline_model_parallel_size=arguments.pp)
    grid = ranks.initialize(cuts, seed=0)
    llama = RandomLlama.of(
        cuts, grid, arguments.vocab, num_layers=arguments.layers, hidden_size=arguments.hidden, init_method_std=0.1
    )
    chunks, max_length = llama.chunks(), 2 * arguments.prompt + arguments.new_tokens
    frozen = RoleWeights(("teacher", "reference"), llama.chunks(), contextlib.nullcontext)
    in_process = GuidedSampler(chunks, grid, arguments.vocab, max_length, role_weights=[frozen])
    samplers: dict[str, Any] = {"megatron": in_process}
    if arguments.pp == 1:
        samplers["graphs"] = GuidedSampler(
            chunks, grid, arguments.vocab, max_length, role_weights=[frozen], cuda_graphs=True
        )
    if arguments.vllm:
        rollout = RolloutConfig(engine="vllm", engine_tp=arguments.engine_tp)
        samplers["vllm"] = llama.colocated_sampler(chunks, rollout, max_length)
    for sampler in samplers.values():
        sampler.update_weights(0)
    found = _measure(samplers, arguments, grid.dp_rank)
    table = _table(found, arguments, grid.device)
    numbers: dict[str, Any] = {"arguments": vars(arguments), "seconds": found}
    if arguments.vllm:
        engine = samplers["vllm"]
        syncs = [seconds_of(lambda: engine.update_weights(1)) for _ in range(arguments.repeats)]
        num_bytes = engine.metrics()["rollout/sync_bytes"] / (arguments.repeats + 1)
        engine.close()
        numbers |= {"sync_seconds": syncs, "sync_bytes": num_bytes}
        sync, mib = statistics.median(syncs), num_bytes / 2**20
        table += f"\n\nweight sync: {sync:.3f} s for {mib:.1f} MiB ({mib / sync / 2**10:.2f} GiB/s)"
    if grid.is_reporter:
        print(table)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(numbers, indent=2))
    ranks.shutdown()


def _measure(samplers: dict[str, Any], arguments: argparse.Namespace, dp_rank: int) -> dict[str, list[float]]:
    """Return the seconds of each call, by sampler and kind."""
    from megatron_selfdistill.guidance.guided_tokens import GuidedParams
    from megatron_selfdistill.loss.target import Target
    from megatron_selfdistill.rollout.base import Request
    from megatron_selfdistill.rollout.sampling import sample_seed

    params = GuidedParams(max_new_tokens=arguments.new_tokens)  # no stop token: all responses have the same length
    kinds = {
        "": params,
        ", guided": params,
        ", guided with a reference": replace(params, target=Target(anchor="reference")),
    }
    found: dict[str, list[float]] = {}
    for repeat in range(arguments.repeats + 1):
        for kind, sampling in kinds.items():
            rng = random.Random(f"{dp_rank}/{repeat}")  # new prompts each time: no cache of prefixes helps
            requests = []
            for number in range(arguments.batch):
                prompt = [rng.randrange(arguments.vocab) for _ in range(arguments.prompt)]
                hint = [rng.randrange(arguments.vocab) for _ in range(arguments.prompt)]
                seed = sample_seed(repeat, dp_rank, "benchmark", number)
                requests.append(Request(prompt, seed, prompt + hint if kind else None))
            for name, sampler in samplers.items():
                if name == "vllm" and kind:
                    continue
                seconds = seconds_of(lambda s=sampler, r=requests, p=sampling: s.generate(r, p))  # type: ignore[misc]
                if repeat:  # the first call warms up
                    found.setdefault(f"{name}{kind}", []).append(seconds)
    return found


def _table(found: dict[str, list[float]], arguments: argparse.Namespace, device: torch.device) -> str:
    tokens = arguments.batch * arguments.new_tokens
    speeds = {name: tokens / statistics.median(seconds) for name, seconds in found.items()}
    lines = [
        f"{arguments.layers} layers of {arguments.hidden}, vocabulary {arguments.vocab}; {arguments.batch} prompts of "
        f"{arguments.prompt} tokens, {arguments.new_tokens} new tokens; TP {arguments.tp} x PP {arguments.pp}, "
        f"engines of {arguments.engine_tp}; {device.type}",
        "",
        "| sampler | tokens/s per replica | to its plain speed | to megatron |",
        "|---|---|---|---|",
    ]
    for name, speed in speeds.items():
        sampler, *kind = name.split(",")
        plain, same_kind = speeds[sampler], speeds[",".join(["megatron", *kind])]
        lines.append(f"| {name} | {speed:.0f} | {speed / plain:.2f} | {speed / same_kind:.2f} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = measuring_parser(
        __doc__,
        {
            "batch": 64,
            "prompt": 64,
            "new-tokens": 64,
            "layers": 4,
            "hidden": 256,
            "vocab": 8192,
            "tp": 1,
            "pp": 1,
            "engine-tp": 1,
            "repeats": 5,
        },
    )
    parser.add_argument("--no-vllm", dest="vllm", action="store_false", help="measure the sampler in process alone")
    return parser


if __name__ == "__main__":
    main()
