# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Episodes with an environment: prompts, seeds, replies, rewards and ends of every turn."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch.distributed as dist
from characters import ONE_RANK, Characters, text_of
from made_methods import made, response_of

from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.data.given_solutions import GivenSolutions, build_contexts
from megatron_selfdistill.data.packed_batch import PackingRules
from megatron_selfdistill.data.packing import segments_of
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompt_templates import PromptTemplates
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.environments.episodes import (
    EvaluationPlayer,
    SessionEpisodes,
    StatelessEpisodes,
    episode_metrics,
)
from megatron_selfdistill.errors import ConfigError, EngineError
from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams
from megatron_selfdistill.rollout.sampling import SampleKey, sample_seed
from megatron_selfdistill.sources.rollouts import Rollout

PROBLEMS = [tiny.problem(name, f"hint {name}", name, id=name, location=f"file:{name}") for name in "ab"]
TEMPLATES = PromptTemplates(teacher="{problem}|{solution}", student="{problem}?")


def given(max_length: int = 60, tokenizer: type[Characters] = Characters, policy: str = "error") -> GivenSolutions:
    return GivenSolutions(PromptBuilder(tokenizer(), TEMPLATES), max_length, 8, policy=policy)


def students(turns: Sequence[Rollout]) -> list[str]:
    return [text_of(turn.prompts.student_prompt) for turn in turns]


def teachers(turns: Sequence[Rollout]) -> list[str]:
    return [text_of(turn.prompts.teacher_prompt) for turn in turns]


class Opened(Characters):
    """The tokenizer of a chat whose every answer follows a colon, so that a conversation only grows."""

    def render_chat(self, messages: Sequence[Any], *, add_generation_prompt: bool = True, **kwargs: Any) -> str:
        shown = [":" * (one["role"] == "assistant") + one["content"] for one in messages]
        return "".join(shown) + ":" * add_generation_prompt


def opened(max_length: int = 60) -> GivenSolutions:
    return given(max_length, Opened)


