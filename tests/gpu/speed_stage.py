# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Stage: the speed of a copy, of a bf16 product and of the loss, and that torch.compile works.

python -m tests.gpu.speed_stage
"""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from tests.gpu.outcome import Figure, Outcome, largest
from tests.gpu.results import held

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
COPIED_BYTES = 2**31 if ON_GPU else 2**26
SIZE = 8192 if ON_GPU else 512
LOSS_SHAPE = (4096, 151936) if ON_GPU else (16, 4096)
"""Tokens and columns: a microbatch with the whole vocabulary of Qwen3."""
LOSS_PASSES = 7
"""Two reads of the rows of student and teacher, and one more of both with the gradient written in place."""
MOST_OF_FLOOR = 8.0 if ON_GPU else 1e4
"""The kernels are within a small factor of the time of their reads and writes; PyTorch's operators take 100 times."""


def main() -> int:
    print(f"Python {platform.python_version()}, CUDA {torch.version.cuda}, NCCL {nccl_version()}", flush=True)
    if ON_GPU:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,power.limit", "--format=csv,noheader"]
        print(subprocess.run(query, capture_output=True, text=True).stdout.strip(), flush=True)
    checks = {"copy and product": speeds, "speed of the loss": speed_of_loss, "torch.compile": compiled}
    sound = [held(name, check) for name, check in checks.items()]
    return 0 if all(sound) else 1


def nccl_version() -> str:
    return ".".join(map(str, torch.cuda.nccl.version())) if ON_GPU else "none"


def speeds() -> Outcome:
    """Measure a copy, in GB/s read and written, and a square bf16 product, in TFLOP/s."""
    copy = copied_per_second() / 1e9
    a, b = (torch.randn(SIZE, SIZE, device=DEVICE).bfloat16() for _ in range(2))
    product = 2 * SIZE**3 / seconds(lambda: a @ b) / 1e12
    return Outcome(
        (
            Figure("copy, GB/s", copy, 100.0 if ON_GPU else 0.1, at_least=True),
            Figure("bf16 product, TFLOP/s", product, 10.0 if ON_GPU else 1e-4, at_least=True),
        )
    )


def copied_per_second() -> float:
    """Return the bytes per second that a copy reads and writes."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / seconds(lambda: target.copy_(source))


def speed_of_loss() -> Outcome:
    """Measure the loss of bf16 logits with its gradient, as a multiple of the time of its reads and writes."""
    from megatron_selfdistill.loss import Divergence, Target, VocabShard, distillation_loss

    tokens, columns = LOSS_SHAPE
    generator = torch.Generator(DEVICE).manual_seed(0)
    rows = [torch.randn(LOSS_SHAPE, device=DEVICE, generator=generator, dtype=torch.bfloat16) for _ in range(2)]
    ids = torch.randint(columns, (tokens,), device=DEVICE, generator=generator)
    student = rows[0].requires_grad_()
    shard = VocabShard(0, columns, columns)

    def step() -> None:
        student.grad = None
        stats = distillation_loss(
            student, rows[1], ids, target=Target(anchor="student"), divergence=Divergence(), vocab=shard
        )
        stats.loss.sum().backward()

    taken = seconds(step)
    floor = LOSS_PASSES * rows[0].nbytes / copied_per_second()
    print(f"the loss of {tokens} tokens over {columns} columns: {1000 * taken:.2f} ms, floor {1000 * floor:.2f} ms")
    return Outcome((Figure("time of the loss to that of its reads and writes", taken / floor, MOST_OF_FLOOR),))


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
    """Compare Megatron's compiled function of gated MLPs with its formula, with gradients."""
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
