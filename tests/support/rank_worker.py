# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The processes of `ranks.RankPool`: a server that imports everything once, and the ranks that it forks for each call.

Every call runs in processes of its own, which end with the call.  No call finds the process groups, threads, patches or
random states of another call.  pytest's own process imports this file too, and loads neither torch nor megatron-core.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import importlib.util
import os
import pickle
import random
import signal
import socket
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, cast

DONE = "done"  # the last message of a rank that has left its process group

_LOG_TAIL_CHARS = 6000
# All that a run or a command imports: `megatron_selfdistill.train` itself imports torch only after its checks.
_HOUSE = Path(__file__).resolve().parents[2] / "megatron_selfdistill"
_ANNEXED = ("interop.conversion", "instruments.evaluate.evaluation_tables", "instruments.report.report_command")
_OF_MEGATRON = """models.gpt models.gpt.gpt_layer_specs models.mimo.model.base distributed optimizer pipeline_parallel
dist_checkpointing dist_checkpointing.strategies.fully_parallel dist_checkpointing.strategies.torch""".split()
_OF_THE_HOUSE = """commands.announcement checkpoint.resumption checkpoint.vocabulary methods.data_sets.data_set_job
evaluation.held_out rollout.megatron.megatron_sampler sources.step_terms train trainer""".split()
PRELOADED = (
    *("encodings.utf_8_sig", "torch.distributed", "megatron_selfdistill.compat.cpu"),
    *(f"megatron.core.{name}" for name in _OF_MEGATRON),
    *(f"megatron_selfdistill.{name}" for name in _OF_THE_HOUSE),
    *("safetensors.torch", "torch.utils.serialization", "transformers.models.auto.tokenization_auto"),
    *("transformers.models.llama.configuration_llama", "transformers.tokenization_utils_tokenizers"),
    *(f"{_HOUSE.name}.{name}" for name in _ANNEXED if (_HOUSE / name.split(".")[0]).is_dir()),
)

ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCHDYNAMO_DISABLE"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
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
    timeout: float  # seconds that the call may take
    grace: float  # seconds that the other ranks may take to notice the failure of a rank
    init_process_group: bool  # False: the function makes its own group
    directory: str  # holds one log per rank
    master_port: int
    sys_path: list[str]
    cwd: str


@dataclass
class Outcome:
    """The result of a task on one rank: a pickled value, or the traceback."""

    time: float  # time.monotonic(), comparable between the processes of a machine
    result: bytes = b""
    error: str | None = None
    error_name: str = ""
    log: str = ""

    @property
    def failed(self) -> bool:
        return self.error is not None


@dataclass(frozen=True)
class Reply:
    """The outcomes of a call by rank, and the stacks of the ranks that hang."""

    outcomes: dict[int, Outcome]
    stacks: dict[int, str]


@dataclass
class _Rank:
    process: Any
    messages: connection.Connection
    log: Path


