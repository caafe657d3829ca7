# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Environments of verifiers 0.1 as environments with sessions, and their data sets as problems.

    pip install 'verifiers[all]<0.2' && python -m environments.verifiers_sessions problems.jsonl my_environment
    selfdistill environment.name=environments.verifiers_sessions.Verifiers environment.options.name=my_environment ...

The environment runs its own loop, with stop conditions and rubric; its client is the model of this run.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import verifiers
from verifiers.clients import OpenAIChatCompletionsClient
from verifiers.types import Response, ResponseMessage

from megatron_selfdistill.environments import Reply


class Verifiers:
    """An environment whose session is one rollout of verifiers; the last response gets the rollout's reward."""

    def __init__(self, name: str, **options: Any) -> None:
        """``name`` and ``options``: those of ``verifiers.load_environment``."""
        self.theirs = verifiers.load_environment(name, **options)

    async def reset(self, problem: Any, seed: int) -> None:
        """Start the rollout of the problem's row, up to its first question, which is the problem."""
        self.asked, self.said = asyncio.Queue[Any](), asyncio.Queue[str]()
        row = self.theirs.get_dataset()[int(problem.id)]
        self.rollout = asyncio.create_task(self.theirs.run_rollout(row, Asked(self), "student", {}))
        self.length = len(await self.next() or ())

    async def step(self, response: str) -> Reply:
        """Answer the question; return what the environment says next, or the reward."""
        await self.said.put(response)
        prompt = await self.next()
        if prompt is None:
            ended = self.rollout.result()
            return Reply(reward=ended["reward"] or 0.0, failure=str(ended["error"]) if ended["error"] else None)
        shown, self.length = [str(message.content) for message in prompt[self.length + 1 :]], len(prompt)
        return Reply("\n".join(shown), done=False)

    def close(self) -> None:
        """Do nothing: the rollout ends with the session's process."""

    async def next(self) -> Any:
        """Return the messages of the next question; None after the end of the rollout."""
        question = asyncio.ensure_future(self.asked.get())
        await asyncio.wait({question, self.rollout}, return_when=asyncio.FIRST_COMPLETED)
        return question.result() if question.done() else None


class Asked(OpenAIChatCompletionsClient):
    """The client of a rollout, which waits for the model of this run."""

    def __init__(self, session: Verifiers) -> None:
        self.session = session

    async def get_response(self, prompt: Any, model: str, *_: Any, **__: Any) -> Response:
        """Return the next response of the session."""
        await self.session.asked.put(prompt)
        said = ResponseMessage(content=await self.session.said.get(), finish_reason="stop", is_truncated=False)
        return Response(id="", created=0, model=model, message=said)


def write_problems(path: Path, name: str) -> None:
    """Write the rows of an environment's data set as problems, whose ids are the rows and whose hints the answers."""
    rows = enumerate(verifiers.load_environment(name).get_dataset())
    records = ({"id": str(i), "messages": row["prompt"], "solution": row["answer"]} for i, row in rows)
    path.write_text("".join(f"{json.dumps(one | {'answer': one['solution']})}\n" for one in records))


if __name__ == "__main__":
    write_problems(Path(sys.argv[1]), sys.argv[2])
