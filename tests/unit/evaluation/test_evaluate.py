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
from answers import problem_with
from characters import ONE_RANK, STOP, Characters
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_selfdistill.config.schema.run_config import EvaluationConfig
from megatron_selfdistill.data.end_tokens import EndTokens
from megatron_selfdistill.data.problems import Problem, ProblemSet
from megatron_selfdistill.data.prompt_templates import PromptTemplates
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.evaluation.estimators import majority_at_k, pass_at_k
from megatron_selfdistill.evaluation.evaluation_result import EvaluationResult, Transcript, Verdict
from megatron_selfdistill.evaluation.held_out import EvaluationOptions, Played, evaluate
from megatron_selfdistill.evaluation.verify import exact_match, load_verifier
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams

PARAMS = SamplingParams(max_new_tokens=4, temperature=1.0, stop_token_ids=(STOP,))


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
        text = f"{total:04d}" if 0.2 < draw < 0.4 else f"{total}$"
        ids = [ord(character) for character in text[: params.max_new_tokens]]
        return Response(ids, [-0.125] * len(ids), [0.0] * len(ids), "stop" if ids[-1] == STOP else "length")

    def update_weights(self, version: int) -> None:
        pass


def sums(count: int = 7) -> list[Problem]:
    return [
        Problem(f"p{a}", ({"role": "user", "content": f"{a}+8"},), f"it is {a + 8}", str(a + 8), f"file:{a}")
        for a in range(count)
    ]


def builder() -> PromptBuilder:
    return PromptBuilder(Characters(), PromptTemplates(teacher="{problem}|{solution}"))


def run(problems: list[Problem], grid: Any = ONE_RANK, sampler: Any = None, **options: Any) -> EvaluationResult:
    defaults = {"params": PARAMS, "num_samples": 6, "pass_at_k": [1, 4], "seed": 3, "step": 20}
    verifier, max_length = options.pop("verifier", exact_match), options.pop("max_length", 100)
    player = options.pop("player", None)
    ends = EndTokens((STOP,), "", None)
    data = RunData(Characters(), builder(), ProblemSet([]), problems, 128, 128, max_length, ends)
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
        responses = [Response([*map(ord, text)], [-0.5] * len(text), [0.0] * len(text), "stop") for text in texts]
        return Played([ord("?")], responses, ["wrong number", "over"], reward=float(index == 0) - 0.25)


def test_the_last_response_of_an_episode_is_judged_and_its_rewards_are_summed():
    player = Corrected()
    result = run(sums(3), player=player, num_samples=2, pass_at_k=[2], num_transcripts=1)
    assert player.calls == [(3, 0.0, False), (6, 1.0, False)]
    metrics = result.metrics()
    assert metrics["evaluation/greedy_accuracy"] == 1 and metrics["evaluation/sampled_accuracy"] == 0.5
    assert metrics["evaluation/greedy_mean_reward"] == 0.75 and metrics["evaluation/sampled_mean_reward"] == 0.25
    assert metrics["evaluation/greedy_mean_turns"] == metrics["evaluation/sampled_mean_turns"] == 2
    assert [problem.greedy.length for problem in result.problems] == [4, 4, 5], "the tokens of both turns"
    assert [(it.prompt, it.response) for it in result.transcripts[:1]] == [
        ("?", "0\n--- reply\nwrong number\n--- turn 2\n8")
    ]
    assert not [key for key in run(sums(3)).metrics() if "reward" in key or "turns" in key], "without an environment"
    run(sums(3), player=player, hinted=True, num_samples=0, pass_at_k=[])
    assert player.calls[2:] == [(3, 0.0, True)]


def run_in_layout(sizes: dict[str, int], count: int) -> tuple[EvaluationResult, list[int], list[str]]:
    """Return (result, sizes of the calls of the sampler, ids that this rank verified)."""
    from megatron_selfdistill.config import ParallelConfig
    from megatron_selfdistill.distributed import ranks

    grid = ranks.initialize(ParallelConfig(**sizes), 0)
    sampler, verified = FakeSampler(), []

    def verifier(text: str, problem: Problem) -> bool:
        verified.append(problem.id)
        return exact_match(text, problem)

    result = run(sums(count), grid, sampler, verifier=verifier, majority_at_k=[3])
    return result, [number for number, _ in sampler.calls], verified


def verifier_that_fails_on_p1(text: str, problem: Problem) -> bool:
    if problem.id == "p1":
        raise KeyError("unit")
    return True


