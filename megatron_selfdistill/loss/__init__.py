# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The loss of self-distillation: the mixed target, the divergences, and both over a tensor-parallel group.

`definition` is the definition on full rows of logits, to be read.
`sharded.vocab_parallel` computes the same on vocabulary shards, and `sharded.fused_linear` the same from hidden states:
both are to be used.  `functional` has both in one call with the conventions of trainers.
README.md in this directory has the formula, the passes and the table of PyTorch files and their twins in kernels.
The loss imports torch, the package's lists of choices and the doors of its annexes only.
"""

from __future__ import annotations

from megatron_selfdistill.loss.batch_k import solve_batch_k
from megatron_selfdistill.loss.definition import TargetDistribution, divergence, divergence_gradient, mixed_target
from megatron_selfdistill.loss.functional import linear_self_distillation_loss, self_distillation_loss
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss
from megatron_selfdistill.loss.sharded.shard_sums import beta_grid
from megatron_selfdistill.loss.sharded.target_solution import TargetSolution, solve_target
from megatron_selfdistill.loss.sharded.vocab_parallel import TokenStats, VocabShard, distillation_loss
from megatron_selfdistill.loss.target import Divergence, Status, Target

__all__ = [
    "Divergence",
    "Status",
    "Target",
    "TargetDistribution",
    "TargetSolution",
    "TokenStats",
    "VocabShard",
    "beta_grid",
    "distillation_loss",
    "divergence",
    "divergence_gradient",
    "fused_distillation_loss",
    "linear_self_distillation_loss",
    "mixed_target",
    "self_distillation_loss",
    "solve_batch_k",
    "solve_target",
]
