# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The logits of a model in any layout, through the forward pass of training and the pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import hf_models
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.data.context_parallel import context_parallel_positions
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.model import forward
from megatron_selfdistill.model.forward import unwrapped


@torch.no_grad()
def logits_through_the_pipeline(
    chunks: Sequence[torch.nn.Module],
    grid: RankGrid,
    sequences: Sequence[Sequence[int]],
    vocab_size: int = hf_models.VOCAB_SIZE,
) -> Tensor | None:
    """Return the logits [sum of lengths, ``vocab_size``] in float32 on the last stage; None on other stages.

    Collective: the stages receive and send, and the tensor-parallel ranks gather their shards of the vocabulary.
    """
    config = unwrapped(chunks[0]).config
    microbatch = hf_models.packed(sequences)
    inputs = forward.inputs_of(microbatch, grid)
    length = inputs.tokens.numel()
    length //= grid.tp_size if grid.sequence_parallel else 1
    neighbour = [dist.get_global_rank(grid.pp_group, (grid.pp_rank + step) % grid.pp_size) for step in (-1, 1)]
    for chunk in chunks:
        model = unwrapped(chunk)
        if not model.pre_process:
            received = torch.empty(length, 1, config.hidden_size, dtype=config.params_dtype)
            dist.recv(received, src=neighbour[0], group=grid.pp_group)
            model.set_input_tensor(received)
        hidden = forward.hidden_states(chunk, inputs, grid)
        if not model.post_process:
            dist.send(hidden.contiguous(), dst=neighbour[1], group=grid.pp_group)
    if not grid.is_last_stage:
        return None
    held = microbatch.response_positions if grid.cp_size == 1 else torch.arange(inputs.tokens.numel())
    shard = forward.project(model, forward.states_at(hidden, held, grid)).float()
    shards = [torch.empty_like(shard) for _ in range(grid.tp_size)]
    dist.all_gather(shards, shard, group=grid.tp_group)
    logits = torch.cat(shards, dim=-1)[:, :vocab_size]
    return logits if grid.cp_size == 1 else in_order(logits, sequences, grid)


def in_order(logits: Tensor, sequences: Sequence[Sequence[int]], grid: RankGrid) -> Tensor:
    """Return the logits of all tokens, in the order of the sequences, from those of each context-parallel rank."""
    parts = [torch.empty_like(logits) for _ in range(grid.cp_size)]
    dist.all_gather(parts, logits.contiguous(), group=grid.cp_group)
    cu_seqlens = hf_models.packed(sequences).cu_seqlens
    found = logits.new_full((sum(map(len, sequences)), logits.size(1)), float("nan"))
    for rank, part in enumerate(parts):
        found[context_parallel_positions(cu_seqlens, grid.cp_size, rank)] = part
    return found
