# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The key teachers: names, entries, the teacher of a record, and what contradicts several teachers."""

from __future__ import annotations

import pytest

from megatron_selfdistill.config import load
from megatron_selfdistill.config.schema.whole_config import projects_reference
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.teachers.teachers_config import (
    NamedTeacher,
    chosen_by,
    factors_of,
    joins,
    keeps_start,
    named_teachers,
    product_of,
    teacher_of_record,
)

MATH = "teachers.math.load=/m"
PRODUCT = [MATH, "teachers.code={load: /c, weight: 1}", "teachers.join=product"]


def test_teachers_come_in_the_order_of_their_names_and_have_defaults():
    config = load(["teachers={math: {load: /m, weight: 0.5}, default: {template: '{problem} {solution}'}}"])
    assert list(config.named_teachers) == ["default", "math"]
    assert config.named_teachers["math"] == NamedTeacher("/m", "given", None, 0.5)
    assert projects_reference(config) and not projects_reference(load(["teachers.default.hint=given"]))


def test_teachers_are_joined_by_their_sum_unless_the_entry_says_product():
    two = [MATH, "teachers.code.load=/c"]
    assert not joins(load(two).teachers) and not joins(load([*two, "teachers.join=sum"]).teachers)
    config = load([*two, "teachers.join=product", "teachers.choose=my.choose"])
    assert chosen_by(config.teachers) == "my.choose"
    assert joins(config.teachers) and list(config.named_teachers) == ["code", "math"]
    assert factors_of(product_of(config.named_teachers)) == ["code", "math"] and factors_of("math") == ["math"]


def test_the_start_is_kept_for_the_reference_and_for_a_teacher_without_a_directory():
    beside_student = [MATH, "target.anchor=student"]
    assert load([]).named_teachers == {} and keeps_start(load([])) and not projects_reference(load([]))
    assert keeps_start(load([MATH])) and not keeps_start(load(beside_student))
    assert keeps_start(load([*beside_student, "teachers.default.hint=given"]))


@pytest.mark.parametrize(
    ("names", "named", "found"),
    [
        (["math"], None, "math"),
        (["code", "default", "math"], None, "default"),
        (["code", "math"], None, None),
        (["code", "math"], "math", "math"),
        (["math"], "code", None),
    ],
)
def test_a_record_that_names_no_teacher_has_the_only_one_or_the_default(names, named, found):
    assert teacher_of_record(named, {name: NamedTeacher() for name in names}) == found


@pytest.mark.parametrize("name", ["2nd", "a b", "", 3])
def test_a_name_is_one_word(name):
    with pytest.raises(ConfigError, match="a key of teachers must be a name of letters, digits, _ and -, such as math"):
        named_teachers({name: {"load": "/m"}})


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["teachers.math.path=/m"], "teachers.math has no entry 'path'"),
        ([MATH, "teachers.math.template='{problem}'"], "teachers.math.template"),
        ([MATH, "teachers.math.hint=none", "teachers.math.template='{problem}{solution}'"], "teachers.math.template"),
        ([MATH, "teacher.weights=ema"], "teacher.weights=frozen"),
        ([MATH, "rollout.guidance=mixed"], "teachers.guide"),
        ([MATH, "teachers.join=mean"], "teachers.join"),
        ([*PRODUCT, "target.anchor=student"], "target.anchor=reference"),
        ([MATH, "teachers.choose=my.choose", "data.fields.teacher=it"], "without choose"),
        ([MATH, "method.name=grpo", "rollout.num_samples=2"], "teachers need a method"),
        ([MATH, "teachers.math.weight=1", "target.rule=batch"], "teachers.math.weight"),
        ([MATH, "teachers.math.weight=1", "target.k_max=2"], "target.k_max=2"),
        (["data.fields.teacher=expert"], "data.fields.teacher"),
    ],
)
def test_impossible_teachers_are_refused_with_their_key(overrides, named):
    with pytest.raises(ConfigError, match=named):
        load(overrides)
