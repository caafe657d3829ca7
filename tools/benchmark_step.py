# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The price of self-distillation: a training step by parts, against next-token training on the same tokens.

    python tools/benchmark_step.py --layers 4 --hidden 256
    torchrun --nproc-per-node 8 tools/benchmark_step.py --tp 8 --layers 32 --hidden 4096 --vocab 128256

A random dense model; prompts, hints and responses of fixed lengths, the responses written by its own sampler.  Whole
steps of self-distillation and of next-token training (the same student contexts, no teacher, no rollout) take turns,
so that whatever else the machine does hits both; their medians give the ratios.  Steps in between are timed part by
part, waiting for the device at each boundary, and give the shares.  No pipeline: parts of stages overlap.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_selfdistill.noise import silence_known_warnings

PARTS = (
    "rollout",
    "teacher forward",
    "student forward",
    "output layer",
    "loss",
    "backward",
    "optimizer",
    "weight sync",
)


def main() -> None:
    arguments = _parser().parse_args()
    silence_known_warnings()
    if not torch.cuda.is_available():
        torch.set_num_threads(arguments.threads)
    from megatron_selfdistill import parallel

    bench = _Bench.build(arguments)
    whole: dict[str, list[float]] = {"self-distillation": [], "next token": []}
    by_part: list[dict[str, float]] = []
    for repeat in range(arguments.repeats + 1):
        responses = bench.rollout()
        batch = bench.packed(responses)
        distilled = _seconds(lambda b=batch: bench.train(b))  # type: ignore[misc]
        plain = _seconds(lambda b=batch: bench.train(b, distil=False))  # type: ignore[misc]
        parts = bench.by_part()
        if repeat:  # the first round warms up
            whole["self-distillation"].append(distilled)
            whole["next token"].append(plain)
            by_part.append(parts)
    bench.close()
    if bench.grid.is_reporter:
        print(_table(whole, by_part, bench, arguments))
        if arguments.json:
            numbers = {"arguments": vars(arguments), "where": _where(), "seconds": whole, "parts": by_part}
            Path(arguments.json).write_text(json.dumps(numbers, indent=2))
    parallel.shutdown()


@dataclass
class _Bench:
    """A model, its teacher, its optimizer and its sampler, and one batch of random problems."""

    grid: Any
    chunks: list[Any]
    teacher: Any
    optimizer: Any
    sampler: Any
    vocab: Any
    row_loss: Any
    arguments: argparse.Namespace
    problems: list[tuple[list[int], list[int]]] = field(default_factory=list)
    step: int = 0

    @classmethod
    def build(cls, arguments: argparse.Namespace) -> _Bench:
        from megatron_selfdistill import parallel, schedule
        from megatron_selfdistill.config import ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
        from megatron_selfdistill.loss.divergence import Divergence
        from megatron_selfdistill.loss.target import Target
        from megatron_selfdistill.loss.vocab_parallel import VocabShard
        from megatron_selfdistill.model.architecture import transformer_config
        from megatron_selfdistill.model.build import build_chunks, build_optimizer, unwrapped, wrap_for_training
        from megatron_selfdistill.teacher import Teacher

        cuts = ParallelConfig(
            tensor_model_parallel_size=arguments.tp, sequence_parallel=arguments.tp > 1 and arguments.sp
        )
        grid = parallel.initialize(cuts, seed=0)
        length = arguments.prompt + arguments.hint + arguments.response
        model = ModelConfig(
            vocab_size=arguments.vocab,
            num_layers=arguments.layers,
            hidden_size=arguments.hidden,
            num_attention_heads=arguments.hidden // arguments.head_size,
            max_position_embeddings=length,
        )
        optimizer = OptimizerConfig(precision="bf16" if grid.device.type == "cuda" else "fp32")
        config = transformer_config(model, cuts, optimizer, ScheduleConfig())
        chunks = wrap_for_training(build_chunks(model, config, grid, arguments.vocab), optimizer)
        rng = random.Random(grid.dp_rank)
        bench = cls(
            grid=grid,
            chunks=chunks,
            teacher=Teacher("frozen", chunks, lambda: build_chunks(model, config, grid, arguments.vocab)),
            optimizer=build_optimizer(chunks, optimizer, num_steps=1000)[0],
            sampler=_sampler(arguments, model, chunks, grid, str(config.params_dtype), length),
            vocab=VocabShard.from_group(unwrapped(chunks[-1]).vocab_size, arguments.vocab, grid.tp_group),
            row_loss=schedule.self_distillation(Target(), Divergence()),
            arguments=arguments,
        )
        for _ in range(arguments.problems):
            sizes = arguments.prompt, arguments.hint
            bench.problems.append(tuple([rng.randrange(arguments.vocab) for _ in range(n)] for n in sizes))  # type: ignore[arg-type]
        return bench

    def rollout(self) -> list[Any]:
        """A response to every problem, each of the same length: there is no stop token."""
        from megatron_selfdistill.rollout.base import Request, SamplingParams, stream_seed

        self.step += 1
        self.sampler.update_weights(self.step)
        requests = [
            Request(prompt, stream_seed(0, self.step, str(number), 0))
            for number, (prompt, _) in enumerate(self.problems)
        ]
        responses = self.sampler.generate(requests, SamplingParams(max_new_tokens=self.arguments.response))
        self.sampler.sleep()
        return responses

    def packed(self, responses: list[Any]) -> Any:
        """Both contexts of every response; the hint stands before the problem."""
        from megatron_selfdistill.data.contexts import ContextPair
        from megatron_selfdistill.data.packing import pack

        contexts = [
            ContextPair(str(i), prompt, hint + prompt, response.token_ids, False)
            for i, ((prompt, hint), response) in enumerate(zip(self.problems, responses, strict=True))
        ]
        return pack(contexts, max_tokens=self.arguments.tokens, cp_size=1, tp_size=self.arguments.tp, paired=True)

    def train(self, batch: Any, distil: bool = True, clock: _Clock | None = None) -> None:
        """Forward, backward and the optimizer's step."""
        from megatron_selfdistill import schedule

        clock = clock or _Clock()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        row_loss = clock.timing("loss", self.row_loss) if distil else schedule.next_token
        schedule.run(
            self.chunks,
            self.teacher.chunks if distil else None,
            batch,
            row_loss,
            self.grid,
            self.vocab,
            pair_order="alternating",
        )
        with clock("optimizer"):
            self.optimizer.prepare_grads()
            self.optimizer.get_grad_norm()
            self.optimizer.step()

    def by_part(self) -> dict[str, float]:
        """Seconds of each of `PARTS` in one step of self-distillation."""
        from megatron_selfdistill import schedule
        from megatron_selfdistill.loss import vocab_parallel

        clock = _Clock(on=True)
        with clock("weight sync"):
            self.sampler.update_weights(self.step + 1)
        with clock("rollout"):
            responses = self.rollout()
        batch = self.packed(responses)

        def of_model() -> str:
            return "student forward" if torch.is_grad_enabled() else "teacher forward"

        backward = vocab_parallel._HandWrittenBackward
        with (
            mock.patch.object(schedule, "hidden_states", clock.timing(of_model, schedule.hidden_states)),
            mock.patch.object(schedule, "project", clock.timing("output layer", schedule.project)),
            mock.patch.object(backward, "backward", staticmethod(clock.timing("loss", backward.backward))),
            clock("train"),
        ):
            self.train(batch, clock=clock)
        found = clock.seconds
        inside = ("teacher forward", "student forward", "output layer", "loss", "optimizer")
        found["backward"] = found.pop("train") - sum(found[name] for name in inside)
        return {name: found[name] for name in PARTS}

    def close(self) -> None:
        self.sampler.close()


