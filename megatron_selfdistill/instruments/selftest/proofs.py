# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the self-test proves on the ranks of a launch: they meet, they share a loss, and they share a training step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import count, product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from megatron_selfdistill.compat import cpu, repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron_selfdistill.pipeline import schedule, token_losses  # isort: skip  (must come before megatron.core)
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_selfdistill import config as configuration
from megatron_selfdistill.choices import DIVERGENCES
from megatron_selfdistill.config import Config, ParallelConfig
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.distributed import ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.distributed.signs_of_life import entered
from megatron_selfdistill.loss.definition import divergence, divergence_gradient, mixed_target
from megatron_selfdistill.loss.functional import self_distillation_loss
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.loss.target import Divergence, Target
from megatron_selfdistill.metrics.step import step_metrics
from megatron_selfdistill.model.build import new_chunks, wrap_for_training
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.model.teacher_weights import Teacher
from megatron_selfdistill.pipeline.batch import Packing, pack_everywhere

VOCAB_SIZE = 1009  # a prime: the last shards are partly padding
LOSS_BOUND = 1e-5
"""The allowed error of a sharded loss, relative to 1 + the loss: the rounding of float32 sums."""
GRADIENT_BOUNDS = {torch.float32: 5e-5, torch.bfloat16: 8e-3}
"""The allowed error of its gradient, relative to the largest of its token: two roundings of bf16 are 2^-7."""
STEP_BOUNDS = {"loss": 1e-5, "gradients": 1e-3} if cpu.ON_CPU else {"loss": 0.05, "gradients": 0.4}
"""The allowed relative differences of two layouts: in float32, or in bf16 on GPUs, whose attention kernels need it.  A
sum that is missing or counted twice changes the gradient by half of it or more."""


@dataclass(frozen=True)
class WorstError:
    """The worst error of a proof, over its cases or over the ranks."""

    error: float
    """The error as a share of the allowed error; NaN counts as the worst."""
    case: str
    """The case with this error."""

    @property
    def holds(self) -> bool:
        """Whether the error is an allowed one."""
        return self.error <= 1

    @classmethod
    def worst(cls, reports: Sequence[WorstError]) -> WorstError:
        """Return the report with the largest error."""
        return max(reports, key=lambda report: report.error if report.error == report.error else float("inf"))


class Launch:
    """The ranks of one launch, which open one process group after the other."""

    def __init__(self, rank: int, world_size: int, store: Any, limit_s: float) -> None:
        """``store``: that of the launch; ``limit_s``: the seconds after which the watchdog ends a hang."""
        self.rank, self.world_size, self._store, self._numbers = rank, world_size, store, count()
        self._timeout = timedelta(seconds=limit_s + 120)  # NCCL ends the process then, after the watchdog

    def grid(self, layout: ParallelConfig, *, alone: bool = False) -> RankGrid:
        """Open a new process group over all ranks, or of this rank ``alone``, and the groups of ``layout`` in it."""
        entered("opening the groups of the layout")
        prefix = f"group {next(self._numbers)}" + (f" of rank {self.rank}" if alone else "")
        dist.init_process_group(
            "gloo" if cpu.ON_CPU else "nccl",
            store=dist.PrefixStore(prefix, self._store),
            rank=0 if alone else self.rank,
            world_size=1 if alone else self.world_size,
            timeout=self._timeout,
        )
        return ranks.initialize(layout, seed=1)


def tiny_model(overrides: Sequence[str], world_size: int) -> Config:
    """Return the configuration of a tiny model in the layout that ``overrides``, keys of ``parallel``, describe.

    Without keys the layout is TP 2 x PP 2, as far as the number of ranks allows.  Raises: `ConfigError`.
    """
    default = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"] * (world_size % 2 == 0)
    default += ["parallel.pipeline_model_parallel_size=2"] * (world_size % 4 == 0)
    layout = list(overrides) or default
    p = configuration.load(layout).parallel
    num_layers = 2 * p.pipeline_model_parallel_size * (p.virtual_pipeline_model_parallel_size or 1)
    heads, ep = 4 * p.tensor_model_parallel_size, p.expert_model_parallel_size
    model = f"vocab_size={VOCAB_SIZE} num_layers={num_layers} num_attention_heads={heads} kv_channels=64".split()
    model += [f"num_moe_experts={2 * ep}", "moe_ffn_hidden_size=64"] if ep > 1 else []
    # Without the distributed optimizer, each rank has the complete sums of its gradients.
    optimizer = [f"precision={'fp32' if cpu.ON_CPU else 'bf16'}", "use_distributed_optimizer=false"]
    return configuration.load([*(f"model.{key}" for key in model), *(f"optimizer.{key}" for key in optimizer), *layout])


