# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Logged conversations: what is read, what is refused without being quoted, and which turns come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from record_sources import record_source

from megatron_selfdistill.chat_logs.acceptance import (
    BUILT_IN,
    answer_text,
    closing_turn,
    marked,
)
from megatron_selfdistill.chat_logs.conversations import ConversationSet, load_conversations
from megatron_selfdistill.config import function_named

SECRET = "zebra"
OPTIONS = {"rule": closing_turn, "turns": "all", "show_contents": False}


def chat(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return [{"role": names[role], "content": content} for role, content in turns]


def read(path: Path, **changes: Any) -> ConversationSet:
    options = {name: changes.pop(name, default) for name, default in OPTIONS.items()}
    return load_conversations(record_source(path, **changes), **options)


def log(directory: Path, *entries: Any, **options: Any) -> ConversationSet:
    """``entries``: records, or lists of messages."""
    path = directory / "log.jsonl"
    entries = tuple({"messages": entry} if isinstance(entry, list) else entry for entry in entries)
    path.write_text("".join(f"{e if isinstance(e, str) else json.dumps(e)}\n" for e in entries))
    return read(path, **options)


CORRECTED = chat(("s", "Be brief."), ("u", "3+4?"), ("a", "8"), ("u", "No, wrong."), ("a", "7"), ("u", "Thanks!"))


def test_each_assistant_turn_is_a_problem_with_the_accepted_answer_which_is_none_itself_on_request(tmp_path):
    found = log(tmp_path, {"id": "c", "messages": CORRECTED})
    first, second = found.turns.problems
    assert [first.id, second.id] == ["c/2", "c/4"] and first.location.endswith("log.jsonl:1, message 2")
    assert first.messages == tuple(CORRECTED[:2]) and second.messages == tuple(CORRECTED[:4])
    assert first.solution == second.solution == "7"
    assert (first.reply.message, first.reply.accepted) == (CORRECTED[2], False)
    assert (second.reply.message, second.reply.accepted) == (CORRECTED[4], True)
    assert found.about.startswith("1 conversations") and "of 1 found by the rule" in found.about
    at_once = chat(("u", "3+4?"), ("a", "7"), ("u", "Thanks!"))
    found = log(tmp_path, CORRECTED, at_once, turns="before_accepted")
    assert [p.reply.message["content"] for p in found.turns.problems] == ["8"]
    assert "; 1 without a turn to train on; " in found.about


@pytest.mark.parametrize(
    ("rest", "accepted"),
    [
        ([("u", "thanks"), ("a", "You are welcome.")], 1),
        ([("u", "And how far is the moon?")], 1),
        ([("u", "And how far is the moon?"), ("a", "Far.")], None),
        ([("u", "And how far is the moon?"), ("a", "Far."), ("u", "Muchas gracias"), ("a", "Welcome.")], 3),
        ([("u", "谢谢"), ("a", "不客气")], 1),
        ([("u", "No, that is wrong."), ("a", "7"), ("u", "great")], 3),
        ([], None),
        ([("u", "No."), ("a", "7")], None),
        ([("u", "ok"), ("a", "sure"), ("u", "what is the sum of 3 and 4?!")], None),
    ],
)
def test_the_rule_takes_the_reply_before_a_closing_turn_that_neither_corrects_nor_repeats(rest, accepted):
    assert closing_turn(chat(("u", "What is the sum of 3 and 4?"), ("a", "8"), *rest)) == accepted


COMPLAINTS = """
It crashes on an empty list. | This fails with exit code 1 | That is broken | There is a bug in line 3 | shorter please
This is useless | You forgot the empty list | good grief, that deletes the list | Great, it crashes | Nice try
Great, now it deletes all my files | That is rubbish | Thanks for nothing | Thanks, it crashes
Das stürzt ab | Du hast die leere Liste vergessen | Mach es kürzer | Das Programm bricht ab
Ça marche mal | Tu as oublié la liste vide | Ça plante | C'est nul | Falla con una lista vacía
Se bloquea con una lista vacía | Te olvidaste de la lista vacía | Si blocca | Hai dimenticato la lista vuota
Non funziona | Está com erro | Você esqueceu a lista vazia | Quebrou | 不工作 | 这个会崩溃 | 你忘了空列表
空のリストで落ちます | それは役に立たない | 빈 목록에서 오류가 납니다 | 작동하지 않아요
Это не работает | Программа падает | Ты забыл про пустой список
"""
CONTENT = [
    *("Thanks!", "great", "ok", "That works, thanks", "works now", "Perfect, exactly what I needed", "Sounds good"),
    *("Danke, das passt", "merci beaucoup", "Muchas gracias", "Grazie mille", "Obrigado!"),
    *("谢谢", "ありがとう", "감사합니다", "Спасибо"),
]
SOMETHING_ELSE = [
    *("Now translate it into French.", "Good, and what is the capital of France?", "How long is the Nile?"),
    *("Wie weit ist der Mond?", "Et la lune ?", "¿Cómo ordeno una lista en Rust?", "Quanto dista la luna?"),
    *("月球有多远", "月までの距離は", "Как далеко до Луны?"),
]


def closed_by(text: str, answered: bool) -> int | None:
    last = [("a", "Well.")] if answered else []
    return closing_turn(chat(("u", "Write a function that sorts numbers"), ("a", "sorted"), ("u", text), *last))


def test_a_complaint_is_never_taken_for_content_thanks_are_and_something_else_is_where_no_answer_follows():
    complaints = [text.strip() for text in COMPLAINTS.strip().replace("\n", "|").split("|")]
    assert len(complaints) == 41
    assert [text for text in complaints for answered in (False, True) if closed_by(text, answered) is not None] == []
    assert [text for text in CONTENT if closed_by(text, False) != 1 or closed_by(text, True) != 1] == []
    assert [text for text in SOMETHING_ELSE if closed_by(text, False) != 1] == []
    assert [text for text in SOMETHING_ELSE if closed_by(text, True) is not None] == []


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("It is 7.", "It is 7."),
        ("<think>3 + 4</think>\n7", "7"),
        ("3 + 4</think>7", "7"),
        ("<think>3 + 4, cut", ""),
        ("<think>3</think><think>+ 4, cut", ""),
        ("7 goes behind <think>", "7 goes behind <think>"),
    ],
)
def test_an_answers_text_is_without_reasoning_also_where_it_is_cut_off(content, text, tmp_path):
    assert answer_text({"content": content}) == text
    messages = chat(("u", "3+4?"), ("a", content), ("u", "Thanks"))
    assert closing_turn(messages) == (1 if text else None)
    if not text:
        with pytest.raises(ValueError, match="expected message 1 to be an assistant's with text"):
            log(tmp_path, {"messages": messages, "accepted": 1})


