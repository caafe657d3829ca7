# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure the price of an anchored target or of controls: products, bytes and time of a step; the folded row's error.

    python tools/benchmarks/anchored_cost.py
    python tools/benchmarks/anchored_cost.py --layers 16 --hidden 2048 --vocab 151936 --fused keep_gradient
    python tools/benchmarks/anchored_cost.py --controls 1 2 4 8

The targets take turns on the same contexts of a random dense model, with frozen weights as the teacher and, where the
target is anchored to a reference, as the reference too.  Every ratio is the median, over the rounds, of the ratio
within one round.  On a CPU the script compares the processor's time, which depends less on other work.

    controls     with --controls: targets without a reference, for which the teacher reads each response once more after
                 the hint of each of K other problems (target.control=other)
    own weights  a reference beside a teacher that is not frozen (teacher.weights=ema), projected separately
    measured     a step that is measured (metrics.teacher_every) at one token in --every: the mass on rare tokens, and
                 with a reference the teacher's own metrics, which the loss does not see
    forwards     forward passes of the model per problem: student, teacher with its controls, and reference
    products     products of the output layer with the vocabulary per response token, forward + backward; the
                 backward pass of a fused layer with --fused low_memory makes its logits again
    kept         the most that the bank of hidden states holds at a time, in hidden states per response token; all
                 teachers come before all students (schedule.pair_order=teacher_first)
    moved        states put into the bank and taken from it, in hidden states per response token
    step         time of forward and backward, divided by that of the first line
    by the plan  the same ratio by the arithmetic of selfdistill plan: a backward pass costs two forward passes, all
                 forward passes cost the same, and samples of one problem share nothing
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from folded_row_error import table as error_table
from measuring_parser import measuring_parser
from step_parts import now, wait

from megatron_selfdistill.distributed.terminal import silence_known_warnings
from megatron_selfdistill.loss.target import Target

BASELINE = "anchor=student"
TARGETS = {
    BASELINE: Target(anchor="student"),
    "anchor=reference, k = 1 + w": Target("fixed", anchor="reference"),
    "anchor=reference, match=student": Target(anchor="reference", match="student"),
    "anchor=reference, match=reference": Target(anchor="reference"),
}


@dataclass(frozen=True)
class Case:
    """A kind of step: its target, whether its reference has weights of its own, and whether it is measured."""

    name: str
    own_weights: bool = False
    measured: bool = False
    num_controls: int = 0

    @property
    def target(self) -> Target:
        """The target that the step trains towards."""
        return replace(TARGETS[self.name], num_controls=self.num_controls)

    @property
    def forwards(self) -> int:
        """Forward passes per problem."""
        return 2 + self.target.is_anchored + self.num_controls

    def __str__(self) -> str:
        """Return the words of the table."""
        controls = f", K = {self.num_controls}" if self.num_controls else ""
        return self.name + controls + ", own weights" * self.own_weights + ", measured" * self.measured


CASES = [
    *(Case(name, False, measured) for name in TARGETS for measured in (False, True)),
    Case("anchor=reference, match=reference", own_weights=True),
]


def cases_of(controls: Sequence[int]) -> list[Case]:
    """Return the steps to compare, of which the first is the baseline; ``controls``: the numbers of controls."""
    if not controls:
        return CASES
    return [Case(BASELINE, False, measured, number) for number in (0, *controls) for measured in (False, True)]


def main() -> None:
    """Measure all targets in turn and print the tables."""
    arguments = _parser().parse_args()
    silence_known_warnings()
    if not torch.cuda.is_available():
        torch.set_num_threads(arguments.threads)
    from megatron_selfdistill.distributed import ranks

    cases = cases_of(arguments.controls)
    bench = _Bench.build(arguments, cases)
    counts = {case: bench.counts(case) for case in cases}  # also the warm-up
    rounds: list[dict[Case, float]] = []
    for repeat in range(arguments.repeats):
        order = cases[:: 1 if repeat % 2 else -1]  # no case always comes after the same one
        rounds.append({case: bench.seconds(case) for case in order})
    print(_table(counts, rounds, bench, arguments), flush=True)
    if not arguments.controls:
        anchored = {name: target for name, target in TARGETS.items() if target.is_anchored}
        sizes = arguments.rows, arguments.width, arguments.columns
        print("\n" + error_table(anchored, *sizes, bench.grid.device), flush=True)
    if arguments.json:
        found = {str(case): {**vars(counts[case]), "seconds": [one[case] for one in rounds]} for case in cases}
        Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), "found": found}, indent=2))
    ranks.shutdown()


