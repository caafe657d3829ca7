# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The loss in the place of the output layer: the weight, the wait for its gather, and the place of its gradient.

`choose_output_layer` chooses whether a run fuses them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import layers

from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss
from megatron_selfdistill.loss.sharded.vocab_parallel import NO_OPTIONS, TokenOptions, TokenStats, VocabShard
from megatron_selfdistill.loss.target import Divergence, Target
from megatron_selfdistill.model.forward import Fusion, ResponsePositions, states_at


@dataclass(frozen=True)
class FusedLoss:
    """The distillation loss from hidden states, for a schedule that does not compute logits."""

    target: Target
    divergence: Divergence
    fusion: Fusion
    backend: str | None = None
    """The backend of `distillation_loss`; None chooses it."""

    def __call__(
        self,
        student: GPTModel,
        teacher: GPTModel | Tensor,
        hidden: Tensor,
        positions: ResponsePositions,
        teacher_hidden: Tensor,
        response_tokens: Tensor,
        vocab: VocabShard,
        grid: RankGrid,
        reference: tuple[GPTModel, Tensor] | None = None,
        controls: Tensor | None = None,
        options: TokenOptions = NO_OPTIONS,
    ) -> TokenStats:
        """Return the statistics of the tokens, equal to `project` for both models and `distillation_loss`.

        The gradients to ``hidden [s / cp (/ tp), 1, h]`` and to the student's output weight are also equal.
        ``student``, ``teacher``: the models of the last stage, one object where the current weights teach; in place of
        a teacher the output weight ``[v / tp, n h]`` of n teachers, whose states are ``[R, n h / tp]``.
        ``teacher_hidden [R, h / tp]``: this tensor-parallel rank's slice of the width.  ``reference``: the model and
        the states ``[R, h / tp]`` of a reference whose weights are not the teacher's.  ``controls [K, R, h / tp]``: the
        states of the teacher after the prompts of the controls.
        Collectives over TP: see `fused_distillation_loss`.  With sequence parallelism the hidden states at response
        positions are gathered, and their gradient is reduce-scattered.
        """
        cut = positions.own
        own = states_at(hidden, positions.in_sequence, grid) if cut is None else hidden.index_select(0, cut)
        weight, teacher_weight = output_weight(student, own), None
        if teacher is not student:
            teacher_weight = teacher if isinstance(teacher, Tensor) else output_weight(teacher, own)
        return fused_distillation_loss(
            own.squeeze(1),
            teacher_hidden,
            weight,
            teacher_weight,
            response_tokens,
            target=self.target,
            divergence=self.divergence,
            vocab=vocab,
            reference_entropy=options.reference_entropy,
            reference=None if reference is None else (reference[1], output_weight(reference[0], own)),
            control_hidden=controls,
            teacher_weights=options.teacher_weights,
            chunk_tokens=self.fusion.chunk_tokens,
            mode=self.fusion.mode,
            gather_indices=positions.gathered,
            weight_gradient=MainGrad.of(weight, student.output_layer),
            observe=options.observe,
            backend=self.backend,
        )


def output_weight(model: GPTModel, hidden: Tensor) -> Tensor:
    """Return the output weight ``[v / tp, h]``, tied or not, as soon as it may be read.

    The function calls the output layer as a module, so that DDP's hook waits for the bucket of the weight
    (overlap_param_gather); the layer then returns its weight instead of the logits of ``hidden``.
    """
    layer = model.output_layer
    shared = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    with _forward_of(layer, lambda hidden, weight: layer.weight if weight is None else weight):
        weight: Tensor = layer(hidden, weight=shared)
    return weight


@contextlib.contextmanager
def _forward_of(layer: torch.nn.Module, forward: Callable[[Tensor, Tensor | None], Any]) -> Iterator[None]:
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


@dataclass(frozen=True)
class MainGrad:
    """A `WeightGradient` that adds the gradient of each chunk of tokens to DDP's float32 ``main_grad``.

    Under ``gradient_accumulation_fusion`` apex's kernel adds the gradient, as in `ColumnParallelLinear`; else the
    gradient is rounded once to the weight's dtype, as by DDP's hook.  Autograd receives a tensor of the right shape, so
    that the hook runs, and a flag makes the hook ignore the tensor.
    """

    weight: Any
    by_kernel: bool
    """Whether apex's kernel adds the gradient."""

    @classmethod
    def of(cls, weight: Any, layer: torch.nn.Module) -> MainGrad | None:
        """Return the gradient of ``weight``; None for a weight without DDP, whose gradient autograd accumulates."""
        if not hasattr(weight, "grad_added_to_main_grad"):
            return None
        return cls(weight, bool(layer.gradient_accumulation_fusion))

    def add(self, hidden: Tensor, gradient: Tensor) -> None:
        """Add ``gradient^T hidden``, of the gradient of the logits and the hidden states of a chunk."""
        if self.by_kernel:
            layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(hidden, gradient, self.weight.main_grad)
        else:
            self.weight.main_grad.add_(gradient.t().mm(hidden))

    def for_autograd(self) -> Tensor | None:
        """Return the tensor that backward gives to autograd in place of the gradient."""
        weight = self.weight
        weight.grad_added_to_main_grad = True
        # With tied weights on one stage autograd adds the embedding's gradient, and DDP's hook adds the sum.
        zeros = getattr(weight, "zero_out_wgrad", False)
        if layers.HAVE_TE:
            dummy: Tensor = layers.get_dummy_wgrad(list(weight.main_grad.shape), weight.dtype, zero=zeros)
            return dummy
        make = torch.zeros if zeros else torch.empty
        return make(weight.main_grad.shape, dtype=weight.dtype, device=weight.device)
