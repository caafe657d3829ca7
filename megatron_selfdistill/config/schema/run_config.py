# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sections checkpoint, metrics, evaluation, guards and stop: what a run stores, reports and watches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_selfdistill.choices import VERIFY_LEVELS
from megatron_selfdistill.config.schema.field_checks import at_least, normalise, one_of, require


@dataclass(frozen=True)
class CheckpointConfig:
    """What is read at the start and written during a run."""

    load: str | None = None
    """A Megatron checkpoint (torch_dist or legacy) whose weights the run starts from; null starts from random weights.
    Its stored arguments give the architecture: what model.* says besides must not contradict them."""
    load_optimizer: bool = False
    """Take over its optimizer state too (torch_dist, the same kind of optimizer)."""
    verify: str = "checksums"
    """What is compared with a checkpoint's manifest before it is loaded: checksums (reads every file once, spread over
    the ranks), sizes, or none.  With none, a checkpoint of this program that has lost its manifest is loaded, too; it
    is refused otherwise.  Checkpoints of other programs have no manifest."""
    save_every: int = 100
    """Steps between checkpoints; 0 saves at the end only."""
    keep_last: int | None = 2
    """Checkpoints that are kept; null keeps all."""
    async_save: bool = False
    """Write in the background while training goes on."""
    resume: Any = True
    """true: continue from the newest checkpoint in the run folder, if there is one, unless a key that decides what the
    run learns has another value than when it was saved; such keys are named.  force: continue all the same, with the
    stored weights, optimizer and teacher and the present configuration.  false: refuse a folder with checkpoints."""

    def __post_init__(self) -> None:
        normalise("checkpoint", self)
        one_of("checkpoint.verify", self.verify, VERIFY_LEVELS)
        require(
            self.resume in (True, False, "force"),
            f"checkpoint.resume must be one of true, false, force, got {self.resume!r}",
        )
        at_least(0, "checkpoint", self, "save_every")
        at_least(1, "checkpoint", self, "keep_last")


@dataclass(frozen=True)
class MetricsConfig:
    """Where the numbers and some responses of a step go.  Numbers are always written to metrics.jsonl in the run
    folder."""

    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    console: bool = True
    """Progress bar and a line every ``console_every`` steps."""
    console_every: int = 1
    """Steps between console lines."""
    show_samples: int = 2
    """Responses that are shown as text, each token marked by how much the teacher disagrees: on the console, in
    TensorBoard, and whole in samples.jsonl in the run folder; the first of so many problems; 0 is none.  Of
    conversations only with conversations.show_contents=true."""
    show_samples_every: int = 10
    """Steps between samples; those of the first step are always shown."""

    def __post_init__(self) -> None:
        normalise("metrics", self)
        at_least(1, "metrics", self, "console_every show_samples_every")
        at_least(0, "metrics", self, "show_samples")

    def samples_due(self, step: int) -> bool:
        """Return whether samples of this step, counted from 1, are to be shown."""
        return self.show_samples > 0 and (step == 1 or step % self.show_samples_every == 0)


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out problems, without hints."""

    path: str | None = None
    """Problems with answers, in any of the forms that data.path takes; null is no evaluation."""
    split: str = "test"
    """Split of a hub data set."""
    subset: str | None = None
    """Subset (configuration) of a hub data set; null is its default one."""
    every: int = 0
    """Steps between evaluations; 0 is never."""
    at_start: bool = False
    """Also evaluate before the first step."""
    limit: int | None = None
    """Use only the first so many problems."""
    num_samples: int = 1
    """Samples per problem at rollout.temperature, besides one greedy response."""
    pass_at_k: list[int] = field(default_factory=lambda: [1])
    """Values of k for pass@k; none may exceed num_samples."""
    verifier: str = "math_verify"
    """math_verify (the response means the answer), exact_match (its final answer is the answer, letter by letter), or
    the dotted path of ``verify(response_text, problem) -> bool``."""

    def __post_init__(self) -> None:
        normalise("evaluation", self)
        at_least(0, "evaluation", self, "every num_samples")
        at_least(1, "evaluation", self, "limit")
        require(
            min(self.pass_at_k, default=1) >= 1,
            f"evaluation.pass_at_k must hold numbers of at least 1, got {self.pass_at_k}",
        )
        worst = max(self.pass_at_k, default=0)
        require(
            worst <= max(self.num_samples, 1),
            f"evaluation.pass_at_k asks for pass@{worst} but evaluation.num_samples is {self.num_samples}",
        )


@dataclass(frozen=True)
class GuardsConfig:
    """When a run is unhealthy.  A guard stops the run with a sentence and a checkpoint; null turns it off."""

    identity_tolerance: float | None = 1e-4
    """At the start, one prompt read twice by the same weights must give a loss below this, in nats per
    token."""
    max_teacher_cross_entropy: float | None = None
    """At the start, the teacher's cross-entropy on the first responses must lie below this, in nats per
    token."""
    non_finite: bool = True
    """Stop at a loss or gradient norm that is NaN or infinite; the step is not applied."""
    reference_steps: int = 5
    """The first steps, whose means are the reference of the guards below."""
    patience: int = 3
    """Consecutive steps that must violate a guard before it stops the run."""
    min_entropy_ratio: float | None = 0.02
    """Stop when the student's entropy falls below this share of its reference."""
    max_entropy_ratio: float | None = 3.0
    """Stop when the student's entropy rises above this multiple of its reference."""
    min_entropy_rise: float = 0.05
    """The entropy must also have risen by this many nats per token, so that a tiny reference raises no
    alarm."""
    min_length_ratio: float | None = 0.25
    """Stop when the mean response length falls below this share of its reference."""

    def __post_init__(self) -> None:
        normalise("guards", self)
        at_least(1, "guards", self, "reference_steps patience")


@dataclass(frozen=True)
class StopConfig:
    """When a run ends before its last step, besides SIGUSR1 and SIGTERM: with a checkpoint to go on from."""

    time_limit_minutes: float | None = None
    """The run ends by itself within so many minutes of its start; null: before its Slurm job ends, where it is one."""
    margin_minutes: float = 3.0
    """Of this time, what is kept for the last checkpoint, besides the longest step so far."""
    hang_timeout_minutes: float | None = None
    """Where no rank makes progress for so long, every rank's stack is written to run_dir/stacks, the one that hangs is
    named, and the run ends (exit status 5); null: 5/6 of parallel.distributed_timeout_minutes; 0: never."""

    def __post_init__(self) -> None:
        normalise("stop", self)
        at_least(0, "stop", self, "time_limit_minutes margin_minutes hang_timeout_minutes")
