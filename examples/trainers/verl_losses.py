# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The loss of self-distillation in verl 0.9.1: distillation.distillation_loss.loss_mode=self_distillation.

verl's teacher returns its best tokens and their log-probabilities; all others are one token here, the tail.  With as
many tokens as the vocabulary has, the loss is exact.  verl has no reference, so the anchor is the student.
"""

import torch
from verl.trainer.distillation import losses
from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor

from megatron_selfdistill.loss import Target, self_distillation_loss

NAME = "self_distillation"


def with_tail(student_logits, teacher_log_probs, ids):
    """Return the logits of student and teacher at ``ids [.., K]``, and of all other tokens together, [.., K + 1]."""
    chosen = student_logits.gather(-1, ids)
    if ids.size(-1) == student_logits.size(-1):
        return chosen, teacher_log_probs
    tail = student_logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    left = (-teacher_log_probs.logsumexp(-1, keepdim=True).expm1()).clamp(min=1e-8).log()
    return torch.cat([chosen, tail], -1), torch.cat([teacher_log_probs, left], -1)


def register(target=None, divergence="reverse_kl"):
    """Make the loss known to verl under `NAME`, in every worker (actor_rollout_ref.model.external_lib)."""
    target = target or Target(anchor="student")
    if target.anchor != "student":
        raise ValueError(f"expected a target with anchor='student', got {target.anchor!r}: verl has no reference")
    settings = losses.DistillationLossSettings(names=NAME, use_topk=True)
    losses.register_distillation_loss(settings)(losses.compute_forward_kl_topk)  # sums what the logits have given
    of_verl = losses.compute_topk_loss

    def compute_topk_loss(config, distillation_config, data, student_logits, data_format):
        if distillation_config.distillation_loss.loss_mode != NAME:
            return of_verl(config, distillation_config, data, student_logits, data_format)
        if config.strategy == "megatron":
            raise NotImplementedError(f"loss_mode={NAME} needs whole rows of logits: use the strategy fsdp2")
        ids, log_probs = (data[name].values().unsqueeze(0) for name in ("teacher_ids", "teacher_logprobs"))
        if get_ulysses_sequence_parallel_world_size() > 1:
            ids, log_probs = (slice_input_tensor(tensor, dim=1) for tensor in (ids, log_probs))
        student, teacher = with_tail(student_logits.float(), log_probs.float(), ids)
        loss = self_distillation_loss(student, teacher, target=target, divergence=divergence, reduction="none")
        masses = student_logits.float().log_softmax(-1).gather(-1, ids).exp().sum(-1), log_probs.exp().sum(-1)
        return {"distillation_losses": loss, "student_mass": masses[0].detach(), "teacher_mass": masses[1]}

    losses.compute_topk_loss = compute_topk_loss


if __name__ != "__main__":
    register()
