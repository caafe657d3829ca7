# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure what adapters save and cost: bytes, time of a step part by part, and time of a rollout in process.

    python tools/benchmarks/adapter_cost.py
    python tools/benchmarks/adapter_cost.py --layers 16 --hidden 2048 --vocab 151936 --ranks 16 64

Training of all weights and of adapters of several ranks take turns on the same contexts of a random dense model, with
the default target.  Every ratio is the median, over the rounds, of the ratio to all weights within one round.  On a CPU
the script compares the processor's time, which depends less on other work.

    weights, gradients, optimizer, teacher    bytes of the tensors of one rank after the steps; the teacher is also the
                 reference
    activations  bytes that autograd keeps of one microbatch of the student, without its parameters
    update       bytes of the parameters that a step changes, which an engine outside the trainer receives after it
    step         forward and backward of all models, and the optimizer
    rollout      responses that the sampler in process generates
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from anchored_cost import random_batch
from measuring_parser import measuring_parser
from step_parts import Clock, now, timed_parts, wait

from megatron_selfdistill.distributed.terminal import silence_known_warnings

TRAINED = ("teacher forward", "student forward", "output layer", "loss", "backward", "optimizer")
"""The parts of `step_parts.PARTS` that a step without a rollout has; the teacher's part is also the reference's."""


def main() -> None:
    """Measure all contenders in turn and print the tables."""
    arguments = _parser().parse_args()
    silence_known_warnings()
    if not torch.cuda.is_available():
        torch.set_num_threads(arguments.threads)
    from megatron_selfdistill.config import ParallelConfig
    from megatron_selfdistill.distributed import ranks

    grid = ranks.initialize(ParallelConfig(), seed=0)
    batch = random_batch(arguments)
    benches = {rank: Bench.build(arguments, grid, rank, batch) for rank in (0, *arguments.ranks)}
    rounds: list[dict[int, dict[str, float]]] = []
    for repeat in range(arguments.repeats + 1):
        names = list(benches)[:: 1 if repeat % 2 else -1]  # no contender always comes after the same one
        seconds = {rank: benches[rank].seconds() for rank in names}
        if repeat:  # the first round warms up
            rounds.append(seconds)
    held = {rank: bench.held() for rank, bench in benches.items()}
    print(tables(held, rounds, benches[0], arguments), flush=True)
    if arguments.json:
        numbers = {"arguments": vars(arguments), "bytes": held, "seconds": rounds}
        Path(arguments.json).write_text(json.dumps(numbers, indent=2))
    for bench in benches.values():
        bench.sampler.close()
    ranks.shutdown()


