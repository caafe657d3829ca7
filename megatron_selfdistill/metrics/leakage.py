# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the tokens of a response show: what can only come from the hint, words about the hint, and a loop at the end."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.problems import Problem, are_one_hint
from megatron_selfdistill.data.tokenizer import Tokenizer

NUM_TOKENS = 8
"""The length in tokens of the sequences that are searched for: the n of n-grams."""
MAX_PERIOD = 64
"""The largest number of tokens that a loop repeats."""
MIN_REPEATS = 3
"""The fewest times that a loop has the tokens that it repeats."""
MIN_LOOP = 24
"""The fewest tokens of a loop; fewer tokens repeat in sound responses, too."""

Gram = tuple[int, ...]


@dataclass(frozen=True)
class LeakCounts:
    """The counts of one response or of several responses."""

    hint_grams: int = 0
    """The number of 8-grams that occur in the hint and not in the student's prompt."""
    grams: int = 0
    """The number of all 8-grams of responses whose hint is known."""
    words: int = 0
    """The number of words that speak of the hint, each counted once per response: a loop is one."""
    tokens: int = 0
    """The number of tokens in which these words were counted."""
    quoting: int = 0
    """The number of responses that quote the hint: that have one of its 8-grams, or more."""
    hinted: int = 0
    """The number of responses whose hint is known and has an 8-gram."""

    def __add__(self, other: LeakCounts) -> LeakCounts:
        """Return the counts of both."""
        return LeakCounts(*map(operator.add, astuple(self), astuple(other)))

    def metrics(self) -> dict[str, float]:
        """Return the shares of 8-grams and of responses with the hint, and the words per 1000 tokens, under flat keys.

        A share of nothing has no key.
        """
        parts = {
            "leak/hint_8grams": (self.hint_grams, self.grams),
            "leak/words_per_1000": (1000 * self.words, self.tokens),
            "response/quoted_hint_share": (self.quoting, self.hinted),
        }
        return {key: value / count for key, (value, count) in parts.items() if count}


def grams_of_hint(student_prompt: Sequence[int], teacher_prompt: Sequence[int]) -> frozenset[Gram]:
    """Return the 8-grams that occur in the teacher's prompt and not in the student's prompt."""
    return frozenset(_grams(teacher_prompt)).difference(_grams(student_prompt))


def hint_counts(response: Sequence[int], hint: frozenset[Gram]) -> LeakCounts:
    """Return the 8-grams of a response, and how many of them are in ``hint``, the result of `grams_of_hint`.

    An 8-gram that occurs twice in the response counts twice.  A response is hinted if ``hint`` is not empty.
    """
    found = _grams(response)
    num_quoted = sum(gram in hint for gram in found)
    return LeakCounts(num_quoted, len(found), quoting=int(num_quoted > 0), hinted=int(bool(hint)))


def telling_words(words: Sequence[str], problems: Sequence[Problem]) -> Sequence[str]:
    """Return the words that speak of a hint, or none if the ``problems`` have one hint, which no response can leak."""
    return [] if are_one_hint([problem.solution for problem in problems]) else words


def word_pattern(words: Sequence[str]) -> re.Pattern[str] | None:
    """Return the pattern of `word_counts`; None for no words.

    A word or phrase is found as whole words, in upper or lower case, with any white space between its words.
    """
    if not words:
        return None
    choices = (r"\s+".join(map(re.escape, word.split())) for word in sorted(words, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{'|'.join(choices)})(?!\w)", re.IGNORECASE)


def word_counts(text: str, num_tokens: int, pattern: re.Pattern[str] | None) -> LeakCounts:
    """Return how many words of ``pattern`` are in the ``text`` of a response of ``num_tokens`` tokens, each once."""
    if pattern is None:
        return LeakCounts()
    return LeakCounts(words=len({" ".join(word.lower().split()) for word in pattern.findall(text)}), tokens=num_tokens)


def leak_counts(contexts: Sequence[ContextPair], words: Sequence[str], tokenizer: Tokenizer) -> LeakCounts:
    """Return the counts of the responses of ``contexts``; ``words``: words and phrases that speak of the hint.

    Without ``words`` nobody reads the texts, and none is decoded.
    """
    pattern, counts = word_pattern(words), LeakCounts()
    for context in contexts:
        counts += hint_counts(context.response, grams_of_hint(context.student_prompt, context.teacher_prompt))
        text = "" if pattern is None else tokenizer.decode(context.response, skip_special_tokens=True)
        counts += word_counts(text, len(context.response), pattern)
    return counts


def ends_in_loop(token_ids: Sequence[int]) -> bool:
    """Return whether a response ends in a loop, which repeats the same few tokens until the end.

    A response does if a period p from 1 to `MAX_PERIOD` exists for which the last max(`MIN_REPEATS` p, `MIN_LOOP`)
    tokens have the period p: each of these tokens equals the token p places before it, if that is one of them, too.
    One further token may follow these tokens, so that a stop token hides no loop.
    The cost does not depend on the length of the response: at most 2 `MAX_PERIOD` comparisons of short lists.
    """
    return _repeats_until(token_ids, len(token_ids)) or _repeats_until(token_ids, len(token_ids) - 1)


def _repeats_until(tokens: Sequence[int], end: int) -> bool:
    for period in range(1, MAX_PERIOD + 1):
        start = end - max(MIN_REPEATS * period, MIN_LOOP)
        if start < 0:
            return False
        # The comparison of the last token decides almost always, and copies nothing.
        if tokens[end - 1] == tokens[end - 1 - period] and tokens[start + period : end] == tokens[start : end - period]:
            return True
    return False


def _grams(tokens: Sequence[int]) -> list[Gram]:
    return list(zip(*(tokens[start:] for start in range(NUM_TOKENS)), strict=False))
