# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Self-distillation with a reference in the SDFTTrainer of TRL, whose own target is the teacher alone."""

import sys

import torch
from datasets import Dataset
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

from megatron_selfdistill.loss import Target, self_distillation_loss

PROBLEMS = [  # your own: a problem, and what the teacher sees beside it
    ("What is 17 + 25?", "17 + 25 = 42"),
    ("What is 31 - 14?", "31 - 14 = 17"),
]


class SelfDistillationTrainer(SDFTTrainer):
    """The SDFTTrainer that trains towards the mix of teacher and reference, over the whole vocabulary.

    TRL samples the responses and writes both contexts.  The teacher of ``teacher_model_kind="base"`` is frozen; on the
    context of the student it is the reference.
    """

    def __init__(self, *args, target=None, divergence="reverse_kl", **options):
        super().__init__(*args, **options)
        if self.args.teacher_model_kind != "base":
            raise ValueError(f"expected teacher_model_kind='base', got {self.args.teacher_model_kind!r}")
        self.target, self.divergence = target or Target(), divergence

    def _compute_self_distillation_loss(self, model, inputs, distillation_logits):
        mask = distillation_logits.loss_mask.bool()
        if not mask.any():
            return super()._compute_self_distillation_loss(model, inputs, distillation_logits)
        student, teacher = distillation_logits.student_logits, distillation_logits.teacher_logits
        reference = self._reference_logits(inputs, mask) if self.target.has_reference else None
        loss = self_distillation_loss(student, teacher, reference, mask, target=self.target, divergence=self.divergence)
        mode = "train" if model.training else "eval"
        self._log_self_distillation_metric(mode, self.accelerator.gather(loss.detach()).mean().item())
        return loss

    @torch.no_grad()
    def _reference_logits(self, inputs, mask):
        """Return the logits of the frozen model on the context of the student, [b, s, V]."""
        ids, attended = (
            torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1) for name in ("ids", "mask")
        )
        with self._get_teacher_context_for_self_distillation():
            return self._forward_logits(self.teacher_model, ids, attended, logits_to_keep=mask.size(1))


def main(model_name, run_dir="run", **arguments):
    """Train the model of a directory or of the hub on `PROBLEMS`; return its trainer."""
    chats = [([{"role": "user", "content": problem}], solution) for problem, solution in PROBLEMS]
    data = Dataset.from_list([{"prompt": chat, "privileged_context": solution} for chat, solution in chats])
    sizes = {"num_generations": 1, "per_device_train_batch_size": len(PROBLEMS)}  # TRL drops a batch that is not full
    options = sizes | {"max_completion_length": 512, "logging_steps": 1} | arguments
    trainer = SelfDistillationTrainer(model_name, SDFTConfig(run_dir, **options), train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.save_model()
    trainer.save_state()  # then: selfdistill report run
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
