# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Resources servers of NeMo Gym, whose tools are endpoints, as environments with sessions (docs/environments.md)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import httpx

from megatron_selfdistill.config import function_named
from megatron_selfdistill.data.thoughts import final_part
from megatron_selfdistill.environments import Reply
from megatron_selfdistill.environments.tool_calls import PARSERS, Parser, ToolCall, ToolCallError

CALL = 'Call a tool with <tool_call>{"name": .., "arguments": {..}}</tool_call>'
FIELDS = {"id": "", "created_at": 0, "model": "", "object": "response", "tools": [], "tool_choice": "auto"}


class NemoGym:
    """An environment whose session is one of a resources server; a response without a call gets the reward."""

    def __init__(self, url: str, data: str, parser: str = "hermes") -> None:
        """``url``: the server.  ``data``: its data set.  ``parser``: the format of a call, as for tools."""
        self.url, self.rows = url, [json.loads(line) for line in Path(data).read_bytes().splitlines()]
        self.parse: Parser = function_named("environment.options.parser", parser, PARSERS)

    def reset(self, problem: Any, seed: int) -> None:
        """Begin a session of the server for the problem's row; a cookie names it."""
        self.row, self.output = self.rows[int(problem.id)], list[dict[str, Any]]()
        self.names = [tool["name"] for tool in self.row["responses_create_params"].get("tools") or ()]
        self.client = httpx.Client(base_url=self.url, timeout=None, trust_env=False)
        self.client.post("/seed_session", json=self.row).raise_for_status()

    def step(self, response: str) -> Reply:
        """Return what the called tools answer, or the reward of all that was said."""
        text = final_part(response).strip()
        try:
            if calls := self.parse(text) if self.names else []:
                return Reply("\n".join(map(self.answer, calls)), role="tool", done=False)
        except ToolCallError as error:
            return Reply(f"Error: {error}", role="tool", done=False)
        content = [{"type": "output_text", "text": text, "annotations": []}]
        self.output.append({"type": "message", "id": "", "role": "assistant", "content": content})
        said = FIELDS | {"parallel_tool_calls": True, "output": self.output}
        verified = self.client.post("/verify", json=self.row | {"response": said})
        return Reply(reward=verified.raise_for_status().json()["reward"])

    def close(self) -> None:
        """Close the connection; the protocol has no end of a session."""
        self.client.close()

    def answer(self, call: ToolCall) -> str:
        """Return what the tool's endpoint answers, also an error, and keep call and answer for /verify."""
        if call.name not in self.names:  # /verify is an endpoint, too
            return f"Error: there is no tool {call.name!r}: the tools are {', '.join(self.names)}"
        text, key = self.client.post(f"/{call.name}", json=call.arguments).text, {"call_id": str(len(self.output))}
        made = {"type": "function_call", "name": call.name, "arguments": json.dumps(call.arguments)}
        self.output += [made | key, {"type": "function_call_output", "output": text} | key]
        return text


def write_problems(path: Path, data: Path, field: str | None = None) -> None:
    """Write the rows as problems: the number is the id, ``field`` the hint, and the first message shows the tools."""
    with path.open("w") as file:
        for number, row in enumerate(map(json.loads, data.read_bytes().splitlines())):
            asked, hint = row["responses_create_params"], str(row[field]) if field else None
            given = [{"role": "user", "content": asked["input"]}] if isinstance(asked["input"], str) else asked["input"]
            messages = [said | {"role": said["role"].replace("developer", "system")} for said in given]
            if tools := asked.get("tools"):
                messages[0]["content"] = "\n".join([messages[0]["content"], "Tools:", *map(json.dumps, tools), CALL])
            file.write(f"{json.dumps({'id': str(number), 'messages': messages, 'solution': hint})}\n")


if __name__ == "__main__":  # problems.jsonl example.jsonl expected_answer
    write_problems(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
