# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Guided decoding inside vLLM: a logits processor that samples one token for the two requests of a pair.

In each step, for each pair (`rollout.vllm.pairs`) of which both halves are in the batch with equally many output tokens
n, token n is sampled from the mix of both rows and left as the only choice in both.  Every other half, whose partner is
absent or has another length, is left nothing but its stop token, and the number of tokens before it is recorded.

The following argument shows that every token that remains was sampled from both true contexts.  vLLM also samples rows
whose prompt has been read only in part, from meaningless logits, and discards their token; the processor cannot see
this.  But a half only gets longer by a token that was sampled for both halves, or by the stop that ends it.  Assume
that both halves end with at least n + 1 tokens of their own, forced stops not counted.  Each took its token n from a
sample that was taken when both had length n.  If these were two samples, the half that took its token from the earlier
one would have been longer than n at the later one: a contradiction.  So it was one sample, of which both halves kept
the token, so both prompts had been read and both rows were true.  After a partial prefill, a preemption or an early end
one half may have more tokens than the other: the driver cuts them off and asks for them again, with the same uniforms.
A stop that was forced on a row whose token vLLM discarded took no effect: the next sample erases its record.

The processor needs: the first model runner (V1), no async scheduling (rows must hold all their tokens when the next is
sampled), no speculative decoding, one pipeline stage, one data-parallel rank, the prefix cache, `PairScheduler`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import vllm
from torch import Tensor
from vllm import SamplingParams
from vllm.distributed import get_tp_group
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.rollout.base import sample_uniforms, select_mixed_tokens
from megatron_selfdistill.rollout.vllm.pairs import GUIDED_ENGINE_ARGS, why_not_guided
from megatron_selfdistill.rollout.vllm.protocol import ROLES, PairHalf, PairLog

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


_SCHEDULER = GUIDED_ENGINE_ARGS["scheduler_cls"]


