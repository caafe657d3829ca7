# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""vLLM servers that a run starts on its own machine and ends with itself (``rollout.num_servers``)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import megatron_selfdistill
from megatron_selfdistill.config import RolloutConfig
from megatron_selfdistill.engines.vllm.client import VllmServer
from megatron_selfdistill.engines.vllm.coroutines import run
from megatron_selfdistill.engines.vllm.engine_adapter import EngineAdapter
from megatron_selfdistill.engines.vllm.server.server_names import PARENT_VARIABLE, TOKEN_VARIABLE, as_arguments
from megatron_selfdistill.errors import ConfigError, EngineError

_PACKAGE = megatron_selfdistill.__name__
_LOG_TAIL_LINES = 15
_GRACE_SECONDS = 10.0
_HEALTH_SECONDS = 5.0
# Variables of the trainer's launch and of its Python, which another environment must not see.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")
# Prefixes of variables that tune a process's use of GPUs and threads; the trainer sets some of them for itself.
_TUNING = (
    *("NCCL_", "TORCH_NCCL_", "NVTE_", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
    "OMP_NUM_THREADS",
)
_PYTHON = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


@dataclass(frozen=True)
class ServerProcess:
    """A server that was started, in a session of its own with all its children."""

    process: subprocess.Popen[bytes]
    address: str
    held_port: socket.socket
    """Socket that is bound to the server's port, so that no other process gets the port while vLLM is being imported.
    """
    log: Path

    def stop(self) -> None:
        """End the server and its children; may be called twice."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_GRACE_SECONDS)
        # The children of a server that was killed are still in its session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.held_port.close()


def start_servers(
    rollout: RolloutConfig,
    *,
    directory: Path,
    hf_config: Path,
    token: str,
    dtype: torch.dtype,
    max_model_len: int,
    adapter: EngineAdapter | None = None,
) -> list[ServerProcess]:
    """Start ``rollout.num_servers`` servers on free ports of this machine and return them; they are not up yet.

    ``directory`` is for the servers' logs.  ``rollout.server_env`` overrides the variables of `server_environment`, and
    an empty value removes a variable.  The servers use the GPUs behind the trainer's.
    ``adapter``: the adapters of the run, if it has any.
    Raises: `ConfigError` where there are too few GPUs or where the Python of ``rollout.server_python`` is missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    python, engine_tp = rollout.server_python, rollout.engine_tp
    variables = {**server_environment(os.environ, environment_at_start()), **rollout.server_env}
    variables = _with_package({name: value for name, value in variables.items() if value}, directory, python, token)
    arguments = [
        f"--hf-config={hf_config.resolve()}",
        f"--tensor-parallel-size={engine_tp}",
        f"--dtype={str(dtype).removeprefix('torch.')}",
        f"--max-model-len={max_model_len}",
        *([] if rollout.kv_cache_gb is None else [f"--kv-cache-gb={rollout.kv_cache_gb}"]),
        *([] if adapter is None else adapter.server_args()),
        "--",
        *as_arguments(rollout.engine_args),
    ]
    count = rollout.num_servers
    gpus = _gpus_of_servers(count, engine_tp)
    started: list[ServerProcess] = []
    for number in range(count):
        log, held = directory / f"{number}.log", _free_port()
        port = held.getsockname()[1]
        command = [python or sys.executable, "-m", f"{_PACKAGE}.engines.vllm.server.serve", f"--port={port}"]
        command += arguments
        with log.open("ab") as output:
            try:
                process = subprocess.Popen(
                    command,
                    env=variables | ({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus[number]}),
                    cwd=directory,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise ConfigError(f"rollout.server_python={command[0]} cannot be started: {error}") from error
        started.append(ServerProcess(process, f"http://127.0.0.1:{port}", held, log))
    return started


def wait_until_healthy(started: Sequence[ServerProcess], servers: Sequence[VllmServer], timeout_s: float) -> None:
    """Return when all servers are up.

    Raises: `EngineError` with the end of a server's log where the server ended, or is not up within ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    for one, server in zip(started, servers, strict=True):
        while True:
            status = one.process.poll()
            if status is not None:
                raise EngineError(f"a vLLM server ended with status {status} before it was up; {_tail(one.log)}")
            try:
                run(server.health(_HEALTH_SECONDS))
                break
            except EngineError as error:
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"no vLLM server is up after {timeout_s:g} s ({error}); {_tail(one.log)}"
                    ) from error
            time.sleep(0.2)


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    return "\n".join([f"the end of {log}:", *lines])


def server_environment(now: Mapping[str, str], at_start: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a server inherits from a trainer whose environment is ``now`` and was ``at_start``.

    A server gets the variables that the user exported.  Variables of the launcher (torchrun) are removed.  Variables
    that tune how a process uses its GPUs and threads (`_TUNING`: NCCL's, the allocator's, CUDA_DEVICE_MAX_CONNECTIONS)
    have the value that they had when the trainer's process started, and are removed where the trainer set them itself.
    torchrun sets OMP_NUM_THREADS=1 where the user set nothing, and the trainer cannot distinguish the two: under
    torchrun the value 1 is removed.  ``rollout.server_env`` overrides all variables.
    """
    launched = "LOCAL_WORLD_SIZE" in at_start
    variables = {name: value for name, value in now.items() if not name.startswith(_TUNING)}
    variables |= {name: value for name, value in at_start.items() if name.startswith(_TUNING)}
    if launched and variables.get("OMP_NUM_THREADS") == "1":
        del variables["OMP_NUM_THREADS"]
    return {
        name: value
        for name, value in variables.items()
        if name not in _LAUNCHER and not name.startswith(_LAUNCHER_PREFIXES)
    }


def environment_at_start() -> dict[str, str]:
    """Return the environment with which this process was started, whatever it has set since; Linux keeps it."""
    entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    pairs = (os.fsdecode(entry).partition("=") for entry in entries if b"=" in entry)
    return {name: value for name, _, value in pairs}


def _with_package(variables: Mapping[str, str], directory: Path, python: str | None, token: str) -> dict[str, str]:
    """Return ``variables`` with those by which a server imports this package and knows its token and parent.

    The server imports nothing else of the trainer: where the package is installed, its neighbours are the trainer's
    torch and other packages that a server has of its own.
    """
    environment = {name: value for name, value in variables.items() if python is None or name not in _PYTHON}
    alone = directory.resolve() / "package"
    alone.mkdir(exist_ok=True)
    link = alone / _PACKAGE
    link.unlink(missing_ok=True)
    link.symlink_to(Path(megatron_selfdistill.__file__).resolve().parent, target_is_directory=True)
    paths = [str(alone)]
    paths += [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    environment[TOKEN_VARIABLE] = token
    environment[PARENT_VARIABLE] = str(os.getpid())
    return environment


def _gpus_of_servers(count: int, each: int) -> list[str] | None:
    """Return CUDA_VISIBLE_DEVICES of each server; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    first = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if len(gpus) < first + count * each:
        raise ConfigError(
            f"rollout.num_servers={count} servers of {each} GPUs need {count * each} besides the {first} of the "
            f"trainer, but this machine has {len(gpus)}; start fewer servers, or start them elsewhere and set "
            "rollout.servers"
        )
    return [",".join(gpus[first + number * each : first + (number + 1) * each]) for number in range(count)]


def _free_port() -> socket.socket:
    """Return a socket that is bound to a free port and never listens.

    Linux lets another socket with SO_REUSEADDR, such as vLLM's, be bound to the same port and listen; outgoing
    connections get other ports.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held
