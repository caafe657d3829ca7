# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Tiny models that vLLM's kernels on a CPU can run, requests, and `ColocatedSampler` on them."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models
import torch

from megatron_selfdistill.config import RolloutConfig
from megatron_selfdistill.rollout.base import Request, SamplingParams
from megatron_selfdistill.rollout.sampling import sample_seed

TIMEOUT = 600.0
MAX_LENGTH = 320
SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 512}
BIASED: dict[str, Any] = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
EXPERTS: dict[str, Any] = {
    **{"moe_layer_freq": [0, 1], "moe_shared_expert_intermediate_size": 64, "moe_router_dtype": "fp32"},
    **{"moe_router_topk_scaling_factor": 1.7, "moe_router_bias_update_rate": 0.0},
}
MODELS = {
    **{kind: models.model_config(kind, **SIZES, num_query_groups=2) for kind in ("gqa", "tied", "moe")},
    "yarn": models.model_config(
        "yarn",
        **SIZES,
        num_query_groups=2,
        yarn=dataclasses.replace(models.model_config("yarn").yarn, original_max_position_embeddings=128),
    ),
    "moonlight": models.model_config(
        **{"kind": "moe", **SIZES, **BIASED, "num_query_groups": 2},
        **{"layernorm_epsilon": 1e-5, "latent_layernorm_epsilon": 1e-6},
        transformer={
            **{**EXPERTS, "multi_latent_attention": True, "rope_type": "rope", "q_lora_rank": None},
            **{"kv_lora_rank": 512, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128},
        },
    ),
    "glm4_moe": models.model_config(
        **{"kind": "moe", **SIZES, **BIASED, "num_query_groups": 1},
        **{"qk_layernorm": False, "add_qkv_bias": True, "rotary_percent": 0.5, "transformer": EXPERTS},
    ),
}
GREEDY = SamplingParams(max_new_tokens=40, temperature=0.0)
DRAWN = SamplingParams(max_new_tokens=24)


def requests(count: int = 8) -> list[Request]:
    """Return two samples for each prompt; every other prompt exceeds a block of vLLM's prefix cache (128 tokens)."""
    generator = torch.Generator().manual_seed(5)
    lengths = [270 if i % 2 else 5 + i for i in range(count // 2)]
    prompts = [torch.randint(models.VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    return [Request(prompts[i // 2], sample_seed(3, 0, f"p{i // 2}", i % 2)) for i in range(count)]


@contextmanager
def sampler(
    model, chunks, grid, vocab_size=models.VOCAB_SIZE, adapter=None, dtype="float32", family=None, **options: Any
) -> Iterator[Any]:
    """Yield a `ColocatedSampler` of the model; ``options`` are fields of `RolloutConfig`.

    ``family``: the family as which vLLM knows the model; null takes the first family that can describe it.
    """
    from megatron_selfdistill.engines.vllm.colocated import ColocatedSampler
    from megatron_selfdistill.engines.vllm.engine_weights import EngineWeights
    from megatron_selfdistill.interop.hf.mapping import family_of_model

    family = family or family_of_model(model)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(family.hf_config(model, dtype)))
        rollout = RolloutConfig(engine="vllm", **{"kv_cache_gb": 0.1, **options})
        weights = EngineWeights(chunks, grid, family.rules(model), adapter, bucket_bytes=int(rollout.bucket_mb * 2**20))
        built = ColocatedSampler(weights, grid, Path(directory), rollout, vocab_size=vocab_size, max_length=MAX_LENGTH)
        try:
            yield built
        finally:
            built.close()


def streamed(built: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the tensor of every weight that a `ColocatedSampler` sends at an update."""
    for bucket in built._weights.stream():
        yield from bucket
