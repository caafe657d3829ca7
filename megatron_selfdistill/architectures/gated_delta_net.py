# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The gated delta net, a linear attention with one state per head, for Megatron's ``experimental_attention_variant``.

For each value head, with the keys and queries of its key head at unit length, the state S [d_k, d_v] follows

    S_t = a_t S_{t-1} + k_t b_t (v_t - k_t^T a_t S_{t-1})^T        o_t = S_t^T q_t / sqrt(d_k)

where a_t = exp(-exp(A_log) softplus(alpha_t + dt_bias)) forgets and b_t = sigmoid(beta_t) writes.  A short causal
convolution precedes queries, keys and values, and a norm and the gate silu(z_t) follow the output.

Source: Yang, Kautz and Hatamizadeh 2024 (arXiv 2412.06464), as in transformers' Qwen3-Next.  Megatron Core's own layer
has neither a decoding state nor the right gradient of its output norm under tensor parallelism without sequence
parallelism, and rounds exp(A_log) to the parameters' dtype.  This layer reads the same keys of ``TransformerConfig``.

A packed sequence computes what each of its segments computes alone: neither the convolution nor the state passes a
boundary.  On a GPU the kernels of flash-linear-attention (`kernels_for`) take ``cu_seqlens``; PyTorch
computes the segments as rows of batches of similar lengths.

PyTorch computes the rule in chunks of 64 tokens.  Within a chunk, with c_t the sum of log a up to token t, the
corrections u_t = b_t (v_t - k_t^T a_t S_{t-1}) satisfy

    u_t + sum_{r<t} b_t exp(c_t - c_r) (k_t^T k_r) u_r = b_t (v_t - exp(c_t) S_0^T k_t)

with the state S_0 before the chunk: one triangular system for all tokens of a chunk.  Source: Yang, Kautz and
Hatamizadeh 2024 (arXiv 2412.06464), section 3.3.  Megatron Core's ``torch_chunk_gated_delta_rule`` is the same
function.  It substitutes row by row, and keeps a copy of the system for each row until the backward pass.