def failing_run() -> str:
    from megatron_selfdistill.config import ParallelConfig
    from megatron_selfdistill.distributed import ranks

    with pytest.raises(RuntimeError) as failure:
        run(sums(), ranks.initialize(ParallelConfig(), 0), verifier=verifier_that_fails_on_p1)
    return str(failure.value)


def test_accuracies_lengths_and_shares_are_counted_from_the_transcripts():
    result = run(sums(), num_transcripts=None)
    for name, kind in (("greedy", {None}), ("sampled", set(range(6)))):
        those = [t for t in result.transcripts if t.sample in kind]
        assert len(those) == 7 * len(kind)
        for what, attribute in (("accuracy", "correct"), ("truncated_share", "truncated"), ("mean_length", "length")):
            mean = sum(getattr(t, attribute) for t in those) / len(those)
            assert getattr(result, f"{name}_{what}") == pytest.approx(mean), what
    by_problem = [
        [t.correct for t in result.transcripts if t.problem_id == f"p{a}" and t.sample is not None] for a in range(7)
    ]
    for k in (1, 4):
        subsets = [any(subset) for right in by_problem for subset in itertools.combinations(right, k)]
        assert result.pass_at_k[k] == pytest.approx(sum(subsets) / len(subsets))
    assert [[it.correct for it in problem.samples] for problem in result.problems] == by_problem
    assert 0 < result.greedy_accuracy < 1 and 0 < result.sampled_accuracy < result.pass_at_k[4] < 1


def test_each_problem_has_its_verdicts_and_answers():
    result = run(sums(), num_transcripts=None, majority_at_k=[1, 6])
    by_sample = {(t.problem_id, t.sample): t for t in result.transcripts}
    for number, problem in enumerate(result.problems):
        assert problem.id == f"p{number}" and len(problem.samples) == 6
        for sample, verdict in [(None, problem.greedy), *enumerate(problem.samples)]:
            it = by_sample[problem.id, sample]
            answer = None if it.truncated else it.response
            assert verdict == Verdict(it.correct, it.length, it.truncated, answer, math.exp(-it.length / 8))
    assert result.problems[1].num_correct == sum(by_sample["p1", i].correct for i in range(6))
    assert result.majority_at_k[1] == pytest.approx(result.sampled_accuracy)
    expected = [
        majority_by_enumeration([s.answer for s in p.samples], [s.correct for s in p.samples], 6)
        for p in result.problems
    ]
    assert result.majority_at_k[6] == pytest.approx(sum(expected) / 7) and 0 < result.majority_at_k[6] < 1
    assert result.metrics("test")["test/majority_at_6"] == result.majority_at_k[6]
    assert result.metrics("test")["test/avg_at_6"] == result.sampled_accuracy


def test_transcripts_are_what_was_read_and_written():
    result = run(sums(3), num_transcripts=2, num_samples=1, pass_at_k=[1])
    assert [(t.problem_id, t.sample) for t in result.transcripts] == [("p0", None), ("p0", 0), ("p1", None), ("p1", 0)]
    first = result.transcripts[0]
    shown = run(sums(3), num_transcripts=1, num_shown=2)
    samples = [None, *range(6)], [None, 0], []
    assert [[t.sample for t in shown.transcripts if t.problem_id == f"p{a}"] for a in range(3)] == list(samples)
    assert (first.prompt, first.response, first.correct, first.length) == ("0+8:", "8", True, 2)


def test_a_truncated_response_is_wrong_though_it_ends_in_the_answer():
    class Endless(FakeSampler):
        def answer(self, request, params):
            return Response([ord("8")], [0.0], [0.0], "length")

    result = run(sums(1), sampler=Endless())
    assert result.greedy_accuracy == 0 and result.greedy_truncated_share == 1


class Looping(FakeSampler):
    """Repeats an even sum until the limit of tokens, and an odd sum until a stop token."""

    def answer(self, request: Request, params: SamplingParams) -> Response:
        first = super().answer(request, params).token_ids[0]
        ids = [first] * 30 if first % 2 == 0 else [first] * 25 + [STOP]
        ids = [first] * 9 if request.prompt[0] == ord("3") else ids
        return Response(ids, [-0.5] * len(ids), [0.0] * len(ids), "stop" if ids[-1] == STOP else "length")


def test_loops_are_counted_over_the_responses_of_each_kind():
    result = run(sums(), sampler=Looping())
    assert [problem.greedy.loops for problem in result.problems] == [number != 3 for number in range(7)]
    assert all(verdict.loops == (problem.id != "p3") for problem in result.problems for verdict in problem.samples)
    metrics = result.metrics("test")
    assert metrics["test/greedy_loop_share"] == metrics["test/sampled_loop_share"] == 6 / 7
    assert run(sums()).metrics("test")["test/sampled_loop_share"] == 0


