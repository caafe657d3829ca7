# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Runs that are measured while they train: accuracy, work and entropy at chosen steps, on held-out problems."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from _lib.command_line import CONFIG_NAME
from _lib.pretraining import Base
from _lib.variants import Variant
from megatron_selfdistill import config as configuration

if TYPE_CHECKING:  # torch and Megatron are imported by the functions that need them, so that --help answers at once
    from megatron_selfdistill.evaluation.evaluation_result import EvaluationResult, Transcript
    from megatron_selfdistill.trainer import AccumulatedBatch, Trainer

NUM_ENTROPIES = 10
"""The steps over whose responses the entropy of a point is averaged."""
Further = Callable[[Sequence["Transcript"]], Mapping[str, float]]
QUIET = ("metrics.console_every=0", "metrics.show_samples=0", "evaluation.every=0", "evaluation.at_start=false")
WITHOUT_GUARDS = (
    *("guards.entropy.max_ratio=null", "guards.entropy.min_ratio=null"),
    *("guards.min_length_ratio=null", "guards.max_loss_ratio=null", "guards.max_loop_rise=null"),
    "guards.max_truncated_rise=null",
)
"""Overrides with which also an unhealthy run trains to its end."""


@dataclass(frozen=True)
class Point:
    """The figures of a model after some steps; each share is a share of all responses to held-out problems."""

    step: int
    greedy: float
    """Accuracy of greedy decoding."""
    sampled: float
    """Accuracy of samples at temperature 1."""
    shows_work: float
    """Share of the samples that show their work."""
    entropy: float | None
    """Mean entropy of the student over the tokens of its responses in the last `NUM_ENTROPIES` steps, in nats; None
    where a run without a teacher does not measure it."""
    different: float
    """Number of different right answers among the samples of a problem, mean over the problems."""
    further: Mapping[str, float] = field(default_factory=dict)
    """Figures that only some tasks have, by name."""


def watch(
    variant: Variant,
    base: Base,
    run_dir: Path,
    steps: Sequence[int],
    *,
    num_samples: int = 2,
    further: Further | None = None,
    before_step: Callable[[Trainer, int], None] | None = None,
    at_end: Callable[[Trainer], None] | None = None,
) -> list[Point]:
    """Train ``variant`` from ``base`` in a new ``run_dir`` and return its points at ``steps``, which ascend.

    The run has as many steps as the last of ``steps``.  ``num_samples`` is the number of sampled responses per problem.
    ``further`` returns further figures of the samples.  ``before_step`` receives the trainer and the number of steps
    that are done, before each step.  ``at_end`` receives the trainer of the last step, before the trainer closes.
    Raises: `RunUnhealthy` where a guard stops the run.
    """
    shutil.rmtree(run_dir, ignore_errors=True)
    settings = (f"num_steps={max(steps[-1], 1)}", f"evaluation.num_samples={num_samples}", *QUIET)
    points = []
    with opened((*base.overrides, *variant.overrides, *settings, f"run_dir={run_dir}")) as trainer:
        entropies: deque[float | None] = deque(maxlen=NUM_ENTROPIES)
        for step in range(steps[-1] + 1):
            if step in steps:
                points.append(
                    point(step, trainer.evaluate(num_transcripts=None), recent(entropies, trainer), base, further)
                )
            if step < steps[-1]:
                if before_step is not None:
                    before_step(trainer, step)
                entropies.append(train_one_step(trainer).get("entropy/student"))
        if at_end is not None:
            at_end(trainer)
    return points


@contextmanager
def opened(overrides: Sequence[str], config_name: str = CONFIG_NAME) -> Iterator[Trainer]:
    """Yield the trainer of a configuration, the quickstart's by default, with ``overrides``; close it at the end."""
    from megatron_selfdistill.checkpoint.formats.stored_model import with_stored_architecture
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.trainer import Trainer

    given = configuration.GivenKeys(overrides)
    config = with_stored_architecture(configuration.load(overrides, config_name), given)
    grid = ranks.initialize(config.parallel, config.seed)
    try:
        trainer = Trainer(config, RunData.load(config), grid)
        try:
            trainer.run_directory.write()
            yield trainer
        finally:
            trainer.close()
    finally:
        ranks.shutdown()


def train_one_step(trainer: Trainer) -> dict[str, float]:
    """Take one step of the loop of train.py; return its metrics."""
    step: list[AccumulatedBatch] = []
    for batch in trainer.batches():
        step.append(trainer.forward_backward(batch, trainer.pack(batch), step))
    metrics = trainer.update(step)
    trainer.finish_step(step, metrics)
    return metrics


def recent(entropies: Sequence[float | None], trainer: Trainer) -> float | None:
    """Return the mean of the entropies, or before the first step the entropy of the responses of the next step."""
    if not trainer.config.has_teacher:
        return None
    if not entropies:
        return trainer.measure(trainer.next_batch())["entropy/student"]
    known = [entropy for entropy in entropies if entropy is not None]
    return mean(known) if known else None


def point(step: int, result: EvaluationResult, entropy: float | None, base: Base, further: Further | None) -> Point:
    """Return the figures of an evaluation with all transcripts."""
    samples = [t for t in result.transcripts if t.sample is not None]
    right: dict[str, set[str]] = {t.problem_id: set() for t in samples}
    for transcript in samples:
        if transcript.correct:
            right[transcript.problem_id].add(transcript.response)
    assert result.sampled_accuracy is not None
    return Point(
        step=step,
        greedy=result.greedy_accuracy,
        sampled=result.sampled_accuracy,
        shows_work=share_with_work(samples, base),
        entropy=entropy,
        different=sum(map(len, right.values())) / len(right),
        further=further(samples) if further is not None else {},
    )


def share_with_work(transcripts: Sequence[Transcript], base: Base) -> float:
    """Return the share of the transcripts that show their work."""
    return float(mean(base.task.shows_work(t.response) for t in transcripts))
