# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Sampling with vLLM in the trainer's own processes: ``engine_tp`` consecutive ranks are one engine."""

from __future__ import annotations

import gc
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron_selfdistill.config import RolloutConfig
from megatron_selfdistill.distributed.collectives import broadcast_object, raise_on_all_ranks
from megatron_selfdistill.distributed.integers import max_over_ranks, min_over_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.engines.vllm.engine import engine_request
from megatron_selfdistill.engines.vllm.engine_weights import EngineWeights
from megatron_selfdistill.engines.vllm.exchange import EngineShares, WeightAge, check_requests
from megatron_selfdistill.engines.vllm.in_process import InProcessEngine
from megatron_selfdistill.errors import ConfigError, EngineError
from megatron_selfdistill.rollout.base import Progress, Request, Response, SamplingParams, ignore_progress
from megatron_selfdistill.rollout.megatron.decoding import free_bytes

_GIB = 2**30
# The part of the free memory of a GPU that is not the engine's.  The process groups of vLLM, which take NCCL's buffers,
# start after the memory was measured and before vLLM checks; activations and CUDA graphs come later.
_MARGIN_BYTES = 2 * _GIB
# The defaults of vLLM on a CPU: the sequences of a batch, and the tokens of a block of the KV cache.
_CPU_BATCH, _CPU_BLOCK = 256, 128


