# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The contexts of guided responses that one model reads, token by token, with a KV cache of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_selfdistill.rollout.base import Request
from megatron_selfdistill.rollout.guided import prompt_of
from megatron_selfdistill.rollout.megatron.decoding_model import DecodingModel
from megatron_selfdistill.rollout.megatron.forward_passes import ForwardPasses
from megatron_selfdistill.rollout.megatron.generated import PromptRows
from megatron_selfdistill.rollout.megatron.kv_cache import RaggedCache


class GuidedRows:
    """The contexts of n guided requests in the roles that one model has: for each role n rows of one `RaggedCache`."""

    def __init__(
        self,
        model: DecodingModel,
        roles: Sequence[str],
        requests: Sequence[Request],
        max_new_tokens: int,
        passes: ForwardPasses,
        device: torch.device,
    ) -> None:
        """Read the prompts of all ``roles``, each with forward passes of its own."""
        self._model, self._roles, self._passes = model, tuple(roles), passes
        prompts = PromptRows.of([[prompt_of(r, role) for r in requests] for role in roles], device)
        num_rows, longest = prompts.tokens.shape
        self._cache = RaggedCache(num_rows, longest + max_new_tokens - 1, prompts.lengths)  # not the last token
        for tokens, length in zip(prompts.tokens.split(len(requests)), prompts.longest_by_role, strict=True):
            passes.prefill(model, self._cache, tokens[:, :length])
        self._cache.batch_size_offset = 0
        self._cache.start_decoding(prompts.lengths, longest)
        self._last_of_prompts = prompts.last_tokens

    def next_logits(self, tokens: Tensor | None) -> dict[str, Tensor]:
        """Return the logits ``[n, V]`` of the next token by role; empty on stages before the last.

        ``tokens [n]``: the token that all contexts of a request read; None where these are the last of the prompts.
        """
        rows = self._last_of_prompts if tokens is None else tokens.repeat(len(self._roles))
        logits = self._passes.run(self._model, self._cache, rows[:, None])
        self._cache.advance()
        return {} if logits is None else dict(zip(self._roles, logits.chunk(len(self._roles)), strict=True))

    def keep(self, kept: Tensor, num_requests: int) -> None:
        """Drop all requests but ``kept`` of the ``num_requests`` that the cache holds."""
        self._cache.keep(torch.cat([kept + role * num_requests for role in range(len(self._roles))]))
