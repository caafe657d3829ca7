# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Guards stop a run that has gone wrong, after patience, and let a healthy one go on."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_selfdistill.config import from_mapping, load
from megatron_selfdistill.config.schema.run_config import EntropyGuards, GuardsConfig
from megatron_selfdistill.metrics.first_checks import (
    check_identity,
    check_teacher_canary,
    first_step_warnings,
    warning_of_a_silent_teacher,
)
from megatron_selfdistill.metrics.guards import Guards, RunUnhealthy
from megatron_selfdistill.metrics.step_warnings import warning_of_an_untrained_step

CONFIG = GuardsConfig(reference_steps=3, patience=2)
HEALTHY = {"loss/mean": 0.1, "gradient_norm": 1.0, "entropy/student": 0.06, "response/length_mean": 22.0}
ENTROPY, LOSS, LENGTH, NORM = "entropy/student", "loss/mean", "response/length_mean", "gradient_norm"
LOOPS, CUT = "response/loop_share", "response/truncated_share"
UNFINISHED = "response/unfinished_share"
DISTANCE, WORST = "sampler/log_prob_mean_abs_diff", "sampler/log_prob_worst_response"
ENGINES = "the vLLM servers http://node7:8000"


def guards_with(engines: str | None = None, *, defaults: bool = False, **changes: Any) -> Guards:
    """Return guards of a run whose student samples and whose loss should fall; ``changes``: other keys, or flags."""
    names = ("student_samples", "loss_should_fall", "has_one_horizon")
    flags = {name: changes.pop(name, True) for name in names}
    config = dataclasses.replace(GuardsConfig() if defaults else CONFIG, **changes)
    return Guards(config, *([engines] if engines else []), **flags)


def stopped_at(guards: Guards, key: str, values: list[float], start: int = 0) -> tuple[int, str] | None:
    """(place, message) of the stop; None where the whole trace passes."""
    for place, value in enumerate(values[start:], start):
        try:
            guards.check(place, HEALTHY | {key: value})
        except RunUnhealthy as stop:
            return place, str(stop)
    return None


JUMP = [0.026, 0.25, 0.24, 0.26, 0.25]
"""A real model at a learning rate of 1e-4; a mean over the jump would hide it."""
NO_END = [0.0] * 5 + [0.375, 0.469, 0.281, 0.438, 0.594, 0.5, 0.625, 0.688, 0.719]
"""A run with controls whose accuracy fell from .82 to .00; nothing else was unusual."""
RISE = [0.0, 0.25, 0.5, *[0.75] * 4, 1.0, 0.0, 0.8, 0.8125]
DEFAULTS: dict[str, Any] = {"defaults": True}
OF_ENGINES: dict[str, Any] = {"engines": ENGINES}


@pytest.mark.parametrize(
    ("key", "values", "place", "options", "off"),
    [
        (LOSS, [0.1, math.nan], 1, {}, {"non_finite": False}),
        (LOSS, [0.1, math.inf], 1, {}, {"non_finite": False, "max_loss_ratio": None}),
        (NORM, [1.0, math.nan], 1, {}, {"non_finite": False}),
        (ENTROPY, [0.06, 0.05, 0.07, 0.0011, 0.0011, 0.0011], 4, {}, {"entropy": EntropyGuards(min_ratio=None)}),
        (ENTROPY, [0.06, 0.06, 0.06, 0.3, 0.4], 4, {}, {"entropy": EntropyGuards(max_ratio=None)}),
        (LENGTH, [22, 22, 22, 5, 5], 4, {}, {"min_length_ratio": None}),
        (LOSS, JUMP, 3, DEFAULTS, {"max_loss_ratio": None}),
        (LOSS, JUMP, 3, DEFAULTS, {"loss_should_fall": False}),
        (CUT, NO_END, 13, DEFAULTS, {"max_truncated_rise": None}),
        (CUT, NO_END, 13, DEFAULTS, {"student_samples": False}),
        (LOOPS, RISE, 10, {}, {"max_loop_rise": None}),
        (LOOPS, RISE, 10, {}, {"student_samples": False}),
        (DISTANCE, [1.1, 1.1], 1, OF_ENGINES, {"max_log_prob_distance": None}),
        (DISTANCE, [math.inf, math.inf], 1, OF_ENGINES, {"max_log_prob_distance": 30.0, "engines": None}),
        (DISTANCE, [math.nan, math.nan], 1, OF_ENGINES, {"engines": None}),
        (WORST, [2.5, 2.5], 1, OF_ENGINES, {"max_log_prob_distance": None}),  # one of many engines is wrong
    ],
)
def test_what_has_gone_wrong_stops_a_run_after_patience_unless_its_guard_is_off(key, values, place, options, off):
    step, message = stopped_at(guards_with(**options), key, values)
    assert step == place and key in message
    assert "engines" not in options or ENGINES in message
    assert stopped_at(guards_with(**options | off), key, values) is None


