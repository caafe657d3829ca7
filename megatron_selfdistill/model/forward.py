# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Run a microbatch through a model chunk without its output layer, and compute logits from its states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, layers
from megatron.core.utils import get_attr_wrapped_model

from megatron_selfdistill.data.context_parallel import context_parallel_positions
from megatron_selfdistill.data.packed_batch import Microbatch
from megatron_selfdistill.distributed.host_to_device import to_device
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.model.local_attention import PackedSequences


@dataclass(frozen=True)
class ModelInputs:
    """The inputs of the model for one microbatch: the share of this context-parallel rank, ``[1, s / cp]`` each."""

    tokens: Tensor
    position_ids: Tensor
    padding_mask: Tensor
    packed_seq_params: PackedSequences

    @classmethod
    def on_host(cls, microbatch: Microbatch, grid: RankGrid, *, local_attention: bool) -> ModelInputs:
        """Return the inputs of ``microbatch`` as host tensors, for `to_device`.

        ``local_attention``: the result of `uses_local_attention`.
        """
        tensors = microbatch.tokens, microbatch.position_ids, microbatch.padding_mask
        if grid.cp_size > 1:
            held = context_parallel_positions(microbatch.cu_seqlens, grid.cp_size, grid.cp_rank)
            tensors = tensors[0][held], tensors[1][held], tensors[2][held]
        tokens, position_ids, padding_mask = tensors
        return cls(
            tokens=tokens.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            padding_mask=padding_mask.unsqueeze(0),
            packed_seq_params=PackedSequences.of(
                microbatch, position_ids, with_segment_batches=local_attention and grid.cp_size == 1
            ),
        )


def inputs_of(microbatch: Microbatch, grid: RankGrid) -> ModelInputs:
    """Return the inputs of one microbatch on the device, for a forward pass outside of the training schedule."""
    return to_device(ModelInputs.on_host(microbatch, grid, local_attention=True), grid.device)


def unwrapped(chunk: torch.nn.Module) -> GPTModel:
    """Return the ``GPTModel`` inside DDP and ``Float16Module``."""
    return get_attr_wrapped_model(chunk, "decoder", return_model_obj=True)


def uses_local_attention(chunks: Sequence[torch.nn.Module]) -> bool:
    """Return whether any layer computes packed sequences in batches of segments (`model.layers.SegmentBatches`)."""
    modules = (module for chunk in chunks for module in chunk.modules())
    return any(getattr(module, "reads_segment_batches", False) for module in modules)


def hidden_states(chunk: torch.nn.Module, inputs: ModelInputs, grid: RankGrid) -> Tensor:
    """Return the chunk's hidden states ``[s / cp (/ tp), 1, h]`` before the output layer, in the parameters' dtype."""
    model = unwrapped(chunk)
    extra: dict[str, Any] = {}
    if model.config.num_moe_experts is not None:
        mask = inputs.padding_mask
        if grid.sequence_parallel and not model.pre_process:
            # Megatron cuts the mask in the first stage only; later stages receive cut activations and the full mask.
            mask = mask.chunk(grid.tp_size, dim=1)[grid.tp_rank]
        extra["padding_mask"] = mask
    if model.config.bf16:
        extra["fp32_output"] = False  # Float16Module would upcast the bf16 input of the output layer
    with _without_projection(model):
        hidden: Tensor = chunk(
            input_ids=inputs.tokens,
            position_ids=inputs.position_ids,
            attention_mask=None,
            packed_seq_params=inputs.packed_seq_params.with_positions(),
            **extra,
        )
    return hidden


@contextlib.contextmanager
def _without_projection(model: GPTModel) -> Iterator[None]:
    """Make ``GPTModel.forward`` return its final hidden states, after the final norm, while the context is open.

    The model returns them because it takes another stage to follow.  So every ``GPTModel`` works without a subclass.
    """
    post_process = model.post_process
    model.post_process = False
    try:
        yield
    finally:
        model.post_process = post_process


def states_at(hidden: Tensor, positions: Tensor, grid: RankGrid) -> Tensor:
    """Return ``hidden[positions]`` of the whole sequence, ``[R, 1, h]``, equal on all tensor-parallel ranks.

    ``positions [R]``: int64 on the device of ``hidden``.
    Collectives: under sequence parallelism an all-gather over TP, backward none.
    """
    if grid.sequence_parallel:
        # The output layer itself all-reduces the gradient of its input, so this gather must cut it without a sum.
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=grid.tp_group)
    return hidden.index_select(0, positions)


def project(model: GPTModel, hidden: Tensor) -> Tensor:
    """Return the vocabulary-parallel logits ``[R, v / tp]`` of the hidden states ``hidden [R, 1, h]``.

    The function calls the output layer as a module, so that DDP's parameter-gather hook runs, but without its
    sequence-parallel gather.
    """
    layer = model.output_layer
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    sequence_parallel = layer.sequence_parallel
    layer.sequence_parallel = False
    try:
        logits: Tensor = layer(hidden, weight=weight)[0]
    finally:
        layer.sequence_parallel = sequence_parallel
    return logits.squeeze(1)


@dataclass(frozen=True)
class Fusion:
    """The parameters of loss/sharded/fused_linear.py, which fuses the output layer with the loss."""

    mode: str
    """One of `choices.FUSED_MODES`."""
    chunk_tokens: int
    """The number of response tokens whose logits exist at a time."""


@dataclass(frozen=True)
class ResponsePositions:
    """The positions of the hidden states that predict R response tokens, in a context-parallel rank's microbatch."""

    in_sequence: Tensor
    """The positions in the sequence, which sequence parallelism cuts over the tensor-parallel ranks, [R] int64."""
    own: Tensor | None = None
    """The positions of this rank's states within its own cut under sequence parallelism, [n] int64.

    A rank has about R / tp states, and n is the maximum over the ranks.  A rank with fewer states pads with position 0.
    """
    gathered: Tensor | None = None
    """The place of each token's state in the concatenation of the n states of all ranks, [R] int64; used with
    ``own``."""

    @classmethod
    def on_host(cls, in_sequence: Tensor, num_positions: int, grid: RankGrid) -> ResponsePositions:
        """Return the positions ``in_sequence`` of ``num_positions`` tokens, with all tensors on the host."""
        if not grid.sequence_parallel or grid.tp_size == 1:
            return cls(in_sequence)
        cut = num_positions // grid.tp_size
        owner, position = in_sequence // cut, in_sequence % cut
        counts = torch.bincount(owner, minlength=grid.tp_size)
        by_owner = torch.argsort(owner, stable=True)
        place = torch.empty_like(in_sequence)
        place[by_owner] = torch.arange(len(in_sequence)) - (counts.cumsum(0) - counts)[owner[by_owner]]
        longest = int(counts.max())
        own = torch.zeros(longest, dtype=torch.int64)
        own[: counts[grid.tp_rank]] = position[by_owner[owner[by_owner] == grid.tp_rank]]
        return cls(in_sequence, own, owner * longest + place)


def nonlinear(model: GPTModel) -> str | None:
    """Return why the logits of a last stage may be no linear function of its hidden states; None if they are one."""
    layer = model.output_layer
    if type(layer).forward is not layers.ColumnParallelLinear.forward or "forward" in vars(layer):
        return f"its {type(layer).__name__} does more than multiply by its weight"
    return "it has hooks that expect its logits" if layer._forward_hooks else None
