# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""How a run computes the output layer and the loss: fused or not, in which mode, by which backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_selfdistill.config.schema.target_config import planned_controls

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.models.gpt import GPTModel

from megatron_selfdistill.choices import FUSED_MODES
from megatron_selfdistill.config import Config
from megatron_selfdistill.config.schema.whole_config import projects_reference
from megatron_selfdistill.distributed.collectives import gather_objects
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.loss.sharded.vocab_parallel import in_use
from megatron_selfdistill.model.forward import Fusion, nonlinear, unwrapped

MATERIALISED = "materialised"
DEFAULT_LOGITS_SHARE = 1 / 20
"""The share of ``cluster.gpu_memory_gb`` for materialised logits where ``loss.max_logits_gb`` is null."""


def unfusable(model: GPTModel) -> str | None:
    """Return why the output layer of a last stage cannot be fused; None if it can be fused."""
    layer = model.output_layer
    if (reason := nonlinear(model)) is not None:
        return reason
    if layer.bias is not None:
        return "it has a bias"
    if layer.gather_output:
        return "it gathers its logits over the tensor-parallel ranks"
    return "it has hooks that expect its logits" if layer._backward_hooks or layer._backward_pre_hooks else None


@dataclass(frozen=True)
class OutputLayer:
    """The way in which a run computes the output layer and the loss."""

    mode: str
    """`MATERIALISED`, or one of `choices.FUSED_MODES`."""
    chunk_tokens: int
    """The number of response tokens in a chunk of the fused loss."""
    num_models: int
    """The number of models whose logits the loss reads: student and teacher, or the student alone."""
    token_bytes: int
    """The bytes of the logits of one token on one rank."""
    max_tokens: int
    """The maximum number of response tokens of a microbatch on one rank."""
    note: str = ""
    """An addition to the line of the log."""
    copies: float = 1.0
    """The number of copies of the materialised logits that exist at a time."""
    mix_copies: float = 0.0
    """The number of copies of a chunk's logits that exist besides while the reference's materialised logits are mixed
    into the teacher's: the reference's and the mix, in float32; 0 where the hidden states of both are mixed."""
    control_copies: float = 0.0
    """The number of copies of a chunk's logits that exist besides while controls are subtracted: those of all controls
    for a chunk's share of tokens, and the difference in float32; 0 without controls."""

    @property
    def largest(self) -> float:
        """The bytes of the logits that exist at a time in the largest microbatch."""
        return self.tokens_with_logits(self.max_tokens) * self.token_bytes

    @property
    def fusion(self) -> Fusion | None:
        """The parameters of the fused loss; None if logits are materialised."""
        return None if self.mode == MATERIALISED else Fusion(self.mode, self.chunk_tokens)

    def tokens_with_logits(self, tokens: float) -> float:
        """Return the number of tokens whose logits exist at a time, including gradients, of ``tokens`` tokens."""
        chunk = min(self.chunk_tokens, tokens)
        tokens_by_mode = {
            MATERIALISED: self.num_models * self.copies * tokens + self.mix_copies * chunk,
            "keep_gradient": tokens + chunk,
            "low_memory": 2 * chunk,
        }
        return tokens_by_mode[self.mode] + self.control_copies * chunk

    def tokens_with_states(self, tokens: float) -> float:
        """Return the number of tokens whose hidden states of full width exist at a time, of ``tokens`` tokens.

        With the fused loss this includes, for one chunk, the teacher's states and the joined states of both models.  A
        reference that is projected apart has the states of all tokens, or with the fused loss of one chunk.
        """
        models, chunks = (self.num_models + 1, 4) if self.mix_copies else (self.num_models, 3)
        return models * tokens if self.fusion is None else tokens + chunks * min(self.chunk_tokens, tokens)

    def __str__(self) -> str:
        fused = f"fused with the loss in chunks of {self.chunk_tokens} tokens, {self.mode}"
        how = MATERIALISED if self.fusion is None else fused
        return f"output layer: {how}, at most {self.largest / 2**30:.2f} GiB of logits per microbatch{self.note}"


