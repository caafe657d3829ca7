# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The teachers of a record: by its field, by a function of the user, one or several with shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from record_sources import load_problems

from megatron_selfdistill.data.problems import ProblemSet
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.teachers.taught_records import TaughtRecords
from megatron_selfdistill.teachers.teachers_config import NamedTeacher

TEACHERS = {"math": NamedTeacher("/m"), "code": NamedTeacher("/c", hint="none")}


def by_subject(record: dict[str, object], names: tuple[str, ...]) -> object:
    assert names == tuple(TEACHERS)
    return record["subject"]


CHOICE = f"{__name__}.by_subject"
CHOSEN = TaughtRecords(TEACHERS, choice=CHOICE)


@pytest.fixture
def loaded(tmp_path: Path):
    """Return a function that reads records as a data set, by their field teacher unless others are given."""

    def load(*records: dict[str, object], teachers: TaughtRecords | None = None, **options: Any) -> ProblemSet:
        file = tmp_path / "a.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return load_problems(file, teachers=teachers or TaughtRecords(TEACHERS), **options)

    return load


def record(number: int, **more: object) -> dict[str, object]:
    return {"problem": f"What is {number} + {number}?", "solution": f"It is {2 * number}.", **more}


def test_a_function_chooses_from_the_whole_record_in_place_of_the_field(loaded):
    subjects: list[object] = ["math", {"math": 1, "code": 3}]
    records = [record(i, subject=it, teacher="x") for i, it in enumerate(subjects)]
    found = loaded(*records, teachers=CHOSEN).problems
    assert [(it.teacher, it.shares) for it in found] == [("math", ()), ("code", (("code", 0.75), ("math", 0.25)))]


@pytest.mark.parametrize("bad", [{"subject": "art"}, {"subject": None}, {}])
def test_a_function_that_names_no_teacher_is_wrong_at_a_record_even_if_bad_records_are_skipped(loaded, bad):
    with pytest.raises(ConfigError, match=rf"a.jsonl:2: teachers.choose={CHOICE}"):
        loaded(record(1, subject="math"), record(2, **bad), teachers=CHOSEN, on_bad_record="skip")
    with pytest.raises(ConfigError, match=r"teachers.choose must .*nothing"):
        TaughtRecords(TEACHERS, choice=f"{__name__}.nothing")


def test_a_record_names_its_teacher_and_one_without_a_hint_needs_no_solution(loaded):
    unsolved = {"problem": "Sort a list.", "teacher": "code"}
    found = loaded(record(1, teacher="math"), unsolved)
    assert [(it.teacher, it.solution) for it in found.problems] == [("math", "It is 2."), ("code", "")]
    with pytest.raises(ValueError, match="field 'solution': expected a non-empty text"):
        loaded({"problem": "2 + 2?", "teacher": "math"})
    others = loaded(record(1, teacher="code"), unsolved)
    assert found.fingerprint != others.fingerprint, "the teachers decide what is learned"


@pytest.mark.parametrize("named", ["maths", None, {}, {"math": 1, "art": 1}, {"math": 0}, {"math": True}])
def test_a_record_with_an_unknown_teacher_is_bad_and_can_be_skipped(loaded, named):
    records = record(1, expert="math"), record(2, expert=named)
    options = {"teachers": TaughtRecords(TEACHERS, "expert"), "fields": {"teacher": "expert"}}
    with pytest.raises(ValueError, match=r"a.jsonl:2: field 'expert'"):
        loaded(*records, **options)
    found = loaded(*records, **options, on_bad_record="skip")
    assert found.num_skipped == 1 and [it.teacher for it in found.problems] == ["math"]


def test_a_renamed_column_of_teachers_that_no_record_has_is_an_error(loaded):
    only, fields = TaughtRecords({"math": TEACHERS["math"]}, "expert"), {"teacher": "expert"}
    with pytest.raises(ValueError, match=r"data.fields.teacher names the column 'expert', which no record has"):
        loaded(record(1), teachers=only, fields=fields)


def test_a_record_may_name_several_teachers_whose_shares_do_not_depend_on_their_order(loaded):
    names = [{"math": 3, "code": 1}, {"code": 0.1, "math": 0.3}, {"math": 2, "code": None}]
    first, second, third = loaded(*(record(i, teacher=one) for i, one in enumerate(names))).problems
    assert (first.teacher, first.shares) == ("code", (("code", 0.25), ("math", 0.75)))
    assert dict(second.shares) == pytest.approx(dict(first.shares))
    assert (third.teacher, third.shares) == ("math", ())
    alone, both = (loaded(record(0, id=1, teacher=one)) for one in ("code", names[0]))
    assert alone.fingerprint != both.fingerprint