def test_greedy_is_greedy_and_samples_are_drawn_as_asked():
    sampler = FakeSampler()
    run(sums(), sampler=sampler, params=SamplingParams(4, temperature=0.7, top_k=5, top_p=0.9, stop_token_ids=(STOP,)))
    (count, greedy), (num_sampled, sampled) = sampler.calls
    assert (count, num_sampled) == (7, 42)
    assert (greedy.temperature, greedy.top_k, greedy.top_p) == (0, 0, 1) and greedy.stop_token_ids == (STOP,)
    assert (sampled.temperature, sampled.top_k, sampled.top_p) == (0.7, 5, 0.9)


def test_without_samples_only_greedy_is_reported():
    sampler = FakeSampler()
    result = run(sums(), sampler=sampler, num_samples=0, pass_at_k=[1])
    assert len(sampler.calls) == 1 and result.sampled_accuracy is None and result.pass_at_k == {}
    names = "accuracy mean_length truncated_share loop_share quoted_hint_share ece brier spr ocg stated_confidence"
    assert result.metrics().keys() == {f"evaluation/greedy_{name}" for name in names.split()}


class Reciting(FakeSampler):
    """Recites the solution of its problem, without a hint, in every second sample and in no greedy response."""

    def answer(self, request: Request, params: SamplingParams) -> Response:
        a = "".join(map(chr, request.prompt)).split("+")[0]
        text = (
            f"the hint: we know that it is {int(a) + 8}$" if request.seed % 2 and params.temperature else "8+8 or so$"
        )
        ids = [ord(character) for character in text]
        return Response(ids, [-0.5] * len(ids), [0.0] * len(ids), "stop")


def with_solutions(text: str) -> list[Problem]:
    """Return `sums` with ``text`` and the answer as solutions; p3 has no solution, and so no hint."""
    return [
        Problem(p.id, p.messages, f"{text} {p.answer}" if text and p.id != "p3" else "", p.answer, p.location)
        for p in sums()
    ]


def test_leakage_is_counted_over_the_responses_of_each_kind():
    problems, arguments = with_solutions("We know that it is"), {"sampler": Reciting(), "max_length": 200}
    result = run(problems, leak_words=["hint", "solution"], num_transcripts=None, **arguments)
    texts = [t for t in result.transcripts if t.sample is not None]
    reciting = [t for t in texts if t.response.startswith("the hint")]
    assert 0 < len(reciting) < len(texts)
    num_grams = num_leaked = num_quoting = num_hinted = 0
    for t in texts:
        solution = next(p.solution for p in problems if p.id == t.problem_id)
        if solution:
            whole, hinted = f"{t.response}$", f"{t.prompt[:-1]}|{solution}:"
            grams = [whole[i : i + 8] for i in range(len(whole) - 7)]
            num_grams += len(grams)
            leaked = [gram for gram in grams if gram in hinted and gram not in t.prompt]
            num_leaked, num_quoting, num_hinted = num_leaked + len(leaked), num_quoting + bool(leaked), num_hinted + 1
    metrics = result.metrics("test")
    assert metrics["test/sampled_hint_8grams"] == num_leaked / num_grams > 0
    assert num_hinted == len(texts) * 6 / 7 and 0 < num_quoting < num_hinted
    assert metrics["test/sampled_quoted_hint_share"] == num_quoting / num_hinted
    assert metrics["test/greedy_quoted_hint_share"] == 0
    assert metrics["test/greedy_hint_8grams"] == metrics["test/greedy_leak_words_per_1000"] == 0
    words = 1000 * len(reciting) / sum(t.length for t in texts)
    assert metrics["test/sampled_leak_words_per_1000"] == pytest.approx(words)
    assert not any("hint" in key or "leak" in key for key in run(with_solutions(""), **arguments).metrics())


class Confident(FakeSampler):
    """States its confidence in two of three responses after the sum; right sums have another probability."""

    def answer(self, request: Request, params: SamplingParams) -> Response:
        a = int("".join(map(chr, request.prompt)).split("+")[0])
        number = random.Random(request.seed).randrange(6) if params.temperature else a
        sum_ = a + 8 + (number % 2)
        stated = "" if number % 3 == 0 else f"\nConfidence: 0.{number}"
        ids = [ord(character) for character in f"{sum_}{stated}$"]
        return Response(ids, [-0.125 * (1 + number)] + [0.0] * (len(ids) - 1), [0.0] * len(ids), "stop")


