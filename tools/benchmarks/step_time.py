# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
r"""Measure the price of self-distillation: a training step, against next-token training on the same tokens.

    python tools/benchmarks/step_time.py --layers 4 --hidden 256
    torchrun --nproc-per-node 8 tools/benchmarks/step_time.py --tp 8 --layers 32 --hidden 4096 --vocab 128256 \
        --fused keep_gradient

The target mixes the teacher with the student (target.anchor=student).
The model is random and dense; prompts, hints and responses have fixed lengths, and its own sampler generates the
responses.  Steps of self-distillation in both orders of its microbatches (schedule.pair_order) take turns with what it
cannot avoid: next-token training (the same student contexts, no teacher, no rollout) and the teacher's forward (hidden
states of its microbatches, and logits at their response positions).  Every ratio is the median, over the rounds, of the
ratio within one round, so that other load on the machine affects both sides.  On a CPU the script compares the
processor's time, which depends less on other work.  Additional steps are timed part by part, with a wait for the device
at each boundary, and give the shares.  The script uses no pipeline, because the parts of stages overlap.

    output layer    the logits of teacher and student; with --fused low_memory those that backward makes again, too
    loss            its passes over the logits, the one that writes their gradient included
    backward        the rest of the backward pass, the output layer's part included, and the time in no other part
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring_parser import measuring_parser
from step_parts import PARTS, Clock, now, timed_parts, wait

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_selfdistill.distributed.terminal import silence_known_warnings

NEXT_TOKEN, TEACHER_FORWARD = "next token", "teacher's forward"
DISTILLATION, ALTERNATING = "self-distillation", "self-distillation, alternating"
LABELS = {
    NEXT_TOKEN: "next-token training, forward to optimizer",
    TEACHER_FORWARD: "teacher's forward",
    DISTILLATION: "self-distillation, forward to optimizer",
    ALTERNATING: "the same with pair_order=alternating",
}


def main() -> None:
    """Run the contenders in turn and print the tables."""
    arguments = _parser().parse_args()
    silence_known_warnings()
    if not torch.cuda.is_available():
        torch.set_num_threads(arguments.threads)
    from megatron_selfdistill.distributed import ranks

    bench = _Bench.build(arguments)
    rounds: list[dict[str, float]] = []
    by_part: list[dict[str, float]] = []
    for repeat in range(arguments.repeats + 1):
        bench.sync()
        responses = bench.rollout()
        batch, pairs = bench.packed(responses), bench.packed(responses, paired=True)
        contenders: dict[str, Callable[[], Any]] = {
            NEXT_TOKEN: lambda b=batch: bench.train(b, distil=False),  # type: ignore[misc]
            TEACHER_FORWARD: lambda b=batch: bench.teacher_forward(b),  # type: ignore[misc]
            DISTILLATION: lambda b=batch: bench.train(b),  # type: ignore[misc]
            ALTERNATING: lambda b=pairs: bench.train(b),  # type: ignore[misc]
        }
        num_microbatches = {
            NEXT_TOKEN: len(batch.student),
            TEACHER_FORWARD: len(batch.teacher),
            DISTILLATION: len(batch.teacher + batch.student),
            ALTERNATING: len(pairs.teacher + pairs.student),
        }
        names = list(contenders)[:: 1 if repeat % 2 else -1]  # no contender always comes after the same one
        seconds = {name: _seconds(contenders[name]) for name in names}
        parts = bench.by_part()
        if repeat:  # the first round warms up
            rounds.append(seconds)
            by_part.append(parts)
    bench.close()
    if bench.grid.is_reporter:
        print(_table(rounds, by_part, num_microbatches, bench, arguments))
        if arguments.json:
            numbers = {"arguments": vars(arguments), "where": _where(), "seconds": rounds, "parts": by_part}
            numbers["num_microbatches"] = num_microbatches
            Path(arguments.json).write_text(json.dumps(numbers, indent=2))
    ranks.shutdown()


@dataclass
class _Bench:
    """A model, its teacher, its optimizer and its sampler, and one batch of random problems."""

    grid: Any
    chunks: list[Any]
    teacher: Any
    optimizer: Any
    sampler: Any
    vocab: Any
    token_loss: Any
    arguments: argparse.Namespace
    problems: list[tuple[list[int], list[int]]] = field(default_factory=list)
    step: int = 0

    @classmethod
    def build(cls, arguments: argparse.Namespace) -> _Bench:
        from random_llama import RandomLlama

        from megatron_selfdistill.config import ParallelConfig
        from megatron_selfdistill.distributed import ranks
        from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
        from megatron_selfdistill.loss.target import Divergence, Target
        from megatron_selfdistill.model.build import build_optimizer, wrap_for_training
        from megatron_selfdistill.model.forward import Fusion, unwrapped
        from megatron_selfdistill.model.teacher_weights import Teacher
        from megatron_selfdistill.pipeline import token_losses

        cuts = ParallelConfig(
            tensor_model_parallel_size=arguments.tp, sequence_parallel=arguments.tp > 1 and arguments.sp
        )
        grid = ranks.initialize(cuts, seed=0)
        length = arguments.prompt + arguments.hint + arguments.response
        llama = RandomLlama.of(
            cuts,
            grid,
            arguments.vocab,
            num_layers=arguments.layers,
            hidden_size=arguments.hidden,
            num_attention_heads=arguments.hidden // arguments.head_size,
            max_position_embeddings=length,
        )
        chunks = wrap_for_training(llama.chunks(), llama.optimizer)
        fusion = None if arguments.fused == "none" else Fusion(arguments.fused, arguments.chunk)
        rng = random.Random(grid.dp_rank)
        bench = cls(
            grid=grid,
            chunks=chunks,
            teacher=Teacher("frozen", chunks, llama.chunks),
            optimizer=build_optimizer(chunks, llama.optimizer, num_steps=1000)[0],
            sampler=_sampler(arguments, llama, chunks, length),
            vocab=VocabShard.from_group(unwrapped(chunks[-1]).vocab_size, arguments.vocab, grid.tp_group),
            token_loss=token_losses.self_distillation(Target(anchor="student"), Divergence(), fusion=fusion),
            arguments=arguments,
        )
        for _ in range(arguments.problems):
            sizes = arguments.prompt, arguments.hint
            bench.problems.append(tuple([rng.randrange(arguments.vocab) for _ in range(n)] for n in sizes))  # type: ignore[arg-type]
        return bench

    def sync(self) -> None:
        """Send the present weights to the sampler."""
        self.step += 1
        self.sampler.update_weights(self.step)

    def rollout(self) -> list[Any]:
        """Sample a response to every problem with the weights of the last `sync`.

        All responses have the same length, because there is no stop token.
        """
        from megatron_selfdistill.rollout.base import Request, SamplingParams
        from megatron_selfdistill.rollout.sampling import sample_seed

        requests = [
            Request(prompt, sample_seed(0, self.step, str(number), 0))
            for number, (prompt, _) in enumerate(self.problems)
        ]
        responses: list[Any] = self.sampler.generate(requests, SamplingParams(max_new_tokens=self.arguments.response))
        self.sampler.sleep()
        return responses

    def packed(self, responses: list[Any], paired: bool = False) -> Any:
        """Return both contexts of every response; the hint stands before the problem.

        Without ``paired``, the student's packed sequences hold as many contexts as fit, not as many as fit with their
        hints.
        """
        from megatron_selfdistill.data.contexts import ContextPair
        from megatron_selfdistill.data.packed_batch import PackingRules
        from megatron_selfdistill.data.packing import pack

        contexts = [
            ContextPair(str(i), prompt, hint + prompt, response.token_ids, False)
            for i, ((prompt, hint), response) in enumerate(zip(self.problems, responses, strict=True))
        ]
        return pack(
            contexts,
            PackingRules(max_tokens=self.arguments.tokens, cp_size=1, tp_size=self.arguments.tp, paired=paired),
        )

    def train(self, batch: Any, distil: bool = True, clock: Clock | None = None) -> None:
        """Run forward, backward and the optimizer's step."""
        from megatron_selfdistill.learner import apply_gradients, gradient_norm
        from megatron_selfdistill.pipeline import schedule
        from megatron_selfdistill.pipeline.next_token import next_token

        clock = clock or Clock()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        token_loss = self.token_loss if distil else next_token
        schedule.run(
            self.chunks,
            schedule.ScheduledTeacher(self.teacher.chunks) if distil else None,
            batch,
            token_loss,
            self.grid,
            self.vocab,
        )
        with clock("optimizer"):
            apply_gradients(self.optimizer, gradient_norm(self.optimizer))

    @torch.no_grad()
    def teacher_forward(self, batch: Any) -> None:
        """Run the teacher's microbatches alone, up to its logits at the response positions."""
        from megatron_selfdistill.model.forward import hidden_states, inputs_of, project, states_at, unwrapped

        (chunk,) = self.teacher.chunks
        for microbatch in batch.teacher:
            hidden = hidden_states(chunk, inputs_of(microbatch, self.grid), self.grid)
            positions = microbatch.response_positions.to(self.grid.device)
            project(unwrapped(chunk), states_at(hidden, positions, self.grid))

    def by_part(self) -> dict[str, float]:
        """Return the seconds of each of `PARTS` in one step of self-distillation."""
        clock = Clock(on=True)
        with clock("weight sync"):
            self.sync()
        with clock("rollout"):
            responses = self.rollout()
        batch = self.packed(responses)
        with timed_parts(clock), clock("backward"):
            self.train(batch, clock=clock)
        return {name: clock.seconds[name] for name in PARTS}

    def close(self) -> None:
        self.sampler.close()


