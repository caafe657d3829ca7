# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The driver of guided pairs, against an engine that parts them in every way that the real one can."""

from __future__ import annotations

import json
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams
from megatron_selfdistill.rollout.vllm import pairs
from megatron_selfdistill.rollout.vllm.coroutines import begin, result_of
from megatron_selfdistill.rollout.vllm.engine_output import EngineOutput, EngineRequest
from megatron_selfdistill.rollout.vllm.pairs import PairCounts, generate_guided, guided_responses
from megatron_selfdistill.rollout.vllm.protocol import PairHalf, PairLog

PARAMS = SamplingParams(max_new_tokens=30, stop_token_ids=(1, 3))
GARBAGE = 99


def true_token(seed: int, position: int) -> int:
    """Return the token that the mix gives at ``position``; 1 and 3 end a response."""
    return int(np.random.default_rng([seed, position]).integers(0, 30))


def true_log_probs(seed: int, position: int) -> list[float]:
    return [-seed - position / 32, -seed - position / 64, -seed - position / 128]


def make_requests(count: int) -> list[Request]:
    return [Request([40 + i, 41], seed=i, teacher_prompt=[50 + i, 51, 52, 53]) for i in range(count)]


class PartingEngine:
    """An engine that generates halves by `true_token` and separates pairs at random.

    ``faults``: the probability that a pair is separated in a round that it shares with other pairs.  Of more than
    ``seats`` pairs none gets a token.
    """

    name = "the engine of this test"

    def __init__(self, faults: float = 0.0, seats: int = 1000, **limits: int) -> None:
        self.faults, self.seats = faults, seats
        self.limits = {"max_model_len": 100, "max_num_batched_tokens": 1000, "kv_cache_tokens": 1000, **limits}
        self.rng = np.random.default_rng(0)
        self.version = 5
        self.logs: dict[str, PairLog] = {}
        self.names: list[str] = []
        self.read_ahead: list[list[int]] = []
        self.adapted: set[tuple[bool, ...]] = set()

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineOutput]:
        if "extra_args" not in requests[0].sampling:
            if "prompt_logprobs" in requests[0].sampling:
                return [self.read(request) for request in requests]
            self.read_ahead += [request.token_ids for request in requests]
            return [EngineOutput([7], [0.0], "length", self.version) for _ in requests]
        outputs: list[EngineOutput] = []
        for student, teacher in zip(requests[::2], requests[1::2], strict=True):
            self.num_pairs = len(requests) // 2
            outputs += self.write(json.loads(json.dumps([student.__dict__, teacher.__dict__])))
        return outputs

    def read(self, request: EngineRequest) -> EngineOutput:
        """Read prompt and response, whose last token is the only one to sample; token i has the log-prob -100 - i."""
        assert request.adapted and request.sampling["max_tokens"] == 1
        of_prompt = [-100.0 - i for i in range(1, len(request.token_ids))]
        [last] = request.sampling["allowed_token_ids"]
        return EngineOutput([last], [-100.0 - len(request.token_ids)], "length", self.version, of_prompt)

    def write(self, pair: list[dict[str, Any]]) -> list[EngineOutput]:
        self.adapted.add(tuple(half["adapted"] for half in pair))
        halves = [PairHalf.of(half["sampling"]["extra_args"]) for half in pair]
        student, teacher = halves
        assert student is not None and teacher is not None
        assert (student.role, teacher.role) == ("anchor", "teacher")
        assert replace(student, role="teacher") == teacher and student.pair not in self.names
        self.names.append(student.pair)
        written = [true_token(student.seed, position) for position in range(student.start)]
        assert pair[0]["token_ids"] == [40 + student.seed, 41, *written]
        assert pair[1]["token_ids"] == [50 + student.seed, 51, 52, 53, *written]
        assert pair[0]["sampling"]["max_tokens"] == student.max_tokens == 30 - student.start
        stops = pair[0]["sampling"]["stop_token_ids"]
        assert student.stop in stops

        tokens: list[int] = []
        while len(tokens) < student.max_tokens and not set(tokens) & set(stops):
            tokens.append(true_token(student.seed, student.start + len(tokens)))
        self.logs[student.pair], outputs = self.part(tokens, student)
        return [EngineOutput(output, [0.0] * len(output), "stop", self.version) for output in outputs]

    def part(self, tokens: list[int], half: PairHalf) -> tuple[PairLog, list[list[int]]]:
        log = np.array([true_log_probs(half.seed, half.start + i) for i in range(len(tokens))], dtype=np.float32)
        crowded = self.num_pairs > self.seats
        if not crowded and (self.num_pairs == 1 or self.rng.random() >= self.faults):
            return PairLog([-1, -1], log), [tokens, tokens]
        cut = 0 if crowded else int(self.rng.integers(0, len(tokens)))
        common, drawn = tokens[:cut], np.concatenate([log[:cut], np.full((1, 3), -77.0, dtype=np.float32)])
        garbage = GARBAGE if self.rng.random() < 0.5 else half.stop
        if crowded or self.rng.random() < 0.3:  # preempted: both are stopped at once
            return PairLog([cut, cut], log[:cut]), [[*common, half.stop]] * 2
        # One keeps the token of a draw that the other throws away; it may be a stop, or the last one.
        kept, forced = [*common, garbage], -1
        if garbage != half.stop and len(kept) < half.max_tokens:
            kept, forced = [*kept, half.stop], cut + 1
        if self.rng.random() < 0.5:
            return PairLog([forced, cut], drawn), [kept, [*common, half.stop]]
        return PairLog([cut, forced], drawn), [[*common, half.stop], kept]

    def call(self, method: str, *args: Any) -> Any:
        if method == "guided_limits":
            return self.limits
        assert method == "pop_pair_logs"
        logs = [self.logs.pop(name, None) for name in args[0]]
        return json.loads(json.dumps([None if log is None else log.to_json() for log in logs]))