class GuidedProcessor(LogitsProcessor):
    """The logits processor of guided requests, named by its path in vLLM's argument ``logits_processors``.

    It does not change requests that are no halves.  With tensor parallelism every rank has the gathered logits and its
    own processor; all take the samples of the first rank.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError for a half that could end or go on by itself."""
        half = PairHalf.of(sampling_params.extra_args)
        if half is None:
            return
        params, stops = sampling_params, sampling_params.stop_token_ids
        fits = params.temperature == 0 and params.n == 1 and params.min_tokens == 0
        if not fits or half.stop not in (stops or ()) or params.max_tokens != half.max_tokens:
            raise ValueError(
                "a half of a guided pair needs temperature 0, n 1, min_tokens 0, its stop among stop_token_ids and its "
                f"max_tokens ({half.max_tokens}); got temperature {params.temperature}, n {params.n}, min_tokens "
                f"{params.min_tokens}, {half.stop} among {stops}, max_tokens {params.max_tokens}"
            )

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        """Prepare for the requests of an engine; raise ValueError if its settings do not keep halves equally long."""
        refuse_settings(vllm_config)
        self._device = device
        self._tp_size = vllm_config.parallel_config.tensor_parallel_size
        self._store = PairStore(device)
        self._rows: dict[int, _Row] = {}  # by their place in the batch
        self._pairs: list[_Pairs] = []  # both halves are in the batch; one entry per target
        self._alone = _Halves.of([], self._store)
        self._popped = False

    def is_argmax_invariant(self) -> bool:
        """Return False: the processor changes which token is the most likely."""
        return False

    def pop(self, names: Sequence[str]) -> list[PairLog | None]:
        """Return the log of each pair whose halves have ended; see `PairStore.pop`."""
        self._popped = True  # a pair without a driver may still have rows, and its slot is another pair's from now on
        return self._store.pop(names)

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Take over the rows that have joined, left or moved in the batch."""
        changed = process_dict_updates(self._rows, batch_update, _row)
        if changed or (self._popped and self._rows):
            self._pair_up()
        self._popped = False

    def apply(self, logits: Tensor) -> Tensor:
        """Leave each half one token to choose; logits ``[b, V]`` float32 are changed in place."""
        for pairs in self._pairs:
            lengths = pairs.halves.lengths()
            positions, teacher_positions = np.split(lengths, 2)
            in_step = positions == teacher_positions
            if in_step.all():
                self._sample(logits, pairs, pairs.rows, pairs.slots, positions)
                continue
            self._stop(logits, pairs.halves, lengths, np.tile(~in_step, 2))
            if in_step.any():
                rows = pairs.rows[:, torch.from_numpy(in_step).to(self._device)]
                self._sample(logits, pairs, rows, pairs.slots[in_step], positions[in_step])
        if self._alone.outputs:
            self._stop(logits, self._alone, self._alone.lengths(), np.ones(len(self._alone.outputs), dtype=bool))
        return logits

    def _sample(self, logits: Tensor, pairs: _Pairs, rows: Tensor, slots: np.ndarray, positions: np.ndarray) -> None:
        """Sample one token for each pair of ``rows [2, b]``: token number ``positions`` of its two outputs."""
        uniforms = torch.from_numpy(self._store.uniforms[slots, positions]).to(self._device)
        anchor = logits[rows[0]]
        sampled = select_mixed_tokens(
            anchor,  # in the student's place, too, whose logits the target of `why_not_in_pairs` does not need
            logits[rows[1]],
            uniforms,
            pairs.target,
            greedy=pairs.greedy,
            reference_logits=anchor if pairs.target.is_anchored else None,
        )
        values = torch.stack(
            [
                sampled.token_ids.double(),
                sampled.student_log_probs,
                sampled.teacher_log_probs,
                sampled.mixed_log_probs,
            ]
        )
        if self._tp_size > 1:
            # A GPU's sums may differ in the last bit between two ranks, and all later tokens with them.
            values = get_tp_group().broadcast(values, src=0)
        self._store.log(slots, positions, values[1:].T)
        _leave_only(logits, rows.flatten(), values[0].long().repeat(2))

    def _stop(self, logits: Tensor, halves: _Halves, lengths: np.ndarray, chosen: np.ndarray) -> None:
        """Leave the ``chosen`` halves nothing but their stop tokens, and record their lengths."""
        rows_and_stops = torch.from_numpy(np.stack([halves.rows[chosen], halves.stops[chosen]])).to(self._device)
        _leave_only(logits, *rows_and_stops)
        self._store.forced[halves.slots[chosen], halves.roles[chosen]] = lengths[chosen]

    def _pair_up(self) -> None:
        """Sort the rows of the present batch into pairs, by target, and rows without a partner."""
        halves = {(row.half.pair, row.half.role): (index, row) for index, row in self._rows.items()}
        groups: dict[tuple[Target, bool], list[list[tuple[int, _Row]]]] = {}
        alone = []
        for (name, role), (index, row) in halves.items():
            partner = halves.get((name, ROLES[1 - ROLES.index(role)]))
            if partner is None or partner[1].shared != row.shared:
                alone.append((index, row))
            elif role == ROLES[0]:
                groups.setdefault((row.half.target, row.half.greedy), []).append([(index, row), partner])
        live = {name for name, _ in halves}
        self._alone = _Halves.of(alone, self._store, live)
        self._pairs = [
            _Pairs.of(target, greedy, members, self._store, live, self._device)
            for (target, greedy), members in groups.items()
        ]


def guided_processor(processors: Iterable[LogitsProcessor]) -> GuidedProcessor:
    """Return the guided processor of a model runner.

    Raises RuntimeError where the engine was made without it.
    """
    for processor in processors:
        if isinstance(processor, GuidedProcessor):
            return processor
    raise RuntimeError("this engine takes no guided requests: it was started without the guided logits processor")


def refuse_settings(vllm_config: Any) -> None:
    """Raise ValueError for an engine or a version of vLLM on which guided rollouts would not work.

    The engine must keep the halves of a pair equally long, and guided rollouts must have run on the version of vLLM.
    """
    refusal = why_not_guided(vllm.__version__)
    if refusal is not None:
        raise ValueError(refusal)
    scheduler, parallel, cache = vllm_config.scheduler_config, vllm_config.parallel_config, vllm_config.cache_config
    room = 2 * cache.block_size
    wrong = {
        "the first model runner (VLLM_USE_V2_MODEL_RUNNER=0)": vllm_config.use_v2_model_runner,
        "async_scheduling=False": scheduler.async_scheduling,
        "no speculative decoding": vllm_config.speculative_config is not None,
        "pipeline_parallel_size=1": parallel.pipeline_parallel_size > 1,
        "data_parallel_size=1 (one server per engine instead)": parallel.data_parallel_size > 1,
        "enable_prefix_caching=True": not cache.enable_prefix_caching,
        f"scheduler_cls={_SCHEDULER}, got {scheduler.scheduler_cls}": scheduler.scheduler_cls != _SCHEDULER,
        f"an even max_num_seqs, got {scheduler.max_num_seqs}": scheduler.max_num_seqs % 2 == 1,
        f"max_num_batched_tokens of at least two cache blocks ({room}), got {scheduler.max_num_batched_tokens}": (
            scheduler.max_num_batched_tokens < room
        ),
    }
    needed = [setting for setting, is_wrong in wrong.items() if is_wrong]
    if needed:
        raise ValueError(f"rollout.guidance=mixed needs an engine with: {'; '.join(needed)}")


@dataclass(frozen=True)
class _Row:
    """A row of the batch that is one half of a pair."""

    half: PairHalf
    """The half of a pair that this row generates."""
    outputs: list[int]
    """Token ids up to now, in a list that vLLM owns and extends."""
    shared: PairHalf
    """The fields that both halves must have in common: `half` without its role and its stop."""


@dataclass(frozen=True)
class _Halves:
    """The numbers of several halves that a step needs; arrays ``[n]`` int64 in the host's memory."""

    outputs: list[list[int]]
    rows: np.ndarray
    slots: np.ndarray
    stops: np.ndarray
    roles: np.ndarray

    @staticmethod
    def of(members: Sequence[tuple[int, _Row]], store: PairStore, live: Collection[str] = ()) -> _Halves:
        columns = [
            (index, store.admit(row.half, live), row.half.stop, ROLES.index(row.half.role)) for index, row in members
        ]
        arrays = np.array(columns, dtype=np.int64).reshape(-1, 4).T
        return _Halves([row.outputs for _, row in members], *arrays)

    def lengths(self) -> np.ndarray:
        return np.fromiter(map(len, self.outputs), dtype=np.int64, count=len(self.outputs))


