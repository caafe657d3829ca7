# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The interface of one vLLM engine, in this process or behind HTTP, and the translation of requests to vLLM's."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from megatron_selfdistill.errors import EngineError as EngineError
from megatron_selfdistill.errors import first_few
from megatron_selfdistill.rollout.base import FINISH_REASONS, Request, Response, SamplingParams

LOG_PROB_ROUNDING = 1e-3
"""The largest log-prob of a token that an engine may state, in nats: the rounding of a log-softmax in float32, whose
logits may be some thousands."""
_LEAST_LOG_PROB = -9999.0  # what a vLLM server states in place of NaN and of minus infinity


@dataclass(frozen=True)
class EngineRequest:
    """One sequence that an engine is to continue."""

    token_ids: list[int]
    """Token ids of the sequence so far."""
    sampling: Mapping[str, Any]
    """Arguments of vLLM's ``SamplingParams``."""
    adapted: bool = True
    """Whether the run's adapters take part, where the engine has any."""


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
    prompt_log_probs: list[float] = field(default_factory=list)
    """Log-probs of the sequence's own tokens but the first, as ``log_probs``; empty without ``prompt_logprobs``."""
    weight_spans: Sequence[tuple[int, int]] = ()
    """Version and number of tokens of each part, as in `Response`."""


WORKER_EXTENSION = "megatron_selfdistill.rollout.vllm.plugin.worker.WorkerExtension"
"""Class by which an engine's workers are extended, for `Engine.call`."""


def versions_of(
    reported: Iterable[tuple[str, int, int]], num_tokens: int, who: str
) -> tuple[int | None, list[tuple[int, int]]]:
    """Return the oldest of the weights that generated a response, and the spans of several versions.

    ``reported``: the version, the first token and the end of each span, as vLLM reports them.
    The oldest version is None where no version is reported, or where one of them is not a number; the spans are empty
    there, and where one version generated all tokens.
    Raises: `EngineError`, which begins with ``who``, where spans do not cover the ``num_tokens`` tokens once, in order.
    """
    reported = list(reported)
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


class Engine(Protocol):
    """One vLLM engine: ``engine_tp`` devices that hold the model once."""

    @property
    def name(self) -> str:
        """The name of the engine in messages, with its address or its rank."""
        ...

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineOutput]:
        """Return one output per request, in order.

        Raises `EngineError`, with nothing returned, if an output is missing or cannot be true (`possible_output`).
        """
        ...

    def call(self, method: str, *args: Any) -> Any:
        """Call the worker extension's method of that name (plugin/worker.py) and return the result of the first worker.

        Arguments and result are JSON values.
        """
        ...


def cpu_engine_args(hf_config: Mapping[str, Any], max_model_len: int | None) -> dict[str, Any]:
    """Return engine arguments for an engine on a CPU and the model of a config.json.

    Prompts are read whole: vLLM fails on a prompt that is read in parts and has a seed, because torch's generators on a
    CPU have no offset that vLLM could restore.  For latent attention, vLLM's attention for a CPU knows no float32, and
    its rotary kernel for a CPU rotates the queries wrongly (0.32), so that the engine takes neither.
    """
    budget = {} if max_model_len is None else {"max_num_batched_tokens": max(2048, max_model_len)}
    arguments: dict[str, Any] = {"enable_chunked_prefill": False, **budget}
    if hf_config.get("kv_lora_rank"):
        arguments |= {"attention_backend": "CPU_MLA", "compilation_config": {"custom_ops": ["none"]}}
    return arguments


def engine_request(request: Request, params: SamplingParams) -> EngineRequest:
    """Return ``request`` as vLLM takes it: its random numbers depend on the seed alone, not on the batch."""
    sampling = {
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "seed": _seed(request) % 2**63,  # vLLM's seeds are signed
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": True,  # only the run's own stop tokens end a response
        "logprobs": 0,
        "detokenize": False,
    }
    return EngineRequest(list(request.prompt), sampling)


