# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The interval of a mean holds what it promises, and two evaluations are compared only where that means something."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny import problem

from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.evaluation.estimators import Calibration, Confidence, bootstrap, calibration, resampled_means
from megatron_selfdistill.evaluation.evaluation_directory import PROBLEMS, SUMMARY, require_free
from megatron_selfdistill.evaluation.evaluation_result import EvaluationResult, ProblemResult, Verdict
from megatron_selfdistill.evaluation.evaluations import (
    Difference,
    compare,
    data_fingerprint,
    read_evaluation,
    write_evaluation,
)

RNG_SEED = 7


def paired_outcomes(rng: np.random.Generator, num_problems: int, gain: float) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong, by two models, on problems that are easy or hard for both: B is right ``gain`` more often."""
    ease = rng.beta(0.4, 0.4, num_problems) * (1 - gain)
    return tuple((rng.random(num_problems) < chance).astype(float) for chance in (ease, ease + gain))


@pytest.mark.parametrize("gain", [0.0, 0.1])
def test_the_interval_covers_the_true_difference_and_the_probability_is_small_as_often_as_they_say(gain):
    rng = np.random.default_rng(RNG_SEED)
    found = []
    for _ in range(500):
        a, b = paired_outcomes(rng, 80, gain=gain)
        found += bootstrap((b - a)[:, None], num_resamples=500, seed=int(rng.integers(2**31)))
    assert 0.92 <= np.mean([it.low <= gain <= it.high for it in found]) <= 0.98
    assert np.mean([it.low > gain for it in found]) <= 0.05, "not by being off to one side"
    if gain == 0:  # a p-value
        values = np.array([it.probability_not_above_0 for it in found])
        assert np.mean(values <= 0.05) <= 0.08 and 0.4 < np.mean(values) < 0.7


def test_resampled_means_are_means_of_the_same_problems_in_every_column():
    values = np.random.default_rng(RNG_SEED).normal(size=(37, 2))
    values = np.concatenate([values, values[:, :1] - values[:, 1:]], axis=1)
    means = resampled_means(values, 20_000, seed=3)
    assert np.allclose(means[:, 0] - means[:, 1], means[:, 2])
    assert np.allclose(means.mean(axis=0), values.mean(axis=0), atol=5e-3)
    assert np.allclose(means.std(axis=0), values.std(axis=0) / np.sqrt(37), rtol=0.03)
    assert np.array_equal(means, resampled_means(values, 20_000, seed=3))
    assert not np.array_equal(means, resampled_means(values, 20_000, seed=4))


MEANS = {"accuracy": "correct", "mean_length": "length", "truncated_share": "truncated", "loop_share": "loops"}


def calibration_of(verdicts: Sequence[Verdict]) -> Calibration | None:
    confidences = [Confidence(it.confidence, math.log(it.confidence), it.states_confidence) for it in verdicts]
    return calibration(confidences, [it.correct for it in verdicts])


def write(directory: Path, outcomes: Sequence[Sequence[bool]], *, ids: Sequence[str] | None = None, **settings) -> Path:
    """Return an evaluation with these verdicts: per problem the greedy verdict, then the samples' verdicts."""
    names = ids or [f"p{i}" for i in range(len(outcomes))]
    verdicts = [
        [Verdict(bool(right), 3 + i, False, str(right), 0.75, i % 2 == 0, not right) for i, right in enumerate(row)]
        for row in outcomes
    ]
    problems = [
        ProblemResult(name, row[0], row[1:], sum(it.correct for it in row[1:]), 0.5)
        for name, row in zip(names, verdicts, strict=True)
    ]
    greedy, samples, ks = [it.greedy for it in problems], [verdict for it in problems for verdict in it.samples], [1, 2]
    means = {
        f"{kind}_{name}": float(np.mean([getattr(it, attribute) for it in verdicts]))
        for kind, verdicts in (("greedy", greedy), ("sampled", samples))
        for name, attribute in MEANS.items()
    }
    result = EvaluationResult(
        num_problems=len(problems),
        num_samples=len(outcomes[0]) - 1,
        pass_at_k={k: float(np.mean([it.pass_at_k(k) for it in problems])) for k in ks},
        majority_at_k={k: float(np.mean([it.majority_at_k(k) for it in problems])) for k in ks},
        problems=problems,
        transcripts=[],
        further={"distinct_right": float(np.mean([it.num_correct for it in problems])), "distinct_4grams": 0.5},
        greedy_calibration=calibration_of(greedy),
        sampled_calibration=calibration_of(samples),
        **means,
    )
    data = {"path": "p.jsonl", "fingerprint": "-".join(names), "num_problems": len(problems)}
    write_evaluation(directory, result, {"model": {}, "data": data, "settings": settings})
    return directory


def outcomes_of(seed: int, num_problems: int = 40, num_samples: int = 4, gain: float = 0.0) -> list[list[bool]]:
    """Problems whose ease is the same for every seed and scatters widely."""
    ease = np.random.default_rng(0).beta(0.3, 0.3, num_problems) * (1 - gain) + gain
    draws = np.random.default_rng(seed).random((num_problems, num_samples + 1))
    return (draws < ease[:, None]).tolist()


def differences(a: Path, b: Path) -> dict[str, Difference]:
    return {it.metric: it for it in compare(read_evaluation(a), read_evaluation(b)).differences}