On a CPU a gated delta net computes with PyTorch, and on a GPU with ``model.transformer.deterministic_mode=true``.  That
formula is float32 throughout and slow, and holds about 9 kB for each token and head of 128 channels until the backward
pass.
"""

from __future__ import annotations

import copy
import functools
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.models.gpt.experimental_attention_variant_module_specs import get_linear_attention_pattern
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    get_cuda_rng_tracker,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)

from megatron_selfdistill.compat import cpu
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.local_attention import PackedSequences, segment_batches_of

OLDEST = (0, 6)
"""The oldest version that is taken: up to 0.4 the gradients are wrong on Hopper GPUs with `WRONG_TRITON`."""
WRONG_TRITON = (3, 4), (3, 7, 1)
"""The first Triton whose gradients of the rule are wrong on Hopper GPUs, and the first one after it that is right."""
_INSTEAD = (
    "set model.transformer.deterministic_mode=true (with Transformer Engine also the environment variable "
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO=0), which computes them with PyTorch: slowly, with much memory"
)
_INSTALL = "run pip install -e '.[gdn]' in a clone of this project"
CHUNK = 64
"""The number of tokens whose corrections are solved together."""
_UNIT_LENGTH_EPSILON = 1e-6
_A_RANGE = (1.0, 16.0)
"""The range from which exp(A_log) is drawn for a model without weights."""


@dataclass(frozen=True)
class GatedDeltaKernels:
    """The functions of flash-linear-attention that a gated delta net calls, with the signatures of version 0.6.

    A packed sequence is one row, for which both functions take ``cu_seqlens [segments + 1]`` int64 on the device, and
    ``cu_seqlens_cpu``, which spares a wait for the device.
    """

    causal_conv1d: Callable[..., Any]
    """The convolution of ``[b, s, channels]`` with a weight ``[channels, taps]``, and the state behind it."""
    chunk_gated_delta_rule: Callable[..., Any]
    """The recurrence of ``[b, s, heads, d]``, and its state ``[b or segments, heads, d_k, d_v]`` float32."""


def kernels_for(config: TransformerConfig) -> GatedDeltaKernels | None:
    """Return the kernels with which a model computes on this device; None for PyTorch's formula.

    Raises: `ConfigError` on a GPU, without ``deterministic_mode``: as `installed_kernels`, or if the parameters are
    float32, which the kernels would multiply as TF32, with 10 bits.
    """
    if cpu.ON_CPU or config.deterministic_mode:
        return None
    if config.params_dtype == torch.float32:
        raise ConfigError(
            "optimizer.precision=fp32: flash-linear-attention does not compute gated delta nets in float32 on a GPU: "
            f"set optimizer.precision=bf16, or {_INSTEAD}"
        )
    return installed_kernels()


@functools.cache
def installed_kernels() -> GatedDeltaKernels:
    """Return flash-linear-attention's kernels; `ConfigError` if it is missing, too old, or refuses `WRONG_TRITON`."""
    try:
        version = importlib.import_module("fla").__version__
        convolution = importlib.import_module("fla.modules.conv")
        rule = importlib.import_module("fla.ops.gated_delta_rule")
    except ImportError as error:
        raise ConfigError(
            f"gated delta nets on GPUs need flash-linear-attention, which cannot be imported ({error}): {_INSTALL}, or "
            f"{_INSTEAD}"
        ) from error
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ConfigError(
            f"flash-linear-attention: expected {oldest} or later, since older versions have wrong gradients on some "
            f"GPUs, got {version}: {_INSTALL}, or {_INSTEAD}"
        )
    triton = importlib.import_module("triton").__version__
    first, after = WRONG_TRITON
    if torch.cuda.get_device_capability()[0] == 9 and first <= tuple(map(int, re.findall(r"\d+", triton)[:3])) < after:
        raise ConfigError(
            f"flash-linear-attention: on Hopper GPUs expected Triton 3.7.1 or later, whose gradients are right, got "
            f"{triton}: install a torch that brings one, or {_INSTEAD}"
        )
    return GatedDeltaKernels(convolution.causal_conv1d, rule.chunk_gated_delta_rule)


def chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the outputs ``[b, s, heads, d_v]`` in the dtype of ``query``, and the state behind the last token.

    ``query``, ``key`` ``[b, s, heads, d_k]`` of unit length, ``value [b, s, heads, d_v]``; ``g``, which is log a, and
    ``beta [b, s, heads]``; the states ``[b, heads, d_k, d_v]`` float32.  Everything is computed in float32.
    """
    s, (b, _, heads, d_k), d_v = key.size(1), key.shape, value.size(-1)
    q, k, v, log_decay, beta = (_in_chunks(x) for x in (query, key, value, g[..., None], beta[..., None]))
    q = q * d_k**-0.5
    decay = log_decay.cumsum(-2)  # of each token since the chunk's beginning, [b, heads, chunks, CHUNK, 1]
    between = (decay - decay.mT).tril().exp().tril()  # of the key's token until the query's
    system = (k * beta @ k.mT * between).tril(-1)
    sides = torch.cat([v * beta, k * beta * decay.exp()], dim=-1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    without_state, of_state = solved.split([d_v, d_k], dim=-1)
    scores = q @ k.mT * between
    q, until_end = q * decay.exp(), k * (decay[..., -1:, :] - decay).exp()
    of_chunk = decay[..., -1:, :].exp()
    state = key.new_zeros(b, heads, d_k, d_v, dtype=torch.float32) if initial_state is None else initial_state
    out = []
    for i in range(q.size(2)):
        corrections = without_state[:, :, i] - of_state[:, :, i] @ state
        out.append(q[:, :, i] @ state + scores[:, :, i] @ corrections)
        state = state * of_chunk[:, :, i] + until_end[:, :, i].mT @ corrections
    outputs = torch.cat(out, dim=2)[:, :, :s].transpose(1, 2).to(query.dtype)
    return outputs, state if output_final_state else None


def one_step(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the output ``[b, 1, heads, d_v]`` of one token and the state behind it, ``[b, heads, d_k, d_v]``.

    ``decay``, which is log a, and ``beta`` ``[b, 1, heads]``; ``state [b, heads, d_k, d_v]`` float32 is that before it.
    """
    q, k, v = (x[:, 0].float() for x in (query, key, value))
    state = state * decay[:, 0].exp()[..., None, None]
    correction = (v - torch.einsum("bhk,bhkv->bhv", k, state)) * beta[:, 0].float()[..., None]
    state = state + k[..., None] * correction[..., None, :]
    out = torch.einsum("bhk,bhkv->bhv", q * q.size(-1) ** -0.5, state)
    return out[:, None].to(query.dtype), state