class ColocatedSampler:
    """A sampler of vLLM engines that live beside the trainer's model, on its devices.

    The trainer's layout does not matter to the engines: each rank sees every full tensor of `Exporter.stream`, of which
    its engine keeps its part; requests of all replicas are spread over all engines, and responses go back to the ranks
    that asked.  The response to a request depends on its prompt, its seed and the weights, not on other requests.

    On GPUs the engines sleep between `sleep` and the next call that needs them: weights and KV cache leave the device.
    A process has one engine at a time; after `close` another can be built.
    """

    def __init__(
        self,
        weights: EngineWeights,
        grid: RankGrid,
        hf_config: Path,
        rollout: RolloutConfig,
        *,
        vocab_size: int,
        max_length: int,
        progress: Progress = ignore_progress,
    ) -> None:
        """Build the engines of all ranks; their weights are random until `update_weights`.

        ``weights``: those of the trainer, on every rank; the engines compute in their dtype, and with adapters get the
        frozen weights once and the factors at each update.  ``hf_config``: the directory of the model's config.json
        (hf_directory.py).  ``vocab_size``: number of the model's tokens.  ``max_length``: longest prompt plus response,
        in tokens.  ``progress``: called with the responses of this rank's engine, at every pass, on every rank.

        On a GPU the engine's share of the memory (vLLM's ``gpu_memory_utilization``) is the memory that the trainer
        leaves free, unless ``rollout.engine_args`` sets the share.

        Raises, on all ranks alike: `ConfigError` for a world size that is no multiple of ``rollout.engine_tp``, and for
        a model or arguments that vLLM refuses; `EngineError` where vLLM fails otherwise.
        """
        engine_tp = rollout.engine_tp
        if grid.world_size % engine_tp:
            raise ConfigError(
                f"rollout.engine_tp={engine_tp} ranks form one engine, but the world size {grid.world_size} is no "
                "multiple of it; choose a divisor"
            )
        self._weights, self._grid, self._max_length, self._progress = weights, grid, max_length, progress
        self._max_staleness = rollout.max_staleness
        self._engine_tp = engine_tp
        self._num_engines = grid.world_size // engine_tp
        self._version: int | None = None
        self._holds_weights = False  # whether the engines hold frozen weights
        self._asleep = False
        self._metrics: dict[str, float] = {}
        settings = {
            "dtype": weights.transformer.params_dtype,
            "max_model_len": max_length,
            "kv_cache_memory_bytes": _kv_cache_bytes(rollout.kv_cache_gb, weights.transformer, max_length, grid),
        }
        if grid.device.type == "cuda":
            settings["gpu_memory_utilization"] = _free_share()
        self._engine = _engine_on_all_ranks(
            hf_config,
            grid,
            engine_tp=engine_tp,
            settings=settings | rollout.engine_args,
            vocab_size=vocab_size,
            adapter=weights.adapter,
        )

    def update_weights(self, version: int) -> None:
        """Send the present weights to every engine, as ``version``; with adapters, the weights only once.

        Collectives: as in `Exporter.stream`.  Raises: `EngineError` on all ranks alike.
        """
        started = time.perf_counter()
        with raise_on_all_ranks(EngineError):
            if self._asleep:
                self._engine.wake("weights")
            if not self._holds_weights:
                self._engine.load(self._counted(self._weights.stream()), version)
        self._holds_weights = self._weights.adapter is not None
        with raise_on_all_ranks(EngineError):
            if self._weights.adapter is not None:
                self._engine.load_adapter(self._counted(self._weights.stream_factors()), version)
            if self._asleep:
                self._engine.wake("kv_cache")
        self._asleep = False
        self._version = version
        self._count("sync_seconds", max_over_ranks([round((time.perf_counter() - started) * 1e6)])[0] / 1e6)

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        """Return one response per request, in order, on every rank of the replica; see `Sampler`.

        Raises, on all ranks alike: ValueError as `check_requests`; `EngineError` where an engine fails, returns fewer
        responses than requests, or samples with other weights than the last `update_weights` sent.
        """
        if (version := self._version) is None:
            raise EngineError("the vLLM engines have no weights yet: call update_weights before generate")
        with raise_on_all_ranks(EngineError):
            check_requests(requests, params, self._max_length)
        shares = EngineShares(len(requests), self._grid, self._engine_tp)
        share = shares.distribute(requests)
        if self._asleep:  # the weights have left the device
            self.update_weights(version)

        def report(finished: int) -> None:
            self._progress(finished, len(share), "of this engine" if self._num_engines > 1 else "")

        with raise_on_all_ranks(EngineError):
            report(0)
            age = WeightAge(version, self._max_staleness)
            responses = self._engine.generate([engine_request(request, params) for request in share], report)
            for response in responses:
                age.require(response.weight_version, self._engine.name)
        return shares.collect(responses)

    def sleep(self) -> None:
        """Leave the device to the trainer; do nothing where memory cannot be given back (on a CPU)."""
        if self._engine.can_sleep and not self._asleep:
            self._engine.sleep()
            self._asleep = True

    def metrics(self) -> dict[str, float]:
        """Return rollout/sync_seconds (slowest rank) and rollout/sync_bytes of all updates since the last call."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def close(self) -> None:
        """End the engine; may be called twice."""
        self._engine.close()

    def _counted(self, buckets: Iterator[list[tuple[str, Tensor]]]) -> Iterator[tuple[str, Tensor]]:
        for bucket in buckets:
            self._count("sync_bytes", sum(tensor.nbytes for _, tensor in bucket))
            yield from bucket

    def _count(self, name: str, value: float) -> None:
        key = f"rollout/{name}"
        self._metrics[key] = self._metrics.get(key, 0.0) + value


def _engine_on_all_ranks(hf_config: Path, grid: RankGrid, **options: Any) -> InProcessEngine:
    ident = broadcast_object(secrets.token_hex(8))
    built: list[InProcessEngine] = []
    try:
        with raise_on_all_ranks(EngineError):
            built.append(InProcessEngine(hf_config, grid.device, ident, **options))
    except Exception:
        for engine in built:  # the engine of another rank has failed
            engine.close()
        raise
    return built[0]


def _free_share() -> float:
    """Return the share of a GPU that the trainer leaves free on every rank, less a margin; one all-reduce.

    vLLM refuses to start where less than ``gpu_memory_utilization`` (0.92 by default) of a GPU is free, even where
    ``kv_cache_memory_bytes`` fixes the size of its KV cache.  vLLM checks that share once, when its worker starts.
    """
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    free, negative_total = min_over_ranks([free, -total])
    return (free - _MARGIN_BYTES) / -negative_total


def _kv_cache_bytes(gib: float | None, config: Any, max_length: int, grid: RankGrid) -> int:
    """Return the bytes of an engine's KV cache: the least over all ranks, which must schedule alike."""
    if gib is not None:
        return int(gib * _GIB)
    room = free_bytes() // 3
    if grid.device.type == "cpu":
        # vLLM fills the cache with zeros, so on a CPU it should be no larger than a full batch can use.
        per_token = (
            2 * config.num_layers * config.num_attention_heads * config.kv_channels * config.params_dtype.itemsize
        )
        room = min(room, _CPU_BATCH * (max_length + _CPU_BLOCK) * per_token)
    return min_over_ranks([room])[0]
