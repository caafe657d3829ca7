# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The parts of a training step that step_time.py times, and the clock that separates them."""

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
    """Let ``clock`` time the parts of forward and backward in this context, fused or not.

    The clock around this context gets the time that is in none of the parts.
    """
    from megatron_selfdistill.loss.sharded import fused_linear, vocab_parallel
    from megatron_selfdistill.model.fused_loss import FusedLoss
    from megatron_selfdistill.pipeline import schedule, token_losses

    def of_model() -> str:
        return "student forward" if torch.is_grad_enabled() else "teacher forward"

    parts: list[tuple[Any, str, str | Callable[[], str]]] = [
        (schedule, "hidden_states", of_model),
        (schedule, "project", "output layer"),
        (fused_linear._Logits, "of", "output layer"),
        (token_losses, "distillation_loss", "loss"),
        (FusedLoss, "__call__", "loss"),
        (vocab_parallel._HandWrittenBackward, "backward", "loss"),
        (fused_linear._Backward, "backward", "loss"),
        (fused_linear.ProjectionGradients, "add", "backward"),
    ]
    with contextlib.ExitStack() as patches:
        for owner, attribute, name in parts:
            timed = clock.timing(name, getattr(owner, attribute))
            static = attribute == "backward"
            patches.enter_context(mock.patch.object(owner, attribute, staticmethod(timed) if static else timed))
        yield


@dataclass
class Clock:
    """Seconds by name; the seconds of an inner name do not count for the outer name.

    The clock waits for the device before and after each measurement.  A clock that is off measures nothing and does not
    wait.
    """

    on: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    _outer: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the seconds of this context to ``name``."""
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
        """Return ``work`` with its time measured under ``name``, which may be a function that returns the name."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(name if isinstance(name, str) else name()):
                return work(*args, **kwargs)

        return timed


def now() -> float:
    """Return seconds of the clock where a GPU computes, else of the processor, over all threads."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def wait() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
