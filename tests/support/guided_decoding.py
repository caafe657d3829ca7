# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sampler and the settings of guided responses to the requests of decoding.py."""

from collections.abc import Sequence

import torch
from decoding import MAX_LENGTH, PAIR_TOKENS
from models import VOCAB_SIZE

from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.guidance.guided_sampler import GuidedSampler
from megatron_selfdistill.guidance.guided_tokens import GuidedParams

GREEDY_PAIRS = GuidedParams(PAIR_TOKENS, temperature=0)
SAMPLED_PAIRS = GuidedParams(PAIR_TOKENS)


def guided_sampler_of(
    chunks: Sequence[torch.nn.Module], grid: RankGrid, kv_cache_gb: float | None = None, cuda_graphs: bool = False
) -> GuidedSampler:
    """Return the sampler of guided responses of a model of models.py."""
    return GuidedSampler(chunks, grid, VOCAB_SIZE, MAX_LENGTH, kv_cache_gb, cuda_graphs=cuda_graphs)
