# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Which reply of a logged conversation the user was content with, where nobody marked it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_selfdistill.config import function_named

Messages = Sequence[Mapping[str, Any]]
Rule = Callable[[Messages], int | None]
"""``rule(messages) -> index of the accepted message, or None where the conversation is unresolved``."""


def load_rule(name: str) -> Rule:
    """closing_turn, marked, or a function of the user's by its dotted path, ``package.module.function``.

    Raises: ConfigError in one sentence if there is no such function.
    """
    return function_named("conversations.accepted_rule", name, BUILT_IN)


def closing_turn(messages: Messages) -> int | None:
    """The last assistant message with text before the closing user turn, if that is neither a correction nor a repeat.

    The closing turn is the last user message, if nobody answered it or if it `is_thanks`; with an answer, any other one
    is a question more, whose fate is unknown.  None where there is no closing turn, no assistant message with text
    between it and the user message before, where it `is_correction`, or where it `is_repeat` of any user message before
    it.

    So a user who says thanks, and one whose last word is no complaint, was content; one who leaves without a word was
    not heard, and the conversation is unresolved.  What it cannot see: irony, a complaint in words that it does not
    know, a wish for a change ("shorter") as the last word, an answer that pleased and was wrong.  Where in doubt it
    gives None: that loses a conversation, while a wrong reply taken for the right one teaches it.
    """
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if len(users) < 2:
        return None
    before, closing = users[-2], users[-1]
    spoken = [
        i for i in range(before + 1, closing) if messages[i]["role"] == "assistant" and messages[i].get("content")
    ]
    text = messages[closing]["content"]
    if closing < len(messages) - 1 and not is_thanks(text):
        return None
    if not spoken or is_correction(text) or any(is_repeat(text, messages[i]["content"]) for i in users[:-1]):
        return None
    return spoken[-1]


def marked(messages: Messages) -> int | None:
    """None: only a mark counts."""
    return None


def is_thanks(text: str) -> bool:
    """A word of `THANKS` among its first 6, or a sign of `THANKS_SIGNS` anywhere."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return bool(THANKS & set(_words(text)[:6]) or any(sign in folded for sign in THANKS_SIGNS))


def is_correction(text: str) -> bool:
    """A word of `FAULT` anywhere in the text, a word of `DISSENT` among its first 6, or a sign of `SIGNS` anywhere.

    Words are runs of letters and digits after NFKC and case folding.
    """
    words = _words(text)
    folded = unicodedata.normalize("NFKC", text).casefold()
    return bool(FAULT & set(words) or DISSENT & set(words[:6]) or any(sign in folded for sign in SIGNS))


def is_repeat(text: str, earlier: str) -> bool:
    """The two name the same numbers, and are alike: the sets A and B of their character trigrams (letters and digits
    only) have 2 |A & B| >= 0.6 (|A| + |B|), or A holds 0.8 of B, the earlier text's.

    Texts with fewer than 3 letters and digits are alike where they are equal.
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

# The words of the rule: English, German, French, Spanish, Italian, Portuguese.
FAULT = frozenset(
    "wrong incorrect incorrectly mistake mistaken mistakes falsch fehler fehlerhaft faux fausse erreur incorrecto "
    "incorrecta equivocado equivocada error errors sbagliato sbagliata errore errato errado errada incorreto incorreta "
    "erro".split()
)
DISSENT = frozenset(
    "no not nope nah don doesn didn isn wasn can but still again retry redo fix actually instead really sure why "
    "hmm huh "
    "nein nicht kein keine doch aber immer nochmal noch wieder warum wirklich sicher stimmt "
    "non pas mais encore toujours pourquoi vraiment "
    "pero todavia todavía sigue otra vez nuevo "
    "ma ancora perché perche "
    "não nao mas ainda novamente".split()
)
THANKS = frozenset(
    "thanks thank thx ty cheers great perfect perfectly excellent awesome nice good works worked solved ok okay "
    "danke dank super perfekt passt klasse merci parfait génial gracias perfecto perfecta genial grazie perfetto "
    "obrigado obrigada perfeito ótimo".split()
)
# Scripts without spaces between words: Chinese, Japanese, Korean; and Russian, which inflects.
SIGNS = (
    "不对",
    "不對",
    "错",
    "錯",
    "不是",
    "重新",
    "再试",
    "再試",
    "違う",
    "違い",
    "間違",
    "もう一度",
    "틀렸",
    "아니",
    "다시",
    "неправ",
    "неверн",
    "ошиб",
    "снова",
)
THANKS_SIGNS = ("谢谢", "謝謝", "太好了", "ありがと", "감사", "고마", "спасибо")


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())


def _trigrams(text: str) -> set[str]:
    return {text[i : i + 3] for i in range(len(text) - 2)}
