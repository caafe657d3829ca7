# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The responses of a step as values: each with its problem, its prompts, its reward and its place in an episode.

`record` writes responses to a file, and `Recording` reads them, so that another run trains on the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_selfdistill.data.contexts import EpisodeTurn, PromptPair
from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.distributed.collectives import gather_items
from megatron_selfdistill.rollout.base import Response, sample_seed
from megatron_selfdistill.run_log import json_object, shortened


class SampleKey(NamedTuple):
    """The name of a sample, and of its random numbers."""

    step: int
    problem_id: str
    sample_index: int
    turn: int = 0
    """The number of the response within its episode."""

    def seed(self, run_seed: int) -> int:
        """Return the seed of the sample, from `sample_seed`; each turn of an episode has a seed of its own."""
        name = f"{self.problem_id}/turn{self.turn}" if self.turn else self.problem_id
        return sample_seed(run_seed, self.step, name, self.sample_index)

    def __str__(self) -> str:
        turn = f", turn {self.turn}" if self.turn else ""
        return f"step {self.step} to problem {self.problem_id!r}, sample {self.sample_index}{turn}"


Sample = tuple[SampleKey, Problem, PromptPair]
"""The name of a sample, its problem and the problem's prompts."""


@dataclass(frozen=True)
class Rollout:
    """A text that is trained on, the problem that it answers, and the two prompts that it is conditioned on."""

    problem: Problem
    """The problem, with the complete solution for the teacher."""
    prompts: PromptPair
    response: Response
    group: int = 0
    """The number of the group, counted from 0 on this replica: all responses of one visit to a problem."""
    reward: float | None = None
    """The reward of the response; None if nothing needs it."""
    hinted: bool = True
    """Whether the teacher's prompt shows a hint."""
    privileged: bool = False
    """Whether the response is trained on after the teacher's prompt, with the student's prompt as the teacher's."""
    episode: int | None = None
    """The number of the episode, counted from 0 on this replica: the responses of one conversation with an environment.
    None if the response is an episode of its own."""
    turn: int = 0
    """The number of the response within its episode, counted from 0."""
    feedback: str | None = None
    """The text of the environment about this response, which only a teacher may see; None if there is none."""
    part: str = "response"
    """The text that is trained on: response, revision (the last response of an episode after the problem alone), reply
    (the environment's reply, as a response to a request for it) or view (a text after other prompts)."""

    key: SampleKey | None = None
    """The name of the sample; None for a text that nobody has sampled."""
    reply: Reply | None = None
    """The environment's reply to the response; None without an environment, and for a truncated response, which ends
    its episode with the reward 0."""
    opening: Reply | None = None
    """The environment's reply before the first response, whose text ``problem`` shows; None for a later turn, and if
    the episode has no session."""

    @property
    def correct(self) -> bool:
        """Whether the response has a reward of at least 0.5."""
        return self.reward is not None and self.reward >= 0.5

    def episode_turn(self, has_teacher: bool) -> EpisodeTurn | None:
        """Return the place of the response in its episode, with its hint if ``has_teacher``; None for an added text."""
        if self.key is None or self.part != "response":
            return None
        reply = None if self.reply is None else self.reply.text
        hint = self.prompts.solution if has_teacher else ""
        return EpisodeTurn(self.key.sample_index, self.turn, self.reward or 0.0, hint, reply)

    def in_privileged_view(self) -> Rollout:
        """Return this rollout with both prompts exchanged."""
        pair = self.prompts
        exchanged = replace(pair, student_prompt=pair.teacher_prompt, teacher_prompt=pair.student_prompt)
        return replace(self, prompts=exchanged, privileged=True)

    def in_sampled_view(self, *, privileged: bool) -> Rollout:
        """Return this rollout with the prompt that it was sampled after as both prompts.

        ``privileged``: whether this prompt is the teacher's.
        """
        prompt = self.prompts.teacher_prompt if privileged else self.prompts.student_prompt
        pair = replace(self.prompts, student_prompt=prompt, teacher_prompt=prompt)
        return replace(self, prompts=pair, privileged=privileged)

    def without_hint(self) -> Rollout:
        """Return this rollout without a hint, and so without a teacher's part in its loss."""
        return replace(self, prompts=without_hint(self.prompts), hinted=False)


