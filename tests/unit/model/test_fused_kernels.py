# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Kernels are fused only where Megatron Core takes them, and an MLP is the same function with them and without."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
import megatron.core.models.common.embeddings.rope_utils as rope_utils
import megatron.core.transformer.moe.moe_utils as moe_utils
import megatron.core.transformer.transformer_config as megatron_config
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_selfdistill.compat.older_megatron import submodules_of
from megatron_selfdistill.config import ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig, YarnConfig
from megatron_selfdistill.distributed.ranks import initialize
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model import architecture, build
from megatron_selfdistill.model import fused_kernels as fused_kernels_module
from megatron_selfdistill.model.architecture import transformer_config
from megatron_selfdistill.model.fused_kernels import ACTIVATIONS, activation_name


@dataclasses.dataclass(frozen=True)
class Node:
    """The packages that a rank finds."""

    cuda: bool = False
    te: bool = False
    apex: bool = False
    te_minor: int = 11
    """The n of Transformer Engine's version 2.n."""


NODES = {"CPU": Node(), "GPU": Node(cuda=True), "GPU, apex": Node(cuda=True, apex=True), "GPU, TE": Node(True, True)}
PERMUTATIONS = (
    "fused_permute fused_permute_with_probs fused_unpermute fused_sort_chunks_by_index "
    "fused_sort_chunks_by_index_with_probs"
).split()
"""The functions of Transformer Engine without which Megatron Core refuses ``moe_permute_fusion``."""


def believe(patch: pytest.MonkeyPatch, node: Node) -> None:
    """Let this process take itself for ``node``, as far as configurations go."""
    patch.setattr(architecture.cpu, "ON_CPU", not node.cuda)
    patch.setattr(architecture, "uses_transformer_engine", lambda: node.te)
    patch.setattr(layers, "_grad_accum_fusion_available", node.apex)
    if node.te:
        patch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object())
        patch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", object())
        patch.setattr(megatron_config, "is_te_min_version", lambda *_, **__: True)
        patch.setattr(
            fused_kernels_module, "is_te_min_version", lambda version: node.te_minor >= int(version.split(".")[1])
        )
        for name in PERMUTATIONS:
            patch.setattr(moe_utils, name, object(), raising=False)


def configured(model: ModelConfig, node: Node, precision: str = "fp32") -> TransformerConfig:
    with pytest.MonkeyPatch.context() as patch:
        believe(patch, node)
        return transformer_config(model, ParallelConfig(), OptimizerConfig(precision=precision), ScheduleConfig())


def models() -> list[ModelConfig]:
    """Return every combination of the settings that Megatron Core's checks of fused kernels read."""
    yarn = {"multi_latent_attention": True, "rope_type": "yarn"}
    changes = [{}, {"rotary_interleaved": True}, {**yarn, "rope_type": "rope"}, yarn]
    changes += [{**yarn, "qk_pos_emb_head_dim": 6}, {**yarn, "cache_mla_latents": True}, {"glu_linear_offset": 1.0}]
    changes += [{"activation_func_clamp_value": 7.0}, {"use_te_activation_func": True}]
    found = []
    for activation, gated, biased, moe in itertools.product(ACTIVATIONS, (False, True), (False, True), (None, 4)):
        plain = ModelConfig(activation=activation, gated_linear_unit=gated, add_bias_linear=biased)
        plain = dataclasses.replace(plain, num_moe_experts=moe, num_layers=2)
        for change in changes:
            if not (change.get("use_te_activation_func") and activation in ("gelu_tanh", "quick_gelu")):
                found.append(dataclasses.replace(plain, transformer=change))  # which Transformer Engine lacks
    return found


def test_no_combination_is_refused_on_a_gpu_that_a_cpu_takes_and_the_activation_is_the_one_that_is_named():
    for model, node in itertools.product(models(), NODES.values()):
        assert activation_name(configured(model, node)) == model.activation
    provided = configured(ModelConfig(), Node())
    provided.activation_func = F.relu
    assert activation_name(provided) is None


def test_what_is_fused_on_a_gpu_with_transformer_engine():
    swiglu, moe = configured(ModelConfig(), NODES["GPU, TE"]), ModelConfig(num_moe_experts=4)
    assert swiglu.bias_activation_fusion and swiglu.bias_dropout_fusion and swiglu.apply_rope_fusion
    assert swiglu.gradient_accumulation_fusion and swiglu.persist_layer_norm and not swiglu.moe_grouped_gemm
    assert configured(moe, NODES["GPU, TE"]).moe_grouped_gemm and not configured(moe, NODES["GPU"]).moe_grouped_gemm
    unrotated = dataclasses.replace(ModelConfig(), transformer={"rotary_interleaved": True})
    assert not configured(unrotated, NODES["GPU, TE"]).apply_rope_fusion
    yarn = ModelConfig(position_embedding_type="yarn", yarn=YarnConfig(rotary_scaling_factor=4.0))
    assert not configured(yarn, NODES["GPU, TE"]).apply_rope_fusion
    latent = {"multi_latent_attention": True, "rope_type": "yarn"}
    assert configured(dataclasses.replace(moe, transformer=latent), NODES["GPU, TE"]).apply_rope_fusion