class Script:
    """An environment that goes on while the last response is a ``w``, with the number of the turn as its reply."""

    def __init__(self, role: str = "user", **fields: Any) -> None:
        self.role, self.fields = role, fields
        self.heard: list[tuple[str, list[str]]] = []

    def reply(self, problem: Problem, said: Sequence[str]) -> Reply:
        self.heard.append((problem.id, list(said)))
        number, wrong = len(said) // 2 + 1, said[-1] == "w"
        values = {"feedback": f"f{number}", "reward": float(not wrong), "done": not wrong} | self.fields
        return Reply(f"#{number}", self.role, **values)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """Make a reduction over ranks return the numbers of this rank."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op=None, group=None: tensor)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")


SETTINGS: dict[str, Any] = {"given": given(), "grid": ONE_RANK, "phases": Phases(), "has_teacher": True}


def played(environment: Any, texts: Sequence[Sequence[str]], max_turns: int = 3, **options: Any):
    """Return turns and number of cut episodes of one episode per item of ``texts``, and the requests of each turn."""
    method = made(options.pop("overrides", []), options.get("given", given()))
    episodes = StatelessEpisodes(environment=environment, max_turns=max_turns, **SETTINGS | options)
    asked: list[list[SampleKey]] = []

    def generate(keys, pairs):
        asked.append(list(keys))
        numbers = ["ab".index(key.problem_id) for key in keys]
        return [response_of(texts[i][key.turn]) for i, key in zip(numbers, keys, strict=True)]

    first = [
        Rollout(problem, method.prompts(problem), response_of(text[0]), i, key=SampleKey(5, problem.id, 0))
        for i, (problem, text) in enumerate(zip(PROBLEMS, texts, strict=False))
    ]
    return *episodes.played(first, method, generate), asked


def test_each_turn_is_asked_after_the_conversation_with_the_wording_at_the_problem():
    environment = Script()
    turns, num_cut, asked = played(environment, [["w$", "w$", "r$"], ["r$"]])
    assert num_cut == 0 and [[(key.problem_id, key.turn) for key in keys] for keys in asked] == [[("a", 1)], [("a", 2)]]
    assert [(turn.group, turn.episode, turn.turn) for turn in turns] == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 1, 0)]
    assert students(turns) == ["a?:", "a?w#1:", "a?w#1w#2:", "b?:"]
    assert teachers(turns) == ["a|hint a:", "a|hint aw#1:", "a|hint aw#1w#2:", "b|hint b:"]
    assert [turn.reward for turn in turns] == [0.0, 0.0, 1.0, 1.0]
    assert [turn.feedback for turn in turns] == ["f1", "f2", "f3", "f1"]
    said = [("a", ["w"]), ("b", ["r"]), ("a", ["w", "#1", "w"]), ("a", ["w", "#1", "w", "#2", "r"])]
    assert environment.heard == said
    assert [message["role"] for message in turns[2].problem.messages] == ["user", "assistant"] * 2 + ["user"]


class Counted(Characters):
    """The tokenizer of characters, which refuses a text that is much longer than any prompt."""

    def encode(self, text: str) -> list[int]:
        assert len(text) < 5_000, "the text cannot fit, so it need not be tokenized"
        return super().encode(text)


@pytest.mark.parametrize("field", ["text", "hint"])
def test_a_reply_that_cannot_fit_ends_its_episode_before_it_is_tokenized(field):
    rules = given(60, Counted, "drop")

    class Huge(Script):
        def reply(self, problem: Problem, said: Sequence[str]) -> Reply:
            return replace(super().reply(problem, said), **{field: "x" * 1_800_000})

    turns, num_cut, _ = played(Huge(), [["w$", "w$"], ["r$"]], given=rules)
    assert num_cut == 1 and [turn.turn for turn in turns] == [0, 0]


def test_an_episode_of_one_sequence_continues_the_sampled_tokens_in_both_prompts():
    turns, num_cut, _ = played(Script(), [["w$", "w$", "r$"], ["r$"]], given=opened(), one_sequence=True)
    assert num_cut == 0
    assert students(turns) == ["a?:", "a?:w$#1:", "a?:w$#1:w$#2:", "b?:"]
    assert teachers(turns) == ["a|hint a:", "a|hint a:w$#1:", "a|hint a:w$#1:w$#2:", "b|hint b:"]
    contexts = build_contexts([turn.prompts for turn in turns], [turn.response for turn in turns])
    rules = PackingRules(max_tokens=64, cp_size=1, tp_size=1, paired=False, joins_turns=True)
    assert segments_of(contexts, rules) == [range(3), range(3, 4)]
    assert [message["role"] for message in turns[2].problem.messages] == ["user", "assistant"] * 2 + ["user"]


class Guiding(Script):
    """A `Script` whose first two replies have a hint, and whose third has none."""

    def reply(self, problem: Problem, said: Sequence[str]) -> Reply:
        number = len(said) // 2 + 1
        return replace(super().reply(problem, said), hint=f"step {number + 1}" if number < 3 else None)


def test_a_hint_of_a_reply_stays_in_the_teachers_prompt_until_the_next_one():
    turns, _, _ = played(Guiding(), [["w$", "w$", "w$", "r$"]], max_turns=4)
    assert teachers(turns) == ["a|hint a:", "a|step 2w#1:", "a|step 3w#1w#2:", "a|step 3w#1w#2w#3:"]
    assert [turn.prompts.solution for turn in turns] == ["hint a", "step 2", "step 3", "step 3"]
    assert students(turns) == ["a?:", "a?w#1:", "a?w#1w#2:", "a?w#1w#2w#3:"]
    with pytest.raises(ConfigError, match="turn 1 of an episode: the environment gives a hint for a later turn: set"):
        played(Guiding(), [["w$", "r$"]], given=opened(), one_sequence=True)


@pytest.mark.parametrize(("rules", "one_sequence", "length"), [(given(21), False, 12), (opened(24), True, 14)])
def test_an_episode_ends_where_its_next_prompts_do_not_fit(rules, one_sequence, length):
    """Without a teacher, only the student's prompt must fit."""
    texts, options = [["w$", "w$", "r$"]], {"given": rules, "one_sequence": one_sequence}
    turns, num_cut, _ = played(Script(), texts, **options)
    assert len(turns) == 2 and num_cut == 1 and len(turns[1].prompts.teacher_prompt) == length
    metrics = episode_metrics(turns, num_cut, ONE_RANK)
    assert metrics["episodes/too_long_share"] == metrics["episodes/unfinished_share"] == 1.0
    turns, num_cut, _ = played(Script(), texts, **options, has_teacher=False)
    assert len(turns) == 3 and num_cut == 0
    assert turns[2].prompts.teacher_prompt == turns[2].prompts.student_prompt


