# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Rules that find the reply of a logged conversation that the user accepted, where the log has no mark.

The words that the rules look for are in acceptance_words.yaml, in English, German, French, Spanish, Italian,
Portuguese, Russian, Chinese, Japanese and Korean.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_selfdistill.data.thoughts import final_part

Messages = Sequence[Mapping[str, Any]]
Rule = Callable[[Messages], int | None]
"""``rule(messages) -> index of the accepted message``; None means that the conversation is unresolved."""

_BY_LANGUAGE = yaml.safe_load(Path(__file__).with_name("acceptance_words.yaml").read_text(encoding="utf-8"))


def _words_of(name: str) -> frozenset[str]:
    return frozenset(word for words in _BY_LANGUAGE[name].values() for word in words.split())


def _signs_of(name: str) -> tuple[str, ...]:
    return tuple(sign for signs in _BY_LANGUAGE[name].values() for sign in signs)


FAULT, FAULT_SIGNS = _words_of("fault"), _signs_of("fault_signs")
FAULT_BEGINNINGS = tuple(_words_of("fault_beginnings"))
DISSENT = _words_of("dissent")
THANKS, THANKS_SIGNS = _words_of("thanks"), _signs_of("thanks_signs")
PRAISE = _words_of("praise")
REPLY, REPLY_SIGNS = _words_of("reply"), _signs_of("reply_signs")
FILLERS = _words_of("fillers")


def closing_turn(messages: Messages) -> int | None:
    """Return the index of the assistant message before the closing user message, or None if it is in doubt.

    The closing user message is the last user message, if no answer follows it or if it `is_thanks`.  After any other
    answered message the user has not judged the answer, and there is no closing message.

    The rule returns None if there is no closing message; where the message before it has no `answer_text`; where it
    `is_correction`, or `is_repeat` of an earlier user message; and where it `points_at_the_reply` without thanks, since
    a message such as "that deletes the list" may be a complaint in words that no list has.

    So a user who says thanks, or goes on to something else, has accepted the answer.  The judgement of a user who
    leaves without a word is unknown.  The rule cannot see irony, a complaint in unlisted words about something that the
    message names ("the list is gone"), and an answer that pleased and was wrong.  A conversation in doubt is lost; a
    wrong reply that counted as accepted would be taught.
    """
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if len(users) < 2:
        return None
    closing = users[-1]
    text, reply = messages[closing]["content"], messages[closing - 1]
    if reply["role"] != "assistant" or not answer_text(reply):
        return None
    if is_correction(text) or any(is_repeat(text, messages[i]["content"]) for i in users[:-1]):
        return None
    is_answered = closing < len(messages) - 1
    if not is_thanks(text) and (is_answered or points_at_the_reply(text)):
        return None
    return closing - 1


def marked(messages: Messages) -> int | None:
    """Return None for every conversation: with this rule only the log's marks count."""
    return None


def answer_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message without its reasoning; "" if it ends within the reasoning or only calls tools."""
    return final_part(str(message.get("content", ""))).strip()


def is_thanks(text: str) -> bool:
    """Return whether a user's message says thanks.

    It does with a word of `THANKS` among its first 6 words, with a word of `PRAISE` in at most 4 words, and with a sign
    of `THANKS_SIGNS` anywhere.  (A longer message may begin with praise and end in a complaint.)
    """
    words = _words(text)
    return bool(
        THANKS & set(words[:6])
        or (len(words) <= 4 and PRAISE & set(words))
        or any(sign in _folded(text) for sign in THANKS_SIGNS)
    )


def is_correction(text: str) -> bool:
    """Return whether a user's message corrects the reply; thanks in the same message change nothing.

    It does with a word of `FAULT`, a word that begins like one of `FAULT_BEGINNINGS` or a sign of `FAULT_SIGNS`
    anywhere, and with a word of `DISSENT` among its first 6 words.  Words are runs of letters and digits, after NFKC
    and case folding.
    """
    words, folded = _words(text), _folded(text)
    return bool(
        FAULT & set(words)
        or any(word.startswith(FAULT_BEGINNINGS) for word in words)
        or any(sign in folded for sign in FAULT_SIGNS)
        or DISSENT & set(words[:6])
    )


def points_at_the_reply(text: str) -> bool:
    """Return whether the first word, after words of `FILLERS`, points at the reply or its author ("it", "you")."""
    words = [word for word in _words(text)[:6] if word not in FILLERS]
    return bool(words and words[0] in REPLY) or _folded(text).lstrip().startswith(REPLY_SIGNS)


def is_repeat(text: str, earlier: str) -> bool:
    """Return whether a message names the same numbers as an earlier message and has a similar text.

    Let A and B be the sets of trigrams (of letters and digits only) of ``text`` and of ``earlier``.  The texts are
    similar if 2 |A & B| >= 0.6 (|A| + |B|), or |A & B| >= 0.8 |B|.  Texts with fewer than 3 letters and digits are
    similar if they are equal.
    """
    one, other = _words(text), _words(earlier)
    if {word for word in one if word.isdigit()} != {word for word in other if word.isdigit()}:
        return False  # the same question about something else
    a, b = _trigrams("".join(one)), _trigrams("".join(other))
    if not a or not b:
        return one == other
    common = len(a & b)
    return 2 * common >= 0.6 * (len(a) + len(b)) or common >= 0.8 * len(b)


BUILT_IN: dict[str, Rule] = {"closing_turn": closing_turn, "marked": marked}


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", _folded(text))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _trigrams(text: str) -> set[str]:
    return {text[i : i + 3] for i in range(len(text) - 2)}