def without_hint(pair: PromptPair) -> PromptPair:
    """Return ``pair`` with the student's prompt as the teacher's."""
    return replace(pair, teacher_prompt=pair.student_prompt, solution="", solution_truncated=False)


class Recording:
    """A JSONL file with one object per response: step, problem_id, sample_index and the fields of `Response`.

    A run with an environment adds the fields turn, where it is not 0, and reply with the fields of `Reply`; a first
    response of a session has the field opening, too.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the whole file.  Raises: ValueError with file and line for a record that is not a response."""
        self.path = Path(path)
        self._responses: dict[SampleKey, Response] = {}
        self._replies: dict[SampleKey, Reply] = {}
        self._openings: dict[SampleKey, Reply] = {}
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    record = json_object(line)
                    turn, reply, opening = (record.pop(*field) for field in _OF_EPISODES)
                    key = SampleKey(record.pop("step"), record.pop("problem_id"), record.pop("sample_index"), turn)
                    self._responses[key] = Response(**record)
                    if reply is not None:
                        self._replies[key] = Reply(**reply)
                    if opening is not None:
                        self._openings[key] = Reply(**opening)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f"{self.path}:{number}: expected a response as rollout.record writes it, got "
                        f"'{shortened(line.decode(errors='replace'), 60)}' ({error})"
                    ) from None

    def responses(self, keys: Sequence[SampleKey]) -> list[Response]:
        """Return the responses of these keys, in order.  Raises: ValueError for a key that was not recorded."""
        for key in keys:
            if key not in self._responses:
                raise ValueError(
                    f"{self.path}: no response of {key}; it was recorded with other data, another seed, or fewer steps"
                )
        return [self._responses[key] for key in keys]

    def replies(self, keys: Sequence[SampleKey]) -> list[Reply]:
        """Return the replies to the responses of these keys, in order.

        Raises: ValueError for a response whose reply was not recorded.
        """
        for key in keys:
            if key not in self._replies:
                raise ValueError(
                    f"{self.path}: no reply of an environment to the response of {key}; record the responses with an "
                    "environment, or set environment.name=none"
                )
        return [self._replies[key] for key in keys]

    def openings(self, keys: Sequence[SampleKey]) -> list[Reply | None]:
        """Return the replies before the responses of these keys, in order; None for an episode without a session."""
        return [self._openings.get(key) for key in keys]


_OF_EPISODES = (("turn", 0), ("reply", None), ("opening", None))
"""The fields of a recorded response that not every response has, with the values of the others."""


def record(
    path: str | Path,
    rollouts: Sequence[Rollout],
    dp_group: dist.ProcessGroup,
    writes: bool,
) -> None:
    """Append this step's responses of all data-parallel ranks; only the rank with ``writes`` touches the file.

    Collectives: one all-gather of objects over ``dp_group``.
    """
    mine = []
    for one in rollouts:
        key, reply = one.key, one.reply
        assert key is not None, "a sampled response has a name"
        entry: dict[str, Any] = {"step": key.step, "problem_id": key.problem_id, "sample_index": key.sample_index}
        if key.turn:
            entry["turn"] = key.turn
        if reply is not None:
            entry["reply"] = _recorded(reply)
        if one.opening is not None:
            entry["opening"] = _recorded(one.opening)
        mine.append(entry | asdict(one.response))
    entries = gather_items(mine, dp_group)
    if writes:
        with Path(path).open("a") as lines:
            lines.writelines(json.dumps(entry) + "\n" for entry in entries)


def _recorded(reply: Reply) -> dict[str, Any]:
    """Return the fields of a reply, without a failure where there is none."""
    return {name: value for name, value in asdict(reply).items() if name != "failure" or value is not None}