def test_what_is_written_is_read_back(tmp_path):
    outcomes = outcomes_of(1)
    it = read_evaluation(write(tmp_path / "a", outcomes))
    assert it.ids == [f"p{i}" for i in range(40)]
    assert it.values["greedy_accuracy"].tolist() == [float(row[0]) for row in outcomes]
    assert it.values["avg_at_4"].tolist() == [sum(row[1:]) / 4 for row in outcomes]
    for name, values in it.values.items():
        if not name.endswith("length"):
            assert values.mean() == pytest.approx(it.summary["metrics"][name]), name
        low, high = it.summary["intervals"][name]
        assert low <= values.mean() <= high
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [PROBLEMS, SUMMARY]
    assert it.values["sampled_ocg"].tolist() == [0.75 - sum(row[1:]) / 4 for row in outcomes]
    assert it.values["sampled_stated_confidence"].tolist() == [0.5] * 40 and "sampled_spr" in it.summary["metrics"]
    assert set(it.summary["metrics"]) - set(it.values) == {
        "sampled_accuracy", "pass_over_avg_at_2", "greedy_ece", "sampled_ece", "greedy_spr", "sampled_spr"
    }  # fmt: skip


def test_problems_are_paired(tmp_path):
    """Ease that scatters over problems is the same for both models, and leaves the interval of their difference."""
    a = write(tmp_path / "a", outcomes_of(1))
    b = write(tmp_path / "b", outcomes_of(2, gain=0.1))
    paired = differences(a, b)["avg_at_4"]
    alone = [it.values["avg_at_4"] for it in map(read_evaluation, (a, b))]
    unpaired = 2 * 1.96 * np.sqrt(sum(values.var() / 40 for values in alone))
    assert paired.difference == pytest.approx(alone[1].mean() - alone[0].mean())
    assert paired.high - paired.low < 0.5 * unpaired
    shuffled = np.random.default_rng(0).permutation(alone[1]) - alone[0]
    (as_if_unpaired,) = bootstrap(shuffled[:, None])
    assert as_if_unpaired.high - as_if_unpaired.low > 0.8 * unpaired


def test_better_is_above_and_worse_is_below_and_a_model_is_not_above_itself(tmp_path):
    worse, better = write(tmp_path / "a", outcomes_of(1)), write(tmp_path / "b", outcomes_of(2, gain=0.4))
    up, down = differences(worse, better)["avg_at_4"], differences(better, worse)["avg_at_4"]
    assert up.low > 0 and up.probability_not_above < 0.01
    assert down.high < 0 and down.probability_not_above == 1
    assert (down.low, down.high) == pytest.approx((-up.high, -up.low))
    for name, it in differences(worse, worse).items():
        probability = None if name.endswith("truncated_share") else 1  # nothing was truncated
        assert (it.difference, it.low, it.high, it.probability_not_above) == (0, 0, 0, probability)


def test_other_numbers_of_samples_and_other_settings_are_compared_and_said(tmp_path):
    a = write(tmp_path / "a", outcomes_of(1), temperature=1.0, top_k=0)
    b = write(tmp_path / "b", outcomes_of(2, num_samples=3), temperature=0.7, top_k=0)
    compared = compare(read_evaluation(a), read_evaluation(b))
    assert compared.other_settings == {"temperature": [1.0, 0.7]}
    names = [it.metric for it in compared.differences]
    assert names[:6] == "greedy_accuracy avg_at_k pass_at_1 pass_at_2 majority_at_1 majority_at_2".split()
    assert "sampled_ocg" in names and not {"distinct_right", "distinct_4grams"} & {*names}, "they grow with samples"
    assert {"distinct_right", "distinct_4grams"} <= differences(a, a).keys()
    assert json.loads(json.dumps(dataclasses.asdict(compared)))["differences"][1]["metric"] == "avg_at_k"


def test_other_problems_are_refused(tmp_path):
    a = read_evaluation(write(tmp_path / "a", outcomes_of(1, 3)))
    b = read_evaluation(write(tmp_path / "b", outcomes_of(1, 3), ids=["p0", "q1", "p2"]))
    one = read_evaluation(write(tmp_path / "one", outcomes_of(1, 1)))
    for first, second, named in ((a, b, "'p1' against 'q1'"), (one, one, "2 problems")):
        with pytest.raises(ConfigError, match=named):
            compare(first, second)


def test_a_directory_without_a_whole_evaluation_is_refused(tmp_path):
    directory = write(tmp_path / "a", outcomes_of(1, 3))
    lines = (directory / PROBLEMS).read_text().splitlines()
    for named, content in (
        ("2 lines for 3", [*lines[:2], ""]),
        ("JSON", [*lines[:2], lines[2][:20]]),
        (PROBLEMS, None),
    ):
        (directory / PROBLEMS).unlink()
        if content is not None:
            (directory / PROBLEMS).write_text("\n".join(content))
        with pytest.raises(ConfigError, match=named):
            read_evaluation(directory)


def test_only_an_evaluation_is_overwritten(tmp_path):
    require_free(tmp_path / "new", overwrite=False)
    directory = write(tmp_path / "a", outcomes_of(1, 3))
    require_free(directory, overwrite=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("1")
    for path, overwrite, named in ((directory, False, "--overwrite"), (tmp_path / "thesis", True, SUMMARY)):
        with pytest.raises(ConfigError, match=named):
            require_free(path, overwrite=overwrite)


def test_solutions_do_not_matter_to_what_was_evaluated():
    one, other, wrong = (problem("1+1", *rest) for rest in (("it is 2", "2"), ("", "2"), ("", "3")))
    assert data_fingerprint([one]) == data_fingerprint([other]) != data_fingerprint([wrong])
