# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Evaluation gives the same result in every layout; pass@k and majority@k are what their definitions say."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from characters import ONE_RANK, STOP, Characters
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import builder, problem, problem_with

from megatron_selfdistill.config.schema.run_config import EvaluationConfig
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.end_tokens import EndTokens
from megatron_selfdistill.data.problems import Problem, ProblemSet
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.evaluation.estimators import Confidence, calibration, majority_at_k, pass_at_k
from megatron_selfdistill.evaluation.evaluation_result import EvaluationResult
from megatron_selfdistill.evaluation.held_out import EvaluationOptions, Played, evaluate
from megatron_selfdistill.evaluation.verify import exact_match
from megatron_selfdistill.metrics.leakage import leak_counts
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams

PARAMS = SamplingParams(max_new_tokens=4, temperature=1.0, stop_token_ids=(STOP,))


def responded(text: str, log_probs: Sequence[float] | None = None, finish: str = "stop") -> Response:
    """Return a response with a token for each character."""
    return Response([*map(ord, text)], [*(log_probs or [0.0] * len(text))], [0.0] * len(text), finish)


def first_number(request: Request) -> int:
    return int("".join(map(chr, request.prompt)).split("+")[0])


class FakeSampler:
    """Answers ``a+b:`` by the right sum, a wrong one or without an end, as the stream says; a hint helps."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, SamplingParams]] = []

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        self.calls.append((len(requests), params))
        return [self.answer(request, params) for request in requests]

    def answer(self, request: Request, params: SamplingParams) -> Response:
        prompt = "".join(map(chr, request.prompt))
        a, b = prompt.split(":")[0].split("|")[0].split("+")
        draw = random.Random(request.seed).random() if params.temperature else int(a) % 3 / 3
        total = int(a) + int(b) + (draw > 0.6 and "|" not in prompt)
        text = (f"{total:04d}" if 0.2 < draw < 0.4 else f"{total}$")[: params.max_new_tokens]
        return responded(text, [-0.125] * len(text), "stop" if text.endswith("$") else "length")

    def update_weights(self, version: int) -> None:
        pass


def sums(count: int = 7) -> list[Problem]:
    return [problem(f"{a}+8", f"it is {a + 8}", str(a + 8), id=f"p{a}", location=f"file:{a}") for a in range(count)]


def run(problems: list[Problem], grid: Any = ONE_RANK, sampler: Any = None, **options: Any) -> EvaluationResult:
    defaults = {"params": PARAMS, "num_samples": 6, "pass_at_k": [1, 4], "seed": 3, "step": 20}
    verifier, max_length = options.pop("verifier", exact_match), options.pop("max_length", 100)
    player = options.pop("player", None)
    ends = EndTokens((STOP,), "", None)
    prompts = builder(Characters(), teacher="{problem}|{solution}")
    data = RunData(Characters(), prompts, ProblemSet([]), problems, 128, 128, max_length, ends)
    return evaluate(sampler or FakeSampler(), data, verifier, EvaluationOptions(**defaults | options), grid, player)


class Corrected:
    """A player of two turns: the environment corrects the greedy responses and the first sample, and nobody else's."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, float, bool]] = []

    def play(self, samples: Sequence[tuple[Problem, int]], params: SamplingParams, *, hinted: bool) -> list[Played]:
        self.calls.append((len(samples), params.temperature, hinted))
        return [self._played(problem, index) for problem, index in samples]

    def _played(self, problem: Problem, index: int) -> Played:
        texts = ["0$", f"{problem.answer if index == 0 else 1000}$"]
        replies, reward = ["wrong number", "over"], float(index == 0) - 0.25
        return Played([ord("?")], [responded(text) for text in texts], replies, reward=reward)


def test_the_last_response_of_an_episode_is_judged_and_its_rewards_are_summed():
    player = Corrected()
    result = run(sums(3), player=player, num_samples=2, pass_at_k=[2], num_transcripts=1)
    assert player.calls == [(3, 0.0, False), (6, 1.0, False)]
    metrics = result.metrics()
    assert metrics["evaluation/greedy_accuracy"] == 1 and metrics["evaluation/sampled_accuracy"] == 0.5
    assert metrics["evaluation/greedy_mean_reward"] == 0.75 and metrics["evaluation/sampled_mean_reward"] == 0.25
    assert metrics["evaluation/greedy_mean_turns"] == metrics["evaluation/sampled_mean_turns"] == 2
    assert [problem.greedy.length for problem in result.problems] == [4, 4, 5], "the tokens of both turns"
    first = result.transcripts[0]
    assert (first.prompt, first.response) == ("?", "0\n--- reply\nwrong number\n--- turn 2\n8")
    assert not [key for key in run(sums(3)).metrics() if "reward" in key or "turns" in key], "without an environment"
    run(sums(3), player=player, hinted=True, num_samples=0, pass_at_k=[])
    assert player.calls[2:] == [(3, 0.0, True)]