@dataclass(frozen=True)
class _Pairs:
    """Pairs that share a target and of which both halves are in the batch."""

    target: Target
    greedy: bool
    halves: _Halves
    """The anchors' halves, then the teachers' in the same order."""
    slots: np.ndarray
    """Slot of each pair in the `PairStore`, ``[b]``."""
    rows: Tensor
    """Rows of the batch with the anchors' and the teachers' halves, ``[2, b]`` on the device."""

    @staticmethod
    def of(
        target: Target,
        greedy: bool,
        members: Sequence[Sequence[tuple[int, _Row]]],
        store: PairStore,
        live: Collection[str],
        device: torch.device,
    ) -> _Pairs:
        anchors, teachers = zip(*members, strict=True)
        halves = _Halves.of([*anchors, *teachers], store, live)
        rows = torch.from_numpy(halves.rows.reshape(2, -1)).to(device)
        return _Pairs(target, greedy, halves, halves.slots[: len(members)], rows)


def _row(params: SamplingParams, _prompt: list[int] | None, outputs: list[int]) -> _Row | None:
    half = PairHalf.of(params.extra_args)
    return None if half is None else _Row(half, outputs, shared=replace(half, role="", stop=0))


def _leave_only(logits: Tensor, rows: Tensor, tokens: Tensor) -> None:
    logits.index_fill_(0, rows, -torch.inf)
    logits[rows, tokens] = 0
