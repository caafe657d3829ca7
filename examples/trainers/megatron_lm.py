# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Self-distillation in pretrain_gpt.py of Megatron-LM: a forward_step and a loss_func in place of its own.

A batch of the data iterator is equal on the tensor-parallel ranks and holds, each [b, s] with padding on the right:
``tokens`` and ``hinted_tokens``, the prompt without and with the hint and then the response; ``mask`` and
``hinted_mask``, true at the positions whose logits predict a token of the response.
"""

from functools import partial

import torch
from megatron.core import parallel_state

from megatron_selfdistill.loss import Target, self_distillation_loss


def forward_step(data_iterator, model, frozen, target=None, divergence="reverse_kl", vocab_size=None):
    """Return the logits of the model, and the function that makes their loss.

    ``frozen``: a second model with the weights of the start, without gradients. Both live on one pipeline stage.
    ``vocab_size``: the number of tokens without Megatron's padding; None: there is none.
    """
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        raise ValueError("expected pipeline_model_parallel_size=1: teacher and student run within one forward_step")
    batch, target = next(data_iterator), target or Target()
    student = logits_of(model, batch["tokens"])
    with torch.no_grad():
        teacher = logits_of(frozen, batch["hinted_tokens"])[batch["hinted_mask"]]
        is_anchored = target.anchor == "reference"
        reference = logits_of(frozen, batch["tokens"])[batch["mask"]] if is_anchored else None
    options = {"target": target, "divergence": divergence, "vocab_size": vocab_size}
    return student, partial(loss_func, batch["mask"], teacher, reference, options)


def loss_func(mask, teacher, reference, options, student):
    """Return the sum of the losses, the number of their tokens, and both for the log, as Megatron-LM wants them."""
    group = parallel_state.get_tensor_model_parallel_group()
    loss = self_distillation_loss(student[mask], teacher, reference, reduction="sum", process_group=group, **options)
    num_tokens = mask.sum().int()
    return loss, num_tokens, {"lm loss": torch.cat([loss.detach().view(1), num_tokens.view(1)])}


def logits_of(model, tokens):
    """Return the logits of causal attention, [b, s, V / tp]."""
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None)
