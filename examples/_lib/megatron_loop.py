# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A loop in the manner of Megatron-LM: Megatron Core's schedule and optimizer, with a forward_step of its user."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from _lib.command_line import CONFIG_NAME
from _lib.hugging_face import load
from megatron_selfdistill import config as configuration
from megatron_selfdistill.checkpoint.formats.stored_model import with_stored_architecture
from megatron_selfdistill.checkpoint.trained_weights import loaded_chunks
from megatron_selfdistill.distributed import ranks
from megatron_selfdistill.interop import conversion
from megatron_selfdistill.interop.export import Exporter
from megatron_selfdistill.interop.hf.mapping import family_of
from megatron_selfdistill.interop.hf_files import read_config
from megatron_selfdistill.model.build import build_optimizer, wrap_for_training

Prompts = tuple[list[int], list[int]]
"""The tokens of a problem's prompt, without and with the hint."""


def train(
    hf: Path,
    run_dir: Path,
    problems: Sequence[Prompts],
    forward_step: Callable[..., Any],
    overrides: Sequence[str],
    *,
    num_new_tokens: int,
    batch_size: int,
) -> Any:
    """Train the model of a directory, one microbatch a step; return it as transformers' model.

    ``forward_step(data_iterator, model, frozen, vocab_size=)``: as in trainers/megatron_lm.py.  ``overrides``: settings
    of the model and the optimizer.  The metrics of each step go to metrics.jsonl in ``run_dir``.
    """
    tokenizer, model = load(hf)
    start = run_dir / "start"
    if not start.exists():
        conversion.hf_to_megatron(hf, start)
    overrides = [*overrides, f"checkpoint.load={start}", f"data.tokenizer={hf}", f"run_dir={run_dir}"]
    given = configuration.GivenKeys(overrides, CONFIG_NAME)
    config = with_stored_architecture(configuration.load(overrides, CONFIG_NAME), given)
    grid = ranks.initialize(config.parallel, config.seed)
    try:
        chunks, frozen = (loaded_chunks(config, grid, len(tokenizer), str(start)) for _ in range(2))
        student = list(wrap_for_training(chunks, config.optimizer))
        optimizer, scheduler = build_optimizer(student, config.optimizer, config.num_steps)
        student[0].config.finalize_model_grads_func = finalize_model_grads
        rng = random.Random(config.seed)
        with (run_dir / "metrics.jsonl").open("w") as log:
            for step in range(1, config.num_steps + 1):
                drawn = rng.sample(problems, batch_size)
                batch = with_responses(student[0], drawn, num_new_tokens, tokenizer.eos_token_id)
                student[0].zero_grad_buffer()
                optimizer.zero_grad()
                (shown,) = get_forward_backward_func()(
                    forward_step_func=partial(forward_step, frozen=frozen[0].eval(), vocab_size=len(tokenizer)),
                    data_iterator=iter([batch]),
                    model=student,
                    num_microbatches=1,
                    seq_length=batch["tokens"].size(1),
                    micro_batch_size=batch_size,
                    forward_only=False,
                )
                scheduler.step(1)
                _, norm, _ = optimizer.step()
                loss, num_tokens = shown["lm loss"].tolist()
                line = {"step": step, "loss/mean": loss / num_tokens, "gradient_norm": float(norm)}
                log.write(json.dumps(line) + "\n")
        rules = family_of(read_config(hf)).rules(config.model)
        tensors = {name: tensor for bucket in Exporter(student, grid, rules).stream() for name, tensor in bucket}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:  # a tied output layer is not exported
            raise ValueError(f"expected the tensors of {hf}, got {unexpected} beside them and none for {missing}")
        return model
    finally:
        ranks.shutdown()


@torch.no_grad()
def with_responses(model: Any, problems: Sequence[Prompts], num_new_tokens: int, end: int) -> dict[str, Tensor]:
    """Return the batch of `batch_of` with one response per problem, which the model samples token by token."""
    responses: list[list[int]] = [[] for _ in problems]
    model.eval()
    for _ in range(num_new_tokens):
        texts = [[*plain, *response] for (plain, _), response in zip(problems, responses, strict=True)]
        tokens = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
        logits = model(tokens, torch.arange(tokens.size(1)).expand_as(tokens), None)
        last = torch.stack([row[len(text) - 1] for row, text in zip(logits, texts, strict=True)])
        for response, token in zip(responses, torch.multinomial(last.softmax(-1), 1).flatten().tolist(), strict=True):
            response += [token] * (end not in response)
    model.train()
    return batch_of(problems, responses)


def batch_of(problems: Sequence[Prompts], responses: Sequence[Sequence[int]], multiple: int = 1) -> dict[str, Tensor]:
    """Return the batch that the forward_step of trainers/megatron_lm.py reads, padded to a ``multiple`` of tokens."""
    batch: dict[str, Tensor] = {}
    for name, contexts in zip(("", "hinted_"), zip(*problems, strict=True), strict=True):
        length = max(len(prompt) + len(response) for prompt, response in zip(contexts, responses, strict=True))
        tokens = torch.zeros(len(contexts), -(-length // multiple) * multiple, dtype=torch.int64)
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        for i, (prompt, response) in enumerate(zip(contexts, responses, strict=True)):
            tokens[i, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
            mask[i, len(prompt) - 1 : len(prompt) + len(response) - 1] = True
        batch |= {f"{name}tokens": tokens, f"{name}mask": mask}
    return batch
