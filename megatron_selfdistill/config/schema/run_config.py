# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The sections ``checkpoint``, ``metrics``, ``report``, ``evaluation``, ``guards`` and ``stop`` of the schema."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from megatron_selfdistill.choices import LOGGERS
from megatron_selfdistill.config.schema.field_checks import Part, require
from megatron_selfdistill.config.schema.ranges import (
    MAX_WAIT,
    DifferentEntries,
    FilePath,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    PositiveInt,
    Share,
    Text,
    at_least,
    at_most,
)
from megatron_selfdistill.errors import ConfigError

CONFIDENCE = r"(?i)\bconfidence[\s*]*:[\s*]*([01]?\.\d+|[01])(?!\.?\d|\s*%)"
"""The default of evaluation.confidence: ``Confidence: 0.9``, also in bold and in lower case, but no percentage."""


@dataclass(frozen=True)
class CheckpointConfig(Part, section="checkpoint", free="verify save_every keep_last async_save resume"):
    """The checkpoint that a run starts from, and the checkpoints that it writes."""

    load: FilePath | None = None
    """Megatron checkpoint (torch_dist or legacy) with the initial weights; null starts from random weights.  The
    arguments in the checkpoint give the architecture, and keys model.* must not contradict them."""
    load_optimizer: bool = False
    """Whether the optimizer state in checkpoint.load is taken too (torch_dist, the same kind of optimizer)."""
    verify: Annotated[str, OneOf(("checksums", "sizes", "none"))] = "checksums"
    """The comparison with the manifest of a checkpoint before the checkpoint is loaded: checksums (reads every file
    once; the ranks share the files), sizes, or none.  Only with none, a checkpoint of this program that has lost its
    manifest is loaded.  Checkpoints of other programs have no manifest."""
    save_every: NonNegativeInt = 100
    """Number of steps between checkpoints; 0 saves at the end only."""
    keep_last: PositiveInt | None = 2
    """Number of newest checkpoints that are kept; null keeps all."""
    async_save: bool = False
    """Whether a checkpoint is written in the background while training continues."""
    resume: Annotated[Any, OneOf((True, False, "force"))] = True
    """The use of checkpoints in the run directory: true continues from the newest checkpoint, but refuses to continue,
    and names the keys, if a key that decides what the run learns has changed.  force continues in this case, too, with
    the stored weights, optimizer and teacher and the present configuration.  false refuses a directory with
    checkpoints."""


LoggerName = Annotated[str, OneOf(LOGGERS, or_dotted=True)]
LEAK_WORDS = (
    *("the hint", "the hints", "given hint", "provided hint", "hint above"),  # "a hint of lemon" speaks of no hint
    *("given solution", "provided solution", "reference solution", "solution above", "as shown above"),
)


@dataclass(frozen=True)
class MetricsConfig(Part, section="metrics", free="*"):
    """The display of the metrics and of some responses of a step.

    Metrics are always written to metrics.jsonl in the run directory.
    """

    loggers: Annotated[list[LoggerName], DifferentEntries()] = field(default_factory=lambda: ["tensorboard"])
    """Places that show the metrics and samples, besides the files of the run: tensorboard (event files in the run
    directory), wandb (Weights & Biases; its own environment variables choose the project and the mode), and dotted
    paths of classes or functions that take a LoggedRun and return a MetricsLogger."""
    console_every: NonNegativeInt = 1
    """Number of steps between the lines of steps on the console; with 0 the console shows nothing of the steps."""
    teacher_every: PositiveInt = 10
    """Number of steps between measurements of target/mass_on_rare_student and target/mass_on_rare_reference, and, with
    target.anchor=reference, whose loss does not see the teacher's own logits, of the teacher alone (entropy/teacher,
    top1_agreement, teacher_cross_entropy).  The first step is always measured.  With target.anchor=student every step
    has the metrics of the teacher."""
    measure_every_token: PositiveInt = 8
    """The tokens of which such a step measures one: a mean over one token in 8 costs an eighth, and 1 is exact.  Each
    token is as likely as the others; which ones a step measures depends on the step and on the layout."""
    leak_words: list[Name] = field(default_factory=lambda: list(LEAK_WORDS))
    """Words and phrases by which a response speaks of its hint; leak/words_per_1000 counts each of them once per
    response, as whole words, in upper or lower case.  An empty list counts nothing, and so does a run whose problems
    all have one hint."""
    show_samples: NonNegativeInt = 2
    """Number of problems of a step whose first response is shown as text, with a mark at each token for the teacher's
    disagreement: on the console, in the loggers, and in full in samples.jsonl in the run directory, which has all turns
    of an episode; 0 is none.  Where the loss does not see the teacher's own logits, every model reads them once more.
    Responses of conversations are shown only with conversations.show_contents=true."""
    show_samples_every: PositiveInt = 10
    """Number of steps between samples; the samples of the first step are always shown."""
    explore_samples: NonNegativeInt = 1
    """Number of samples whose tokens are saved for the target explorer at the steps of evaluations, in the directory
    explored of the run directory, with about 4 KB per token; at most show_samples.  0 is none.  Each of these steps
    reads the samples once more with every model.  Responses of conversations are saved only with
    conversations.show_contents=true, and none with a number as target.anchor."""

    @property
    def num_explored(self) -> int:
        """The number of samples that are saved for the target explorer at an evaluation."""
        return min(self.explore_samples, self.show_samples)