def test_a_chat_template_that_rewrites_a_response_is_refused_with_the_turn(monkeypatch):
    plain = Opened.render_chat

    def thoughtless(self, messages, **options):
        return plain(self, [{**one, "content": one["content"].split("</think>")[-1]} for one in messages], **options)

    assert len(played(Script(), [["w$", "r$"]], given=opened(), one_sequence=True)[0]) == 2
    monkeypatch.setattr(Opened, "render_chat", thoughtless)
    assert len(played(Script(), [["w$", "r$"]], given=opened())[0]) == 2
    with pytest.raises(ConfigError, match="turn 1 of an episode: file:a: the chat template rewrites a response once a"):
        played(Script(), [["w$", "r$"]], given=opened(), one_sequence=True)


def test_replies_are_prompt_tokens_and_so_never_trained_on():
    turns, _, _ = played(Script(role="tool"), [["w$", "r$"]])
    contexts = build_contexts([turn.prompts for turn in turns], [turn.response for turn in turns])
    assert [text_of(context.response) for context in contexts] == ["w$", "r$"]
    assert text_of(contexts[1].student_prompt).endswith("w#1:") and text_of(contexts[1].teacher_prompt).endswith("w#1:")
    assert turns[1].problem.messages[-1] == {"role": "tool", "content": "#1"}


def test_every_turn_has_random_numbers_of_its_own_and_the_first_turn_those_of_a_run_without_environment():
    seeds = [SampleKey(5, "a", 2, turn).seed(7) for turn in range(3)]
    assert seeds[0] == sample_seed(7, 5, "a", 2) and len(set(seeds)) == 3
    assert seeds[1] == sample_seed(7, 5, "a/turn1", 2)


@pytest.mark.parametrize("limit", [{"max_turns": 2}, {"max_tokens": 4}])
def test_an_episode_ends_at_its_last_turn_or_token_without_another_prompt(limit):
    turns, num_cut, asked = played(Script(), [["w$", "w$", "w$"]], **limit)
    assert len(turns) == 2 and len(asked) == 1 and num_cut == 0
    metrics = episode_metrics(turns, num_cut, ONE_RANK)
    assert metrics["episodes/unfinished_share"] == 1.0 and metrics["episodes/too_long_share"] == 0.0


def test_a_truncated_response_ends_its_episode_and_the_environment_does_not_see_it():
    environment = Script()
    turns, _, _ = played(environment, [["cut"], ["w$", "r$"]])
    assert [turn.problem.id for turn in turns] == ["a", "b", "b"] and turns[0].reply is None
    assert {name for name, _ in environment.heard} == {"b"} and turns[0].reward is None


@pytest.mark.parametrize("reply", [{"done": True}, {"done": False, "text": None}])
def test_a_reply_that_is_done_or_shows_nothing_ends_the_episode(reply):
    environment = SimpleNamespace(reply=lambda problem, said: Reply(**({"text": "#"} | reply)))
    turns, _, asked = played(environment, [["w$", "w$"]])
    assert len(turns) == 1 and not asked


def test_later_turns_show_no_hint_where_a_hint_is_known_only_afterwards():
    turns, _, _ = played(Script(), [["w$", "r$"]], overrides=["method.name=sdpo", "rollout.num_samples=2"])
    assert text_of(turns[1].prompts.teacher_prompt) == "a?w#1:"


def calls_on_this_rank() -> tuple[int, int, int]:
    """Return how often this rank is asked for responses and replies; rank 1 has the only episode of three turns."""
    rank = dist.get_rank()
    grid = SimpleNamespace(**(vars(ONE_RANK) | {"dp_rank": rank, "dp_size": 2}))
    calls = {"replies": 0}

    class Counted(StatelessEpisodes):
        def replies(self, episodes):
            calls["replies"] += 1
            return super().replies(episodes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "StatelessEpisodes", Counted)
        turns, _, asked = played(Script(), [["w$", "w$", "r$"] if rank else ["r$"]], max_turns=5, grid=grid)
    return len(turns), len(asked), calls["replies"]


