# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The self-test reads and trains a tiny model: laws, kinds of layers, weights at a sampler, and a resumed run."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.compat import cpu, repairs  # isort: skip  (must come before megatron.core)
from megatron_selfdistill.pipeline import schedule, token_losses  # isort: skip  (must come before megatron.core)
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_selfdistill.choices import DIVERGENCES, PAIR_ORDERS
from megatron_selfdistill.config import Config, ParallelConfig
from megatron_selfdistill.data.contexts import PromptPair, build_contexts
from megatron_selfdistill.data.packing import PackedBatch
from megatron_selfdistill.data.problems import shard
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.instruments.selftest import sharded_loss
from megatron_selfdistill.instruments.selftest.outcome import Figure, Outcome, largest
from megatron_selfdistill.instruments.selftest.tiny import ALPHABET, MAX_TOKENS, LaunchUnderTest, contexts
from megatron_selfdistill.interop.formats.directory import iteration_name
from megatron_selfdistill.interop.formats.torch_dist import TorchDistReader
from megatron_selfdistill.loss.sharded.vocab_parallel import TokenStats, VocabShard
from megatron_selfdistill.loss.target import Divergence, Target
from megatron_selfdistill.metrics import read_metrics, step_metrics
from megatron_selfdistill.model.architecture import transformer_config
from megatron_selfdistill.model.build import build_chunks, new_chunks, wrap_for_training
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.pipeline.batch import Packing, pack_everywhere
from megatron_selfdistill.rollout.base import Request, Response
from megatron_selfdistill.run_data import RunData
from megatron_selfdistill.sources.configured_source import given_solutions
from megatron_selfdistill.sources.source import StepBatch
from megatron_selfdistill.teacher import Teacher
from megatron_selfdistill.train import train
from megatron_selfdistill.trainer import Trainer

LAYERS_BOUND = 3.0
"""The bound of the relative difference: the kinds round to bf16 at different places.  A different function differs a
hundred times as much."""
ROUNDING = 0.05
"""The relative change that bf16 may make to the logits of the local layers; a larger change voids the comparison."""

STEPS = 4
CLOCKS = ("seconds/", "tokens_per_second/", "memory/")
"""The metrics that differ between any two runs."""
_TE_SWITCH = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"

SYNC_BOUND = 1e-3 if cpu.ON_CPU else 0.25
"""The bound in nats per token: the rounding of float32, or of bf16 through all layers and in logits of some nats."""
STALE = 4 * SYNC_BOUND
"""The nats by which the weights of the previous step must differ at some token; else agreement proves nothing."""

COLLECTIVE = "the first collective (no compiler runs there: the ranks do not reach each other)"
FUNCTIONS = "the first training step (Inductor compiles Megatron's functions: 10 to 40 s, or a collective hangs)"
KERNELS = "the first loss (Triton compiles its kernels: about a CPU second each, or their cache's disk is slow)"

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
        real = pair.step(other, Target(anchor="student"), divergence, "teacher_first")
        real_losses[kind] = real.loss
        for case, batch, target in (
            (f"{kind}, one prompt", same, Target(anchor="student")),
            (f"{kind}, w = 0", other, Target(teacher_weight=0.0, anchor="student")),
        ):
            step = pair.step(batch, target, divergence, "teacher_first")
            losses[case], ratios[case] = abs(step.loss), step.norm() / real.norm()
    tolerance = config.guards.start.identity_tolerance
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
    one, other = (pair.step(batch, Target(anchor="student"), Divergence(), order) for order in PAIR_ORDERS)
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


def why_not() -> str:
    """Return why Transformer Engine's layers cannot be tested here; empty where they can."""
    if cpu.ON_CPU:
        return "Transformer Engine's layers need a GPU; a run uses Megatron's local ones here"
    return "" if repairs.have_transformer_engine() else "no Transformer Engine here; a run uses Megatron's local layers"


