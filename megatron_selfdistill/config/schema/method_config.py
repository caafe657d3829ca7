# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The section ``method`` of the schema: the name of a method, its settings, and what it needs from the core.

The file of a method (methods/) defines its settings, as a subclass of `MethodSettings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_selfdistill.config.functions import function_named
from megatron_selfdistill.config.schema.field_checks import check_fields, kinds_of
from megatron_selfdistill.config.schema.ranges import Name, OneOf, is_dotted, taken_apart

if TYPE_CHECKING:
    from megatron_selfdistill.config.schema.whole_config import Config

HINTED, SAME = "hinted", "same"
"""Values of `Needs.teacher_prompt`."""
STUDENT, TEACHER = "student", "teacher"
"""Values of `Needs.samples`."""
SAMPLED, MEASURED = "sampled", "measured"
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
    """The log-probs that the coefficients of tokens depend on: sampled (those of the sampler, for the ratio p / mu) or
    measured (also those of student and target, which one more forward pass measures).  None: no log-probs."""
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

    @property
    def hint_follows(self) -> bool:
        """Whether the hint is known only once the responses of a step are sampled."""
        return self.hint in (LATER, FUNCTION)


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
    def divergence_numbers(self) -> Mapping[str, float]:
        """The numbers of the loss's divergence that only this method sets, by the names of `loss.target.Divergence`."""
        return {}

    @property
    def teacher_template(self) -> str | None:
        """The teacher's wording where data.teacher_template is null; None is the wording for solutions."""
        return None

    def check(self, config: Config) -> None:
        """Raise `ConfigError` where other keys contradict the method."""

    def require_start(self, config: Config) -> None:
        """Raise `ConfigError` where a run could not begin: for a setting that names a function that does not exist."""
        settings: Any = self
        for name, kind in kinds_of(settings.__class__).items():
            value, (_, ranges, _) = getattr(settings, name), taken_apart(kind)
            if any(isinstance(one, OneOf) and one.or_dotted for one in ranges) and value and is_dotted(value):
                function_named(f"method.{name}", value, {})
