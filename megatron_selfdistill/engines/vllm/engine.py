# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What vLLM engines have in common, in this process or behind HTTP: arguments, requests, and responses to believe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_selfdistill.errors import EngineError, first_few
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams

WORKER_EXTENSION = "megatron_selfdistill.engines.vllm.plugin.worker.WorkerExtension"
"""Class by which an engine's workers are extended, for `VllmServer.call_all`."""

# The largest log-prob of a token that an engine may state, in nats: the rounding of a log-softmax in float32, whose
# logits may be some thousands.
_LOG_PROB_ROUNDING = 1e-3
_LEAST_LOG_PROB = -9999.0  # what a vLLM server states in place of NaN and of minus infinity


def cpu_engine_args(hf_config: Mapping[str, Any], max_model_len: int | None) -> dict[str, Any]:
    """Return engine arguments for an engine on a CPU and the model of a config.json.

    Prompts are read whole: vLLM fails on a prompt that is read in parts and has a seed, because torch's generators on a
    CPU have no offset that vLLM could restore.  For latent attention, vLLM's attention for a CPU knows no float32, and
    its rotary kernel for a CPU rotates the queries wrongly (0.32), so that the engine takes neither.
    """
    budget = {} if max_model_len is None else {"max_num_batched_tokens": max(2048, max_model_len)}
    arguments: dict[str, Any] = {"enforce_eager": True, "enable_chunked_prefill": False, **budget}
    if hf_config.get("kv_lora_rank"):
        arguments |= {"attention_backend": "CPU_MLA", "compilation_config": {"custom_ops": ["none"]}}
    return arguments


@dataclass(frozen=True)
class EngineRequest:
    """One sequence that an engine is to continue."""

    token_ids: list[int]
    """Token ids of the sequence so far."""
    sampling: Mapping[str, Any]
    """Arguments of vLLM's ``SamplingParams``."""


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


@dataclass(frozen=True)
class StatedResponse:
    """The parts of a response as an engine states them; `possible_response` checks them."""

    token_ids: Sequence[int]
    log_probs: Sequence[float]
    """One log-prob per token, in nats."""
    finish_reason: str
    """vLLM's word for the end of the response."""
    weight_versions: Sequence[tuple[str, int, int]]
    """Version, first token and end of each span, as vLLM reports them."""


def stated_in_json(answer: Any) -> StatedResponse:
    """Return the response in ``answer``, the JSON of a vLLM server.

    Raises: LookupError, TypeError, AttributeError, ValueError or OverflowError for an answer of another form.
    """
    [choice] = answer["choices"]
    token_ids = [_integer(token) for token in choice["token_ids"]]
    content = choice["logprobs"]["content"]
    logged = [_integer(token["token_id"]) for token in content]
    numbers = [token["logprob"] for token in content]
    log_probs = [number if type(number) is float else float(_integer(number)) for number in numbers]
    spans = [
        (str(span["version"]), _integer(span["start"]), _integer(span["end"]))
        for span in choice["weight_versions"] or []
    ]
    if logged != token_ids:
        raise ValueError(f"got {len(token_ids)} tokens and {len(log_probs)} log-probs, expected a log-prob per token")
    return StatedResponse(token_ids, log_probs, str(choice["finish_reason"]), spans)


def _integer(value: Any) -> int:
    """Return ``value``; raise TypeError unless it is an integer, which a boolean and 1.0 are not."""
    if type(value) is not int:
        raise TypeError(f"expected an integer, got {type(value).__name__}")
    return value


def stated_in_process(output: Any) -> StatedResponse:
    """Return vLLM's ``RequestOutput`` of one sequence as its engine states it."""
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    log_probs = [by_token[token].logprob for token, by_token in zip(tokens, completion.logprobs, strict=True)]
    spans = [(span.version, span.start, span.end) for span in completion.weight_versions or ()]
    return StatedResponse(tokens, log_probs, completion.finish_reason, spans)


