# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Let a training model decode for a while: its KV cache, what changes and is restored, and its forward passes.

Megatron's static cache keeps keys and values in ``context.key_value_memory_dict[layer_number]``, ``[columns, b, heads,
channels]`` each.  A `RaggedCache` has rows of unequal length.  `decoding_overrides` has the attributes in which
decoding differs from a training step, a `DecodingModel` gives the logits of the next tokens, and `ForwardPasses` orders
the passes where all ranks must run the same model at a time.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeGuard

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_selfdistill.compat import older_megatron, repairs  # noqa: F401  isort: skip  (before megatron.core)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from megatron.core.utils import get_pg_size

from megatron_selfdistill.distributed.integers import max_over_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.distributed.signs_of_life import beat
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.adapters import WithoutAdapters
from megatron_selfdistill.model.attention_variants import has_sinks
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.model.gated_delta_net import GatedDeltaNet
from megatron_selfdistill.model.local_attention import CoreAttention
from megatron_selfdistill.model.rotary import angles_at, rotated


def cache_bytes_per_token(models: Sequence[torch.nn.Module], dtype: torch.dtype) -> int:
    """Return the bytes that ``Attention._allocate_memory`` takes per sequence and position, over this rank's layers."""
    layers = list(_attention_layers(models))
    values = sum(m.num_query_groups_per_partition * (m.key_hidden_size + m.val_hidden_size) for m in layers)
    return max(1, int(values) * dtype.itemsize)  # a stage may have no layer


def state_bytes(models: Sequence[torch.nn.Module]) -> int:
    """Return the bytes of the states of recurrent layers per sequence, over this rank's layers."""
    return sum(m.state_bytes for model in models for m in model.modules() if isinstance(m, GatedDeltaNet))


def free_bytes() -> int:
    """Return the free memory of this rank in bytes: of its GPU, or its share of the machine's main memory."""
    if torch.cuda.is_available():
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + cached
    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def keep_rows(context: StaticInferenceContext, rows: Tensor) -> None:
    """Drop all sequences but ``rows`` from the cache."""
    cache = context.key_value_memory_dict
    for layer_number, (keys, values) in cache.items():
        cache[layer_number] = keys[:, rows], values[:, rows]
    context.max_batch_size = rows.numel()