def grid_of(sizes: dict[str, int]) -> Any:
    from megatron_selfdistill.config import ParallelConfig
    from megatron_selfdistill.distributed import ranks

    return ranks.initialize(ParallelConfig(**sizes), 0)


def run_in_layout(sizes: dict[str, int], count: int) -> tuple[EvaluationResult, list[int], list[str]]:
    """Return (result, sizes of the calls of the sampler, ids that this rank verified)."""
    sampler, verified = FakeSampler(), []

    def verifier(text: str, problem: Problem) -> bool:
        verified.append(problem.id)
        return exact_match(text, problem)

    result = run(sums(count), grid_of(sizes), sampler, verifier=verifier, majority_at_k=[3])
    return result, [number for number, _ in sampler.calls], verified


def verifier_that_fails_on_p1(text: str, problem: Problem) -> bool:
    if problem.id == "p1":
        raise KeyError("unit")
    return True


def failing_run() -> str:
    with pytest.raises(RuntimeError) as failure:
        run(sums(), grid_of({}), verifier=verifier_that_fails_on_p1)
    return str(failure.value)


def test_accuracies_lengths_and_shares_are_counted_from_the_transcripts():
    result = run(sums(), num_transcripts=None)
    for name, kind in (("greedy", {None}), ("sampled", set(range(6)))):
        those = [t for t in result.transcripts if t.sample in kind]
        assert len(those) == 7 * len(kind)
        for what, attribute in (("accuracy", "correct"), ("truncated_share", "truncated"), ("mean_length", "length")):
            mean = sum(getattr(t, attribute) for t in those) / len(those)
            assert getattr(result, f"{name}_{what}") == pytest.approx(mean), what
    sampled = [t for t in result.transcripts if t.sample is not None]
    by_problem = [[t.correct for t in sampled if t.problem_id == f"p{a}"] for a in range(7)]
    for k in (1, 4):
        subsets = [any(subset) for right in by_problem for subset in itertools.combinations(right, k)]
        assert result.pass_at_k[k] == pytest.approx(sum(subsets) / len(subsets))
    assert [[it.correct for it in problem.samples] for problem in result.problems] == by_problem
    assert 0 < result.greedy_accuracy < 1 and 0 < result.sampled_accuracy < result.pass_at_k[4] < 1


def test_a_truncated_response_is_wrong_whatever_the_verifier_says():
    problems = run(sums(), verifier=lambda text, problem: True).problems
    verdicts = [verdict for problem in problems for verdict in (problem.greedy, *problem.samples)]
    assert {it.truncated for it in verdicts} == {True, False} and all(it.correct != it.truncated for it in verdicts)


def test_greedy_is_greedy_and_samples_are_drawn_as_asked_if_any():
    sampler = FakeSampler()
    run(sums(), sampler=sampler, params=SamplingParams(4, temperature=0.7, top_k=5, top_p=0.9, stop_token_ids=(STOP,)))
    (count, greedy), (num_sampled, sampled) = sampler.calls
    assert (count, num_sampled) == (7, 42)
    assert (greedy.temperature, greedy.top_k, greedy.top_p) == (0, 0, 1) and greedy.stop_token_ids == (STOP,)
    assert (sampled.temperature, sampled.top_k, sampled.top_p) == (0.7, 5, 0.9)
    result = run(sums(), sampler=sampler, num_samples=0, pass_at_k=[1])
    assert len(sampler.calls) == 3 and result.sampled_accuracy is None and result.pass_at_k == {}


class Reciting(FakeSampler):
    """Recites the solution of its problem, without a hint, in every second sample and in no greedy response."""

    def answer(self, request: Request, params: SamplingParams) -> Response:
        if request.seed % 2 and params.temperature:
            return responded(f"the hint: we know that it is {first_number(request) + 8}$")
        return responded("8+8 or so$")


def with_solutions(text: str) -> list[Problem]:
    """Return `sums` with ``text`` and the answer as solutions; p3 has no solution, and so no hint."""
    return [replace(p, solution=f"{text} {p.answer}" if text and p.id != "p3" else "") for p in sums()]


