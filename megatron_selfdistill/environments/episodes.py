# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Episodes: conversations of the student with an environment, turn by turn, which begin with a problem of the data."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from typing import Protocol

from megatron_selfdistill.config import user_code
from megatron_selfdistill.data.contexts import ContextPair, PromptPair
from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.data.given_solutions import GivenSolutions
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import reworded_message
from megatron_selfdistill.distributed.collectives import gather_objects, raise_on_all_ranks
from megatron_selfdistill.distributed.integers import max_over_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.distributed.signs_of_life import beat
from megatron_selfdistill.distributed.terminal import visible
from megatron_selfdistill.environments.bridges import bridge
from megatron_selfdistill.environments.environment import Environment
from megatron_selfdistill.environments.session_processes import SessionProcesses
from megatron_selfdistill.errors import ConfigError, EngineError
from megatron_selfdistill.evaluation.held_out import Played
from megatron_selfdistill.evaluation.verify import in_replica, judged_in_order
from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.rollout.base import Request, Response, Sampler, SamplingParams, response_text
from megatron_selfdistill.rollout.sampling import SampleKey
from megatron_selfdistill.sources.episode_player import Generate
from megatron_selfdistill.sources.judge import over_replicas
from megatron_selfdistill.sources.rollouts import Rollout, Sample

logger = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 32
"""More characters than a token of any text has on average: a text of more than these per token of data.max_length does
not fit, which is known before it is tokenized."""


class ShowsSolutions(Protocol):
    """What says which problems have a solution in the teacher's prompt, such as a method."""

    def has_solution(self, problem: Problem) -> bool:
        """Return whether the teacher's prompt of ``problem`` shows a solution."""


Episode = list[Rollout]
"""The responses of one conversation, turn by turn."""


