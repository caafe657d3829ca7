# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure step time and peak memory of the pair orders ``teacher_first`` and ``alternating`` in one run.

    python tools/benchmarks/pair_order.py --pp 4 --num-microbatches 16

The script starts one process per pipeline stage on this machine (gloo on CPU, NCCL with as many GPUs).  Steps of both
orders take turns, so that other load on the machine affects both; compare the ratio of the medians.  With fewer cores
than stages, computation hides the bubbles: ``--stage-ms F B`` makes every stage wait F ms more in each forward pass and
B ms more in each backward pass.  The target mixes the teacher with the student (target.anchor=student).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

ORDERS = ("teacher_first", "alternating")


def main() -> None:
    """Run the stages and print the table."""
    arguments = _parser().parse_args()
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(_stage, (arguments, results), nprocs=arguments.pp)
        stages = [results[rank] for rank in range(arguments.pp)]
    print(_table(stages, arguments))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), "stages": stages}, indent=2))


def _stage(rank: int, arguments: argparse.Namespace, results: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(arguments.pp),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(arguments.port),
    }
    torch.set_num_threads(1)
    from random_llama import RandomLlama

    from megatron_selfdistill.config import ParallelConfig
    from megatron_selfdistill.data.packed_batch import PackingRules
    from megatron_selfdistill.data.packing import pack
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
    from megatron_selfdistill.loss.target import Divergence, Target
    from megatron_selfdistill.model.build import wrap_for_training
    from megatron_selfdistill.model.forward import unwrapped
    from megatron_selfdistill.model.teacher_weights import Teacher
    from megatron_selfdistill.pipeline import schedule, token_losses

    cuts = ParallelConfig(pipeline_model_parallel_size=arguments.pp)
    grid = ranks.initialize(cuts, seed=0)
    llama = RandomLlama.of(
        cuts, grid, arguments.vocab, num_layers=arguments.layers, hidden_size=arguments.hidden, num_attention_heads=8
    )
    chunks = wrap_for_training(llama.chunks(), llama.optimizer)
    teacher = Teacher("frozen", chunks, llama.chunks)
    vocab = VocabShard.from_group(unwrapped(chunks[-1]).vocab_size, arguments.vocab, grid.tp_group)
    batch = pack(_contexts(arguments), PackingRules(max_tokens=arguments.tokens, cp_size=1, tp_size=1, paired=True))
    assert len(batch.student) == arguments.num_microbatches
    if arguments.stage_ms:
        _wait_in_every_stage(chunks, teacher, *(ms / 1000 for ms in arguments.stage_ms))

    token_loss = token_losses.self_distillation(Target(anchor="student"), Divergence())
    found: dict[str, dict[str, list[float]]] = {order: {"seconds": [], "peak_mib": []} for order in ORDERS}
    for repeat in range(arguments.repeats + 1):
        for order in ORDERS:
            for chunk in chunks:
                chunk.zero_grad_buffer()
            ordered = replace(batch, paired=order == "alternating")
            seconds, peak = _measured(
                lambda batch=ordered: schedule.run(
                    chunks, schedule.ScheduledTeacher(teacher.chunks), batch, token_loss, grid, vocab
                )
            )
            if repeat:  # the first round warms up
                found[order]["seconds"].append(seconds)
                found[order]["peak_mib"].append(peak)
    results[rank] = found
    ranks.shutdown()


def _contexts(arguments: argparse.Namespace) -> list[Any]:
    """Return one context per microbatch: student and teacher contexts of equal length, half of it response."""
    from megatron_selfdistill.data.contexts import ContextPair

    rng = random.Random(0)
    prompt, response = arguments.tokens // 2, arguments.tokens - arguments.tokens // 2

    def tokens(count: int) -> list[int]:
        return [rng.randrange(arguments.vocab) for _ in range(count)]

    return [
        ContextPair(str(i), tokens(prompt), tokens(prompt), tokens(response), False)
        for i in range(arguments.num_microbatches)
    ]


