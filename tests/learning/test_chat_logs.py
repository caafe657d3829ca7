# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The base writes its own logs, and the trainer learns from them without sampling."""

from __future__ import annotations

import json

import pytest

from _lib import subtraction_chats
from megatron_selfdistill.chat_logs.acceptance import closing_turn
from megatron_selfdistill.metrics.run_log import read_metrics


def test_the_scripted_user_thanks_asks_again_or_gives_the_answer(load_example):
    example = load_example("08_chat_logs")
    for replies, roles, accepted in (
        ([";092"], "uau", 1),
        ([";192", ";092"], "uauau", 3),
        ([";192", "", "092"], "uauauau", None),
    ):
        session = example.Session(500, 408)
        for number, reply in enumerate(replies):
            session.add_reply(reply, last=number + 1 == example.NUM_ATTEMPTS)
        assert session.closed and "".join(m["role"][0] for m in session.messages) == roles
        if accepted is None:
            assert session.messages[-1] == {"role": "user", "content": "092", "accepted": True}
        else:
            assert closing_turn(session.messages) == accepted and "accepted" not in session.messages[-1]


@pytest.mark.full
def test_a_base_learns_from_its_own_logs_without_sampling(load_example, root, monkeypatch, shorten):
    example = load_example("08_chat_logs")
    monkeypatch.setattr(example, "NUM_SESSIONS", 60)
    shorten(subtraction_chats, 100)
    assert example.main(["--steps", "2", "--directory", str(root)]) == 0
    directory = root / "chat_logs" / "seed5"
    records = [json.loads(line) for line in (directory / "conversations.jsonl").read_text().splitlines()]
    assert len(records) == 60 and all(record["messages"][0]["role"] == "user" for record in records)
    logged, likely, sampled = (
        read_metrics(directory / name) for name in ("chat_logs", "chat_logs__likely_turns", "sampled_anew")
    )
    assert any("turns/unlikely_share" in line for line in likely)
    assert any("turns/log_prob_mean" in line for line in logged)
    assert not any("seconds/rollout" in line for line in logged) and any("seconds/rollout" in line for line in sampled)
    assert (root / "chat_logs" / "chat_logs.png").stat().st_size > 10_000