@pytest.mark.parametrize(
    ("key", "values", "options"),
    [
        pytest.param(ENTROPY, [0.06] * 3 + [0.0013] * 9, {}, id="just above the smallest ratio"),
        pytest.param(ENTROPY, [0.06] * 3 + [0.175] * 5, {}, id="just below the largest ratio"),
        pytest.param(ENTROPY, [1e-3] * 3 + [0.05] * 5, {}, id="a tiny entropy may rise by many times"),
        pytest.param(ENTROPY, [0.06] * 3 + [0.9, 0.06] * 3, {}, id="violations that end before patience"),
        pytest.param(ENTROPY, [0.06] * 3 + [0.9, 0.0001] * 2, {}, id="violations of two guards"),
        pytest.param(LOOPS, [0.6] * 3 + [1.0] * 5, {}, id="a base that loops from the start"),
        pytest.param(LOSS, [0.026, *[0.125] * 9], DEFAULTS, id="a rise by less than 0.1"),
        pytest.param(LOSS, [0.1, *[0.49] * 9], DEFAULTS, id="less than 5 times"),
        pytest.param(LOSS, [0.026, 0.3, 0.3, 0.1, 0.3, 0.3, 0.02], DEFAULTS, id="losses that are not in a row"),
        pytest.param(DISTANCE, [9.0, 0.01] * 5, OF_ENGINES, id="distances that are not in a row"),
        pytest.param(WORST, [9.0, 1.0] * 3, OF_ENGINES, id="worst responses that are not in a row"),
    ],
)
def test_a_healthy_run_goes_on(key, values, options):
    assert stopped_at(guards_with(**options), key, values) is None


def test_unfinished_responses_are_neither_short_nor_cut_and_longer_ones_may_have_more_loops():
    open_ended = {LENGTH: 2.0, UNFINISHED: 0.9}
    guards = guards_with(max_log_prob_distance=None)
    for step, metrics in enumerate([{LENGTH: 22.0, CUT: 0.0}] * 3 + [open_ended] * 5):
        guards.check(step, HEALTHY | metrics)
    with pytest.raises(RunUnhealthy, match=LENGTH):  # nine tenths of the responses are whole, and short
        for step in (8, 9):
            guards.check(step, HEALTHY | {LENGTH: 2.0, UNFINISHED: 0.1})
    late = guards_with()
    for step, metrics in enumerate([{UNFINISHED: 0.9}] * 3 + [{CUT: 0.7}] * 5):  # the horizon has reached the limit
        late.check(step, HEALTHY | metrics)
    assert stopped_at(guards_with(has_one_horizon=False), LOOPS, RISE) is None
    assert warned_at(guards_with(has_one_horizon=False), [0.0] * 5 + [0.9] * 9) == []


def test_the_first_step_may_already_be_not_finite_and_a_run_may_have_no_entropies():
    with pytest.raises(RunUnhealthy, match="loss/mean"):
        Guards(CONFIG).check_finite(0, {"loss/mean": math.nan})
    Guards(CONFIG).check_finite(0, {"loss/mean": 1.0})  # before the gradient norm is known
    guards = Guards(CONFIG)
    for step, length in enumerate([22.0] * 5 + [2.0]):
        guards.check(step, {LOSS: 0.1, LENGTH: length})
    with pytest.raises(RunUnhealthy, match=LENGTH):
        guards.check(6, {LOSS: 0.1, LENGTH: 2.0})


@pytest.mark.parametrize("only", ["min_ratio", "max_ratio"])
def test_nan_violates_once_there_is_a_reference(only):
    off = {name: None for name in ("min_ratio", "max_ratio") if name != only}
    guards = guards_with(non_finite=False, entropy=EntropyGuards(**off))
    trace = [math.nan, 0.06, 0.06, math.nan, 0.06, math.nan, 0.06, math.nan, math.nan]
    assert stopped_at(guards, ENTROPY, trace)[0] == 8


def test_an_engine_that_disagrees_is_warned_of_once():
    guards = Guards(CONFIG, ENGINES)
    warnings = [guards.warnings({DISTANCE: value}) for value in (0.1, 0.11, 0.12, 0.01, 0.5)]
    assert [len(each) for each in warnings] == [0, 1, 0, 0, 0] and ENGINES in warnings[1][0]
    assert len(Guards(CONFIG, ENGINES).warnings({DISTANCE: math.nan})) == 1
    assert Guards(CONFIG, ENGINES).warnings({}) == Guards(CONFIG).warnings({DISTANCE: 9.0}) == []
    assert guards_with(ENGINES, max_log_prob_distance=None).warnings({DISTANCE: 9.0}) == []


def warned_at(guards: Guards, shares: list[float], start: int = 0) -> list[int]:
    """Return the places in ``shares`` of response/loop_share at which ``guards`` warn, from ``start`` on."""
    places = []
    for place, share in enumerate(shares[start:], start):
        metrics = HEALTHY | {LOOPS: share}
        if guards.warnings(metrics):
            places.append(place)
        guards.check(place, metrics)
    return places


