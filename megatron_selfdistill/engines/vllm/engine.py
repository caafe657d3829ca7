# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What vLLM engines have in common, in this process or behind HTTP: arguments, and the translation of requests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_selfdistill.engines.vllm.engine_output import EngineOutput, EngineRequest, possible_output
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams

WORKER_EXTENSION = "megatron_selfdistill.engines.vllm.plugin.worker.WorkerExtension"
"""Class by which an engine's workers are extended, for `VllmServer.call_all`."""


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
        "seed": request.seed % 2**63,  # vLLM's seeds are signed
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": True,  # only the run's own stop tokens end a response
        "logprobs": 0,
        "detokenize": False,
    }
    return EngineRequest(list(request.prompt), sampling)


def engine_output(output: Any, request: EngineRequest, vocab_size: int, who: str) -> EngineOutput:
    """Return vLLM's ``RequestOutput`` of one sequence as an `EngineOutput`.

    Raises: `EngineError`, which begins with ``who``, for a response that was aborted or that cannot be true.
    """
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    return possible_output(
        request,
        vocab_size,
        who,
        token_ids=tokens,
        log_probs=[by_token[token].logprob for token, by_token in zip(tokens, completion.logprobs, strict=True)],
        finish_reason=completion.finish_reason,
        versions=[(span.version, span.start, span.end) for span in completion.weight_versions or ()],
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
