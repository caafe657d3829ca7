# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Megatron's output layer under the fused loss: which weight, who waits for it, where its gradient goes; and whether it
is fused at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import layers

from megatron_selfdistill.choices import FUSED_MODES
from megatron_selfdistill.config import Config
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.loss.divergence import Divergence
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss
from megatron_selfdistill.loss.sharded.vocab_parallel import TokenStats, VocabShard
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.model.forward import rows_at

MATERIALISED = "materialised"
DEFAULT_LOGITS_SHARE = 1 / 20
"""Of ``cluster.gpu_memory_gb``: what materialised logits may take where ``loss.max_logits_gb`` is null."""


@dataclass(frozen=True)
class Fusion:
    """How the output layer is fused with the loss: of loss/sharded/fused_linear.py."""

    mode: str
    chunk_tokens: int


@dataclass(frozen=True)
class ResponsePositions:
    """Where the hidden states that predict R response tokens lie in a context-parallel rank's share of a microbatch."""

    whole: Tensor
    """[R] int64: in the sequence, which sequence parallelism cuts over the tensor-parallel ranks."""
    own: Tensor | None = None
    """[n] int64, under sequence parallelism: in this rank's cut, the positions of its own R / tp states, more or less.
    n is the most that any rank has; a rank with fewer repeats its first position, which no token needs again."""
    gathered: Tensor | None = None
    """[R] int64, with ``own``: where each token's state lies in the ranks' concatenation of their n."""

    @classmethod
    def on_host(cls, whole: Tensor, num_positions: int, grid: RankGrid) -> ResponsePositions:
        """Return the positions ``whole`` of a share of ``num_positions``, all tensors on the host."""
        if not grid.sequence_parallel or grid.tp_size == 1:
            return cls(whole)
        cut = num_positions // grid.tp_size
        owner, position = whole // cut, whole % cut
        counts = torch.bincount(owner, minlength=grid.tp_size)
        by_owner = torch.argsort(owner, stable=True)
        place = torch.empty_like(whole)
        place[by_owner] = torch.arange(len(whole)) - (counts.cumsum(0) - counts)[owner[by_owner]]
        longest = int(counts.max())
        own = torch.zeros(longest, dtype=torch.int64)
        own[: counts[grid.tp_rank]] = position[by_owner[owner[by_owner] == grid.tp_rank]]
        return cls(whole, own, owner * longest + place)


@dataclass(frozen=True)
class FusedLoss:
    """The distillation loss of hidden rows, for a schedule that makes no logits."""

    target: Target
    divergence: Divergence
    fusion: Fusion
    backend: str | None = None
    """As for `distillation_loss`."""

    def __call__(
        self,
        student: GPTModel,
        teacher: GPTModel,
        hidden: Tensor,
        positions: ResponsePositions,
        teacher_hidden: Tensor,
        response_tokens: Tensor,
        vocab: VocabShard,
        grid: RankGrid,
    ) -> TokenStats:
        """Equals `project` of both and `distillation_loss`, with the same gradients to ``hidden [s / cp (/ tp), 1, h]``
        and to the student's output weight.

        student, teacher: the models of the last stage; the same one where current weights teach.
        teacher_hidden: [R, h / tp], this tensor-parallel rank's slice of the width.
        Collectives over TP: see `fused_distillation_loss`; with sequence parallelism hidden rows are gathered and their
        gradient is reduce-scattered, response positions only.
        """
        cut = positions.own
        own = rows_at(hidden, positions.whole, grid) if cut is None else hidden.index_select(0, cut)
        weight = output_weight(student, own)
        return fused_distillation_loss(
            own.squeeze(1),
            teacher_hidden,
            weight,
            None if teacher is student else output_weight(teacher, own),
            response_tokens,
            target=self.target,
            divergence=self.divergence,
            vocab=vocab,
            chunk_tokens=self.fusion.chunk_tokens,
            mode=self.fusion.mode,
            gather_indices=positions.gathered,
            weight_gradient=MainGrad.of(weight, student.output_layer),
            backend=self.backend,
        )


def output_weight(model: GPTModel, rows: Tensor) -> Tensor:
    """``[v / tp, h]``, tied or not, once it may be read: the output layer is called as a module, so that DDP's hook
    waits for its bucket (overlap_param_gather), but hands out its weight instead of the logits of ``rows``."""
    layer = model.output_layer
    shared = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    with _forward_of(layer, lambda rows, weight: layer.weight if weight is None else weight):
        return layer(rows, weight=shared)


@contextlib.contextmanager
def _forward_of(layer: torch.nn.Module, forward: Callable[[Tensor, Tensor | None], Any]) -> Iterator[None]:
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


@dataclass(frozen=True)
class MainGrad:
    """A `WeightGradient` that adds each chunk's to DDP's float32 ``main_grad``, in backward: by apex's kernel under
    ``gradient_accumulation_fusion``, as `ColumnParallelLinear` does, else rounded once to the weight's dtype, as DDP's
    hook does.  Autograd is handed a tensor of the right shape, so that the hook fires, and the hook is told not to add
    it."""

    weight: Any
    by_kernel: bool

    @classmethod
    def of(cls, weight: Any, layer: torch.nn.Module) -> MainGrad | None:
        """None for a weight that DDP has not wrapped: its gradient is autograd's."""
        if not hasattr(weight, "grad_added_to_main_grad"):
            return None
        return cls(weight, bool(layer.gradient_accumulation_fusion))

    def add(self, hidden: Tensor, gradient: Tensor) -> None:
        if self.by_kernel:
            layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(hidden, gradient, self.weight.main_grad)
        else:
            self.weight.main_grad.add_(gradient.t().mm(hidden))

    def for_autograd(self) -> Tensor | None:
        weight = self.weight
        weight.grad_added_to_main_grad = True
        # Tied on one stage: autograd adds the embedding's gradient to this one, and DDP's hook adds the sum.
        zeros = getattr(weight, "zero_out_wgrad", False)
        if layers.HAVE_TE:
            return layers.get_dummy_wgrad(list(weight.main_grad.shape), weight.dtype, zero=zeros)
        make = torch.zeros if zeros else torch.empty
        return make(weight.main_grad.shape, dtype=weight.dtype, device=weight.device)