def all_ranks_meet(launch: Launch, config: Config) -> WorstError:
    """Let every rank add its number in the world and in each group of the layout."""
    grid = launch.grid(config.parallel)
    groups = {"world": dist.group.WORLD, "tensor": grid.tp_group, "pipeline": grid.pp_group, "data": grid.dp_cp_group}
    wrong = []
    for name, group in groups.items():
        entered(f"the sum over the group '{name}'")
        found = torch.tensor([float(grid.rank)], device=grid.device)
        dist.all_reduce(found, group=group)
        wrong += [f"group '{name}'"] * (found.item() != sum(dist.get_process_group_ranks(group)))
    return WorstError(2.0, wrong[0]) if wrong else WorstError(0.0, f"{len(groups)} groups")


def sharded_loss(launch: Launch, config: Config) -> WorstError:
    """Compare each divergence on vocabulary shards, and its gradient, with `loss.target` in float64 on full rows."""
    grid = launch.grid(config.parallel)
    rules: dict[str, dict[str, Any]] = {
        "k <= 1 + w": {},
        "no k_max": {"k_max": None},
        "alone": {"rule": "teacher_alone"},
    }
    reports = []
    for dtype, kind, rule in product(GRADIENT_BOUNDS, DIVERGENCES, rules):
        case = f"{kind}, {rule}, {dtype}, TP {grid.tp_size}"
        entered(f"the loss {case} (its kernels are compiled the first time)")
        loss, gradient = _errors_of_loss(dtype, Target(anchor="student", **rules[rule]), Divergence(kind), grid)
        reports.append(WorstError(loss / LOSS_BOUND, f"loss, {case}"))
        reports.append(WorstError(gradient / GRADIENT_BOUNDS[dtype], f"gradient, {case}"))
    return WorstError.worst(reports)


