# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The section ``environment`` of the schema: what replies to responses, so that a problem becomes an episode."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any

from megatron_selfdistill.config.schema.field_checks import check_fields, require, require_address
from megatron_selfdistill.config.schema.ranges import (
    MAX_WAIT,
    NonNegativeInt,
    OneOf,
    PositiveInt,
    Text,
    above,
    at_least,
    at_most,
)


@dataclass(frozen=True)
class EnvironmentConfig:
    """The environment that replies to the sampled responses, with texts and rewards."""

    name: Annotated[str, OneOf(("none", "http"), or_dotted=True)] = "none"
    """The environment: none, http (an endpoint for chat completions that plays the environment) or the dotted path of a
    class, or of a function that makes an environment, such as package.module.Class.  With an environment, the reward of
    a response is the reward of the reply to it, unless policy.reward names a function."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the class or the function that name names."""
    max_turns: PositiveInt = 1
    """Greatest number of responses in an episode.  1 takes rewards and feedback from the environment and shows the
    student no reply."""
    url: Text | None = None
    """Address of the endpoint of name=http, such as http://host:8000/v1; requests go to url/chat/completions."""
    model: Text | None = None
    """Name of the model in requests to the endpoint; null sends none."""
    api_key: Text | None = field(default=None, repr=False)
    """Key that requests to the endpoint carry as a bearer token; null sends none.  Write it as
    ${oc.env:ENVIRONMENT_API_KEY}: the files of the run show this text even for a key that is written out."""
    timeout_s: Annotated[float, above(0), at_most(MAX_WAIT)] = 60.0
    """Seconds after which a request without a complete answer counts as failed."""
    retries: NonNegativeInt = 3
    """Number of further attempts after a request has failed: no connection, no answer in time, or a status of 429 or of
    500 and above."""
    concurrency: Annotated[int, at_least(1), at_most(2**16)] = 16
    """Number of requests to the endpoint that a rank sends at the same time."""

    def __post_init__(self) -> None:
        check_fields("environment", self)
        if self.name == "none":
            self._check_unset()
        self._check_endpoint()

    @property
    def exists(self) -> bool:
        """Whether there is an environment."""
        return self.name != "none"

    def _check_unset(self) -> None:
        for one in fields(self):
            default = {} if one.default is MISSING else one.default
            require(
                getattr(self, one.name) == default,
                f"environment.{one.name} is a setting of an environment, but environment.name is none: set "
                f"environment.name, or unset environment.{one.name}",
            )

    def _check_endpoint(self) -> None:
        url = self.url
        if url is not None:
            require_address("environment.url", url, "http://host:8000/v1")
        require(
            (url is not None) == (self.name == "http"),
            "environment.url must be an address such as http://host:8000/v1 for environment.name=http, and null "
            f"otherwise, got {url!r} for environment.name={self.name}",
        )
        require(
            self.name != "http" or not self.options,
            "environment.options are the arguments of a class of yours, but environment.name=http names none: unset "
            "environment.options",
        )
