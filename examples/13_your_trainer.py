# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The loss in other trainers: the quickstart's task in transformers, TRL and the loop of Megatron-LM.

A small Qwen3 learns column subtraction from problems with their answers as hints, as in 06_from_hugging_face.py, but
another library trains it: the files of trainers/ hold all code that it needs beside the loss.  The log of each run is
a file that `selfdistill report` reads.

    python examples/13_your_trainer.py                              transformers, all weights
    python examples/13_your_trainer.py --trainer peft               transformers, adapters of PEFT
    python examples/13_your_trainer.py --trainer trl                TRL's SDFTTrainer (pip install trl)
    python examples/13_your_trainer.py --trainer megatron           the forward_step of Megatron-LM
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _lib import subtraction
from _lib.command_line import announce, console, example_parser, prepare_process
from _lib.hf_subtraction import accuracy_of, prepared_qwen3
from _lib.hugging_face import load
from _lib.pretraining import write_records
from megatron_selfdistill.commands.installation import is_installed

PRETRAINING_STEPS = 600
NUM_STEPS = 100
BATCH = 32
LEARNING_RATE = 3e-4
MAX_NEW_TOKENS = 26
NUM_HELD_OUT = 300
EVALUATED_EVERY = 25
HINTED = "{prompt}H{privileged_context}|"
"""The template of the teacher's prompt, with the names that TRL gives its parts."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example with the arguments of the command line; return the exit status."""
    parser = example_parser(__doc__)
    parser.add_argument("--trainer", choices=list(TRAINERS), default="transformers", help="the library that trains")
    options = parser.parse_args(argv)
    if options.trainer in ("peft", "trl") and not is_installed(options.trainer):
        parser.error(f"--trainer {options.trainer} needs a package that is missing: run pip install {options.trainer}")
    prepare_process()
    announce("base model", f"{PRETRAINING_STEPS} steps of next-token training in transformers")
    hf = prepared_qwen3(options.directory, options.seed, PRETRAINING_STEPS)
    run_dir = options.directory / "your_trainer" / f"{options.trainer}-seed{options.seed}"
    tokenizer, start = load(hf)
    before = accuracy_of(tokenizer, start, NUM_HELD_OUT)
    announce("self-distillation", f"{options.steps or NUM_STEPS} steps of {BATCH} problems in {options.trainer}")
    model = TRAINERS[options.trainer](hf, run_dir, options.steps or NUM_STEPS, options.seed)
    after = accuracy_of(tokenizer, model.eval(), NUM_HELD_OUT)
    console.print(f"greedy accuracy on {NUM_HELD_OUT} held-out problems: {before:.3f} before, {after:.3f} after")
    console.print(f"selfdistill report {run_dir}")
    return 0


def arguments(run_dir: Path, num_steps: int, seed: int) -> dict[str, Any]:
    """Return the arguments of transformers' and TRL's trainers, as close to the quickstart's as they can be."""
    return {
        "output_dir": str(run_dir),
        "max_steps": num_steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": seed,
    }


def with_transformers(hf: Path, run_dir: Path, num_steps: int, seed: int, adapters: bool = False) -> Any:
    """Train with transformers' Trainer; return the model."""
    from trainers import hf_trainer
    from transformers import TrainingArguments

    tokenizer, model = load(hf)
    options = arguments(run_dir, num_steps, seed) | {"remove_unused_columns": False}
    if adapters:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        options["learning_rate"] = 10 * LEARNING_RATE
    rows = [{"prompt": plain, "hinted": hinted} for plain, hinted in prompts(tokenizer, seed)]
    trainer = hf_trainer.SelfDistillationTrainer(
        model, TrainingArguments(**options), train_dataset=rows, max_new_tokens=MAX_NEW_TOKENS
    )
    return trained(trainer, tokenizer)


def with_peft(hf: Path, run_dir: Path, num_steps: int, seed: int) -> Any:
    """Train adapters with transformers' Trainer; return the model."""
    return with_transformers(hf, run_dir, num_steps, seed, adapters=True)


def with_trl(hf: Path, run_dir: Path, num_steps: int, seed: int) -> Any:
    """Train with TRL's SDFTTrainer; return the model."""
    import datasets
    from trainers import trl_trainer
    from trl.experimental.sdft import SDFTConfig

    problems = subtraction.training_problems(seed)
    rows = [{"prompt": row["problem"], "privileged_context": row["solution"]} for row in problems]
    config = SDFTConfig(
        **arguments(run_dir, num_steps, seed),
        teacher_prompt_template=HINTED,
        max_completion_length=MAX_NEW_TOKENS,
        num_generations=1,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
    )
    tokenizer, _ = load(hf)
    trainer = trl_trainer.SelfDistillationTrainer(
        str(hf), config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    return trained(trainer, tokenizer)


def trained(trainer: Any, tokenizer: Any) -> Any:
    """Train, with an evaluation every `EVALUATED_EVERY` steps in the log of the trainer; return the model."""
    from transformers import TrainerCallback

    class Accuracy(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            accuracy = accuracy_of(tokenizer, model.eval(), NUM_HELD_OUT)
            state.log_history.append({"step": state.global_step, "evaluation/greedy_accuracy": accuracy})

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            if state.global_step % EVALUATED_EVERY == 0:
                self.on_train_begin(args, state, control, model)

    trainer.add_callback(Accuracy())
    trainer.train()
    trainer.save_state()
    return trainer.model


def with_megatron(hf: Path, run_dir: Path, num_steps: int, seed: int) -> Any:
    """Train in the loop of Megatron-LM; return the model of transformers with its weights."""
    from trainers.megatron_lm import forward_step

    from _lib import megatron_loop

    tokenizer, _ = load(hf)
    problems = prompts(tokenizer, seed)
    overrides = ["~model", "model.make_vocab_size_divisible_by=8", f"num_steps={num_steps}", f"seed={seed}"]
    sizes = {"num_new_tokens": MAX_NEW_TOKENS, "batch_size": BATCH}
    run_dir.mkdir(parents=True, exist_ok=True)
    data = [f"data.path={write_records(run_dir / 'train.jsonl', subtraction.training_problems(seed))}"]
    return megatron_loop.train(hf, run_dir, problems, forward_step, overrides + data, **sizes)


def prompts(tokenizer: Any, seed: int) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of every training problem's prompt, without and with its hint."""
    rows = subtraction.training_problems(seed)
    hinted = [HINTED.format(prompt=row["problem"], privileged_context=row["solution"]) for row in rows]
    return [
        (tokenizer(row["problem"])["input_ids"], tokenizer(text)["input_ids"])
        for row, text in zip(rows, hinted, strict=True)
    ]


TRAINERS = {"transformers": with_transformers, "peft": with_peft, "trl": with_trl, "megatron": with_megatron}

if __name__ == "__main__":
    sys.exit(main())