def _errors_of_loss(dtype: torch.dtype, target: Target, kind: Divergence, grid: RankGrid) -> tuple[float, float]:
    """Return the largest error of a token's loss, and of an element of this rank's columns of the gradient."""
    generator = torch.Generator().manual_seed(11)
    student = torch.linspace(0.3, 4.0, 48)[:, None] * torch.randn(48, VOCAB_SIZE, generator=generator)
    teacher = student + torch.randn(48, VOCAB_SIZE, generator=generator)
    teacher[::3] = 3 * torch.randn(teacher[::3].shape, generator=generator)
    student, teacher = student.to(grid.device, dtype), teacher.to(grid.device, dtype)
    log_p, log_q = student.double().log_softmax(-1), mixed_target(student.double(), teacher.double(), target).log_q
    wanted, expected = divergence(log_p, log_q, kind), divergence_gradient(log_p, log_q, kind)
    size = -(-VOCAB_SIZE // grid.tp_size)
    padding = (0, size * grid.tp_size - VOCAB_SIZE)  # columns with values that must not matter
    own, other, gradient = (
        pad(rows, padding, value=value).split(size, dim=1)[grid.tp_rank].contiguous()
        for rows, value in ((student, 30.0), (teacher, 30.0), (expected, 0.0))
    )
    own.requires_grad_()
    options: dict[str, Any] = {"target": target, "divergence": kind, "reduction": "none", "vocab_size": VOCAB_SIZE}
    loss = self_distillation_loss(own, other, process_group=grid.tp_group, **options)
    (own_gradient,) = torch.autograd.grad(loss.sum(), own)
    off = (own_gradient - gradient).abs() / expected.abs().amax(-1, keepdim=True).clamp(min=1e-3)
    return float(((loss - wanted).abs() / (1 + wanted)).max()), float(off.max())


def training_step(launch: Launch, config: Config) -> WorstError:
    """Compare the loss and every gradient of a step in the layout with those of the same step on one rank."""
    rows = config.model.make_vocab_size_divisible_by * config.parallel.tensor_model_parallel_size
    model = replace(config.model, make_vocab_size_divisible_by=rows)  # as much padding as in the layout
    one, grid = replace(config, model=model, parallel=ParallelConfig()), launch.grid(ParallelConfig(), alone=True)
    num_contexts, weights = 3 * launch.world_size + 1, dict[str, Tensor]()
    entered("the step of one rank (its functions are compiled the first time)")
    alone, expected_loss = _step(one, grid, num_contexts, weights)
    expected = _whole(alone)
    ranks.shutdown()
    grid = launch.grid(config.parallel)
    entered("the step in the layout")
    student, loss = _step(config, grid, num_contexts, weights)
    # A gradient of less than a hundredth of all together is mostly rounding.
    total = float(sum(gradient.double().pow(2).sum() for gradient in expected.values()) ** 0.5)
    reports = [WorstError(abs(loss - expected_loss) / expected_loss / STEP_BOUNDS["loss"], "loss")]
    for shard, place in _shards(student):
        whole = expected[shard.key].double()
        off = (shard.data.double() - whole[place]).norm() / (whole.norm() + 0.01 * total)
        reports.append(WorstError(float(off) / STEP_BOUNDS["gradients"], f"gradient of {shard.key}"))
    return WorstError.worst(reports)


def _step(
    config: Config, grid: RankGrid, num_contexts: int, weights: dict[str, Tensor]
) -> tuple[Sequence[torch.nn.Module], float]:
    """Return a student, whose weights are replaced by their gradients, and its loss, with a teacher that sees a hint.

    Both start with ``weights``; empty ``weights`` get the full tensors of the initial weights.
    """
    student = wrap_for_training(new_chunks(config, grid, VOCAB_SIZE), config.optimizer)
    if not weights:
        weights |= _whole(student)
    with torch.no_grad():
        for shard, place in _shards(student):
            shard.data.copy_(weights[shard.key][place])
    teacher = Teacher("frozen", student, lambda: new_chunks(config, grid, VOCAB_SIZE))
    vocab = VocabShard.from_group(unwrapped(student[-1]).vocab_size, VOCAB_SIZE, grid.tp_group)
    for chunk in student:
        chunk.zero_grad_buffer()
    batch = pack_everywhere(_contexts(num_contexts, grid), Packing(64, "teacher_first", with_teacher=True), grid)
    token_loss = token_losses.self_distillation(Target(anchor="student"), Divergence())
    output = schedule.run(student, schedule.ScheduledTeacher(teacher.chunks), batch, token_loss, grid, vocab)
    for parameter in (parameter for chunk in student for parameter in chunk.parameters()):
        parameter.data = parameter.main_grad
    return student, step_metrics(output, None, grid)["loss/mean"]


def _contexts(number: int, grid: RankGrid) -> list[ContextPair]:
    rows = torch.randint(VOCAB_SIZE, (number, 40), generator=torch.Generator().manual_seed(7)).tolist()
    pairs = [ContextPair(f"p{i}", row[8:16], row[:16], row[16 : 20 + i % 20], False) for i, row in enumerate(rows)]
    return pairs[grid.dp_rank :: grid.dp_size]


@torch.no_grad()
def _shards(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[ShardedTensor, tuple[int | slice, ...]]]:
    """Yield this rank's shards, which share the storage of the parameters, with their places in the full tensors."""
    for chunk in chunks:
        state = unwrapped(chunk).sharded_state_dict(prefix="")
        apply_factories(state)
        for shard in nested_values(state):
            if isinstance(shard, ShardedTensor):
                stacked = shard.prepend_axis_num
                slices = zip(shard.global_offset[stacked:], shard.local_shape, strict=True)
                place = (*shard.global_offset[:stacked], *(slice(start, start + size) for start, size in slices))
                yield shard, place


@torch.no_grad()
def _whole(chunks: Sequence[torch.nn.Module]) -> dict[str, Tensor]:
    """Return copies of the full tensors of a model on one rank, by their names in checkpoints."""
    found: dict[str, Tensor] = {}
    for shard, place in _shards(chunks):
        whole = found.setdefault(shard.key, shard.data.new_zeros(shard.global_shape))
        whole[place] = shard.data
    return found
