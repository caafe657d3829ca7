# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Calls of tools: what each family writes is read exactly, and what cannot be read is said in the model's words."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys

import pytest
import tiny

from megatron_selfdistill.data.episode_reply import Reply
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.environments.environment import SessionLimits, ToolEnvironment, has_sessions
from megatron_selfdistill.environments.session_processes import SessionProcesses
from megatron_selfdistill.environments.tool_calls import (
    PARSERS,
    ToolCall,
    ToolCallError,
    glm,
    hermes,
    llama,
    schemas_of,
    tools_of,
    typed,
)

PROBLEM = tiny.problem("2 + 3", answer="5")


class Calculator:
    """Tools whose answer is right if it is the problem's."""

    def __init__(self, start: int = 0) -> None:
        self.memory = start

    def reset(self, problem: Problem, seed: int) -> str | None:
        """Begin with the problem."""
        self.answer = problem.answer
        return f" [{self.memory}]"

    def add(self, a: int, b: int = 0) -> int:
        """Add two numbers.

        Args:
            a: the first number
            b: the second number
        """
        self.memory = a + b
        return self.memory

    async def recall(self) -> dict[str, int]:
        """Return the last sum."""
        return {"sum": self.memory}

    def spell(self, text: str | None) -> str:
        """Spell a text.

        Args:
            text: the text
        """
        return "-".join(text or "")

    def divide(self, a: float, b: float) -> float:
        """Divide.

        Args:
            a: the dividend
            b: the divisor
        """
        return a / b

    def reward(self, response: str) -> float:
        """Reward the answer."""
        return float(response.endswith(str(self.answer)))


TOOLS = "add, divide, recall, spell"
CALLS = [ToolCall("add", {"a": 2, "b": 3}), ToolCall("recall", {})]
WRITTEN = {
    "hermes": 'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>\n'
    '<tool_call>\n{"name": "recall"}\n</tool_call>',
    "llama": '<|python_tag|>{"name": "add", "parameters": {"a": 2, "b": 3}}; {"name": "recall", "parameters": {}}',
    "glm": "I add.\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>2</arg_value>\n<arg_key>b</arg_key>\n"
    "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>recall\n</tool_call>",
}


@pytest.mark.parametrize("name", PARSERS)
def test_each_format_is_read_and_an_answer_calls_nothing(name):
    found = PARSERS[name](WRITTEN[name])
    calculator = Calculator()
    assert [ToolCall(call.name, typed(call, getattr(calculator, call.name))) for call in found] == CALLS
    assert PARSERS[name]("The sum is 5.") == []


@pytest.mark.parametrize(
    ("parser", "text", "message"),
    [
        (hermes, '<tool_call>{"name": "add"', "</tool_call>"),
        (hermes, "<tool_call>add(2)</tool_call>", "JSON, got 'add(2)'"),
        (hermes, '<tool_call>{"name": "add", "arguments": [2]}</tool_call>', "JSON"),
        (llama, '{"name": "add", "parameters": ', "JSON"),
        (llama, '{"name": "recall"} and then', "'and then'"),
        (glm, "<tool_call>add<arg_key>a</arg_key>2</tool_call>", "<arg_key>"),
        (glm, "<tool_call> </tool_call>", "<arg_key>"),
    ],
)
def test_a_call_that_cannot_be_read_is_said(parser, text, message):
    with pytest.raises(ToolCallError) as error:
        parser(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>echo" + "<arg_key>a" * 20_000 + "</tool_call>",
        "<tool_call>echo<arg_key>a" + "</arg_key><arg_value>" * 20_000 + "</tool_call>",
        "<tool_call>echo" + "<arg_key>a</arg_key>\n<arg_value>b</arg_value> " * 20_000 + "</tool_call>",
        "<tool_call>" * 20_000,
        '<tool_call>{"name": "echo"}</tool_call>' * 20_000,
        '{"name": "echo", "parameters": {}}; ' * 20_000,
        '{"name": ' * 20_000,
    ],
)
def test_no_text_of_a_model_costs_a_parser_more_than_a_time_proportional_to_its_length(text):
    """The texts have up to a million characters; a scan that is not linear takes minutes for some of them."""
    for parser in PARSERS.values():
        with contextlib.suppress(ToolCallError):
            parser(text)


