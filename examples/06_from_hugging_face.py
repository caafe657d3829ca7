# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""From a Hugging Face directory to a self-distilled Hugging Face directory, through Megatron, on a CPU.

The example trains a small Qwen3 with transformers on column subtraction from pupils' homework, which contains mistakes.
It converts the model to a Megatron checkpoint, trains it as in 01_quickstart.py on problems with their answers as
hints, and converts the result back.  Then transformers loads the model and answers held-out problems, before and after.
The example fails if the logits from transformers differ from the logits of the trained Megatron model.

    python examples/06_from_hugging_face.py
    python examples/06_from_hugging_face.py --hf Qwen3-0.6B --data problems.jsonl       your own model and problems

With a model of your own, settings of `selfdistill` may follow, such as rollout.max_new_tokens=200.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from _lib import subtraction
from _lib.command_line import CONFIG_NAME, announce, command, console, example_parser, prepare_process
from _lib.hf_subtraction import accuracy, prepared_qwen3
from _lib.hugging_face import load
from _lib.pretraining import write_records
from megatron_selfdistill import config as configuration

if TYPE_CHECKING:  # torch, transformers and Megatron are imported by what needs them: --help answers at once
    from torch import Tensor

    from megatron_selfdistill.trainer import Trainer

PRETRAINING_STEPS = 600
NUM_STEPS = 60
NUM_SHOWN = 300  # held-out problems that transformers answers
NUM_TEXTS = 8  # prompts on which the logits are compared
TOLERANCE = 1e-3

# The settings are those of the quickstart; the checkpoint states the architecture of the model.
SUBTRACTION = ("~model", "model.make_vocab_size_divisible_by=8", "evaluation.every=0", "evaluation.at_start=false")
OWN_MODEL = ("optimizer=fp32", "data.global_batch_size=8", "schedule.max_tokens=2048", "metrics.console_every=1")


@dataclass(frozen=True)
class Task:
    """A model, its problems and the settings of the run."""

    hf: Path
    """The Hugging Face directory to start from."""
    config_name: str
    overrides: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example with the arguments of the command line; return the exit status."""
    parser = example_parser(__doc__)
    parser.add_argument("--hf", type=Path, help="a Hugging Face directory to start from (default: train one)")
    parser.add_argument("--data", type=Path, help="with --hf: a JSONL file with problem and solution")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="with --hf: settings of selfdistill")
    options = parser.parse_args(argv)
    if (options.hf is None) != (options.data is None) or (options.overrides and options.hf is None):
        parser.error(
            "--hf, --data and settings go together: give --hf DIR --data FILE [key=value ...], or none of them"
        )
    prepare_process()
    root = options.directory / "from_hugging_face" / (options.hf.name if options.hf else f"seed{options.seed}")
    if options.hf is None:
        task = subtraction_task(options.seed, options.directory)
    else:
        task = Task(options.hf, "train", (*OWN_MODEL, f"data.path={options.data}", *options.overrides))
    out, difference = distil(task, root, options.steps or NUM_STEPS, options.seed)
    if options.hf is None:
        console.print(f"greedy answers by transformers on {NUM_SHOWN} held-out problems")
        for label, directory in (("before", task.hf), ("after", out)):
            console.print(f"  {label:<8} {accuracy(directory, NUM_SHOWN):.3f}   {directory}")
    console.print(
        f"{out}: its logits differ from those of the trained Megatron model by at most {difference:.1e} "
        f"(accepted: {TOLERANCE:.0e})"
    )
    return 0 if difference <= TOLERANCE else 1


def distil(task: Task, root: Path, num_steps: int, seed: int) -> tuple[Path, float]:
    """Convert, train, convert back; return the new directory and the largest difference of the logits."""
    from megatron_selfdistill.interop import conversion

    megatron, run_dir, out = root / "megatron", root / "run", root / "self_distilled"
    for directory in (megatron, run_dir, out):
        shutil.rmtree(directory, ignore_errors=True)
    announce("Hugging Face to Megatron", f"selfdistill convert hf-to-megatron --hf {task.hf} --out {megatron}")
    conversion.hf_to_megatron(task.hf, megatron)
    overrides = (
        *task.overrides,
        f"num_steps={num_steps}",
        f"seed={seed}",
        f"data.tokenizer={task.hf}",
        f"checkpoint.load={megatron}",
        f"run_dir={run_dir}",
    )
    announce("self-distillation", command(overrides, task.config_name))
    texts, live = train(overrides, task.config_name)
    announce(
        "Megatron to Hugging Face",
        f"selfdistill convert megatron-to-hf --megatron {run_dir / 'checkpoints'} --hf-config {task.hf} --out {out}",
    )
    conversion.megatron_to_hf(run_dir / "checkpoints", out, hf_config=task.hf)
    return out, largest_difference(out, texts, live)


def train(overrides: Sequence[str], config_name: str) -> tuple[list[list[int]], list[Tensor]]:
    """Run the trainer; return the tokens of a few prompts and the logits of the trained model on each prompt."""
    from megatron_selfdistill.checkpoint.formats.stored_model import with_stored_architecture
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.metrics.guards import RunUnhealthy
    from megatron_selfdistill.train import loop
    from megatron_selfdistill.trainer import Trainer

    given = configuration.GivenKeys(overrides, config_name)
    config = with_stored_architecture(configuration.load(overrides, config_name), given)
    run_data = RunData.load(config)
    grid = ranks.initialize(config.parallel, config.seed)
    try:
        trainer = Trainer(config, run_data, grid)
        try:
            loop(trainer)
        except RunUnhealthy as unhealthy:
            trainer.save()
            console.print(f"stopped: {unhealthy}")
        finally:
            trainer.close()
        texts = [run_data.builder.student_prompt(problem) for problem in run_data.problems.problems[:NUM_TEXTS]]
        return texts, [logits(trainer, text) for text in texts]
    finally:
        ranks.shutdown()


def logits(trainer: Trainer, tokens: Sequence[int]) -> Tensor:
    """Return the logits [length, vocabulary] of the trained model; on one rank the model is a single chunk."""
    import torch

    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits: Tensor = trainer.learner.chunks[0](ids, torch.arange(len(tokens))[None], None)
    return logits[0, :, : trainer.run_data.vocab_size].float()


def largest_difference(hf: Path, texts: Sequence[Sequence[int]], live: Sequence[Tensor]) -> float:
    """Return the largest difference between the logits from transformers and those of the trained model."""
    import torch

    _, model = load(hf)
    with torch.no_grad():
        theirs = [
            model(torch.tensor([text])).logits[0, :, : mine.shape[-1]] for text, mine in zip(texts, live, strict=True)
        ]
    return max(float((a - b).abs().max()) for a, b in zip(theirs, live, strict=True))


def subtraction_task(seed: int, root: Path) -> Task:
    """Train the small Qwen3 or find it; return it with problems whose hints are the answers."""
    announce("base model", f"{PRETRAINING_STEPS} steps of next-token training in transformers")
    hf = prepared_qwen3(root, seed, PRETRAINING_STEPS)
    problems = write_records(root / "from_hugging_face" / "train.jsonl", subtraction.training_problems(seed))
    return Task(hf, CONFIG_NAME, (*SUBTRACTION, f"data.path={problems}"))


if __name__ == "__main__":
    sys.exit(main())
