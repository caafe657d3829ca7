# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The forward passes of the models that decode, and their order where all ranks must run the same model at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.inference.contexts import StaticInferenceContext

from megatron_selfdistill.distributed.collectives import max_over_ranks
from megatron_selfdistill.distributed.watchdog import beat
from megatron_selfdistill.rollout.megatron.decoding_model import DecodingModel

# Prompt tokens of one forward pass: activations of a long prefill would outgrow the cache itself.
_PREFILL_TOKENS = 2**15


class ForwardPasses:
    """The forward passes of one or more models on this rank.

    Where expert all-to-alls join ranks that hold different requests, an expert computes the tokens of other ranks with
    the weights of the model that its own rank is running.  Therefore all ranks run the same model at the same time.  A
    rank that wants another model, or that has finished, feeds one token whose output is unused.
    """

    def __init__(self, models: Sequence[DecodingModel]) -> None:
        """``models``: all models that may run, of one architecture, in the same order on all ranks."""
        self._models = list(models)
        self._lock_step = models[0].needs_other_ranks

    def run(self, model: DecodingModel, context: StaticInferenceContext, tokens: Tensor) -> Tensor | None:
        """Return `DecodingModel.forward` of ``model``, once it is this model's turn."""
        beat()
        if self._lock_step:
            wanted = self._models.index(model) + 1
            while (turn := self._turn(wanted)) != wanted:
                self._models[turn - 1].forward_unused()
        return model.forward(context, tokens)

    def prefill(self, model: DecodingModel, context: StaticInferenceContext, tokens: Tensor) -> Tensor | None:
        """Fill the cache with ``tokens [b, s]`` from its row ``batch_size_offset`` on, some rows at a time.

        Afterwards ``batch_size_offset`` is the row behind them.  Return the last logits ``[b, V]``; None on stages
        before the last.
        """
        parts = []
        for rows in tokens.split(max(1, _PREFILL_TOKENS // tokens.size(1))):
            parts.append(self.run(model, context, rows))
            context.batch_size_offset += len(rows)
        return None if parts[0] is None else torch.cat(parts)  # type: ignore[arg-type]

    def finish(self) -> None:
        """Take part in the passes of the other ranks until every rank has called this method."""
        while self._lock_step and (turn := self._turn(0)):
            self._models[turn - 1].forward_unused()

    @staticmethod
    def _turn(wanted: int) -> int:
        """Return 1 + the index of the model that all ranks run now; 0 where no rank wants a model.

        ``wanted``: 1 + the index of the model that this rank wants; 0 for none.  Of all, the largest has its turn.
        """
        [turn] = max_over_ranks([wanted])
        return turn
