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
    """The last assistant message before the closing user turn, if that is neither a correction nor a repeat.

    The closing turn is the last user message, if nobody answered it or if it `is_thanks`; with an answer, any other one
    is a question more, whose fate is unknown.  None where there is no closing turn; where the message before it has no
    `answer_text`; where it `is_correction`, or `is_repeat` of any user message before it; and where it speaks
    `of_the_reply` without thanks, since a sentence such as "that deletes the list" may be a complaint in words that
    nobody listed.

    So a user who says thanks, and one who goes on to something else, was content; one who leaves without a word was not
    heard, and the conversation is unresolved.  What it cannot see: irony, a complaint in unlisted words about something
    named ("the list is gone"), an answer that pleased and was wrong.  Where in doubt it gives None: that loses a
    conversation, while a wrong reply taken for the right one teaches it.
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
    answered = closing < len(messages) - 1
    if not is_thanks(text) and (answered or of_the_reply(text)):
        return None
    return closing - 1


def answer_text(message: Mapping[str, Any]) -> str:
    """What a message says, without its reasoning; "" for one that ends within it, or calls tools only."""
    text = str(message.get("content", "")).rpartition("</think>")[2].strip()
    return "" if text.startswith("<think>") else text


def marked(messages: Messages) -> int | None:
    """None: only a mark counts."""
    return None


def is_thanks(text: str) -> bool:
    """A word of `THANKS` among its first 6, a text of at most 4 words with one of `PRAISE`, or a sign of `THANKS_SIGNS`
    anywhere.  (Longer texts may begin with praise and end in a complaint.)"""
    words = _words(text)
    return bool(
        THANKS & set(words[:6])
        or (len(words) <= 4 and PRAISE & set(words))
        or any(sign in _folded(text) for sign in THANKS_SIGNS)
    )


def is_correction(text: str) -> bool:
    """Anywhere in the text a word of `FAULT`, one that begins like one of `FAULT_STEMS`, or a sign of `FAULT_SIGNS`; or
    a word of `DISSENT` among its first 6.  Thanks change nothing about that.

    Words are runs of letters and digits after NFKC and case folding.
    """
    words, folded = _words(text), _folded(text)
    return bool(
        FAULT & set(words)
        or any(word.startswith(FAULT_STEMS) for word in words)
        or any(sign in folded for sign in FAULT_SIGNS)
        or DISSENT & set(words[:6])
    )


def of_the_reply(text: str) -> bool:
    """Whether its first word, after those of `FILLERS`, points at the reply or its author ("it", "that", "you")."""
    words = [word for word in _words(text)[:6] if word not in FILLERS]
    return bool(words and words[0] in REPLY) or _folded(text).lstrip().startswith(REPLY_SIGNS)


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

# The words of the rule: English, German, French, Spanish, Italian, Portuguese, Russian.  Too many rather than too few:
# a question that holds one of them loses its conversation, a complaint that holds none teaches what it complains of.
FAULT = frozenset(
    "bug bugs buggy bad badly broke broken hang hangs hung missing missed misses nonsense rubbish garbage crap "
    "useless unusable worse worst poor poorly stuck freeze freezes frozen problem problems issue issues unclear "
    "invalid lost gone slow slower shorter longer simpler clearer "
    "kaputt nutzlos quatsch unsinn mist schlecht schlechter kürzer kuerzer länger laenger einfacher genauer "
    "faux fausse mal mauvais mauvaise nul nulle pire bogue plante cassé cassée "
    "malo mala peor roto rota falta faltan falla fallas fallan fallo falló "
    "male peggio rotto rotta manca mancano "
    "pior errado errada ruim falha faltou faltam quebrou quebrado "
    "плохо хуже короче проще бред "
    "nope wtf".split()
)
FAULT_STEMS = (
    *"wrong incorrect mistake error crash fail fault flaw forgot forget useless terribl awful horribl confus ignor "
    "hallucinat exception traceback segfault corrupt inaccura misunderst".split(),
    *"falsch fehl vergess vergass unbrauchbar abgestürzt abstürz stürzt absturz scheiter gescheiter".split(),
    *"erreur échou echou échec oubli manqu bloqu inutil inexact incompr".split(),
    *"equivoc olvid inútil".split(),
    *"sbagli errat blocc errore dimentic fallisc fallit".split(),
    *"erro falhou esquec inútil incorret".split(),
    *"неправ неверн ошиб сломал слома забыл бесполез вылета упал падает".split(),
)
DISSENT = frozenset(
    "no not nope nah don doesn didn isn wasn won aren couldn cannot cant dont doesnt didnt isnt can but still again "
    "retry redo fix actually instead really sure why hmm huh wait too more less rewrite rephrase change correct better "
    "unfortunately sadly alas sorry never nothing "
    "nein nicht nichts kein keine doch aber immer nochmal noch wieder warum wirklich sicher stimmt leider besser statt "
    "zu lieber mehr weniger "
    "non pas mais encore toujours pourquoi vraiment plus moins trop rien jamais malheureusement plutôt "
    "pero todavia todavía sigue otra vez nuevo más mas menos demasiado nada nunca mejor "
    "ma ancora perché perche più piu meno troppo niente mai meglio purtroppo "
    "não nao ainda novamente mais demais nada infelizmente melhor "
    "не нет но опять снова почему лучше слишком".split()
)
THANKS = frozenset(
    "thanks thank thx ty tysm cheers perfect perfectly exactly excellent awesome solved helpful helps helped "
    "danke dank dankeschön perfekt merci parfait parfaitement gracias perfecto perfecta grazie perfetto perfetta "
    "obrigado obrigada perfeito perfeita спасибо благодарю".split()
)
PRAISE = frozenset(
    "great nice good works worked ok okay super klasse passt toll gut génial bien bravo genial bueno vale bene ottimo "
    "ótimo bom отлично супер хорошо".split()
)
REPLY = frozenset(
    "it its this that these those there here you your u your "
    "das dies diese dieser dieses es da du sie ihr dein deine deiner ihre "
    "ça ca cela ceci c ce cette ces tu vous il elle ton ta votre "
    "eso esto esa este ese tú usted "
    "questo questa quello quella ciò lei "
    "isso isto você voce vc "
    "это этот эта оно ты вы так".split()
)
FILLERS = frozenset(
    "and now well so oh ok okay then also great good nice und jetzt also dann so et alors maintenant donc y ahora "
    "entonces e ora allora então entao agora и теперь".split()
)
# Turns of phrase; and scripts without spaces between words: Chinese, Japanese, Korean.
FAULT_SIGNS = (
    "good grief",
    "good god",
    "good lord",
    "nice try",
    "for nothing",
    "por qué",
    "работает не",
    "не работ",
    "не хват",
    *"不对 不對 错 錯 不是 不行 不能 不好 不正 不工作 重新 再试 再試 崩溃 崩潰 失败 失敗 没用".split(),
    *"沒用 忘 坏 壞 问题 問題 缺 有bug 短一 更短 太长 太長".split(),
    *"違う 違い 間違 もう一度 エラー バグ 失敗 クラッシュ 落ちま 動かな 動きませ 忘れ 足りな 壊れ".split(),
    *"だめ ダメ おかし もっと 短く".split(),
    *"틀렸 아니 다시 오류 에러 버그 실패 안돼 않 잘못 빠졌 빠뜨 잊 쓸모없 고장".split(),
    "안 돼",
    "더 짧",
)
THANKS_SIGNS = ("谢谢", "謝謝", "太好了", "ありがと", "감사", "고마")
REPLY_SIGNS = ("这", "這", "它", "これ", "それ", "이거", "이건", "그건", "그거")


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", _folded(text))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _trigrams(text: str) -> set[str]:
    return {text[i : i + 3] for i in range(len(text) - 2)}
