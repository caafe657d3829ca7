# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Let a training model decode for a while: its KV cache, what changes and is restored, and its forward passes.

Megatron's static cache keeps keys and values in ``context.key_value_memory_dict[layer_number]``, ``[columns, b, heads,
channels]`` each.  A `DecodingModel` gives the logits of the next tokens, and `ForwardPasses` orders the passes where
all ranks must run the same model at a time.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from megatron.core.utils import get_pg_size

from megatron_selfdistill.distributed.integers import max_over_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.distributed.signs_of_life import beat
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.model.local_attention import CoreAttention
from megatron_selfdistill.model.rotary import angles_at, rotated
from megatron_selfdistill.rollout.megatron.decodable_models import (
    Override,
    attention_layers,
    cache_bytes_per_token,
    decoding_overrides,
    refuse_undecodable,
    stand_in_of,
    state_bytes,
)
from megatron_selfdistill.rollout.megatron.ragged_cache import RaggedCache
from megatron_selfdistill.rollout.megatron.recorded_passes import RecordedPasses


def free_bytes() -> int:
    """Return the free memory of this rank in bytes: of its GPU, or its share of the machine's main memory."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class CachedAttention:
    """The attention of a model that decodes with a KV cache, whose keys are rotated before the cache takes them.

    Megatron's own attention caches keys without their rotary embedding and rotates the whole cache again in every pass.
    It also has one offset for all rows and takes no mask, which a `RaggedCache` needs.

    A pass replaces the step of each attention layer that writes and reads the cache, the attention of other programs
    (`stand_in_of`), in multi-latent attention the table of rotary embeddings, which is applied before that step,
    Megatron's own linear layers, whose autograd functions take longer on one token per row than the operations around
    the product, and the block of all layers, which returns the states of the last tokens of padded prompts.
    """

    def __init__(self, models: Sequence[GPTModel]) -> None:
        self._cache: StaticInferenceContext | None = None  # of the present pass
        self._positions: Tensor | None = None  # of the present pass
        self._replacements: dict[int, tuple[torch.nn.Module, str, Callable[..., Any]]] = {}
        self.stand_ins: list[CoreAttention] = []
        """The attention that takes the place of other programs' attention during a pass."""
        for layer in attention_layers(models):
            if not isinstance(layer.core_attention, CoreAttention):
                self.stand_ins.append(stand_in_of(layer))
                self._replacements[id(layer.core_attention)] = layer.core_attention, "forward", self.stand_ins[-1]
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
    return rotated(rows, angles, config.rotary_interleaved, mscale=mscale).type_as(states).view(states.shape)


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


def _clear_caches(functions: set[Any]) -> None:
    for function in functions:
        if hasattr(function, "cache_clear"):
            function.cache_clear()


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
        self._attention = CachedAttention(self.models)
        self._overrides = decoding_overrides([*self.models, *self._attention.stand_ins], grid)
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
    def keeps_rows(self) -> bool:
        """Whether a row can go on with several tokens at once: no layer has a state."""
        return self.models[0].config.experimental_attention_variant is None

    @property
    def has_one_pass(self) -> bool:
        """Whether a pass of one token per row does the same for every token, without another stage or the host."""
        return self.keeps_rows and self.models[0].config.num_moe_experts is None and self._grid.pp_size == 1

    def decoding(self) -> AbstractContextManager[None]:
        """Keep the model in the state in which it decodes (`decoding.decoding`)."""
        return decoding(self._chunks, self.models, self._overrides)

    def forward(self, context: StaticInferenceContext, tokens: Tensor) -> Tensor | None:
        """Run a forward pass of ``tokens [b, s]``; return the last logits ``[b, V]``.

        A cache that decodes has the tokens before them; else they are prompts.  Stages before the last return None.
        """
        if _is_ragged(context):
            context.begin_pass(tokens.size(1))
            with self._attention.reading(context, context.places.flatten()):
                return self._forward(context, tokens, context.places.t(), context.hidden)
        positions = torch.arange(tokens.size(1), device=tokens.device)
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
            # The model alone runs, since Float16Module would change its output.
            as_chunk = getattr(chunk, "around_model", nullcontext)
            with as_chunk(), older_megatron.inference_pass():
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

    def __init__(self, models: Sequence[DecodingModel], records: bool = False) -> None:
        """``models``: all models that may run, of one architecture, in the same order on all ranks.

        ``records``: whether passes that decode are recorded (`RecordedPasses`) where they are alike for every token.
        """
        self._models = list(models)
        self.records = records and models[0].has_one_pass
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

    def that_decode(self, model: DecodingModel, cache: RaggedCache) -> Callable[[Tensor], Tensor | None]:
        """Return a function that runs passes of one token per row over ``cache``, whose rows stay."""
        run = functools.partial(self.run, model, cache)
        return RecordedPasses(run, cache) if self.records else run

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