@dataclass(frozen=True, kw_only=True)
class Episodes(ABC):
    """The rules by which a sampled response becomes an episode with an environment: an `EpisodePlayer` of a run."""

    given: GivenSolutions
    """The prompts that show a chosen solution."""
    grid: RankGrid
    phases: Phases
    """Where the time of the environment counts, as phase "environment"."""
    max_turns: int
    """The greatest number of responses in an episode."""
    has_teacher: bool
    """Whether the teacher reads the turns, so that its prompts must fit, too."""
    max_tokens: int | None = None
    """The number of response tokens from which on an episode gets no further turn; None is no limit."""
    one_sequence: bool = False
    """Whether a turn's prompts are those of the turn before, its response as it was sampled, and the reply; otherwise
    the chat template renders the conversation again for each turn."""

    def openings(self, samples: Sequence[Sample]) -> list[Reply | None]:
        """Return the environment's reply before the response of each sample; None without a session.

        Collective over the world.  Raises: `EngineError` on all ranks.
        """
        return [None] * len(samples)

    def opened(self, samples: Sequence[Sample], method: ShowsSolutions) -> tuple[list[Sample], Sequence[Reply | None]]:
        """Return the samples with the texts that the environment shows before the first responses.  Collective."""
        with self.phases("environment"):
            openings = self.openings(samples)
        shown = [self._opened(*pair, method) for pair in zip(samples, openings, strict=True)]
        return [sample for sample, _ in shown], [opening for _, opening in shown]

    def _opened(self, sample: Sample, opening: Reply | None, method: ShowsSolutions) -> tuple[Sample, Reply | None]:
        """Return a sample whose prompts show the text and the hint of ``opening``, and ``opening``.

        If the prompts do not fit, the sample stays as it is, and ``opening`` becomes a failure.
        """
        if opening is None or (opening.text, opening.hint) == (None, None) or opening.failure is not None:
            return sample, opening
        key, problem, pair = sample
        last, text = problem.messages[-1], opening.text or ""
        shown = replace(problem, messages=(*problem.messages[:-1], {**last, "content": last["content"] + text}))
        longer = None
        if self._may_fit(text, opening.hint):
            longer = self._pair(problem, pair.solution if opening.hint is None else opening.hint, shown, method)
        if longer is None:
            return sample, replace(opening, failure="text and hint of reset are too long for data.max_length")
        return (key, shown, longer), opening

    def played(self, first: Sequence[Rollout], method: ShowsSolutions, generate: Generate) -> tuple[list[Rollout], int]:
        """Return all turns, episode by episode, and the number of episodes whose next prompt does not fit.

        ``first``: the first response of each episode of this replica, the same on each of its ranks.  A turn's prompt
        is rendered once: its response is sampled and trained on after the same token ids.

        Collectives: one call of `replies`, a `raise_on_all_ranks` and a maximum over the world per turn, and one call
        of ``generate`` per further turn: as many on every rank as the longest episode of any replica has turns.
        Raises: `ConfigError` on all ranks for a conversation that the chat template refuses, and the errors of
        ``generate`` and `replies`.
        """
        episodes: list[Episode] = [[replace(rollout, episode=i)] for i, rollout in enumerate(first)]
        asked, num_cut = episodes, 0
        for number in range(1, self.max_turns + 1):
            answered = [episode for episode in asked if not episode[-1].response.truncated]
            with self.phases("environment"):
                replies = self.replies(answered)
            for episode, reply in zip(answered, replies, strict=True):
                episode[-1] = replace(episode[-1], reward=reply.reward, feedback=reply.feedback, reply=reply)
            going_on = [
                episode
                for episode in answered
                if _reply(episode[-1]).goes_on
                and (self.max_tokens is None or sum(len(one.response.token_ids) for one in episode) < self.max_tokens)
            ]
            if number == self.max_turns:
                break
            with raise_on_all_ranks():
                nexts = self._nexts(going_on, method)
            asked = [episode for episode, following in zip(going_on, nexts, strict=True) if following is not None]
            num_cut += len(going_on) - len(asked)
            if not max_over_ranks([len(asked)])[0]:
                break
            following = [turn for turn in nexts if turn is not None]
            responses = generate([key for key, _, _ in following], [pair for _, _, pair in following])
            for episode, (key, problem, pair), response in zip(asked, following, responses, strict=True):
                before = episode[-1]
                episode.append(
                    Rollout(problem, pair, response, before.group, episode=before.episode, turn=number, key=key)
                )
        return [rollout for episode in episodes for rollout in episode], num_cut

    @abstractmethod
    def replies(self, episodes: Sequence[Episode]) -> list[Reply]:
        """Return the environment's reply to the last response of each of this replica's episodes.

        The ranks of a replica share the calls.  Collective over the world.  Raises: `EngineError` on all ranks.
        """

    def name(self, key: SampleKey) -> str | None:
        """Return the name of an episode whose turns are one sequence of tokens, for the sampler's cache."""
        return str(key._replace(turn=0)) if self.one_sequence else None

    def with_turns(self, contexts: Sequence[ContextPair], rollouts: Sequence[Rollout]) -> list[ContextPair]:
        """Return the contexts with their turns, if an episode may have several."""
        if self.max_turns == 1:
            return [*contexts]
        turns = [rollout.episode_turn(self.has_teacher) for rollout in rollouts]
        return [replace(context, turn=turn) for context, turn in zip(contexts, turns, strict=True)]

    def metrics(self, rollouts: Sequence[Rollout], num_cut: int) -> dict[str, float]:
        """Return the `episode_metrics` of all replicas.  Collective."""
        return episode_metrics(rollouts, num_cut, self.grid)

    def _text(self, turn: Rollout) -> str:
        return response_text(turn.response, self.given.builder.tokenizer)

    def _nexts(
        self, episodes: Sequence[Episode], method: ShowsSolutions
    ) -> list[tuple[SampleKey, Problem, PromptPair] | None]:
        """Return key, problem and prompts of the next turn of each episode; None if the prompts do not fit."""
        nexts: list[tuple[SampleKey, Problem, PromptPair] | None] = []
        for episode in episodes:
            problem = self._next_problem(episode)
            try:
                pair = self._next_pair(episode, problem, method)
            except ValueError as error:
                raise ConfigError(f"turn {len(episode)} of an episode: {error}") from error
            before = episode[-1].key
            assert before is not None, "a sampled response has a name"
            key = before._replace(turn=len(episode))
            nexts.append((key, problem, pair) if pair is not None else None)
        return nexts

    def _next_problem(self, episode: Episode) -> Problem:
        """Return the problem of the next turn: the conversation so far, whose first problem keeps the wording."""
        last = episode[-1]
        reply, problem = _reply(last), last.problem
        assert reply.text is not None, "a reply without a text ends the episode"
        messages = (
            *problem.messages,
            {"role": "assistant", "content": self._text(last)},
            {"role": reply.role, "content": reply.text},
        )
        return replace(problem, messages=messages, reworded=reworded_message(episode[0].problem))

    def _may_fit(self, *texts: str | None) -> bool:
        return sum(len(text or "") for text in texts) <= CHARACTERS_PER_TOKEN * self.given.max_length

    def _next_pair(self, episode: Episode, problem: Problem, method: ShowsSolutions) -> PromptPair | None:
        """Return both prompts of the next turn of ``episode``, whose ``problem`` is the conversation so far.

        The result is None if they do not fit.  Raises: ValueError for a conversation that the chat template refuses.
        """
        first, last, given = episode[0], episode[-1], self.given
        if not self._may_fit(_reply(last).text, _reply(last).hint):
            return None
        hints = [hint for turn in episode if (hint := _reply(turn).hint) is not None]
        if not self.one_sequence:
            return self._pair(first.problem, hints[-1] if hints else first.prompts.solution, problem, method)
        if hints:
            raise ValueError("the environment gives a hint for a later turn: set environment.limits.one_sequence=false")
        pair, ids, reply = last.prompts, last.response.token_ids, problem.messages[-1]
        student = [*pair.student_prompt, *ids, *bridge(given.builder, first.problem, None, reply, ids[-1])]
        teacher = student
        if self.has_teacher and method.has_solution(first.problem):
            between = bridge(given.builder, first.problem, pair.solution, reply, ids[-1])
            teacher = [*pair.teacher_prompt, *ids, *between]
        fits = max(len(student), len(teacher)) <= given.max_length - given.max_new_tokens
        return replace(pair, student_prompt=student, teacher_prompt=teacher) if fits else None

    def _pair(self, first: Problem, solution: str, problem: Problem, method: ShowsSolutions) -> PromptPair | None:
        """Return both prompts of ``problem``, a later state of ``first``, in which the teacher sees ``solution``.

        The result is None if they do not fit.
        """
        given = self.given
        if self.has_teacher and method.has_solution(first):
            return given.pair_with(problem, solution)
        student = given.builder.student_prompt(problem)
        fits = len(student) <= given.max_length - given.max_new_tokens
        return PromptPair(problem.id, student, student) if fits else None


