# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The section ``hints`` of the schema: hints that the model itself or a function writes for the teacher."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from megatron_selfdistill.choices import HINT_WRITERS
from megatron_selfdistill.config.schema.field_checks import check_fields, require
from megatron_selfdistill.config.schema.ranges import NonNegativeFloat, NonNegativeInt, OneOf, PositiveInt, Text

_SLOT = re.compile(r"(?<!\{)\{([A-Za-z_]\w*)\}(?!\})")


@dataclass(frozen=True)
class HintsConfig:
    """Hints that are written during the run (data.solutions=skill or next_state)."""

    summarizer: Annotated[str, OneOf(HINT_WRITERS, or_dotted=True)] = "model"
    """The writer of skills under data.solutions=skill: model (the present weights, asked with summarizer_template) or
    the dotted path of a function ``summarize(problem, response_text, reward) -> text or None``."""
    summarizer_template: Text | None = None
    """The request for a skill, with the slots {problem}, {response} and {reward}; it must ask for a JSON object with
    the texts success_analysis, mistake_analysis and golden_workflow.  Null takes the wording in sources/skills.py."""
    keep: PositiveInt = 8
    """Number of skills per problem in the bank; no further skill is written for a problem that has so many."""
    exploration: NonNegativeFloat = 1.0
    """Weight c of exploration in the choice of a skill: the skill with the greatest mean reward + c sqrt(ln N / n),
    for n uses of the skill among N uses of all skills of the problem; skills without a use come first."""
    judge: Annotated[str, OneOf(HINT_WRITERS, or_dotted=True)] = "model"
    """The writer of hints under data.solutions=next_state: model (the present weights, asked with judge_template) or
    the dotted path of a function ``judge(problem, response_text, next_state) -> text or None``."""
    judge_template: Text | None = None
    """The request for a hint, with the slots {response}, {role} and {next_state}; it must ask for \\boxed{1} or
    \\boxed{-1} and for a hint between [HINT_START] and [HINT_END].  Null takes the wording in
    sources/next_state_hints.py."""
    votes: PositiveInt = 1
    """Number of answers of the model per turn, for hints and for rewards; the longest hint wins."""
    min_length: NonNegativeInt = 10
    """Number of characters that a hint under data.solutions=next_state must exceed."""

    def __post_init__(self) -> None:
        check_fields("hints", self)
        slots = {"summarizer_template": "problem response reward", "judge_template": "response role next_state"}
        for name, wanted in slots.items():
            template = getattr(self, name)
            found, needed = set(_SLOT.findall(template or "")), set(wanted.split())
            require(
                template is None or found == needed,
                f"hints.{name} must have the slots {_shown(wanted.split())} and no others, got "
                f"{_shown(sorted(found))}; write {{{{name}}}} for literal braces",
            )


def _shown(slots: list[str]) -> str:
    return ", ".join(f"{{{slot}}}" for slot in slots) or "none"