def test_confidence_is_read_in_the_text_or_else_from_the_log_probs():
    pattern = EvaluationConfig().confidence_pattern
    arguments = {"sampler": Confident(), "max_length": 200, "num_transcripts": None}
    result = run(sums(), confidence=pattern, **arguments)
    verdicts = {(p.id, i): it for p in result.problems for i, it in [(None, p.greedy), *enumerate(p.samples)]}
    assert {it.states_confidence for it in verdicts.values()} == {True, False}
    for t in result.transcripts:
        it, (total, _, stated) = verdicts[t.problem_id, t.sample], t.response.partition("\nConfidence: ")
        number = next(n for n in range(8) if (f"0.{n}" == stated if stated else n % 3 == 0 and _has(n, t, total)))
        assert it.correct == t.correct == (int(total) == int(t.problem_id[1:]) + 8)
        assert it.confidence == (float(stated) if stated else math.exp(-0.125 * (1 + number)))
        assert it.states_confidence == bool(stated)
    for kind, is_greedy in (("greedy", True), ("sampled", False)):
        own = [it for (_, sample), it in verdicts.items() if (sample is None) == is_greedy]
        metrics = result.metrics("test")
        brier = sum((it.confidence - it.correct) ** 2 for it in own) / len(own)
        assert metrics[f"test/{kind}_brier"] == pytest.approx(brier)
        pairs = [a.confidence > b.confidence for a in own for b in own if a.correct and not b.correct]
        assert metrics[f"test/{kind}_spr"] == pytest.approx(sum(pairs) / len(pairs))
        share = sum(it.states_confidence for it in own) / len(own)
        assert metrics[f"test/{kind}_stated_confidence"] == pytest.approx(share) and 0 < share < 1
    unread = run(sums(), **arguments)  # the last line of most responses is now no sum
    assert unread.metrics()["evaluation/sampled_stated_confidence"] == 0
    assert unread.sampled_accuracy < result.sampled_accuracy


def _has(number: int, transcript: Transcript, total: str) -> bool:
    """Return whether `Confident` may have sampled ``number`` for a response without a stated confidence."""
    a = int(transcript.problem_id[1:])
    return number == a if transcript.sample is None else number < 6 and int(total) == a + 8 + number % 2


def test_a_sampler_without_log_probs_gives_no_calibration():
    class Silent(FakeSampler):
        def answer(self, request, params):
            response = super().answer(request, params)
            return replace(response, log_probs=[math.nan] * len(response.log_probs))

    result = run(sums(), sampler=Silent())
    assert result.greedy_calibration is None and result.problems[0].greedy.confidence is None
    assert not any(name in key for key in result.metrics() for name in ("ece", "brier", "spr", "ocg", "confidence"))


class Splitting(FakeSampler):
    """Splits a number into two, in one of several ways, which are all right."""

    def answer(self, request: Request, params: SamplingParams) -> Response:
        total = int("".join(map(chr, request.prompt)).split("+")[0]) + 8
        first = random.Random(request.seed).randrange(4)
        ids = [ord(character) for character in f"{first}+{total - first}$"]
        return Response(ids, [0.0] * len(ids), [0.0] * len(ids), "stop")


def splits(text: str, problem: Problem) -> bool:
    return sum(map(int, text.split("+"))) == int(problem.answer) and not text.startswith("3")


def test_different_right_answers_and_4grams_are_counted_by_problem():
    result = run(sums(), sampler=Splitting(), verifier=splits, num_transcripts=None)
    texts = [
        [t.response for t in result.transcripts if t.problem_id == f"p{a}" and t.sample is not None] for a in range(7)
    ]
    right = [{text for text in them if not text.startswith("3")} for them in texts]
    assert [it.distinct_right for it in result.problems] == [len(it) for it in right]
    assert max(map(len, right)) == 3
    grams = [[f"{text}$"[i : i + 4] for text in them for i in range(len(text) - 2)] for them in texts]
    assert [it.distinct_4grams for it in result.problems] == [len(set(it)) / len(it) for it in grams]
    metrics = result.metrics("test")
    assert metrics["test/distinct_right"] == pytest.approx(sum(map(len, right)) / 7)
    assert metrics["test/distinct_4grams"] == pytest.approx(sum(len(set(it)) / len(it) for it in grams) / 7)
    assert metrics["test/pass_over_avg_at_4"] == metrics["test/pass_at_4"] / metrics["test/avg_at_6"] > 1
    assert "test/pass_over_avg_at_1" not in metrics


