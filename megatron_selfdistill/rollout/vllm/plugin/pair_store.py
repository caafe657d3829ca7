# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What is kept for each guided pair while an engine writes it: its uniforms, and what was drawn."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_selfdistill.rollout.base import sample_uniforms
from megatron_selfdistill.rollout.vllm.pairs import PairHalf, PairLog

_BYTES_PER_TOKEN = 12  # of the log, on the device
_MAX_BYTES = 2**31


class PairStore:
    """A table with one row, a *slot*, per pair, from its first half's admission until it is popped.

    It grows with the pairs that are open and goes back to nothing when none is.  Pairs that nobody pops (their driver
    died) are forgotten, oldest first, before the log exceeds ``max_bytes``; those that the caller names as live never.
    """

    def __init__(self, device: torch.device, max_bytes: int = _MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._slots: dict[str, int] = {}  # in order of admission
        self._free: list[int] = []
        self.uniforms = np.zeros((0, 0))
        """``[slots, width]`` float64: column i draws the i-th token from here on."""
        self.forced = np.zeros((0, 2), dtype=np.int64)
        """``[slots, 2]``: of student and teacher, `PairLog.forced`."""
        self.drawn = np.zeros(0, dtype=np.int64)
        """``[slots]``: tokens with an entry in the log."""
        self.log_probs = torch.zeros((0, 0, 3), device=device)
        """``[slots, width, 3]`` float32: of student, teacher and mix."""

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def num_bytes(self) -> int:
        """Of the log."""
        return self.log_probs.numel() * self.log_probs.element_size()

    def admit(self, half: PairHalf, live: Collection[str]) -> int:
        """The slot of the half's pair, made where it has none yet; ``live``: pairs that must not be forgotten."""
        if half.pair in self._slots:
            return self._slots[half.pair]
        if half.max_tokens > self.uniforms.shape[1]:
            self._resize(len(self.uniforms), half.max_tokens)
        if not self._free:
            self._make_room(live)
        slot = self._slots[half.pair] = self._free.pop()
        if not half.greedy:
            uniforms = sample_uniforms(half.seed, half.start + half.max_tokens)
            self.uniforms[slot, : half.max_tokens] = uniforms[half.start :]
        self.forced[slot] = -1
        self.drawn[slot] = 0
        return slot

    def pop(self, names: Sequence[str]) -> list[PairLog | None]:
        """What is known of each pair, which is then forgotten; None for a pair that is not known."""
        slots = [self._slots.pop(name, None) for name in names]
        known = [slot for slot in slots if slot is not None]
        if not known:
            return [None] * len(names)
        longest = int(self.drawn[known].max(initial=0))
        table = self.log_probs[known, :longest].cpu().numpy()
        rows = iter(table)
        logs = [
            None if slot is None else PairLog(self.forced[slot].tolist(), next(rows)[: self.drawn[slot]].copy())
            for slot in slots
        ]
        self._free += known
        if not self._slots:
            self._free = []
            self._resize(0, 0)
        return logs

    def _make_room(self, live: Collection[str]) -> None:
        """At least one free slot: twice as many, or those of forgotten pairs."""
        size, width = self.uniforms.shape
        larger = max(16, 2 * size)
        if larger * width * _BYTES_PER_TOKEN > self._max_bytes:
            forgotten = [name for name in self._slots if name not in live][: max(1, size // 4)]
            if forgotten:
                self._free += [self._slots.pop(name) for name in forgotten]
                return
        self._resize(larger, width)

    def _resize(self, size: int, width: int) -> None:
        old_size = min(len(self.uniforms), size)
        old_width = min(self.uniforms.shape[1], width)
        uniforms, log_probs = np.zeros((size, width)), self.log_probs.new_zeros((size, width, 3))
        uniforms[:old_size, :old_width] = self.uniforms[:old_size, :old_width]
        log_probs[:old_size, :old_width] = self.log_probs[:old_size, :old_width]
        forced, drawn = np.full((size, 2), -1, dtype=np.int64), np.zeros(size, dtype=np.int64)
        forced[:old_size], drawn[:old_size] = self.forced[:old_size], self.drawn[:old_size]
        self._free += range(old_size, size)
        self.uniforms, self.forced, self.drawn, self.log_probs = uniforms, forced, drawn, log_probs

    def write(self, slots: np.ndarray, positions: np.ndarray, log_probs: Tensor) -> None:
        """Log the draw of the token at ``positions [b]`` of ``slots [b]``: ``log_probs [b, 3]``.  Both halves were
        there to be given it, so a stop that was forced before did not take effect."""
        index = torch.from_numpy(np.stack([slots, positions])).to(self.log_probs.device)
        self.log_probs[index[0], index[1]] = log_probs.to(self.log_probs.dtype)
        self.drawn[slots] = positions + 1
        self.forced[slots] = -1
