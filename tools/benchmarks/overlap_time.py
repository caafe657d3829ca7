# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure the time of a step whose servers generate first, and of steps whose servers work ahead.

    python tools/benchmarks/overlap_time.py                                       servers that only wait
    python tools/benchmarks/overlap_time.py --server-python .venv-vllm/bin/python    one real vLLM server on a CPU

A server that only waits takes a time for each response that a log-normal distribution gives, whose long tail is that of
lengths of responses; the scale of the times is chosen so that the slowest response of a step takes as long as training
on all of them.  All ways take turns, so that other load on the machine affects all, and the medians of their steps are
compared, without the first step of each run.  The times of generation and training in turns are the measure of all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
for _directory in (REPOSITORY, REPOSITORY / "tests" / "support"):
    sys.path.insert(0, str(_directory))

import torch  # noqa: E402
from fake_vllm import fake_servers  # noqa: E402
from measured_steps import measured_steps  # noqa: E402
from measuring_parser import measuring_parser  # noqa: E402
from tiny_run import overrides, write_data  # noqa: E402

AHEAD = ["rollout.ahead=1", "rollout.max_staleness=1"]
WAYS: dict[str, list[str]] = {
    "turns": [],
    "ahead, wait": AHEAD,
    "ahead, keep": [*AHEAD, "rollout.at_update=keep"],
}


def main() -> None:
    """Run all ways in turn and print the tables."""
    arguments = _parser().parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_data(root / "data", num_problems=10 * arguments.problems)
        with _servers(arguments, root) as (served, scale_by):
            common = [*_overrides(arguments, root), *served, f"num_steps={arguments.steps + 1}"]
            warm = measured_steps(root / "warm", [*common, *WAYS["turns"]], 1)
            scale_by(statistics.median(step["seconds/train"] for step in warm))
            found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for turn in range(arguments.rounds):
                for way, more in WAYS.items():
                    found[way] += measured_steps(root / f"{way}{turn}", [*common, *more], 1)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1))
    _print(found)


@contextmanager
def _servers(arguments: argparse.Namespace, root: Path) -> Iterator[tuple[list[str], Callable[[float], None]]]:
    """Yield the overrides that name the servers, and a function that takes the seconds of training."""
    if arguments.server_python:
        own = ["rollout.num_servers=1", f"rollout.server_python={Path(arguments.server_python).absolute()}"]
        yield (
            [*own, "rollout.kv_cache_gb=0.2", f"rollout.engine_args.max_num_seqs={arguments.sequences}"],
            lambda seconds: None,
        )
        return
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, arguments.problems, arguments.sigma), daemon=True)
    process.start()
    try:
        # These servers know no model: their log-probs are not those of the trainer, which a guard would stop.
        yield [f"rollout.servers=[{here.recv()}]", "guards.max_log_prob_distance=null"], here.send
    finally:
        process.terminate()


def _serve(pipe: Connection, num_problems: int, sigma: float) -> None:
    """Serve in a process of its own, whose threads do not take the trainer's time; ``pipe`` brings the seconds."""
    with fake_servers(1) as servers:
        servers[0].vocab_size = 10
        pipe.send(servers[0].address)
        slowest = pipe.recv()
        servers[0].seconds_of = lambda prompt: slowest * _share_of_slowest(prompt, num_problems, sigma)
        pipe.recv()  # until the benchmark ends


def _share_of_slowest(prompt: Sequence[int], num_problems: int, sigma: float) -> float:
    """Return the time of a response relative to the slowest of a step: a log-normal time, cut at its likely maximum."""
    word = hashlib.blake2b(str(list(prompt)).encode(), digest_size=8).digest()
    uniform = (int.from_bytes(word, "little") + 0.5) / 2**64
    slowest = statistics.NormalDist().inv_cdf(1 - 1 / (num_problems + 1))
    return math.exp(sigma * (min(statistics.NormalDist().inv_cdf(uniform), slowest) - slowest))


def _overrides(arguments: argparse.Namespace, root: Path) -> list[str]:
    return overrides(
        root / "data",
        root / "unused",
        f"data.global_batch_size={arguments.problems}",
        f"rollout.num_samples={arguments.samples}",
        f"rollout.max_new_tokens={arguments.new_tokens}",
        f"model.num_layers={arguments.layers}",
        f"model.hidden_size={arguments.hidden}",
        f"model.num_attention_heads={arguments.hidden // 32}",
        f"model.num_query_groups={arguments.hidden // 32}",
        f"schedule.max_tokens={arguments.max_tokens}",
        "rollout.engine=vllm",
        "rollout.placement=server",
        "rollout.transfer=shared_memory",
        "checkpoint.save_every=0",
        "metrics.show_samples=0",
    )


def _print(found: dict[str, list[dict[str, float]]]) -> None:
    def median(way: str, key: str) -> float:
        return statistics.median(step.get(key, 0.0) for step in found[way])

    print("| way | step | generation | training | trainer waited | servers waited | overlap/share | age |")
    print("|---|---|---|---|---|---|---|---|")
    keys = "seconds/step rollout/generation_seconds seconds/train rollout/waited_seconds rollout/servers_waited_seconds"
    for way in found:
        times = " | ".join(f"{median(way, key):.2f} s" for key in keys.split())
        share, age = (median(way, key) for key in ("overlap/share", "rollout/staleness_mean"))
        print(f"| {way} | {times} | {share:.2f} | {age:.2f} |")
    turns = median("turns", "seconds/step")
    longer = max(median("turns", "rollout/generation_seconds"), median("turns", "seconds/train"))
    print("\n| way | step / turns | step / max(generation, training) |\n|---|---|---|")
    for way in found:
        step = median(way, "seconds/step")
        print(f"| {way} | {step / turns:.2f} | {step / longer:.2f} |")


def _parser() -> argparse.ArgumentParser:
    numbers = {"problems": 32, "samples": 1, "new-tokens": 60, "max-tokens": 192, "layers": 4, "hidden": 256}
    parser = measuring_parser(__doc__, numbers | {"sequences": 64, "steps": 5, "rounds": 2})
    parser.add_argument("--sigma", type=float, default=0.8, help="spread of the log-normal times (default: 0.8)")
    parser.add_argument("--server-python", help="Python with vLLM: measure a real server")
    return parser


if __name__ == "__main__":
    main()