def layers_against_local(launch: LaunchUnderTest) -> Outcome:
    """Compare logits and losses in bf16 by both kinds of layers with the local layers in float32.

    Both kinds of layers get the same weights, by the names of the weights in checkpoints, which both kinds share.
    """
    if reason := why_not():
        return Outcome(not_done=reason)
    cuts = launch.cut(tp=launch.largest_tp)
    config = launch.config(cuts, launch.directory, "optimizer.precision=bf16")
    grid = launch.grid(cuts)
    local = _chunks(config, grid, transformer_engine=False)
    engine = _chunks(config, grid, transformer_engine=True)
    exact_config = replace(config, optimizer=replace(config.optimizer, precision="fp32"))
    exact = _chunks(exact_config, grid, transformer_engine=False)
    for target in (engine, exact):
        carry_over(local, target)
    expected = _read(exact, grid)
    size = float(expected.logits.double().norm())
    of_local, of_engine = _read(local, grid).against(expected), _read(engine, grid).against(expected)
    return Outcome(
        (
            Figure(
                f"error of logits / that of local ones, TP {grid.tp_size}", of_engine[0] / of_local[0], LAYERS_BOUND
            ),
            Figure("error of losses / that of local ones", of_engine[1] / of_local[1], LAYERS_BOUND),
            Figure("error of local ones, relative to their logits", of_local[0] / size, ROUNDING),
        ),
    )


@dataclass(frozen=True)
class _Reading:
    """A model's outputs at all response tokens of this replica: this rank's columns of the logits, and the losses."""

    logits: Tensor
    losses: Tensor

    def against(self, expected: _Reading) -> tuple[float, float]:
        """Return the root of the sum of squared differences to ``expected``, for logits and for losses."""
        return tuple(
            float((own.double() - other.double()).norm())
            for own, other in ((self.logits, expected.logits), (self.losses, expected.losses))
        )  # type: ignore[return-value]


def _read(chunks: Sequence[torch.nn.Module], grid: RankGrid) -> _Reading:
    vocab = VocabShard.from_group(unwrapped(chunks[-1]).vocab_size, len(ALPHABET), grid.tp_group)
    logits: list[Tensor] = []

    def next_token(student: Tensor, teacher: Tensor | None, tokens: Tensor, vocab: VocabShard) -> TokenStats:
        logits.append(student[:, : vocab.num_valid].detach().clone())
        return token_losses.next_token(student, teacher, tokens, vocab)

    pairs = contexts(grid, same_prompt=False)
    batch = pack_everywhere(pairs, Packing(MAX_TOKENS, "teacher_first", with_teacher=False), grid)
    output = schedule.run(chunks, None, batch, next_token, grid, vocab, forward_only=True)
    assert output.stats is not None
    return _Reading(torch.cat(logits), output.stats.loss)


def _chunks(config: Config, grid: RankGrid, *, transformer_engine: bool) -> list[torch.nn.Module]:
    architecture = transformer_config(config.model, config.parallel, config.optimizer, config.schedule)
    return build_chunks(config.model, architecture, grid, len(ALPHABET), transformer_engine=transformer_engine)


@torch.no_grad()
def carry_over(source: Sequence[torch.nn.Module], target: Sequence[torch.nn.Module]) -> None:
    """Copy every weight of ``source`` to ``target``, which has the same layout, by its name in checkpoints.

    Raises: RuntimeError that names the weights that one of the models lacks.
    """
    theirs, own = _by_name(source), _by_name(target)
    lacking = sorted({f"{name[0]}" for name in theirs.keys() ^ own.keys()})
    if lacking:
        raise RuntimeError(f"only one kind of layers has {', '.join(lacking[:4])}: their checkpoints do not fit")
    for name, tensor in own.items():
        tensor.copy_(theirs[name])


