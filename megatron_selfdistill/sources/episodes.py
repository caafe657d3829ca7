# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Episodes: conversations of the student with an environment, turn by turn, which begin with a problem of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_selfdistill.config import user_code
from megatron_selfdistill.data.contexts import GivenSolutions, PromptPair
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import reworded_message
from megatron_selfdistill.distributed.collectives import max_over_ranks, raise_on_all_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.environments import Environment, Reply
from megatron_selfdistill.errors import ConfigError, EngineError
from megatron_selfdistill.evaluation.verify import judged_in_order
from megatron_selfdistill.rollout.base import Response, response_text
from megatron_selfdistill.sources.judge import over_replicas
from megatron_selfdistill.sources.method import Method
from megatron_selfdistill.sources.rollouts import Rollout, SampleKey

Episode = list[Rollout]
"""The responses of one conversation, turn by turn."""

Generate = Callable[[Sequence[SampleKey], Sequence[PromptPair]], list[Response]]
"""A function that samples one response per key after its prompts.  Collective over the world."""
GetReplies = Callable[[Sequence[Episode]], list[Reply]]
"""A function that returns the reply to the last response of each episode, whose reply is None.  Collective."""


@dataclass(frozen=True)
class Episodes:
    """The rules by which a sampled response becomes an episode with an environment."""

    environment: Environment
    given: GivenSolutions
    """The prompts that show a chosen solution."""
    grid: RankGrid
    max_turns: int
    """The greatest number of responses in an episode."""
    threads: int
    """The number of replies that a rank asks for at the same time."""
    has_teacher: bool
    """Whether the teacher reads the turns, so that its prompts must fit, too."""

    def played(
        self, first: Sequence[Rollout], method: Method, generate: Generate, replies: GetReplies
    ) -> tuple[list[Rollout], int]:
        """Return all turns, episode by episode, and the number of episodes whose next prompt does not fit.

        ``first``: the first response of each episode of this replica, the same on each of its ranks.  A turn's prompt
        is rendered once: its response is sampled and trained on after the same token ids.

        Collectives: one call of ``replies``, a `raise_on_all_ranks` and a maximum over the world per turn, and one call
        of ``generate`` per further turn: as many on every rank as the longest episode of any replica has turns.
        Raises: `ConfigError` on all ranks for a conversation that the chat template refuses, and the errors of
        ``generate`` and ``replies``.
        """
        episodes: list[Episode] = [[replace(rollout, episode=i)] for i, rollout in enumerate(first)]
        asked, num_cut = episodes, 0
        for number in range(1, self.max_turns + 1):
            answered = [episode for episode in asked if not episode[-1].response.truncated]
            for episode, reply in zip(answered, replies(answered), strict=True):
                episode[-1] = replace(episode[-1], reward=reply.reward, feedback=reply.feedback, reply=reply)
            going_on = [episode for episode in answered if _reply(episode[-1]).goes_on]
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

    def replies(self, episodes: Sequence[Episode]) -> list[Reply]:
        """Return the environment's reply to the last response of each of this replica's episodes.

        The ranks of a replica share the calls.  Collectives: those of `judged_in_order`.
        Raises: `EngineError` on all ranks, with the place of the problem, where a call fails.
        """
        questions = [(episode[0].problem, self._said(episode)) for episode in episodes]
        return judged_in_order(
            questions, self._reply, self.grid, "environment", threads=self.threads, error=EngineError
        )

    def _reply(self, problem: Problem, said: Sequence[str]) -> Reply:
        kind = type(self.environment)
        with user_code(f"environment {kind.__module__}.{kind.__qualname__}"):
            reply = self.environment.reply(problem, said)
        if not isinstance(reply, Reply):
            raise TypeError(f"expected a Reply of megatron_selfdistill.environments, got {reply!r:.80}")
        return reply

    def _said(self, episode: Episode) -> list[str]:
        """Return the texts after the problem, responses and shown replies by turns."""
        said = []
        for turn in episode:
            said.append(self._text(turn))
            if turn.reply is not None:
                said.append(turn.reply.text or "")
        return said

    def _text(self, turn: Rollout) -> str:
        return response_text(turn.response, self.given.builder.tokenizer)

    def _nexts(self, episodes: Sequence[Episode], method: Method) -> list[tuple[SampleKey, Problem, PromptPair] | None]:
        """Return key, problem and prompts of the next turn of each episode; None if the prompts do not fit."""
        nexts: list[tuple[SampleKey, Problem, PromptPair] | None] = []
        for episode in episodes:
            problem = self._next_problem(episode)
            try:
                pair = self._next_pair(episode[0], problem, method)
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

    def _next_pair(self, first: Rollout, problem: Problem, method: Method) -> PromptPair | None:
        """Return both prompts of a later turn, in which the teacher sees the same solution as in the first turn."""
        given = self.given
        if self.has_teacher and method.has_solution(first.problem):
            return given.pair_with(problem, first.prompts.solution)
        student = given.builder.student_prompt(problem)
        fits = len(student) <= given.max_length - given.max_new_tokens
        return PromptPair(problem.id, student, student) if fits else None


def _reply(turn: Rollout) -> Reply:
    assert turn.reply is not None, "the environment has replied"
    return turn.reply


def episode_metrics(rollouts: Sequence[Rollout], num_cut: int, grid: RankGrid) -> dict[str, float]:
    """Return metrics of the episodes of all replicas.

    ``rollouts`` are the first result of `Episodes.played`, with their rewards.

    episodes/turns_mean: the responses per episode.  episodes/reward_mean, episodes/first_reward_mean and
    episodes/last_reward_mean: means over the episodes of the sum of the rewards, of the first and of the last reward.
    episodes/unfinished_share: the share of the episodes that end although the environment would go on.
    episodes/too_long_share: the share that ends since the next prompt does not fit, ``num_cut`` on this replica.
    Collectives: one sum over the data-parallel ranks.
    """
    rewards = [rollout.reward or 0.0 for rollout in rollouts]
    firsts = [i for i, rollout in enumerate(rollouts) if rollout.turn == 0]
    lasts = [i - 1 for i in [*firsts[1:], len(rollouts)] if firsts]
    unfinished = sum(reply.goes_on for i in lasts if (reply := rollouts[i].reply) is not None)
    first_rewards, last_rewards = (sum(rewards[i] for i in places) for places in (firsts, lasts))
    values = [len(firsts), len(rollouts), sum(rewards), first_rewards, last_rewards, unfinished, num_cut]
    number, *totals = over_replicas(values, grid)
    means = [total / max(number, 1) for total in totals]
    return {
        "episodes/turns_mean": means[0],
        "episodes/reward_mean": means[1],
        "episodes/first_reward_mean": means[2],
        "episodes/last_reward_mean": means[3],
        "episodes/unfinished_share": means[4],
        "episodes/too_long_share": means[5],
    }