@dataclass(frozen=True, kw_only=True)
class StatelessEpisodes(Episodes):
    """Episodes with an environment whose replies are a function of the problem and of what was said."""

    environment: Environment

    def replies(self, episodes: Sequence[Episode]) -> list[Reply]:
        """Return the environment's reply to the last response of each of this replica's episodes.

        The ranks of a replica share the calls.  Collectives: those of `judged_in_order`.
        Raises: `EngineError` on all ranks, with the place of the problem, where a call fails.
        """
        questions = [(episode[0].problem, self._said(episode)) for episode in episodes]
        return judged_in_order(questions, self._reply, self.grid, "environment", error=EngineError)

    def _reply(self, problem: Problem, said: Sequence[str]) -> Reply:
        kind = type(self.environment)
        with user_code(f"environment {kind.__module__}.{kind.__qualname__}"):
            reply = self.environment.reply(problem, said)
        if not isinstance(reply, Reply):
            raise TypeError(f"expected a Reply of megatron_selfdistill.environments, got {reply!r:.80}")
        return reply

    def _said(self, episode: Episode) -> list[str]:
        said = []
        for turn in episode:
            said.append(self._text(turn))
            if turn.reply is not None:
                said.append(turn.reply.text or "")
        return said


@dataclass(frozen=True, kw_only=True)
class SessionEpisodes(Episodes):
    """Episodes with an environment that has a state: each has a session, on one rank of its replica."""

    sessions: SessionProcesses
    """The sessions of this rank."""
    seed: int
    """The seed of the run."""
    concurrency: int
    """The number of sessions of a rank that work at the same time."""

    def openings(self, samples: Sequence[Sample]) -> list[Reply | None]:
        """Return the reply of each sample's session before its response.  Collectives: those of `_gathered`.

        Raises: `EngineError` on all ranks if an environment's process has ended, or every session has failed.
        """
        mine = samples[self.grid.replica_rank :: self.grid.replica_size]
        asked = {key: partial(self.sessions.reset, key, one, key.seed(self.seed)) for key, one, _ in mine}
        found = self._gathered(asked, begins=True)
        return [found[key] for key, _, _ in samples]

    def played(self, first: Sequence[Rollout], method: ShowsSolutions, generate: Generate) -> tuple[list[Rollout], int]:
        """Play the episodes as `Episodes.played` does, and end the sessions that are left."""
        try:
            return super().played(first, method, generate)
        finally:
            self.sessions.end_all()

    def replies(self, episodes: Sequence[Episode]) -> list[Reply]:
        """Return the reply of each episode's session to its last response, or the failure of its beginning.

        Collectives: those of `_gathered`.
        Raises: `EngineError` on all ranks if an environment's process has ended.
        """
        failed = {_key(one): one[0].opening.failure for one in episodes if one[0].opening and one[0].opening.failure}
        texts = {_key(one): self._text(one[-1]) for one in episodes if _key(one) not in failed}
        mine = {key: partial(self.sessions.step, key, text) for key, text in texts.items() if key in self.sessions}
        found = self._gathered(mine, begins=False)
        return [found[key] if (key := _key(one)) in texts else Reply(failure=failed[key]) for one in episodes]

    def _gathered(self, asked: Mapping[SampleKey, Callable[[], Reply]], *, begins: bool) -> dict[SampleKey, Reply]:
        """Return the replies of all ranks of this replica, after this rank has made the calls in ``asked``.

        Collectives: one all_gather_object over the world, of a count and at most one failure of each rank, and one over
        each of the replica's groups.  Raises: `EngineError` on all ranks where a call has failed, and if ``begins``
        where every session has.
        """
        found: dict[SampleKey, Reply] = {}
        errors: list[str] = []

        def attempt(key: SampleKey) -> None:
            try:
                found[key] = asked[key]()
                beat()
            except Exception as raised:  # raised below on every rank, so that no rank waits
                errors.append(f"environment: {raised}"[:2000])

        with ThreadPoolExecutor(self.concurrency) as pool:
            list(pool.map(attempt, asked))
        failed = [(key, reply.failure[:2000]) for key, reply in sorted(found.items()) if reply.failure is not None]
        of_ranks = gather_objects((errors[:1], len(found), len(failed), failed[:1]))
        ended, num_sessions, num_failed, first = zip(*of_ranks, strict=True)
        for error in chain(*ended):
            raise EngineError(error)
        if any(num_failed):
            key, failure = min(chain(*first))
            if begins and sum(num_failed) == sum(num_sessions):
                raise EngineError(
                    f"environment: all {sum(num_failed)} sessions of the step failed, the first: {failure}"
                )
            if self.grid.is_reporter:
                message = "%d of %d sessions failed, which ends their episodes: %s: %s"
                logger.warning(message, sum(num_failed), sum(num_sessions), key, visible(failure))
        return in_replica(found, self.grid)


