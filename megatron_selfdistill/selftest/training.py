# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The loss and the gradients of one step, by the package's own schedule: the identity law, and both orders of pairs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_selfdistill.choices import DIVERGENCES, PAIR_ORDERS
from megatron_selfdistill.compat import cpu
from megatron_selfdistill.config import Config, ParallelConfig
from megatron_selfdistill.data.packing import PackedBatch
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.evaluation.inference import new_chunks
from megatron_selfdistill.loss.divergence import Divergence
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.metrics import step_metrics
from megatron_selfdistill.model.build import unwrapped, wrap_for_training
from megatron_selfdistill.pipeline import schedule, token_losses
from megatron_selfdistill.pipeline.batch import Packing, pack_everywhere
from megatron_selfdistill.selftest.outcome import Figure, Outcome, largest
from megatron_selfdistill.selftest.tiny import ALPHABET, MAX_TOKENS, LaunchUnderTest, contexts
from megatron_selfdistill.teacher import Teacher

GRADIENT_BOUND = 1e-3
"""The bound of values that should vanish, relative to a gradient that does not."""
ORDER_BOUND = 0.0 if cpu.ON_CPU else 1e-2
"""The bound on GPUs, whose attention kernels add gradients in any order and round them to bf16."""
SMALLEST_LOSS = 1e-3
"""The nats per token that different prompts must give; else a loss of 0 proves nothing."""


@dataclass(frozen=True)
class Step:
    """The results of one forward and backward pass."""

    loss: float
    """The loss in nats per token, equal on all ranks."""
    gradients: dict[str, Tensor]
    """The finalised gradients of this rank's parameters, float32."""

    def norm(self) -> float:
        """Return the norm of this rank's gradients."""
        return float(sum(gradient.double().pow(2).sum() for gradient in self.gradients.values()) ** 0.5)


class Pair:
    """A student wrapped for training and its frozen teacher, with the same weights."""

    def __init__(self, config: Config, grid: RankGrid) -> None:
        self.grid = grid
        self.chunks = wrap_for_training(new_chunks(config, grid, len(ALPHABET)), config.optimizer)
        self.teacher = Teacher("frozen", self.chunks, lambda: new_chunks(config, grid, len(ALPHABET)))
        self.vocab = VocabShard.from_group(unwrapped(self.chunks[-1]).vocab_size, len(ALPHABET), grid.tp_group)

    def packed(self, *, same_prompt: bool) -> PackedBatch:
        """Return the contexts as microbatches, cut alike for both orders of pairs."""
        pairs = contexts(self.grid, same_prompt=same_prompt)
        return pack_everywhere(pairs, Packing(MAX_TOKENS, "alternating", with_teacher=True), self.grid)

    def step(self, batch: PackedBatch, target: Target, divergence: Divergence, pair_order: str) -> Step:
        """Run forward and backward and return the results."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        token_loss = token_losses.self_distillation(target, divergence)
        output = schedule.run(
            self.chunks, self.teacher.chunks, batch, token_loss, self.grid, self.vocab, pair_order=pair_order
        )
        gradients = {
            f"{index}.{name}": parameter.main_grad.float().clone()
            for index, chunk in enumerate(self.chunks)
            for name, parameter in unwrapped(chunk).named_parameters()
        }
        return Step(step_metrics(output, None, self.grid)["loss/mean"], gradients)


def identity_law(launch: LaunchUnderTest) -> Outcome:
    """Check that a teacher with the same prompt, or with weight 0, gives neither loss nor gradient."""
    pair, config = new_pair(launch, launch.cut(tp=launch.largest_tp))
    same, other = pair.packed(same_prompt=True), pair.packed(same_prompt=False)
    losses, ratios, real_losses = {}, {}, {}
    for kind in DIVERGENCES:
        divergence = Divergence(kind)
        real = pair.step(other, Target(), divergence, "teacher_first")
        real_losses[kind] = real.loss
        for case, batch, target in (
            (f"{kind}, one prompt", same, Target()),
            (f"{kind}, w = 0", other, Target(teacher_weight=0.0)),
        ):
            step = pair.step(batch, target, divergence, "teacher_first")
            losses[case], ratios[case] = abs(step.loss), step.norm() / real.norm()
    tolerance = config.guards.identity_tolerance
    assert tolerance is not None
    return Outcome(
        (
            largest(f"loss, nats per token, TP {pair.grid.tp_size}", losses, tolerance),
            largest("gradient, relative to a real one", ratios, GRADIENT_BOUND),
            Figure("a real loss", min(real_losses.values()), SMALLEST_LOSS, at_least=True),
        ),
    )


def pair_orders(launch: LaunchUnderTest) -> Outcome:
    """Check that teacher_first and alternating give the same gradients, to the last bit on a CPU."""
    pp = 2 if launch.world_size % 2 == 0 else 1
    pair, _ = new_pair(launch, launch.cut(tp=2 if launch.world_size % 4 == 0 else 1, pp=pp))
    batch = pair.packed(same_prompt=False)
    one, other = (pair.step(batch, Target(), Divergence(), order) for order in PAIR_ORDERS)
    differences = {}
    for name, gradient in one.gradients.items():
        norm, off = gradient.norm(), (gradient - other.gradients[name]).norm()
        differences[name] = float(off / norm if norm > 0 else off)
    loss = abs(one.loss - other.loss) / one.loss
    return Outcome(
        (
            largest(f"gradients, relative difference, PP {pp}", differences, ORDER_BOUND),
            Figure("loss, relative difference", loss, ORDER_BOUND),
            Figure("the loss itself, nats per token", one.loss, SMALLEST_LOSS, at_least=True),
        ),
    )


def new_pair(launch: LaunchUnderTest, cuts: ParallelConfig) -> tuple[Pair, Config]:
    """Open a process group and build a `Pair` of tiny models in this layout.  Collective."""
    # Each rank's main_grad is then the complete reduced gradient of its parameters, not a slice.
    config = launch.config(cuts, launch.directory, "optimizer.use_distributed_optimizer=false")
    return Pair(config, launch.grid(cuts)), config
