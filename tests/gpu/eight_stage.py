# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Stages on eight GPUs: a rank that stops, and an 8B model with random weights that samples from vLLM.

python -m tests.gpu.eight_stage hang
python -m tests.gpu.eight_stage colocated
python -m tests.gpu.eight_stage servers [PYTHON WITH VLLM]
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import tiny_run

from tests.gpu.colocated_stage import agreement
from tests.gpu.results import Figure, Outcome, all_held
from tests.gpu.runner import REPOSITORY, launched

NUM_STEPS = 3
HANG_MINUTES = 0.25
QWEN3_8B = (
    *("recipe=qwen3_8b", "data.teacher_template='{problem}H{solution}|'", "model.vocab_size=151936"),
    *("data.global_batch_size=16", "data.max_length=1024", "rollout.max_new_tokens=64", "rollout.kv_cache_gb=4"),
    *("schedule.max_tokens=4096", f"num_steps={NUM_STEPS}", "checkpoint.save_every=1000", "metrics.console_every=0"),
    *("metrics.loggers=[]", "model.init_method_std=0.02"),
)


def main(what: str, python: str | None) -> int:
    with tempfile.TemporaryDirectory(prefix="selfdistill_eight_", ignore_cleanup_errors=True) as path:
        directory = Path(path)
        tiny_run.write_data(directory)
        checks: dict[str, dict[str, Callable[[], Outcome]]] = {
            "hang": {"a rank that stops": partial(hang, directory)},
            "colocated": {f"vLLM colocated, engines of {tp}": partial(colocated, directory, tp) for tp in (1, 2)},
            "servers": {f"vLLM servers over {way}": partial(servers, directory, way, python) for way in WAYS},
        }
        return all_held(checks[what])


def hang(directory: Path) -> Outcome:
    """Stop one of two ranks in its third step, and check that the run soon ends with status 5 and names the rank."""
    run_dir = directory / "hang"
    arguments = tiny_run.overrides(directory, run_dir, f"stop.hang_timeout_minutes={HANG_MINUTES}", *on_device())
    began = time.time()
    done = launched([str(REPOSITORY / "tests" / "support" / "hanging_run.py"), "is stopped", "1", *arguments], 2)
    verdict = run_dir / "stacks" / "verdict.txt"
    text = verdict.read_text() if verdict.exists() else ""
    seconds = verdict.stat().st_mtime - began if text else None  # torchrun gives a stopped rank 30 s more
    return Outcome(
        (
            Figure("exit status 5 is reported", float("exitcode  : 5" in done.stdout), 1.0, at_least=True),
            Figure("rank 1 is named", float(": rank 1 on " in text), 1.0, at_least=True),
            Figure("seconds from the launch to the verdict", seconds, 60 * HANG_MINUTES + 60),
        )
    )


def on_device() -> list[str]:
    """Return the keys for bf16 on GPUs, whose packed attention may know nothing else."""
    return [] if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else ["optimizer.precision=bf16"]


def trained(
    directory: Path, name: str, num_ranks: int, keys: list[str], environment: dict[str, str] | None = None
) -> Outcome:
    """Run three steps of an 8B model, and count them; compare log-probs of sampler and trainer."""
    run_dir = directory / name
    data = [f"run_dir={run_dir}", f"data.path={directory}/problems.jsonl", f"data.tokenizer={directory}/tokenizer"]
    began = time.monotonic()
    done = launched(["-m", "megatron_selfdistill.train", *QWEN3_8B, *data, *keys], num_ranks, environment)
    if done.returncode:
        last = [line for line in done.stdout.splitlines() if "rror" in line]
        raise RuntimeError(f"the run ended with {done.returncode}: {(last or ['see its output above'])[0][:250]}")
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return agreement(run_dir, NUM_STEPS, bound=0.1)


def without_vllm() -> bool:
    return importlib.util.find_spec("vllm") is None


def colocated(directory: Path, engine_tp: int) -> Outcome:
    if without_vllm():
        return Outcome(not_done="vLLM is not installed in the environment of the trainer")
    return trained(directory, f"colocated_{engine_tp}", 8, [f"rollout.engine_tp={engine_tp}"])


WAYS = ("nccl", "gloo")


def servers(directory: Path, way: str, python: str | None) -> Outcome:
    """Run four servers and four trainers."""
    if python is None and without_vllm():
        return Outcome(not_done="vLLM is not installed here, and --vllm-python names no Python that has it")
    keys = [
        *("rollout.placement=server", "rollout.num_servers=4", f"rollout.transfer={way}", "rollout.engine_tp=1"),
        *("cluster.num_gpus=4", *([f"rollout.server_python={python}"] if python else [])),
    ]
    return trained(directory, f"servers_{way}", 4, keys)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None))
