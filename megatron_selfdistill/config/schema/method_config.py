# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The section ``method`` of the schema: the name of a method, its settings, and what it needs from the core.

The file of a method (methods/) defines its settings, as a subclass of `MethodSettings`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from megatron_selfdistill.config.functions import function_named
from megatron_selfdistill.config.schema.field_checks import check_fields, kinds_of, require
from megatron_selfdistill.config.schema.ranges import Name, OneOf, is_dotted, taken_apart

HINTED, SAME = "hinted", "same"
"""Values of `Needs.teacher_prompt`."""
STUDENT, TEACHER = "student", "teacher"
"""Values of `Needs.samples`."""
SAMPLED, MEASURED, READ = "sampled", "measured", "read"
"""Values of `Needs.log_probs`."""
GIVEN, FOUND, LATER, FUNCTION = "given", "found", "later", "function"
"""Values of `Needs.hint`."""


@dataclass(frozen=True)
class Needs:
    """What a method needs from the core, as facts that follow from its settings alone."""

    teacher_prompt: str | None = HINTED
    """The prompt after which the teacher of the loss reads a response: hinted (with the hint) or same (the prompt that
    the response was sampled after, which the student is then trained after, too).  None: the loss has no teacher."""
    samples: str | None = STUDENT
    """The prompt that responses are sampled after: the student's or the teacher's.  None: the method samples none."""
    log_probs: str | None = None
    """The log-probs that the coefficients of tokens depend on: sampled (those of the sampler, for the ratio p / mu),
    measured (also those of student and target, which one more forward pass measures) or read (the same pass, for
    weights of the divergence, which is all that the loss has).  None: no log-probs."""
    rewards: bool = False
    """Whether every response gets a reward before the step trains."""
    group_size: int = 1
    """The least number of responses to a problem (rollout.num_samples) with which the method works."""
    contexts_per_sample: int = 1
    """The greatest number of contexts in which each response is trained on."""
    scores: bool = False
    """Whether the teacher's weights read texts beside the loss."""
    asks_model: bool = False
    """Whether the model itself writes texts, such as hints, so that a sampler must be built."""
    hint: str = GIVEN
    """When the hint is known: given (with the data), found (before the sampling, but responses change it), later (after
    the sampling) or function (after the sampling, by a function that may read the solutions of the data)."""

    whole: bool = False
    """Whether the method must see whole responses even where nothing judges, compares or shows them."""

    @property
    def reads_whole(self) -> bool:
        """Whether the method must see whole responses: to judge, to compare or to show them, or by ``whole``."""
        return self.whole or self.rewards or self.hint != GIVEN or max(self.group_size, self.contexts_per_sample) > 1

    @property
    def hint_follows(self) -> bool:
        """Whether the hint is known only once the responses of a step are sampled."""
        return self.hint in (LATER, FUNCTION)

    @property
    def reads_solutions(self) -> bool:
        """Whether the method shows or trains on solutions; others learn from rewards or from samples alone."""
        return self.teacher_prompt == HINTED or self.samples != STUDENT or self.hint != GIVEN

    @property
    def reads_one_prompt(self) -> bool:
        """Whether student and teacher read a response after the prompt that it was sampled after."""
        return self.teacher_prompt == SAME

    @property
    def own_prompts(self) -> bool:
        """Whether the responses, or the teacher's readings, follow other prompts than the student's and the hinted."""
        return self.samples == TEACHER or self.reads_one_prompt

    @property
    def compares(self) -> bool:
        """Whether the method compares responses, by rewards, the ratio p / mu, found hints or in groups."""
        return self.rewards or self.has_ratio or self.hint != GIVEN or self.group_size > 1

    @property
    def has_ratio(self) -> bool:
        """Whether the loss may have terms with the ratio p / mu of student and sampler."""
        return self.log_probs in (SAMPLED, MEASURED)

    @property
    def has_policy_term(self) -> bool:
        """Whether the loss has a term -log p of the response token beside the divergence from a target."""
        return self.teacher_prompt is not None and self.has_ratio

    @property
    def loss_should_fall(self) -> bool:
        """Whether the loss is a divergence from a teacher with a given hint, and no reward works against it."""
        return self.teacher_prompt == HINTED and self.hint == GIVEN and not self.rewards

    def check(self, method: str, config: Any) -> None:
        """Raise `ConfigError` where the `Config` ``config`` contradicts these needs of ``method``, a key and its name.

        Without these refusals, a run would train on something else than its keys say.
        """
        solutions, loss, rollout = config.data.solutions, config.loss, config.rollout
        of_data = config.data.kind == "problems" and self.teacher_prompt == HINTED and self.hint == GIVEN
        require(
            solutions not in ("other", "none") or of_data,
            f"data.solutions={solutions} is an ablation of hints from the solutions of the data, but {method} with "
            f"data.kind={config.data.kind} has no such hints: set data.solutions=given",
        )
        require(
            not self.reads_one_prompt or config.teacher.weights != "current",
            f"{method} compares the student with other weights after one prompt: it needs teacher.weights=frozen "
            "or ema, got current",
        )
        require(
            not config.samples_responses
            or self.group_size == 1
            or (config.data.kind == "problems" and rollout.num_samples >= self.group_size),
            f"{method} compares the responses to one problem: it needs data.kind=problems and at least "
            f"{self.group_size} for rollout.num_samples, got {config.data.kind} and {rollout.num_samples}",
        )
        require(
            loss.fused != "keep_gradient" or not self.has_policy_term,
            f"loss.fused=keep_gradient keeps the gradient of the divergence alone, but {method} adds a term of "
            "another gradient: set loss.fused=low_memory, none or null",
        )


def sampled_log_probs_key(config: Any) -> str | None:
    """Return the key of ``config`` that needs the probability of a response when it was sampled; None if none does."""
    correction = config.loss.rollout_correction
    if config.needs.has_ratio:
        return f"method.name={config.method.name}"
    return f"loss.rollout_correction={correction}" if correction != "none" else None


@dataclass(frozen=True)
class MethodSettings:
    """The method and its settings; `selfdistill --keys method=NAME` lists the settings of a method."""

    name: Name = "default"
    """The method: the name of a file in methods/, or the dotted path of a class of yours."""

    def __post_init__(self) -> None:
        check_fields("method", self)

    @property
    def needs(self) -> Needs:
        """What the method needs from the core."""
        return Needs()

    @property
    def required(self) -> Sequence[str]:
        """The keys with the values that the method needs: with others the run would train on something else."""
        return ()

    @property
    def divergence_numbers(self) -> Mapping[str, float]:
        """The numbers of the loss's divergence that only this method sets, by the names of `loss.target.Divergence`."""
        return {}

    @property
    def teacher_template(self) -> str | None:
        """The teacher's wording where data.teacher_template is null; None is the wording for solutions."""
        return None

    def check(self, config: Any) -> None:
        """Raise `ConfigError` where other keys of the `Config` ``config`` contradict the method."""
        for needed in self.required:
            key, _, value = needed.partition("=")
            got = str(attrgetter(key)(config))
            require(got == value, f"method.name={self.name} needs {needed}, got {got}")

    def require_start(self, config: Any) -> None:
        """Raise `ConfigError` where a run could not begin: for a setting that names a function that does not exist."""
        settings: Any = self
        for name, kind in kinds_of(settings.__class__).items():
            value, (_, ranges, _) = getattr(settings, name), taken_apart(kind)
            if any(isinstance(one, OneOf) and one.or_dotted for one in ranges) and value and is_dotted(value):
                function_named(f"method.{name}", value, {})