def test_tokens_are_sorted_by_expert_in_a_kernel_wherever_a_working_one_is():
    """The kernels of Transformer Engine 2.9 call a function of triton that triton 3.5 changed."""
    moe = ModelConfig(num_moe_experts=4)
    found = {name: configured(moe, node).moe_permute_fusion for name, node in NODES.items()}
    assert found == {"CPU": False, "GPU": False, "GPU, apex": False, "GPU, TE": True}
    for te_minor, fused in ((9, False), (10, True)):
        assert configured(moe, Node(True, True, te_minor=te_minor)).moe_permute_fusion is fused
    unasked = dataclasses.replace(moe, transformer={"moe_permute_fusion": False})
    for model in (ModelConfig(), unasked):
        assert not configured(model, NODES["GPU, TE"]).moe_permute_fusion
    assert not build._for_local_layers(configured(moe, NODES["GPU, TE"])).moe_permute_fusion
    assert not any(configured(moe, node).moe_router_fusion for node in NODES.values()), "its scores are no float32"


def test_grouped_experts_with_biases_come_without_the_fusion_that_megatron_refuses_beside_them():
    """As ``TEGroupedMLP`` asserts when it is built."""
    config = configured(ModelConfig(num_moe_experts=4, add_bias_linear=True), NODES["GPU, TE"])
    assert config.moe_grouped_gemm and not (config.add_bias_linear and config.bias_dropout_fusion)
    assert configured(ModelConfig(add_bias_linear=True), NODES["GPU, TE"]).bias_dropout_fusion


def exact(activation: str, x: Tensor) -> Tensor:
    """Return the activation that ``model.activation`` names, from its formula."""
    return {
        "silu": lambda: x / (1 + (-x).exp()),
        "gelu": lambda: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "quick_gelu": lambda: x / (1 + (-1.702 * x).exp()),
        "gelu_tanh": lambda: x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    }[activation]()


def mlp_errors() -> dict[str, float]:
    """Return the largest differences of output and input gradient of Megatron's MLP from float64."""
    initialize(ParallelConfig(), seed=1)
    plain = [model for model in models() if not model.num_moe_experts and not model.transformer]
    return dict(mlp_error(*case) for case in itertools.product(plain, ("CPU", "GPU")))


def mlp_error(model: ModelConfig, node: str) -> tuple[str, float]:
    config = configured(model, NODES[node])
    torch.manual_seed(0)
    mlp = MLP(config, submodules_of(get_mlp_module_spec(use_te=False)))
    for param in mlp.parameters():
        torch.nn.init.normal_(param, std=0.3)
    x = torch.randn(5, 1, config.hidden_size, requires_grad=True)
    out, bias = mlp(x)
    out = out if bias is None else out + bias
    out.square().sum().backward()
    x64 = x.detach().double().requires_grad_()
    w = {key: value.detach().double() for key, value in mlp.named_parameters()}
    hidden = F.linear(x64, w["linear_fc1.weight"], w.get("linear_fc1.bias"))
    gate, up = hidden.chunk(2, dim=-1) if model.gated_linear_unit else (hidden, 1)
    expected = F.linear(exact(model.activation, gate) * up, w["linear_fc2.weight"], w.get("linear_fc2.bias"))
    expected.square().sum().backward()
    pairs = [(out.detach(), expected.detach()), (x.grad, x64.grad)]
    words = ["gated" if model.gated_linear_unit else "plain", "biased" if model.add_bias_linear else "bare", node]
    words.append("fused" if config.bias_activation_fusion else "unfused")
    error = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)
    return " ".join([model.activation, *words]), error


def test_an_mlp_is_the_same_function_on_a_gpu_as_on_a_cpu(ranks):
    """The fused kernel of gelu is the tanh approximation, 1e-3 away from the exact function."""
    (errors,) = ranks.run(mlp_errors, world_size=1)
    assert len(errors) == 2 * len(ACTIVATIONS) * 4
    assert not {name: error for name, error in errors.items() if error > 1e-5}
    fused = ["silu gated bare", "silu gated biased", "gelu_tanh gated bare", "gelu_tanh gated biased"]
    expected = {f"{name} GPU fused" for name in (*fused, "gelu_tanh plain biased")}
    assert {name for name in errors if name.endswith(" fused")} == expected


UNFUSABLE = {
    "gelu_tanh": {"activation": "gelu"},
    "gated MLP only": {"gated_linear_unit": False},
    "biases only": {"activation": "gelu_tanh", "gated_linear_unit": False},
    "gated silu only": {"activation": "gelu_tanh", "num_moe_experts": 4},
    "quick_gelu": {"activation": "quick_gelu", "num_moe_experts": 4},
    "experts with biases": {"num_moe_experts": 4, "add_bias_linear": True},
}
"""What a refusal says of the kernel -> the model."""


def test_a_fused_activation_that_would_compute_something_else_is_refused():
    for reason, changes in UNFUSABLE.items():
        model = ModelConfig(**changes, transformer={"bias_activation_fusion": True})
        with pytest.raises(ConfigError, match=f"^model.transformer.bias_activation_fusion=true .*{reason}"):
            configured(model, NODES["GPU, TE"])