def _by_name(chunks: Sequence[torch.nn.Module]) -> dict[tuple[str, tuple[int, ...]], Tensor]:
    """Return this rank's shards by (name, offset); the shards share the storage of the parameters."""
    found = {}
    for chunk in chunks:
        state = unwrapped(chunk).sharded_state_dict(prefix="")
        apply_factories(state)
        for stored in nested_values(state):
            if isinstance(stored, ShardedTensor):
                found[stored.key, tuple(stored.global_offset)] = stored.data
    return found


def save_and_resume(launch: LaunchUnderTest) -> Outcome:
    """Compare 4 steps at once with 2 steps, a checkpoint and 2 more steps: metrics, weights and optimizer state."""
    cuts = launch.cut(tp=2 if launch.world_size % 4 == 0 else 1)
    whole, halves = (launch.new_run_dir(name) for name in ("whole", "halves"))
    with deterministic():
        _train(launch, cuts, whole, STEPS)
        _train(launch, cuts, halves, STEPS // 2)
        _train(launch, cuts, halves, STEPS)
    figures = _compared(whole, halves) if launch.rank == 0 else _nothing()
    return Outcome(tuple(figures))


def _train(launch: LaunchUnderTest, cuts: ParallelConfig, run_dir: Path, num_steps: int) -> None:
    config = launch.config(
        cuts,
        run_dir,
        f"num_steps={num_steps}",
        f"checkpoint.save_every={STEPS // 2}",
        "optimizer.lr=1e-3",
        "optimizer.lr_warmup_steps=2",
        f"optimizer.lr_decay.steps={STEPS}",  # also of the half run
        "teacher.weights=ema",
        "teacher.ema_decay=0.9",
    )
    launch.new_group()
    status = train(config)
    if status:
        raise RuntimeError(f"a run of {num_steps} steps in {run_dir.name} ended with status {status}")


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Use kernels that repeat their last bits on GPUs; the kernels of a CPU always do."""
    if cpu.ON_CPU:
        yield
        return
    switches: Any = torch.utils.deterministic
    before, filling = torch.are_deterministic_algorithms_enabled(), switches.fill_uninitialized_memory
    allowed = os.environ.get(_TE_SWITCH)
    torch.use_deterministic_algorithms(True, warn_only=True)
    switches.fill_uninitialized_memory = False
    os.environ[_TE_SWITCH] = "0"  # Transformer Engine reads it when it builds a layer
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    except Exception as error:
        if "attention backend" in str(error):
            raise RuntimeError(f"no attention kernel here repeats its bits, flash-attn's do: {error}") from error
        raise
    finally:
        torch.use_deterministic_algorithms(before)
        switches.fill_uninitialized_memory = filling
        if allowed is None:
            del os.environ[_TE_SWITCH]
        else:
            os.environ[_TE_SWITCH] = allowed


def _compared(whole: Path, halves: Path) -> Iterable[Figure]:
    """Compare two runs on one rank, which reads their files."""
    one, other = (_metrics(run_dir) for run_dir in (whole, halves))
    if len(one) != STEPS or [line.keys() for line in one] != [line.keys() for line in other]:
        raise RuntimeError(f"expected the same metrics of {STEPS} steps twice, got {len(one)} and {len(other)} steps")
    lines = {
        f"{key} of step {step}": _difference(a[key], b[key])
        for step, (a, b) in enumerate(zip(one, other, strict=True), 1)
        for key in a
    }
    tensors, moved = (
        _tensors(run_dir, STEPS, base, step) for run_dir, base, step in ((whole, halves, STEPS), (halves, halves, 2))
    )
    return _figures(largest("", lines, 0), largest("", tensors, 0), max(moved.values()))


def _figures(metrics: Figure, tensors: Figure, moved: float | None) -> tuple[Figure, ...]:
    return (
        Figure(f"metrics of {STEPS} steps, largest difference", metrics.value, 0.0, where=metrics.where),
        Figure("weights and optimizer, largest difference", tensors.value, 0.0, where=tensors.where),
        Figure("what changed after the checkpoint", moved, 1e-5, at_least=True),
    )


def _nothing() -> tuple[Figure, ...]:
    """Return the outcome of the ranks that do not compare."""
    none = Figure("", None, 0.0)
    return _figures(none, none, None)


def _metrics(run_dir: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if not key.startswith(CLOCKS)} for line in read_metrics(run_dir)]


def _difference(one: float, other: float) -> float:
    """Return the difference of two metrics; 0 where both are equal or both are NaN."""
    return 0.0 if one == other or (math.isnan(one) and math.isnan(other)) else abs(one - other)


def _tensors(run_dir: Path, step: int, other_dir: Path, other_step: int) -> dict[str, float]:
    """Return the largest difference of each tensor of two checkpoints, over the full tensors."""
    one, other = (
        TorchDistReader(path / "checkpoints" / iteration_name(number))
        for path, number in ((run_dir, step), (other_dir, other_step))
    )
    if one.shapes != other.shapes:
        raise RuntimeError(f"{one.directory} and {other.directory} hold other tensors or shapes, expected the same")
    found = {}
    for key, shape in one.shapes.items():
        a, b = (source.read(key).double() for source in (one, other))
        found[key] = float((a - b).abs().max()) if math.prod(shape) else 0.0
    return found


@dataclass(frozen=True)
class SyncDifferences:
    """The differences of sampler and trainer over the response tokens on this rank; None if it holds no token."""

    below_best: float | None
    """The largest distance in nats from the trainer's log-prob of a token to that of the trainer's best token."""
    apart: float | None
    """The largest difference between the log-probs of sampler and trainer, in nats."""


def weight_sync(launch: LaunchUnderTest) -> Outcome:
    """Compare the sampler's greedy tokens and log-probs with the trainer's, each time the weights were sent."""
    even, many = launch.world_size % 2 == 0, launch.world_size % 4 == 0
    cuts = launch.cut(tp=2 if even else 1, pp=2 if many else 1)
    config = launch.config(
        cuts,
        launch.new_run_dir("sync"),
        f"rollout.engine={launch.sampler}",
        "rollout.temperature=0",
        "optimizer.lr=0.02",  # Adam moves each weight by that much
        *(["+rollout.engine_args.enforce_eager=true"] if launch.sampler == "vllm" else []),  # compiling takes minutes
    )
    run_data = RunData.load(config)
    trainer = Trainer(config, run_data, launch.grid(cuts))
    try:
        prompts = _prompts(trainer)
        first = _sampled(trainer, prompts, version=0)
        before = _off_the_trainer(trainer, prompts, first)
        batch = StepBatch(responses=first, contexts=build_contexts(prompts, first))
        trainer.update([trainer.forward_backward(batch, trainer.pack(batch))])
        stale = _off_the_trainer(trainer, prompts, first)
        after = _off_the_trainer(trainer, prompts, _sampled(trainer, prompts, version=1))
    finally:
        trainer.close()
    return Outcome(
        (
            Figure(
                "greedy tokens below the trainer's best, nats", _larger(before.below_best, after.below_best), SYNC_BOUND
            ),
            Figure("log-probs off the trainer's, nats", _larger(before.apart, after.apart), SYNC_BOUND),
            Figure("the same after a step without a sync", stale.apart, STALE, at_least=True),
        ),
    )


def _prompts(trainer: Trainer) -> list[PromptPair]:
    """Return the prompts of this replica's share of the first problems of the data."""
    config, grid = trainer.config, trainer.grid
    problems = trainer.run_data.problems.problems[: config.data.global_batch_size]
    prompts = given_solutions(config, trainer.run_data)
    return [prompts.pair(problem) for problem in shard(problems, grid.dp_rank, grid.dp_size)]


def _sampled(trainer: Trainer, prompts: Sequence[PromptPair], version: int) -> list[Response]:
    trainer.sampler.update_weights(version)
    requests = [Request(pair.student_prompt, seed=i) for i, pair in enumerate(prompts)]
    return trainer.sampler.generate(requests, trainer.sampling)


def _off_the_trainer(trainer: Trainer, prompts: Sequence[PromptPair], responses: Sequence[Response]) -> SyncDifferences:
    """Return the comparison of these responses with one forward pass of the trainer's present weights."""
    trainer.sampler.sleep()
    learner, grid = trainer.learner, trainer.grid
    packed = learner.pack(build_contexts(prompts, responses))
    best: list[Tensor] = []

    def greedy(student: Tensor, teacher: Tensor | None, tokens: Tensor, vocab: VocabShard) -> TokenStats:
        largest = student[:, : vocab.num_valid].float().amax(-1) if vocab.num_valid else _lowest(student)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=grid.tp_group)
        best.append(largest - _logit(student, tokens, vocab, grid))
        return token_losses.next_token(student, None, tokens, vocab)  # which writes over the logits

    output = schedule.run(learner.chunks, None, packed, greedy, grid, learner.vocab, forward_only=True)
    if output.stats is None or not len(output.response_ids):
        return SyncDifferences(None, None)
    stated = torch.tensor([x for response in responses for x in response.log_probs], dtype=torch.float64)
    own = output.stats.student_log_prob.double().cpu()
    return SyncDifferences(torch.cat(best).max().item(), (own - stated[output.response_ids.cpu()]).abs().max().item())


