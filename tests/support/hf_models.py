# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Tiny random transformers models of every family, saved on disk, and this project's model filled from their weights.

    write("qwen3", directory)                                   # config.json and model.safetensors, by save_pretrained
    family, model, rules, tensors = read(directory)
    chunks, grid = models.build(model, ParallelConfig()); fill(chunks, rules, tensors)

The sizes are unusual on purpose: fewer groups than heads, channels that differ from hidden / heads, a vocabulary of
prime size, unequal widths.  The weights are large enough that every weight changes the logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hf_contents import config_of
from models import shard_of, sharded_tensors
from safetensors.torch import load_file
from torch import Tensor

from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.data.context_parallel import context_parallel_positions
from megatron_selfdistill.data.packed_batch import Microbatch
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.interop.hf.family import Family
from megatron_selfdistill.interop.hf.mapping import check_names, check_shapes, family_of
from megatron_selfdistill.interop.hf.rules import Rule
from megatron_selfdistill.model import forward
from megatron_selfdistill.model.forward import unwrapped

VOCAB_SIZE = 101  # prime
_SIZES: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 36, "intermediate_size": 44, "num_hidden_layers": 4}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64}
_WITHOUT_HEAD_DIM = {name: size for name, size in _SIZES.items() if name != "head_dim"}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 8192}
_LATENT = {**_WITHOUT_HEAD_DIM, "num_key_value_heads": 4, "moe_intermediate_size": 28, "n_routed_experts": 8}
_LATENT |= {"num_experts_per_tok": 4, "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12}
_LATENT |= {"v_head_dim": 14, "rms_norm_eps": 1e-6}
_YARN = {"rope_type": "yarn", "factor": 4.0, "mscale": 0.8, "mscale_all_dim": 0.6, "beta_fast": 8, "beta_slow": 1}
_YARN |= {"original_max_position_embeddings": 16}
_YARN_OF_HEADS = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 2.0, "beta_slow": 1.0, "attention_factor": 1.25}
_YARN_OF_HEADS |= {"original_max_position_embeddings": 16, "truncate": False}
"""Values at which every one of them, and the base 100, changes logits in 5 pairs of channels."""
_YARN_OF_GPT_OSS = {"rope_theta": 100.0, "rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0}
_YARN_OF_GPT_OSS |= {"truncate": False, "original_max_position_embeddings": 16}
_GLM = {**_SIZES, "head_dim": 12, "moe_intermediate_size": 20, "n_routed_experts": 8, "num_experts_per_tok": 4}
_GLM |= {"rope_theta": 1000000.0}
_GATED_DELTA = {"full_attention_interval": 2, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 6}
_GATED_DELTA |= {"linear_key_head_dim": 6, "linear_value_head_dim": 10, "linear_conv_kernel_dim": 3}
_GATED_DELTA |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 28}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 3}
_SHARED_EXPERT = {**_EXPERTS, "shared_expert_intermediate_size": 20}
_GROUPS = {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "first_k_dense_replace": 1}
_GROUPS |= {"routed_scaling_factor": 1.7}
_ONE_GROUP = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_mtp_layers": 0}
"""Experts of DeepSeek without groups and without multi-token prediction."""
_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"
_TIED, _WINDOW = {"tie_word_embeddings": True}, {"use_sliding_window": True, "sliding_window": 9}
_GPT_OSS = {"sliding_window": 6, "swiglu_limit": 1.25, "rope_parameters": _YARN_OF_GPT_OSS}
_GPT_OSS |= {"intermediate_size": 32}  # whole vectors: PyTorch rounds the sigmoid of the rest of a row differently
_GLM_PLAIN = {"use_qk_norm": True, "n_shared_experts": 1, "first_k_dense_replace": 0, "num_mtp_layers": 0}
_YARN_OF_MINISTRAL = {**_YARN, "original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.1}
_UNNORMALISED = {"norm_topk_prob": False, "layer_types": [_LINEAR, _FULL, _FULL, _LINEAR]}


def _of(family: str, *parts: dict[str, Any], **values: Any) -> tuple[str, dict[str, Any]]:
    return f"{family}Config", {key: value for part in (*parts, values) for key, value in part.items()}


CONFIGS = {
    "llama2": _of("Llama", _SIZES, num_key_value_heads=4, rms_norm_eps=1e-5),
    "llama3": _of("Llama", _SIZES, _TIED, rope_theta=5e5, rope_scaling=_LLAMA3, max_position_embeddings=8 * 8192),
    "mistral": _of("Mistral", _SIZES, sliding_window=None, rms_norm_eps=1e-5),
    "mistral_window": _of("Mistral", _SIZES, sliding_window=7, rms_norm_eps=1e-5),
    "qwen2": _of("Qwen2", _SIZES, _TIED, rope_theta=1000000.0),
    "qwen3": _of("Qwen3", _SIZES, rope_theta=1000000.0),
    "llama_linear": _of("Llama", _SIZES, _TIED, rope_scaling={"rope_type": "linear", "factor": 2.5}),
    "qwen3_yarn": _of("Qwen3", _SIZES, rope_theta=100.0, rope_scaling=_YARN_OF_HEADS),
    "qwen3_window": _of("Qwen3", _SIZES, _WINDOW, layer_types=[_SLIDING, _FULL, _FULL, _SLIDING]),
    "mixtral": _of("Mixtral", _SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _of("Qwen3Moe", _SIZES, _EXPERTS, num_experts_per_tok=3, norm_topk_prob=True),
    "qwen3_moe_mixed": _of("Qwen3Moe", _SIZES, _EXPERTS, norm_topk_prob=False, mlp_only_layers=[1]),
    "gpt_oss": _of("GptOss", _SIZES, _LOCAL_EXPERTS, _GPT_OSS),
    "deepseek_v3": _of("DeepseekV3", _LATENT, _GROUPS, q_lora_rank=24, rope_scaling=_YARN),
    "deepseek_v3_plain": _of("DeepseekV3", _LATENT, _ONE_GROUP, q_lora_rank=None, first_k_dense_replace=0),
    "seed_oss": _of("SeedOss", _SIZES, attention_bias=True),
    "smollm3": _of("SmolLM3", _SIZES, _TIED, _WINDOW, no_rope_layers=[1, 0, 1, 1], pad_token_id=None),
    "phi3": _of("Phi3", _SIZES, rms_norm_eps=1e-5, sliding_window=7, pad_token_id=None),
    # a large epsilon, so that the norms of the latents show their own
    "moonlight": _of("DeepseekV3", _LATENT, _ONE_GROUP, rms_norm_eps=0.01, q_lora_rank=24, first_k_dense_replace=1),
    "glm4_moe": _of("Glm4Moe", _GLM, _GROUPS, attention_bias=True),
    # 9 channels are rotated, of which Megatron and transformers rotate 5 pairs
    "glm4_moe_plain": _of("Glm4Moe", _GLM, _GLM_PLAIN, partial_rotary_factor=0.75),
    "qwen2_moe": _of("Qwen2Moe", _SIZES, _EXPERTS, shared_expert_intermediate_size=26),
    "ministral3": _of("Ministral3", _SIZES, rope_parameters=_YARN_OF_MINISTRAL),
    "minimax_m2": _of("MiniMaxM2", _SIZES, _LOCAL_EXPERTS, rotary_dim=6, bos_token_id=None, eos_token_id=None),
    "olmoe": _of("Olmoe", _WITHOUT_HEAD_DIM, hidden_size=40, num_experts=4, num_experts_per_tok=3, pad_token_id=None),
    "qwen3_next": _of("Qwen3Next", _SIZES, _GATED_DELTA, _SHARED_EXPERT, mlp_only_layers=[1]),
    "qwen3_next_unnormalised": _of("Qwen3Next", _SIZES, _GATED_DELTA, _SHARED_EXPERT, _UNNORMALISED),
    "qwen3_5": _of("Qwen3_5Text", _SIZES, _GATED_DELTA, _TIED),
    "qwen3_5_moe": _of("Qwen3_5MoeText", _SIZES, _GATED_DELTA, _SHARED_EXPERT),
}
"""kind -> (configuration class of transformers, its arguments)."""
QUICK = ["llama2", "qwen3", "qwen3_moe", "phi3", "deepseek_v3", "glm4_moe", "gpt_oss", "qwen3_next"]
"""Kinds whose rules have all forms, for tests of every commit."""


def hf_config(kind: str, **changes: Any) -> Any:
    return config_class(kind)(**{**CONFIGS[kind][1], **changes})


def config_class(kind: str) -> Any:
    import transformers

    return getattr(transformers, CONFIGS[kind][0])


def write(kind: str, directory: Path, seed: int = 0, **changes: Any) -> Any:
    """Save a random model of this kind with ``save_pretrained``; return the model (float32, in eval mode)."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(hf_config(kind, **changes)).eval()
        randomise(model)
    model.save_pretrained(directory)
    return model


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn_like(tensor)
        if "norm" in name:
            tensor.add_(0.3 * noise)  # around 1, or around 0 where the model adds 1
        elif "embed_tokens" in name or "lm_head" in name:
            tensor.copy_(0.4 * noise)
        elif name.endswith("A_log"):  # a state of some tokens: one that forgets at once has outputs near 0 / 0
            tensor.copy_(0.5 * noise - 2)
        elif name.endswith("e_score_correction_bias"):
            tensor.copy_(0.1 * noise)
        elif name.endswith("sinks"):
            tensor.copy_(noise)
        elif name.endswith("bias"):
            tensor.copy_(0.5 * noise)
        elif tensor.dim() > 1:
            tensor.copy_(1.5 * tensor.shape[-1] ** -0.5 * noise)


def read(directory: Path, **changes: Any) -> tuple[Family, ModelConfig, list[Rule], dict[str, Tensor]]:
    """Return family, configuration with ``changes``, rules and tensors of a Hugging Face directory."""
    config = config_of(directory)
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    family = family_of(config)
    model = dataclasses.replace(family.model_config(config), **{"make_vocab_size_divisible_by": 8, **changes})
    rules = check_names(family.rules(model), tensors)
    check_shapes(rules, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return family, model, rules, tensors


@torch.no_grad()
def fill(chunks: Sequence[torch.nn.Module], rules: Sequence[Rule], tensors: Mapping[str, Tensor]) -> set[str]:
    """Set all parameters and buffers from Hugging Face tensors, and the padding to 3; return the keys that were set."""
    depths = {rule.megatron.key: len(rule.megatron.index) for rule in rules}
    full = {
        (rule.megatron.key, rule.megatron.index): rule.to_megatron(*(tensors[name] for name in rule.hf_names))
        for rule in rules
    }
    filled, storages = set(), set()
    for chunk in chunks:
        model = unwrapped(chunk)
        for shard in sharded_tensors(model):
            index = tuple(shard.global_offset[: shard.prepend_axis_num])
            value = full[shard.key, index[: depths[shard.key]]]
            for expert in index[depths[shard.key] :]:
                value = value[expert]
            rows = shard.global_shape[shard.prepend_axis_num]
            if value.shape[0] < rows:
                value = torch.cat([value, value.new_full((rows - value.shape[0], *value.shape[1:]), 3.0)])
            shard.data.copy_(shard_of(_Stacked(value, index), shard))
            filled.add(shard.key)
            storages.add(shard.data.untyped_storage().data_ptr())
        missing = [n for n, p in model.named_parameters() if p.untyped_storage().data_ptr() not in storages]
        assert not missing, f"nothing was set in {missing}"
    return filled


class _Stacked:
    """One slice of a stacked tensor at its place, without the rest of the stack."""

    def __init__(self, value: Tensor, index: tuple[int, ...]) -> None:
        self.value, self.index = value, index

    def __getitem__(self, offset: int) -> Any:
        assert offset == self.index[0]
        return _Stacked(self.value, self.index[1:]) if len(self.index) > 1 else self.value

    def narrow(self, *arguments: int) -> Tensor:
        return self.value.narrow(*arguments)


def packed(sequences: Sequence[Sequence[int]]) -> Microbatch:
    """Return one packed sequence of several sequences, with a response position at every token."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    total = int(lengths.sum())
    return Microbatch(
        tokens=torch.tensor([token for sequence in sequences for token in sequence]),
        position_ids=torch.cat([torch.arange(n) for n in lengths.tolist()]),
        cu_seqlens=torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
        padding_mask=torch.zeros(total, dtype=torch.bool),
        response_positions=torch.arange(total),
        response_ids=torch.arange(total),
        num_sequences=len(sequences),
    )


@torch.no_grad()
def megatron_logits(chunk: torch.nn.Module, grid: RankGrid, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits [sum of lengths, vocabulary] in float32 of a model on one rank, computed as in training."""
    microbatch = packed(sequences)
    inputs = forward.inputs_of(microbatch, grid)
    rows = forward.states_at(forward.hidden_states(chunk, inputs, grid), microbatch.response_positions, grid)
    return forward.project(unwrapped(chunk), rows).float()[:, :VOCAB_SIZE]


@torch.no_grad()
def logits_through_the_pipeline(
    chunks: Sequence[torch.nn.Module], grid: RankGrid, sequences: Sequence[Sequence[int]], vocab_size: int = VOCAB_SIZE
) -> Tensor | None:
    """Return the logits [sum of lengths, ``vocab_size``] in float32 on the last stage; None on other stages."""
    config = unwrapped(chunks[0]).config
    microbatch = packed(sequences)
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
    cu_seqlens = packed(sequences).cu_seqlens
    found = logits.new_full((sum(map(len, sequences)), logits.size(1)), float("nan"))
    for rank, part in enumerate(parts):
        found[context_parallel_positions(cu_seqlens, grid.cp_size, rank)] = part
    return found


@torch.no_grad()
def hf_logits(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits [sum of lengths, vocabulary] in float32 of a transformers model, one sequence at a time."""
    return torch.cat([model(torch.tensor([sequence])).logits[0].float() for sequence in sequences])


SEQUENCES = [torch.randint(VOCAB_SIZE, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (23, 40)]
"""Two texts for the comparison of logits, to test packing; both are longer than the original length of YaRN."""


def logits_bound(kind: str) -> float:
    """Return the largest difference of the logits of two float32 implementations of a model of this kind.

    A rounding of every weight to float32 moves these logits by 5e-6 to 3e-5, and in models with gated delta nets by
    2e-5 to 1e-4: the bound is that of three roundings.
    """
    return 3e-4 if kind.startswith(("qwen3_next", "qwen3_5")) else 1e-4