def unfusable(model: GPTModel) -> str | None:
    """Why the output layer of a last stage cannot be fused, in a clause; None where it can."""
    layer = model.output_layer
    if type(layer).forward is not layers.ColumnParallelLinear.forward or "forward" in vars(layer):
        return f"its {type(layer).__name__} does more than multiply by its weight"
    if layer.bias is not None:
        return "it has a bias"
    if layer.gather_output:
        return "it gathers its logits over the tensor-parallel ranks"
    if layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "it has hooks that expect its logits"
    return None


@dataclass(frozen=True)
class OutputLayer:
    """What a run decided: ``mode`` is `MATERIALISED` or one of `choices.FUSED_MODES`."""

    mode: str
    chunk_tokens: int
    streams: int
    """Models whose logits the loss reads: student and teacher, or the student alone."""
    row_bytes: int
    """Of one row of logits on one rank."""
    max_rows: int
    """Response tokens of a microbatch on one rank, at most."""
    note: str = ""
    copies: float = 1.0
    """Rows of logits that exist at a time for each that the model makes, where they are materialised."""

    @property
    def largest(self) -> float:
        """Bytes of `logit_rows` of the largest microbatch."""
        return self.logit_rows(self.max_rows) * self.row_bytes

    @property
    def fusion(self) -> Fusion | None:
        """None where logits are materialised."""
        return None if self.mode == MATERIALISED else Fusion(self.mode, self.chunk_tokens)

    def logit_rows(self, tokens: float) -> float:
        """Rows of logits that exist at a time, gradient included, for so many response tokens."""
        chunk = min(self.chunk_tokens, tokens)
        rows = {
            MATERIALISED: self.streams * self.copies * tokens,
            "keep_gradient": tokens + chunk,
            "low_memory": 2 * chunk,
        }
        return rows[self.mode]

    def hidden_rows(self, tokens: float) -> float:
        """Rows of full width that they are projected from; fused, of a chunk the teacher's, and both joined."""
        return self.streams * tokens if self.fusion is None else tokens + 3 * min(self.chunk_tokens, tokens)

    def __str__(self) -> str:
        fused = f"fused with the loss in chunks of {self.chunk_tokens} tokens, {self.mode}"
        how = MATERIALISED if self.fusion is None else fused
        return f"output layer: {how}, at most {self.largest / 2**30:.2f} GiB of logits per microbatch{self.note}"


def next_token_copies(element_size: int) -> float:
    """Rows of logits that `schedule.next_token` holds for each row, of so many bytes an element: Megatron's cross
    entropy writes over float32 logits, and over a float32 copy of others; in backward their gradient stands beside it.
    """
    return 1.0 if element_size == 4 else 1.0 + 4 / element_size


def choose_output_layer(config: Config, padded_vocab_size: int, cannot: str | None = None) -> OutputLayer:
    """As ``loss.fused`` says.  Where it is null: materialised if the logits of the largest microbatch stay within
    ``loss.max_logits_gb``, else keep_gradient if that does, else low_memory.

    Depends on nothing but its arguments, so that all ranks choose alike.  ``cannot``: of `unfusable`.
    Raises: `ConfigError` where a fused layer is asked for and cannot be had.
    """
    loss, parallel = config.loss, config.parallel
    has_teacher = config.objective == "self_distillation"
    asked = loss.fused if loss.fused in FUSED_MODES else None
    if asked is not None and cannot is not None:
        raise ConfigError(
            f"loss.fused={asked} cannot be had with this model's output layer, because {cannot}: "
            "set loss.fused=none, or null"
        )
    element_size = 2 if config.optimizer.precision == "bf16" else 4
    layer = OutputLayer(
        mode=asked or MATERIALISED,
        chunk_tokens=loss.fused_chunk_tokens,
        streams=2 if has_teacher else 1,
        row_bytes=padded_vocab_size // parallel.tensor_model_parallel_size * element_size,
        max_rows=config.schedule.max_tokens // parallel.context_parallel_size,
        copies=1.0 if has_teacher else next_token_copies(element_size),
    )
    share = config.cluster.gpu_memory_gb * DEFAULT_LOGITS_SHARE
    limit = (share if loss.max_logits_gb is None else loss.max_logits_gb) * 2**30
    if loss.fused is not None or not has_teacher or layer.largest <= limit:
        return layer
    if cannot is not None:
        return replace(layer, note=f"; not fused, because {cannot}")
    keeping, small = (replace(layer, mode=mode) for mode in FUSED_MODES)
    if keeping.largest <= limit:
        return keeping
    if small.largest < layer.largest:
        return small
    return replace(layer, note=f"; chunks of loss.fused_chunk_tokens={loss.fused_chunk_tokens} would not need less")