def possible_response(request: EngineRequest, stated: StatedResponse, vocab_size: int, who: str) -> Response:
    """Return what an engine has stated about ``request`` as a response, if a model can have generated it.

    ``vocab_size``: number of the model's tokens, without those that pad its output layer.  vLLM reports log-probs at
    temperature 1 only, so that ``sampled_log_probs`` are NaN if tokens are sampled from another distribution (a
    temperature, top_k or top_p).
    Raises: `EngineError`, which begins with ``who``, for an end that ``request`` does not allow, token ids outside of
    the vocabulary, log-probs that are not finite or above 0, and versions of other tokens.
    """
    sampling, token_ids, log_probs = request.sampling, list(stated.token_ids), list(stated.log_probs)
    _require_end(stated, sampling, who)
    strange = [token for token in token_ids if not 0 <= token < vocab_size]
    if strange:
        raise EngineError(
            f"{who} returned the token ids {_shown(strange)}, expected 0 to {vocab_size - 1}: is it an engine of this "
            "run's model and tokenizer?"
        )
    wrong = [value for value in log_probs if not _LEAST_LOG_PROB < value <= _LOG_PROB_ROUNDING]
    if wrong:
        raise EngineError(
            f"{who} returned the log-probs {_shown(wrong)}, expected numbers of at most 0, above {_LEAST_LOG_PROB:g} "
            "(a server writes this number for NaN): are its weights whole?"
        )
    temperature = sampling.get("temperature", 1.0)
    if temperature == 0:
        sampled = [0.0] * len(token_ids)
    elif temperature == 1 and sampling.get("top_k", 0) == 0 and sampling.get("top_p", 1.0) == 1:
        sampled = log_probs
    else:
        sampled = [math.nan] * len(token_ids)
    version, spans = _versions_of(stated.weight_versions, len(token_ids), who)
    return Response(token_ids, log_probs, sampled, stated.finish_reason, weight_version=version, weight_spans=spans)


def _versions_of(
    reported: Sequence[tuple[str, int, int]], num_tokens: int, who: str
) -> tuple[int | None, list[tuple[int, int]]]:
    """Return the oldest of the weights that generated a response, and the spans of several versions.

    The oldest version is None if no version is reported, or where one of them is not a number; the spans are empty
    there, and where one version generated all tokens.
    Raises: `EngineError` where spans do not cover the ``num_tokens`` tokens once, in order.
    """
    places = [(start, end) for _, start, end in reported]
    starts, ends = [start for start, _ in places], [end for _, end in places]
    if places and ([*starts, num_tokens] != [0, *ends] or any(start > end for start, end in places)):
        raise EngineError(
            f"{who} stated the versions of its weights for the tokens {_shown([f'{a} to {b}' for a, b in places])}, "
            f"expected spans that cover the {num_tokens} tokens of the response once, in order"
        )
    named = [(version, end - start) for version, start, end in reported if end > start]
    if not named or not all(version.isdecimal() for version, _ in named):
        return None, []
    spans = [(int(version), num_tokens) for version, num_tokens in named]
    return min(version for version, _ in spans), spans if len(spans) > 1 else []


def _require_end(stated: StatedResponse, sampling: Mapping[str, Any], who: str) -> None:
    """Raise `EngineError` unless a response has a length and an end that ``sampling`` allows."""
    count, reason = len(stated.token_ids), stated.finish_reason
    longest, stops = sampling.get("max_tokens", count), sampling.get("stop_token_ids")
    last = stated.token_ids[-1] if count else None
    ends = {"length": count == longest, "stop": not stops or last in stops}
    if not 0 < count <= longest or len(stated.log_probs) != count or not ends.get(reason):
        raise EngineError(
            f"{who} ended a response with {str(reason)[:40]!r}, {count} tokens, the last {last}, and "
            f"{len(stated.log_probs)} log-probs; expected 1 to {longest} tokens with a log-prob each, and stop after "
            f"one of the stop tokens {_shown(stops or ())}, or length with all tokens (is --max-model-len too small?)"
        )


def _shown(values: Sequence[object]) -> str:
    return first_few([str(value)[:40] for value in values], ", ")
