# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A few responses of a step as text, with the numbers of each token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.pieces import pieces
from megatron_selfdistill.hidden_values import hidden
from megatron_selfdistill.loss.status import Status

if TYPE_CHECKING:
    from megatron_selfdistill.data.tokenizer import Tokenizer

NUMBERS = ("loss", "student_log_prob", "teacher_log_prob", "beta", "status")
"""The fields of `TokenStats` that a sample has of each token; NaN where the loss has no teacher."""
_DIGITS = 6  # significant digits of a number in the record


@dataclass(frozen=True)
class SampleToken:
    """One token of a response."""

    id: int
    text: str
    """The text that the token adds; "" for the first parts of a character, which the last part adds completely."""
    loss: float
    """The token's loss before weights, in nats."""
    student_log_prob: float
    """The student's log-prob of the token, in nats."""
    teacher_log_prob: float | None
    """The teacher's log-prob, conditioned on problem and solution, in nats; None without a teacher."""
    k: float | None
    """The temperature of the mixed logits; None without a teacher."""
    status: str | None
    """The name of the rule or limit that gave k (`loss.status.Status`); None without a teacher."""

    @property
    def log_ratio(self) -> float:
        """The teacher's log-prob of the token minus the student's, in nats; 0 without a teacher.

        A negative value means that the token is less likely for the teacher.  A difference that is not a number is 0,
        too.
        """
        ratio = 0.0 if self.teacher_log_prob is None else self.teacher_log_prob - self.student_log_prob
        return 0.0 if math.isnan(ratio) else ratio


@dataclass(frozen=True)
class Sample:
    """One response of a step, with its problem and the solution in the teacher's prompt."""

    problem_id: str
    prompt: str
    """The text of the student's prompt, special tokens included."""
    solution: str
    """The solution, which only the teacher's prompt shows; "" without a teacher."""
    tokens: Sequence[SampleToken]
    """The tokens of the response, its stop token included."""
    truncated: bool
    """Whether the response reached its greatest length without a stop token."""

    @property
    def response(self) -> str:
        """The text of the response: its tokens joined."""
        return "".join(token.text for token in self.tokens)

    @property
    def has_teacher(self) -> bool:
        """Whether the sample has a teacher's numbers."""
        return any(token.teacher_log_prob is not None for token in self.tokens)

    def record(self) -> dict[str, Any]:
        """Return the sample as plain values: texts, and one list per number with an entry per token."""
        token_lists: dict[str, list[Any]] = {"id": [t.id for t in self.tokens], "text": [t.text for t in self.tokens]}
        token_lists |= {
            name: [_rounded(getattr(token, name)) for token in self.tokens]
            for name in ("loss", "student_log_prob", "teacher_log_prob", "k")
        }
        token_lists["status"] = [token.status for token in self.tokens]
        return {
            "problem_id": self.problem_id,
            "prompt": self.prompt,
            "solution": self.solution,
            "response": self.response,
            "truncated": self.truncated,
            "tokens": token_lists,
        }


def chosen(contexts: Sequence[ContextPair], count: int) -> list[tuple[ContextPair, range]]:
    """Return the first response of each of the first ``count`` problems, with its span in the step's response tokens.

    The span indexes ``PackedBatch.response_tokens``, in which the responses of all ``contexts`` follow each other.
    """
    first: dict[str, tuple[ContextPair, range]] = {}
    start = 0
    for context in contexts:
        end = start + len(context.response)
        first.setdefault(context.problem_id, (context, range(start, end)))
        start = end
    return list(first.values())[:count]


def sample_of(
    context: ContextPair, solution: str, numbers: Mapping[str, Sequence[float]], tokenizer: Tokenizer
) -> Sample:
    """Return a response as a `Sample`; ``numbers``: for each of `NUMBERS`, one value per response token.

    Prompt and solution hide values that come from the environment.
    """
    texts = pieces(context.response, tokenizer)
    columns = zip(context.response, texts, *(numbers[name] for name in NUMBERS), strict=True)
    return Sample(
        problem_id=context.problem_id,
        prompt=hidden(tokenizer.decode(context.student_prompt)),
        solution=hidden(solution),
        tokens=[_token(*column) for column in columns],
        truncated=context.truncated,
    )


def _token(
    token: int, text: str, loss: float, student_log_prob: float, teacher_log_prob: float, beta: float, status: float
) -> SampleToken:
    if math.isnan(beta):
        return SampleToken(token, text, loss, student_log_prob, None, None, None)
    name = Status(int(status)).name.lower()
    return SampleToken(token, text, loss, student_log_prob, teacher_log_prob, 1 / beta, name)


def _rounded(value: float | None) -> float | str | None:
    """Return ``value`` to `_DIGITS` digits; a value that JSON lacks (NaN, infinities) becomes a string."""
    if value is None or not math.isfinite(value):
        return None if value is None else str(value)
    return float(f"{value:.{_DIGITS}g}")
