# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The uniforms of each guided pair, and the log of its samples, while an engine generates it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_selfdistill.rollout.base import sample_uniforms
from megatron_selfdistill.rollout.vllm.pair_messages import PairHalf, PairLog

_BYTES_PER_TOKEN = 12  # of the log, on the device
_MAX_BYTES = 2**31


class PairStore:
    """A table with one row, a *slot*, per pair, from the admission of its first half until it is popped.

    It grows with the number of open pairs and is freed when none is open.  Pairs that no driver pops (their driver
    died) are dropped, oldest first, before the log exceeds ``max_bytes``; pairs that the caller names as live are never
    dropped.
    """

    def __init__(self, device: torch.device, max_bytes: int = _MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._slots: dict[str, int] = {}  # in order of admission
        self._free: list[int] = []
        self.uniforms = np.zeros((0, 0))
        """Uniforms ``[slots, width]`` float64: token i from the start of the half is sampled from column i."""
        self.forced = np.zeros((0, 2), dtype=np.int64)
        """`PairLog.forced` of anchor and teacher, ``[slots, 2]``."""
        self.num_logged = np.zeros(0, dtype=np.int64)
        """Number of tokens with an entry in the log, ``[slots]``."""
        self.log_probs = torch.zeros((0, 0, 3), device=device)
        """Log-probs ``[slots, width, 3]`` float32 under anchor, teacher and mix, in nats."""

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def num_bytes(self) -> int:
        """Bytes of the log on the device."""
        return self.log_probs.numel() * self.log_probs.element_size()

    def admit(self, half: PairHalf, live: Collection[str]) -> int:
        """Return the slot of the half's pair, a new one for a new pair; ``live``: pairs that must not be dropped."""
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
        self.num_logged[slot] = 0
        return slot

    def pop(self, names: Sequence[str]) -> list[PairLog | None]:
        """Return the log of each pair and drop the pair; None for an unknown pair."""
        slots = [self._slots.pop(name, None) for name in names]
        known = [slot for slot in slots if slot is not None]
        if not known:
            return [None] * len(names)
        longest = int(self.num_logged[known].max(initial=0))
        table = self.log_probs[known, :longest].cpu().numpy()
        rows = iter(table)
        logs = [
            None if slot is None else PairLog(self.forced[slot].tolist(), next(rows)[: self.num_logged[slot]].copy())
            for slot in slots
        ]
        self._free += known
        if not self._slots:
            self._free = []
            self._resize(0, 0)
        return logs

    def _make_room(self, live: Collection[str]) -> None:
        """Make at least one free slot: twice as many slots, or the slots of dropped pairs."""
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
        forced, num_logged = np.full((size, 2), -1, dtype=np.int64), np.zeros(size, dtype=np.int64)
        forced[:old_size], num_logged[:old_size] = self.forced[:old_size], self.num_logged[:old_size]
        self._free += range(old_size, size)
        self.uniforms, self.forced, self.num_logged, self.log_probs = uniforms, forced, num_logged, log_probs

    def log(self, slots: np.ndarray, positions: np.ndarray, log_probs: Tensor) -> None:
        """Log the sample of the token at ``positions [b]`` of ``slots [b]``: ``log_probs [b, 3]``.

        Both halves were present, so a stop that was forced before took no effect.
        """
        index = torch.from_numpy(np.stack([slots, positions])).to(self.log_probs.device)
        self.log_probs[index[0], index[1]] = log_probs.to(self.log_probs.dtype)
        self.num_logged[slots] = positions + 1
        self.forced[slots] = -1