def test_samples_depend_on_seed_and_step():
    first = run(sums(), num_transcripts=None).transcripts
    assert run(sums(), num_transcripts=None).transcripts == first
    assert run(sums(), num_transcripts=None, step=21).transcripts != first
    assert run(sums(), num_transcripts=None, seed=4).transcripts != first


def test_hinted_evaluation_shows_the_solution():
    plain, hinted = run(sums()), run(sums(), hinted=True)
    assert hinted.transcripts[0].prompt == "0+8|it is 8:"
    assert hinted.sampled_accuracy > plain.sampled_accuracy


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [
        (2, {}),
        (2, {"tensor_model_parallel_size": 2}),
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
    messages = ranks.run(failing_run, world_size=2)
    assert [message.splitlines()[0] for message in messages] == [
        "file:1: the verifier failed with KeyError: 'unit'"
    ] * 2


def test_problems_that_cannot_be_judged_are_found_before_sampling():
    sampler = FakeSampler()
    with pytest.raises(ValueError, match=r"^file.jsonl:7: expected an answer .* 1 of 8 problems"):
        run([*sums(), problem_with(None)], sampler=sampler)
    with pytest.raises(ValueError, match=r"^file:0: expected a prompt of at most 3 tokens .* got 4"):
        run(sums(), sampler=sampler, max_length=7)
    with pytest.raises(ValueError, match=r"evaluation\.path is not set"):
        run([], sampler=sampler)
    assert sampler.calls == []


def test_a_verifier_of_ones_own_needs_no_answers():
    problems = [Problem(p.id, p.messages, p.solution, None, p.location) for p in sums()]
    assert run(problems, verifier=lambda text, problem: text in problem.solution).greedy_accuracy > 0


@pytest.mark.parametrize("right", list(itertools.product([False, True], repeat=5)))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(right):
    for k in range(1, 6):
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
@settings(max_examples=150, deadline=None)
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
        a, b = "".join(map(chr, request.prompt)).split(":")[0].split("+")
        late = request.seed % 5 == 0 and params.temperature > 0
        text = f"{'well, ' * 40}it is {int(a) + int(b)}." + ("" if late else "$")
        return Response([ord(c) for c in text], [0.0] * len(text), [0.0] * len(text), "length" if late else "stop")


def talk_in_layout(sizes: dict[str, int], verifier: str) -> tuple[list[str], int]:
    """Return (lines about overlooked answers, responses that did not reach the limit)."""
    from megatron_selfdistill.config import ParallelConfig
    from megatron_selfdistill.distributed import ranks

    grid = ranks.initialize(ParallelConfig(**sizes), 0)
    result = run(sums(), grid, Talkative(), verifier=load_verifier(verifier), max_length=1000)
    whole = [it for problem in result.problems for it in (problem.greedy, *problem.samples) if not it.truncated]
    return result.overlooked.lines(verifier) if result.overlooked else [], len(whole)


def test_answers_that_the_verifier_never_takes_are_said_with_the_key_and_three_responses(ranks):
    found = ranks.run(talk_in_layout, {}, "exact_match", world_size=1)
    ((line, *examples), num_whole) = found[0]
    assert line.startswith(f"0 of 49 responses are right by evaluation.verifier=exact_match, but {num_whole} of them")
    assert "set evaluation.verifier=math_verify" in line and 0 < num_whole < 49
    assert [example.split(",")[0] for example in examples] == [f'  file:{a}: the answer "{a + 8}"' for a in range(3)]
    assert all(example.endswith(f'it is {a + 8}."') and len(example) < 280 for a, example in enumerate(examples))
    assert ranks.run(talk_in_layout, {}, "math_verify", world_size=1)[0][0] == []
    for sizes in ({}, {"tensor_model_parallel_size": 2}):
        assert ranks.run(talk_in_layout, sizes, "exact_match", world_size=2) == found * 2


def test_what_is_overlooked_is_said_without_responses_of_a_private_log_and_only_where_none_is_right():
    result = run(sums(), sampler=Talkative(), max_length=1000)
    (line,) = result.overlooked.lines("exact_match", show_contents=False)
    assert "it is" not in line
    assert "look at what your verifier compares" in result.overlooked.lines("lab.verify")[0]
    assert "data.system_prompt" in result.overlooked.lines("math_verify")[0]
    one_right = run(sums(), sampler=Talkative(), verifier=lambda text, problem: problem.id == "p0", max_length=1000)
    assert one_right.overlooked is None
    assert run([problem_with("163")], verifier=lambda *_: False, sampler=Silent()).overlooked is None


class Silent(FakeSampler):
    def answer(self, request: Request, params: SamplingParams) -> Response:
        return Response([STOP], [0.0], [0.0], "stop")
