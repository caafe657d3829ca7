# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Variants of training: each variant is one run of the trainer from a base model, measured after the run.

A variant is a list of overrides for ``selfdistill --config-name quickstart``; `command` returns the command that
repeats the run by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from rich.console import Console

from _lib.pretraining import CONFIG_NAME, Base, make_base
from megatron_selfdistill import config as configuration
from megatron_selfdistill.compat.known_warnings import silence_known_warnings
from megatron_selfdistill.train import EXIT_UNHEALTHY, train

if TYPE_CHECKING:  # torch and Megatron are imported by what needs them: --help answers at once
    from megatron_selfdistill.evaluation.held_out import EvaluationResult, Transcript

console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)


@dataclass(frozen=True)
class Variant:
    """A way to train: a title and the overrides of the configuration."""

    title: str
    overrides: tuple[str, ...] = ()

    def on(self, problems: Path, *settings: str) -> Variant:
        """Return this variant with a file of problems and further overrides, which come last."""
        return dataclasses.replace(self, overrides=(f"data.path={problems}", *self.overrides, *settings))


SELF_DISTILLATION = Variant("Self-distillation")
"""The default recipe: the entropy match with k capped at 1 + w, reverse KL, and a frozen teacher."""
STRICT = Variant("Strict match", ("target=strict",))
TEACHER_ALONE = Variant("Teacher alone", ("recipe=teacher_alone",))
FORWARD_KL = Variant("Forward KL", ("loss.divergence=forward_kl",))
TEACHER_ALONE_FORWARD_KL = Variant("Teacher alone, forward KL", ("recipe=teacher_alone", "loss.divergence=forward_kl"))
LITERAL = Variant("Literal recipe", ("recipe=literal",))
REJECTION = Variant("RFT with a verifier", ("objective=rft",))
"""Rejection fine-tuning: next-token training on the model's own responses that the verifier accepts."""


@dataclass(frozen=True)
class Measurement:
    """The figures of a model on the held-out problems; each share is a share of all responses of its kind."""

    greedy: float
    """Accuracy of greedy decoding."""
    sampled: float
    """Accuracy of samples at temperature 1."""
    pass_at_8: float
    hinted: float
    """Accuracy of samples at temperature 1 with the teacher's prompt."""
    entropy: float
    """Mean entropy over the tokens of one sampled response per problem, in nats."""
    shows_work: float
    """Share of the sampled responses that show their work."""
    length: float
    """Mean length of the sampled responses, in tokens."""
    different: float
    """Number of different right answers among the samples of a problem, mean over the problems."""
    transcripts: tuple[Transcript, ...]
    """The greedy response to each problem."""


@dataclass(frozen=True)
class Outcome:
    """The run of a variant and its measurement."""

    variant: Variant
    run_dir: Path
    status: int
    """The exit status: 0, or 3 if a guard stopped the run."""
    seconds: float
    """Wall time of the run with its evaluations and without the measurement."""
    measurement: Measurement

    @property
    def stopped(self) -> bool:
        """Whether a guard stopped the run."""
        return self.status == EXIT_UNHEALTHY


def run_variant(variant: Variant, base: Base, folder: Path, *, num_samples: int = 8) -> Outcome:
    """Train from ``base`` in a new ``folder/<title>`` and measure the trained model."""
    run_dir = folder / "".join(c if c.isalnum() or c == "-" else "_" for c in variant.title.lower())
    shutil.rmtree(run_dir, ignore_errors=True)
    overrides = (*base.overrides, *variant.overrides)
    console.rule(f"[bold]{variant.title}", align="left")
    by_hand = command((*overrides, f"run_dir={run_dir}-by-hand"))
    console.print(by_hand, style="dim", markup=False, soft_wrap=True)
    began = time.perf_counter()
    status = train(configuration.load([*overrides, f"run_dir={run_dir}"], CONFIG_NAME))
    seconds = time.perf_counter() - began
    return Outcome(variant, run_dir, status, seconds, measure(base, run_dir, num_samples=num_samples))


