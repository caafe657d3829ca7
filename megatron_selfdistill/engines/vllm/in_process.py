# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One vLLM engine inside the trainer's own processes, and protection of these processes from it.

vLLM assumes that a process is its own: it seeds every random generator, replaces functions of torch, moves to a CUDA
stream of its own, sets environment variables, and ends the default process group with the engine.
`trainer_state.trainer_state_kept` undoes all of these changes except the last one; the engine here ends its own groups
only.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.distributed.signs_of_life import beat
from megatron_selfdistill.engines.vllm.engine import (
    WORKER_EXTENSION,
    EngineRequest,
    cpu_engine_args,
    possible_response,
    stated_in_process,
)
from megatron_selfdistill.engines.vllm.engine_adapter import ADAPTER_ID, ADAPTER_NAME, ADAPTER_PATH, EngineAdapter
from megatron_selfdistill.errors import ConfigError, EngineError
from megatron_selfdistill.interop.hf_files import read_config
from megatron_selfdistill.rollout.base import Response


def in_process_engine_args(
    directory: Path, device: torch.device, *, engine_tp: int, settings: Mapping[str, Any], adapter: EngineAdapter | None
) -> dict[str, Any]:
    """Return the arguments of ``vllm.LLM`` for an engine on ``device`` of ``engine_tp`` ranks of the trainer.

    ``directory`` has the model's config.json.  ``settings``: arguments that override those that are set here, among
    them ``max_model_len``, but not the ranks of the engine.  If torch's segments of GPU memory expand, these ranks add
    up by NCCL alone: vLLM's own all-reduce takes CUDA IPC handles while CUDA graphs are captured, which such memory
    does not have, and the process would end.
    """
    arguments: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "trust_remote_code": False,  # rollout.engine_args may say otherwise
        "load_format": "dummy",
        "generation_config": "vllm",
        "disable_log_stats": True,
        "enable_sleep_mode": device.type == "cuda",
        "worker_extension_cls": WORKER_EXTENSION,
    }
    if device.type == "cpu":
        arguments |= cpu_engine_args(read_config(directory), settings["max_model_len"])
    if adapter is not None:
        arguments |= adapter.engine_args(on_cpu=device.type == "cpu")
    ranks: dict[str, Any] = {
        "tensor_parallel_size": engine_tp,
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "distributed_executor_backend": "external_launcher",
    }
    if device.type == "cuda" and engine_tp > 1 and _EXPANDABLE.search(_allocator_settings()):
        ranks["disable_custom_all_reduce"] = True
    return arguments | dict(settings) | ranks


_EXPANDABLE = re.compile(r"expandable_segments\s*:\s*true", re.IGNORECASE)


@contextlib.contextmanager
def without_expandable_segments() -> Iterator[None]:
    """Let torch allocate GPU memory by cudaMalloc inside, whatever its settings; other settings stay as they are.

    Memory of expandable segments needs other handles, which torch 2.11 to 2.13 do not open reliably.
    """
    settings = _allocator_settings()
    if not _EXPANDABLE.search(settings):
        yield
        return
    torch._C._accelerator_setAllocatorSettings(_EXPANDABLE.sub("expandable_segments:False", settings))
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings(settings)


def _allocator_settings() -> str:
    """Return all settings of torch's allocator in its own form, since torch resets those that a new string lacks."""
    return torch._C._accelerator_getAllocatorSettings()


# The functions that vLLM's CPU worker replaces although compat/cpu.py has replaced them already, or replaces
# permanently.
_REPLACED: dict[Any, tuple[str, ...]] = {
    torch: ("set_num_threads",),
    torch.cuda: ("Event", "Stream", "stream", "current_stream", "set_stream"),
    torch.Tensor: ("pin_memory", "record_stream"),
}

# The CUDA stream on which vLLM left this thread, and the function of vLLM's that follows every change of the stream.
_vllms_stream: tuple[Any, Callable[[Any], None]] | None = None


