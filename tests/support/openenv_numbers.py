# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A server of OpenEnv that plays a game: three tries to guess a digit, which the seed decides."""

from __future__ import annotations

import random
import sys
from typing import Any

import uvicorn
from openenv.core.env_server import Environment, create_fastapi_app
from openenv.core.env_server.types import Action, Observation, State

TRIES = 3


def digit(seed: int) -> int:
    return random.Random(seed).randrange(10)


class Guess(Action):
    message: str


class Told(Observation):
    text: str = ""


class Numbers(Environment[Guess, Told, State]):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Told:
        self.number, self.tries = digit(seed or 0), 0
        return Told(text="Guess a digit.")

    def step(self, action: Guess, timeout_s: float | None = None, **_: Any) -> Told:
        self.tries += 1
        right = action.message.strip() == str(self.number)
        return Told(text="right" if right else "wrong", reward=float(right), done=right or self.tries == TRIES)

    @property
    def state(self) -> State:
        return State()


if __name__ == "__main__":
    app = create_fastapi_app(Numbers, Guess, Told, max_concurrent_envs=64)
    uvicorn.run(app, port=int(sys.argv[1]), log_level="error")