def test_every_replica_makes_as_many_calls_as_the_longest_episode_of_any_replica(ranks, monkeypatch):
    monkeypatch.undo()
    assert ranks.run(calls_on_this_rank, world_size=2) == [(1, 2, 3), (3, 2, 3)]


def test_metrics_are_means_over_episodes():
    turns, num_cut, _ = played(Script(reward=0.25), [["w$", "w$", "r$"], ["r$"]])
    means = {"turns": 2.0, "reward": 0.5, "first_reward": 0.25, "last_reward": 0.25}
    found = episode_metrics(turns, num_cut, ONE_RANK)
    assert {name: found[f"episodes/{name}_mean"] for name in means} == means
    assert episode_metrics([], 0, ONE_RANK)["episodes/turns_mean"] == 0.0


def failing(problem: Problem, said: Sequence[str]) -> Reply:
    raise KeyError("no such tool")


@pytest.mark.parametrize(
    ("reply", "word"),
    [
        (failing, r"KeyError: 'no such tool'\n  File "),
        (lambda problem, said: sys.exit(0), r"SystemExit\(0\)"),
        (lambda problem, said: "yes", "TypeError: .*'yes'"),
        (lambda problem, said: Reply("cut \ud83d"), "ValueError: text of a reply"),
    ],
    ids=["fails", "ends the program", "no reply", "half a character"],
)
def test_an_environment_that_fails_is_one_message_with_the_place_of_the_problem(reply, word):
    with pytest.raises(EngineError, match=f"^file:a: .*{word}"):
        played(SimpleNamespace(reply=reply), [["r$"]])


class Sessions:
    """Sessions without processes, which note their calls."""

    def __init__(self, openings: dict[str, Reply]) -> None:
        self.openings, self.calls, self.open = openings, [], set[SampleKey]()

    def reset(self, key: SampleKey, problem: Problem, seed: int) -> Reply:
        self.open.add(key)
        self.calls.append(("reset", problem.id, seed))
        return self.openings[problem.id]

    def step(self, key: SampleKey, text: str) -> Reply:
        self.calls.append(("step", key.problem_id, text))
        return Reply(f"#{text}", reward=0.5, done=text == "r")

    def __contains__(self, key: SampleKey) -> bool:
        return key in self.open

    def end_all(self) -> None:
        self.open.clear()


def with_sessions(openings: dict[str, Reply], texts: Sequence[Sequence[str]], max_length: int = 60):
    """Return the turns of a step whose episodes have sessions, and the sessions."""
    method, sessions = made([], given(max_length)), Sessions(openings)
    grid = SimpleNamespace(**vars(ONE_RANK), is_reporter=True)
    settings = SETTINGS | {"given": given(max_length), "grid": grid, "max_turns": 3}
    episodes = SessionEpisodes(sessions=sessions, seed=7, concurrency=2, **settings)
    samples = [(SampleKey(5, problem.id, 0), problem, method.prompts(problem)) for problem in PROBLEMS[: len(texts)]]
    first = [
        Rollout(problem, pair, response_of(texts[i][0]), i, key=key, opening=opening)
        for i, ((key, problem, pair), opening) in enumerate(zip(*episodes.opened(samples, method), strict=True))
    ]

    def generate(keys, pairs):
        return [response_of(texts["ab".index(key.problem_id)][key.turn]) for key in keys]

    return episodes.played(first, method, generate)[0], sessions


def test_the_prompts_of_an_episode_begin_with_the_text_of_its_session():
    turns, sessions = with_sessions({"a": Reply(" go", done=False), "b": Reply(done=False)}, [["w$", "r$"], ["r$"]])
    assert students(turns) == ["a go?:", "a go?w#w:", "b?:"] and teachers(turns)[1] == "a go|hint aw#w:"
    assert sorted(sessions.calls) == [
        *[("reset", name, SampleKey(5, name, 0).seed(7)) for name in "ab"],
        *[("step", "a", "r"), ("step", "a", "w"), ("step", "b", "r")],
    ]
    assert not sessions.open and episode_metrics(turns, 0, ONE_RANK)["episodes/failed_share"] == 0.0


