# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Guards stop a run that has gone wrong, after patience, and let a healthy one go on."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial

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
WARNS = dataclasses.replace(CONFIG, max_loop_rise=None)
"""Guards that warn of loops and do not stop a run for them."""
HEALTHY = {"loss/mean": 0.1, "gradient_norm": 1.0, "entropy/student": 0.06, "response/length_mean": 22.0}


def stopped_at(guards: Guards, trace: list[dict[str, float]], start: int = 0) -> tuple[int, str] | None:
    """(step, message) of the stop; None where the whole trace passes."""
    for step, metrics in enumerate(trace, start):
        try:
            guards.check(step, HEALTHY | metrics)
        except RunUnhealthy as stop:
            return step, str(stop)
    return None


def trace_of(key: str, *values: float) -> list[dict[str, float]]:
    return [{key: value} for value in values]


entropies, losses = partial(trace_of, "entropy/student"), partial(trace_of, "loss/mean")
lengths, loops = partial(trace_of, "response/length_mean"), partial(trace_of, "response/loop_share")
distances = partial(trace_of, "sampler/log_prob_mean_abs_diff")


@pytest.mark.parametrize("key", ["loss/mean", "gradient_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_stops_at_once(key, value):
    step, message = stopped_at(Guards(CONFIG), [{}, {key: value}])
    assert step == 1 and message.startswith(f"step 1: expected a finite {key}, got {value}")


def test_the_first_step_may_already_be_not_finite():
    with pytest.raises(RunUnhealthy, match="loss/mean"):
        Guards(CONFIG).check_finite(0, {"loss/mean": math.nan})
    Guards(CONFIG).check_finite(0, {"loss/mean": 1.0})  # before the gradient norm is known


@pytest.mark.parametrize(
    ("trace", "words"),
    [
        (
            entropies(0.06, 0.05, 0.07, 0.0011, 0.0011, 0.0011),
            (
                "entropy collapse",
                "guards.entropy.min_ratio=null turns",
                "0.0011",
                "mean over the first 3 steps was 0.06",
            ),
        ),
        (entropies(0.06, 0.06, 0.06, 0.3, 0.4), ("entropy explosion", "above 3 times")),
        (entropies(0.06, 0.06, 0.06, 0.185, 0.185), ("above 3 times",)),
        (lengths(22, 22, 22, 5, 5), ("length collapse",)),
    ],
)
def test_a_collapse_or_an_explosion_stops_after_patience(trace, words):
    step, message = stopped_at(Guards(CONFIG), trace)
    assert step == 4 and all(word in message for word in words)


@pytest.mark.parametrize(
    "trace",
    [
        pytest.param(entropies(0.06, 0.06, 0.06, *[0.0013] * 9), id="just above the smallest ratio"),
        pytest.param(entropies(0.06, 0.06, 0.06, *[0.175] * 5), id="just below the largest ratio"),
        pytest.param(entropies(1e-3, 1e-3, 1e-3, *[0.05] * 5), id="a tiny entropy may rise by many times"),
        pytest.param(entropies(0.06, 0.06, 0.06, 0.9, 0.06, 0.9, 0.06, 0.9), id="violations that end before patience"),
        pytest.param(entropies(0.06, 0.06, 0.06, 0.9, 0.0001, 0.9, 0.0001), id="violations of two guards"),
        pytest.param(entropies(0.06, 5.0, 0.0001), id="the steps of the reference"),
        pytest.param(loops(*[0.6] * 3, *[1.0] * 5), id="a base that loops from the start"),
    ],
)
def test_a_healthy_run_goes_on(trace):
    assert stopped_at(Guards(CONFIG, student_samples=True), trace) is None


def test_a_loss_that_jumps_after_the_first_step_stops_the_run_and_names_the_keys():
    """The values are those of a real model at a learning rate of 1e-4; a mean over the jump would hide it."""
    step, message = stopped_at(Guards(GuardsConfig(), loss_should_fall=True), losses(0.026, 0.25, 0.24, 0.26, 0.25), 1)
    assert step == 4 and "loss explosion: loss/mean has been above 5 times its reference for 3 steps" in message
    assert "it is 0.26, and its first value was 0.026" in message
    assert all(key in message for key in ("optimizer.lr,", "optimizer.lr_warmup_steps", "guards.max_loss_ratio=null"))


@pytest.mark.parametrize(
    ("guards", "values"),
    [
        (Guards(GuardsConfig(), loss_should_fall=True), [0.026, *[0.125] * 9]),
        (Guards(GuardsConfig(), loss_should_fall=True), [0.1, *[0.49] * 9]),
        (Guards(GuardsConfig(), loss_should_fall=True), [0.026, 0.3, 0.3, 0.1, 0.3, 0.3, 0.02]),
        (Guards(GuardsConfig(max_loss_ratio=None), loss_should_fall=True), [0.026, *[9.0] * 9]),
        (Guards(GuardsConfig()), [0.026, *[9.0] * 9]),
    ],
    ids=["a rise by less than 0.1", "less than 5 times", "not in a row", "off", "a loss that may rise"],
)
def test_other_losses_do_not_stop_the_run(guards, values):
    assert stopped_at(guards, losses(*values)) is None


@pytest.mark.parametrize(
    ("keys", "judges"),
    [
        ([], True),
        (["target=teacher_alone", "loss.divergence=forward_kl"], True),
        (["method.name=sft"], False),
        (["method.name=grpo", "rollout.num_samples=2", "method.kl_weight=0.1"], False),
    ],
)
def test_the_loss_should_fall_where_a_hinted_teacher_alone_decides(keys, judges):
    assert load([*keys, "run_dir=x"]).needs.loss_should_fall is judges


ENGINES = "the vLLM servers http://node7:8000"


@pytest.mark.parametrize("value", [1.1, 23.9, math.inf, math.nan])
def test_an_engine_that_computes_another_model_stops_the_run_after_patience_from_the_first_step(value):
    step, message = stopped_at(Guards(CONFIG, ENGINES), distances(value, value, value))
    assert step == 1, "the distance needs no reference"
    assert ENGINES in message and "old weights, or another model, tokenizer" in message
    assert f"more than 1 nats on average for 2 steps, now by {value:.3g} (sampler/log_prob_mean_abs_diff)" in message
    assert "guards.max_log_prob_distance=null" in message


@pytest.mark.parametrize(
    ("guards", "values"),
    [
        (Guards(CONFIG, ENGINES), [1.0] * 9),
        (Guards(CONFIG, ENGINES), [9.0, 0.01] * 5),
        (Guards(dataclasses.replace(CONFIG, max_log_prob_distance=30.0), ENGINES), [23.9] * 9),
        (Guards(dataclasses.replace(CONFIG, max_log_prob_distance=None), ENGINES), [23.9] * 9),
        (Guards(CONFIG), [23.9] * 9),
    ],
    ids=["at the limit", "not in a row", "another limit", "off", "not sampled by an engine of the run"],
)
def test_other_distances_do_not_stop_the_run(guards, values):
    assert stopped_at(guards, distances(*values)) is None


def test_one_wrong_engine_among_many_stops_the_run_by_the_response_that_differs_most():
    """One of 64 engines with another model moves the mean by 0.03 nats only."""
    metrics = [{"sampler/log_prob_mean_abs_diff": 0.05, "sampler/log_prob_worst_response": 2.5}] * 3
    step, message = stopped_at(Guards(CONFIG, ENGINES), metrics)
    assert step == 1
    assert "by more than 1 nats on average over one response for 2 steps, now by 2.5" in message
    assert "(sampler/log_prob_worst_response)" in message and "guards.max_log_prob_distance=null" in message
    fine = [{"sampler/log_prob_mean_abs_diff": 0.05, "sampler/log_prob_worst_response": worst} for worst in (9.0, 1.0)]
    assert stopped_at(Guards(CONFIG, ENGINES), fine * 3) is None


def test_an_engine_that_disagrees_is_warned_of_once():
    guards = Guards(CONFIG, ENGINES)
    warnings = [guards.warnings(metrics) for metrics in distances(0.1, 0.11, 0.12, 0.01, 0.5)]
    assert [len(each) for each in warnings] == [0, 1, 0, 0, 0]
    assert ENGINES in warnings[1][0] and "differ by 0.11 nats on average, expected at most 0.1 (samp" in warnings[1][0]
    [about_nan] = Guards(CONFIG, ENGINES).warnings({"sampler/log_prob_mean_abs_diff": math.nan})
    assert "differ by nan" in about_nan
    assert Guards(CONFIG, ENGINES).warnings({}) == Guards(CONFIG).warnings(*distances(9.0)) == []
    assert Guards(dataclasses.replace(CONFIG, max_log_prob_distance=None), ENGINES).warnings(*distances(9.0)) == []


def warned_at(guards: Guards, shares: list[float], start: int = 0) -> list[int]:
    """Return the places in ``shares`` of response/loop_share at which ``guards`` warn, from ``start`` on."""
    places = []
    for place, share in enumerate(shares[start:], start):
        metrics = HEALTHY | {"response/loop_share": share}
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
    ids=["a rise", "once a launch", "not in a row", "a small rise", "no reference yet"],
)
def test_a_rise_of_the_loops_is_warned_of_once_after_patience(shares, places):
    """The mean of the first three shares is the reference, and two steps in a row are the patience."""
    assert warned_at(Guards(WARNS, student_samples=True), shares) == places
    assert warned_at(Guards(WARNS), shares) == [], "the responses are not those of the student"


@pytest.mark.parametrize("killed_at", range(5))
def test_a_resumed_run_warns_of_loops_as_if_it_had_never_stopped(killed_at):
    shares = [0.1, 0.2, 0.3, 0.31, 0.31]
    before, after = (Guards(WARNS, student_samples=True) for _ in range(2))
    assert warned_at(before, shares[:killed_at]) == []
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert warned_at(after, shares, killed_at) == [4]


@pytest.mark.parametrize("max_loop_rise", [0.5, 0.25])
def test_loops_stop_a_run_after_patience_once_their_share_has_risen_too_far(max_loop_rise):
    """The mean of the first three shares is .25."""
    config = dataclasses.replace(CONFIG, max_loop_rise=max_loop_rise)
    trace = loops(0.0, 0.25, 0.5, *[0.25 + max_loop_rise] * 4, 1.0, 0.0, 0.8, 0.8125)
    step, message = stopped_at(Guards(config, student_samples=True), trace)
    assert step == 10 and message.startswith("step 10: loops: response/loop_share has been above its reference plus")
    assert f"plus {max_loop_rise:g} for 2 steps; it is 0.8125, and its mean over the first 3 steps was 0.25" in message
    assert "optimizer.lr" in message and "(guards.max_loop_rise=null turns this guard off)" in message
    assert stopped_at(Guards(config), trace) is None, "the responses are not those of the student"
    assert stopped_at(Guards(WARNS, student_samples=True), trace) is None


def test_responses_that_no_longer_end_stop_a_run():
    """The shares are those of a run with controls whose accuracy fell from .82 to .00; nothing else was unusual."""
    shares = [0.0] * 5 + [0.375, 0.469, 0.281, 0.438, 0.594, 0.5, 0.625, 0.688, 0.719]
    trace = [{"response/truncated_share": share, "response/length_mean": 20 + 6 * share} for share in shares]
    step, message = stopped_at(Guards(GuardsConfig(), student_samples=True), trace)
    assert step == 13 and "responses without an end: response/truncated_share has been above" in message
    assert "plus 0.5 for 3 steps; it is 0.719, and its mean over the first 5 steps was 0" in message
    assert all(key in message for key in ("rollout.max_new_tokens", "optimizer.lr", "guards.max_truncated_rise=null"))
    assert stopped_at(Guards(GuardsConfig()), trace) is None, "the responses are not those of the student"
    assert stopped_at(Guards(GuardsConfig(max_truncated_rise=None), student_samples=True), trace) is None


@pytest.mark.parametrize(("keys", "wanted"), [([], True), (["method.name=sft"], False)], ids=["on policy", "solutions"])
def test_only_responses_of_the_student_say_whether_the_student_loops(keys, wanted):
    assert load([*keys, "run_dir=x"]).student_samples == wanted


@pytest.mark.parametrize("only", ["min_ratio", "max_ratio"])
def test_nan_violates_once_there_is_a_reference(only):
    off = {name: None for name in ("min_ratio", "max_ratio") if name != only}
    config = dataclasses.replace(CONFIG, non_finite=False, entropy=EntropyGuards(**off))
    trace = entropies(math.nan, 0.06, 0.06, math.nan, 0.06, math.nan, 0.06, math.nan, math.nan)
    step, message = stopped_at(Guards(config), trace)
    assert step == 8 and "it is nan" in message


@pytest.mark.parametrize(
    ("off", "trace"),
    [
        ({"non_finite": False}, [{"loss/mean": math.nan}] * 9),
        ({"entropy": EntropyGuards(min_ratio=None)}, entropies(1, 1, 1, *[0.0] * 9)),
        ({"entropy": EntropyGuards(max_ratio=None)}, entropies(1, 1, 1, *[9.0] * 9)),
        ({"min_length_ratio": None}, lengths(22, 22, 22, *[1] * 9)),
    ],
)
def test_each_guard_can_be_turned_off(off, trace):
    assert stopped_at(Guards(CONFIG), trace) is not None
    assert stopped_at(Guards(dataclasses.replace(CONFIG, **off)), trace) is None


def test_a_run_without_entropies_is_guarded_by_the_rest():
    guards = Guards(CONFIG)
    for step in range(5):
        guards.check(step, {"loss/mean": 0.1, "response/length_mean": 22.0})
    guards.check(5, {"loss/mean": 0.1, "response/length_mean": 2.0})
    with pytest.raises(RunUnhealthy, match="length collapse"):
        guards.check(6, {"loss/mean": 0.1, "response/length_mean": 2.0})


@pytest.mark.parametrize("killed_at", range(9))
def test_a_resumed_run_guards_as_if_it_had_never_stopped(killed_at):
    trace = entropies(0.06, 0.05, 0.08, 0.3, 0.06, 0.07, 0.3, 0.3, 0.3)
    never_stopped = stopped_at(Guards(CONFIG), trace)
    assert never_stopped is not None and never_stopped[0] == 7
    before, after = Guards(CONFIG), Guards(CONFIG)
    stop = stopped_at(before, trace[:killed_at])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert (stop or stopped_at(after, trace[killed_at:], killed_at)) == never_stopped


def test_a_run_stopped_by_a_guard_stops_again_unless_it_has_recovered():
    guards = Guards(CONFIG)
    assert stopped_at(guards, entropies(0.06, 0.06, 0.06, 0.9, 0.9)) is not None
    sick, recovered = Guards(CONFIG), Guards(CONFIG)
    sick.load_state_dict(guards.state_dict())
    recovered.load_state_dict(guards.state_dict())
    assert stopped_at(sick, entropies(0.9)) is not None
    assert stopped_at(recovered, entropies(0.06, 0.9, 0.06)) is None


def test_the_identity_check_wants_a_loss_of_zero():
    check_identity(-1e-9, 1e-4)
    check_identity(5.0, None)
    for loss in (2e-4, -2e-4, math.nan, math.inf):
        with pytest.raises(RunUnhealthy, match=r"same weights .* at most 0.0001 nats per token"):
            check_identity(loss, 1e-4)


def test_the_teacher_canary_wants_a_teacher_that_knows_the_responses():
    check_teacher_canary(0.3, 2.0)
    check_teacher_canary(11.0, None)
    for cross_entropy in (2.1, math.nan):
        with pytest.raises(RunUnhealthy, match=r"at most 2 nats .*tokenizer"):
            check_teacher_canary(cross_entropy, 2.0)


@pytest.mark.parametrize(
    ("metrics", "teacher_weight", "warns"),
    [
        ({"loss/reverse_kl": 4e-8}, 0.75, True),
        ({"loss/reverse_kl": 0.0}, 0.75, True),
        ({"loss/reverse_kl": 1e-6}, 0.75, False),
        ({"loss/reverse_kl": 4e-8}, 0.0, False),
        ({"loss/reverse_kl": math.nan}, 0.75, False),
        ({"loss/mean": 0.0}, 0.75, False),
        ({}, 0.75, False),
    ],
)
def test_a_teacher_that_says_what_the_student_says_is_warned_of(metrics, teacher_weight, warns):
    warning = warning_of_a_silent_teacher(metrics, teacher_weight)
    assert (warning is not None) == warns
    assert not warns or ("data.teacher_template" in warning and "\n" not in warning)


FIRST = {"student_nll": 2.3, "entropy/student": 2.4, "response/truncated_share": 0.9, "response/loop_share": 0.4}
FIRST |= {"teacher/kl_to_anchor": 0.2, "target/let_through": 0.031}


@pytest.mark.parametrize(
    ("keys", "metrics", "number"),
    [
        ([], {"entropy/student": 1.4}, 3),
        ([], {"student_nll": 1.4}, 3),
        ([], {"response/truncated_share": 0.33}, 3),
        ([], {"response/loop_share": 0.1}, 3),
        ([], {"target/let_through": 0.11}, 3),
        ([], {"teacher/kl_to_anchor": 1e-7}, 3),
        (["target.anchor=student"], {}, 3),
        (["guards.min_length_ratio=null"], {}, 3),
        (["method.name=sft"], {}, 0),
    ],
    ids=[
        "certain",
        "likely",
        "few cut",
        "few loops",
        "enough",
        "silent teacher",
        "a target that follows the student",
        "a run that is to shorten its responses",
        "solutions",
    ],
)
def test_a_number_in_its_bounds_or_of_other_samples_is_no_warning(keys, metrics, number):
    assert len(first_step_warnings(load([*keys, "run_dir=x"]), FIRST | metrics)) == number


TRAINED = {"tokens/response": 40.0, "loss/mean": 0.1}


def warning(metrics: dict[str, float], *keys: str) -> str | None:
    return warning_of_an_untrained_step(from_mapping(OmegaConf.from_dotlist(list(keys))), 3, metrics)


def test_a_step_without_any_response_is_a_warning():
    assert "got 0 tokens without one; look at data.on_long_context=drop" in (
        warning({"tokens/rollout": 0.0}, "data.on_long_context=drop") or ""
    )


@pytest.mark.parametrize("metrics", [{}, {"correction/weight_mean": 0.01}, {"terms/silent_share": 0.99}])
def test_a_step_that_trains_on_one_token_is_no_warning(metrics):
    assert warning(TRAINED | metrics, "loss.skip_first_tokens=50") is None
