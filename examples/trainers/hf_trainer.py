# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Self-distillation in the Trainer of transformers, with all weights or with adapters of PEFT."""

import contextlib
import copy
import sys

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from megatron_selfdistill.loss import Target, self_distillation_loss

PROBLEMS = [  # your own: a problem, and what the teacher sees beside it
    ("What is 17 + 25?", "17 + 25 = 42"),
    ("What is 31 - 14?", "31 - 14 = 17"),
]


class SelfDistillationTrainer(Trainer):
    """The Trainer whose model reads its own responses with and without a hint.

    A row of the dataset has the token ids ``prompt`` and ``hinted``, the prompt with the hint, and for a target with K
    controls ``controls``, K prompts with the hints of other problems.  Teacher and reference are the model without its
    adapters, or a frozen copy of its start.
    """

    def __init__(self, *args, max_new_tokens=512, target=None, divergence="reverse_kl", **options):
        super().__init__(*args, data_collator=list, **options)
        self.max_new_tokens, self.target, self.divergence = max_new_tokens, target or Target(), divergence
        self.frozen = None if hasattr(self.model, "disable_adapter") else copy.deepcopy(self.model).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean loss of the tokens of the responses, which the model samples here."""
        plain, hinted = ([row[name] for row in inputs] for name in ("prompt", "hinted"))
        own = self.accelerator.unwrap_model(model)
        responses = self.responses(own, plain)
        student = response_logits(model, plain, responses)
        with torch.no_grad(), own.disable_adapter() if self.frozen is None else contextlib.nullcontext():
            frozen = own if self.frozen is None else self.frozen
            teacher = response_logits(frozen, hinted, responses)
            reference = response_logits(frozen, plain, responses) if self.target.has_reference else None
            others = [[row["controls"][k] for row in inputs] for k in range(self.target.num_controls)]
            controls = torch.stack([response_logits(frozen, it, responses) for it in others]) if others else None
        options = {"control_logits": controls, "target": self.target, "divergence": self.divergence}
        return self_distillation_loss(student, teacher, reference, **options)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the loss on responses that the model samples to the problems of ``eval_dataset``."""
        with torch.no_grad():
            return self.compute_loss(model, inputs), None, None

    @torch.no_grad()
    def responses(self, model, prompts):
        """Return the token ids of one sampled response per prompt, with the token that ends it."""
        ids, mask = padded(prompts, model.device, "left")
        eos, training = model.generation_config.eos_token_id, model.training
        ends = torch.tensor([] if eos is None else eos, dtype=ids.dtype, device=ids.device).flatten()
        texts = model.eval().generate(ids, attention_mask=mask, do_sample=True, max_new_tokens=self.max_new_tokens)
        model.train(training)
        lengths = (~torch.isin(texts[:, ids.size(1) :], ends)).cumprod(1).sum(1) + 1
        return [row[ids.size(1) :][:length].tolist() for row, length in zip(texts, lengths, strict=True)]


def response_logits(model, prompts, responses):
    """Return the logits that predict the tokens of every response, [tokens of all responses, V]."""
    pairs = list(zip(prompts, responses, strict=True))
    ids, mask = padded([prompt + response for prompt, response in pairs], model.device, "right")
    logits = model(input_ids=ids, attention_mask=mask).logits
    return torch.cat([row[len(p) - 1 : len(p) + len(r) - 1] for row, (p, r) in zip(logits, pairs, strict=True)])


def padded(rows, device, side):
    """Return lists of token ids as a tensor [b, s] with padding of id 0 on one side, and the mask of its tokens."""
    rows = [torch.tensor(row, device=device) for row in rows]
    return tuple(pad_sequence(r, True, 0, side) for r in (rows, [torch.ones_like(row) for row in rows]))


def ids_of(tokenizer, problem, solution=None):
    """Return the token ids of a prompt, with the solution as the hint; the response follows its last token."""
    content = problem if solution is None else f"{problem}\n\nReference solution: {solution}"
    chat = [{"role": "user", "content": content}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])


def main(model_name, run_dir="run", max_new_tokens=512, **arguments):
    """Train the model of a directory or of the hub on `PROBLEMS`; return its trainer."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)  # the optimizer's weights
    rows = [{"prompt": ids_of(tokenizer, it[0]), "hinted": ids_of(tokenizer, *it)} for it in PROBLEMS]
    options = {"learning_rate": 1e-5, "logging_steps": 1, "bf16": torch.cuda.is_available()} | arguments
    trainer = SelfDistillationTrainer(
        model,
        TrainingArguments(run_dir, remove_unused_columns=False, **options),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        max_new_tokens=max_new_tokens,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()  # then: selfdistill report run
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