class RaggedCache(StaticInferenceContext):
    """A KV cache in which each row has a column of its own.

    Prompts of unequal length are read as Megatron reads prompts of equal length: from column 0 on, with padding at the
    end.  After `start_decoding` each row continues where its prompt ended (`CachedAttention`).  So the column of a
    token is its position in any batch, and no embedding of positions sees the padding.
    """

    columns: Tensor
    """Column in which the next pass puts the first keys and values of each row, ``[b]`` int64."""
    places: Tensor
    """Column of each token of the present pass, ``[s, b]`` int64; s is 1 but in a pass of `later_part`."""
    decodes = False
    """Whether prompts have been read, so that each pass reads one token per row."""
    prompt_lengths: Tensor
    """The tokens of each prompt, which the state of a recurrent layer has read before decoding, ``[b]`` int64."""

    def __init__(self, max_batch_size: int, max_sequence_length: int, lengths: Tensor) -> None:
        """Make an empty cache; ``lengths [b]``: the tokens of each prompt."""
        super().__init__(max_batch_size, max_sequence_length)
        self.prompt_lengths = lengths
        self.layers_with_state: set[int] = set()
        """The numbers of the layers whose memory is a state, without columns (`model.gated_delta_net`)."""

    def last_of_prompts(self, states: Tensor) -> Tensor:
        """Return the states ``[1, b, h]`` of the last tokens of the next b prompts, from all states ``[s, b, h]``."""
        rows = torch.arange(states.size(1), device=states.device)
        return states[self.prompt_lengths[self.batch_size_offset + rows] - 1, rows].unsqueeze(0)

    def start_decoding(self, longest: int) -> None:
        """Read one token per row in each pass from now on; ``longest`` is the greatest of the prompts' lengths."""
        self.columns = lengths = self.prompt_lengths
        self.num_columns = longest + 1
        self.decodes = True
        self.enable_decode_mode()
        unread = (torch.arange(self.max_sequence_length, device=lengths.device)[:, None] >= lengths)[:, :, None, None]
        for layer_number, memories in self.key_value_memory_dict.items():
            for memory in memories if layer_number not in self.layers_with_state else ():
                memory.masked_fill_(unread, 0)  # 0 * NaN is NaN

    def restore(self, rows: Sequence[Mapping[int, tuple[Tensor, Tensor]]]) -> None:
        """Fill the first columns of each row: for each layer, keys and values ``[n, heads, channels]`` of n tokens."""
        for layer_number, parts in rows[0].items():
            memories = [x.new_zeros(self.max_sequence_length, len(rows), *x.shape[1:]) for x in parts]
            for i, row in enumerate(rows):
                for memory, part in zip(memories, row[layer_number], strict=True):
                    memory[: len(part), i] = part
            self.key_value_memory_dict[layer_number] = tuple(memories)

    def row(self, index: int, num_tokens: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Return a copy of the first ``num_tokens`` columns of a row, as `restore` takes it."""
        memories = self.key_value_memory_dict.items()
        return {number: (k[:num_tokens, index].clone(), v[:num_tokens, index].clone()) for number, (k, v) in memories}

    def later_part(self, rows: slice, starts: Tensor, end: int) -> RaggedCache:
        """Return the ``rows`` of this cache as one whose next pass reads several tokens, from ``starts [b]`` on.

        The pass writes into this cache, no column behind ``end``, and gives the state of the last token of each prompt.
        """
        part = RaggedCache(len(starts), self.max_sequence_length, self.prompt_lengths[rows] - starts)
        part.columns, part.num_columns, part.decodes = starts, end, True
        part.enable_decode_mode()
        for layer_number, (keys, values) in self.key_value_memory_dict.items():
            part.key_value_memory_dict[layer_number] = keys[:, rows], values[:, rows]
        return part

    def begin_pass(self, num_tokens: int) -> None:
        """Let the next pass read ``num_tokens`` tokens of each row."""
        self.places = self.columns + torch.arange(num_tokens, device=self.columns.device)[:, None]

    def advance(self) -> None:
        """Move each row on by one token."""
        self.columns = self.columns + 1
        self.num_columns += 1

    def keep(self, rows: Tensor) -> None:
        """Drop all sequences but ``rows``."""
        keep_rows(self, rows)
        self.columns = self.columns[rows]

    @property
    def hidden(self) -> Tensor:
        """Mask ``[b, 1, s, num_columns]`` bool of the columns behind each token's own, which attention does not see."""
        columns = torch.arange(self.num_columns, device=self.columns.device)
        return (columns > self.places.t()[:, :, None])[:, None]

    def write(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``key`` and ``value`` at the tokens' columns and return all keys and values of the layer so far.

        ``key`` and ``value`` are ``[s, b, heads, channels]``, the results ``[num_columns, b, heads, channels]``.
        """
        rows = torch.arange(self.columns.numel(), device=self.columns.device)
        keys, values = self.key_value_memory_dict[layer_number]
        keys[self.places, rows], values[self.places, rows] = key, value
        return keys[: self.num_columns], values[: self.num_columns]

    def rows_of(self, table: Tensor) -> Tensor:
        """Return the entries of ``table [positions, 1, 1, channels]`` at the tokens' columns, [s, b, 1, channels]."""
        return table[self.places].squeeze(2)


class CachedAttention:
    """The attention of a model that decodes with a KV cache, whose keys are rotated before the cache takes them.

    Megatron's own attention caches keys without their rotary embedding and rotates the whole cache again in every pass.
    It also has one offset for all rows and takes no mask, which a `RaggedCache` needs.

    Four functions are replaced during a pass: the step of each attention layer that writes and reads the cache, in
    multi-latent attention the table of rotary embeddings, which is applied before that step, Megatron's own linear
    layers, whose autograd functions take longer on one token per row than the operations around the product, and the
    block of all layers, which returns the states of the last tokens of padded prompts.
    """

    def __init__(self, models: Sequence[GPTModel]) -> None:
        self._cache: StaticInferenceContext | None = None  # of the present pass
        self._positions: Tensor | None = None  # of the present pass
        self._replacements: dict[int, tuple[torch.nn.Module, str, Callable[..., Any]]] = {}
        for layer in _attention_layers(models):
            self._replacements[id(layer)] = layer, "_adjust_key_value_for_inference", self._cached_step(layer)
            if isinstance(layer, MultiLatentAttention):
                rotary = layer.rotary_pos_emb
                self._replacements[id(rotary)] = rotary, "forward", self._ragged_table(rotary)
        for linear in (module for model in models for module in model.modules()):
            if type(linear) in (ColumnParallelLinear, RowParallelLinear) and get_pg_size(linear.tp_group) == 1:
                self._replacements[id(linear)] = linear, "forward", functools.partial(_product, linear)
        for block in (model.decoder for model in models if model.post_process):
            self._replacements[id(block)] = block, "forward", self._last_states(block)

    @contextlib.contextmanager
    def reading(self, cache: StaticInferenceContext, positions: Tensor) -> Iterator[None]:
        """Let a pass of the model read and write ``cache``.

        ``positions``: those of the tokens of the pass, ``[s * b]`` for a `RaggedCache` that decodes and else ``[s]``,
        int64.
        """
        self._cache, self._positions = cache, positions
        try:
            for owner, name, replacement in self._replacements.values():
                owner.__dict__[name] = replacement
            yield
        finally:
            for owner, name, _ in self._replacements.values():
                owner.__dict__.pop(name, None)
            self._cache = self._positions = None

    def _ragged_table(self, rotary: torch.nn.Module) -> Callable[..., Any]:
        """Return the forward of a rotary embedding at the rows' positions only; YaRN's also returns a factor."""
        whole_table = rotary.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            table = whole_table(*args, **kwargs)
            if not _is_ragged(self._cache):
                return table
            if isinstance(table, tuple):
                return self._cache.rows_of(table[0]), *table[1:]
            return self._cache.rows_of(table)

        return forward

    def _last_states(self, block: torch.nn.Module) -> Callable[..., Tensor]:
        """Return the forward of the last ``block`` of layers, which gives one state of each row that has padding."""
        all_states = block.forward

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            states: Tensor = all_states(*args, **kwargs)
            cache = self._cache
            return cache.last_of_prompts(states) if isinstance(cache, RaggedCache) and len(states) > 1 else states

        return forward

    def _cached_step(self, layer: Attention) -> Callable[..., tuple[Any, ...]]:
        """Return ``Attention._adjust_key_value_for_inference`` for rotated keys and rows at columns of their own."""
        megatrons_step = layer._adjust_key_value_for_inference

        def adjust(
            cache: StaticInferenceContext, query: Tensor, key: Tensor, value: Tensor, rotary_pos_emb: Any, *_: Any
        ) -> tuple[Any, ...]:
            if rotary_pos_emb is not None:
                assert self._positions is not None, "the function takes Megatron's place during a pass only"
                angles = angles_at(rotary_pos_emb[0], self._positions)
                query, key = (_rotated(layer, x, angles, ragged=_is_ragged(cache)) for x in (query, key))
            if not _is_ragged(cache):
                return tuple(megatrons_step(cache, query, key, value, None))
            key, value = cache.write(layer.layer_number, key, value)
            return query, key, value, None, AttnMaskType.arbitrary, None

        return adjust


def _product(
    linear: Any, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return what ``linear(input_)``, which is not cut, returns without a gradient: the product and a skipped bias.

    On a CPU, float32 products are those of oneDNN: PyTorch itself would choose slower ones of MKL (docs/benchmarks.md).
    """
    weight = linear.weight if weight is None else weight
    bias, skipped = (None, linear.bias) if linear.skip_bias_add else (linear.bias, None)
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(input_, weight, bias, "none", [], ""), skipped
    return F.linear(input_, weight, bias), skipped


def _is_ragged(cache: StaticInferenceContext | None) -> TypeGuard[RaggedCache]:
    """Return whether each row of ``cache`` has a column of its own in this pass."""
    return isinstance(cache, RaggedCache) and cache.decodes


def _rotated(layer: Attention, states: Tensor, angles: Tensor, *, ragged: bool) -> Tensor:
    """Return queries or keys ``states [s, b, n, channels]`` with the rotary embedding of ``angles [s, 1, 1, d]``.

    ``ragged``: ``angles [s * b, 1, 1, d]`` has a position for each token.  The fused kernel has one position for all
    rows, and it computes in float32.
    """
    config = layer.config
    mscale = _yarn_get_concentration_factor_from_config(config)
    if not ragged:
        result: Tensor = apply_rotary_pos_emb(states, angles, config, mscale=mscale, cp_group=layer.pg_collection.cp)
        return result
    rows = states.flatten(0, 1)[:, None]
    rows = rows.float() if config.apply_rope_fusion else rows
    turned = rotated(rows, angles, config.rotary_interleaved, mscale=mscale)
    return turned.type_as(states).view(states.shape)


@dataclass(frozen=True)
class Override:
    """The value that ``owner.name`` has while the model decodes."""

    owner: Any
    name: str
    value: Any


def decoding_overrides(models: Sequence[GPTModel], grid: RankGrid) -> list[Override]:
    """Return the attributes in which decoding differs from a training step; found once per model.

    * Sequence parallelism is off: one token per sequence cannot be cut, so each tensor-parallel rank holds full
    activations.  Megatron caches the switch in its linear layers and embeddings, Transformer Engine in its own.

    * Context parallelism is off: each context-parallel rank decodes sequences of its own, so every group that cuts a
    sequence (rotary embedding, attention) becomes a group of one rank.

    * Multi-latent attention does not use its fused rotary embedding, which refuses a KV cache.

    Collectives: none (a group of one needs no other rank).
    """
    modules = [module for model in models for module in model.modules()]
    configs = {id(m.config): m.config for m in modules if hasattr(m, "config")}.values()
    overrides = []
    if grid.sequence_parallel:
        overrides += [Override(config, "sequence_parallel", False) for config in configs]
        for name in ("sequence_parallel", "reduce_scatter_embeddings"):
            overrides += [Override(m, name, False) for m in modules if getattr(m, name, None) is True]
    if grid.cp_size > 1:
        alone = dist.new_group([grid.rank], use_local_synchronization=True)
        collections = {id(m.pg_collection): m.pg_collection for m in modules if hasattr(m, "pg_collection")}.values()
        overrides += [Override(config, "context_parallel_size", 1) for config in configs]
        overrides += [Override(c, "cp", alone) for c in collections if getattr(c, "cp", None) is not None]
        overrides += [Override(m, "cp_group", alone) for m in modules if getattr(m, "cp_group", None) is not None]
    for config in configs:
        if config.multi_latent_attention and config.apply_rope_fusion:
            overrides.append(Override(config, "apply_rope_fusion", False))
    return overrides


@contextlib.contextmanager
def decoding(
    chunks: Sequence[torch.nn.Module], models: Sequence[GPTModel], overrides: Sequence[Override]
) -> Iterator[None]:
    """Keep the models in evaluation mode, without autograd and with ``overrides``; restore them in any case.

    ``chunks`` are the ``models`` as wrapped for training.  Under ``overlap_param_gather`` the parameters are gathered
    first (a collective over the data-parallel ranks), and the hooks that would gather them during the forward pass are
    off: a rank with nothing to decode runs no forward pass, and the other ranks would wait for it.
    """
    modules = [module for model in models for module in model.modules()]
    training = [(module, module.training) for module in modules]
    before = [(o.owner, o.name, getattr(o.owner, o.name)) for o in overrides]
    # Rotary embeddings are cached under arguments that do not name the context-parallel group.
    rotary = {type(m).forward for m in modules} if any(o.name == "cp_group" for o in overrides) else set()
    gathering = [c for c in chunks if isinstance(c, DistributedDataParallel) and c.remove_forward_pre_hook_handles]
    try:
        for chunk in gathering:
            chunk.disable_forward_pre_hook(param_sync=True)
        for module in modules:
            module.training = False
        for override in overrides:
            setattr(override.owner, override.name, override.value)
        _clear_caches(rotary)
        # Tensors of inference_mode may not enter autograd, and Megatron caches some of them.
        with torch.no_grad():
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        for module, mode in training:
            module.training = mode
        for model in models:
            model.set_input_tensor(None)
        _clear_caches(rotary)
        for chunk in gathering:
            chunk.enable_forward_pre_hook()


def takes_masks(models: Sequence[GPTModel]) -> bool:
    """Return whether attention can hide the columns that a shorter sequence has not reached.

    Transformer Engine's flash and fused attention cannot hide columns, because they take no arbitrary mask.
    """
    return _has_our_attention(models) or models[0].config.attention_backend not in (
        AttnBackend.flash,
        AttnBackend.fused,
    )


def _has_our_attention(models: Sequence[GPTModel]) -> bool:
    return all(isinstance(layer.core_attention, CoreAttention) for layer in _attention_layers(models))


def refuse_undecodable(models: Sequence[GPTModel], grid: RankGrid) -> None:
    """Raise `ConfigError` if Megatron's static KV cache would be wrong for the model, or decode another model."""
    refusals = _model_refusals(models)
    if models[0].config.num_moe_experts is not None:
        refusals += _router_refusals(models[0].config, grid)
    for found, message in refusals:
        if found:
            raise ConfigError(f"this model cannot be sampled in process: {message}")


def _model_refusals(models: Sequence[GPTModel]) -> list[tuple[bool, str]]:
    """Return each property of a model that decoding cannot have: whether the model has it, and a message."""
    config = models[0].config
    rotary = {model.position_embedding_type for model in models}
    attention = list(_attention_layers(models))
    return [
        (
            config.flash_decode,
            "flash_decode keeps a cache of its own: set model.transformer.flash_decode=false",
        ),
        (
            config.cuda_graph_impl != "none",
            "CUDA graphs fix the shapes that decoding changes: set model.transformer.cuda_graph_impl=none",
        ),
        (
            "mrope" in rotary,
            "multimodal rotary embeddings (mrope) have no KV cache in Megatron Core: sample elsewhere",
        ),
        (
            config.mtp_num_layers is not None,
            "multi-token-prediction layers cannot be decoded: set mtp_num_layers=null",
        ),
        (
            bool(config.fp8 or config.fp4),
            "fp8 and fp4 layers need token counts that are multiples of 16, decoding has any number: train in bf16",
        ),
        (
            config.tp_comm_overlap,
            "tp_comm_overlap reserves buffers for sequence-parallel shapes, decoding has other shapes: "
            "set model.transformer.tp_comm_overlap=false",
        ),
        (
            config.transformer_impl == "inference_optimized",
            "inference_optimized layers cannot be trained: use transformer_engine or local",
        ),
        (
            config.experimental_attention_variant not in (None, "gated_delta_net"),
            f"attention variant {config.experimental_attention_variant!r} has no static KV cache in Megatron",
        ),
        (
            getattr(config, "fine_grained_activation_offloading", False),
            "fine_grained_activation_offloading also acts while decoding: set it to false",
        ),
        (
            (bool(config.window_size) or has_sinks(config)) and not _has_our_attention(models),
            "sliding windows and attention sinks are decoded with this program's attention only, not with Transformer "
            "Engine's on Megatron's static KV cache: set rollout.engine=vllm",
        ),
        (
            getattr(config, "cache_mla_latents", False),
            "cache_mla_latents replaces the weights that are trained: set it to false",
        ),
        (
            any(layer.attn_mask_type != AttnMaskType.causal for layer in attention),
            "the layer spec must say attn_mask_type=causal for self-attention, or prompts would attend ahead",
        ),
    ]


def _router_refusals(config: Any, grid: RankGrid) -> list[tuple[bool, str]]:
    """Return each setting of a mixture-of-experts model that decoding cannot have: whether it is set, and a message."""
    return [
        (
            config.moe_router_load_balancing_type == "sinkhorn",
            "sinkhorn routing trains with other experts than it decodes with: use aux_loss or none",
        ),
        (
            bool(config.moe_input_jitter_eps or config.moe_router_force_load_balancing)
            or getattr(config, "moe_router_force_biased", None) is not None,  # since 0.17
            "a random router cannot be sampled from: unset moe_input_jitter_eps, moe_router_force_load_balancing and "
            "moe_router_force_biased",
        ),
        (
            config.moe_expert_capacity_factor is not None,
            "moe_expert_capacity_factor drops tokens depending on the rest of the batch: set it to null",
        ),
        (
            config.moe_token_dispatcher_type == "allgather" and grid.ep_size > 1,
            "the allgather dispatcher needs equal batches on all expert-parallel ranks: "
            "set moe_token_dispatcher_type=alltoall",
        ),
    ]


def _clear_caches(functions: set[Any]) -> None:
    for function in functions:
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def _attention_layers(models: Sequence[torch.nn.Module]) -> Iterator[Attention]:
    return (module for model in models for module in model.modules() if isinstance(module, Attention))


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
        self._attention = CachedAttention(self.models)
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

    @property
    def hides_columns_cheaply(self) -> bool:
        """Whether a pass takes as long with hidden columns as without: no Transformer Engine and no sliding window.

        A window would otherwise read the columns within it alone.
        """
        return _has_our_attention(self.models) and not self.models[0].config.window_size

    @property
    def keeps_rows(self) -> bool:
        """Whether a row can go on with several tokens at once: attention hides columns, and no layer has a state."""
        return self.hides_columns_cheaply and self.models[0].config.experimental_attention_variant is None

    def decoding(self) -> AbstractContextManager[None]:
        """Keep the model in the state in which it decodes (`decoding.decoding`)."""
        return decoding(self._chunks, self.models, self._overrides)

    def forward(self, context: StaticInferenceContext, tokens: Tensor) -> Tensor | None:
        """Run a forward pass of ``tokens [b, s]`` after the cached tokens; return the last logits ``[b, V]``.

        Stages before the last return None.
        """
        if _is_ragged(context):
            context.begin_pass(tokens.size(1))
            with self._attention.reading(context, context.places.flatten()):
                return self._forward(context, tokens, context.places.t(), context.hidden)
        start = context.sequence_len_offset
        positions = torch.arange(start, start + tokens.size(1), device=tokens.device)
        with self._attention.reading(context, positions):
            return self._forward(context, tokens, positions.expand_as(tokens), None)

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
            switched_off = chunk.switched_off() if isinstance(chunk, WithoutAdapters) else nullcontext()
            with switched_off, older_megatron.inference_pass():
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


# Prompt tokens of one forward pass: activations of a long prefill would outgrow the cache itself.
_PREFILL_TOKENS = 2**15


def rows_of_prefill(num_tokens: int) -> int:
    """Return the greatest number of rows of a pass that reads ``num_tokens`` tokens of each row."""
    return max(1, _PREFILL_TOKENS // num_tokens)


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
        for rows in tokens.split(rows_of_prefill(tokens.size(1))):
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
