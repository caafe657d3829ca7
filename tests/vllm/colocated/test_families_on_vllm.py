# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""vLLM knows every family here: with the weights of the live model it generates what transformers would."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import hf_models
import models
import pytest
import torch
from colocated import DRAWN, GREEDY, TIMEOUT, requests, sampler
from responses import tokens

from megatron_selfdistill.config import OptimizerConfig, ParallelConfig
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.rollout.base import Response

SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 32, "max_position_embeddings": 512}
"""vLLM's attention on a CPU takes heads of few widths."""
FAMILIES: dict[str, dict[str, Any]] = {
    "seed_oss": SIZES,
    "smollm3": SIZES,
    "phi3": SIZES,
    "qwen2_moe": {**SIZES, "hidden_size": 128, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "ministral3": {
        **SIZES,
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512},
            **{"beta_fast": 8.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        },
    },
    "olmoe": {"hidden_size": 128, "intermediate_size": 32, "max_position_embeddings": 512},
    "mistral_window": SIZES,
    "gpt_oss": {
        **SIZES,
        "swiglu_limit": 7.0,  # vLLM computes with no other
        "rope_parameters": {
            **hf_models.CONFIGS["gpt_oss"][1]["rope_parameters"],
            "original_max_position_embeddings": 128,  # vLLM's table has 4 times as many positions
        },
    },
}
"""kind -> the sizes that differ from those of `hf_models.CONFIGS`."""


def responses_of_vllm(directory: Path, precision: str = "fp32", **options: Any) -> list[list[Response]]:
    family, model, rules, tensors = hf_models.read(directory)
    chunks, grid = models.build(model, ParallelConfig(), optimizer=OptimizerConfig(precision=precision))
    hf_models.fill(chunks, rules, tensors)
    with sampler(model, chunks, grid, hf_models.VOCAB_SIZE, family=family, **options) as it:
        it.update_weights(3)
        return [it.generate(requests(4), params) for params in (GREEDY, DRAWN)]


def scored(model: Any, responses: list[Response]) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Return the greedy tokens of transformers' model, and its log-probs of the responses to `requests`, in turn."""
    best, log_probs = [], []
    for request, response in zip(cycle(requests(4)), responses, strict=False):
        logits = hf_models.hf_logits(model, [request.prompt + response.token_ids]).double()
        rows = logits[len(request.prompt) - 1 : -1]
        best.append(rows.argmax(-1).tolist())
        log_probs.append(rows.log_softmax(-1).gather(-1, torch.tensor(response.token_ids)[:, None]).squeeze(-1))
    return best, log_probs


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_responses_and_their_log_probs_are_those_of_transformers(ranks, tmp_path, kind):
    reference = hf_models.write(kind, tmp_path, **FAMILIES[kind])
    ((greedy, drawn),) = ranks.run(responses_of_vllm, tmp_path, world_size=1, timeout=TIMEOUT)
    best, log_probs = scored(reference, [*greedy, *drawn])
    for response, expected in zip([*greedy, *drawn], log_probs, strict=True):
        assert response.log_probs == pytest.approx(expected.tolist(), abs=2e-4)
    assert tokens(greedy) == best[: len(greedy)]


GATED_DELTA: dict[str, Any] = {
    **{**SIZES, "hidden_size": 128, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    **{"linear_num_value_heads": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128},
    "linear_conv_kernel_dim": 4,
}


def median_distance(model: Any, responses: list[Response]) -> float:
    """Return the median distance of the recorded log-probs of responses to `requests` from those of transformers."""
    pairs = zip(responses, scored(model, responses)[1], strict=True)
    return float(torch.cat([(torch.tensor(one.log_probs) - theirs).abs() for one, theirs in pairs]).median())


def test_gated_delta_nets_generate_what_transformers_would_in_bf16(ranks, tmp_path):
    """On a CPU vLLM computes these layers in bf16, for heads of 128 channels."""
    model = hf_models.write("qwen3_next", tmp_path, **GATED_DELTA)
    args = {"enable_prefix_caching": False}  # else vLLM asks for chunked prefills, which share states
    options = {"precision": "bf16", "dtype": "bfloat16", "engine_args": args}
    ((_, drawn),) = ranks.run(responses_of_vllm, tmp_path, world_size=1, timeout=TIMEOUT, **options)
    model = model.to(torch.bfloat16).float()
    assert median_distance(model, drawn) < 0.05
    layers = model.model.layers
    layers[0].linear_attn, layers[2].linear_attn = layers[2].linear_attn, layers[0].linear_attn
    assert median_distance(model, drawn) > 0.5


def key_norm(model: Any) -> torch.Tensor:
    norm: torch.Tensor = model.model.layers[1].self_attn.k_norm.weight
    return norm.clone()


def key_norms_after_updates(directory: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return, after each of two updates, the norm of keys that the trainer has and the norm that vLLM has."""
    family, model, rules, tensors = hf_models.read(directory)
    chunks, grid = models.build(model, ParallelConfig())
    hf_models.fill(chunks, rules, tensors)
    mine = unwrapped(chunks[0]).decoder.layers[1].self_attention.k_layernorm.weight.data
    with sampler(model, chunks, grid, hf_models.VOCAB_SIZE, family=family) as it:
        found = []
        for version in (3, 4):
            mine.add_(1)
            it.update_weights(version)
            found.append((mine.clone(), *it._engine._llm.apply_model(key_norm)))
    return found


def test_vllm_takes_the_weights_of_minimax_m2_again_and_again(ranks, tmp_path):
    """Generate nothing: vLLM's router on a CPU has no sigmoid."""
    hf_models.write("minimax_m2", tmp_path, **SIZES, rotary_dim=16, intermediate_size=32)
    (updates,) = ranks.run(key_norms_after_updates, tmp_path, world_size=1, timeout=TIMEOUT)
    assert [mine.equal(theirs) for mine, theirs in updates] == [True, True]
    assert not updates[0][0].equal(updates[1][0])
