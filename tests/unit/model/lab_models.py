# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The models of a lab: ``model_provider`` functions with Megatron-LM's signature, some of them wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import models
import torch

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.ssm.gated_delta_net import GatedDeltaNet

from megatron_selfdistill.config import OptimizerConfig, ParallelConfig, ScheduleConfig
from megatron_selfdistill.model.architecture import layer_spec, transformer_config


def model_provider(
    pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **changes: Any
) -> GPTModel:
    """Return the tests' model with grouped queries, with the parallel sizes of Megatron's own state."""
    vpp = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    tp = parallel_state.get_tensor_model_parallel_world_size()
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        sequence_parallel=tp > 1,
    )
    model = models.model_config("gqa")
    config = transformer_config(
        model, dataclasses.replace(parallel, **changes), OptimizerConfig(precision="fp32"), ScheduleConfig()
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(config, vp_stage),
        vocab_size=64,
        max_sequence_length=model.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        vp_stage=vp_stage,
    )


def without_vp_stage(pre_process: bool = True, post_process: bool = True) -> GPTModel:
    """Return a model with the signature of older versions of Megatron-LM."""
    return model_provider(pre_process, post_process)


def with_keywords(**keywords: Any) -> GPTModel:
    """Return a model from any keyword arguments."""
    return model_provider(**keywords)


def of_another_context_parallel_size(pre_process: bool, post_process: bool) -> GPTModel:
    return model_provider(pre_process, post_process, context_parallel_size=2)


def without_sequence_parallelism(pre_process: bool, post_process: bool) -> GPTModel:
    return model_provider(pre_process, post_process, sequence_parallel=False)


def of_another_expert_parallel_size(pre_process: bool, post_process: bool) -> GPTModel:
    gpt = model_provider(pre_process, post_process)
    gpt.config.expert_model_parallel_size = 2
    return gpt


def that_gathers_its_logits(pre_process: bool, post_process: bool) -> GPTModel:
    gpt = model_provider(pre_process, post_process)
    gpt.parallel_output = False
    return gpt


def with_dropout(pre_process: bool, post_process: bool) -> GPTModel:
    gpt = model_provider(pre_process, post_process)
    gpt.config.hidden_dropout = 0.1
    return gpt


def with_megatrons_gated_delta_net(pre_process: bool, post_process: bool) -> GPTModel:
    """Return a model with a layer of Megatron Core, which only a GPU with flash-linear-attention can make whole."""
    gpt = model_provider(pre_process, post_process)
    layer = GatedDeltaNet.__new__(GatedDeltaNet)
    torch.nn.Module.__init__(layer)
    gpt.decoder.layers[0].self_attention = layer
    return gpt


class SoftCapped(GPTModel):
    def _postprocess(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 30 * torch.tanh(super()._postprocess(*args, **kwargs) / 30)


def that_caps_its_logits(pre_process: bool, post_process: bool) -> GPTModel:
    gpt = model_provider(pre_process, post_process)
    gpt.__class__ = SoftCapped
    return gpt


def with_scaled_logits(pre_process: bool, post_process: bool) -> GPTModel:
    """Return a model with use_mup, with which later versions of Megatron Core scale the logits."""
    gpt = model_provider(pre_process, post_process)
    gpt.config.use_mup = True
    return gpt


def no_gpt(pre_process: bool, post_process: bool) -> torch.nn.Module:
    return torch.nn.Linear(2, 2)


def returns_a_list(pre_process: bool, post_process: bool) -> list[GPTModel]:
    return [model_provider(pre_process, post_process)]


not_a_function = 3
