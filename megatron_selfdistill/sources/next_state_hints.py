# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Hints for logged replies from the messages that follow them, and rewards from the same messages.

Source: OpenClaw-RL (arXiv 2603.10165).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import filled
from megatron_selfdistill.data.user_values import finite_number, text_or_none
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.evaluation.verify import Reward, judged_in_order
from megatron_selfdistill.rollout.base import SamplingParams
from megatron_selfdistill.sources.asked_model import AskedModel, Inquiry

_ROLES = """\
- role='user': a message of the user, such as a correction, a further request or thanks.
- role='tool': The return value of a tool the assistant invoked. This content was NOT available before the \
assistant's action: it exists BECAUSE the assistant called the tool. A successful, non-error tool output generally \
means the assistant's action was appropriate; do NOT treat it as information the assistant should have already known."""

_TURN = """
## The assistant's response
{response}

## Next state, role='{role}'
{next_state}
"""

JUDGE_TEMPLATE = (
    """\
Below are a response of an assistant and the next state, which followed it. Decide whether the next state reveals
something that would have improved the response, had the assistant known it. The role of the next state matters:
"""
    + _ROLES
    + "\n"
    + _TURN
    + """
If it does, write a concrete hint of 1 to 3 sentences between [HINT_START] and [HINT_END], and end with \\boxed{1}.
If it does not, write no hint, and end with \\boxed{-1}."""
)
"""The request for a hint; ``hints.judge_template`` replaces it."""

REWARD_TEMPLATE = (
    """\
Below are a response of an assistant and the next state, which followed it. Decide whether the response did what the
user wanted, with the next state as the evidence. The role of the next state matters:
"""
    + _ROLES
    + "\n"
    + _TURN
    + """
End with \\boxed{1} if the next state shows progress, with \\boxed{-1} if it shows that the response was wrong,
incomplete or unwanted (a request for a change does), and with \\boxed{0} if it shows neither."""
)
"""The request for a reward."""


@dataclass(frozen=True)
class JudgedReply:
    """One logged reply of this replica, as text, with its turn."""

    problem: Problem
    """The turn; its reply has a next state."""
    text: str
    """The tokens of the reply as text, without special tokens and without the stop token."""

    @property
    def next_state(self) -> list[dict[str, Any]]:
        """The messages after the reply."""
        assert self.problem.reply is not None
        return [dict(message) for message in self.problem.reply.next_state]

    def request(self, template: str) -> str:
        """Return ``template`` with the reply, the role of the next state, and the texts of its messages."""
        messages = self.next_state
        state = "\n".join(str(message.get("content", "")) for message in messages)
        return filled(template, {"response": self.text, "role": messages[0]["role"], "next_state": state})


HintJudge = Callable[[int, SamplingParams, Sequence[JudgedReply]], list[str | None]]
"""A function of the step, the sampling and replies of this replica that returns the hint for each; None is none.

Every rank of the world calls it, and all ranks of a replica get the same hints.
"""

RewardJudge = Callable[[int, SamplingParams, Sequence[JudgedReply]], list[float]]
"""A function like `HintJudge` that returns the reward of each reply."""

JudgeFunction = Callable[[Problem, str, list[dict[str, Any]]], str | None]
"""The user's function ``judge(problem, response_text, next_state)`` (``hints.judge``)."""


@dataclass(frozen=True)
class ModelHintJudge:
    """The model itself as the writer of hints."""

    model: AskedModel
    template: str
    votes: int
    """The number of answers per reply."""
    min_length: int
    """The number of characters that a hint must exceed."""

    def __call__(self, step: int, sampling: SamplingParams, replies: Sequence[JudgedReply]) -> list[str | None]:
        """Return the longest hint among the votes for each reply.  Collective over the world."""
        votes = self.model.texts(step, sampling, _votes(replies, "hint", self.template, self.votes))
        n = self.votes
        return [
            longest_hint([hint_in(vote) for vote in votes[i : i + n]], self.min_length) for i in range(0, len(votes), n)
        ]


