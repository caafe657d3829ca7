# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A sample shows what its own teachers see."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from megatron_selfdistill.data.contexts import TeacherPrompt
from megatron_selfdistill.metrics.samples import NUMBERS, Sample, SeenHint, console_text, sample_of
from megatron_selfdistill.teacher import Teachers
from megatron_selfdistill.teachers.configured_teachers import ConfiguredTeachers
from megatron_selfdistill.teachers.teachers_config import NamedTeacher
from tests.unit.metrics.test_samples import Letters, context


def test_a_sample_shows_what_its_own_teachers_see_and_names_them():
    teachers = {"code": NamedTeacher(hint="none"), "math": NamedTeacher()}
    numbers, own = {name: [1.0] for name in NUMBERS}, SimpleNamespace(_settings=teachers)

    def of(teacher: str, several: tuple[str, ...] = ()) -> Sample:
        one = replace(
            context("a", [4]), teacher=teacher, of_teachers=tuple(TeacherPrompt(name, 0.5, [1]) for name in several)
        )
        return sample_of(one, ConfiguredTeachers.seen_hint(own, one, "the hint"), numbers, Letters())

    unhinted, hinted, both = of("code"), of("math"), of("code", ("code", "math"))
    assert (unhinted.solution, unhinted.teacher) == ("", "code (sees no hint)")
    assert (hinted.solution, hinted.teacher) == ("the hint", "math")
    assert (both.solution, both.teacher) == ("the hint", "code (sees no hint), math")
    assert unhinted.record()["solution"] == "" and unhinted.record()["teacher"] == "code (sees no hint)"
    assert "teacher: code (sees no hint)\n" in console_text(unhinted, "", coloured=False).plain
    assert "hint: " not in console_text(unhinted, "", coloured=False).plain
    for has_teacher in (True, False):
        default = SimpleNamespace(config=SimpleNamespace(has_teacher=has_teacher))
        assert Teachers.seen_hint(default, context("a", [4]), "the hint") == SeenHint("the hint" * has_teacher)