def serve(requests_fd: int, preloaded: Sequence[str]) -> None:
    """Import the modules, and answer each `Task` that arrives on the connection with a `Reply` until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is pytest's to handle; pytest closes the requests
    requests: connection.Connection = connection.Connection(requests_fd)
    alive = os.pipe()  # never written to: its end closes when this process dies, however it dies
    import_error = _import_once(preloaded)
    while True:
        try:
            task = pickle.loads(requests.recv_bytes())
        except (EOFError, ConnectionError):
            os._exit(0)
        if import_error is None:
            sys.path[:] = task.sys_path
            with contextlib.suppress(BaseException):  # the ranks fail in the same place, and say why
                _load(task)
            gc.freeze()  # modules live as long as the process: no rank needs to look at them again
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ranks = {rank: _fork(task, rank, alive, listener, import_error) for rank in range(task.world_size)}
        reply = _collect(task, ranks, requests)
        requests.send_bytes(pickle.dumps(reply))


def _fork(task: Task, rank: int, alive: tuple[int, int], listener: socket.socket, import_error: str | None) -> _Rank:
    """Start one rank; its messages end when it does."""
    log = Path(task.directory) / f"rank_{rank}.log"
    log.write_text("")
    messages, answers = connection.Pipe(duplex=False)
    arguments = (task, rank, alive, listener, answers, log, import_error)
    process = get_context("fork").Process(target=_rank, args=arguments, name=f"rank {rank}")
    process.start()
    answers.close()
    return _Rank(process, messages, log)


def _collect(task: Task, ranks: dict[int, _Rank], requests: connection.Connection) -> Reply:
    """Wait until each rank has sent its outcome and has ended; after a failure end them all."""
    outcomes: dict[int, Outcome] = {}
    pending = {ranks[rank].messages: rank for rank in ranks}
    deadline = time.monotonic() + task.timeout
    failed = False
    while pending and (left := deadline - time.monotonic()) > 0:
        for ready in cast("list[connection.Connection]", connection.wait([*pending, requests], left)):
            if ready is requests:  # pytest has died or was interrupted: it never sends a task before the reply
                _end(ranks, 0.0)
                os._exit(0)
            rank = pending[ready]
            try:
                message = pickle.loads(ready.recv_bytes())
            except (EOFError, ConnectionError):
                outcomes.setdefault(rank, _death(ranks[rank]))
                message = DONE
            if message == DONE:
                del pending[ready]
            else:
                outcomes[rank] = message
            if not failed and rank in outcomes and outcomes[rank].failed:
                failed = True
                deadline = min(deadline, time.monotonic() + task.grace)
    stacks = _stacks(ranks, [rank for rank in pending.values() if rank not in outcomes])
    _end(ranks, 0.0 if pending else 5.0)
    return Reply(outcomes, stacks)


def _stacks(ranks: dict[int, _Rank], hanging: list[int]) -> dict[int, str]:
    for rank in hanging:
        os.kill(ranks[rank].process.pid, signal.SIGUSR2)  # faulthandler writes the stacks of all threads to the log
    if hanging:
        time.sleep(0.5)
    return {rank: _log_tail(ranks[rank].log) for rank in hanging}


def _death(rank: _Rank) -> Outcome:
    rank.process.join(2.0)
    text = f"the process ended with exit code {rank.process.exitcode} (negative: that signal)\n{_log_tail(rank.log)}"
    # Time 0: the other ranks see their connection break before this process sees the end, which explains their errors.
    return Outcome(0.0, error=text, error_name="died")


def _log_tail(log: Path) -> str:
    return log.read_text(errors="replace")[-_LOG_TAIL_CHARS:]


def _end(ranks: dict[int, _Rank], patience: float) -> None:
    """Wait for the ranks to end, each ``patience`` seconds, and kill them then."""
    for rank in ranks.values():
        rank.process.join(patience)
        if rank.process.is_alive():
            rank.process.kill()
            rank.process.join()
        rank.messages.close()


def _rank(task: Task, rank: int, alive, listener, answers, log: Path, import_error: str | None) -> None:
    """Run the task in this forked process, send its `Outcome` and `DONE`, and end the process."""
    os.close(alive[1])
    log_fd = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    faulthandler.enable(all_threads=True)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    threading.Thread(target=_exit_with_parent, args=(alive[0],), daemon=True).start()
    outcome = _run(task, rank, listener, import_error)
    if outcome.failed:
        outcome.log = _log_tail(log)
    answers.send_bytes(pickle.dumps(outcome))
    if not outcome.failed:  # a failed rank does not wait: its end frees the others
        _wait_for_the_others()
    answers.send_bytes(pickle.dumps(DONE))
    os._exit(0)


def _run(task: Task, rank: int, listener: socket.socket, import_error: str | None) -> Outcome:
    try:
        if import_error is not None:
            raise ImportError(f"the ranks could not import what they need:\n{import_error}")
        os.chdir(task.cwd)
        sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": task.world_size, "LOCAL_WORLD_SIZE": task.world_size}
        os.environ |= {name: str(size) for name, size in sizes.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(task.master_port)}
        random.seed(1234)
        if "torch" in sys.modules:  # undo what importing the module of the task may have done
            import torch

            torch.default_generator.manual_seed(1234)  # torch.manual_seed also keeps a stack for GPUs: 1 ms
            torch.set_num_threads(1)
        fn = _load(task)
        args, kwargs = pickle.loads(task.arguments)
        if task.init_process_group:
            from rank_groups import join_group

            # Longer than the call's: the server should find a rank that is stuck in a collective, with its stack.
            join_group(listener, rank, task.world_size, timedelta(seconds=2 * task.timeout + 60))
        result = pickle.dumps(fn(*args, **kwargs))
        return Outcome(time.monotonic(), result=result)
    except BaseException as error:  # pytest's outcomes and SystemExit are no Exceptions, and must be reported, too
        name = type(error).__name__
        text = str(error) if name == "Skipped" else traceback.format_exc()
        return Outcome(time.monotonic(), error=text, error_name=name)


def _wait_for_the_others() -> None:
    """Keep the sockets open while another rank still reads.  A failed peer breaks this barrier; this rank is fine."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.barrier()


def _load(task: Task) -> Callable[..., Any]:
    """Return the function of the task, from a loaded module or from its file under pytest's name of the module."""
    module: Any = sys.modules.get(task.module)
    if module is None:
        in_tests = task.file is not None and Path(__file__).parents[1] in Path(task.file).resolve().parents
        module = _load_test_file(task) if in_tests else importlib.import_module(task.module)
    function: Callable[..., Any] = module
    for part in task.qualname.split("."):
        function = getattr(function, part)
    return function


