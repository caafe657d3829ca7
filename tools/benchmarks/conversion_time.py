#!/usr/bin/env python
# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure the seconds and the memory of conversions, as ratios to copying the same files.

    tools/benchmarks/conversion_time.py --gigabytes 6 --directory /tmp/convert

The script makes a random Llama of that size, converts it to Megatron and back in separate processes, and compares every
tensor of the result with the original.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of steps with seconds, CPU seconds, their ratios to copying and peak memory.

    Returns 1 if a tensor has changed on the way to Megatron and back, else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the model, in bf16")
    parser.add_argument(
        "--directory", type=Path, required=True, help="new directory; three times the model's size, removed"
    )
    parser.add_argument("--repeat", type=int, default=3, help="how often each step runs, in turn; the medians count")
    parser.add_argument("--only-make", action="store_true", help="only make the model, and print its sizes")
    arguments = parser.parse_args(argv)
    directory = arguments.directory
    if arguments.only_make:
        print(json.dumps(make_model(directory, arguments.gigabytes)))
        return 0
    directory.mkdir(parents=True)
    try:
        return measure(directory, arguments.gigabytes, arguments.repeat)
    finally:
        shutil.rmtree(directory)


def measure(directory: Path, gigabytes: float, repeat: int) -> int:
    """Run every step ``repeat`` times in turn and print the medians; ratios exclude the time of the imports."""
    # In a process of its own: a child's peak counts from the size of the parent that it was forked from.
    make = [
        sys.executable,
        __file__,
        "--only-make",
        "--gigabytes",
        str(gigabytes),
        "--directory",
        str(directory / "hf"),
    ]
    largest, total = json.loads(subprocess.run(make, check=True, capture_output=True).stdout)
    convert = [sys.executable, str(REPOSITORY / "tools" / "convert.py")]
    steps = {
        "imports alone": [*convert, "inspect", str(directory / "hf")],
        "cp -r": ["cp", "-r", str(directory / "hf"), str(directory / "copy")],
        "hf-to-megatron": [
            *convert,
            "hf-to-megatron",
            "--hf",
            str(directory / "hf"),
            "--out",
            str(directory / "megatron"),
        ],
        "megatron-to-hf": [*convert, "megatron-to-hf", "--megatron", str(directory / "megatron"), "--out"],
    }
    steps["megatron-to-hf"] += [str(directory / "back"), "--max-shard-size", "2GB"]
    print(f"{total / 1e9:.2f} GB; largest tensor {largest / 1e9:.3f} GB")
    runs: dict[str, list[tuple[float, float, int]]] = {name: [] for name in steps}
    for _ in range(repeat):
        for written in ("copy", "megatron", "back"):
            shutil.rmtree(directory / written, ignore_errors=True)
        for name, command in steps.items():
            runs[name].append(run(command))
    median = {name: [statistics.median(column) for column in zip(*them, strict=True)] for name, them in runs.items()}
    for name, (seconds, cpu, peak) in median.items():
        line = f"{name:16} {seconds:7.1f} s  {cpu:6.2f} CPU s  peak {peak / 1e9:6.3f} GB"
        if "-to-" in name:
            start, copy = median["imports alone"], median["cp -r"]
            ratios = [(value - start[i]) / copy[i] for i, value in enumerate((seconds, cpu))]
            line += f"  beyond the imports {ratios[0]:.1f} x cp -r in time, {ratios[1]:.1f} x in CPU time"
        print(line, flush=True)
    changed = compare(directory / "hf", directory / "back")
    print(f"{len(changed)} tensors changed" + (f", first {changed[0]}" if changed else ""))
    return 1 if changed else 0


def run(command: list[str]) -> tuple[float, float, int]:
    """Return seconds until the files are on the disk, CPU seconds, and peak resident bytes of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {os.waitstatus_to_exitcode(status)}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, peak


def make_model(directory: Path, gigabytes: float) -> tuple[int, int]:
    """Write a random Llama into ``directory``; return the bytes of its largest tensor and of all tensors."""
    import torch

    from megatron_selfdistill.interop.hf.mapping import family_of
    from megatron_selfdistill.interop.safetensors_directory import SafetensorsWriter

    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 64000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_hidden_layers": 1,
        "torch_dtype": "bfloat16",
    }
    family = family_of(config)

    def tensors() -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        rules = family.rules(family.model_config(config))
        pairs = [pair for rule in rules for pair in zip(rule.hf_names, rule.hf_shapes, strict=True)]
        return [(name, torch.bfloat16, shape) for name, shape in pairs]

    def num_bytes() -> int:
        return sum(2 * math.prod(shape) for _, _, shape in tensors())

    one = num_bytes()
    config["num_hidden_layers"] = 2
    per_layer = num_bytes() - one
    config["num_hidden_layers"] = max(1, round((gigabytes * 1e9 - one) / per_layer) + 1)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    writer = SafetensorsWriter(directory, tensors(), 5 * 10**9)
    numbers = torch.randn(1_000_003).bfloat16()  # a prime: no two rows of a tensor are alike
    for index, (name, _, shape) in enumerate(tensors()):
        count = math.prod(shape)
        repeats = count // numbers.numel() + 2
        writer.write(name, numbers.repeat(repeats)[index : index + count].reshape(shape))
    writer.close()
    return max(2 * math.prod(shape) for _, _, shape in tensors()), num_bytes()


def compare(before: Path, after: Path) -> list[str]:
    """Return the names of the tensors that are not bitwise equal in both directories."""
    import torch

    from megatron_selfdistill.interop.safetensors_directory import open_weights_directory

    one, two = open_weights_directory(before), open_weights_directory(after)
    if one.tensors.keys() != two.tensors.keys():
        return sorted(one.tensors.keys() ^ two.tensors.keys())
    return [name for name in one.tensors if not torch.equal(one.read(name), two.read(name))]


if __name__ == "__main__":
    sys.exit(main())
