# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The quickstart's task for models of transformers: a small Qwen3 that transformers trains, and its accuracy."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _lib import subtraction
from _lib.command_line import console
from _lib.hugging_face import load
from _lib.pretraining import write_tokenizer

if TYPE_CHECKING:  # torch is imported by what needs it: --help answers at once
    from torch import Tensor

PRETRAINING_BATCH = 64


def prepared_qwen3(root: Path, seed: int, num_steps: int) -> Path:
    """Return the Hugging Face directory of the small Qwen3 under ``root``, which is trained if it is not there."""
    hf = root / "bases" / f"qwen3-seed{seed}-{num_steps}"
    began = time.perf_counter()
    if not hf.exists():
        make_qwen3(hf, seed, num_steps)
        console.print(f"pretrained in {time.perf_counter() - began:.0f} s: {hf}", soft_wrap=True)
    return hf


def accuracy(hf: Path, num_problems: int) -> float:
    """Return the share of held-out problems that the model of a directory solves by greedy decoding."""
    return accuracy_of(*load(hf), num_problems)


def accuracy_of(tokenizer: Any, model: Any, num_problems: int) -> float:
    """Return the share of held-out problems that a model solves by greedy decoding with transformers."""
    import torch

    problems = subtraction.held_out_problems()[:num_problems]
    prompts = tokenizer([problem["problem"] for problem in problems], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=26, do_sample=False)
    responses = tokenizer.batch_decode(tokens[:, prompts.shape[1] :], skip_special_tokens=True)
    answers = [response.partition(";")[2] for response in responses]
    num_right: int = sum(a == problem["answer"] for a, problem in zip(answers, problems, strict=True))
    return num_right / len(problems)


def make_qwen3(directory: Path, seed: int, num_steps: int) -> None:
    """Train a Qwen3 of 0.1 million parameters on the quickstart's corpus and save it in ``directory``."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config, logging

    logging.disable_progress_bar()
    end, padding = len(subtraction.TASK.alphabet) - 2, len(subtraction.TASK.alphabet) - 1
    config = Qwen3Config(
        vocab_size=len(subtraction.TASK.alphabet),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=192,
        rope_theta=1000.0,
        initializer_range=0.0875,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=padding,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 5e-3, num_steps, pct_start=0.05, anneal_strategy="linear", cycle_momentum=False
    )
    for number in range(num_steps):
        rng = random.Random(f"{seed}/{number}")
        tokens, labels = corpus_batch([subtraction.corpus_row(rng) for _ in range(PRETRAINING_BATCH)], padding)
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    temporary = directory.with_suffix(".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.eval().save_pretrained(temporary)
    write_tokenizer(temporary, subtraction.TASK.alphabet)
    temporary.rename(directory)  # the directory exists only when it is complete


def corpus_batch(rows: Sequence[tuple[str, str, str]], padding: int) -> tuple[Tensor, Tensor]:
    """Return the tokens and the labels, both [b, s], of rows (prompt, input text, target text).

    The labels are -100 at the positions of the prompt and the padding, where nothing is learnt.
    """
    import torch

    length = max(len(prompt) + len(text) for prompt, text, _ in rows)
    tokens, labels = torch.full((len(rows), length), padding), torch.full((len(rows), length), -100)
    for i, (prompt, text, wanted) in enumerate(rows):
        tokens[i, : len(prompt) + len(text)] = torch.tensor([subtraction.TASK.alphabet.index(c) for c in prompt + text])
        first = len(prompt) - 1
        labels[i, first : first + len(wanted)] = torch.tensor([subtraction.TASK.alphabet.index(c) for c in wanted])
    return tokens, labels