@dataclass(frozen=True)
class ReportConfig(Part, section="report", free="*"):
    """The report of a run: report.html in the run directory, one file for any browser."""

    every: NonNegativeInt | None = None
    """Number of steps after which a run writes its report again, besides after every evaluation and at its end; null is
    only then, and 0 is never.  Another process writes the report, so training does not wait.  `selfdistill report`
    writes the report at any time."""
    num_problems: NonNegativeInt = 20
    """Number of held-out problems of which every evaluation keeps two responses as text, the greedy response and the
    first sample, in evaluation_samples.jsonl in the run directory, for the report.  With conversations, responses are
    kept only with conversations.show_contents=true."""


@dataclass(frozen=True)
class EvaluationConfig(Part, section="evaluation", free="path split subset every at_start limit num_samples pass_at_k"):
    """The evaluation on held-out problems, without hints."""

    path: FilePath | None = None
    """The place of the problems with answers, in any form of data.path; null is no evaluation."""
    split: Name = "test"
    """Split of a hub data set."""
    subset: Text | None = None
    """Subset (configuration) of a hub data set; null is the default subset."""
    every: NonNegativeInt = 0
    """Number of steps between evaluations; 0 is never."""
    at_start: bool = False
    """Whether the run is evaluated before the first step, too."""
    limit: PositiveInt | None = None
    """Number of problems that are used, from the first one on; null is all."""
    num_samples: NonNegativeInt = 1
    """Number of responses per problem at rollout.temperature, besides one greedy response."""
    pass_at_k: Annotated[list[PositiveInt], DifferentEntries()] = field(default_factory=lambda: [1])
    """Values of k of pass@k, at most num_samples each."""
    verifier: Annotated[str, OneOf(("math_verify", "exact_match"), or_dotted=True)] = "math_verify"
    """The judge that finds a response right or wrong: math_verify (its final answer means the answer), exact_match (its
    final answer is the answer letter by letter), or the dotted path of ``verify(response_text, problem) -> bool``."""
    confidence: Text | None = CONFIDENCE
    """Regular expression of the text in which a response states its confidence; the first group is a number from 0 to
    1.  The verifier does not see this text.  Null reads no text: every confidence is the probability of the response.
    """

    def check(self, config: Any) -> None:
        """Raise `ConfigError` where an evaluation would fail after hours of training."""
        worst = max(self.pass_at_k, default=0)
        require(
            worst <= max(self.num_samples, 1),
            f"evaluation.pass_at_k asks for pass@{worst} but evaluation.num_samples is {self.num_samples}",
        )
        try:
            num_groups = 1 if self.confidence_pattern is None else self.confidence_pattern.groups
        except re.error as error:
            raise ConfigError(f"evaluation.confidence={self.confidence}: {error}") from error
        require(num_groups >= 1, f"evaluation.confidence must have a group for the number, got {self.confidence!r}")

    @property
    def confidence_pattern(self) -> re.Pattern[str] | None:
        """The compiled ``confidence``; None for null."""
        return None if self.confidence is None else re.compile(self.confidence)


