# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What runs inside one rank of `ranks.RankPool`: import once, then run task after task, each from a clean
state.

The server process of the pool imports this file before it forks the ranks; the flag in `ENVIRONMENT` tells it
to load torch and megatron-core then.  pytest's own process imports it too, and loads neither.
"""

from __future__ import annotations

import ast
import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

READY = "ready"
_FLAG = "MEGATRON_SELFDISTILL_TEST_RANK"

ENVIRONMENT = {
    _FLAG: "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",
    # Gloo ranks are CPU ranks, also on a machine with a GPU: compat/cpu.py changes nothing where it sees CUDA.
    "CUDA_VISIBLE_DEVICES": "",
    # Without it gloo resolves the host name, which fails or waits on machines whose name is not in DNS.
    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
}


@dataclass(frozen=True)
class Task:
    """One call of one function, as every rank of the call receives it."""

    module: str
    file: str | None
    qualname: str
    arguments: bytes  # pickled (args, kwargs), whose classes the module may define
    world_size: int
    group_timeout: float
    store: str | None  # file for the group's rendezvous; None: the function makes its own group
    master_port: int
    sys_path: list[str]
    cwd: str


@dataclass
class Outcome:
    """What became of a task on one rank: a pickled result, or the traceback."""

    time: float  # time.monotonic(), comparable between the processes of a machine
    result: bytes = b""
    error: str | None = None
    error_name: str = ""
    log: str = ""

    @property
    def failed(self) -> bool:
        return self.error is not None


def serve(rank: int, requests: Any, alive: Any, log: str) -> None:
    """Run the tasks that arrive on ``requests`` until it closes; end at once when the parent has died."""
    log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    faulthandler.enable(all_threads=True)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is pytest's to handle; it closes the requests
    threading.Thread(target=_exit_with_parent, args=(alive,), daemon=True).start()
    while True:
        try:
            task = pickle.loads(requests.recv_bytes())
        except (EOFError, ConnectionError):
            os._exit(0)
        with _restored_process_state(task, rank):
            outcome = _run(task, rank)
            if outcome.failed:
                outcome.log = Path(log).read_text(errors="replace")[-4000:]
            requests.send_bytes(pickle.dumps(outcome))
            _leave(synchronize=not outcome.failed)
        requests.send_bytes(pickle.dumps(READY))


def _run(task: Task, rank: int) -> Outcome:
    import torch
    import torch.distributed as dist

    try:
        if IMPORT_ERROR is not None:
            raise ImportError(f"the ranks could not import what they need:\n{IMPORT_ERROR}")
        random.seed(1234)
        torch.manual_seed(1234)
        torch.set_num_threads(1)
        fn = _load(task)
        args, kwargs = pickle.loads(task.arguments)
        if task.store is not None:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(task.store, task.world_size),
                rank=rank,
                world_size=task.world_size,
                timeout=timedelta(seconds=task.group_timeout),
            )
        result = pickle.dumps(fn(*args, **kwargs))
        return Outcome(time.monotonic(), result=result)
    except BaseException as error:  # pytest's outcomes and SystemExit are no Exceptions, and must be told too
        name = type(error).__name__
        text = str(error) if name == "Skipped" else traceback.format_exc()
        return Outcome(time.monotonic(), error=text, error_name=name)


def _leave(synchronize: bool) -> None:
    """Destroy the group and Megatron's state.  A failed rank does not wait: its leaving frees the others."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        if synchronize:
            # A rank that is done must not close its sockets while another still reads.  A failed peer breaks
            # this barrier, which is no failure of this rank.
            with contextlib.suppress(RuntimeError):
                dist.barrier()
        _clear_megatron_state()
        dist.destroy_process_group()
    else:
        _clear_megatron_state()
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    gc.collect()