def _in_chunks(x: Tensor) -> Tensor:
    """Return ``x [b, s, heads, d]`` as ``[b, heads, chunks, CHUNK, d]`` float32; zeros fill the last chunk."""
    padded = F.pad(x.transpose(1, 2).float(), (0, 0, 0, -x.size(1) % CHUNK))
    return padded.reshape(*padded.shape[:2], -1, CHUNK, padded.size(-1))


class GatedOutputNorm(MegatronModule):
    """The norm ``x * rsqrt(mean(x^2) + eps) * weight`` of one head's output, times ``silu(gate)`` in float32.

    The weight is replicated over tensor-parallel ranks, each of which normalises its own heads: the backward pass sums
    the weight's gradient over them.  The weight is never held less one (``layernorm_zero_centered_gamma``).
    Shapes: ``[..., d_v]`` in and out.  Collectives: backward, an all-reduce of ``[d_v]`` over TP.
    """

    def __init__(self, config: TransformerConfig, size: int, tp_group: Any) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return the gated norm of ``x`` in the dtype of ``x``."""
        weight = copy_to_tensor_model_parallel_region(self.weight, group=self.tp_group)
        normed = x.float()
        normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + self.config.layernorm_epsilon)
        gated: Tensor = (normed.to(x.dtype) * weight) * F.silu(gate.float())
        return gated.to(x.dtype)


class GatedDeltaNet(MegatronModule):
    """The layer of this module, for ``self_attention`` of Megatron's ``TransformerLayer``.

    Tensor-parallel ranks hold whole key heads.  The rows of ``in_proj`` are, for each key head, its query, key, values,
    output gates z, betas and alphas; those of ``conv1d`` are its query, key and values.  So both are cut over
    tensor-parallel ranks as they are, unlike the layer of Megatron Core, whose checkpoints have other keys.

    Input and output: ``[s (/ tp), b, h]``, each column of the batch one sequence, or ``[s (/ tp), 1, h]`` for a packed
    one.  Collectives: those of the two linear layers, and that of `GatedOutputNorm`.

    Raises: `ConfigError` as `kernels_for`, except for a layer on the meta device, which computes nothing.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int,
        pg_collection: Any,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number, self.pg_collection = layer_number, pg_collection
        tp_size = pg_collection.tp.size()
        self.num_key_heads = config.linear_num_key_heads // tp_size
        self.values_per_key = config.linear_num_value_heads // config.linear_num_key_heads
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        values = self.values_per_key * self.value_dim
        self.sections = [self.key_dim, self.key_dim, values, values, self.values_per_key, self.values_per_key]
        num_value_heads = config.linear_num_value_heads
        self.in_proj = build_module(
            submodules.in_proj,
            config.hidden_size,
            config.linear_num_key_heads * sum(self.sections),
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="fc1",
            tp_group=pg_collection.tp,
        )
        channels = self.num_key_heads * sum(self.sections[:3])
        place = {"device": torch.cuda.current_device(), "dtype": config.params_dtype}
        self.conv1d = torch.nn.Conv1d(
            channels, channels, config.linear_conv_kernel_dim, groups=channels, bias=False, **place
        )
        self.dt_bias = torch.nn.Parameter(torch.ones(num_value_heads // tp_size, **place))
        self.A_log = torch.nn.Parameter(torch.zeros(num_value_heads // tp_size, **place))
        for weight in (self.conv1d.weight, self.dt_bias, self.A_log):
            weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.kernels = None if self.A_log.is_meta else kernels_for(config)
        """The kernels with which the layer computes; None for PyTorch's formula."""
        self.out_norm = GatedOutputNorm(config, self.value_dim, pg_collection.tp)
        self.out_proj = build_module(
            submodules.out_proj,
            num_value_heads * self.value_dim,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="fc2",
            tp_group=pg_collection.tp,
        )
        if config.perform_initialization and not self.A_log.is_meta:
            with torch.no_grad(), get_cuda_rng_tracker().fork():
                self.conv1d.reset_parameters()  # other channels on each tensor-parallel rank
                self.A_log.uniform_(*_A_RANGE).log_()

    @property
    def reads_segment_batches(self) -> bool:
        """Return whether packed sequences are computed in the batches of `PackedSequences.segment_batches`."""
        return self.kernels is None

    @property
    def state_bytes(self) -> int:
        """Return the bytes of this rank's state of one sequence."""
        kernel = self.conv1d.kernel_size[0]
        convolved = int(self.conv1d.weight.nbytes) // kernel * (kernel - 1)
        return int(convolved + 4 * self.num_key_heads * self.values_per_key * self.key_dim * self.value_dim)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the layer's output, and the bias of its last linear layer, which is None.

        ``inference_context``: a ``StaticInferenceContext``, which holds the state of each row.  A pass that decodes
        continues at this state; other passes begin a sequence.  Afterwards the state is that behind the last token or,
        where the context has ``prompt_lengths`` [rows] and does not decode yet, behind so many tokens of each row.
        ``packed_seq_params``: the `PackedSequences` of a packed sequence, which leaves no state behind.

        Raises: ValueError for a packed sequence with an ``inference_context``.
        """
        packed: PackedSequences | None = packed_seq_params
        if packed is not None and inference_context is not None:
            raise ValueError("inference_context: expected None for a packed sequence, whose segments share no state")
        projected, _bias = self.in_proj(hidden_states)
        s, b = projected.shape[:2]
        grouped = projected.transpose(0, 1).reshape(b, s, self.num_key_heads, -1)
        mixed, z, *writing = grouped.split([sum(self.sections[:3]), *self.sections[3:]], dim=-1)
        inputs = [x.flatten(2) for x in (mixed, *writing)]
        if packed is None:
            states = None if inference_context is None else _States.of(self, inference_context, b)
            out = self._mixed(*inputs, states=states)
        elif self.kernels is not None:
            out = self._mixed(*inputs, lengths=_lengths_for_kernels(packed))
        else:
            segments = segment_batches_of(packed, mixed.device)
            rows = [self._mixed(*(x[0][index] for x in inputs)).flatten(0, 1) for index in segments.batches]
            out = torch.cat(rows)[segments.place].unsqueeze(0)  # no token reads the repeats behind its segment's end
        out = self.out_norm(out, z.reshape(b, s, -1, self.value_dim)).reshape(b, s, -1).transpose(0, 1).contiguous()
        result: tuple[Tensor, Tensor | None] = self.out_proj(out)
        return result

    def _mixed(
        self,
        mixed: Tensor,
        beta: Tensor,
        alpha: Tensor,
        *,
        states: _States | None = None,
        lengths: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Tensor:
        """Return the outputs ``[b, s, heads, d_v]`` of rows ``[b, s, channels]``, before their norm.

        ``lengths``: the segments of the only row, for the kernels; none for rows of one sequence each.
        """
        b, s = mixed.shape[:2]
        convolved = self._convolved(mixed, states, lengths).reshape(b, s, self.num_key_heads, -1)
        query, key, value = convolved.split(self.sections[:3], dim=-1)
        query, key = (_of_unit_length(x).repeat_interleave(self.values_per_key, dim=2) for x in (query, key))
        beta = beta.sigmoid()
        decay = -self.A_log.float().exp() * F.softplus(alpha.float() + self.dt_bias)
        if states is not None and states.lengths is not None:  # later tokens neither forget nor write
            counts = (torch.arange(s, device=beta.device) < states.lengths[:, None])[..., None]
            decay, beta = decay * counts, beta * counts
        return self._recurrence(query, key, value.reshape(b, s, -1, self.value_dim), decay, beta, states, lengths)

    def _convolved(self, mixed: Tensor, states: _States | None, lengths: Mapping[str, Tensor]) -> Tensor:
        """Return silu of the causal convolution of ``mixed [b, s, channels]``, which continues at the state."""
        if self.kernels is not None and states is None:
            fused: Tensor
            fused, _ = self.kernels.causal_conv1d(mixed, self.conv1d.weight.squeeze(1), activation="silu", **lengths)
            return fused
        mixed, before = mixed.transpose(1, 2), self.conv1d.kernel_size[0] - 1
        if states is None or states.is_new:
            padded = F.pad(mixed, (before, 0))
        else:
            padded = torch.cat([states.inputs.permute(1, 2, 0).to(mixed.dtype), mixed], dim=-1)
        if states is not None:
            b, s = mixed.size(0), mixed.size(2)
            read = torch.full((b,), s, device=mixed.device) if states.lengths is None else states.lengths
            last = (read[:, None] + torch.arange(before, device=mixed.device))[:, None].expand(-1, mixed.size(1), -1)
            states.inputs.copy_(padded.gather(2, last).permute(2, 0, 1))
        return F.silu(self.conv1d(padded)).transpose(1, 2)

    def _recurrence(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        beta: Tensor,
        states: _States | None,
        lengths: Mapping[str, Tensor],
    ) -> Tensor:
        """Return the outputs ``[b, s, heads, d_v]``; ``decay`` is log a."""
        initial = None if states is None or states.is_new else states.matrices.transpose(0, 1).movedim(2, 1)
        if query.size(1) == 1 and initial is not None:
            out, final = one_step(query, key, value, decay, beta, initial)
        else:
            rule: Callable[..., Any] = chunk_gated_delta_rule
            if self.kernels is not None:
                rule = self.kernels.chunk_gated_delta_rule
            out, final = rule(
                *(x.contiguous() for x in (query, key, value)),
                g=decay,
                beta=beta.contiguous(),
                initial_state=initial,
                output_final_state=states is not None,
                **lengths,
            )
        if states is not None:
            states.matrices.copy_(final.movedim(1, 2).transpose(0, 1))
        return out

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None, tp_group: Any = None
    ) -> dict[str, Any]:
        """Return the sharded tensors of this layer for Megatron's distributed checkpoints."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        group = tp_group or self.pg_collection.tp
        groups = {"tp_group": group, "dp_cp_group": metadata["dp_cp_group"]}
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        own = make_sharded_tensors_for_checkpoint(own, prefix, {"A_log": 0, "dt_bias": 0}, sharded_offsets, **groups)
        weights = self.conv1d.state_dict(prefix="", keep_vars=True)
        own |= make_sharded_tensors_for_checkpoint(
            weights, f"{prefix}conv1d.", {"weight": 0}, sharded_offsets, **groups
        )
        for name in ("in_proj", "out_norm", "out_proj"):
            module = getattr(self, name)
            own |= sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=group)
        return own


@dataclass
class _States:
    """The state of some rows of a batch that decodes, as views; the second axis is the row, as in Megatron's cache."""

    inputs: Tensor
    """The last inputs of the convolution, [kernel - 1, b, channels]."""
    matrices: Tensor
    """S, [d_k, b, heads, d_v] float32."""
    is_new: bool
    """Whether the rows have read no token yet."""
    lengths: Tensor | None
    """The number of tokens of this pass that the state has read afterwards, [b] int64; None for all tokens."""

    @classmethod
    def of(cls, layer: GatedDeltaNet, context: Any, num_rows: int) -> _States:
        """Return the state of the next ``num_rows`` rows, which the context's first pass makes."""
        memories = context.key_value_memory_dict
        if layer.layer_number not in memories:
            weight, rows = layer.conv1d.weight, context.max_batch_size
            heads = layer.num_key_heads * layer.values_per_key
            memories[layer.layer_number] = (
                weight.new_zeros(layer.conv1d.kernel_size[0] - 1, rows, weight.size(0)),
                weight.new_zeros(layer.key_dim, rows, heads, layer.value_dim, dtype=torch.float32),
            )
            numbers: set[int] | None = getattr(context, "layers_with_state", None)
            if numbers is not None:
                numbers.add(layer.layer_number)
        rows = slice(context.batch_size_offset, context.batch_size_offset + num_rows)
        inputs, matrices = (memory[:, rows] for memory in memories[layer.layer_number])
        decodes, lengths = context.is_decode_only(), getattr(context, "prompt_lengths", None)
        return cls(inputs, matrices, not decodes, None if decodes or lengths is None else lengths[rows])


def _lengths_for_kernels(packed: PackedSequences) -> dict[str, Tensor]:
    """Return the arguments that state the segments to flash-linear-attention: int64 on the device, and on the host.

    All layers get the same two objects: the library knows its tables of segments by the identity of both.
    """
    if (kept := packed.__dict__.get("_lengths_for_kernels")) is None:
        on_host = torch.tensor(packed.segment_bounds, dtype=torch.int64)
        kept = {"cu_seqlens": packed.cu_seqlens_q.long(), "cu_seqlens_cpu": on_host}
        packed.__dict__["_lengths_for_kernels"] = kept
    return dict(kept)


def _of_unit_length(x: Tensor) -> Tensor:
    precise = x.float()
    return (precise * torch.rsqrt((precise * precise).sum(-1, keepdim=True) + _UNIT_LENGTH_EPSILON)).to(x.dtype)


def place_gated_delta_nets(
    block: TransformerBlockSubmodules, config: TransformerConfig, vp_stage: int | None, *, transformer_engine: bool
) -> None:
    """Put a `GatedDeltaNet` into the layers of this rank's chunk that have one, in the place of attention.

    ``block``: the layer specs of the chunk, complete but for this.  ``transformer_engine``: whether they are
    Transformer Engine's.
    """
    if config.experimental_attention_variant != "gated_delta_net":
        return
    is_linear, linears = get_linear_attention_pattern(config), _linears(transformer_engine)
    layers = list(block.layer_specs)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    for i in range(len(layers)):
        if is_linear[first + i]:
            layers[i] = copy.deepcopy(layers[i])
            layers[i].submodules.self_attention = ModuleSpec(module=GatedDeltaNet, submodules=linears)
            if transformer_engine:  # whose in_proj includes the norm
                layers[i].submodules.input_layernorm = IdentityOp
            else:
                names = {"input_layernorm.": "self_attention.in_proj.layer_norm_"}
                layers[i].submodules.sharded_state_dict_keys_map |= names
    block.layer_specs = layers


def _linears(transformer_engine: bool) -> GatedDeltaNetSubmodules:
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear

        return GatedDeltaNetSubmodules(in_proj=TELayerNormColumnParallelLinear, out_proj=TERowParallelLinear)
    return GatedDeltaNetSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