def _key(episode: Episode) -> SampleKey:
    key = episode[0].key
    assert key is not None, "a sampled response has a name"
    return key


def _reply(turn: Rollout) -> Reply:
    assert turn.reply is not None, "the environment has replied"
    return turn.reply


@dataclass(frozen=True)
class EvaluationPlayer:
    """What plays the episodes of one evaluation: a `Player` of evaluation/held_out.py."""

    episodes: Episodes
    sampler: Sampler
    seed: int
    """The seed of the run."""
    step: int
    """The optimizer steps before the evaluation."""
    at_once: int
    """The greatest number of episodes that a replica plays at the same time."""

    def has_solution(self, problem: Problem) -> bool:
        """Return True: with hints, the model reads the teacher's prompt of every problem."""
        return True

    def play(self, samples: Sequence[tuple[Problem, int]], params: SamplingParams, *, hinted: bool) -> list[Played]:
        """Return the episode of each sample of this replica; see `Player.play`.

        Each turn has the random numbers of its own name, which begins with "eval/".
        Collectives: a maximum over the world, and those of `Episodes.openings` and `Episodes.played` for every
        ``at_once`` episodes of the replica that has the most.
        """
        episodes = replace(self.episodes, has_teacher=hinted)
        found = []
        for start in range(0, max_over_ranks([len(samples)])[0], self.at_once):
            asked = [self._sample(*sample, hinted) for sample in samples[start : start + self.at_once]]
            found += self._together(episodes, asked, params)
        return found

    def _together(self, episodes: Episodes, asked: Sequence[Sample], params: SamplingParams) -> list[Played]:
        """Return the episodes of ``asked``, which are played at the same time.  Collective."""

        def generate(keys: Sequence[SampleKey], pairs: Sequence[PromptPair]) -> list[Response]:
            return self.sampler.generate(list(map(request, keys, pairs)), params)

        def request(key: SampleKey, pair: PromptPair) -> Request:
            prompt = pair.teacher_prompt if episodes.has_teacher else pair.student_prompt
            return Request(prompt, key.seed(self.seed), episode=episodes.name(key))

        opened, openings = episodes.opened(asked, self)
        responses = generate([key for key, _, _ in opened], [pair for _, _, pair in opened])
        first = [
            Rollout(problem, pair, response, key=key, opening=opening)
            for (key, problem, pair), opening, response in zip(opened, openings, responses, strict=True)
        ]
        rollouts, _ = episodes.played(first, self, generate)
        return [_said(list(turns), episodes) for _, turns in groupby(rollouts, key=lambda one: one.episode)]

    def _sample(self, problem: Problem, index: int, hinted: bool) -> Sample:
        builder = self.episodes.given.builder
        student = builder.student_prompt(problem)
        teacher = builder.teacher_prompt(problem) if hinted else student
        pair = PromptPair(problem.id, student, teacher, problem.solution)
        return SampleKey(self.step, f"eval/{problem.id}", index), problem, pair


