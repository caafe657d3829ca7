# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A sample for people: on the console with colours or without, and as the HTML that loggers show."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_selfdistill.metrics.samples import Sample, SampleToken
from megatron_selfdistill.terminal import visible as _visible

if TYPE_CHECKING:
    from rich.text import Text

SLIGHT, STRONG = 0.3, 1.0
"""The smallest differences of log p(token) between teacher and student, in nats, with which a token is marked slightly
or strongly; without colours only the strong mark exists."""
PROMPT_END, SOLUTION_START = 400, 400
"""The numbers of characters shown of the prompt's end and of the solution's start."""
RESPONSE_START, RESPONSE_END = 1500, 500
"""The numbers of characters shown of the response's start and end; samples.jsonl has the complete response."""
TOP = 5
"""The number of tokens with the largest loss that are listed."""

LESS, MORE = ("[-", "-]"), ("{+", "+}")
"""The marks around a token that is less or more likely for the teacher, without colours, in wdiff's notation."""
_COLOURS = {
    (True, False): "red",
    (True, True): "bold white on red",
    (False, False): "green",
    (False, True): "bold green",
}


def console_text(sample: Sample, heading: str, *, coloured: bool) -> Text:
    """Return the sample as lines for the console: prompt, hint, response with its marks, and a legend."""
    from rich.text import Text

    text = Text(f"--- {heading}: problem {_visible(sample.problem_id)}\n")
    for name, part in _around(sample):
        text.append(f"{name}: ", "bold" if coloured else "")
        text.append(f"{_visible(part)}\n")
    text.append("response: ", "bold" if coloured else "")
    for token in _shown(sample.tokens):
        if isinstance(token, str):
            text.append(token)
        elif coloured:
            text.append(_visible(token.text), _style(token))
        else:
            before, behind = _wdiff(token)
            text.append(f"{before}{_visible(token.text)}{behind}")
    text.append("\n(cut at rollout.max_new_tokens)" if sample.truncated else "")
    if not sample.has_teacher:
        return text
    text.append("\nmarks: ")
    for style, words in _legend(coloured):
        text.append(words, style)
    text.append(f"\nlargest loss: {_largest(sample)}")
    return text


def sample_html(sample: Sample) -> str:
    """Return the sample as HTML in which only bold and italic type mark tokens, since TensorBoard strips colours.

    All texts of the sample are escaped.
    """
    parts = [f"<p>problem {_escaped(sample.problem_id)}</p>"]
    parts += [f"<h4>{name}</h4><pre>{_escaped(part)}</pre>" for name, part in _around(sample)]
    pieces = [
        token
        if isinstance(token, str)
        else _bold_or_italic(token)[0] + _escaped(token.text) + _bold_or_italic(token)[1]
        for token in _shown(sample.tokens)
    ]
    parts.append(f"<h4>response</h4><pre>{''.join(pieces)}</pre>")
    if sample.has_teacher:
        parts.append(
            f"<p><strong>bold</strong>: at least {STRONG:g} nat less likely for the teacher than for the student; "
            f"<em>italic</em>: more likely.</p><p>largest loss: {_escaped(_largest(sample))}</p>"
        )
    return "".join(parts)


def _around(sample: Sample) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each part that is shown before the response."""
    prompt, solution = sample.prompt, sample.solution
    yield "prompt", f"... {prompt[-PROMPT_END:]}" if len(prompt) > PROMPT_END else prompt
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


def _style(token: SampleToken) -> str:
    size = abs(token.log_ratio)
    return _COLOURS[token.log_ratio < 0, size >= STRONG] if size >= SLIGHT else ""


def _marked(token: SampleToken, less: tuple[str, str], more: tuple[str, str]) -> tuple[str, str]:
    if abs(token.log_ratio) < STRONG:
        return "", ""
    return less if token.log_ratio < 0 else more


def _wdiff(token: SampleToken) -> tuple[str, str]:
    return _marked(token, LESS, MORE)


def _bold_or_italic(token: SampleToken) -> tuple[str, str]:
    return _marked(token, ("<strong>", "</strong>"), ("<em>", "</em>"))


def _legend(coloured: bool) -> Iterator[tuple[str, str]]:
    """Yield (style, meaning) of each mark."""
    if coloured:
        yield _COLOURS[True, False], "less likely"
        yield "", ", "
        yield _COLOURS[True, True], f"by {STRONG:g} nat or more"
        yield "", "; "
        yield _COLOURS[False, False], "more likely"
        yield "", ", "
        yield _COLOURS[False, True], f"by {STRONG:g} nat or more"
        yield "", f" for the teacher than for the student (from {SLIGHT:g} nats on)"
    else:
        yield "", f"{LESS[0]}less likely{LESS[1]} or {MORE[0]}more likely{MORE[1]} by {STRONG:g} nat or more "
        yield "", "for the teacher than for the student"


def _largest(sample: Sample) -> str:
    """Return the tokens with the largest loss, with their log-ratio, k and status."""
    known = [token for token in sample.tokens if token.teacher_log_prob is not None]
    return ", ".join(
        f"{token.text!r} {token.loss:.3g} (teacher - student {token.log_ratio:+.2f}, k {token.k:.2f}, {token.status})"
        for token in sorted(known, key=lambda token: -token.loss)[:TOP]
    )


def _escaped(text: str) -> str:
    return html.escape(_visible(text), quote=False)
