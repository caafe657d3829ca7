# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The interface of one vLLM engine, in this process or behind HTTP, and the translation of requests to vLLM's."""

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
    """Token ids of the sequence so far."""
    sampling: Mapping[str, Any]
    """Arguments of vLLM's ``SamplingParams``."""


@dataclass(frozen=True)
class EngineOutput:
    """The tokens with which an engine has continued one sequence."""

    token_ids: list[int]
    """Token ids, including the stop token that ended the sequence, if one did."""
    log_probs: list[float]
    """Log softmax of the model's logits at temperature 1 before any processor, per token, in nats."""
    finish_reason: str
    """The reason for the end of the sequence: stop or length."""
    weight_version: int | None
    """Version of the oldest weights that generated a token, as the engine reports it; None before the first weights."""


WORKER_EXTENSION = "megatron_selfdistill.rollout.vllm.plugin.worker.WorkerExtension"
"""Class by which an engine's workers are extended, for `Engine.call`."""


def oldest_version(versions: Iterable[str]) -> int | None:
    """Return the oldest of the versions of weights that generated a response.

    None where no version is reported, or where one of them is not a number.
    """
    reported = list(versions)
    return min(map(int, reported)) if reported and all(version.isdecimal() for version in reported) else None


class Engine(Protocol):
    """One vLLM engine: ``engine_tp`` devices that hold the model once."""

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineOutput]:
        """Return one output per request, in order.

        Raises `EngineError`, with nothing returned, if an output is missing.
        """
        ...

    def call(self, method: str, *args: Any) -> Any:
        """Call the worker extension's method of that name (plugin/worker.py) and return the result of the first worker.

        Arguments and result are JSON values.
        """
        ...


def whole_prompts(max_model_len: int | None) -> dict[str, Any]:
    """Return engine arguments with which prompts are read whole, for an engine on a CPU.

    There vLLM fails on a prompt that is read in parts and has a seed: torch's generators on a CPU have no offset that
    vLLM could restore.
    """
    budget = {} if max_model_len is None else {"max_num_batched_tokens": max(2048, max_model_len)}
    return {"enable_chunked_prefill": False, **budget}


def engine_request(request: Request, params: SamplingParams) -> EngineRequest:
    """Return ``request`` as vLLM takes it: its random numbers depend on the seed alone, not on the batch."""
    sampling = {
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "seed": request.seed % 2**63,  # vLLM's seeds are signed
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": True,  # only the run's own stop tokens end a response
        "logprobs": 0,
        "detokenize": False,
    }
    return EngineRequest(list(request.prompt), sampling)


def response_of(output: EngineOutput, params: SamplingParams) -> Response:
    """Return ``output`` as a `Response`.

    vLLM reports the log-prob at temperature 1 only, so ``sampled_log_probs`` are NaN where tokens are sampled from
    another distribution (a temperature, top_k or top_p).
    """
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
