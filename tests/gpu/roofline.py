# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Stage: versions, the speed of a copy and of a bf16 product, and a warm torch.compile for the stages that follow.

python -m tests.gpu.roofline
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from megatron_selfdistill.selftest.outcome import Figure, Outcome, largest
from tests.gpu.results import held

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
COPIED_BYTES = 2**31 if ON_GPU else 2**26
SIZE = 8192 if ON_GPU else 512
PACKAGES = "torch megatron-core triton transformers transformer-engine apex flash-attn vllm liger-kernel".split()


def main() -> int:
    for package in PACKAGES:
        try:
            print(f"{package} {importlib.metadata.version(package)}", flush=True)
        except importlib.metadata.PackageNotFoundError:
            print(f"{package}: not installed", flush=True)
    print(f"Python {platform.python_version()}, CUDA {torch.version.cuda}, NCCL {nccl_version()}", flush=True)
    if ON_GPU:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,power.limit", "--format=csv,noheader"]
        print(subprocess.run(query, capture_output=True, text=True).stdout.strip(), flush=True)
    return 0 if all([held("copy and product", speeds), held("torch.compile", compiled)]) else 1


def nccl_version() -> str:
    return ".".join(map(str, torch.cuda.nccl.version())) if ON_GPU else "none"


def speeds() -> Outcome:
    """Measure a copy, in GB/s read and written, and a square bf16 product, in TFLOP/s."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * COPIED_BYTES / seconds(lambda: target.copy_(source)) / 1e9
    a, b = (torch.randn(SIZE, SIZE, device=DEVICE).bfloat16() for _ in range(2))
    product = 2 * SIZE**3 / seconds(lambda: a @ b) / 1e12
    return Outcome(
        (
            Figure("copy, GB/s", copy, 100.0 if ON_GPU else 0.1, at_least=True),
            Figure("bf16 product, TFLOP/s", product, 10.0 if ON_GPU else 1e-4, at_least=True),
        )
    )


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the shortest time of ``work``, the first of which warms up."""
    best = float("inf")
    for repeat in range(repeats + 1):
        _wait()
        began = time.perf_counter()
        work()
        _wait()
        if repeat:
            best = min(best, time.perf_counter() - began)
    return best


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def compiled() -> Outcome:
    """Compare Megatron's compiled function of gated MLPs with its formula, with gradients.

    Later processes find the compiled function in Inductor's cache.
    """
    from megatron_selfdistill.compat import cpu  # noqa: F401  isort: skip  (must come before megatron.core)
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    began = time.perf_counter()
    generator = torch.Generator(DEVICE).manual_seed(0)
    gates = torch.randn(64, 4, 256, device=DEVICE, generator=generator).bfloat16()
    fused, plain = gates.clone().requires_grad_(), gates.double().requires_grad_()
    found = bias_swiglu_impl(fused, None)
    left, right = plain.chunk(2, -1)
    expected = torch.nn.functional.silu(left) * right
    found.sum().backward()
    expected.sum().backward()
    assert fused.grad is not None and plain.grad is not None
    print(f"compiled in {time.perf_counter() - began:.1f} s", flush=True)
    pairs = {"value": (found, expected), "gradient": (fused.grad, plain.grad)}
    off = {name: float((a.double() - b).norm() / b.norm()) for name, (a, b) in pairs.items()}
    return Outcome((largest("swiglu in bf16 against float64, relative", off, 1e-2),))


if __name__ == "__main__":
    sys.exit(main())