def _wait_in_every_stage(chunks: list[Any], teacher: Any, forward: float, backward: float) -> None:
    """Sleep in forward and backward of every chunk, as a stage of a large model would compute."""
    from megatron_selfdistill.model.forward import unwrapped

    class Wait(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            time.sleep(forward)
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            time.sleep(backward)
            return grad

    for chunk in [*chunks, *teacher.chunks]:
        layer = unwrapped(chunk).decoder.layers[0]
        layer.register_forward_hook(
            lambda module, args, output: (Wait.apply(output[0]), *output[1:])  # type: ignore[no-untyped-call]
        )


def _measured(step: Any) -> tuple[float, float]:
    """Return the seconds of a step, and the MiB that the step needed beyond the memory in use before."""
    torch.distributed.barrier()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - start, (torch.cuda.max_memory_allocated() - before) / 2**20
    with _ActivationMeter() as meter:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
    return seconds, meter.peak / 2**20


class _ActivationMeter:
    """The bytes that autograd keeps for backward and the teacher's hidden states, on a CPU, which has no counter."""

    def __enter__(self) -> _ActivationMeter:
        from megatron_selfdistill.pipeline import schedule

        self.now = self.peak = 0
        self.bank, meter = schedule.TeacherHiddenStates, self

        class Counted(schedule.TeacherHiddenStates):
            def put(self, index: int, hidden: torch.Tensor) -> None:
                before = self.bytes_on_device
                super().put(index, hidden)
                meter.add(self.bytes_on_device - before)

            def take(self, index: int, dtype: torch.dtype) -> schedule.KeptStates:
                before = self.bytes_on_device
                kept: schedule.KeptStates = super().take(index, dtype)
                meter.add(self.bytes_on_device - before)
                return kept

        schedule.TeacherHiddenStates = Counted  # type: ignore[misc]
        self.hooks = torch.autograd.graph.saved_tensors_hooks(_Kept.of(self), lambda kept: kept.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        from megatron_selfdistill.pipeline import schedule

        self.hooks.__exit__(*error)
        schedule.TeacherHiddenStates = self.bank  # type: ignore[misc]

    def add(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


class _Kept:
    """A tensor that autograd keeps; it counts while it lives, unless it is a parameter."""

    @classmethod
    def of(cls, meter: _ActivationMeter) -> Any:
        return lambda tensor: cls(tensor, meter)

    def __init__(self, tensor: torch.Tensor, meter: _ActivationMeter) -> None:
        self.tensor, self.meter = tensor, meter
        self.num_bytes = 0 if isinstance(tensor, torch.nn.Parameter) else tensor.nbytes
        meter.add(self.num_bytes)

    def __del__(self) -> None:
        self.meter.add(-self.num_bytes)


def _table(stages: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    seconds = {order: statistics.median(stages[0][order]["seconds"]) for order in ORDERS}
    lines = [
        f"PP{arguments.pp}, {arguments.num_microbatches} pairs of {arguments.tokens} tokens, "
        f"{arguments.layers} layers of width {arguments.hidden}, vocabulary {arguments.vocab}, {torch.__version__}, "
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {os.cpu_count()} cores'}",
        "",
        "| | " + " | ".join(ORDERS) + " | ratio |",
        "|---|---|---|---|",
        f"| step, s (median of {arguments.repeats}) | "
        + " | ".join(f"{seconds[o]:.3f}" for o in ORDERS)
        + f" | {seconds[ORDERS[0]] / seconds[ORDERS[1]]:.2f} |",
    ]
    for rank, stage in enumerate(stages):
        peaks = [max(stage[order]["peak_mib"]) for order in ORDERS]
        ratio = f"{peaks[0] / peaks[1]:.2f}" if peaks[1] else "-"
        lines.append(f"| peak kept for backward, stage {rank}, MiB | {peaks[0]:.1f} | {peaks[1]:.1f} | {ratio} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pp", type=int, default=4, help="pipeline stages")
    parser.add_argument("--num-microbatches", type=int, default=16, help="student microbatches (as many teachers)")
    parser.add_argument("--tokens", type=int, default=128, help="length of a microbatch")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stage-ms", type=float, nargs=2, metavar=("F", "B"), help="waits per stage, in ms")
    parser.add_argument("--port", type=int, default=29571)
    parser.add_argument("--json", help="also write every measurement to this file")
    return parser


if __name__ == "__main__":
    main()
