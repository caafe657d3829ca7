# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What is asked of one vLLM engine, in this process or behind HTTP, and how one of our requests becomes one of its."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_selfdistill.errors import EngineError as EngineError
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams


@dataclass(frozen=True)
class EngineRequest:
    """One sequence that an engine is to continue."""

    token_ids: list[int]
    sampling: Mapping[str, Any]
    """Arguments of vLLM's ``SamplingParams``."""


@dataclass(frozen=True)
class EngineOutput:
    """One continuation."""

    token_ids: list[int]
    """With the stop token, where one ended it."""
    log_probs: list[float]
    """Per token, nats: log softmax of the model's logits at temperature 1, before any processor."""
    finish_reason: str
    """stop or length."""
    weight_version: int | None
    """What the engine says of the weights that wrote it; None before the first weights arrived."""


WORKER_EXTENSION = "megatron_selfdistill.rollout.vllm.plugin.worker.WorkerExtension"
"""What an engine's workers are extended by, for `Engine.call`."""


def oldest_version(versions: Iterable[str]) -> int | None:
    """The oldest of the versions of weights that wrote a response; None where none is told, or one is no number."""
    told = list(versions)
    return min(map(int, told)) if told and all(version.isdecimal() for version in told) else None


class Engine(Protocol):
    """One vLLM engine: ``engine_tp`` devices that hold the model once."""

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineOutput]:
        """One output per request, in order.  Raises `EngineError`, with nothing returned, if one is missing."""
        ...

    def call(self, method: str, *args: Any) -> Any:
        """What the method of that name of the worker extension (plugin/worker.py) returns, on the engine's first
        worker; arguments and result are JSON values."""
        ...


def whole_prompts(max_model_len: int | None) -> dict[str, Any]:
    """Arguments of an engine on a CPU, where vLLM fails on a prompt that is read in parts and has a seed: torch's
    generators have no offset there that it could set back."""
    budget = {} if max_model_len is None else {"max_num_batched_tokens": max(2048, max_model_len)}
    return {"enable_chunked_prefill": False, **budget}


def engine_request(request: Request, params: SamplingParams) -> EngineRequest:
    """``request`` as vLLM takes it: its random numbers depend on the stream alone, not on the batch."""
    sampling = {
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "seed": request.seed % 2**63,  # vLLM's seeds are signed
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": True,  # only what the run calls a stop token ends a response
        "logprobs": 0,
        "detokenize": False,
    }
    return EngineRequest(list(request.prompt), sampling)


def response_of(output: EngineOutput, params: SamplingParams) -> Response:
    """``output`` as a `Response`.  vLLM tells the log-prob at temperature 1 only, so where the distribution drawn from
    is another (a temperature, top_k, top_p) ``sampled_log_probs`` are NaN."""
    if params.temperature == 0:
        sampled = [0.0] * len(output.token_ids)
    elif params.temperature == 1 and params.top_k == 0 and params.top_p == 1:
        sampled = list(output.log_probs)
    else:
        sampled = [math.nan] * len(output.token_ids)
    return Response(
        token_ids=list(output.token_ids),
        log_probs=list(output.log_probs),
        sampled_log_probs=sampled,
        finish_reason=output.finish_reason,
        weight_version=output.weight_version,
    )
