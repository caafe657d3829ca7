# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The values that keys of the configuration can take, each list once: the schema checks them and the code uses them.

This file imports nothing, so that the schema can be read where torch is not installed.
"""

from __future__ import annotations

TARGET_RULES = ("entropy_matched", "fixed", "batch", "teacher_alone")
"""Values of target.rule: how k, the temperature of the mix, is found."""

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
"""Values of loss.divergence."""

LOSS_BACKENDS = ("torch", "triton")
"""Values of loss.backend; null chooses one of them."""

FUSED_MODES = ("keep_gradient", "low_memory")
"""Values of loss.fused under which the output layer and the loss are computed together, fastest first."""

LOSS_FUSED = ("none", *FUSED_MODES)
"""Values of loss.fused; null chooses one of them by the memory that the logits take."""
