# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What rank 0 asks of the process that speaks HTTP for it, and the words for the answers.

Rank 0 sends one part, a pickle of (number, `ServerAccess`, task) with one of the tasks below, and gets one message per
number.  Its first part is JSON: the number, with the ``error`` and whether the server has ``refused`` the request, or
with what the task says.  Numbers are from 1 on; a message with the number 0 says that a server has shown signs of life.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_selfdistill.rollout.vllm.engine_output import EngineRequest

MAX_IN_FLIGHT = 512
"""Number of requests for responses that one server works on at once; further requests wait in the process."""


@dataclass(frozen=True)
class ServerAccess:
    """One client of one server; its requests share the memory of the server's signs of life."""

    key: int
    """A number that no other client of rank 0's process has."""
    address: str
    """The server's address, without a slash at its end."""
    token: str = field(repr=False)
    """The secret that is sent with every request, unless it is empty."""
    timeout_s: float
    """Seconds after which a silent server counts as dead."""


@dataclass(frozen=True)
class Ask:
    """A request other than for a response.

    The answer has ``status`` and ``media_type``, and its body as the second part.
    """

    method: str
    path: str
    body: Any = None
    """A JSON value, or None for no body."""
    timeout_s: float | None = None
    """Seconds in place of those of `ServerAccess`."""


@dataclass(frozen=True)
class Generate:
    """A request for a response.

    The answer has the fields of `EngineOutput` but the numbers of tokens, which are the parts behind the first: token
    ids in int32, log-probs in float32, log-probs of the prompt in float32.
    """

    request: EngineRequest
    model: str | None
    """The name of the adapter that takes part, or None."""
    vocab_size: int
    """Number of the model's tokens."""


@dataclass(frozen=True)
class Drop:
    """The requests of these numbers have no reader any more, and get no answer."""

    numbers: Sequence[int]


@dataclass(frozen=True)
class Leave:
    """A signal has asked the run to end, or counts no longer."""

    patience_s: float | None
    """Seconds of silence that are enough from now on; None for those of each request."""


Task = Ask | Generate | Drop | Leave
