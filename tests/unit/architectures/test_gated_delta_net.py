# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The gated delta net computes its definition in float64, token by token, with its gradients; its spec and rules."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import fla_stand_in
import models
import pytest
import torch
from models import build, model_config, parallel
from parity import ROUNDINGS, UNIT_ROUNDOFF
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
from megatron.core.transformer.identity_op import IdentityOp

from megatron_selfdistill.architectures import gated_delta_net
from megatron_selfdistill.architectures.gated_delta_net import (
    GatedDeltaKernels,
    GatedDeltaNet,
    kernels_for,
)
from megatron_selfdistill.config import OptimizerConfig, ScheduleConfig
from megatron_selfdistill.data.packed_batch import Microbatch
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.architecture import layer_spec, transformer_config
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.model.local_attention import PackedSequences

ROWS = 2


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def by_definition(layer: GatedDeltaNet, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the output [s, b, h] from float64 weights: one token after the other, as the layer's module defines it."""
    config, groups = layer.config, layer.num_key_heads
    key, value, each = layer.key_dim, layer.value_dim, layer.values_per_key
    rows = (x @ weights["in_proj.weight"].T).reshape(*x.shape[:2], groups, -1)
    wide = 2 * key + each * value
    mixed, rest = rows[..., :wide], rows[..., wide:]
    kernel = weights["conv1d.weight"].squeeze(1)  # [channels, taps]
    padded = torch.cat([mixed.flatten(2).new_zeros(kernel.size(1) - 1, *mixed.flatten(2).shape[1:]), mixed.flatten(2)])
    taps = [padded[i : i + x.size(0)] * kernel[:, i] for i in range(kernel.size(1))]
    mixed = silu(torch.stack(taps).sum(0)).reshape_as(mixed)
    out = []
    for row in range(x.size(1)):
        state = {head: x.new_zeros(key, value) for head in range(groups * each)}
        tokens = []
        for t in range(x.size(0)):
            heads = []
            for head in range(groups * each):
                group, i = divmod(head, each)
                m, r = mixed[t, row, group], rest[t, row, group]
                q, k = (v / (v.square().sum() + 1e-6).sqrt() for v in (m[:key], m[key : 2 * key]))
                v = m[2 * key :].reshape(each, value)[i]
                z = r[: each * value].reshape(each, value)[i]
                beta, alpha = r[each * value + i], r[each * value + each + i]
                step = torch.log1p(torch.exp(alpha + weights["dt_bias"][head]))
                forgotten = torch.exp(-torch.exp(weights["A_log"][head]) * step) * state[head]
                state[head] = forgotten + torch.outer(k, torch.sigmoid(beta) * (v - forgotten.T @ k))
                o = state[head].T @ q / math.sqrt(key)
                normed = o / (o.square().mean() + config.layernorm_epsilon).sqrt()
                heads.append(normed * weights["out_norm.weight"] * silu(z))
            tokens.append(torch.cat(heads))
        out.append(torch.stack(tokens))
    return torch.stack(out, dim=1) @ weights["out_proj.weight"].T


SEGMENTS = (1, 2, 66, 4, 1, 64, 3)
"""The lengths of the segments of a packed sequence; the last one is padding.

One token, fewer tokens than the convolution's three taps, more than a chunk of 64, and a whole chunk.  PyTorch computes
the segments 1 and 1, and 4 and 3, as two rows of one batch.
"""
AMPLIFICATION = 120.0
"""The relative change of a gradient of the layer per relative change of its weights, in the largest: that of x."""


def packed_sequences() -> PackedSequences:
    bounds = torch.tensor([0, *itertools.accumulate(SEGMENTS)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in SEGMENTS])
    nothing, mask = torch.empty(0, dtype=torch.int64), torch.zeros(sum(SEGMENTS), dtype=torch.bool)
    microbatch = Microbatch(positions, positions, bounds, mask, nothing, nothing, len(SEGMENTS))
    return PackedSequences.of(microbatch, positions, with_segment_batches=False)


def values_and_gradients(
    weights: dict[str, Tensor], x: Tensor, output: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return the output for ``x`` and the gradients of its weighted sum, of x and of every weight."""
    for weight in weights.values():
        weight.grad = None
    x = x.clone().requires_grad_()
    out = output(x)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    gradients = {"x": x.grad} | {name: weight.grad for name, weight in weights.items()}
    return {"output": out.detach()} | {f"gradient of {name}": value for name, value in gradients.items()}


def in_every_way() -> dict[str, dict[str, Tensor]]:
    """Return what the layer computes for the segments packed in two ways, in rows, and by definition."""
    [model], _ = build(model_config("gated_delta"), parallel())
    layer = unwrapped(model).decoder.layers[0].self_attention
    x = torch.randn(sum(SEGMENTS), 1, 32, generator=torch.Generator().manual_seed(0))
    weights, packed = dict(layer.named_parameters()), packed_sequences()
    exact = {name: p.detach().double().requires_grad_() for name, p in weights.items()}

    def in_rows(x: Tensor) -> Tensor:
        return torch.cat([layer(row)[0] for row in x.split(SEGMENTS)])

    def defined(x: Tensor) -> Tensor:
        return torch.cat([by_definition(layer, exact, row) for row in x.split(SEGMENTS)])

    def packed_output(x: Tensor) -> Tensor:
        return layer(x, packed_seq_params=packed)[0]

    found = {"definition": values_and_gradients(exact, x.double(), defined)}
    found["rows"] = values_and_gradients(weights, x, in_rows)
    found["PyTorch"] = values_and_gradients(weights, x, packed_output)
    layer.kernels = GatedDeltaKernels(fla_stand_in.causal_conv1d, fla_stand_in.chunk_gated_delta_rule)
    fla_stand_in.calls.clear()
    found["kernels"] = values_and_gradients(weights, x, packed_output)
    packed_output(x)
    identities = {(id(call["cu_seqlens"]), id(call["cu_seqlens_cpu"])) for call in fla_stand_in.calls}
    assert len(fla_stand_in.calls) == 12 and len(identities) == 1  # the convolution's input and the rule's five, twice
    return found


@pytest.fixture(scope="module")
def computed(ranks):
    (found,) = ranks.run(in_every_way, world_size=1)
    return found


def errors_of(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest error of each tensor as a share of its largest value."""
    return {name: float((found[name].double() - v).abs().max() / v.abs().max()) for name, v in exact.items()}


@pytest.mark.parametrize("way", ["rows", "PyTorch", "kernels"])
def test_values_and_gradients_are_those_of_the_definition_in_float64(computed, way):
    """The stand-in of the kernels also demands the form of ``cu_seqlens`` that the library reads."""
    errors = errors_of(computed[way], computed["definition"])
    assert len(errors) == 8
    for name, error in errors.items():
        assert error < ROUNDINGS * UNIT_ROUNDOFF * AMPLIFICATION, name
    if way == "PyTorch":  # as each segment alone
        assert max(errors_of(computed[way], computed["rows"]).values()) < 1e-5


def outputs_in_passes() -> tuple[Tensor, Tensor, Tensor]:
    """Return the output of one pass, of one token after the other, and of a pass that goes on after another."""
    [model], _ = build(model_config("gated_delta"), parallel())
    layer = unwrapped(model).decoder.layers[0].self_attention.eval()
    x = torch.randn(12, ROWS, 32, generator=torch.Generator().manual_seed(1))

    def in_parts(*ends: int) -> Tensor:
        context, parts = StaticInferenceContext(ROWS, 12), []
        for start, end in zip((0, *ends), (*ends, 12), strict=True):
            parts.append(layer(x[start:end], inference_context=context)[0])
            context.sequence_len_offset = end
            context.enable_decode_mode()
        return torch.cat(parts)

    with torch.no_grad():
        return layer(x)[0], in_parts(*range(1, 12)), in_parts(5)


def test_a_state_goes_on_where_the_pass_before_ended(ranks):
    ((whole, in_steps, in_two),) = ranks.run(outputs_in_passes, world_size=1)
    assert (in_steps - whole).abs().max() < 1e-5 and (in_two - whole).abs().max() < 1e-5
    assert whole.abs().max() > 0.1


class FusedLinear:
    """Stand for Transformer Engine's linear layer, which includes the norm before it."""


def specs_of_layers() -> list[tuple[bool, bool]]:
    """Return, for each layer of this rank's stage, whether it is a gated delta net, and whether its norm is apart."""
    models.build(model_config("gated_delta"), parallel(pp=2))
    config = transformer_config(model_config("gated_delta"), parallel(pp=2), OptimizerConfig(), ScheduleConfig())
    with pytest.MonkeyPatch.context() as patch:
        linears = GatedDeltaNetSubmodules(FusedLinear, out_proj=FusedLinear)
        patch.setattr(gated_delta_net, "_linears", lambda _: linears)
        block = layer_spec(config, transformer_engine=False)
        gated_delta_net.place_gated_delta_nets(block, config, None, transformer_engine=True)
    parts = [spec.submodules for spec in block.layer_specs]
    return [(p.self_attention.module is GatedDeltaNet, p.input_layernorm is not IdentityOp) for p in parts]


def test_every_second_layer_has_a_gated_delta_net_whose_projection_may_include_the_norm(ranks):
    expected = [(True, False), (False, True)]
    assert ranks.run(specs_of_layers, world_size=2) == [expected, expected]


BF16 = SimpleNamespace(params_dtype=torch.bfloat16, deterministic_mode=False)
FP32 = SimpleNamespace(params_dtype=torch.float32, deterministic_mode=False)
LIBRARY = ("fla", "fla.modules", "fla.modules.conv", "fla.ops", "fla.ops.gated_delta_rule")


@pytest.fixture
def on_gpu(monkeypatch):
    """Let this module believe that it computes on a GPU, and return a function that installs the kernels."""
    monkeypatch.setattr(gated_delta_net, "cpu", SimpleNamespace(ON_CPU=False))

    def installed(version: str | None = "0.6.0", triton: str = "3.7.1", capability: tuple[int, int] = (9, 0)) -> None:
        for name in LIBRARY:
            module = ModuleType(name)
            module.__dict__.update(__version__=version, __path__=[], **vars(fla_stand_in))
            monkeypatch.setitem(sys.modules, name, None if version is None else module)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=triton))
        gated_delta_net.installed_kernels.cache_clear()

    yield installed
    gated_delta_net.installed_kernels.cache_clear()


