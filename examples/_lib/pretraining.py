# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The base model of an example: plain next-token training with the trainer's own parts, made once and then reused."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from _lib.command_line import CONFIG_NAME, console
from _lib.task import Record, Task
from megatron_selfdistill import config as configuration
from megatron_selfdistill.config import Config

if TYPE_CHECKING:  # torch and Megatron are imported by what needs them: --help answers at once
    from torch import Tensor

    from megatron_selfdistill.data.tokenizer import Tokenizer
    from megatron_selfdistill.sources.source import StepBatch

OVERRIDES = (
    "method.name=sft",
    "optimizer.lr=5e-3",
    "optimizer.min_lr=2.5e-4",
    "optimizer.lr_warmup_steps=50",
    "optimizer.lr_decay.style=linear",
    "optimizer.weight_decay=0.01",
    "optimizer.constants.adam_beta2=0.98",
    "evaluation.every=0",
    "metrics.console_every=300",
)

SECTIONS = ("seed", "num_steps", "model", "parallel", "data", "schedule", "optimizer")
"""The parts of the configuration that decide what pretraining learns."""


@dataclasses.dataclass(frozen=True)
class Base:
    """A pretrained model with its tokenizer and its held-out problems."""

    task: Task
    seed: int
    directory: Path
    held_out: Path
    """The problems on which the examples measure the model."""
    seconds: float
    """Wall time of the pretraining; 0 if an earlier run had made the model."""

    @property
    def overrides(self) -> tuple[str, ...]:
        """The overrides with which a run starts from this model."""
        return (
            *self.task.overrides,
            *self.task.environment,
            f"data.tokenizer={self.directory / 'tokenizer'}",
            f"evaluation.path={self.held_out}",
            f"checkpoint.load={self.directory / 'checkpoints'}",
            f"seed={self.seed}",
        )


def make_base(task: Task, seed: int, root: Path, num_steps: int | None = None) -> Base:
    """Pretrain a model on ``task.corpus_row``, or find the model of an earlier run.

    ``root`` holds one directory for each task, seed and setting of `SECTIONS`: a change of the file that defines
    ``task.corpus_row``, or of such a setting, makes a new base.  ``num_steps`` replaces ``task.pretraining_steps``.
    """
    num_steps = num_steps or task.pretraining_steps
    settings = [*task.overrides, *OVERRIDES, *task.pretraining, f"num_steps={num_steps}", f"seed={seed}"]
    resolved = dataclasses.asdict(configuration.load(settings, CONFIG_NAME))
    read = json.dumps({section: resolved[section] for section in SECTIONS})
    source = Path(inspect.getfile(task.corpus_row)).read_text(encoding="utf-8")
    key = hashlib.md5((read + source).encode()).hexdigest()[:8]
    directory = root / f"{task.name}-seed{seed}-{key}"
    held_out = directory / "held_out.jsonl"
    if (directory / "checkpoints").exists():  # the directory exists only when the checkpoint is complete
        return Base(task, seed, directory, held_out, 0.0)
    began = time.perf_counter()
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory / "tokenizer", task.alphabet)
    write_records(held_out, task.held_out_problems())
    paths = [
        f"data.tokenizer={directory / 'tokenizer'}",
        f"data.path={held_out}",  # a run needs problems; pretraining reads the corpus instead
        f"run_dir={directory}",
    ]
    pretrain(configuration.load([*settings, *paths], CONFIG_NAME), task)
    return Base(task, seed, directory, held_out, time.perf_counter() - began)


def prepared_base(task: Task, seed: int, root: Path, num_steps: int | None = None) -> Base:
    """Make or find the base model of a seed under ``root/bases`` and report it on the console."""
    steps = num_steps or task.pretraining_steps
    console.rule(f"[bold]base model, seed {seed}: {steps} steps of next-token training", align="left")
    base = make_base(task, seed, root / "bases", steps)
    found = f"pretrained in {base.seconds:.0f} s" if base.seconds else "found"
    console.print(f"{found}: {base.directory}", soft_wrap=True)
    return base


def pretrain(config: Config, task: Task) -> None:
    """Run the loop of train.py for ``num_steps`` steps of next-token training, on rows of the task's corpus."""
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.trainer import Trainer

    grid = ranks.initialize(config.parallel, config.seed)
    try:
        trainer = Trainer(config, RunData.load(config), grid)
        try:
            trainer.run_directory.write()
            while trainer.step < config.num_steps:
                rng = random.Random(f"{config.seed}/{trainer.step}")  # by step: a resumed run reads the same rows
                rows = [task.corpus_row(rng) for _ in range(config.data.global_batch_size)]
                batch, labels = corpus_batch(rows, trainer.run_data.tokenizer)
                packed = dataclasses.replace(trainer.pack(batch), response_tokens=labels)
                step = [trainer.forward_backward(batch, packed)]
                trainer.finish_step(step, trainer.update(step))
        finally:
            trainer.close()
    finally:
        ranks.shutdown()


def corpus_batch(rows: Sequence[tuple[str, str, str]], tokenizer: Tokenizer) -> tuple[StepBatch, Tensor]:
    """Return rows (prompt, input text, target text) as a batch, and the tokens of the target texts.

    Input text and target text of a row have the same number of tokens.
    """
    import torch

    from megatron_selfdistill.data.contexts import ContextPair
    from megatron_selfdistill.sources.source import StepBatch

    contexts, labels = [], []
    for number, (prompt, text, wanted) in enumerate(rows):
        tokens = tokenizer.encode(prompt)
        contexts.append(ContextPair(str(number), tokens, tokens, tokenizer.encode(text), False))
        labels += tokenizer.encode(wanted)
    return StepBatch(contexts=contexts), torch.tensor(labels)


def write_records(path: Path, records: Iterable[Record]) -> Path:
    """Write the JSONL that ``data.path`` names; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records), encoding="utf-8")
    return path


def write_tokenizer(directory: Path, alphabet: str) -> None:
    """Write a Hugging Face tokenizer with one token per character, whose chat template is the text itself.

    The last two characters of ``alphabet`` are the end of a text and the padding.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end, padding = alphabet[-2], alphabet[-1]
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=padding))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=padding, unk_token=padding)
    fast.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    fast.save_pretrained(directory)
