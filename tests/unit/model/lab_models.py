# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The models of a lab: ``model_provider`` functions with Megatron-LM's signature, some of them wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import models
import torch

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.ssm.gated_delta_net import GatedDeltaNet

from megatron_selfdistill.config import OptimizerConfig, ScheduleConfig
from megatron_selfdistill.model.architecture import layer_spec, transformer_config


def model_provider(
    pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **changes: Any
) -> GPTModel:
    """Return the tests' model with grouped queries, with the parallel sizes of Megatron's own state."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    parallel = models.parallel(
        tp=tp,
        pp=parallel_state.get_pipeline_model_parallel_world_size(),
        vpp=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        cp=parallel_state.get_context_parallel_world_size(),
        sp=tp > 1,
    )
    model, parallel = models.model_config("gqa"), dataclasses.replace(parallel, **changes)
    config = transformer_config(model, parallel, OptimizerConfig(precision="fp32"), ScheduleConfig())
    sizes = {"vocab_size": 64, "max_sequence_length": model.max_position_embeddings}
    options = {"share_embeddings_and_output_weights": False, "position_embedding_type": "rope", "vp_stage": vp_stage}
    stage = {"pre_process": pre_process, "post_process": post_process}
    return GPTModel(config, layer_spec(config, vp_stage), **sizes, **stage, **options)


def without_vp_stage(pre_process: bool = True, post_process: bool = True) -> GPTModel:
    """Return a model with the signature of older versions of Megatron-LM."""
    return model_provider(pre_process, post_process)


def with_keywords(**keywords: Any) -> GPTModel:
    """Return a model from any keyword arguments."""
    return model_provider(**keywords)


class SoftCapped(GPTModel):
    def _postprocess(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 30 * torch.tanh(super()._postprocess(*args, **kwargs) / 30)


def with_megatrons_layer(gpt: GPTModel) -> None:
    """Give a model a layer of Megatron Core, which only a GPU with flash-linear-attention can make whole."""
    gpt.decoder.layers[0].self_attention = layer = GatedDeltaNet.__new__(GatedDeltaNet)
    torch.nn.Module.__init__(layer)


def changed(change: Callable[[GPTModel], object]) -> Callable[[bool, bool], GPTModel]:
    """Return a provider whose model has a change."""

    def provider(pre_process: bool, post_process: bool) -> GPTModel:
        gpt = model_provider(pre_process, post_process)
        change(gpt)
        return gpt

    return provider


of_another_context_parallel_size = partial(model_provider, context_parallel_size=2)
without_sequence_parallelism = partial(model_provider, sequence_parallel=False)
of_another_expert_parallel_size = changed(lambda gpt: setattr(gpt.config, "expert_model_parallel_size", 2))
that_gathers_its_logits = changed(lambda gpt: setattr(gpt, "parallel_output", False))
with_dropout = changed(lambda gpt: setattr(gpt.config, "hidden_dropout", 0.1))
with_megatrons_gated_delta_net = changed(with_megatrons_layer)
that_caps_its_logits = changed(lambda gpt: setattr(gpt, "__class__", SoftCapped))
with_scaled_logits = changed(lambda gpt: setattr(gpt.config, "use_mup", True))
not_a_function = 3


def returns_a_list(pre_process: bool, post_process: bool) -> list[GPTModel]:
    return [model_provider(pre_process, post_process)]