def next_token_copies(element_size: int) -> float:
    """Return the number of copies of logits of ``element_size`` bytes that `next_token` needs.

    Megatron's cross entropy overwrites float32 logits, or a float32 copy of other logits; in the backward pass the
    gradient exists beside that copy.
    """
    return 1.0 if element_size == 4 else 1.0 + 4 / element_size


def choose_output_layer(config: Config, padded_vocab_size: int, cannot: str | None = None) -> OutputLayer:
    """Return the output layer that ``loss.fused`` asks for.

    A null ``loss.fused`` chooses the first of materialised, keep_gradient and low_memory whose logits of the largest
    microbatch need at most ``loss.max_logits_gb``.  The result depends on the arguments only, so that all ranks choose
    the same.  keep_gradient has no gradient of a policy term, so that a null never chooses it beside one.  ``cannot``:
    the result of `unfusable`.

    Raises: `ConfigError` where ``loss.fused`` asks for a fused layer that is not possible.
    """
    loss, parallel = config.loss, config.parallel
    has_teacher = config.has_teacher
    asked = loss.fused if loss.fused in FUSED_MODES else None
    if asked is not None and cannot is not None:
        raise ConfigError(
            f"loss.fused={asked} is not possible with this model's output layer, because {cannot}: "
            "set loss.fused=none, or null"
        )
    controls = planned_controls(config)
    element_size = 2 if config.optimizer.precision == "bf16" else 4
    layer = OutputLayer(
        mode=asked or MATERIALISED,
        chunk_tokens=loss.fused_chunk_tokens,
        num_models=2 if has_teacher else 1,
        token_bytes=padded_vocab_size // parallel.tensor_model_parallel_size * element_size,
        max_tokens=config.schedule.max_tokens // parallel.context_parallel_size,
        copies=1.0 if has_teacher else next_token_copies(element_size),
        mix_copies=2 * 4 / element_size if config.is_anchored and (projects_reference(config) or cannot) else 0.0,
        control_copies=1 + 3 * 4 / element_size / controls if controls else 0.0,
    )
    share = config.cluster.memory_of_gpu * DEFAULT_LOGITS_SHARE
    limit = (share if loss.max_logits_gb is None else loss.max_logits_gb) * 2**30
    if loss.fused is not None or not has_teacher or layer.largest <= limit:
        return layer
    if cannot is not None:
        return replace(layer, note=f"; not fused, because {cannot}")
    keeping, small = (replace(layer, mode=mode) for mode in FUSED_MODES)
    if keeping.largest <= limit and config.needs.has_policy_term:
        return replace(small, note="; not keep_gradient, which has no gradient of a policy term")
    if keeping.largest <= limit:
        return keeping
    if small.largest < layer.largest:
        return small
    return replace(
        layer, note=f"; chunks of loss.fused_chunk_tokens={loss.fused_chunk_tokens} would not need less memory"
    )


def decided_output_layer(config: Config, chunks: Sequence[torch.nn.Module]) -> OutputLayer:
    """Return `choose_output_layer` for the model of which this rank holds ``chunks``, equal on all ranks.

    Collectives: one all_gather_object over the world, of the last stages' reasons against fusing.
    Raises: `ConfigError`.
    """
    last = unwrapped(chunks[-1])
    reasons = gather_objects(unfusable(last) if last.post_process else None)
    return choose_output_layer(config, last.vocab_size, next(filter(None, reasons), None))


def loss_backend(config: Config, grid: RankGrid) -> str:
    """Return the backend of the loss and the reason for it, for the log.  Raises: `ConfigError` where it cannot run."""
    dtype = torch.bfloat16 if config.optimizer.precision == "bf16" else torch.float32
    try:
        name, why = in_use(config.loss.backend, grid.device, dtype)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return f"{name} ({why})"
