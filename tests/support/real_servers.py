# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The trainer's sampler on real vLLM servers, and the processes of a server."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import models
import torch
from events import wait_until
from trained import FAMILY, MAX_LENGTH, MODEL, Reach, requests, write_config

from megatron_selfdistill.config import RolloutConfig
from megatron_selfdistill.engines.vllm.client import VllmServer
from megatron_selfdistill.engines.vllm.coroutines import run
from megatron_selfdistill.engines.vllm.engine_adapter import EngineAdapter
from megatron_selfdistill.engines.vllm.server.server_names import TOKEN_VARIABLE
from megatron_selfdistill.engines.vllm.server.server_process import ServerProcess, start_servers, wait_until_healthy
from megatron_selfdistill.rollout.base import Request, Response, SamplingParams

START_SECONDS = 900.0


@dataclass(frozen=True)
class Servers:
    processes: list[ServerProcess]
    reach: Reach


@contextmanager
def started(directory: Path, num_servers: int, adapter: EngineAdapter | None = None) -> Iterator[Servers]:
    """Yield healthy servers of `MODEL`, which take the adapters ``adapter``; end them at the end."""
    hf_config, token = write_config(directory / "model"), secrets.token_urlsafe(16)
    own = {"num_servers": num_servers, "server_python": os.environ["SELFDISTILL_VLLM_PYTHON"], "kv_cache_gb": 0.2}
    rollout = RolloutConfig(engine="vllm", placement="server", engine_args={"max_num_seqs": 32}, **own)
    own = {"directory": directory, "hf_config": hf_config, "token": token, "max_model_len": MAX_LENGTH}
    processes = start_servers(rollout, dtype=torch.float32, adapter=adapter, **own)
    try:
        wait_until_healthy(processes, [VllmServer(one.address, token) for one in processes], START_SECONDS)
        yield Servers(processes, Reach([one.address for one in processes], token, hf_config))
    finally:
        for one in processes:
            one.stop()


@contextmanager
def sampler(chunks: Any, grid: Any, servers: Reach, adapter: Any = None, **options: Any) -> Iterator[Any]:
    """Yield a `ServerSampler` on the servers; ``options`` are fields of `RolloutConfig`."""
    from megatron_selfdistill.engines.vllm.engine_weights import EngineWeights
    from megatron_selfdistill.engines.vllm.server_sampler import ServerSampler

    os.environ[TOKEN_VARIABLE] = servers.token
    rollout = RolloutConfig(engine="vllm", placement="server", servers=servers.addresses, **options)
    bucket_bytes = int(rollout.bucket_mb * 2**20)
    weights = EngineWeights(chunks, grid, FAMILY.rules(MODEL), adapter, bucket_bytes=bucket_bytes, on_ranks=[0])
    own = {"vocab_size": models.VOCAB_SIZE, "max_length": MAX_LENGTH, "run_dir": servers.hf_config}
    built = ServerSampler(weights, grid, servers.hf_config, rollout, **own)
    try:
        yield built
    finally:
        built.close()


Across: TypeAlias = tuple[int, list[Response], list[list[float]]]
"""Version before an update, responses, and the log-probs of their tokens under the new weights, as prompts."""


def across_an_update(built: Any, params: SamplingParams, fill: Callable[[int], object]) -> Across:
    """Let servers take other weights while they generate; ask for more if all responses had ended before."""
    for attempt, num_copies in enumerate((1, 4, 16)):
        everything = requests(64, longest=40) * num_copies
        version = 2 * attempt
        fill(version)
        built.update_weights(version)
        ticket = built.start(everything, params, used_at=version + 1)
        ticket.batch.wait_for(lambda finished: finished or None)
        fill(version + 1)
        built.update_weights(version + 1)
        responses = built.collect(ticket)
        if any(response.weight_spans for response in responses):
            break
    server = built._pool.usable(version + 1, max_staleness=0)[0]  # a busy machine may cost the other one
    return version, responses, [_read(server, one, r) for one, r in zip(everything, responses, strict=True)]


def _read(server: VllmServer, request: Request, response: Response) -> list[float]:
    """Return the log-probs of a response under the weights of ``server``, which reads it as a prompt."""
    prompt = [*request.prompt, *response.token_ids]
    sampling = {"max_tokens": 1, "temperature": 0.0, "logprobs": 0, "prompt_logprobs": 0, "detokenize": False}
    body = {"token_ids": prompt, "sampling_params": sampling, "model": server._model, "stream": False}
    given = {key: value for key, value in body.items() if value is not None}
    answer: Any = run(server._ask("POST", "/inference/v1/generate", given))
    entries = zip(prompt, answer["prompt_logprobs"], strict=True)
    return [entry[str(token)]["logprob"] for token, entry in list(entries)[len(request.prompt) :]]


def assert_new_weights_go_on(version: int, responses: list[Response], read: list[list[float]]) -> None:
    """Assert that the last tokens of responses come from the new weights after a whole reading of their context."""
    pairs = zip(responses, read, strict=True)
    mixed = [(response, log_probs) for response, log_probs in pairs if response.weight_spans]
    assert mixed, "some responses are under way when the weights change, however busy the machine is"
    for response, log_probs in mixed:
        assert [span[0] for span in response.weight_spans] == [version, version + 1]
        assert response.weight_version == version
        (_, before), (_, after) = response.weight_spans
        assert before + after == len(response.token_ids) == len(log_probs)
        new = [abs(a - b) for a, b in zip(response.log_probs[before:], log_probs[before:], strict=True)]
        assert max(new) < 1e-4, "the new weights have read the whole context"
        old = [abs(a - b) for a, b in zip(response.log_probs[:before], log_probs[:before], strict=True)]
        assert max(old) > 1e-3, "the first tokens come from other weights"


def processes_of(session: int) -> dict[int, str]:
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and os.getsid(int(entry.name)) == session:
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        except (OSError, ProcessLookupError):
            continue  # the process has ended meanwhile
    return {pid: line for pid, line in found.items() if line}  # a zombie has none


def assert_session_ends(session: int) -> None:
    # The resource tracker of Python's multiprocessing ends when the last process that it serves has ended.
    wait_until(lambda: not processes_of(session))
