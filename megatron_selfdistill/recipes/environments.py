# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Environments, which reply to the model's responses, so that a problem becomes an episode of several turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_selfdistill.data.problems import Problem


@dataclass(frozen=True)
class Reply:
    """The reply of an environment to the last response of an episode."""

    text: str | None = None
    """The text that the next turn's prompt shows after the response; None shows nothing and ends the episode."""
    role: str = "user"
    """The role of the message that shows ``text``: user or tool."""
    feedback: str | None = None
    """A text about the last response for the teacher alone; None is no feedback."""
    reward: float = 0.0
    """The reward of the last response, a finite number."""
    done: bool = True
    """Whether the episode ends with the last response, although ``text`` may be there."""


class Environment(Protocol):
    """The protocol of environments: functions of the problem and of everything that was said, without a state."""

    def reply(self, problem: Problem, said: Sequence[str]) -> Reply:
        """Return the reply to the last response.

        ``problem``: the problem as the data have it.  ``said``: the texts of the episode after the problem, responses
        and shown replies by turns; the last one is the response to reply to, without its stop token.
        Any rank may call it, also in threads, and a call may be repeated: equal arguments must give equal replies.
        """
        ...
