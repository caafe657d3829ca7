# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Stage: whole runs of a small model whose responses come from an engine beside the trainer, on one device.

python -m tests.gpu.colocated_stage

The trainer's own sampler runs everywhere, and vLLM runs if the environment has it.  The weights change in every step,
so that the log-probs of engine and trainer agree only if the engine has got the new weights.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import tiny_run
import torch

from tests.gpu.results import Figure, Outcome, all_held

ON_GPU = torch.cuda.is_available()
CHECKS = {"megatron": "colocated engine: the trainer's own sampler", "vllm": "colocated engine: vLLM"}
"""The name of the check of each ``rollout.engine``."""
NUM_STEPS = 3
MODEL = (
    *("model.hidden_size=256", "model.ffn_hidden_size=512", "model.num_attention_heads=4", "model.init_method_std=0.1"),
    *(f"num_steps={NUM_STEPS}", "checkpoint.save_every=1000", "optimizer.lr_warmup_steps=0", "rollout.kv_cache_gb=0.1"),
)
"""Heads of 64, which every kernel of attention has."""
LARGEST_DIFFERENCE = 0.1 if ON_GPU else 1e-3
"""In nats per token: bf16 on a GPU, whose engine and trainer round at different places, and float32 on a CPU."""


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="selfdistill_colocated_", ignore_cleanup_errors=True) as path:
        tiny_run.write_data(Path(path))
        return all_held({name: partial(trained, Path(path), engine) for engine, name in CHECKS.items()})


def trained(directory: Path, engine: str) -> Outcome:
    """Train three steps on the responses of ``engine``; compare its log-probs with the trainer's."""
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        return Outcome(not_done="vLLM is not installed in the environment of the trainer")
    run_dir = directory / engine
    keys = tiny_run.overrides(directory, run_dir, *MODEL, f"rollout.engine={engine}")
    keys = [key for key in keys if not (ON_GPU and key == "optimizer=fp32")]
    done = subprocess.run([sys.executable, "-m", "megatron_selfdistill.train", *keys])
    if done.returncode:
        raise RuntimeError(f"the run ended with status {done.returncode}, expected 0; see its output above")
    return agreement(run_dir, NUM_STEPS, LARGEST_DIFFERENCE)


def agreement(run_dir: Path, num_steps: int, bound: float) -> Outcome:
    """Return the number of finished steps, and how far the log-probs of sampler and trainer are apart in any step."""
    from megatron_selfdistill.metrics.run_log import read_metrics

    lines = list(read_metrics(run_dir))
    off = max((line["sampler/log_prob_mean_abs_diff"] for line in lines), default=None)
    return Outcome(
        (
            Figure("steps", float(len(lines)), float(num_steps), at_least=True),
            Figure("log-probs of sampler and trainer apart, nats", off, bound),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