def _load_test_file(task: Task) -> types.ModuleType:
    """Execute a test file as pytest does: under its dotted name, with asserts that show their values."""
    assert task.file is not None
    spec = importlib.util.spec_from_file_location(task.module, task.file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    parents = task.module.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        name = ".".join(parents[:depth])
        directory = Path(task.file).parents[len(parents) - depth]  # where a test file finds its neighbours
        sys.modules.setdefault(name, types.ModuleType(name)).__dict__.setdefault("__path__", [str(directory)])
    code = _rewritten(Path(task.file))
    sys.modules[task.module] = module
    try:
        exec(code, module.__dict__)
    except BaseException:
        del sys.modules[task.module]
        raise
    return module


def _rewritten(file: Path) -> types.CodeType:
    """Return the code of a test file with pytest's asserts, from pytest's cache of bytecode where the file is there."""
    from _pytest.assertion import rewrite

    code: types.CodeType | None = rewrite._read_pyc(file, rewrite.get_cache_dir(file) / (file.stem + rewrite.PYC_TAIL))
    if code is not None:
        return code
    source = file.read_bytes()
    tree = ast.parse(source, str(file))
    rewrite.rewrite_asserts(tree, source, str(file))
    return compile(tree, str(file), "exec")


def _exit_with_parent(alive: int) -> None:
    with contextlib.suppress(OSError):
        os.read(alive, 1)
    os._exit(1)


def _import_once(modules: Sequence[str]) -> str | None:
    """Load what the ranks need, in the order it must have; return the traceback if that fails."""
    # Megatron warns about each optional accelerator that is absent; it says nothing about a test.
    warnings.simplefilter("ignore")
    gc.disable()  # almost all objects of the modules stay
    try:
        for name in modules:
            importlib.import_module(name)
        if "megatron_selfdistill.config" in sys.modules:
            _fill_caches_of_configurations()
        if "megatron_selfdistill.commands.announcement" in sys.modules:
            _ask_git_once()
        if "torch" in sys.modules:
            import torch
            from rank_groups import share_device

            share_device()
            torch.set_num_threads(1)
            torch.manual_seed(1234)  # the first call takes 3 ms, which no rank has to spend again
        if "megatron.core.dist_checkpointing.strategies.torch" in sys.modules:
            _write_checkpoints_in_this_process()
        gc.collect()
        _use_huge_pages()
        return None
    except Exception:
        return traceback.format_exc()
    finally:
        gc.set_threshold(20_000)  # a rank lives for seconds: collecting as often as by default takes a tenth of them
        gc.enable()
        warnings.resetwarnings()


def _ask_git_once() -> None:
    """Let every run announce the commit that git names now: each run would ask in three processes."""
    from megatron_selfdistill.commands import announcement

    commit = functools.cache(announcement.commit)
    commit(Path(announcement.__file__).parent)
    announcement.commit = commit


def _fill_caches_of_configurations() -> None:
    """Compose the files of tiny runs, and parse their overrides and values of every form, which are remembered."""
    import tiny_run

    from megatron_selfdistill.config import GivenKeys, compose, load

    compose._text_settings()  # those of all methods
    forms = tiny_run.overrides(Path("data"), Path("/runs/run-1_a"), "rollout.engine_args={a: [x, 1], b: /c/d_1.txt}")
    for overrides in (["optimizer=fp32"], forms):
        load(overrides)
        GivenKeys(overrides)  # as a run that has a checkpoint does


def _write_checkpoints_in_this_process() -> None:
    """Let a rank write the files of a checkpoint itself: a run forks two processes for every checkpoint of a rank.

    A fork takes 25 ms of a run whose steps take 60.  Checkpoints that a run writes in pytest's process fork as every
    run does.
    """
    from megatron_selfdistill.checkpoint import sharded_io

    @functools.wraps(sharded_io._written)  # a test that needs the processes finds the function as __wrapped__
    def written(buckets: Any, *how: Any) -> Any:
        found: dict[int, Any] = {}
        for number, bucket in enumerate(buckets):
            sender = types.SimpleNamespace(send=functools.partial(found.__setitem__, number))
            sharded_io._write_file(sender, number, bucket, *how)
        return next((one for one in found.values() if isinstance(one, Exception)), found)

    sharded_io._written = written


def _use_huge_pages() -> None:
    """Let the kernel join the pages of this process's memory, where Linux can: a fork then copies a smaller table."""
    maps, size, collapse = Path("/proc/self/maps"), 2**21, 25  # MADV_COLLAPSE, since Linux 6.1
    if not maps.exists():
        return
    madvise = ctypes.CDLL(None).madvise
    for line in maps.read_text().splitlines():
        addresses, access, _, _, _, *name = line.split()
        if access == "rw-p" and name in ([], ["[heap]"]):
            first, end = (int(word, 16) for word in addresses.split("-"))
            first, end = -(-first // size) * size, end // size * size
            if first < end:
                madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), collapse)