def test_the_hint_of_a_sessions_beginning_takes_the_place_of_the_solution():
    openings = {"a": Reply(hint="north", done=False), "b": Reply(" go", hint="south", done=False)}
    turns, _ = with_sessions(openings, [["w$", "r$"], ["r$"]])
    assert teachers(turns) == ["a|north:", "a|northw#w:", "b go|south:"]
    assert students(turns) == ["a?:", "a?w#w:", "b go?:"]


@pytest.mark.parametrize(
    ("opening", "reason"),
    [
        (Reply(failure="reset raised OSError: no display"), "reset raised OSError: no display"),
        (Reply("." * 60, done=False), "text and hint of reset are too long for data.max_length"),
    ],
)
def test_an_episode_that_cannot_begin_is_one_response_to_the_problem_alone(caplog, opening, reason):
    turns, sessions = with_sessions({"a": opening, "b": Reply(done=False)}, [["w$"], ["w$", "r$"]])
    assert students(turns) == ["a?:", "b?:", "b?w#w:"] and [turn.reward for turn in turns] == [0.0, 0.5, 0.5]
    assert turns[0].reply == Reply(failure=reason) and not sessions.open
    assert ("step", "a", "w") not in sessions.calls
    assert episode_metrics(turns, 0, ONE_RANK)["episodes/failed_share"] == 0.5
    assert opening.failure is None or "step 5 to problem 'a', sample 0: reset raised" in caplog.text


def test_a_step_without_any_session_ends_the_run():
    failed = Reply(failure="reset raised OSError: no display")
    with pytest.raises(EngineError, match="all 2 sessions of the step failed, the first: reset raised OSError"):
        with_sessions({"a": failed, "b": failed}, [["w$"], ["w$"]])


class Answering:
    """A sampler that answers ``w`` in the first two turns of problem a, and ``r`` elsewhere."""

    def __init__(self) -> None:
        self.calls: list[list[Request]] = []

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        self.calls.append(list(requests))
        return [
            response_of("w$" if text_of(it.prompt).startswith("a") and it.prompt.count(ord("#")) < 2 else "r$")
            for it in requests
        ]


def evaluated(hinted: bool = False, at_once: int = 8, **options: Any):
    """Return the episodes of two samples of both problems, and the requests of each call of the sampler."""
    sampler = Answering()
    episodes = StatelessEpisodes(environment=Guiding(reward=0.25), **SETTINGS | {"max_turns": 3} | options)
    player = EvaluationPlayer(episodes, sampler, 7, 20, at_once)
    samples = [(problem, i) for problem in PROBLEMS for i in range(2)]
    return player.play(samples, SamplingParams(8), hinted=hinted), sampler.calls


def test_an_evaluation_plays_whole_episodes_with_the_random_numbers_of_their_names():
    found, calls = evaluated()
    assert [(text_of(it.prompt), it.reward, list(it.replies)) for it in found[::2]] == [
        ("a?:", 0.75, ["#1", "#2", "#3"]),
        ("b?:", 0.25, ["#1"]),
    ]
    assert [[text_of(one.token_ids) for one in it.responses] for it in found] == [["w$", "w$", "r$"]] * 2 + [["r$"]] * 2
    assert [[text_of(request.prompt) for request in call] for call in calls[1:]] == [["a?w#1:"] * 2, ["a?w#1w#2:"] * 2]
    assert [request.seed for request in calls[0]] == [
        sample_seed(7, 20, f"eval/{name}", i) for name in "ab" for i in (0, 1)
    ]
    assert [request.seed for request in calls[1]] == [sample_seed(7, 20, "eval/a/turn1", i) for i in (0, 1)]


def test_an_evaluation_with_hints_reads_the_hint_of_each_turn():
    found, calls = evaluated(hinted=True)
    assert text_of(found[0].prompt) == "a|hint a:"
    assert [text_of(call[0].prompt) for call in calls] == ["a|hint a:", "a|step 2w#1:", "a|step 3w#1w#2:"]


def test_an_evaluation_plays_no_more_episodes_at_once_than_a_step_does():
    all_at_once, _ = evaluated()
    found, calls = evaluated(at_once=3)
    assert found == all_at_once and [len(call) for call in calls] == [3, 2, 2, 1]


def test_the_turns_of_one_sequence_have_the_name_of_their_episode():
    _, calls = evaluated(given=opened(), one_sequence=True, max_turns=1)
    assert len({request.episode for request in calls[0]}) == 4 and None not in {it.episode for it in calls[0]}