@dataclass(frozen=True)
class Counts:
    """What one step does per response token: see the columns of the table."""

    products_forward: float
    products_backward: float
    kept: float
    moved: float


PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.addmm_)


class ProductCount(TorchDispatchMode):
    """The multiplications of PyTorch's matrix products that have a side of ``vocab`` columns, in this context."""

    def __init__(self, vocab: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocab = vocab
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            left, right = args[-2:]
            if self.vocab in (*left.shape, *right.shape):
                number = left.numel() * right.shape[-1]
                if torch._C._current_graph_task_id() == -1:
                    self.forward += number
                else:
                    self.backward += number
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_bank() -> Iterator[list[Any]]:
    """Let the steps of this context count the bytes of kept states; yield what counts, with ``kept`` and ``moved``."""
    from megatron_selfdistill.pipeline import schedule
    from megatron_selfdistill.pipeline.schedule import TeacherHiddenStates

    class CountedStates(TeacherHiddenStates):
        """States that count bytes: the most that they hold, and all that was written and read."""

        kept = moved = 0

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            counted.append(self)

        def _keep(self, index: int, name: str, states: Any, place: Any = None) -> None:
            super()._keep(index, name, states, place)
            self.moved += states.nbytes
            tensors = [part.states for fields in self.parts for parts in fields.values() for part in parts]
            tensors += self.reference_entropies.values()
            self.kept = max(self.kept, sum(tensor.nbytes for tensor in tensors))

        def take_field(self, *args: Any) -> Any:
            states = super().take_field(*args)
            self.moved += states.nbytes
            return states

    counted: list[Any] = []
    with mock.patch.object(schedule, "TeacherHiddenStates", CountedStates):
        yield counted


@dataclass
class _Bench:
    """A random model, its frozen teacher, and the same random contexts for each number of controls."""

    grid: Any
    chunks: list[Any]
    teacher: list[Any]
    own_weights: list[Any]
    vocab: Any
    batches: Mapping[int, Any]
    losses: Mapping[Target, Any]
    every: int

    @classmethod
    def build(cls, arguments: argparse.Namespace, cases: Sequence[Case]) -> _Bench:
        from random_llama import RandomLlama

        from megatron_selfdistill.config import ParallelConfig
        from megatron_selfdistill.distributed import ranks
        from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
        from megatron_selfdistill.loss.target import Divergence
        from megatron_selfdistill.model.build import wrap_for_training
        from megatron_selfdistill.model.forward import Fusion, unwrapped
        from megatron_selfdistill.pipeline import token_losses

        grid = ranks.initialize(ParallelConfig(), seed=0)
        llama = RandomLlama.of(
            ParallelConfig(),
            grid,
            arguments.vocab,
            num_layers=arguments.layers,
            hidden_size=arguments.hidden,
            num_attention_heads=arguments.hidden // arguments.head_size,
            max_position_embeddings=arguments.prompt + arguments.hint + arguments.response,
        )
        chunks = wrap_for_training(llama.chunks(), llama.optimizer)
        fusion = None if arguments.fused == "none" else Fusion(arguments.fused, arguments.chunk)

        def loss_of(target: Target) -> Any:
            return token_losses.self_distillation(target, Divergence(), fusion=fusion)

        return cls(
            grid=grid,
            chunks=chunks,
            teacher=llama.chunks(),
            own_weights=llama.chunks(),
            vocab=VocabShard.from_group(unwrapped(chunks[-1]).vocab_size, arguments.vocab, None),
            batches={number: random_batch(arguments, number) for number in {case.num_controls for case in cases}},
            losses={case.target: loss_of(case.target) for case in cases},
            every=arguments.every,
        )

    def step(self, case: Case) -> None:
        """Run forward and backward of all microbatches."""
        from megatron_selfdistill.pipeline import schedule
        from megatron_selfdistill.pipeline.schedule import Reference
        from megatron_selfdistill.pipeline.token_measures import TokenMeasurement

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        reference = None
        if case.target.is_anchored:
            reference = Reference(case.target, self.own_weights if case.own_weights else self.teacher)
        schedule.run(
            self.chunks,
            schedule.ScheduledTeacher(self.teacher),
            self.batches[case.num_controls],
            self.losses[case.target],
            self.grid,
            self.vocab,
            reference=reference,
            measurement=TokenMeasurement(case.target, every=self.every) if case.measured else None,
        )

    def seconds(self, case: Case) -> float:
        """Return the seconds of a `step`."""
        wait()
        began = now()
        self.step(case)
        wait()
        return now() - began

    def counts(self, case: Case) -> Counts:
        """Return what a `step` does per response token."""
        from megatron_selfdistill.model.forward import unwrapped

        config, num_tokens = unwrapped(self.chunks[-1]).config, len(self.batches[0].response_tokens)
        with counted_bank() as counted, ProductCount(self.vocab.size) as products:
            self.step(case)
        (bank,) = counted
        product = num_tokens * config.hidden_size * self.vocab.size
        state = num_tokens * config.hidden_size * config.params_dtype.itemsize
        return Counts(
            products_forward=products.forward / product,
            products_backward=products.backward / product,
            kept=bank.kept / state,
            moved=bank.moved / state,
        )


def random_batch(arguments: argparse.Namespace, num_controls: int = 0) -> Any:
    """Return packed contexts of random tokens; the hint stands before the problem, as do the hints of the controls."""
    from megatron_selfdistill.data.contexts import ContextPair
    from megatron_selfdistill.data.packed_batch import PackingRules
    from megatron_selfdistill.data.packing import pack

    rng, rng_of_controls = random.Random(0), random.Random(1)
    contexts = []
    for number in range(arguments.problems):
        prompt, hint, response = (
            [rng.randrange(arguments.vocab) for _ in range(length)]
            for length in (arguments.prompt, arguments.hint, arguments.response)
        )
        others = [rng_of_controls.choices(range(arguments.vocab), k=arguments.hint) for _ in range(num_controls)]
        controls = tuple(other + prompt for other in others)
        contexts.append(
            ContextPair(str(number), prompt, hint + prompt, response, truncated=False, control_prompts=controls)
        )
    return pack(
        contexts,
        PackingRules(max_tokens=arguments.tokens, cp_size=1, tp_size=1, paired=False, num_controls=num_controls),
    )


def _table(
    counts: Mapping[Case, Counts],
    rounds: list[dict[Case, float]],
    bench: _Bench,
    arguments: argparse.Namespace,
) -> str:
    config = bench.chunks[-1].config
    layer = "materialised" if arguments.fused == "none" else f"fused, {arguments.fused}"
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, threads: {torch.get_num_threads()}"
    lines = [
        f"{arguments.layers} layers of {arguments.hidden}, vocabulary {arguments.vocab}, {config.params_dtype}; "
        f"{arguments.problems} problems of {arguments.prompt} tokens, hints of {arguments.hint}, responses of "
        f"{arguments.response}; output layer {layer}; torch {torch.__version__}, {where}",
        "",
        "| target | forwards | products | kept | moved | step | by the plan |",
        "|---|---|---|---|---|---|---|",
    ]
    baseline = next(iter(counts))
    for case, found in counts.items():
        ratio = statistics.median(one[case] / one[baseline] for one in rounds)
        planned = (case.forwards + 2) / (baseline.forwards + 2)
        lines.append(
            f"| {case} | {case.forwards} | {found.products_forward:.3g} + {found.products_backward:.3g} | "
            f"{found.kept:.3g} | {found.moved:.3g} | {ratio:.2f} | {planned:.2f} |"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    sizes = {"problems": 8, "prompt": 64, "hint": 64, "response": 128, "tokens": 1024, "layers": 4, "hidden": 256}
    sizes |= {"head-size": 64, "vocab": 8192, "chunk": 4096, "every": 8, "repeats": 5, "threads": 1}
    sizes |= {"rows": 512, "width": 1024, "columns": 8192}  # of the table of errors
    parser = measuring_parser(__doc__, sizes)
    modes = ("none", "keep_gradient", "low_memory")
    parser.add_argument("--fused", choices=modes, default="none", help="the output layer with the loss (loss.fused)")
    parser.add_argument("--controls", type=int, nargs="*", default=[], help="measure these numbers of controls instead")
    return parser


if __name__ == "__main__":
    main()
