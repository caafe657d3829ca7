# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the driver of guided pairs (pairs.py) and the processor in an engine (plugin/guided_processor.py) exchange."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_selfdistill.loss.target import Target

ROLES = ("anchor", "teacher")
"""The roles of the halves of a pair; the anchor is the student or, with target.anchor=reference, the reference."""
_EXTRA_ARG = "selfdistill_pair"


@dataclass(frozen=True)
class PairHalf:
    """One half of a pair, as the engine's processor sees it; it travels in ``SamplingParams.extra_args``."""

    pair: str
    """Name that both halves share, and no other request that the engine ever sees."""
    role: str
    """One of `ROLES`."""
    seed: int
    """Seed of the request, see `base.sample_seed`."""
    start: int
    """Number of tokens of the response that are in the prompt already."""
    max_tokens: int
    """Number of tokens that may still come."""
    stop: int
    """Token that ends this half when its partner is absent; one of its stop_token_ids."""
    target: Target
    """Target from which tokens are sampled."""
    greedy: bool
    """Whether each token is the most likely token instead of a sample."""

    def extra_args(self) -> dict[str, Any]:
        """Return the fields as JSON values, for ``SamplingParams.extra_args``."""
        return {_EXTRA_ARG: asdict(self)}

    @staticmethod
    def of(extra_args: Mapping[str, Any] | None) -> PairHalf | None:
        """Return the half that `extra_args` has encoded; None for a request that is no half.

        Raises ValueError for anything else.
        """
        fields = (extra_args or {}).get(_EXTRA_ARG)
        if fields is None:
            return None
        try:
            half = PairHalf(**{**fields, "target": Target(**fields["target"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"extra_args[{_EXTRA_ARG!r}] must hold the fields of PairHalf; {error}") from error
        if half.role not in ROLES:
            raise ValueError(f"the role of a half must be {' or '.join(ROLES)}, got {half.role!r}")
        return half


@dataclass(frozen=True)
class PairLog:
    """The record of the engine's processor about a pair whose halves have ended."""

    forced: list[int]
    """The number of tokens before a forced stop, of anchor and teacher; -1 for a half that ended by itself."""
    log_probs: np.ndarray
    """Log-probs ``[n, 3]`` float32 of each sampled token under the anchor, the teacher and the mix, in nats."""

    def to_json(self) -> dict[str, Any]:
        """Return the log as JSON values; the numbers are base64, since decimal text would be five times as long."""
        return {"forced": self.forced, "log_probs": base64.b64encode(self.log_probs.astype("<f4").tobytes()).decode()}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> PairLog:
        """Return the log that `to_json` has encoded.  Raises KeyError, TypeError or ValueError for anything else."""
        values = np.frombuffer(base64.b64decode(fields["log_probs"]), dtype="<f4")
        anchor, teacher = fields["forced"]
        if type(anchor) is not int or type(teacher) is not int:
            raise TypeError("the numbers of tokens before a forced stop must be integers")
        return PairLog([anchor, teacher], values.reshape(-1, 3))
