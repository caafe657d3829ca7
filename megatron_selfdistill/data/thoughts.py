# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The formats in which models write their thoughts, and the final answer of a response alone.

Some families mark their thoughts with special tokens, which a text for people leaves out: `readable` writes every
format as ``<think>thoughts</think>answer``, and `final_part` cuts such a text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from megatron_selfdistill.data.tokenizer import Tokenizer

THINK, END_OF_THOUGHTS = "<think>", "</think>"
"""The marks around the thoughts in a text for people, a verifier or a hint, whatever the model's own marks are."""


class ThoughtFormat(NamedTuple):
    """The marks of one family around its thoughts, as regular expressions over the text with special tokens."""

    families: str
    begin: str
    """The mark before the thoughts.  A chat template may have written the mark into the prompt."""
    end: str
    """The mark between the thoughts and the final answer."""


_NOTHING = r"(?!)"  # matches nowhere

# The sources are the chat templates of the published models.
FORMATS = (
    ThoughtFormat("Seed-OSS", "<seed:think>", "</seed:think>"),
    ThoughtFormat("Kimi-Dev and Kimi-VL", "◁think▷", "◁/think▷"),
    ThoughtFormat("Magistral and Ministral 3", r"\[THINK\]", r"\[/THINK\]"),
    ThoughtFormat("Command A", r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    ThoughtFormat("Gemma 4", r"<\|channel>thought\n?", r"<channel\|>"),
    ThoughtFormat(
        "gpt-oss",
        r"(?:<\|start\|>assistant)?<\|channel\|>(?!final)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>",
        r"<\|start\|>assistant<\|channel\|>final[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>",
    ),
    ThoughtFormat("gpt-oss, an answer without thoughts", _NOTHING, r"\A\s*<\|channel\|>final[^<]*<\|message\|>"),
    ThoughtFormat(
        "DeepSeek-R1 and V3.1, GLM-4.5, Kimi-K2-Thinking, LFM2.5, MiniMax-M2, Nemotron, Qwen3, SmolLM3",
        *(THINK, END_OF_THOUGHTS),
    ),
    ThoughtFormat("gpt-oss, in data that lost its special tokens", _NOTHING, r"\Aanalysis[\s\S]*assistantfinal"),
)
"""The known formats.  The first format whose marks a text has is that of the text."""


def parts(text: str) -> tuple[str | None, str]:
    """Return the thoughts in ``text`` and the final answer after them, both without the marks of the format.

    The thoughts are None in a text without marks.  The final answer is "" if the thoughts do not end.
    """
    for _, begin, end in FORMATS:
        last = next(reversed(list(re.finditer(end, text))), None)
        thoughts, answer = ("", text) if last is None else (text[: last.start()], text[last.end() :])
        if re.match(rf"\s*(?:{begin})", answer):  # thoughts that do not end
            return re.sub(begin, "", thoughts + answer), ""
        if last is not None:
            return re.sub(begin, "", thoughts), answer
    return None, text


def final_part(text: str) -> str:
    """Return the final answer in ``text``: what follows the thoughts, or all of a text without thoughts."""
    return parts(text)[1]


def num_thoughts(text: str) -> int:
    """Return how often the marks of a format end thoughts in ``text``, empty ones too."""
    return max(len(re.findall(end, text)) for _, begin, end in FORMATS if begin != _NOTHING)


def readable(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text of ``ids`` without special tokens, with its thoughts between `THINK` and `END_OF_THOUGHTS`.

    A text whose marks are no special tokens, and a text without thoughts, is the text that the tokenizer decodes.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    thoughts, answer = parts(tokenizer.decode(ids))
    if thoughts is None:
        return text
    special = "|".join(map(re.escape, sorted(tokenizer.special_tokens(), key=len, reverse=True))) or _NOTHING
    thoughts, answer = (re.sub(special, "", part) for part in (thoughts, answer))
    keeps_marks = END_OF_THOUGHTS in text or text.lstrip().startswith(THINK)
    if keeps_marks and parts(text) == (thoughts, answer):
        return text
    return f"{THINK}{thoughts}{END_OF_THOUGHTS}{answer}" if thoughts else answer
