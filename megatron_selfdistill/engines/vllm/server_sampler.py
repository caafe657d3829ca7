# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Sampling on vLLM servers, in processes and environments of their own: the trainer needs no vLLM.

Rank 0 alone communicates with the servers.  When a server fails, other servers do its requests (`ServerPool`).  A
response counts when it is complete and reports the expected version of the weights.
"""

from __future__ import annotations

import atexit
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron_selfdistill.config import RolloutConfig
from megatron_selfdistill.distributed.collectives import (
    broadcast_object,
    raise_on_all_ranks,
    run_long_on_rank_0,
    run_on_rank_0,
)
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.engines.vllm.client import VllmServer
from megatron_selfdistill.engines.vllm.coroutines import run
from megatron_selfdistill.engines.vllm.engine_weights import EngineWeights
from megatron_selfdistill.engines.vllm.exchange import WeightAge, check_requests, gather_requests, return_responses
from megatron_selfdistill.engines.vllm.server.server_names import TOKEN_VARIABLE
from megatron_selfdistill.engines.vllm.server.server_process import ServerProcess, start_servers, wait_until_healthy
from megatron_selfdistill.engines.vllm.server_batch import BusyTime, ServerBatch, Ticket, request_key
from megatron_selfdistill.engines.vllm.server_pool import PROBE_SECONDS, ServerPool, on_each
from megatron_selfdistill.engines.vllm.transfer import (
    BroadcastTransfer,
    SharedMemoryTransfer,
    Transfer,
    choose_transfer,
)
from megatron_selfdistill.engines.vllm.weight_update import WeightUpdate, send_buckets
from megatron_selfdistill.errors import ConfigError, EngineError
from megatron_selfdistill.rollout.base import Progress, Request, Response, SamplingParams, ignore_progress

Recipients = tuple[list[VllmServer], bool]
"""The servers of one update, and whether it sends all weights, not the factors of adapters alone."""


class ServerSampler:
    """A sampler of vLLM servers that run already, or that rank 0 starts and ends.

    Requests of all replicas are gathered, dispatched to the servers and returned, so neither the trainer's layout nor
    the number of servers changes the response to a request.
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
        run_dir: Path,
        progress: Progress = ignore_progress,
    ) -> None:
        """Start the servers of ``rollout``, or connect to the servers that it names; return when all are up.

        ``weights``: those of the trainer, on rank 0; with adapters, a server gets the frozen weights once and the
        factors at each update.  ``hf_config``: the directory of the config.json that servers which start here load.
        Their logs go to ``run_dir/servers``.  The token of servers that run already is in the environment variable
        SELFDISTILL_SERVER_TOKEN.  ``vocab_size``: number of the model's tokens.  ``max_length``: longest prompt plus
        response, in tokens.
        ``progress``: called on rank 0 alone, with the responses of all replicas, whenever a server has answered.

        Raises, on all ranks alike: `EngineError` where a server is not up, `ConfigError` where a server was started for
        shorter responses, or has workers that ``rollout.transfer`` does not reach.
        """
        self._weights, self._grid, self._max_length, self._progress = weights, grid, max_length, progress
        self._max_staleness, self._timeout_s = rollout.max_staleness, rollout.timeout_s
        self._version: int | None = None
        self._metrics: dict[str, float] = {}
        # The following attributes are used on rank 0 only.
        self._pool = ServerPool([])
        self._under_way: list[ServerBatch] = []
        self._busy_time, self._waiting_time = BusyTime(), BusyTime()
        self._step_began = time.monotonic()
        self._transfer: Transfer | None = None
        self._started: list[ServerProcess] = []
        if grid.rank == 0:
            atexit.register(self.close)

        def start() -> None:
            token = os.environ.get(TOKEN_VARIABLE, "") if rollout.servers else secrets.token_urlsafe(32)
            self._started = start_servers(
                rollout,
                directory=run_dir / "servers",
                hf_config=hf_config,
                token=token,
                dtype=weights.transformer.params_dtype,
                max_model_len=max_length,
                adapter=weights.adapter,
            )
            adapted = weights.adapter is not None
            servers = [
                VllmServer(address, token, rollout.timeout_s, vocab_size=vocab_size, adapted=adapted)
                for address in rollout.servers or [server.address for server in self._started]
            ]
            self._pool = ServerPool(servers)
            wait_until_healthy(self._started, servers[: len(self._started)], rollout.timeout_s)
            for server in servers:
                _check(server, max_length)
            directory, on_gpu = rollout.transfer_dir, grid.device.type == "cuda"
            chosen = choose_transfer(rollout.transfer, servers, directory=directory, on_gpu=on_gpu)
            in_files = chosen == "shared_memory"
            self._transfer = SharedMemoryTransfer(directory) if in_files else BroadcastTransfer(chosen, self._timeout_s)

        try:
            run_long_on_rank_0(start, EngineError)
        except Exception:
            self.close()
            raise

    def update_weights(self, version: int) -> None:
        """Send the present weights, as ``version``, to every server that answers, also to servers that failed before.

        Responses under way go on with the new weights; call `settle` first where they are to keep the old ones.
        Collectives: as in `Exporter.stream`, and again where a server was lost on the way and the others could not
        go on without it.  Raises: `EngineError`, on all ranks alike, when no server got all weights.
        """
        started = time.perf_counter()
        todo: list[Recipients] = []  # of each update
        run_long_on_rank_0(lambda: todo.extend(self._recipients()), EngineError)
        while (sends_weights := broadcast_object(todo[0][1] if todo else None)) is not None:
            self._send(todo, version, sends_weights)
        run_on_rank_0(lambda: self._pool.require(version), EngineError)
        self._version = version
        self._count("sync_seconds", time.perf_counter() - started)

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        """Return one response per request, in order, on every rank of the replica; see `Sampler`.

        Raises, on all ranks alike: ValueError as `check_requests`; `EngineError` where no server is left for a request.
        """
        return self.collect(self.start(requests, params, self._known_version()))

    def start(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        used_at: int,
        known: Mapping[str, Response] = MappingProxyType({}),
    ) -> Ticket:
        """Let the servers begin with ``requests``, by the weights of the last `update_weights`, and return at once.

        Any number of batches may be under way at once; a thread of rank 0 speaks with the servers.
        ``used_at``: the version of the student that will be trained on the responses.  ``known``: responses from a
        checkpoint, by `request_key`; their requests are not generated again.
        Collective over the world.
        Raises: as `generate`; `EngineError` where no server has weights that ``max_staleness`` allows at ``used_at``.
        """
        version = self._known_version()
        with raise_on_all_ranks(EngineError):
            check_requests(requests, params, self._max_length)
        gathered = gather_requests(requests, self._grid)

        def begin() -> ServerBatch:
            everything = gathered.requests
            age = WeightAge(used_at, self._max_staleness)
            recent = {key: response for key, response in known.items() if age.allows(response.weight_version)}
            keys = [request_key(request, params) for request in everything] if recent else []
            found = {i: recent[key] for i, key in enumerate(keys) if key in recent}
            allowed = self._max_staleness - (used_at - version)
            servers = self._pool.usable(version, allowed) if len(found) < len(everything) else []
            return ServerBatch(everything, params, age, servers, found, self._busy_time)

        batch = run_long_on_rank_0(begin, EngineError)
        if batch is not None:
            self._under_way.append(batch)
        return Ticket(gathered, batch)

    def collect(self, ticket: Ticket) -> list[Response]:
        """Return the responses to the requests of ``ticket``, in order; see `generate`.  Collective over the world."""
        gathered, batch = ticket.gathered, ticket.batch

        def is_complete(finished: Mapping[int, Response]) -> bool | None:
            self._progress(len(finished), len(gathered.requests), "")
            return len(finished) == len(gathered.requests) or None

        def take() -> dict[int, dict[int, Response]]:
            assert batch is not None
            with self._waiting_time:
                batch.wait_for(is_complete)
                self._finish_batch(batch)
            return gathered.by_replica(batch.so_far())

        answered = run_long_on_rank_0(take, EngineError) or {}
        return return_responses(answered, [0], self._grid, gathered.num_own)

    def settle(self) -> None:
        """Return once all responses under way are finished.  Collective over the world; raises as `generate`."""

        def finish() -> None:
            with self._waiting_time:
                for batch in list(self._under_way):
                    self._finish_batch(batch)

        run_long_on_rank_0(finish, EngineError)

    def finished(self, ticket: Ticket) -> dict[str, Response]:
        """Return the responses of all replicas so far, by `request_key`, on rank 0; no collective."""
        if ticket.batch is None:
            return {}
        requests, params = ticket.batch.requests, ticket.batch.params
        return {request_key(requests[i], params): found for i, found in ticket.batch.so_far().items()}

    def sleep(self) -> None:
        """Do nothing: servers have memory of their own."""

    def metrics(self) -> dict[str, float]:
        """Return rollout/sync_seconds and rollout/sync_bytes of all updates since the last call, and others.

        The others are rollout/generation_seconds (in which servers worked on requests, also on those of later steps),
        rollout/waited_seconds (in which the trainer waited for responses), what both leave of the time since the last
        call (docs/metrics.md), rollout/servers_alive, and rollout/requests_retried.
        """
        generation, waited, now = self._busy_time.take(), self._waiting_time.take(), time.monotonic()
        step, self._step_began = now - self._step_began, now
        self._metrics |= {
            "rollout/servers_alive": self._pool.num_alive,
            "rollout/generation_seconds": generation,
            "rollout/waited_seconds": waited,
            "rollout/servers_waited_seconds": max(step - generation, 0.0),
            "overlap/share": max(generation - waited, 0.0) / step,
        }
        metrics = broadcast_object(self._metrics)
        self._metrics = {}
        return metrics

    def close(self) -> None:
        """End the servers that this sampler has started; may be called twice."""
        atexit.unregister(self.close)
        for batch in self._under_way:
            batch.cancel()
        for server in self._pool.servers:
            server.interrupt()  # a thread that still waits for a response would delay the end of the process
        if self._transfer is not None:
            self._transfer.close()
        for one in self._started:
            one.stop()
        self._started = []

    def _recipients(self) -> list[Recipients]:
        """Return the servers that answer, those that need all weights apart from those that keep the frozen ones."""
        assert self._transfer is not None
        servers = self._pool.reachable(self._transfer.forget)
        keeping = [s for s in servers if self._weights.adapter is not None and self._pool.has_weights(s)]
        parts = [([s for s in servers if s not in keeping], True), (keeping, False)]
        return [part for part in parts if part[0]]

    def _send(self, todo: list[Recipients], version: int, sends_weights: bool) -> None:
        """Send one update to the first servers of ``todo`` on rank 0.

        The servers are removed from ``todo``, and added again where they need another update.
        """
        update = run_long_on_rank_0(lambda: self._begin(todo.pop(0)[0], version), EngineError)
        streams = [self._weights.stream] if sends_weights else []
        streams += [self._weights.stream_factors] if self._weights.adapter is not None else []
        for stream in streams:
            send_buckets(stream, update, self._timeout_s)
        run_long_on_rank_0(lambda: todo.extend(self._finish(update, version)), EngineError)  # type: ignore[arg-type]

    def _begin(self, servers: Sequence[VllmServer], version: int) -> WeightUpdate:
        assert self._transfer is not None
        self._pool.begin_update(servers)
        adapter, keeps = self._weights.adapter, bool(self._under_way)
        if adapter is None:
            return WeightUpdate(self._transfer, servers, version, keeps=keeps)

        async def load(server: VllmServer) -> None:
            await server.call_all("load_factors", vars(adapter))

        return WeightUpdate(self._transfer, servers, version, load, keeps=keeps)

    def _finish(self, update: WeightUpdate, version: int) -> list[Recipients]:
        """End an update, note which servers have the weights, and return the servers that need the weights again."""
        assert self._transfer is not None
        update.finish()
        self._count("sync_bytes", update.num_bytes)
        if not update.broken:
            self._pool.finish_update(update.servers, version)
        failures = update.failures
        again: list[VllmServer] = []
        if update.broken and not self._transfer.isolated and len(update.servers) + len(failures) > 1:
            # The failure of one server, which is unknown, made all servers fail.  Servers that still answer get the
            # weights one by one.
            candidates = [s for s in self._pool.servers if s in failures or s in update.servers]
            failures = on_each(candidates, lambda server: server.health(PROBE_SECONDS))
            again = [server for server in candidates if server not in failures]
        self._pool.lose(failures)
        for server in failures if self._under_way else ():
            server.interrupt()  # it stays paused: other servers answer its requests
        return [([server], True) for server in again]

    def _known_version(self) -> int:
        if self._version is None:
            raise EngineError("the vLLM servers have no weights yet: call update_weights before generate")
        return self._version

    def _finish_batch(self, batch: ServerBatch) -> None:
        """Wait for all responses of ``batch`` and, the first time, count what has happened on the way."""
        batch.join()
        if batch in self._under_way:
            self._under_way.remove(batch)
            self._pool.lose(batch.failures)
            self._count("requests_retried", batch.num_retried)

    def _count(self, name: str, value: float) -> None:
        key = f"rollout/{name}"
        self._metrics[key] = self._metrics.get(key, 0.0) + value


def _check(server: VllmServer, max_length: int) -> None:
    """Raise `ConfigError` where ``server`` does not fit this run, `EngineError` where it cannot be reached."""
    run(server.health())
    longest = run(server.max_model_len())
    if longest is not None and longest < max_length:
        raise ConfigError(
            f"{server.name} was started with --max-model-len {longest}, but this run needs --max-model-len {max_length}"
        )
    if run(server.num_tokens()) is None:
        raise ConfigError(f"{server.name} must start without --disable-log-stats, so that the run sees it work")