def test_a_gpu_computes_with_the_installed_kernels_beside_a_triton_that_is_right_for_it(on_gpu):
    for others in ({}, {"triton": "3.3.1"}, {"triton": "3.9.0"}, {"triton": "3.6.0", "capability": (8, 0)}):
        on_gpu(**others)
        kernels = kernels_for(BF16)
        assert kernels.causal_conv1d is fla_stand_in.causal_conv1d
        assert kernels.chunk_gated_delta_rule is fla_stand_in.chunk_gated_delta_rule


REFUSED = [
    (BF16, {"version": None}, "need flash-linear-attention"),
    (BF16, {"version": "0.4.2"}, r"got 0\.4\.2"),  # Megatron Core's own extra installs it
    *((BF16, {"triton": triton}, f"got {triton}") for triton in ("3.4.0", "3.7.0")),
    (FP32, {}, r"optimizer\.precision=fp32"),
]
"""A configuration, what is installed, and what the refusal names."""


def test_what_is_missing_or_has_wrong_gradients_on_hopper_gpus_is_refused_but_for_the_deterministic_mode(on_gpu):
    for config, installed, named in REFUSED:
        on_gpu(**installed)
        with pytest.raises(ConfigError, match=rf"{named}.*model\.transformer\.deterministic_mode=true"):
            kernels_for(config)
        assert kernels_for(SimpleNamespace(**{**vars(config), "deterministic_mode": True})) is None