def _clear_megatron_state() -> None:
    """Back to how the import left it: groups, microbatch calculator, random streams, auxiliary scales."""
    modules = sys.modules
    if "megatron.core.parallel_state" not in modules:
        return
    modules["megatron.core.parallel_state"].destroy_model_parallel()
    for name, destroy in (
        ("megatron.core.num_microbatches_calculator", "destroy_num_microbatches_calculator"),
        ("megatron.core.rerun_state_machine", "destroy_rerun_state_machine"),
    ):
        if name in modules:
            getattr(modules[name], destroy)()
    if random_module := modules.get("megatron.core.tensor_parallel.random"):
        random_module._CUDA_RNG_STATE_TRACKER = None
        random_module._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    for name, scaler in (
        ("megatron.core.transformer.moe.moe_utils", "MoEAuxLossAutoScaler"),
        ("megatron.core.transformer.multi_token_prediction", "MTPLossAutoScaler"),
    ):
        if name in modules and hasattr(modules[name], scaler):
            getattr(modules[name], scaler).main_loss_backward_scale = None


@contextlib.contextmanager
def _restored_process_state(task: Task, rank: int) -> Iterator[None]:
    """torchrun's environment, pytest's sys.path and working directory for one task; its own afterwards."""
    environ, path, cwd = dict(os.environ), list(sys.path), os.getcwd()
    sys.path[:] = task.sys_path
    os.chdir(task.cwd)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(task.world_size),
        "LOCAL_WORLD_SIZE": str(task.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(task.master_port),
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= environ
        sys.path[:] = path
        with contextlib.suppress(OSError):  # a task may have removed the folder it was called in
            os.chdir(cwd)


def _load(task: Task) -> Callable[..., Any]:
    """The task's function: from a module that is loaded, else from its file under pytest's name for it."""
    module: Any = sys.modules.get(task.module)
    if module is None:
        in_tests = task.file is not None and Path(__file__).parents[1] in Path(task.file).resolve().parents
        module = _load_test_file(task) if in_tests else importlib.import_module(task.module)
    found = module
    for part in task.qualname.split("."):
        found = getattr(found, part)
    return found


def _load_test_file(task: Task) -> types.ModuleType:
    """Execute a test file as pytest does: under its dotted name, with asserts that show their values."""
    from _pytest.assertion.rewrite import rewrite_asserts

    assert task.file is not None
    spec = importlib.util.spec_from_file_location(task.module, task.file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    parents = task.module.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        name = ".".join(parents[:depth])
        sys.modules.setdefault(name, types.ModuleType(name)).__dict__.setdefault("__path__", [])
    source = Path(task.file).read_bytes()
    tree = ast.parse(source, task.file)
    rewrite_asserts(tree, source, task.file)
    sys.modules[task.module] = module
    try:
        exec(compile(tree, task.file, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[task.module]
        raise
    return module


def _exit_with_parent(alive: Any) -> None:
    with contextlib.suppress(EOFError, OSError):
        alive.recv_bytes()
    os._exit(1)


def _import_once() -> str | None:
    """Load what every rank needs, in the order it must have; returns the traceback if that fails."""
    # Megatron warns about each optional accelerator that is absent; it says nothing about a test.
    warnings.simplefilter("ignore")
    try:
        import torch.distributed

        if importlib.util.find_spec("megatron_selfdistill.compat.cpu") is not None:
            importlib.import_module("megatron_selfdistill.compat.cpu")
        if importlib.util.find_spec("megatron.core") is not None:
            for name in ("models.gpt", "distributed", "optimizer", "pipeline_parallel", "dist_checkpointing"):
                importlib.import_module(f"megatron.core.{name}")
        torch.set_num_threads(1)
        gc.collect()
        gc.freeze()  # the imports live as long as the rank: no collection needs to look at them again
        return None
    except Exception:
        return traceback.format_exc()
    finally:
        warnings.resetwarnings()


IMPORT_ERROR: str | None = _import_once() if os.environ.get(_FLAG) else None
