# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The form in which people read the samples of a step."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_selfdistill.distributed.terminal import visible
from megatron_selfdistill.metrics.samples import Sample, SampleToken

if TYPE_CHECKING:
    from rich.text import Text

STRONG = 1.0
"""The smallest difference of log p(token) between teacher and student, in nats, with which a token is marked."""
PROMPT_END, SOLUTION_START = 400, 400
"""The numbers of characters shown of the prompt's end and of the solution's start."""
RESPONSE_START, RESPONSE_END = 1500, 500
"""The numbers of characters shown of the response's start and end; samples.jsonl has the complete response."""
TOP = 5
"""The number of tokens with the largest loss that are listed."""

LESS, MORE = ("[-", "-]", "red"), ("{+", "+}", "green")
"""The marks around a token that is less or more likely for the teacher, in wdiff's notation, and its colour."""


def console_text(sample: Sample, heading: str, *, coloured: bool) -> Text:
    """Return the sample as lines for the console: prompt, hint, response with its marks, and a legend."""
    from rich.text import Text

    text = Text(f"--- {heading}: problem {visible(sample.problem_id)}\n")
    for name, part in _around(sample):
        text.append(f"{name}: ", "bold" if coloured else "")
        text.append(f"{visible(part)}\n")
    text.append("response: ", "bold" if coloured else "")
    for token in _shown(sample.tokens):
        if isinstance(token, str):
            text.append(token)
        else:
            before, behind, colour = _mark(token)
            text.append(f"{before}{visible(token.text)}{behind}", colour if coloured else "")
    text.append("\n(cut at rollout.max_new_tokens)" if sample.truncated else "")
    if sample.has_teacher:
        less, more = f"{LESS[0]}less likely{LESS[1]}", f"{MORE[0]}more likely{MORE[1]}"
        text.append(f"\nmarks: {less} or {more} by {STRONG:g} nat or more for the teacher than for the student")
        text.append(f"\nlargest loss: {_largest(sample)}")
    return text


def sample_html(sample: Sample) -> str:
    """Return the text of the sample as HTML; all of it is escaped."""
    return f"<pre>{html.escape(console_text(sample, 'sample', coloured=False).plain, quote=False)}</pre>"


def _around(sample: Sample) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each part that is shown before the response."""
    prompt, solution = sample.prompt, sample.solution if sample.turn is None else sample.turn.hint
    yield "prompt", f"... {prompt[-PROMPT_END:]}" if len(prompt) > PROMPT_END else prompt
    if sample.teacher:
        yield "teacher", sample.teacher
    if solution:
        yield "hint", f"{solution[:SOLUTION_START]} ..." if len(solution) > SOLUTION_START else solution


def _shown(tokens: Sequence[SampleToken]) -> Iterator[SampleToken | str]:
    """Yield the tokens of a response; in a long response, a number of tokens replaces the middle."""
    if sum(len(token.text) for token in tokens) <= RESPONSE_START + RESPONSE_END:
        yield from tokens
        return
    start, end = _fitting(tokens, RESPONSE_START), len(tokens) - _fitting(tokens[::-1], RESPONSE_END)
    yield from tokens[:start]
    yield f" [... {end - start} tokens ...] "
    yield from tokens[end:]


def _fitting(tokens: Sequence[SampleToken], room: int) -> int:
    """Return the number of first tokens that together have at most ``room`` characters."""
    for count, token in enumerate(tokens):
        room -= len(token.text)
        if room < 0:
            return count
    return len(tokens)


def _mark(token: SampleToken) -> tuple[str, str, str]:
    if abs(token.log_ratio) < STRONG:
        return "", "", ""
    return LESS if token.log_ratio < 0 else MORE


def _largest(sample: Sample) -> str:
    """Return the tokens with the largest loss above 0, with their log-ratio, k and status."""
    known = [token for token in sample.tokens if token.teacher_log_prob is not None and token.loss != 0]
    if not known:
        return "0 at every token: teacher and student agree"
    return ", ".join(
        f"{token.text!r} {token.loss:.3g} (teacher - student {token.log_ratio:+.2f}, k {token.k:.2f}, {token.status})"
        for token in sorted(known, key=lambda token: -token.loss)[:TOP]
    )
