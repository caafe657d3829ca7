# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The costs of a node's first use, paid before the clock of the checks starts: NCCL, compilers and libraries."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
import torch.distributed as dist

from megatron_selfdistill.compat import cpu
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.selftest.sharded_loss import DIVERGENCES, GRADIENT_BOUNDS, TARGETS, VOCAB_SIZE, errors
from megatron_selfdistill.selftest.tiny import LaunchUnderTest
from megatron_selfdistill.selftest.training import new_pair

COLLECTIVE = "the first collective (no compiler runs there: the ranks do not reach each other)"
FUNCTIONS = "the first training step (Inductor compiles Megatron's functions: 10 to 40 s, or a collective hangs)"
KERNELS = "the first loss (Triton compiles its kernels: about a CPU second each, or their cache's disk is slow)"


def warm_up(launch: LaunchUnderTest, phase: Callable[[str], None]) -> None:
    """Run once, on all ranks, the operations of the checks: a collective, a training step, and the loss of every kind.

    ``phase`` is called with a message when each of the three begins.  Collective.
    """
    phase(COLLECTIVE)
    cuts = launch.cut(tp=launch.largest_tp)
    pair, _ = new_pair(launch, cuts)
    dist.all_reduce(torch.zeros(1, device=pair.grid.device))
    if not cpu.ON_CPU:
        torch.cuda.synchronize()
    phase(FUNCTIONS)
    batch = pair.packed(same_prompt=False)
    pair.step(batch, Target(), DIVERGENCES["reverse KL"], "teacher_first")
    phase(KERNELS)
    vocab = VocabShard.from_group(launch.padded_vocab_size(VOCAB_SIZE, pair.grid), VOCAB_SIZE, pair.grid.tp_group)
    for dtype, target, divergence in product(GRADIENT_BOUNDS, TARGETS.values(), DIVERGENCES.values()):
        errors(dtype, target, divergence, vocab, pair.grid.device)