def _logit(student: Tensor, tokens: Tensor, vocab: VocabShard, grid: RankGrid) -> Tensor:
    """Return the logit [R] of each token, float32, from the rank that holds it."""
    here = (tokens >= vocab.start) & (tokens < vocab.start + vocab.num_valid)
    local = (tokens - vocab.start).clamp(0, vocab.size - 1)
    logit = torch.where(here, student.float().gather(1, local[:, None]).squeeze(1), _lowest(student))
    dist.all_reduce(logit, op=dist.ReduceOp.MAX, group=grid.tp_group)
    return logit


def _lowest(student: Tensor) -> Tensor:
    return torch.full((student.size(0),), float("-inf"), device=student.device)


def _larger(one: float | None, other: float | None) -> float | None:
    """Return the larger of two differences on the same rank; NaN stays NaN."""
    if one is None or other is None:
        return one if other is None else other
    return one if one != one or one > other else other


def warm_up(launch: LaunchUnderTest, phase: Callable[[str], None]) -> None:
    """Run once, on all ranks, the operations of the checks: a collective, a training step, and the loss of every kind.

    ``phase`` is called with a message when each of the three begins.  Collective.
    """
    phase(COLLECTIVE)
    cuts = launch.cut(tp=launch.largest_tp)
    pair, _ = new_pair(launch, cuts)
    dist.all_reduce(torch.zeros(1, device=pair.grid.device))
    if not cpu.ON_CPU:
        torch.cuda.synchronize()
    phase(FUNCTIONS)
    batch = pair.packed(same_prompt=False)
    for kind, teacher_weight in product(DIVERGENCES, (0.0, Target().teacher_weight)):  # those of the identity law
        pair.step(batch, Target(teacher_weight=teacher_weight, anchor="student"), Divergence(kind), "teacher_first")
    phase(KERNELS)
    vocab = VocabShard.from_group(
        launch.padded_vocab_size(sharded_loss.VOCAB_SIZE, pair.grid), sharded_loss.VOCAB_SIZE, pair.grid.tp_group
    )
    for dtype, target, divergence in product(
        sharded_loss.GRADIENT_BOUNDS, sharded_loss.TARGETS.values(), sharded_loss.DIVERGENCES.values()
    ):
        sharded_loss.errors(dtype, target, divergence, vocab, pair.grid.device)
