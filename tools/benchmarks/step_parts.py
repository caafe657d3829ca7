# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The parts of a training step that step_time.py times, and the clock that tells them apart."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

PARTS = (
    "rollout",
    "teacher forward",
    "student forward",
    "output layer",
    "loss",
    "backward",
    "optimizer",
    "weight sync",
)


@contextlib.contextmanager
def timed_parts(clock: Clock) -> Iterator[None]:
    """Inside, ``clock`` times the parts of forward and backward, fused or not; what is in none of them is left to the
    clock around it."""
    from megatron_selfdistill.loss.sharded import fused_linear, vocab_parallel
    from megatron_selfdistill.model.output_layer import FusedLoss
    from megatron_selfdistill.pipeline import schedule

    def of_model() -> str:
        return "student forward" if torch.is_grad_enabled() else "teacher forward"

    parts: list[tuple[Any, str, str | Callable[[], str]]] = [
        (schedule, "hidden_states", of_model),
        (schedule, "project", "output layer"),
        (fused_linear._Logits, "of", "output layer"),
        (schedule, "distillation_loss", "loss"),
        (FusedLoss, "__call__", "loss"),
        (vocab_parallel._HandWrittenBackward, "backward", "loss"),
        (fused_linear._Backward, "backward", "loss"),
        (fused_linear._Gradients, "add", "backward"),
    ]
    with contextlib.ExitStack() as patches:
        for owner, attribute, name in parts:
            timed = clock.timing(name, getattr(owner, attribute))
            static = attribute == "backward"
            patches.enter_context(mock.patch.object(owner, attribute, staticmethod(timed) if static else timed))
        yield


@dataclass
class Clock:
    """Seconds by name, those of a name timed within another one not counted to the outer one; waits for the device
    around each.  Off, it does nothing and waits for nothing."""

    on: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    _outer: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        wait()
        began = now()
        self._outer.append(name)
        yield
        wait()
        took = now() - began
        self._outer.pop()
        self._add(name, took)
        if self._outer:
            self._add(self._outer[-1], -took)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def timing(self, name: str | Callable[[], str], work: Callable[..., Any]) -> Callable[..., Any]:
        """``work``, timed; a function says the name at each call."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(name if isinstance(name, str) else name()):
                return work(*args, **kwargs)

        return timed


def now() -> float:
    """Return seconds of the clock where a GPU computes, else of the processor, over all threads."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def wait() -> None:
    """For the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