def assert_undisturbed(responses: Sequence[Response], params: SamplingParams = PARAMS) -> None:
    for seed, response in enumerate(responses):
        tokens: list[int] = []
        while len(tokens) < 30 and not set(tokens) & set(params.stop_token_ids):
            tokens.append(true_token(seed, len(tokens)))
        assert response.token_ids == tokens
        student, teacher, mixed = zip(*(true_log_probs(seed, i) for i in range(len(tokens))), strict=True)
        assert response.log_probs == list(student)
        assert response.teacher_log_probs == list(teacher)
        assert response.sampled_log_probs == list(mixed)
        assert response.finish_reason == ("stop" if tokens[-1] in params.stop_token_ids else "length")
        assert response.weight_version == 5


@pytest.mark.parametrize("params", [PARAMS, replace(PARAMS, stop_token_ids=())], ids=["stops", "no stops"])
@pytest.mark.parametrize("faults", [0.0, 0.5, 0.95])
def test_parted_pairs_end_as_if_nothing_had_happened(faults: float, params: SamplingParams) -> None:
    engine, counts = PartingEngine(faults), PairCounts()
    responses = generate_guided(engine, make_requests(40), params, counts)
    assert_undisturbed(responses, params)
    assert {response.finish_reason for response in responses} <= {"stop", "length"}
    assert counts.pairs == 40 and (counts.repairs > 20) == (faults > 0)
    assert not engine.logs, "a log was left in the engine"


def test_each_half_has_the_adapters_of_its_role() -> None:
    engine = PartingEngine(0.5)
    generate_guided(engine, make_requests(5), PARAMS)
    assert engine.adapted == {(True, True)}
    generate_guided(engine, make_requests(5), PARAMS, bare_roles=("teacher", "reference"))
    assert engine.adapted == {(True, True), (True, False)}


def test_the_student_reads_what_two_frozen_models_have_chosen() -> None:
    engine, anchored = PartingEngine(0.5), replace(PARAMS, target=Target(anchor="reference"))
    responses = generate_guided(engine, make_requests(20), anchored, bare_roles=("teacher", "reference"))
    assert engine.adapted == {(False, False)}
    for seed, response in enumerate(responses):
        count = len(response.token_ids)
        assert response.log_probs == [-102.0 - i for i in range(count)]  # behind a prompt of two tokens
        assert response.teacher_log_probs == [true_log_probs(seed, i)[1] for i in range(count)]
    with pytest.raises(ValueError, match=r"have two contexts per token, but target\.match=student"):
        matching = replace(PARAMS, target=Target(anchor="reference", match="student"))
        generate_guided(engine, make_requests(1), matching, bare_roles=("reference",))
    with pytest.raises(ValueError, match="weights of a reference, which this sampler does not hold"):
        generate_guided(engine, make_requests(1), anchored)


