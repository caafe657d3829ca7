# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Self-distillation in pretrain_gpt.py of Megatron-LM: a forward_step and a loss_func in place of its own.

A batch of the data iterator is equal on the tensor-parallel ranks and holds, each [b, s] with padding on the right:
``tokens`` and ``hinted_tokens``, the prompt without and with the hint and then the response; ``mask`` and
``hinted_mask``, true at the positions whose logits predict a token of the response.
"""

from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (lets Megatron Core run on a CPU)
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

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
        reference = logits_of(frozen, batch["tokens"])[batch["mask"]] if target.has_reference else None
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


def response_batch(problems, responses):
    """Return the batch of `forward_step` for prompts without and with the hint, both token ids, and their responses."""
    batch = {}
    for name, prompts in zip(("", "hinted_"), zip(*problems, strict=True), strict=True):
        pairs = list(zip(prompts, responses, strict=True))
        batch[f"{name}tokens"] = pad_sequence([torch.tensor(prompt + response) for prompt, response in pairs], True)
        batch[f"{name}mask"] = mask = torch.zeros_like(batch[f"{name}tokens"], dtype=torch.bool)
        for row, (prompt, response) in zip(mask, pairs, strict=True):
            row[len(prompt) - 1 : len(prompt) + len(response) - 1] = True
    return batch


def main(num_steps=2):
    """Train a small model of random weights on one batch with the schedule of Megatron Core; return the losses."""
    on_gpu = torch.cuda.is_available()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    no_dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}  # the teacher would have it, too
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    config = TransformerConfig(**sizes, **no_dropout, use_cpu_initialization=True)
    layers, device = get_gpt_layer_local_spec(), "cuda" if on_gpu else "cpu"
    model, frozen = (GPTModel(config, layers, vocab_size=128, max_sequence_length=64).to(device) for _ in range(2))
    frozen.load_state_dict(model.state_dict())
    problems = [([5, 9, 2], [5, 9, 2, 66, 17]), ([7, 31], [7, 31, 50])]  # token ids: without and with the hint
    batch = response_batch(problems, [[11, 60, 3, 1], [23, 1]])  # sample these with the weights of the run
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(num_steps):
        optimizer.zero_grad()
        (shown,) = get_forward_backward_func()(
            forward_step_func=partial(forward_step, frozen=frozen.eval()),
            data_iterator=iter([batch]),
            model=[model],
            num_microbatches=1,
            seq_length=batch["tokens"].size(1),
            micro_batch_size=len(problems),
            forward_only=False,
        )
        optimizer.step()
        losses.append((shown["lm loss"][0] / shown["lm loss"][1]).item())
    return losses


if __name__ == "__main__":
    print(main())
