# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Run a microbatch through a model chunk without its output layer, and compute logits or a fused loss from its states.

A fused loss takes the place of the output layer: `FusedLoss` connects both through the weight, the wait for its gather,
and the place of its gradient.  `choose_output_layer` chooses whether a run fuses them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, layers
from megatron.core.utils import get_attr_wrapped_model

from megatron_selfdistill.data.packed_batch import Microbatch
from megatron_selfdistill.data.packing import context_parallel_positions
from megatron_selfdistill.distributed.host_to_device import to_device_in_one_copy
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss
from megatron_selfdistill.loss.sharded.vocab_parallel import NO_OPTIONS, TokenOptions, TokenStats, VocabShard
from megatron_selfdistill.loss.target import Divergence, Target, split_divergence
from megatron_selfdistill.model.local_attention import PackedSequences


@dataclass(frozen=True)
class ModelInputs:
    """The inputs of the model for one microbatch: the share of this context-parallel rank, ``[1, s / cp]`` each."""

    tokens: Tensor
    position_ids: Tensor
    padding_mask: Tensor
    packed_seq_params: PackedSequences

    @classmethod
    def on_host(cls, microbatch: Microbatch, grid: RankGrid, *, local_attention: bool) -> ModelInputs:
        """Return the inputs of ``microbatch`` as host tensors, for `to_device_in_one_copy`.

        ``local_attention``: the result of `uses_local_attention`.
        """
        tensors = microbatch.tokens, microbatch.position_ids, microbatch.padding_mask
        if grid.cp_size > 1:
            held = context_parallel_positions(microbatch.cu_seqlens, grid.cp_size, grid.cp_rank)
            tensors = tensors[0][held], tensors[1][held], tensors[2][held]
        tokens, position_ids, padding_mask = tensors
        return cls(
            tokens=tokens.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            padding_mask=padding_mask.unsqueeze(0),
            packed_seq_params=PackedSequences.of(
                microbatch, position_ids, with_segment_batches=local_attention and grid.cp_size == 1
            ),
        )


def inputs_of(microbatch: Microbatch, grid: RankGrid) -> ModelInputs:
    """Return the inputs of one microbatch on the device, for a forward pass outside of the training schedule."""
    return to_device_in_one_copy(ModelInputs.on_host(microbatch, grid, local_attention=True), grid.device)


def unwrapped(chunk: torch.nn.Module) -> GPTModel:
    """Return the ``GPTModel`` inside DDP and ``Float16Module``."""
    return get_attr_wrapped_model(chunk, "decoder", return_model_obj=True)


def uses_local_attention(chunks: Sequence[torch.nn.Module]) -> bool:
    """Return whether any layer computes packed sequences in batches of segments (`model.layers.SegmentBatches`)."""
    modules = (module for chunk in chunks for module in chunk.modules())
    return any(getattr(module, "reads_segment_batches", False) for module in modules)


def hidden_states(chunk: torch.nn.Module, inputs: ModelInputs, grid: RankGrid) -> Tensor:
    """Return the chunk's hidden states ``[s / cp (/ tp), 1, h]`` before the output layer, in the parameters' dtype."""
    model = unwrapped(chunk)
    extra: dict[str, Any] = {}
    if model.config.num_moe_experts is not None:
        mask = inputs.padding_mask
        if grid.sequence_parallel and not model.pre_process:
            # Megatron cuts the mask in the first stage only; later stages receive cut activations and the full mask.
            mask = mask.chunk(grid.tp_size, dim=1)[grid.tp_rank]
        extra["padding_mask"] = mask
    if model.config.bf16:
        extra["fp32_output"] = False  # Float16Module would upcast the bf16 input of the output layer
    with _without_projection(model):
        hidden: Tensor = chunk(
            input_ids=inputs.tokens,
            position_ids=inputs.position_ids,
            attention_mask=None,
            packed_seq_params=inputs.packed_seq_params.with_positions(),
            **extra,
        )
    return hidden


@contextlib.contextmanager
def _without_projection(model: GPTModel) -> Iterator[None]:
    """Make ``GPTModel.forward`` return its final hidden states, after the final norm, while the context is open.

    The model returns them because it takes another stage to follow.  So every ``GPTModel`` works without a subclass.
    """
    post_process = model.post_process
    model.post_process = False
    try:
        yield
    finally:
        model.post_process = post_process


def states_at(hidden: Tensor, positions: Tensor, grid: RankGrid) -> Tensor:
    """Return ``hidden[positions]`` of the whole sequence, ``[R, 1, h]``, equal on all tensor-parallel ranks.

    ``positions [R]``: int64 on the device of ``hidden``.
    Collectives: under sequence parallelism an all-gather over TP, backward none.
    """
    if grid.sequence_parallel:
        # The output layer itself all-reduces the gradient of its input, so this gather must cut it without a sum.
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=grid.tp_group)
    return hidden.index_select(0, positions)


