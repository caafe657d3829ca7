# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Which hints of other problems are the controls of a response, and which runs have controls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from characters import Characters
from made_methods import given_with

from megatron_selfdistill.config import Config, DataConfig, TargetConfig
from megatron_selfdistill.config.schema.target_config import planned_controls
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.controls import Controls, num_controls, with_decided_target
from megatron_selfdistill.data.given_solutions import build_contexts
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.loss.target import Target


def problem(name: str, solution: str, answer: str | None = None) -> Problem:
    return tiny.problem(f"{name}?", solution, answer, id=name)


def hints(controls: Controls, step: int, of: Problem) -> list[str]:
    """Return the hints in the control prompts of a problem."""
    texts = ["".join(map(chr, prompt)) for prompt in controls.prompts(step, of)]
    assert all(text.startswith(f"{of.id}?|") and text.endswith(":") for text in texts)
    return [text.removeprefix(f"{of.id}?|").removesuffix(":") for text in texts]


def controls_of(problems: Sequence[Problem], number: int = 3, seed: int = 1, **options: Any) -> Controls:
    return Controls(problems, given_with(Characters(), **options), number, seed)


PROBLEMS = [problem(f"p{i}", f"hint {i % 7}", answer=f"{i % 7 // 2}") for i in range(20)]