@contextlib.contextmanager
def trainer_state_kept(environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Let vLLM work, with ``environment`` set, and restore the state of the process afterwards.

    The state is: the random generators (Python's, numpy's, torch's, CUDA's), the environment, the number of threads,
    the precision of matrix products, the filters of warnings, functions of torch, and the current CUDA stream.  Inside,
    the current stream is the stream on which vLLM was at the end of the previous call; each of the two streams waits
    for the other where they change.
    """
    environ = dict(os.environ)
    _set_environment({**environ, **(environment or {})})
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if _has_cuda() else None
    precision, num_threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    functions = {(owner, name): getattr(owner, name) for owner, names in _REPLACED.items() for name in names}
    trainers_stream = torch.cuda.current_stream() if _has_cuda() else None
    if trainers_stream is not None:
        _enter_vllms_stream(trainers_stream)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if trainers_stream is not None:
            _note_vllms_stream(trainers_stream)
        for (owner, name), function in functions.items():
            setattr(owner, name, function)
        if trainers_stream is not None:
            torch.cuda.set_stream(trainers_stream)
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        _set_environment(environ)


def _enter_vllms_stream(trainers_stream: Any) -> None:
    """Go back to vLLM's stream, which vLLM takes for the current one, and let it wait for the trainer's work."""
    if _vllms_stream is None:
        return
    stream, set_stream = _vllms_stream
    torch.cuda.set_stream = set_stream  # type: ignore[assignment]
    if stream != trainers_stream:
        stream.wait_stream(trainers_stream)
    set_stream(stream)


def _note_vllms_stream(trainers_stream: Any) -> None:
    """Remember vLLM's stream, and let the trainer's stream wait for the work that vLLM has started there."""
    global _vllms_stream
    stream = torch.cuda.current_stream()
    _vllms_stream = stream, torch.cuda.set_stream
    if stream != trainers_stream:
        trainers_stream.wait_stream(stream)


def _set_environment(environment: Mapping[str, str]) -> None:
    # What is right already is not touched: other threads may be reading it.
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _has_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# Defaults, unless the user has set these variables.
_QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}

# Directory in which vLLM's ranks on a CPU exchange their sums.
_SHARED_MEMORY = Path("/dev/shm")
# Version that an engine reports while its weights are being replaced, and after an update that failed.
_INCOMPLETE = "incomplete"

_live: InProcessEngine | None = None


class InProcessEngine:
    """``engine_tp`` consecutive ranks of the trainer that hold the model once more, as vLLM holds it; one per process.

    Each of its ranks calls every method, with equal arguments, and gets equal results: vLLM schedules on each rank by
    itself.  Where one rank fails and the others do not, the others wait for the failed rank until the timeout of the
    process groups.  Weights are random until `load`.
    """

    def __init__(
        self,
        directory: Path,
        device: torch.device,
        ident: str,
        *,
        engine_tp: int,
        settings: Mapping[str, Any],
        vocab_size: int,
        adapter: EngineAdapter | None = None,
    ) -> None:
        """Start the engine on the model of ``directory``'s config.json.

        ``ident``: a name that no other run on this machine has, equal on all ranks.  ``settings``: arguments of
        ``vllm.LLM`` (`in_process_engine_args`).  ``vocab_size``: number of the model's tokens.  ``adapter``: the
        adapters of the run, if it has any; then `load_adapter` comes after `load` and before the first `generate`.

        Collectives: process groups over the world; every rank of it builds its engine at the same time. Raises:
        `ConfigError` where vLLM is not installed, where it refuses the model or the settings, and where this process
        has an engine already; `EngineError` where it fails otherwise.
        """
        global _live
        if _live is not None:
            raise ConfigError("this process has a vLLM engine already: close its sampler before the next one is built")
        self.rank, self.ident, self._adapter, self._vocab_size = dist.get_rank(), ident, adapter, vocab_size
        # Only CUDA's virtual memory can be freed and allocated again under the same addresses.
        self.can_sleep = device.type == "cuda"
        arguments = in_process_engine_args(directory, device, engine_tp=engine_tp, settings=settings, adapter=adapter)
        environment = {name: os.environ.get(name, value) for name, value in _QUIET.items()} | _ENVIRONMENT
        if self.can_sleep:
            torch.cuda.empty_cache()  # the blocks that torch keeps for reuse may be of expandable segments
        with trainer_state_kept(environment), without_expandable_segments():
            self._llm = _started(directory, arguments, self.rank, device.index or 0, ident)
        _live = self

    @property
    def name(self) -> str:
        """The name of the engine in messages."""
        return f"the vLLM engine of rank {self.rank}"

    def generate(
        self, requests: Sequence[EngineRequest], report: Callable[[int], None] = lambda finished: None
    ) -> list[Response]:
        """Return one response per request, in order.

        ``report`` gets the number of finished requests after each pass of the engine.
        Raises `EngineError` if a response is missing, was aborted, or cannot be true (`possible_response`).
        """
        if not requests:
            return []
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        llm = self._alive()
        if llm.get_weight_version() == _INCOMPLETE:
            # Incomplete weights would fill the KV cache with NaN, which remains after the next update: unused places of
            # the cache are multiplied by 0, and 0 * NaN is NaN.
            raise EngineError(f"{self.name} has a part of its weights: their update has failed")
        prompts = [{"prompt_token_ids": request.token_ids} for request in requests]
        params = [SamplingParams(**request.sampling) for request in requests]
        lora = None if self._adapter is None else LoRARequest(ADAPTER_NAME, ADAPTER_ID, ADAPTER_PATH)
        step, finished = llm.llm_engine.step, 0

        def step_and_report() -> Any:
            nonlocal finished
            beat()
            outputs = step()
            finished += sum(output.finished for output in outputs)
            report(finished)
            return outputs

        with trainer_state_kept(), _replaced(llm.llm_engine, "step", step_and_report):
            try:
                outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=lora)
            except Exception as error:
                engine = llm.llm_engine
                with contextlib.suppress(Exception):  # the next batch must not meet these requests
                    engine.abort_request(list(engine.output_processor.request_states), internal=True)
                raise EngineError(f"{self.name} failed in mid-batch: {_on_one_line(error)}") from error
        if len(outputs) != len(requests):
            raise EngineError(f"{self.name} was asked for {len(requests)} responses and gave {len(outputs)}")
        return [
            possible_response(request, stated_in_process(output), self._vocab_size, self.name)
            for output, request in zip(outputs, requests, strict=True)
        ]

    def load(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights by ``tensors``, by Hugging Face names, cast to the engine's dtype.

        Everything that was cached with the old weights is dropped.  Raises `EngineError`; then `generate` raises it
        too, until another `load`.
        """
        from megatron_selfdistill.engines.vllm.packed import after_reload, before_reload

        llm = self._alive()
        with self._replacing(version):
            try:
                llm.apply_model(before_reload)
                llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors)})
                llm.apply_model(after_reload)
            except Exception:
                _abandon_reload(llm)
                raise

    def load_adapter(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the factors of the adapters by ``tensors``, by PEFT's names, cast to the engine's dtype.

        The weights stay.  Caches and errors are as for `load`, after which the engine has no adapters.
        """
        from megatron_selfdistill.engines.vllm.plugin.adapter_loader import load_adapter

        assert self._adapter is not None, "the engine was started without adapters"
        with self._replacing(version):
            factors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors}
            self._alive().collective_rpc(lambda worker: load_adapter(worker.model_runner, factors, self._adapter))

    @contextlib.contextmanager
    def _replacing(self, version: int) -> Iterator[None]:
        """Keep `generate` from working while weights are replaced, and drop what was cached with the old weights."""
        llm = self._alive()
        with trainer_state_kept():
            llm.update_weight_version(_INCOMPLETE)
            try:
                yield
            except Exception as error:
                raise EngineError(f"{self.name} refused the weights: {_on_one_line(error)}") from error
            if not llm.reset_prefix_cache():
                raise EngineError(f"{self.name} still uses its prefix cache of older weights")
            llm.update_weight_version(str(version))

    def sleep(self) -> None:
        """Give weights and KV cache back to the device; `wake` and `load` come before the next `generate`.

        Frozen weights of an engine with adapters rest in the memory of the host: `wake` brings them back, and
        `load_adapter` alone comes before the next `generate`.
        """
        with trainer_state_kept():
            self._alive().sleep(level=2 if self._adapter is None else 1)

    def wake(self, what: str) -> None:
        """Allocate memory again for ``what``: weights, then, when they are loaded, kv_cache."""
        with trainer_state_kept():
            self._alive().wake_up(tags=[what])

    def close(self) -> None:
        """End the engine, without the trainer's process groups; may be called twice."""
        global _live
        if _live is self:
            _live = None
        llm, self._llm = self._llm, None
        if llm is None:
            return
        core = llm.llm_engine.engine_core.engine_core
        with trainer_state_kept(), _groups_may_be_gone():
            core.structured_output_manager.clear_backend()
            core.model_executor.shutdown()  # since 0.33 it ends vLLM's groups but that of the world
            core.scheduler.shutdown()
            _forget_groups()
        del core, llm
        gc.unfreeze()  # vLLM's engine froze what lived when it started, itself included
        gc.collect()
        if self.can_sleep:
            torch.cuda.empty_cache()

    def _alive(self) -> Any:
        if self._llm is None:
            raise EngineError(f"{self.name} is closed")
        return self._llm


def _started(directory: Path, arguments: dict[str, Any], rank: int, local_rank: int, ident: str) -> Any:
    """Return a ``vllm.LLM`` on this trainer's ranks; raise each failure as an error with one message."""
    try:
        from vllm import LLM
        from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher
    except ImportError as error:
        raise ConfigError(
            f"rollout.placement=colocated needs vLLM in the trainer's environment ({error}); or set it to server"
        ) from error

    def distributed_args(self: Any) -> tuple[str, int, int]:
        # vLLM's own function reads RANK and LOCAL_RANK, which a plain `python` start does not have.  The default group
        # exists, so vLLM uses the address only as a name of shared memory, and with "env://" all runs on a machine
        # would share one name.
        return f"env://:{ident}", rank, local_rank

    try:
        with _replaced(ExecutorWithExternalLauncher, "_distributed_args", distributed_args), _memory_not_bound():
            llm = LLM(str(directory), **arguments)
    except Exception as error:
        _forget_groups()
        refused = isinstance(error, (ValueError, TypeError, NotImplementedError))
        message = (
            f"vLLM cannot run this model with rollout.kv_cache_gb and rollout.engine_args as set: {_on_one_line(error)}"
        )
        raise ConfigError(message) if refused else EngineError(message) from error
    # The finalizer would end torch.distributed completely, when the engine is collected or at exit.
    llm.llm_engine.engine_core._finalizer.detach()
    # Every rank has mapped these files by now.  vLLM removes the names for the engine of rank 0 only, and not after a
    # kill.
    for path in _SHARED_MEMORY.glob(f"{ident}-*"):
        path.unlink(missing_ok=True)
    return llm


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _abandon_reload(llm: Any) -> None:
    """End an incomplete reload, so that layers which got a part of their weights do not count it in the next reload."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    with set_current_vllm_config(llm.llm_engine.vllm_config):
        llm.apply_model(lambda model: finalize_layerwise_reload(model, llm.model_config))


@contextlib.contextmanager
def _memory_not_bound() -> Iterator[None]:
    """Keep vLLM from binding this process's memory to one NUMA node for good, as it does on a CPU."""
    import vllm._custom_ops  # noqa: F401  (loads the operators)

    if hasattr(torch.ops._C, "init_cpu_memory_env"):
        with _replaced(torch.ops._C, "init_cpu_memory_env", lambda nodes: None):
            yield
    else:
        yield


def _forget_groups() -> None:
    """End vLLM's own process groups and no others, unlike vLLM's `destroy_distributed_environment`, which ends all."""
    import vllm.distributed
    from vllm import envs

    parallel_state = vllm.distributed.parallel_state
    with _groups_may_be_gone():
        parallel_state.destroy_model_parallel()
        if parallel_state._WORLD is not None:
            parallel_state._WORLD.destroy()
        parallel_state._WORLD = parallel_state._NODE_COUNT = None
    envs.disable_envs_cache()


@contextlib.contextmanager
def _groups_may_be_gone() -> Iterator[None]:
    """Let vLLM end its process groups without an error, even where the trainer has ended every group before."""
    import vllm.distributed

    coordinator = vllm.distributed.parallel_state.GroupCoordinator
    destroy = coordinator.destroy

    def end(group: Any) -> None:
        if dist.is_initialized():
            with contextlib.suppress(ValueError, AssertionError):
                destroy(group)

    with _replaced(coordinator, "destroy", end):
        yield


def _on_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
