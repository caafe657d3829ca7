# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Some steps of a recipe with random weights: seconds per phase, model FLOP utilisation, weight sync, peak memory.

    python tools/benchmarks/recipe_steps.py --recipe qwen3_8b --ranks 8 --peak-tflops 989
    python tools/benchmarks/recipe_steps.py --tiny                                   one CPU rank, a model of two layers

The problems are the subtractions of the tests; responses of random weights never end, so all are as long as
rollout.max_new_tokens.  The first step, which compiles and allocates everything, does not count in the medians.

    utilisation   FLOPs per parameter and token of both contexts, to what the GPUs' tensor cores could have done in
                  seconds/train: half of student (6) and teacher (2), and with target.anchor=reference of the reference
                  (2), that is 4 or 5.  Both contexts count alike, though hints make the teacher's longer; attention's
                  products between tokens are not counted
    plan          GiB that the dry run expects while training on the fullest rank, what it reserves included
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
for _directory in (REPOSITORY, REPOSITORY / "tests" / "support"):
    if str(_directory) not in sys.path:
        sys.path.append(str(_directory))

import tiny_run  # noqa: E402

PLAN = """
import sys
from megatron_selfdistill import config
from megatron_selfdistill.instruments.plan.dry_run import dry_run
plan = dry_run(config.load(sys.argv[1:]))
print(max(memory.training_peak for memory in plan.memory), plan.parameters, int(plan.config.is_anchored))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps, print the table, return the run's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="qwen3_8b")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on one CPU rank")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of one GPU in bf16, dense (H100, H200: 989)")
    parser.add_argument("keys", nargs="*", metavar="key=value", help="further keys of the run")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="selfdistill_recipe_", ignore_cleanup_errors=True) as path:
        directory = Path(path)
        tiny_run.write_data(directory)
        keys = tiny_keys(directory, options) if options.tiny else recipe_keys(directory, options)
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}", "-m"]
        launcher = [] if options.tiny else torchrun
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-m", *launcher, "megatron_selfdistill.train", *keys]
        status = subprocess.run(command, env=environment).returncode
        if status:
            return status
        planned = subprocess.run([sys.executable, "-c", PLAN, *keys], env=environment, capture_output=True, text=True)
        if planned.returncode:
            print(planned.stderr[-2000:], file=sys.stderr)
            return planned.returncode
        gib, parameters, is_anchored = map(float, planned.stdout.split()[-3:])
        print(table(directory / "run", options, keys, gib, parameters, bool(is_anchored)))
    return 0


def tiny_keys(directory: Path, options: argparse.Namespace) -> list[str]:
    """Return the keys of the tests' tiny run."""
    keys = [f"num_steps={options.steps}", "checkpoint.save_every=1000", "cluster.num_gpus=1", *options.keys]
    arguments: list[str] = tiny_run.overrides(directory, directory / "run", *keys)
    return arguments


def recipe_keys(directory: Path, options: argparse.Namespace) -> list[str]:
    """Return the keys of the recipe on the tests' problems; it samples in process where vLLM is not installed."""
    without = [] if importlib.util.find_spec("vllm") else ["rollout.engine=megatron", "rollout.engine_tp=1"]
    return [
        *(f"recipe={options.recipe}", f"run_dir={directory / 'run'}", f"num_steps={options.steps}"),
        *(f"data.path={directory}/problems.jsonl", f"data.tokenizer={directory}/tokenizer"),
        *("data.teacher_template='{problem}H{solution}|'", "checkpoint.save_every=1000", "metrics.loggers=[]"),
        *(f"cluster.num_gpus={options.ranks}", "rollout.max_new_tokens=1024", "guards.min_length_ratio=null"),
        *without,
        *options.keys,
    ]


def table(
    run_dir: Path,
    options: argparse.Namespace,
    keys: Sequence[str],
    planned: float,
    parameters: float,
    is_anchored: bool,
) -> str:
    """Return Markdown: medians over the steps behind the first one.  ``is_anchored``: whether there is a reference."""
    from megatron_selfdistill.metrics.run_log import read_metrics

    lines = [line for line in read_metrics(run_dir) if "seconds/train" in line][1:]

    def median(key: str) -> float:
        return statistics.median(line[key] for line in lines)

    phases = sorted(key for key in lines[0] if key.startswith("seconds/") and key != "seconds/step")
    whole = median("seconds/step")
    engine = "in process" if options.tiny or "rollout.engine=megatron" in keys else "vLLM, colocated"
    found = [
        f"{parameters:.3g} parameters; teacher mixed with the {'reference' if is_anchored else 'student'}; sampler "
        f"{engine}; medians of {len(lines)} steps of {whole:.3g} s",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {median(key):.3g} s, {median(key) / whole:.0%} of the step |" for key in phases),
    ]
    if not options.tiny:
        read = median("tokens_per_second/train") * median("seconds/train")
        done = (5 if is_anchored else 4) * read * parameters / median("seconds/train") / options.ranks / 1e12
        found.append(f"| utilisation in seconds/train | {done:.0f} TFLOP/s per GPU, {done / options.peak_tflops:.0%} |")
    if lines[0].get("rollout/sync_bytes"):
        speed = median("rollout/sync_bytes") / max(median("rollout/sync_seconds"), 1e-9) / 1e9
        found.append(f"| weight sync | {median('rollout/sync_bytes') / 1e9:.3g} GB, {speed:.3g} GB/s |")
    peak = max(line.get("memory/peak_gib", 0.0) for line in lines)
    measured = f"{peak:.1f} GiB allocated at most" if peak else "not measured on a CPU"
    found.append(f"| peak memory | {measured}; the plan expects {planned:.1f} GiB while training |")
    return "\n".join(found)


if __name__ == "__main__":
    sys.exit(main())