def _seed(request: Request) -> int:
    """Return the seed of a request; each continuation of a response has another one, and so other random numbers."""
    if not request.begun:
        return request.seed
    name = f"{request.seed}\0{request.begun}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def possible_output(
    request: EngineRequest,
    vocab_size: int,
    who: str,
    *,
    token_ids: list[int],
    log_probs: list[float],
    finish_reason: str,
    versions: Iterable[tuple[str, int, int]],
    prompt_log_probs: list[float],
) -> EngineOutput:
    """Return what an engine has stated about ``request`` as its output, if a model can have generated it.

    ``vocab_size``: number of the model's tokens, without those that pad its output layer.  ``versions``: as for
    `versions_of`; the other arguments are the fields of `EngineOutput`.
    Raises: `EngineError`, which begins with ``who``, for an end that ``request`` does not allow, token ids outside of
    the vocabulary, log-probs that are not finite or above 0, and versions of other tokens.
    """
    output = EngineOutput(token_ids, log_probs, finish_reason, None, prompt_log_probs)
    _require_end(output, request.sampling, who)
    strange = [token for token in token_ids if not 0 <= token < vocab_size]
    if strange:
        raise EngineError(
            f"{who} returned the token ids {_shown(strange)}, expected 0 to {vocab_size - 1}: is it an engine of this "
            "run's model and tokenizer?"
        )
    wrong = [value for value in (*log_probs, *prompt_log_probs) if not _LEAST_LOG_PROB < value <= LOG_PROB_ROUNDING]
    if wrong:
        raise EngineError(
            f"{who} returned the log-probs {_shown(wrong)}, expected numbers of at most 0, above {_LEAST_LOG_PROB:g} "
            "(a server writes this number for NaN): are its weights whole?"
        )
    version, spans = versions_of(versions, len(token_ids), who)
    return replace(output, weight_version=version, weight_spans=spans)


def _require_end(output: EngineOutput, sampling: Mapping[str, Any], who: str) -> None:
    """Raise `EngineError` unless a response has a length and an end that ``sampling`` allows."""
    token_ids, stops = output.token_ids, sampling.get("stop_token_ids")
    longest = sampling.get("max_tokens", len(token_ids))
    if output.finish_reason not in FINISH_REASONS:
        raise EngineError(f"{who} ended a response with {str(output.finish_reason)[:40]!r}, expected stop or length")
    if not 0 < len(token_ids) <= longest or len(output.log_probs) != len(token_ids):
        raise EngineError(
            f"{who} was to return 1 to {longest} tokens with a log-prob each, got {len(token_ids)} tokens and "
            f"{len(output.log_probs)} log-probs"
        )
    if output.finish_reason == "length" and len(token_ids) < longest:
        raise EngineError(
            f"{who} ended a response with reason length after {len(token_ids)} of {longest} tokens: its "
            "--max-model-len is too small"
        )
    if output.finish_reason == "stop" and stops and token_ids[-1] not in stops:
        raise EngineError(
            f"{who} ended a response with reason stop and the token {token_ids[-1]}, expected one of the request's "
            f"stop tokens: {_shown(stops)}"
        )


def _shown(values: Sequence[object]) -> str:
    return first_few([str(value)[:40] for value in values], ", ")


def engine_output(output: Any, request: EngineRequest, vocab_size: int, who: str) -> EngineOutput:
    """Return vLLM's ``RequestOutput`` of one sequence as an `EngineOutput`.

    Raises: `EngineError`, which begins with ``who``, for a response that was aborted or that cannot be true.
    """
    completion = output.outputs[0]

    def of_tokens(tokens: Sequence[int], entries: Sequence[Any]) -> list[float]:
        return [by_token[token].logprob for token, by_token in zip(tokens, entries, strict=True)]

    tokens, entries = list(completion.token_ids), output.prompt_logprobs
    return possible_output(
        request,
        vocab_size,
        who,
        token_ids=tokens,
        log_probs=of_tokens(tokens, completion.logprobs),
        finish_reason=completion.finish_reason,
        versions=[(span.version, span.start, span.end) for span in completion.weight_versions or ()],
        prompt_log_probs=of_tokens(output.prompt_token_ids[1:], entries[1:]) if entries else [],
    )


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
        weight_spans=output.weight_spans,
    )