def _sampler(
    arguments: argparse.Namespace, model: Any, chunks: list[Any], grid: Any, dtype: str, max_length: int
) -> Any:
    from megatron_selfdistill.rollout.megatron import MegatronSampler

    if arguments.engine == "megatron":
        return MegatronSampler(chunks, grid, arguments.vocab, max_length)
    import tempfile

    from megatron_selfdistill.model.hf_mapping import family_of_model
    from megatron_selfdistill.rollout.vllm import ColocatedSampler

    family = family_of_model(model)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(family.hf_config(model, dtype.removeprefix("torch."))))
        return ColocatedSampler(
            chunks,
            grid,
            Path(folder),
            family.rules(model),
            vocab_size=arguments.vocab,
            max_length=max_length,
            engine_tp=arguments.tp,
        )


@dataclass
class _Clock:
    """Seconds by name; waits for the device around each.  Off, it does nothing and waits for nothing."""

    on: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        _wait()
        began = time.perf_counter()
        yield
        _wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def timing(self, name: str | Callable[[], str], work: Callable[..., Any]) -> Callable[..., Any]:
        """``work``, timed; a function says the name at each call."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(name if isinstance(name, str) else name()):
                return work(*args, **kwargs)

        return timed


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _seconds(work: Callable[[], Any]) -> float:
    _wait()
    began = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - began


def _where() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"


def _table(
    whole: dict[str, list[float]], by_part: list[dict[str, float]], bench: _Bench, arguments: argparse.Namespace
) -> str:
    distilled, plain = (statistics.median(seconds) for seconds in whole.values())
    parts = {name: statistics.median(found[name] for found in by_part) for name in PARTS}
    step = distilled + parts["rollout"] + parts["weight sync"]
    tokens = arguments.problems * arguments.response * bench.grid.dp_size
    lines = [
        f"{arguments.layers} layers of {arguments.hidden}, vocabulary {arguments.vocab}, "
        f"{bench.optimizer.config.params_dtype}; "
        f"{arguments.problems} problems of {arguments.prompt} tokens, hints of {arguments.hint}, responses of "
        f"{arguments.response}; TP {arguments.tp} x DP {bench.grid.dp_size}; sampler {arguments.engine}; "
        f"torch {torch.__version__}, {_where()}",
        "",
        "| | seconds (median) | to next-token training |",
        "|---|---|---|",
        f"| next-token training, forward to optimizer | {plain:.3f} | 1.00 |",
        f"| self-distillation, forward to optimizer | {distilled:.3f} | {distilled / plain:.2f} |",
        f"| self-distillation, whole step | {step:.3f} | {step / plain:.2f} |",
        "",
        "| part | seconds | share | response tokens/s |",
        "|---|---|---|---|",
    ]
    total = sum(parts.values())
    for name, seconds in parts.items():
        speed = f"{tokens / seconds:.0f}" if seconds > 1e-4 else "-"  # the sampler in process has the weights already
        lines.append(f"| {name} | {seconds:.4f} | {seconds / total:.1%} | {speed} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "problems": 8,
        "prompt": 64,
        "hint": 64,
        "response": 128,
        "tokens": 1024,
        "layers": 4,
        "hidden": 256,
        "head-size": 64,
        "vocab": 8192,
        "tp": 1,
        "repeats": 5,
        "threads": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--sp", action="store_true", help="sequence parallelism")
    parser.add_argument("--engine", choices=("megatron", "vllm"), default="megatron", help="who writes the responses")
    parser.add_argument("--json", help="also write every measured time to this file")
    return parser


if __name__ == "__main__":
    main()
