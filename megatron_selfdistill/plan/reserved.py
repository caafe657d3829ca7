# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The memory of a GPU that no tensor of a run holds: CUDA, NCCL's communicators, an engine's graphs, fragmentation.

    reserved = `CONTEXT_GIB` + `COMMUNICATOR_GIB` * communicators of the rank + `graphs_gib` of a colocated engine

The numbers of GiB are assumptions, which nobody has measured for this project.  NCCL gives a communicator its buffers
at its first collective, so only groups that a step uses count.
"""

from __future__ import annotations

from megatron_selfdistill.config import Config
from megatron_selfdistill.plan.stages import Stage

CONTEXT_GIB = 3.0
"""The GiB of CUDA's context, the libraries' workspaces and fragmentation."""
COMMUNICATOR_GIB = 0.3
"""The GiB of the buffers of one communicator of NCCL."""
_LAYERS_PER_GIB = 36


def reserved_gib(config: Config, stage: Stage, num_layers: int) -> float:
    """Return the GiB that a rank of ``stage`` holds besides tensors; ``num_layers``: those of the whole model."""
    held = CONTEXT_GIB + COMMUNICATOR_GIB * len(communicators(config, stage))
    return held + (graphs_gib(num_layers) if _is_colocated(config) else 0.0)


def graphs_gib(num_layers: int) -> float:
    """Return the GiB of the CUDA graphs of a vLLM engine: 1 to 3, by the layers of its model.

    The graphs stay when the engine sleeps.
    """
    return min(max(num_layers / _LAYERS_PER_GIB, 1.0), 3.0)


def communicators(config: Config, stage: Stage) -> dict[str, int]:
    """Return the groups with collectives in a step of a rank of ``stage`` -> their sizes; groups of one rank have none.

    The names are those of Megatron's groups.  A colocated engine adds the group of its own ranks, and servers that
    receive weights add the group of a sender and its receivers.
    """
    p, num_gpus = config.parallel, config.cluster.num_gpus or 1
    tp, pp, cp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size
    ep, etp = p.expert_model_parallel_size, p.expert_tensor_parallel_size or tp
    distributed = config.optimizer.use_distributed_optimizer
    sizes = {
        "world": num_gpus,
        "tensor": tp,
        "pipeline": pp,
        "context": cp,
        "data": num_gpus // (tp * pp * cp),
        "data with context": stage.dp_cp_size,
        # The norm of the gradient is a sum over the ranks that share an optimizer.
        "optimizer instance": num_gpus if distributed else tp * pp,
        "embedding": pp if config.model.share_embeddings_and_output_weights and (stage.embeds or stage.projects) else 1,
    }
    if config.model.num_moe_experts:
        sizes |= {
            "expert": ep,
            "expert tensor": etp,
            "expert tensor and expert": etp * ep,
            "expert data": stage.expert_dp_size,
        }
    if _is_colocated(config):
        sizes["engine"] = config.rollout.engine_tp
    elif config.samples and config.rollout.engine == "vllm" and config.rollout.transfer in (None, "nccl"):
        sizes["weights to servers"] = 1 + config.rollout.engine_tp
    return {name: size for name, size in sizes.items() if size > 1}


def _is_colocated(config: Config) -> bool:
    return config.samples and config.rollout.engine == "vllm" and config.rollout.placement == "colocated"