def test_the_hints_are_those_of_other_problems_with_other_answers_and_differ() -> None:
    controls = controls_of(PROBLEMS)
    for step in range(5):
        for of in PROBLEMS:
            found = hints(controls, step, of)
            assert len(set(found)) == 3 and of.solution not in found
            assert not {f"{hint.split()[1]}" for hint in found} & {str(i) for i in range(7) if str(i // 2) == of.answer}


def test_a_problem_meets_every_other_hint_equally_often_over_the_steps() -> None:
    plain = [replace(one, answer=None) for one in PROBLEMS[:7]]
    controls = controls_of(plain, number=2)
    counts = Counter(hint for step in range(600) for hint in hints(controls, step, plain[0]))
    assert set(counts) == {f"hint {i}" for i in range(1, 7)}
    assert all(abs(count - 200) < 60 for count in counts.values()), "five standard deviations"


def test_the_hints_depend_on_seed_step_and_problem_alone() -> None:
    controls = controls_of(PROBLEMS)
    again = [hints(controls_of(PROBLEMS), 3, of) for of in reversed(PROBLEMS)][::-1]
    assert again == [hints(controls, 3, of) for of in PROBLEMS]
    assert again != [hints(controls, 4, of) for of in PROBLEMS]
    assert again != [hints(controls_of(PROBLEMS, seed=2), 3, of) for of in PROBLEMS]


def test_where_there_are_few_hints_some_count_twice_and_right_answers_come_last() -> None:
    few = [problem("a", "one", "1"), problem("b", "two", "1"), problem("c", "three", "3"), problem("d", "one", "1")]
    assert hints(controls_of(few), 0, few[0]) == ["three", "two", "three"]
    assert hints(controls_of(few[:2]), 0, few[0]) == ["two"] * 3


def test_hints_that_do_not_fit_are_left_out_and_without_any_the_own_hint_is_its_control() -> None:
    long = [problem("a", "short"), problem("b", "x" * 200), problem("c", "y")]
    assert set(hints(controls_of(long), 0, long[0])) == {"y"}
    assert hints(controls_of(long[:2], number=2), 0, long[0]) == ["short"] * 2


def test_no_control_shows_the_own_hint_in_another_form_or_twice_what_fits_of_two() -> None:
    own, spaced, twin = problem("a", "42", "42"), problem("b", " 42 "), problem("c", "6 times 7", "7")
    same, other = problem("d", "forty-two", "42 "), problem("e", "one", "1")
    asked_again = replace(twin, messages=own.messages)
    assert hints(controls_of([own, spaced, other]), 0, own) == ["one"] * 3
    for step in range(9):
        assert hints(controls_of([own, asked_again, same, other], number=1), step, own) == ["one"]
        changed = replace(own, solution="42, I am sure")
        assert set(hints(controls_of([own, same, other], number=2), step, changed)) == {"one", "forty-two"}
    begins_alike = [problem(name, f"{'x' * 60} {name}") for name in "abc"]
    controls = controls_of([*begins_alike, other], max_length=40)
    controls = replace(controls, given=replace(controls.given, policy="truncate_end"))
    assert hints(controls, 0, begins_alike[0]) == ["one"] * 3


def test_all_samples_of_a_problem_have_the_same_controls() -> None:
    contexts = [ContextPair(name, [1], [2], [3], False) for name in ("p0", "p0", "p1")]
    rollouts = [SimpleNamespace(problem=PROBLEMS[i]) for i in (0, 0, 1)]
    first, second, other = controls_of(PROBLEMS).added(2, contexts, rollouts)
    assert len(first.control_prompts) == 3 and first == second
    assert other.control_prompts == controls_of(PROBLEMS).prompts(2, PROBLEMS[1])


@pytest.mark.parametrize(
    ("control", "solutions", "expected"), [("none", "ab", 0), ("auto", "ab", 5), ("auto", "aa", 0), ("other", "ab", 5)]
)
def test_auto_has_controls_where_the_hints_differ(control: str, solutions: str, expected: int) -> None:
    problems = [problem(str(i), text) for i, text in enumerate(solutions)]
    config = Config(target=TargetConfig(control=control, num_controls=5))
    assert num_controls(config, problems) == planned_controls(with_decided_target(config, problems)) == expected
    with pytest.raises(ConfigError, match="one text"):
        num_controls(Config(target=TargetConfig(control="other")), [problem("a", "one"), problem("b", "one")])


@pytest.mark.parametrize(
    "teachers",
    [
        {"math": {}, "code": {"hint": "none"}},
        {"math": {"transformer": {"num_layers": 2}, "load": "x"}},
        {"math": {}, "code": {}, "join": "product"},
    ],
)
def test_teachers_whose_readings_do_not_compare_have_no_controls(teachers: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="teachers"):
        Config(target=TargetConfig(control="other"), teachers=teachers)
    assert planned_controls(Config(target=TargetConfig(control="auto"), teachers=teachers)) == 0
    assert planned_controls(Config(target=TargetConfig(control="auto"), teachers={"math": {}})) == 2


def test_the_controls_of_a_teacher_have_its_own_wording() -> None:
    """A problem that several teachers read has the same hints for each of them, in the wording of each."""
    rollouts = [SimpleNamespace(problem=replace(PROBLEMS[0], teacher=name)) for name in ("", "math")]
    own = controls_of(PROBLEMS, of_teachers={"math": "M{problem} {solution}"})
    plain, of_math = own.added(2, [ContextPair("p0", [1], [2], [3], False)] * 2, rollouts)
    texts = ["".join(map(chr, prompt)) for prompt in of_math.control_prompts]
    assert texts == [f"Mp0? {hint}:" for hint in hints(own, 2, PROBLEMS[0])]
    assert plain.control_prompts == own.prompts(2, PROBLEMS[0])
    shared = replace(PROBLEMS[0], teacher="code", shares=(("code", 0.5), ("math", 0.5)))
    (context,) = build_contexts([own.given.pair(shared)], [SimpleNamespace(token_ids=[3], truncated=False)])
    (context,) = own.added(2, [context], [SimpleNamespace(problem=shared)])
    of_code, also_of_math = (one.control_prompts for one in context.of_teachers)
    assert also_of_math == of_math.control_prompts and of_code == context.control_prompts == plain.control_prompts


ONE_HINT = ["Be brief."] * 3


@pytest.mark.parametrize(
    ("solutions", "options", "anchor"),
    [
        (ONE_HINT, {}, "student"),
        ([*ONE_HINT, "4"], {}, "reference"),
        (ONE_HINT[:1], {}, "reference"),
        (ONE_HINT, {"target": TargetConfig(anchor="reference")}, "reference"),
        (ONE_HINT, {"teachers": {"math": {}}}, "reference"),
        (ONE_HINT, {"data": DataConfig(kind="conversations")}, "reference"),
        (ONE_HINT, {"data": DataConfig(solutions="none")}, "reference"),
    ],
)
def test_the_data_decide_the_anchor(solutions: Sequence[str], options: dict[str, Any], anchor: str) -> None:
    config = Config(**options)
    problems = [problem(str(i), text) for i, text in enumerate(solutions)]
    decided = with_decided_target(config, problems)
    assert decided.target.anchor == anchor
    assert replace(decided, target=config.target) == config
    assert Target.configured(config.target).anchor == "reference", "without data the anchor stands still"
