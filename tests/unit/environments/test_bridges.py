# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a chat template writes between two responses of an episode that is one sequence of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from chat_templates import CHATML, FORGETFUL, OPENING, STRIPPING
from tiny import builder

from megatron_selfdistill.data.prompt_templates import PromptView
from megatron_selfdistill.environments.bridges import bridge

PROBLEM = tiny.problem("What is 3 + 4?", "It is 7.")
REPLY = {"role": "user", "content": "Wrong, try again."}


def test_a_bridge_is_what_the_template_writes_between_two_responses(chat_directory: Path) -> None:
    build = builder(chat_directory, CHATML, teacher="{problem} Hint: {solution}", student="{problem} Think.")
    [stop] = build.tokenizer.encode("<|im_end|>")
    expected = "\n<|im_start|>user\nWrong, try again.<|im_end|>\n<|im_start|>assistant\n"
    for between in (bridge(build, PROBLEM, None, REPLY, stop), bridge(build, PROBLEM, "It is 7.", REPLY, stop)):
        assert build.tokenizer.decode(between) == expected and between == build.tokenizer.encode(expected)
    other = bridge(build, PROBLEM, None, REPLY, build.tokenizer.encode("<|endoftext|>")[0])
    assert other == [stop, *build.tokenizer.encode(expected)], "another stop token stays before the template's"


def test_continued_tokens_are_the_tokens_of_the_rendered_conversation(chat_directory: Path) -> None:
    build = builder(chat_directory, CHATML)
    [stop] = build.tokenizer.encode("<|im_end|>")
    said = [*build.tokenizer.encode("The answer is seven."), stop]
    continued = [*build.student_prompt(PROBLEM), *said, *bridge(build, PROBLEM, None, REPLY, stop)]
    messages = [*PROBLEM.messages, {"role": "assistant", "content": "The answer is seven."}, REPLY]
    assert continued == build.tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("template", "role"),
    [(STRIPPING, "user"), (FORGETFUL, "user"), (FORGETFUL, "tool"), (OPENING, "user"), (None, "user")],
)
def test_a_template_that_rewrites_a_response_has_no_bridge(
    chat_directory: Path, template: str | None, role: str
) -> None:
    build = builder(chat_directory, template)
    with pytest.raises(ValueError, match=rf"file.jsonl:1: the chat template rewrites a response .* of the role {role}"):
        bridge(build, PROBLEM, None, {**REPLY, "role": role}, 2)


def test_a_template_that_keeps_the_thoughts_before_tools_has_a_bridge_to_a_tool(chat_directory: Path) -> None:
    build = builder(chat_directory, STRIPPING)
    assert "<|im_start|>tool" in build.tokenizer.decode(bridge(build, PROBLEM, None, {**REPLY, "role": "tool"}, 2))


def test_a_generation_prompt_that_the_template_would_not_write_has_no_bridge(chat_directory: Path) -> None:
    build = builder(chat_directory, CHATML, student_view=PromptView(generation_prompt="<|im_start|>assistant\nSo:"))
    with pytest.raises(ValueError, match="rewrites a response"):
        bridge(build, PROBLEM, None, REPLY, 2)
    bridge(build, PROBLEM, "It is 7.", REPLY, 2)
