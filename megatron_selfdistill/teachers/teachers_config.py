# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The key ``teachers`` of the schema: teachers with other weights than those that the student starts from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from megatron_selfdistill.config.schema.data_config import check_view, plays_episodes
from megatron_selfdistill.config.schema.field_checks import check_fields, require, require_slots
from megatron_selfdistill.config.schema.method_config import GIVEN, HINTED, STUDENT
from megatron_selfdistill.config.schema.ranges import FilePath, OneOf, Text
from megatron_selfdistill.config.schema.target_config import TeacherWeight

CHOOSE, JOIN, GUIDE = "choose", "join", "guide"
"""The entries of the key ``teachers`` that are no teachers: the dotted path of the function that chooses for a record,
how the teachers of one record become one loss, and the name of the teacher whose problems are guided."""
TEACHER_JOINS = ("sum", "product")
"""Values of `JOIN`: the sum of the divergences from each teacher's target, or one target of the teachers' product."""
DEFAULT_TEACHER = "default"
"""The name of the teacher of the records that name none, where there are several teachers."""


@dataclass(frozen=True)
class NamedTeacher:
    """One teacher of the key ``teachers``."""

    load: FilePath | None = None
    """Checkpoint of Megatron or Hugging Face directory with the weights, or adapters on the weights at the start of the
    run (a checkpoint of adapters, or a directory of PEFT); null: the weights at the start of the run."""
    hint: Annotated[str, OneOf(("given", "none"))] = "given"
    """What this teacher's prompt shows beside the problem: given (the solution) or none."""
    template: Text | None = None
    """This teacher's user message, with the slot {problem} and, with a hint, {solution}; null is data.teacher_template,
    or without a hint data.student_template."""
    weight: TeacherWeight | None = None
    """Weight w of this teacher's logits; null is target.teacher_weight."""
    view: dict[str, Any] = field(default_factory=dict)
    """What this teacher's prompt has for itself: entries of data.views.teacher, in place of those."""
    transformer: dict[str, Any] = field(default_factory=dict)
    """Fields of Megatron's TransformerConfig for a teacher of another architecture than the student's, as
    model.transformer for the student's; they go over those that its directory states."""

    @property
    def is_hinted(self) -> bool:
        """Whether this teacher's prompt shows a solution."""
        return self.hint != "none"


def named_teachers(teachers: Mapping[str, Any]) -> dict[str, NamedTeacher]:
    """Return the teachers of the key ``teachers`` by name, in the order of the names.

    Raises: `ConfigError` for a name that is none, an unknown entry, and a value outside of its range.
    """
    return {
        name: _named_teacher(name, teachers[name])
        for name in sorted(teachers, key=str)
        if name not in (CHOOSE, JOIN, GUIDE)
    }


def chosen_by(teachers: Mapping[str, Any]) -> str | None:
    """Return the dotted path of the function that chooses the teacher of a record; None where the record names it.

    Raises: `ConfigError` for another value, and for a function without teachers.
    """
    path = teachers.get(CHOOSE)
    require(
        path is None or isinstance(path, str),
        f"teachers.{CHOOSE} must be the dotted path of a function (package.module.function), and no teacher may have "
        f"this name, got {path!r}",
    )
    require(
        path is None or bool(named_teachers(teachers)),
        f"teachers.{CHOOSE}={path} has no teacher to choose: name teachers",
    )
    return path


def joins(teachers: Mapping[str, Any]) -> bool:
    """Return whether several teachers of a record teach as their product.  Raises: `ConfigError` for another value."""
    value = teachers.get(JOIN, "sum")
    require(
        value in TEACHER_JOINS,
        f"teachers.{JOIN} must be one of {', '.join(TEACHER_JOINS)}, and no teacher may have this name, got {value!r}",
    )
    return bool(value == "product")


def guide_of(teachers: Mapping[str, Any]) -> str | None:
    """Return the name of the teacher whose problems are guided; None without one.

    Raises: `ConfigError` for a value that is no name of a teacher.
    """
    name, names = teachers.get(GUIDE), list(named_teachers(teachers))
    require(
        name is None or name in names,
        f"teachers.{GUIDE} must be the name of one of the teachers ({', '.join(names) or 'none is named'}), and no "
        f"teacher may have this name, got {name!r}",
    )
    return name


