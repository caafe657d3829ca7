# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Restore the state of the trainer's process after every call of an engine, since vLLM changes it like its own."""

from __future__ import annotations

import contextlib
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

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