def test_texts_become_what_a_tool_takes_and_other_arguments_are_named():
    calculator = Calculator()
    assert typed(ToolCall("add", {"a": "2", "b": 3}), calculator.add) == {"a": 2, "b": 3}
    assert typed(ToolCall("spell", {"text": "23"}), calculator.spell) == {"text": "23"}
    assert typed(ToolCall("add", {"a": "two"}), calculator.add) == {"a": "two"}
    for arguments, message in ({}, "missing a required argument: 'a'"), ({"a": 1, "c": 1}, "argument 'c'"):
        with pytest.raises(ToolCallError, match=f"^add: .*{message}"):
            typed(ToolCall("add", arguments), calculator.add)


def test_the_schemas_are_those_of_the_methods():
    assert list(tools_of(Calculator)) == ["add", "divide", "recall", "spell"]
    function = schemas_of(f"{__name__}.Calculator")[0]["function"]
    assert function["name"] == "add" and function["parameters"]["required"] == ["a"]
    types = {name: one["type"] for name, one in function["parameters"]["properties"].items()}
    assert types == {"a": "integer", "b": "integer"}


class Strange:
    """A tool whose results are no texts that a model could read."""

    def give(self, what: str) -> object:
        """Return or do what is asked for."""
        cycle: list[object] = []
        cycle.append(cycle)
        deep: list[object] = []
        for _ in range(100_000):
            deep = [deep]
        if what == "exit":
            sys.exit(0)
        results = {"set": {1}, "bytes": b"1", "cycle": cycle, "deep": deep, "large": 10**8000, "half": "\ud83d"}
        return results[what]

    def reward(self, response: str) -> float:
        """Reward nothing."""
        return 0.0


@pytest.mark.parametrize("what", ["set", "bytes", "cycle", "deep", "large", "half", "exit", "\ud83d"])
def test_a_result_that_no_model_can_read_is_an_error_for_the_model(what):
    made = ToolEnvironment(f"{__name__}.Strange")
    made.reset(PROBLEM, 0)
    reply = asyncio.run(made.step(called("give", what=what)))
    assert reply.text is not None and reply.text.startswith("Error: ") and reply.goes_on


def called(name: str, **arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.mark.parametrize(
    ("response", "reply"),
    [
        (called("add", a=2, b=3) + called("recall"), Reply('5\n{"sum": 5}', role="tool", done=False)),
        (called("spell", text="abc"), Reply("a-b-c", role="tool", done=False)),
        (called("reward"), Reply(f"Error: there is no tool 'reward': the tools are {TOOLS}", "tool", done=False)),
        (called("divide", a=1, b=0), Reply("Error: ZeroDivisionError: division by zero", "tool", done=False)),
        ("<tool_call>", Reply("Error: expected </tool_call> after each <tool_call>", "tool", done=False)),
        (f"<think>{called('add', a=2)}</think>It is 5", Reply(reward=1.0)),
        ("It is 6", Reply(reward=0.0)),
    ],
)
def test_a_session_answers_calls_and_rewards_the_answer(response, reply):
    made = ToolEnvironment(f"{__name__}.Calculator", options={"start": 7})
    assert has_sessions(ToolEnvironment) and made.reset(PROBLEM, 0) == " [7]"
    assert asyncio.run(made.step(response)) == reply
    assert made.close() is None


def test_a_process_plays_an_episode_with_tools():
    options = {"tools": f"{__name__}.Calculator", "parser": "glm"}
    pool = SessionProcesses("tools", options, SessionLimits(seconds=3600))
    try:
        assert pool.reset("a", PROBLEM, 0).text == " [0]"
        assert pool.step("a", WRITTEN["glm"]) == Reply('5\n{"sum": 5}', role="tool", done=False)
        assert pool.step("a", "5") == Reply(reward=1.0) and "a" not in pool
    finally:
        pool.close()
