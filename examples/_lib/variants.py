# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the examples share: a variant is a run of the trainer from one base model, measured in the end.

Nothing here trains or samples by itself: a variant is a list of overrides for
``selfdistill --config-name quickstart``, and `command` says how to repeat it by hand.
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
    """One way to train."""

    title: str
    overrides: tuple[str, ...] = ()

    def on(self, problems: Path, *settings: str) -> Variant:
        """Return this variant with a file of problems and further overrides, which come last."""
        return dataclasses.replace(self, overrides=(f"data.path={problems}", *self.overrides, *settings))


SELF_DISTILLATION = Variant("Self-distillation")
"""The default recipe: the match capped at k = 1 + w, reverse KL, a frozen teacher."""
STRICT = Variant("Strict match", ("target=strict",))
TEACHER_ALONE = Variant("Teacher alone", ("recipe=teacher_alone",))
FORWARD_KL = Variant("Forward KL", ("loss.divergence=forward_kl",))
TEACHER_ALONE_FORWARD_KL = Variant("Teacher alone, forward KL", ("recipe=teacher_alone", "loss.divergence=forward_kl"))
LITERAL = Variant("Literal recipe", ("recipe=literal",))
REJECTION = Variant("RFT with a verifier", ("objective=rft",))
"""Rejection fine-tuning: next-token training on the own responses that the verifier accepts."""


@dataclass(frozen=True)
class Measurement:
    """What a model does on the held-out problems.  Shares are of all responses of the kind."""

    greedy: float
    sampled: float
    """At temperature 1."""
    pass_at_8: float
    hinted: float
    """At temperature 1, behind the teacher's prompt."""
    entropy: float
    """Mean over the tokens of one sampled response per problem, nats."""
    shows_work: float
    """Share of the sampled responses."""
    length: float
    """Mean of the sampled responses, tokens."""
    different: float
    """Different right answers among the samples of a problem, mean over the problems."""
    transcripts: tuple[Transcript, ...]
    """The greedy response to each problem."""


@dataclass(frozen=True)
class Outcome:
    """A variant that has run."""

    variant: Variant
    run_dir: Path
    status: int
    """The exit status: 0, or 3 where a guard stopped the run."""
    seconds: float
    """Wall time of the run with its evaluations, without the measurement."""
    measurement: Measurement

    @property
    def stopped(self) -> bool:
        """A guard stopped the run."""
        return self.status == EXIT_UNHEALTHY


def run_variant(variant: Variant, base: Base, folder: Path, *, num_samples: int = 8) -> Outcome:
    """Train from ``base`` in ``folder/<title>``, which is made anew, and measure what came out."""
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
    """The base's held-out problems, by the model in the run folder ``trained``, or by the base itself.

    ``num_samples``: sampled responses per problem, at least 8.
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
    """The shell command that runs the trainer with these overrides, from the present folder."""
    if shutil.which("selfdistill"):
        program = "selfdistill"
    elif (script := Path(sys.executable).parent / "selfdistill").exists():
        program = _relative(script)
    else:
        program = f"{_relative(Path(sys.executable))} -m megatron_selfdistill.train"
    # The folder is where the verifiers are; one thread, as here, gives the same numbers to the last digit.
    settings = f"PYTHONPATH={shlex.quote(_relative(Path(__file__).parents[1]))} OMP_NUM_THREADS=1"
    return f"{settings} {program} --config-name {config_name} {shlex.join(overrides)}"


def _relative(path: Path) -> str:
    """As seen from the present folder, where it lies below it."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def prepared_base(task: ModuleType, seed: int, root: Path, num_steps: int | None = None) -> Base:
    """The base model with this seed under ``root/bases``, and a line on the console."""
    steps = num_steps or task.PRETRAINING_STEPS
    console.rule(f"[bold]base model, seed {seed}: {steps} steps of next-token training", align="left")
    base = make_base(task, seed, root / "bases", steps)
    found = f"pretrained in {base.seconds:.0f} s" if base.seconds else "found"
    console.print(f"{found}: {base.folder}", soft_wrap=True)
    return base


def example_parser(doc: str | None) -> argparse.ArgumentParser:
    """Options that all examples have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=5, help="of the base, the data and the samples (default: 5)")
    parser.add_argument("--steps", type=int, default=None, help="of each variant, instead of the example's own")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where everything goes (default: runs)")
    return parser


def prepare_process() -> None:
    """One thread, and no warnings about libraries that a CPU run does not need.

    The matrices are so small that a second thread costs more than it brings.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    silence_known_warnings()
    import torch

    torch.set_num_threads(1)