def _said(episode: Episode, rules: Episodes) -> Played:
    pair, replies = episode[0].prompts, [one.reply.text or "" for one in episode if one.reply is not None]
    prompt = pair.teacher_prompt if rules.has_teacher else pair.student_prompt
    return Played(prompt, [one.response for one in episode], replies, sum(one.reward or 0.0 for one in episode))


def episode_metrics(rollouts: Sequence[Rollout], num_cut: int, grid: RankGrid) -> dict[str, float]:
    """Return metrics of the episodes of all replicas.

    ``rollouts`` are the first result of `Episodes.played`, with their rewards.

    episodes/turns_mean: the responses per episode.  episodes/reward_mean, episodes/first_reward_mean and
    episodes/last_reward_mean: means over the episodes of the sum of the rewards, of the first and of the last reward.
    episodes/unfinished_share: the share of the episodes that end although the environment would go on.
    episodes/too_long_share: the share that ends since the next prompt does not fit, ``num_cut`` on this replica.
    episodes/failed_share: the share that ends since the environment could not go on.
    Collectives: one sum over the data-parallel ranks.
    """
    rewards = [rollout.reward or 0.0 for rollout in rollouts]
    firsts = [i for i, rollout in enumerate(rollouts) if rollout.turn == 0]
    lasts = [i - 1 for i in [*firsts[1:], len(rollouts)] if firsts]
    unfinished = sum(reply.goes_on for i in lasts if (reply := rollouts[i].reply) is not None)
    failed = sum(reply.failure is not None for one in rollouts if (reply := one.reply) is not None)
    first_rewards, last_rewards = (sum(rewards[i] for i in places) for places in (firsts, lasts))
    values = [len(firsts), len(rollouts), sum(rewards), first_rewards, last_rewards, unfinished, num_cut, failed]
    number, *totals = over_replicas(values, grid)
    means = [total / max(number, 1) for total in totals]
    return {
        "episodes/turns_mean": means[0],
        "episodes/reward_mean": means[1],
        "episodes/first_reward_mean": means[2],
        "episodes/last_reward_mean": means[3],
        "episodes/unfinished_share": means[4],
        "episodes/too_long_share": means[5],
        "episodes/failed_share": means[6],
    }