def test_a_reply_without_text_is_not_what_the_rule_accepts():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    messages = [*chat(("u", "3+4?")), call, *chat(("t", "7"), ("a", "It is 7."), ("u", "Thanks"))]
    assert closing_turn(messages) == 3
    assert closing_turn([*messages[:3], {"role": "assistant"}, messages[4]]) is None


def test_marks_in_the_record_and_on_the_message_win_over_the_rule(tmp_path):
    marked_messages = [dict(message) for message in CORRECTED]
    marked_messages[2]["accepted"] = True
    found = log(tmp_path, {"messages": CORRECTED, "accepted": 2}, marked_messages)
    assert [p.solution for p in found.turns.problems] == ["8", "8"]
    assert "accepted" not in found.turns.problems[1].reply.message
    assert "of 2 marked in the log" in found.about and "; 2 turns after the accepted answer skipped" in found.about


def test_a_user_who_gave_the_answer_himself_is_marked_like_a_reply(tmp_path):
    messages = chat(("u", "3+4?"), ("a", "8"), ("u", "It is 7."))
    [turn] = log(tmp_path, {"messages": messages, "accepted": 2}, rule=marked).turns.problems
    assert (turn.solution, turn.reply.message["content"], turn.reply.accepted) == ("It is 7.", "8", False)


