# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The values of keys that the schema and other packages read, each list once.

This file imports nothing, so that the schema can be read where torch is not installed.
"""

from __future__ import annotations

TARGET_RULES = ("entropy_matched", "fixed", "batch", "teacher_alone")
"""Values of target.rule, the rule for k, the temperature of the mix."""

GPU_MEMORY_GB = {"H100": 79.1, "H200": 139.7, "B200": 178.3}
"""Values of cluster.gpu -> the memory of such a GPU in GiB, as PyTorch reports it."""

GPUS = tuple(GPU_MEMORY_GB)
"""Values of cluster.gpu."""

ANCHORS = ("student", "reference")
"""Values of target.anchor, the model that the teacher is mixed with, and of target.match, whose entropy is matched."""

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
"""Values of loss.divergence."""
MAX_RENYI_ORDER = 4.0
"""The largest order of a Renyi divergence."""

LOSS_BACKENDS = ("torch", "triton")
"""Values of loss.backend; null chooses one of them."""

FUSED_MODES = ("keep_gradient", "low_memory")
"""Values of loss.fused under which the output layer and the loss are computed together, fastest first."""

FINISH_REASONS = ("stop", "length", "horizon")
"""The ways in which a response ends: with a stop token, at rollout.max_new_tokens, or before it at rollout.horizon."""

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu")
"""Values of model.activation."""

HINT_LEVELS = {"solution": "given", "answer": "answer", "other": "other", "none": "none"}
"""Name of a hint in commands that compare hints -> the value of data.solutions that shows it."""

SOLUTION_RANKINGS = ("shortest", "most_likely", "random", "learnable")
"""Values of method.pick of method.name=own_solutions, and of `selfdistill solutions --pick`."""

PRECISIONS = ("bf16", "fp32")
"""Values of optimizer.precision."""

LOGGERS = ("tensorboard", "wandb")
"""Values that metrics.loggers may hold besides dotted paths; each is also the name of the package that it needs."""
