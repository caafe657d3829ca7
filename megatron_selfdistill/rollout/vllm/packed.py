# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Pack the weights that vLLM keeps packed on a CPU and does not pack again when weights are replaced in place.

    before_reload(model)
    ...  # vLLM's reload_weights, or the steps of its layerwise reload
    after_reload(model)

On other devices nothing is packed: layers compute with the parameters themselves.  This module imports vLLM and never
Megatron.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from megatron_selfdistill.rollout.vllm.gpt_oss_loading import load_through_loaders
from megatron_selfdistill.rollout.vllm.reload_in_place import reload_in_place


def before_reload(model: torch.nn.Module) -> None:
    """Let experts be packed as at their first load, and let vLLM load into the memory that layers have.

    An expert layer that has a kernel counts as ready, so that vLLM would read plain weights as packed ones.  On every
    device vLLM loads into the memory that the layers have (reload_in_place.py).
    """
    reload_in_place()
    load_through_loaders(model)
    if current_platform.is_cpu():
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, UnquantizedFusedMoEMethod):
                method.moe_kernel = None


def after_reload(model: torch.nn.Module) -> None:
    """Pack the output layer of a model with tied embeddings.

    Its weights arrive under the embedding's name, so that vLLM counts the layer as not loaded and would use the weights
    of the start for ever.
    """
    if current_platform.is_cpu():
        for module in model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
