# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A resources server of NeMo Gym that plays a game: a session has a digit, which a tool compares with guesses.

The Python of NeMo Gym runs this file, which imports nothing of this project.  It can serve another class, by its path.
"""

from __future__ import annotations

import pkgutil
import sys

import uvicorn
from fastapi import FastAPI, Request
from nemo_gym.base_resources_server import (
    BaseResourcesServerConfig,
    BaseSeedSessionRequest,
    BaseSeedSessionResponse,
    BaseVerifyRequest,
    BaseVerifyResponse,
    SimpleResourcesServer,
)
from nemo_gym.config_types import BaseServerConfig
from nemo_gym.server_utils import SESSION_ID_KEY, ServerClient
from omegaconf import OmegaConf
from pydantic import BaseModel, Field


class Seed(BaseSeedSessionRequest):
    digit: int


class Guess(BaseModel):
    digit: int


class Told(BaseModel):
    told: str


class Numbers(SimpleResourcesServer):
    config: BaseResourcesServerConfig
    digits: dict[str, int] = Field(default_factory=dict)
    guesses: dict[str, int] = Field(default_factory=dict)

    def setup_webserver(self) -> FastAPI:
        app = super().setup_webserver()
        app.post("/guess")(self.guess)
        return app

    async def seed_session(self, request: Request, body: Seed) -> BaseSeedSessionResponse:
        self.digits[request.session[SESSION_ID_KEY]] = body.digit
        return BaseSeedSessionResponse()

    async def guess(self, request: Request, body: Guess) -> Told:
        session = request.session[SESSION_ID_KEY]
        self.guesses[session] = self.guesses.get(session, 0) + 1
        return Told(told="right" if body.digit == self.digits[session] else "wrong")

    async def verify(self, request: Request, body: BaseVerifyRequest) -> BaseVerifyResponse:
        """Reward the last message if it is the digit, the less the more guesses there were."""
        session = request.session[SESSION_ID_KEY]
        right = body.response.output_text.strip() == str(self.digits[session])
        return BaseVerifyResponse(**body.model_dump(), reward=right / (1 + self.guesses.get(session, 0)))


if __name__ == "__main__":
    address, path = {"host": "127.0.0.1", "port": int(sys.argv[1])}, sys.argv[2:]
    kind: type[SimpleResourcesServer] = pkgutil.resolve_name(path[0]) if path else Numbers
    client = ServerClient(head_server_config=BaseServerConfig(**address), global_config_dict=OmegaConf.create())
    config = kind.model_fields["config"].annotation(**address, entrypoint="", name="numbers", domain="other")
    uvicorn.run(kind(config=config, server_client=client).setup_webserver(), **address, log_level="error")
