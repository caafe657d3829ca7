# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Transformer Engine's layers against Megatron's local layers: equal weights must give equal functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_selfdistill.compat import cpu, repairs  # isort: skip  (must come before megatron.core)
from megatron_selfdistill.pipeline import schedule, token_losses  # isort: skip  (must come before megatron.core)
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_selfdistill.config import Config
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.loss.sharded.vocab_parallel import TokenStats, VocabShard
from megatron_selfdistill.model.architecture import transformer_config
from megatron_selfdistill.model.build import build_chunks, unwrapped
from megatron_selfdistill.pipeline.batch import Packing, pack_everywhere
from megatron_selfdistill.selftest.outcome import Figure, Outcome
from megatron_selfdistill.selftest.tiny import ALPHABET, MAX_TOKENS, LaunchUnderTest, contexts

BOUND = 3.0
"""The bound of the relative difference: the kinds round to bf16 at different places.  A different function differs a
hundred times as much."""
ROUNDING = 0.05
"""The relative change that bf16 may make to the logits of the local layers; a larger change voids the comparison."""


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
            Figure(f"error of logits / that of local ones, TP {grid.tp_size}", of_engine[0] / of_local[0], BOUND),
            Figure("error of losses / that of local ones", of_engine[1] / of_local[1], BOUND),
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
        for shard in nested_values(state):
            if isinstance(shard, ShardedTensor):
                found[shard.key, tuple(shard.global_offset)] = shard.data
    return found
