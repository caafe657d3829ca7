# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The reply to a response of an episode, as a value."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_selfdistill.data.records import NO_TEXT, finite_number, is_text, plain

REPLY_ROLES = ("user", "tool")
"""The roles of a message that shows a reply."""


@dataclass(frozen=True)
class Reply:
    """The reply to the last response of an episode.

    Raises: ValueError for a field that has another type, a text with half of a surrogate pair, another role or a reward
    that is not finite.
    """

    text: str | None = None
    """The text that the next turn's prompt shows after the response; None shows nothing and ends the episode."""
    role: str = "user"
    """The role of the message that shows ``text``: user or tool."""
    feedback: str | None = None
    """A text about the last response for the teacher alone; None is no feedback."""
    reward: float = 0.0
    """The reward of the last response, a finite number, also as a NumPy scalar or a tensor of one number."""
    done: bool = True
    """Whether the episode ends with the last response, although ``text`` may be there."""
    failure: str | None = None
    """The reason for which the episode cannot go on, so that it ends; None if nothing has failed."""
    hint: str | None = None
    """The text that the teacher's prompt shows in place of the solution from the next turn on; None changes nothing."""

    def __post_init__(self) -> None:
        for name in ("text", "feedback", "hint", "failure"):
            value = getattr(self, name)
            _require(value is None or isinstance(value, str), f"expected a text or None as {name}", value)
            if not is_text(value):
                raise ValueError(f"{name} of a reply: {NO_TEXT}")
        _require(self.role in REPLY_ROLES, f"expected {' or '.join(REPLY_ROLES)} as role", self.role)
        object.__setattr__(self, "reward", finite_number(self.reward, "reward of a reply"))
        object.__setattr__(self, "done", plain(self.done))
        _require(isinstance(self.done, bool), "expected a boolean as done", self.done)

    @property
    def goes_on(self) -> bool:
        """Whether another turn can follow."""
        return not self.done and self.text is not None and self.failure is None


def _require(condition: bool, expected: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{expected} of a reply, got {value!r}")