@dataclass(frozen=True)
class FunctionHintJudge:
    """The user's function as the writer of hints."""

    function: JudgeFunction
    min_length: int
    grid: RankGrid
    quotes: bool
    """Whether an error may show the function's own message, which may quote the log."""

    def __call__(self, step: int, sampling: SamplingParams, replies: Sequence[JudgedReply]) -> list[str | None]:
        """Return the hint of the function for each reply.

        Collectives: one all_gather_object over the world.  Raises: `VerifierError` on every rank where the function
        failed, or returned anything but a text or None.
        """

        def judged(problem: Problem, reply: JudgedReply) -> str | None:
            hint = _called(lambda: self.function(problem, reply.text, reply.next_state), self.quotes)
            return longest_hint([text_or_none(hint)], self.min_length)

        return _of_all(replies, judged, self.grid, "judge")


@dataclass(frozen=True)
class ModelRewardJudge:
    """The model itself as the judge of replies: 1, -1 or 0, by the majority of its votes."""

    model: AskedModel
    votes: int
    """The number of answers per reply."""

    def __call__(self, step: int, sampling: SamplingParams, replies: Sequence[JudgedReply]) -> list[float]:
        """Return the reward of each reply.  Collective over the world."""
        votes = self.model.texts(step, sampling, _votes(replies, "reward", REWARD_TEMPLATE, self.votes))
        n = self.votes
        return [majority([decision_in(vote) for vote in votes[i : i + n]]) for i in range(0, len(votes), n)]


@dataclass(frozen=True)
class FunctionRewardJudge:
    """The user's reward function (``policy.reward``) as the judge of replies."""

    function: Reward
    grid: RankGrid
    quotes: bool
    """As for `FunctionHintJudge`."""

    def __call__(self, step: int, sampling: SamplingParams, replies: Sequence[JudgedReply]) -> list[float]:
        """Return the reward of each reply.

        Collectives: one all_gather_object over the world.  Raises: `VerifierError` on every rank where the function
        failed, or returned no finite number.
        """

        def rewarded(problem: Problem, reply: JudgedReply) -> float:
            return float(_called(lambda: finite_number(self.function(reply.text, problem), "reward"), self.quotes))

        return _of_all(replies, rewarded, self.grid, "reward function")


def hint_in(vote: str | None) -> str | None:
    """Return the last hint of a vote whose last decision is 1; None for every other vote."""
    hints = _HINT.findall(vote or "")
    return hints[-1].strip() if hints and decision_in(vote) == 1 else None


def decision_in(vote: str | None) -> int | None:
    r"""Return the last decision ``\boxed{1}``, ``\boxed{-1}`` or ``\boxed{0}`` of a vote; None where there is none."""
    decisions = _BOXED.findall(vote or "")
    return int(decisions[-1]) if decisions else None


def longest_hint(hints: Sequence[str | None], min_length: int) -> str | None:
    """Return the longest hint of more than ``min_length`` characters, the first among equals; None without any."""
    long = [hint.strip() for hint in hints if hint is not None and len(hint.strip()) > min_length]
    return max(long, key=len, default=None)


def majority(decisions: Sequence[int | None]) -> float:
    """Return the most frequent decision, and 0 where several are; None, a vote without a decision, does not count."""
    counts = Counter(decision for decision in decisions if decision is not None).most_common(2)
    if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1]):
        return 0.0
    return float(counts[0][0])


_BOXED = re.compile(r"\\boxed\{([-+]?[01])\}")
_HINT = re.compile(r"\[HINT_START\](.*?)\[HINT_END\]", re.DOTALL)


def _votes(replies: Sequence[JudgedReply], kind: str, template: str, votes: int) -> list[Inquiry]:
    requests = [(reply.problem, reply.request(template)) for reply in replies]
    return [Inquiry(problem, kind, request, vote) for problem, request in requests for vote in range(votes)]


def _called(call: Callable[[], Any], quotes: bool) -> Any:
    """Return the result of the user's function, whose error loses its message unless ``quotes`` is set."""
    try:
        return call()
    except Exception as error:
        if quotes:
            raise
        kind = type(error).__name__
        raise ValueError(f"{kind}; conversations.show_contents=true shows its message") from None


def _of_all(replies: Sequence[JudgedReply], judgement: Callable[..., Any], grid: RankGrid, name: str) -> list[Any]:
    return judged_in_order([(reply.problem, reply) for reply in replies], judgement, grid, name)