@pytest.mark.parametrize(
    ("shares", "places"),
    [
        ([0.1, 0.2, 0.3, 0.31, 0.31, 0.9], [4]),
        ([0.1, 0.2, 0.3, 0.31, 0.31, 0.0, 0.9, 0.9], [4]),
        ([0.1, 0.2, 0.3, 0.31, 0.29, 0.31, 0.29], []),
        ([0.0, 0.0, 0.0, 0.1, 0.1, 0.1], []),
        ([0.9, 0.9], []),
    ],
)
def test_a_rise_of_the_loops_is_warned_of_once_after_patience(shares, places):
    """The mean of the first three shares is the reference, and two steps in a row are the patience."""
    assert warned_at(guards_with(max_loop_rise=None), shares) == places
    assert warned_at(guards_with(max_loop_rise=None, student_samples=False), shares) == []


def resumed(guards: Guards, before: Guards) -> Guards:
    guards.load_state_dict(json.loads(json.dumps(before.state_dict())))
    return guards


@pytest.mark.parametrize("killed_at", range(9))
def test_a_resumed_run_guards_and_warns_as_if_it_had_never_stopped(killed_at):
    trace = [0.06, 0.05, 0.08, 0.3, 0.06, 0.07, 0.3, 0.3, 0.3]
    before = guards_with()
    stop = stopped_at(before, ENTROPY, trace[:killed_at])
    assert (stop or stopped_at(resumed(guards_with(), before), ENTROPY, trace, killed_at))[0] == 7
    shares = [0.1, 0.2, 0.3, 0.31, 0.31]
    if killed_at < len(shares):
        before = guards_with(max_loop_rise=None)
        assert warned_at(before, shares[:killed_at]) == []
        assert warned_at(resumed(guards_with(max_loop_rise=None), before), shares, killed_at) == [4]


def test_a_run_stopped_by_a_guard_stops_again_unless_it_has_recovered():
    guards = guards_with()
    assert stopped_at(guards, ENTROPY, [0.06, 0.06, 0.06, 0.9, 0.9]) is not None
    assert stopped_at(resumed(guards_with(), guards), ENTROPY, [0.9]) is not None
    assert stopped_at(resumed(guards_with(), guards), ENTROPY, [0.06, 0.9, 0.06]) is None


@pytest.mark.parametrize(
    ("check", "limit", "good", "bad"),
    [
        (check_identity, 1e-4, [-1e-9], [2e-4, -2e-4, math.nan, math.inf]),
        (check_teacher_canary, 2.0, [0.3], [2.1, math.nan]),
    ],
)
def test_the_identity_check_and_the_teacher_canary_want_a_number_within_their_limits(check, limit, good, bad):
    for value in good:
        check(value, limit)
    check(11.0, None)
    for value in bad:
        with pytest.raises(RunUnhealthy, match=r"guards\.start\."):
            check(value, limit)


@pytest.mark.parametrize(
    ("metrics", "teacher_weight", "warns"),
    [
        ({"loss/reverse_kl": 4e-8}, 0.75, True),
        ({"loss/reverse_kl": 1e-6}, 0.75, False),
        ({"loss/reverse_kl": 4e-8}, 0.0, False),
        ({"loss/mean": 0.0}, 0.75, False),
    ],
)
def test_a_teacher_that_says_what_the_student_says_is_warned_of(metrics, teacher_weight, warns):
    assert ("data.teacher_template" in (warning_of_a_silent_teacher(metrics, teacher_weight) or "")) == warns


FIRST = {"student_nll": 2.3, "entropy/student": 2.4, "response/truncated_share": 0.9, "response/loop_share": 0.4}
FIRST |= {"teacher/kl_to_anchor": 0.2, "target/let_through": 0.031}


@pytest.mark.parametrize(
    ("key", "metrics", "number"),
    [
        (None, {}, 4),
        (None, {"entropy/student": 1.4}, 3),
        (None, {"student_nll": 1.4}, 3),
        (None, {"response/truncated_share": 0.33}, 3),
        (None, {"response/loop_share": 0.1}, 3),
        (None, {"target/let_through": 0.11}, 3),
        (None, {"teacher/kl_to_anchor": 1e-7}, 3),
        ("target.anchor=student", {}, 3),
        ("guards.min_length_ratio=null", {}, 3),  # a run that is to shorten its responses
        ("method.name=sft", {}, 0),
    ],
)
def test_a_number_of_the_first_step_within_its_bounds_or_of_other_samples_is_no_warning(key, metrics, number):
    config = load([*([key] if key else []), "run_dir=x"])
    assert len(first_step_warnings(config, FIRST | metrics)) == number


@pytest.mark.parametrize(
    ("metrics", "key"),
    [
        ({"tokens/rollout": 0.0}, "data.on_long_context=drop"),
        ({"tokens/response": 40.0}, None),
        ({"tokens/response": 40.0, "correction/weight_mean": 0.01}, None),
        ({"tokens/response": 40.0, "terms/silent_share": 0.99}, None),
    ],
)
def test_a_step_that_trains_on_no_token_is_a_warning(metrics, key):
    config = from_mapping(OmegaConf.from_dotlist([key or "loss.skip_first_tokens=50"]))
    warning = warning_of_an_untrained_step(config, 3, {"loss/mean": 0.1} | metrics)
    assert warning is None if key is None else key in warning