def _sampler(arguments: argparse.Namespace, llama: Any, chunks: list[Any], max_length: int) -> Any:
    from megatron_selfdistill.config import RolloutConfig
    from megatron_selfdistill.rollout.megatron.megatron_sampler import MegatronSampler

    if arguments.engine == "megatron":
        return MegatronSampler(chunks, llama.grid, arguments.vocab, max_length)
    return llama.colocated_sampler(chunks, RolloutConfig(engine="vllm", engine_tp=arguments.tp), max_length)


def _seconds(work: Callable[[], Any]) -> float:
    wait()
    began = now()
    work()
    wait()
    return now() - began


def _where() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"


def _table(
    rounds: list[dict[str, float]],
    by_part: list[dict[str, float]],
    num_microbatches: dict[str, int],
    bench: _Bench,
    arguments: argparse.Namespace,
) -> str:
    def median(name: str) -> float:
        return statistics.median(found[name] for found in rounds)

    def median_ratio(these: list[str], those: list[str], beside: float = 0.0) -> float:
        """Return the median over the rounds of (the sum of ``these`` + ``beside``) / the sum of ``those``."""
        return statistics.median(
            (sum(found[name] for name in these) + beside) / sum(found[name] for name in those) for found in rounds
        )

    parts = {name: statistics.median(found[name] for found in by_part) for name in PARTS}
    beside = parts["rollout"] + parts["weight sync"]
    overhead = median_ratio([DISTILLATION], [NEXT_TOKEN, TEACHER_FORWARD])
    tokens = arguments.problems * arguments.response * bench.grid.dp_size
    unit = "seconds" if torch.cuda.is_available() else "CPU seconds"
    lines = [
        f"{arguments.layers} layers of {arguments.hidden}, vocabulary {arguments.vocab}, "
        f"{bench.optimizer.config.params_dtype}; "
        f"{arguments.problems} problems of {arguments.prompt} tokens, hints of {arguments.hint}, responses of "
        f"{arguments.response}; TP {arguments.tp} x DP {bench.grid.dp_size}; sampler {arguments.engine}; "
        f"{_output_layer(arguments)}; target.anchor=student; "
        f"torch {torch.__version__}, {_where()}",
        "",
        f"| | microbatches | {unit} (median) | to next-token training |",
        "|---|---|---|---|",
        *(
            f"| {LABELS[name]} | {count} | {median(name):.3f} | {median_ratio([name], [NEXT_TOKEN]):.2f} |"
            for name, count in num_microbatches.items()
        ),
        f"| self-distillation, whole step | {num_microbatches[DISTILLATION]} | {median(DISTILLATION) + beside:.3f} "
        f"| {median_ratio([DISTILLATION], [NEXT_TOKEN], beside):.2f} |",
        "",
        f"Self-distillation takes {overhead:.3f} of next-token training and the teacher's forward together.",
        "",
        f"| part | {unit} | share | response tokens/s |",
        "|---|---|---|---|",
    ]
    total = sum(parts.values())
    for name, seconds in parts.items():
        speed = f"{tokens / seconds:.0f}" if seconds > 1e-4 else "-"  # the sampler in process has the weights already
        lines.append(f"| {name} | {seconds:.4f} | {seconds / total:.1%} | {speed} |")
    return "\n".join(lines)


def _output_layer(arguments: argparse.Namespace) -> str:
    if arguments.fused == "none":
        return "output layer materialised"
    return f"output layer fused, {arguments.fused}, chunks of {arguments.chunk}"


def _parser() -> argparse.ArgumentParser:
    parser = measuring_parser(
        __doc__,
        {
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
            "chunk": 4096,
            "repeats": 5,
            "threads": 1,
        },
    )
    parser.add_argument("--sp", action="store_true", help="sequence parallelism")
    parser.add_argument(
        "--engine", choices=("megatron", "vllm"), default="megatron", help="the sampler of the responses"
    )
    modes = ("none", "keep_gradient", "low_memory")
    parser.add_argument("--fused", choices=modes, default="none", help="the output layer with the loss (loss.fused)")
    return parser


if __name__ == "__main__":
    main()