def test_a_users_own_rule_decides_and_its_failures_are_not_quoted(tmp_path, monkeypatch):
    (tmp_path / "rule_of_a_test.py").write_text("def third_message(messages):\n    return 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rule = function_named("conversations.accepted_rule", "rule_of_a_test.third_message", BUILT_IN)
    found = log(tmp_path, CORRECTED, rule=rule)
    assert [p.solution for p in found.turns.problems] == ["8"]
    assert log(tmp_path, CORRECTED, rule=lambda messages: np.int64(2)).turns.problems == found.turns.problems

    def broken(messages):
        raise KeyError(messages[1]["content"])

    with pytest.raises(ValueError, match=r"broken .*KeyError\n  File") as caught:
        log(tmp_path, CORRECTED, rule=broken)
    assert "3+4" not in str(caught.value)
    changing = log(tmp_path, CORRECTED, rule=lambda messages: [it.update(content="x") for it in messages] and 2)
    assert changing.turns.problems == found.turns.problems


def test_parts_are_joined_nulls_dropped_and_tool_arguments_parsed(tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 3, "b": 4}'}}
    without_arguments = {"id": "2", "type": None, "function": {"name": "sum", "arguments": " "}}
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "3+4?"}]
    messages = [
        {"role": "user", "content": parts, "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call, without_arguments]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "assistant", "content": "<think>add</think>\n7", "tool_calls": []},
        {"role": "user", "content": "Thanks"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "description": None}}]
    first, second = log(tmp_path, {"messages": messages, "tools": tools}).turns.problems
    assert first.messages == ({"role": "user", "content": "What is\n3+4?"},)
    assert first.reply.message["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 3, "b": 4}}
    assert first.reply.message["tool_calls"][1] == {"id": "2", "function": {"name": "sum", "arguments": {}}}
    assert "content" not in first.reply.message and second.messages[2]["content"] == ""
    assert first.solution == "7", "the hint is without the reasoning"
    assert "tool_calls" not in second.reply.message
    assert first.tools == ({"type": "function", "function": {"name": "add"}},)


def called(arguments: Any) -> list[dict[str, Any]]:
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    return [*chat(("u", SECRET)), {"role": "assistant", "tool_calls": calls}]


def reply(**changes: Any) -> list[dict[str, Any]]:
    """Return `CORRECTED` with another first reply."""
    return [*CORRECTED[:2], CORRECTED[2] | changes, *CORRECTED[3:]]


BAD = {
    "no assistant turn": (chat(("u", SECRET)), "assistant turn"),
    "unresolved": (chat(("u", SECRET), ("a", SECRET)), "unresolved"),
    "empty": (chat(("u", SECRET), ("a", "  "), ("u", SECRET)), "'messages[1]'"),
    "unknown role": ([{"role": SECRET, "content": SECRET}], "a role among"),
    "calls of another kind": ([*chat(("u", SECRET)), {"role": "assistant", "tool_calls": 3}], "a list of tool calls"),
    "mark that is no index": ({"messages": CORRECTED, "accepted": 1.5}, "a number"),
    "messages as text that is not their JSON": ({"messages": SECRET}, "'messages'"),
    "image": ([{"role": "user", "content": [{"type": "image_url", "text": SECRET}]}], "text parts"),
    "no JSON": (f'{{"messages": "{SECRET}', "JSON object"),
    "mark beyond": ({"messages": CORRECTED, "accepted": 9}, "got 9"),
    "mark on the question": ({"messages": CORRECTED, "accepted": 1}, "message 1"),
    "half a surrogate pair in arguments as text": (called(r'{"a": "\ude00"}'), "'messages[1]'"),
    "broken arguments": (called(f"{{{SECRET}"), "'messages[1]'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_log_is_named_by_file_and_line_and_counted_but_never_quoted(name, tmp_path):
    entry, words = BAD[name]
    with pytest.raises(ValueError) as caught:
        log(tmp_path, CORRECTED, entry)
    sentence = str(caught.value)
    assert words in sentence and "log.jsonl:2: " in sentence and SECRET not in sentence and "\n" not in sentence
    found = log(tmp_path, CORRECTED, entry, CORRECTED, on_bad_record="skip")
    assert (len(found.turns), found.turns.num_skipped) == (4, 1)
    assert f"skipped as unresolved: {int(name == 'unresolved')}, as bad: {int(name != 'unresolved')}" in found.about
    assert words in found.turns.skipped[0] and SECRET not in found.turns.skipped[0]
    if name == "unknown role":
        with pytest.raises(ValueError, match=SECRET):
            log(tmp_path, entry, show_contents=True)


def test_a_log_with_another_reply_or_next_state_is_another_data_set(tmp_path):
    options = {"turns": "before_accepted"}
    one, two = (log(tmp_path, {"id": "c", "messages": m}, **options).turns for m in (CORRECTED, reply(content="9")))
    assert one.fingerprint != two.fingerprint
    thanks, more = (chat(("u", "3+4?"), ("a", "7"), ("u", text)) for text in ("Thanks!", "And 5+6?"))
    one, two = (log(tmp_path, messages, rule=None).turns for messages in (thanks, more))
    assert one.fingerprint != two.fingerprint


def test_without_a_rule_every_reply_that_a_message_follows_is_a_turn_with_its_next_state(tmp_path):
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    with_tools = [*chat(("u", "3+4?")), called, *chat(("t", "no such file"), ("t", "7"), ("a", "7"), ("u", "Thanks!"))]
    marked_log = {"messages": CORRECTED, "accepted": 2}
    found = log(tmp_path, with_tools, marked_log, chat(("u", "hi"), ("a", "hello")), rule=None, on_bad_record="skip")
    states = [[(m["role"], m["content"]) for m in turn.reply.next_state] for turn in found.turns.problems]
    tools, thanks = [("tool", "no such file"), ("tool", "7")], [("user", "Thanks!")]
    assert states == [tools, thanks, [("user", "No, wrong.")], thanks]
    assert all(turn.solution == "" and not turn.reply.accepted for turn in found.turns.problems)
    assert found.about == "2 conversations, 4 replies that a message follows; skipped as unresolved: 1, as bad: 0"