@dataclass(frozen=True)
class StartGuards(Part, section="guards.start"):
    """The key ``guards.start``: what a run checks before its first update; null turns a check off."""

    identity_tolerance: NonNegativeFloat | None = 1e-4
    """Largest loss, in nats per token, of one prompt that the same weights read as student and as teacher."""
    max_teacher_cross_entropy: NonNegativeFloat | None = None
    """Largest cross-entropy of the teacher on the first responses, in nats per token."""


@dataclass(frozen=True)
class EntropyGuards(Part, section="guards.entropy"):
    """The key ``guards.entropy``: the limits of the student's mean entropy; null turns a limit off."""

    min_ratio: NonNegativeFloat | None = 0.02
    """Smallest entropy of the student, as a share of its reference."""
    max_ratio: NonNegativeFloat | None = 3.0
    """Largest entropy of the student, as a multiple of its reference; a rise by less than 0.05 nats per token stops no
    run."""


@dataclass(frozen=True)
class GuardsConfig(Part, section="guards", free="*"):
    """The guards: each stops an unhealthy run with a message and a checkpoint; null turns a guard off."""

    start: StartGuards = field(default_factory=StartGuards)
    """What is checked at the start, before the first update."""
    max_log_prob_distance: NonNegativeFloat | None = 1.0
    """Largest mean distance, in nats per token, between the log-probs that the engine and the trainer give the sampled
    tokens (sampler/log_prob_mean_abs_diff), and those of one response (sampler/log_prob_worst_response).  The run warns
    where the former is above 0.1 nats."""
    non_finite: bool = True
    """Whether the run stops at a loss or gradient norm that is NaN or infinite; the step is not applied."""
    max_loss_ratio: NonNegativeFloat | None = 5.0
    """Largest loss, as a multiple of the first step's, of methods with a given hint and without rewards; a rise by less
    than 0.1 nats per token stops no run."""
    reference_steps: PositiveInt = 5
    """Number of first steps whose means are the reference of the guards below."""
    patience: PositiveInt = 3
    """Number of consecutive steps that must violate a guard before it stops the run."""
    entropy: EntropyGuards = field(default_factory=EntropyGuards)
    """The limits of the student's entropy."""
    min_length_ratio: NonNegativeFloat | None = 0.25
    """Smallest mean length of the responses, as a share of its reference.  Without this guard the run may be there to
    shorten its responses, and does not warn that those of the first step are cut."""
    max_loop_rise: Share | None = 0.5
    """Largest rise of the share of the sampled responses that end in a loop above its reference.  The run warns of a
    rise above 0.1."""
    max_truncated_rise: Share | None = 0.5
    """Largest rise of the share of the sampled responses that are cut at rollout.max_new_tokens above its reference."""


@dataclass(frozen=True)
class StopConfig(Part, section="stop", free="*"):
    """The reasons besides SIGUSR1 and SIGTERM to end a run early; the run can continue from its last checkpoint."""

    time_limit_minutes: Annotated[float, at_least(0), at_most(MAX_WAIT)] | None = None
    """Minutes from its start within which the run ends by itself; null: before its Slurm job ends, if it is one."""
    margin_minutes: Annotated[float, at_least(0), at_most(MAX_WAIT)] = 3.0
    """Minutes at the end of this time for the last checkpoint, besides the time of the longest step so far."""
    hang_timeout_minutes: Annotated[float, at_least(0), at_most(MAX_WAIT)] | None = None
    """Minutes without progress of any rank after which the stack of every rank is written to run_dir/stacks, the rank
    that hangs is named, and the run ends with exit status 5; null is 5/6 of parallel.distributed_timeout_minutes, and 0
    is never."""

    def hang_timeout_s(self, collective_minutes: float) -> float | None:
        """Return ``hang_timeout_minutes`` in seconds; None is never.

        ``collective_minutes``: the value of parallel.distributed_timeout_minutes.
        """
        minutes = self.hang_timeout_minutes
        return (collective_minutes * 5 / 6 if minutes is None else minutes) * 60 or None