def test_leakage_is_counted_over_the_responses_of_each_kind():
    problems, arguments = with_solutions("We know that it is"), {"sampler": Reciting(), "max_length": 200}
    result = run(problems, leak_words=["hint", "solution"], num_transcripts=None, **arguments)
    metrics, solutions = result.metrics("test"), {p.id: p.solution for p in problems}
    contexts = []
    for t in (t for t in result.transcripts if t.sample is not None):
        texts = (t.prompt, f"{t.prompt[:-1]}|{solutions[t.problem_id]}:", f"{t.response}$")
        contexts.append(ContextPair(t.problem_id, *([*map(ord, text)] for text in texts), False))
    hinted = leak_counts([context for context in contexts if context.problem_id != "p3"], [], Characters())
    words = leak_counts(contexts, ["hint", "solution"], Characters())
    assert hinted.hinted == len(contexts) * 6 / 7
    assert metrics["test/sampled_hint_8grams"] == hinted.hint_grams / hinted.grams
    assert metrics["test/sampled_quoted_hint_share"] == hinted.quoting / hinted.hinted
    assert metrics["test/sampled_leak_words_per_1000"] == pytest.approx(1000 * words.words / words.tokens)
    assert metrics["test/greedy_quoted_hint_share"] == 0 < metrics["test/sampled_quoted_hint_share"] < 1
    assert metrics["test/greedy_leak_words_per_1000"] == 0 < metrics["test/sampled_leak_words_per_1000"]
    assert not any("hint" in key or "leak" in key for key in run(with_solutions(""), **arguments).metrics())


class Confident(FakeSampler):
    """States its confidence in two of three responses after the sum; right sums have another probability."""

    def answer(self, request: Request, params: SamplingParams) -> Response:
        a = first_number(request)
        number = random.Random(request.seed).randrange(6) if params.temperature else a
        stated = "" if number % 3 == 0 else f"\nConfidence: 0.{number}"
        text = f"{a + 8 + number % 2}{stated}$"
        return responded(text, [-0.125] * len(text))


def test_confidence_is_read_in_the_text_or_else_from_the_log_probs():
    arguments = {"sampler": Confident(), "max_length": 200, "num_transcripts": None}
    result = run(sums(), confidence=EvaluationConfig().confidence_pattern, **arguments)
    verdicts = {(p.id, i): it for p in result.problems for i, it in [(None, p.greedy), *enumerate(p.samples)]}
    for t in result.transcripts:
        it, (total, _, stated) = verdicts[t.problem_id, t.sample], t.response.partition("\nConfidence: ")
        assert it.correct == t.correct == (int(total) == int(t.problem_id[1:]) + 8)
        assert (it.confidence, it.states_confidence) == (float(stated or math.exp(-0.125 * it.length)), bool(stated))
    own = [it for (_, sample), it in verdicts.items() if sample is not None]
    stated = [Confidence(it.confidence, math.log(it.confidence), it.states_confidence) for it in own]
    expected = vars(calibration(stated, [it.correct for it in own]))
    assert 0 < expected["stated_confidence"] < 1
    assert {name: result.metrics("test")[f"test/sampled_{name}"] for name in expected} == pytest.approx(expected)
    unread = run(sums(), **arguments)  # the last line of most responses is now no sum
    assert unread.metrics()["evaluation/sampled_stated_confidence"] == 0
    assert unread.sampled_accuracy < result.sampled_accuracy


def test_samples_depend_on_seed_and_step_and_a_hinted_evaluation_shows_the_solution():
    plain, hinted = run(sums(), num_transcripts=None), run(sums(), hinted=True)
    assert run(sums(), num_transcripts=None).transcripts == plain.transcripts
    for other in ({"step": 21}, {"seed": 4}):
        assert run(sums(), num_transcripts=None, **other).transcripts != plain.transcripts
    assert hinted.transcripts[0].prompt == "0+8|it is 8:" and hinted.sampled_accuracy > plain.sampled_accuracy


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [
        pytest.param(2, {}, marks=pytest.mark.full),
        pytest.param(2, {"tensor_model_parallel_size": 2}, marks=pytest.mark.full),
        (4, {"pipeline_model_parallel_size": 2}),
        (4, {"context_parallel_size": 2, "tensor_model_parallel_size": 2}),
    ],
)
def test_every_layout_gives_every_rank_the_same_result_and_verifies_once(ranks, world_size, sizes):
    alone = run(sums(), majority_at_k=[3])
    found = ranks.run(run_in_layout, sizes, 7, world_size=world_size)
    assert [result for result, _, _ in found] == [alone] * world_size
    truncated = alone.greedy_truncated_share * 7 + alone.sampled_truncated_share * 42
    assert sum(len(verified) for _, _, verified in found) == round(49 - truncated)
    assert all(verified for _, _, verified in found)


