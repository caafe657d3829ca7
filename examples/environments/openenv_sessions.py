# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
r"""Environments of OpenEnv, which a server plays, as an environment with sessions.

    export PYTHONPATH=examples
    pip install openenv-core
    selfdistill environment.name=environments.openenv_sessions.OpenEnv environment.max_turns=10 \
        environment.options.url=http://host:8000 environment.options.shown=text ...

Each episode is a session of the server.  All episodes of a problem play the same task, whose seed follows from the id.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

from openenv.core.generic_client import GenericEnvClient

from megatron_selfdistill.environments import Reply


class OpenEnv:
    """An environment whose session is one of an OpenEnv server."""

    def __init__(self, url: str, field: str = "message", shown: str | None = None) -> None:
        """``url``: the server.  ``field``: the field of an action that takes the response.

        ``shown``: the field of an observation that the model reads; None shows all fields as JSON.
        """
        self.url, self.field, self.shown = url, field, shown

    def reset(self, problem: Any, seed: int) -> str:
        """Begin a session with the problem's seed, and return its first observation.

        The client answers the server's pings in a thread of its own, while the model writes.
        """
        self.client = GenericEnvClient(base_url=self.url).sync()
        result = self.client.reset(seed=zlib.crc32(problem.id.encode()))
        return f"\n\n{self.text(result.observation)}"

    def step(self, response: str) -> Reply:
        """Return the observation after the response, with the server's reward."""
        result = self.client.step({self.field: response})
        return Reply(self.text(result.observation), reward=float(result.reward or 0), done=bool(result.done))

    def close(self) -> None:
        """End the session of the server."""
        self.client.close()

    def text(self, observation: dict[str, Any]) -> str:
        """Return what the model reads of an observation."""
        return json.dumps(observation) if self.shown is None else str(observation[self.shown])