def keeps_start(config: Any) -> bool:
    """Return whether the loss reads the weights at the start of the run, as a teacher or as the reference."""
    named = config.named_teachers.values()
    return config.is_anchored or not named or any(teacher.load is None for teacher in named)


def why_teachers_differ(config: Any) -> str | None:
    """Return why readings of the teachers after the hints of other problems do not compare; None if they do."""
    if config.teachers.get(JOIN) == "product":
        return f"teachers.{JOIN}=product joins teachers whose hints differ"
    if any(not one.is_hinted or one.transformer for one in config.named_teachers.values()):
        return "the key teachers has one without a hint, or of another architecture"
    return None


def product_of(names: Iterable[str]) -> str:
    """Return the name of the product of the teachers ``names``, of one teacher its own; no teacher has such a name."""
    return "+".join(names)


def factors_of(name: str) -> list[str]:
    """Return the names of the teachers whose `product_of` is ``name``."""
    return name.split("+")


def _named_teacher(name: str, entries: Any) -> NamedTeacher:
    key = f"teachers.{name}"
    require(
        isinstance(name, str) and re.fullmatch(r"[A-Za-z_][\w-]*", name) is not None,
        f"a key of teachers must be a name of letters, digits, _ and -, such as math, got {name!r}",
    )
    require(isinstance(entries, dict), f"{key} must be a mapping, such as {{load: DIR}}, got {entries!r}")
    known = [one.name for one in fields(NamedTeacher)]
    for entry in entries:
        require(entry in known, f"{key} has no entry {entry!r}: its entries are {', '.join(known)}")
    teacher = NamedTeacher(**entries)
    check_fields(key, teacher)
    check_view(f"{key}.view", teacher.view)
    require_slots(f"{key}.template", teacher.template, ["problem", *["solution"] * teacher.is_hinted])
    return teacher


def teacher_of_record(named: object, teachers: Mapping[str, NamedTeacher]) -> str | None:
    """Return the teacher of a record that names ``named``; None if it is unknown or not decided.

    A record that names none has the only teacher, or of several teachers the one with the name `DEFAULT_TEACHER`.
    """
    if named is None:
        named = next(iter(teachers)) if len(teachers) == 1 else DEFAULT_TEACHER
    return named if isinstance(named, str) and named in teachers else None


def check_teachers(config: Any) -> None:
    """Raise `ConfigError` where the key ``teachers`` of ``config`` is wrong, or other keys contradict it."""
    needs, target, guides = config.needs, config.target, config.rollout.samples_target
    joined, guide, chosen = joins(config.teachers), guide_of(config.teachers), chosen_by(config.teachers)
    require(
        "teacher" not in config.data.fields or (bool(config.named_teachers) and chosen is None),
        "data.fields.teacher names the column with the teacher of a record, but no record names a teacher: set the "
        "key teachers without choose, or unset data.fields.teacher",
    )
    if not config.teachers:
        return
    hinted = needs.teacher_prompt == HINTED and needs.hint == GIVEN and needs.samples == STUDENT
    require(
        hinted and needs.log_probs is None and not needs.scores and needs.contexts_per_sample == 1,
        "teachers need a method whose teacher reads sampled responses for the loss alone, with the solutions of the "
        "data, such as method.name=default without method.measured_signals and named method.token_weights, got "
        f"method.name={config.method.name}",
    )
    require(
        config.data.kind == "problems" and not plays_episodes(config) and config.teacher.weights == "frozen",
        "teachers need the records of data.kind=problems, which name them, teacher.weights=frozen and no environment, "
        f"got {config.data.kind}, {config.teacher.weights} and environment.name={config.environment.name}",
    )
    require(
        guide is not None or not guides,
        f"rollout.guidance={config.rollout.guidance} samples from the target of one teacher: set teachers.{GUIDE} to "
        f"{' or '.join(config.named_teachers)}, or rollout.guidance=none",
    )
    for name in (name for name, one in config.named_teachers.items() if one.weight is not None):
        key = f"teachers.{name}.weight"
        require(
            target.rule in ("entropy_matched", "fixed") and (not joined or target.anchor in ("reference", "auto")),
            f"{key} needs target.rule=entropy_matched or fixed, and with teachers.{JOIN}=product "
            f"target.anchor=reference, got {target.rule} and {target.anchor}",
        )
        target.require_no_k(key)