@dataclass
class Bench:
    """A model that is trained as a whole or by adapters, its teacher, its optimizer and its sampler."""

    grid: Any
    chunks: list[Any]
    teacher: Any
    optimizer: Any
    sampler: Any
    vocab: Any
    target: Any
    batch: Any
    arguments: argparse.Namespace

    @classmethod
    def build(cls, arguments: argparse.Namespace, grid: Any, rank: int, batch: Any) -> Bench:
        """Return a model with adapters of ``rank``, or with rank 0 one whose weights are all trained."""
        from random_llama import RandomLlama

        from megatron_selfdistill.adapters.low_rank_adapters import WithoutAdapters, add_adapters
        from megatron_selfdistill.config import ParallelConfig, TargetConfig
        from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
        from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
        from megatron_selfdistill.loss.target import Target
        from megatron_selfdistill.model.build import build_optimizer, wrap_for_training
        from megatron_selfdistill.model.forward import unwrapped
        from megatron_selfdistill.model.teacher_weights import Teacher
        from megatron_selfdistill.rollout.megatron.megatron_sampler import MegatronSampler

        length = arguments.prompt + arguments.hint + arguments.response
        llama = RandomLlama.of(
            ParallelConfig(),
            grid,
            arguments.vocab,
            num_layers=arguments.layers,
            hidden_size=arguments.hidden,
            num_attention_heads=arguments.hidden // arguments.head_size,
            max_position_embeddings=length,
        )
        initial = llama.chunks()
        if rank:
            add_adapters(initial, AdapterConfig(rank=rank), grid)
        chunks = wrap_for_training(initial, llama.optimizer)
        start: Any = [WithoutAdapters(chunk) for chunk in chunks] if rank else None
        return cls(
            grid=grid,
            chunks=chunks,
            teacher=Teacher("frozen", chunks, llama.chunks, start=start),
            optimizer=build_optimizer(chunks, llama.optimizer, num_steps=1000)[0],
            sampler=MegatronSampler(chunks, grid, arguments.vocab, length),
            vocab=VocabShard.from_group(unwrapped(chunks[-1]).vocab_size, arguments.vocab, grid.tp_group),
            target=Target.configured(TargetConfig()),
            batch=batch,
            arguments=arguments,
        )

    def step(self, clock: Clock) -> None:
        """Run forward, backward and the optimizer's step."""
        from megatron_selfdistill.learner import apply_gradients, gradient_norm
        from megatron_selfdistill.loss.target import Divergence
        from megatron_selfdistill.pipeline import schedule, token_losses
        from megatron_selfdistill.pipeline.schedule import Reference

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        schedule.run(
            self.chunks,
            schedule.ScheduledTeacher(self.teacher.chunks),
            self.batch,
            token_losses.self_distillation(self.target, Divergence()),
            self.grid,
            self.vocab,
            reference=Reference(self.target, self.teacher.chunks),
        )
        with clock("optimizer"):
            apply_gradients(self.optimizer, gradient_norm(self.optimizer))

    def rollout(self) -> None:
        """Sample a response of the full length to every prompt of the batch."""
        from megatron_selfdistill.rollout.base import Request, SamplingParams
        from megatron_selfdistill.rollout.sampling import sample_seed

        generator = torch.Generator().manual_seed(0)
        shape = (self.arguments.problems, self.arguments.prompt)
        prompts = torch.randint(self.arguments.vocab, shape, generator=generator).tolist()
        requests = [Request(prompt, sample_seed(0, 0, str(i), 0)) for i, prompt in enumerate(prompts)]
        self.sampler.update_weights(0)
        self.sampler.generate(requests, SamplingParams(max_new_tokens=self.arguments.response))
        self.sampler.sleep()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of a step, of its parts in a further step, and of a rollout."""
        found = {"step": _seconds(lambda: self.step(Clock())), "rollout": _seconds(self.rollout)}
        clock = Clock(on=True)
        with timed_parts(clock), clock("backward"):
            self.step(clock)
        return found | {name: clock.seconds[name] for name in TRAINED}

    def held(self) -> dict[str, int]:
        """Return the bytes of each part of this rank's memory, and of an update of an engine outside the trainer."""
        from megatron_selfdistill.model.forward import unwrapped

        params = [p for chunk in self.chunks for p in unwrapped(chunk).parameters()]
        optimizers = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        states = [state.values() for one in optimizers for state in one.optimizer.state.values()]
        buffers = [buffer for chunk in self.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
        teacher = [p for chunk in self.teacher.chunks for p in chunk.parameters()] if self.teacher.is_copy else []
        return {
            "weights": sum(p.nbytes for p in params),
            "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
            "optimizer": sum(t.nbytes for values in states for t in values if torch.is_tensor(t) and t.dim()),
            "teacher": sum(p.nbytes for p in teacher),
            "activations": self._saved(),
            "update": sum(p.nbytes for p in params if p.requires_grad),
        }

    def _saved(self) -> int:
        """Return the bytes that autograd keeps of the student's first microbatch, without its parameters."""
        from megatron_selfdistill.model.forward import hidden_states, inputs_of, unwrapped

        (chunk,) = self.chunks
        own = {p.untyped_storage().data_ptr() for p in unwrapped(chunk).parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden_states(chunk, inputs_of(self.batch.student[0], self.grid), self.grid)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _seconds(work: Callable[[], Any]) -> float:
    wait()
    began = now()
    work()
    wait()
    return now() - began


def tables(
    held: Mapping[int, Mapping[str, int]],
    rounds: list[dict[int, dict[str, float]]],
    bench: Bench,
    arguments: argparse.Namespace,
) -> str:
    """Return Markdown: bytes by part, and the time of each part for all weights, with the ratios of the adapters."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, threads: {torch.get_num_threads()}"
    unit = "seconds" if torch.cuda.is_available() else "CPU seconds"
    heading = " | ".join(["all weights", *(f"rank {rank}" for rank in held if rank)])
    line = "|---" * (len(held) + 1) + "|"
    lines = [
        f"{arguments.layers} layers of {arguments.hidden}, vocabulary {arguments.vocab}, "
        f"{bench.chunks[-1].config.params_dtype}; {arguments.problems} problems of {arguments.prompt} tokens, hints of "
        f"{arguments.hint}, responses of {arguments.response}; torch {torch.__version__}, {where}",
        "",
        f"| MB | {heading} |",
        line,
    ]
    for part in held[0]:
        lines.append(f"| {part} | {' | '.join(f'{found[part] / 1e6:.2f}' for found in held.values())} |")
    lines += ["", f"| | {unit}, all weights | {' | '.join(f'rank {rank}' for rank in held if rank)} |", line]
    for part in ("step", *TRAINED, "rollout"):
        ratios = [statistics.median(found[rank][part] / found[0][part] for found in rounds) for rank in held if rank]
        whole = statistics.median(found[0][part] for found in rounds)
        lines.append(f"| {part} | {whole:.3f} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    sizes = {"problems": 8, "prompt": 64, "hint": 64, "response": 128, "tokens": 1024, "layers": 4, "hidden": 256}
    sizes |= {"head-size": 64, "vocab": 8192, "repeats": 5, "threads": 1}
    parser = measuring_parser(__doc__, sizes)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64], help="(default: 4 16 64)")
    return parser


if __name__ == "__main__":
    main()
