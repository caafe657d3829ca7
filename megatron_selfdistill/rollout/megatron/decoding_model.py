# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One model that decodes: the chunks of this rank, whose forward pass gives the logits of the next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.inference.contexts import StaticInferenceContext

from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.model.adapters import WithoutAdapters
from megatron_selfdistill.model.build import unwrapped
from megatron_selfdistill.rollout.megatron.decoding import decoding, decoding_overrides, refuse_undecodable, takes_masks
from megatron_selfdistill.rollout.megatron.kv_cache import (
    RaggedAttention,
    RaggedCache,
    cache_bytes_per_token,
    state_bytes,
)


class DecodingModel:
    """The ``GPTModel`` chunks of this rank as one model that decodes.

    Tensor-parallel ranks share every forward pass, and pipeline stages pass hidden states to the next stage (under VPP
    several times around).
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], grid: RankGrid, vocab_size: int) -> None:
        """Prepare the ``chunks`` for decoding, as built or as wrapped for training.

        ``vocab_size``: number of valid columns; the padded columns behind them are cut off from the logits.
        Raises: `ConfigError` for a model that cannot be decoded.
        """
        self._chunks = list(chunks)
        self.models = [unwrapped(chunk) for chunk in chunks]
        refuse_undecodable(self.models, grid)
        self._grid = grid
        self._vocab_size = vocab_size
        self._overrides = decoding_overrides(self.models, grid)
        self._ragged_attention = RaggedAttention(self.models)
        config = self.models[0].config
        self._hidden_size = config.hidden_size
        self._hidden_dtype = config.pipeline_dtype or config.params_dtype
        self.bytes_per_token = cache_bytes_per_token(self.models, config.params_dtype)
        """Bytes of KV cache on this rank per sequence and position."""
        self.state_bytes = state_bytes(self.models)
        """Bytes of the states of recurrent layers on this rank per sequence."""

    @property
    def needs_other_ranks(self) -> bool:
        """Whether a forward pass needs a pass of the same model on ranks that hold other requests.

        Expert groups reach beyond the ranks that share this rank's requests, along DP, CP or both.  An expert group
        need not cover a replica, yet the replica's pipeline ties its groups together; the world covers every case.
        """
        config = self.models[0].config
        return config.num_moe_experts is not None and (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size not in (None, config.tensor_model_parallel_size)
        )

    @property
    def takes_masks(self) -> bool:
        """Whether attention can hide columns, as rows of unequal length need it."""
        return takes_masks(self.models)

    def decoding(self) -> AbstractContextManager[None]:
        """Keep the model in the state in which it decodes (`decoding.decoding`)."""
        return decoding(self._chunks, self.models, self._overrides)

    def forward(self, context: StaticInferenceContext, tokens: Tensor) -> Tensor | None:
        """Run a forward pass of ``tokens [b, s]`` after the cached tokens; return the last logits ``[b, V]``.

        Stages before the last return None.
        """
        if isinstance(context, RaggedCache) and context.decodes:
            with self._ragged_attention.reading(context):
                return self._forward(context, tokens, context.columns[:, None], context.hidden)
        start = context.sequence_len_offset
        position_ids = torch.arange(start, start + tokens.size(1), device=tokens.device).expand_as(tokens)
        return self._forward(context, tokens, position_ids, None)

    def forward_unused(self) -> None:
        """Run a forward pass of one token whose output nobody uses."""
        self.forward(StaticInferenceContext(1, 1), torch.zeros(1, 1, dtype=torch.int64, device=self._grid.device))

    def _forward(
        self, context: StaticInferenceContext, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor | None
    ) -> Tensor | None:
        """Return `forward`'s logits; ``position_ids [b, s]``; ``attention_mask``: True is hidden."""
        output: Tensor | None = None
        for chunk, model in zip(self._chunks, self.models, strict=True):
            if not model.pre_process:
                shape = (tokens.size(1), tokens.size(0), self._hidden_size)
                hidden_states = torch.empty(shape, dtype=self._hidden_dtype, device=tokens.device)
                dist.recv(hidden_states, src=self._stage_rank(-1), group=self._grid.pp_group)
                model.set_input_tensor(hidden_states)
            with chunk.switched_off() if isinstance(chunk, WithoutAdapters) else nullcontext():
                output = model(
                    tokens, position_ids, attention_mask, inference_context=context, runtime_gather_output=True
                )
            if not model.post_process:
                output = output.to(self._hidden_dtype).contiguous()
                dist.send(output, dst=self._stage_rank(1), group=self._grid.pp_group)
                output = None
        return None if output is None else output[:, -1, : self._vocab_size]

    def _stage_rank(self, step: int) -> int:
        """Return the global rank of the stage ``step`` stages ahead, in a ring: interleaved chunks go round."""
        return dist.get_global_rank(self._grid.pp_group, (self._grid.pp_rank + step) % self._grid.pp_size)