class LateEngine:
    """An engine whose answers come one by one, when the test says so."""

    name = PartingEngine.name

    def __init__(self, engine: PartingEngine) -> None:
        self.engine = engine
        self.asked: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    async def generate(self, requests: Sequence[EngineRequest]) -> list[EngineOutput]:
        return await self._later(lambda: self.engine.generate(requests))

    async def call(self, method: str, *args: Any) -> Any:
        return await self._later(lambda: self.engine.call(method, *args))

    async def _later(self, answer: Callable[[], Any]) -> Any:
        future: Future[Any] = Future()
        self.asked.append((future, answer))
        return await result_of(future)

    def answer_one(self) -> None:
        future, answer = self.asked.popleft()
        try:
            future.set_result(answer())
        except EngineError as error:
            future.set_exception(error)


def test_engines_that_answer_late_all_work_at_once_and_need_no_thread() -> None:
    engines = [LateEngine(PartingEngine(0.5)) for _ in range(8)] + [LateEngine(PartingEngine(seats=0))]
    before = threading.active_count()
    results = [begin(guided_responses(engine, make_requests(10), PARAMS)) for engine in engines]
    while not all(result.done() for result in results):
        assert all(len(e.asked) == 1 for e, result in zip(engines, results, strict=True) if not result.done())
        for engine in engines:
            if engine.asked:
                engine.answer_one()
    assert threading.active_count() == before
    for result in results[:-1]:
        assert_undisturbed(result.result(0))
    with pytest.raises(EngineError, match="got no token in 10 rounds"):
        results[-1].result(0)


def test_no_requests_ask_nothing_of_the_engine() -> None:
    assert generate_guided(None, [], PARAMS) == []  # type: ignore[arg-type]


def test_pairs_that_leave_each_other_no_room_go_in_smaller_groups() -> None:
    engine, counts = PartingEngine(seats=3), PairCounts()
    assert_undisturbed(generate_guided(engine, make_requests(20), PARAMS, counts))
    assert counts.rounds < 60


def test_a_pair_for_which_there_is_never_room_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(EngineError, match="prompts of 2 and 4 tokens got no token in 10 rounds"):
        generate_guided(PartingEngine(seats=0), make_requests(20), PARAMS)


def test_prompts_are_read_ahead_once_each_where_they_do_not_fit_into_one_pass() -> None:
    requests = [request for request in make_requests(3) for _ in range(4)]
    requests = [replace(request, seed=request.prompt[0] - 40) for request in requests]
    counts = PairCounts()
    engine = PartingEngine(max_num_batched_tokens=71)
    generate_guided(engine, requests, PARAMS, counts)
    assert engine.read_ahead == [prompt for i in range(3) for prompt in ([40 + i, 41], [50 + i, 51, 52, 53])]
    assert counts.primed_tokens == 18
    engine = PartingEngine(max_num_batched_tokens=72)
    generate_guided(engine, requests, PARAMS)
    assert engine.read_ahead == []
    engine = PartingEngine(max_num_batched_tokens=71, kv_cache_tokens=17)  # of which half: 8 tokens
    generate_guided(engine, requests, PARAMS)
    assert engine.read_ahead == [[40, 41], [50, 51, 52, 53], [41, 41]]


def test_what_cannot_be_guided_is_refused_before_the_engine_works() -> None:
    requests = make_requests(2)
    engine = PartingEngine(max_model_len=33)
    with pytest.raises(ValueError, match=r"longest prompt has 4 tokens .* 30, together more than the 33"):
        generate_guided(engine, requests, PARAMS)
    with pytest.raises(ValueError, match="1 of 2 have none"):
        generate_guided(engine, [requests[0], replace(requests[1], teacher_prompt=None)], PARAMS)
    with pytest.raises(ValueError, match="temperature 1"):
        generate_guided(engine, requests, replace(PARAMS, temperature=0.7))
    assert not engine.names


def test_parts_of_a_response_by_different_weights_are_an_error() -> None:
    class NewWeights(PartingEngine):
        def call(self, method: str, *args: Any) -> Any:
            self.version += method == "pop_pair_logs"
            return super().call(method, *args)

    with pytest.raises(EngineError, match=r"one version of the weights, .* versions \[.*5, 6"):
        generate_guided(NewWeights(faults=0.9), make_requests(5), PARAMS)