def measure(base: Base, trained: Path | None = None, *, num_samples: int = 8) -> Measurement:
    """Measure the model of the run directory ``trained``, or the base itself, on the base's held-out problems.

    ``num_samples`` is the number of sampled responses per problem, at least 8.
    """
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.run_data import RunData
    from megatron_selfdistill.trainer import Trainer

    overrides = [
        *base.overrides,
        f"data.path={base.held_out}",
        f"data.global_batch_size={len(base.held_out.read_text().splitlines())}",  # one batch is all of them
        f"evaluation.num_samples={num_samples}",
        "evaluation.pass_at_k=[1,8]",
        "metrics.console=false",
        f"run_dir={(trained or base.folder) / 'measured'}",
    ]
    if trained is not None:
        overrides.append(f"checkpoint.load={trained / 'checkpoints'}")
    config = configuration.load(overrides, CONFIG_NAME)
    with console.status("measuring on held-out problems"):
        grid = ranks.initialize(config.parallel, config.seed)
        try:
            trainer = Trainer(config, RunData.load(config), grid)
            try:
                result = trainer.evaluate(num_transcripts=None)
                hinted = trainer.evaluate(hinted=True)
                own = trainer.measure(trainer.next_batch())
            finally:
                trainer.close()
        finally:
            ranks.shutdown()
    assert hinted.sampled_accuracy is not None
    return _measurement(result, hinted.sampled_accuracy, own["entropy/student"], base.task.shows_work)


def _measurement(
    result: EvaluationResult, hinted: float, entropy: float, shows_work: Callable[[str], bool]
) -> Measurement:
    samples = [t for t in result.transcripts if t.sample is not None]
    right: dict[str, set[str]] = {t.problem_id: set() for t in samples}
    for transcript in samples:
        if transcript.correct:
            right[transcript.problem_id].add(transcript.response)
    assert result.sampled_accuracy is not None and result.sampled_mean_length is not None
    return Measurement(
        greedy=result.greedy_accuracy,
        sampled=result.sampled_accuracy,
        pass_at_8=result.pass_at_k[8],
        hinted=hinted,
        entropy=entropy,
        shows_work=sum(shows_work(t.response) for t in samples) / len(samples),
        length=result.sampled_mean_length,
        different=sum(map(len, right.values())) / len(right),
        transcripts=tuple(t for t in result.transcripts if t.sample is None),
    )


def command(overrides: Sequence[str], config_name: str = CONFIG_NAME) -> str:
    """Return the shell command that runs the trainer with some overrides from the current directory."""
    if shutil.which("selfdistill"):
        program = "selfdistill"
    elif (script := Path(sys.executable).parent / "selfdistill").exists():
        program = _relative(script)
    else:
        program = f"{_relative(Path(sys.executable))} -m megatron_selfdistill.train"
    # examples/ holds the verifiers; one thread, as in this process, gives the same numbers to the last digit.
    settings = f"PYTHONPATH={shlex.quote(_relative(Path(__file__).parents[1]))} OMP_NUM_THREADS=1"
    return f"{settings} {program} --config-name {config_name} {shlex.join(overrides)}"


def _relative(path: Path) -> str:
    """Return ``path`` relative to the current directory if ``path`` lies below that directory."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def prepared_base(task: ModuleType, seed: int, root: Path, num_steps: int | None = None) -> Base:
    """Make or find the base model of a seed under ``root/bases`` and report it on the console."""
    steps = num_steps or task.PRETRAINING_STEPS
    console.rule(f"[bold]base model, seed {seed}: {steps} steps of next-token training", align="left")
    base = make_base(task, seed, root / "bases", steps)
    found = f"pretrained in {base.seconds:.0f} s" if base.seconds else "found"
    console.print(f"{found}: {base.folder}", soft_wrap=True)
    return base


def example_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all examples have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=5, help="seed of the base, the data and the samples (default: 5)")
    parser.add_argument("--steps", type=int, default=None, help="steps of each variant (default: the example's own)")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="directory of all outputs (default: runs)")
    return parser


def prepare_process() -> None:
    """Use one thread and silence warnings about libraries that a run on a CPU does not need.

    The matrices are so small that a second thread costs more time than it saves.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    silence_known_warnings()
    import torch

    torch.set_num_threads(1)
