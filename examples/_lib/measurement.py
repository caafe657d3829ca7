# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The measurement of a model on the held-out problems of its task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from _lib.command_line import CONFIG_NAME, console
from _lib.episode_measurement import play
from _lib.pretraining import Base
from megatron_selfdistill import config as configuration

if TYPE_CHECKING:  # torch and Megatron are imported by the functions that need them, so that --help answers at once
    from megatron_selfdistill.evaluation.evaluation_result import EvaluationResult, Transcript


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
    stated: float | None
    """Share of the sampled responses that state a confidence; None, as the next three, for episodes."""
    ocg: float | None
    """Mean confidence of the sampled responses less their accuracy."""
    ece: float | None
    """Expected calibration error of the sampled responses."""
    spr: float | None
    """Share of the pairs of a right and a wrong sampled response in which the right one has the higher confidence; None
    unless some are right and some are wrong."""
    transcripts: tuple[Transcript, ...]
    """The greedy response to each problem."""


def measure(base: Base, trained: Path | None = None, *, num_samples: int = 8) -> Measurement:
    """Measure the model of the run directory ``trained``, or the base itself, on the base's held-out problems.

    ``num_samples`` is the number of sampled responses per problem, at least 8.  Where the task has an environment, the
    episodes take the place of responses, and `Measurement.length` is the number of their responses.
    """
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.trainer import Trainer

    overrides = [
        *base.overrides,
        f"data.path={base.held_out}",
        f"data.global_batch_size={len(base.held_out.read_text().splitlines())}",  # one batch is all of them
        f"evaluation.num_samples={num_samples}",
        "evaluation.pass_at_k=[1,8]",
        "metrics.console_every=0",
        f"run_dir={(trained or base.directory) / 'measured'}",
    ]
    if trained is not None:
        overrides.append(f"checkpoint.load={trained / 'checkpoints'}")
    if base.task.environment:
        with console.status("playing episodes with held-out problems"):
            return _of_episodes(overrides, num_samples)
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


def _of_episodes(overrides: list[str], num_samples: int) -> Measurement:
    sampled = play(overrides, num_samples)
    return Measurement(
        greedy=play(overrides, 1, "rollout.temperature=0").accuracy,
        sampled=sampled.accuracy,
        pass_at_8=(sampled if num_samples == 8 else play(overrides, 8)).solved,
        hinted=play(overrides, 1, "method.view=privileged").accuracy,
        entropy=sampled.entropy,
        shows_work=mean(turns > 1 for turns in sampled.turns),
        length=mean(sampled.turns),
        different=sampled.solved,
        stated=None,
        ocg=None,
        ece=None,
        spr=None,
        transcripts=(),
    )


def _measurement(
    result: EvaluationResult, hinted: float, entropy: float, shows_work: Callable[[str], bool]
) -> Measurement:
    samples = [t for t in result.transcripts if t.sample is not None]
    right: dict[str, set[str]] = {t.problem_id: set() for t in samples}
    for transcript in samples:
        if transcript.correct:
            right[transcript.problem_id].add(transcript.response)
    confidence = result.sampled_calibration
    assert result.sampled_accuracy is not None and result.sampled_mean_length is not None and confidence is not None
    return Measurement(
        greedy=result.greedy_accuracy,
        sampled=result.sampled_accuracy,
        pass_at_8=result.pass_at_k[8],
        hinted=hinted,
        entropy=entropy,
        shows_work=sum(shows_work(t.response) for t in samples) / len(samples),
        length=result.sampled_mean_length,
        different=sum(map(len, right.values())) / len(right),
        stated=confidence.stated_confidence,
        ocg=confidence.ocg,
        ece=confidence.ece,
        spr=confidence.spr,
        transcripts=tuple(t for t in result.transcripts if t.sample is None),
    )