def project(model: GPTModel, hidden: Tensor) -> Tensor:
    """Return the vocabulary-parallel logits ``[R, v / tp]`` of the hidden states ``hidden [R, 1, h]``.

    The function calls the output layer as a module, so that DDP's parameter-gather hook runs, but without its
    sequence-parallel gather.
    """
    layer = model.output_layer
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    sequence_parallel = layer.sequence_parallel
    layer.sequence_parallel = False
    try:
        logits: Tensor = layer(hidden, weight=weight)[0]
    finally:
        layer.sequence_parallel = sequence_parallel
    return logits.squeeze(1)


@dataclass(frozen=True)
class Fusion:
    """The parameters of loss/sharded/fused_linear.py, which fuses the output layer with the loss."""

    mode: str
    """One of `choices.FUSED_MODES`."""
    chunk_tokens: int
    """The number of response tokens whose logits exist at a time."""


@dataclass(frozen=True)
class ResponsePositions:
    """The positions of the hidden states that predict R response tokens, in a context-parallel rank's microbatch."""

    in_sequence: Tensor
    """The positions in the sequence, which sequence parallelism cuts over the tensor-parallel ranks, [R] int64."""
    own: Tensor | None = None
    """The positions of this rank's states within its own cut under sequence parallelism, [n] int64.

    A rank has about R / tp states, and n is the maximum over the ranks.  A rank with fewer states pads with position 0.
    """
    gathered: Tensor | None = None
    """The place of each token's state in the concatenation of the n states of all ranks, [R] int64; used with
    ``own``."""

    @classmethod
    def on_host(cls, in_sequence: Tensor, num_positions: int, grid: RankGrid) -> ResponsePositions:
        """Return the positions ``in_sequence`` of ``num_positions`` tokens, with all tensors on the host."""
        if not grid.sequence_parallel or grid.tp_size == 1:
            return cls(in_sequence)
        cut = num_positions // grid.tp_size
        owner, position = in_sequence // cut, in_sequence % cut
        counts = torch.bincount(owner, minlength=grid.tp_size)
        by_owner = torch.argsort(owner, stable=True)
        place = torch.empty_like(in_sequence)
        place[by_owner] = torch.arange(len(in_sequence)) - (counts.cumsum(0) - counts)[owner[by_owner]]
        longest = int(counts.max())
        own = torch.zeros(longest, dtype=torch.int64)
        own[: counts[grid.tp_rank]] = position[by_owner[owner[by_owner] == grid.tp_rank]]
        return cls(in_sequence, own, owner * longest + place)


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
        options: TokenOptions = NO_OPTIONS,
    ) -> TokenStats:
        """Return the statistics of the tokens, equal to `project` for both models and `distillation_loss`.

        The gradients to ``hidden [s / cp (/ tp), 1, h]`` and to the student's output weight are also equal.
        ``student``, ``teacher``: the models of the last stage, one object where the current weights teach; in place of
        a teacher the output weight ``[v / tp, n h]`` of n teachers, whose states are ``[R, n h / tp]``.
        ``teacher_hidden [R, h / tp]``: this tensor-parallel rank's slice of the width.  ``reference``: the model and
        the states ``[R, h / tp]`` of a reference whose weights are not the teacher's.
        Collectives over TP: see `fused_distillation_loss`.  With sequence parallelism the hidden states at response
        positions are gathered, and their gradient is reduce-scattered.
        """
        cut = positions.own
        own = states_at(hidden, positions.in_sequence, grid) if cut is None else hidden.index_select(0, cut)
        weight = output_weight(student, own)
        return fused_distillation_loss(
            own.squeeze(1),
            teacher_hidden,
            weight,
            None if teacher is student else _weight_of(teacher, own),
            response_tokens,
            target=self.target,
            divergence=split_divergence(self.divergence, len(response_tokens), options.guided),
            vocab=vocab,
            reference_entropy=options.reference_entropy,
            reference=None if reference is None else (reference[1], output_weight(reference[0], own)),
            teacher_weights=options.teacher_weights,
            chunk_tokens=self.fusion.chunk_tokens,
            mode=self.fusion.mode,
            gather_indices=positions.gathered,
            weight_gradient=MainGrad.of(weight, student.output_layer),
            observe=options.observe,
            backend=self.backend,
        )


def _weight_of(teacher: GPTModel | Tensor, hidden: Tensor) -> Tensor:
    return teacher if isinstance(teacher, Tensor) else output_weight(teacher, hidden)


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


def nonlinear(model: GPTModel) -> str | None:
    """Return why the logits of a last stage may be no linear function of its hidden states; None if they are one."""
    layer = model.output_layer
    if type(layer).forward is not layers.ColumnParallelLinear.forward or "forward" in vars(layer):
        return f"its {type(layer).__name__} does more than multiply by its weight"
    return "it has hooks that expect its logits" if layer._forward_hooks else None