@pytest.mark.parametrize(
    ("student", "teacher", "forced", "sentence"),
    [
        ([4, 5], [4, 5], [-1, -1], "after 2 of 30 tokens without a stop token"),
        ([4, 5, 1], [4, 6, 1], [-1, -1], "must share 3 tokens"),
        ([4, 5, 8, 1], [4, 5, 8, 1], [3, 2], "the teacher's half .* stopped after 2 tokens but has 4"),
        ([4, 5, 8, 9, 1], [4, 5, 8, 9, 1], [-1, -1], "or 4 entries"),
    ],
    ids=["cut by the engine", "different tokens", "went on", "unlogged"],
)
def test_an_engine_that_contradicts_itself_is_an_error(
    student: list[int], teacher: list[int], forced: list[int], sentence: str
) -> None:
    class Contradicting(PartingEngine):
        def part(self, tokens: list[int], half: PairHalf) -> tuple[PairLog, list[list[int]]]:
            return PairLog(forced, np.zeros((4, 3), dtype=np.float32)), [student, teacher]

    with pytest.raises(EngineError, match=sentence):
        generate_guided(Contradicting(), make_requests(1), PARAMS)


def test_a_log_that_is_gone_and_an_output_that_is_missing_are_errors() -> None:
    class Forgetful(PartingEngine):
        def call(self, method: str, *args: Any) -> Any:
            return [None] * len(args[0]) if method == "pop_pair_logs" else super().call(method, *args)

    class Short(PartingEngine):
        def generate(self, requests: Sequence[EngineRequest]) -> list[EngineOutput]:
            return super().generate(requests)[:-1]

    with pytest.raises(EngineError, match="has no log of a guided pair"):
        generate_guided(Forgetful(), make_requests(3), PARAMS)
    short = Short()
    with pytest.raises(EngineError, match="returned 5 outputs for 6 requests"):
        generate_guided(short, make_requests(3), PARAMS)
    assert not short.logs, "a log was left in the engine"


def test_a_malformed_half_is_refused_and_other_requests_are_none() -> None:
    assert PairHalf.of(None) is None and PairHalf.of({"other": 1}) is None
    with pytest.raises(ValueError, match="must hold the fields of PairHalf"):
        PairHalf.of({"selfdistill_pair": {"pair": "a", "target": {}}})


@pytest.mark.parametrize("value", [math.nan, -math.inf, 3.0])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_log_prob_that_no_model_can_have_is_an_error_with_the_engines_name(column: int, value: float) -> None:
    class Lying(PartingEngine):
        def part(self, tokens: list[int], half: PairHalf) -> tuple[PairLog, list[list[int]]]:
            log, outputs = super().part(tokens, half)
            log.log_probs[-1, column] = value
            return log, outputs

    with pytest.raises(EngineError, match=r"^the engine of this test logged log-probs"):
        generate_guided(Lying(), make_requests(2), PARAMS)


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("guided_limits", "none"),
        ("guided_limits", {"max_model_len": "100"}),
        ("pop_pair_logs", 7),
        ("pop_pair_logs", ["no log"]),
        ("pop_pair_logs", []),
        ("pop_pair_logs", [{"forced": [-1], "log_probs": ""}]),
        ("pop_pair_logs", [{"forced": ["-1", "-1"], "log_probs": ""}]),
        ("pop_pair_logs", [{"forced": [-1, -1], "log_probs": "no base64"}]),
        ("pop_pair_logs", [{"forced": [-1, -1], "log_probs": 5}]),
        ("pop_pair_logs", [None]),
    ],
)
def test_an_answer_of_another_form_is_an_error_with_the_engines_name(method: str, answer: Any) -> None:
    class Garbled(PartingEngine):
        def call(self, called: str, *args: Any) -> Any:
            return answer if called == method else super().call(called, *args)

    with pytest.raises(EngineError, match=r"^the engine of this test (was to|has no log)"):
        generate_guided(Garbled(), make_requests(1), PARAMS)


def test_logs_come_in_answers_that_stay_short(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Counting(PartingEngine):
        def call(self, method: str, *args: Any) -> Any:
            asked.extend(len(names) for names in args)
            return super().call(method, *args)

    monkeypatch.setattr(pairs, "_LOGGED_TOKENS", 70)  # a log has at most 30
    assert_undisturbed(generate_guided(Counting(), make_requests(5), PARAMS))
    assert asked == [2, 2, 1]