def test_a_replica_without_problems_still_calls_the_sampler(ranks):
    found = ranks.run(run_in_layout, {}, 1, world_size=2)
    assert [calls for _, calls, _ in found] == [[1, 6], [0, 0]]
    assert found[0][0] == found[1][0] == run(sums(1), majority_at_k=[3])


def test_a_verifier_that_fails_on_one_rank_stops_all_of_them(ranks):
    for message in ranks.run(failing_run, world_size=2):
        assert message.splitlines()[0] == "file:1: the verifier failed with KeyError: 'unit'"


def test_problems_that_cannot_be_judged_are_found_before_sampling_and_a_verifier_of_ones_own_needs_no_answers():
    sampler, unanswered = FakeSampler(), [replace(p, answer=None) for p in sums()]
    assert run(unanswered, verifier=lambda text, problem: text in problem.solution).greedy_accuracy > 0
    for problems, named in (([*sums(), problem_with(None)], "^file.jsonl:7: .*answer"), ([], r"evaluation\.path")):
        with pytest.raises(ValueError, match=named):
            run(problems, sampler=sampler)
    with pytest.raises(ValueError, match=r"^file:0: .* 3 tokens .* got 4"):
        run(sums(), sampler=sampler, max_length=7)
    assert sampler.calls == []


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for right, k in itertools.product(itertools.product([False, True], repeat=5), range(1, 6)):
        subsets = list(itertools.combinations(right, k))
        assert pass_at_k(5, sum(right), k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def majority_by_enumeration(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """Return majority@k by its definition: every subset of k votes, a tie decided by lot."""
    outcomes = []
    for subset in itertools.combinations(range(len(answers)), k):
        votes = Counter(answers[i] for i in subset if answers[i] is not None)
        most = max(votes.values(), default=0)
        winners = [answer for answer, count in votes.items() if count == most]
        shares = [Fraction(sum(correct[i] for i in subset if answers[i] == winner), most) for winner in winners]
        outcomes.append(sum(shares) / len(shares) if shares else Fraction(0))
    return float(sum(outcomes) / len(outcomes))


@given(
    votes=st.lists(st.tuples(st.sampled_from([None, "a", "b", "c", "d"]), st.booleans()), min_size=1, max_size=8),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_majority_at_k_is_the_mean_over_all_subsets(votes, data):
    answers = [answer for answer, _ in votes]
    correct = [right and answer is not None for answer, right in votes]
    k = data.draw(st.integers(1, len(votes)))
    assert majority_at_k(answers, correct, k) == pytest.approx(majority_by_enumeration(answers, correct, k), abs=1e-12)


def test_majority_at_k_of_many_samples_is_found_at_once():
    answers = [*["7"] * 100, *["8"] * 90, *(str(i) for i in range(10, 76))]
    correct = [answer == "7" for answer in answers]
    assert majority_at_k(answers, correct, 256) == pytest.approx(1)
    assert majority_at_k(answers, correct, 1) == pytest.approx(100 / 256)
    assert majority_at_k(answers, correct, 2) == pytest.approx(100 / 256)  # two votes agree or are drawn from
    assert 100 / 256 < majority_at_k(answers, correct, 16) < majority_at_k(answers, correct, 128) < 1


class Talkative(FakeSampler):
    """Says the sum in words that exact_match does not take."""

    def answer(self, request: Request, params: SamplingParams) -> Response:
        late = request.seed % 5 == 0 and params.temperature > 0
        text = f"{'well, ' * 40}it is {first_number(request) + 8}." + ("" if late else "$")
        return responded(text, finish="length" if late else "stop")


def test_answers_that_the_verifier_never_takes_are_said_with_the_key_and_three_responses_of_no_private_log():
    found = run(sums(), sampler=Talkative(), max_length=1000)
    line, *examples = found.overlooked.lines("exact_match")
    num_whole = sum(not it.truncated for problem in found.problems for it in (problem.greedy, *problem.samples))
    assert line.startswith("0 of 49 ") and f"{num_whole} of them" in line and "evaluation.verifier=math_verify" in line
    assert [example.split(",")[0] for example in examples] == [f'  file:{a}: the answer "{a + 8}"' for a in range(3)]
    (line,) = found.overlooked.lines("exact_match", show_contents=False)
    assert "it is" not in line and "data.system_prompt" in found.overlooked.lines("math_verify")[0]
    one_right = run(sums(), sampler=Talkative(), verifier=lambda text, problem: problem.id == "p0", max_length=1000)
    assert one_right.overlooked is None
