# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Contexts that go to the replica that trains on them, with everything that the step needs of them.

A batch is moved after every rule that looks at the responses of a group or of a replica: the results of these rules,
the coefficients of the tokens, travel as numbers.  The loss of a step is a sum over the tokens of all replicas, so that
the place of a context changes the order of this sum and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from itertools import accumulate, islice, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_selfdistill.data.contexts import ContextPair, EpisodeTurn, TeacherPrompt
from megatron_selfdistill.distributed.host_to_device import to_device_in_one_copy
from megatron_selfdistill.distributed.parcels import broadcast_in_replica, cut, exchange_parcels
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.loss.weighting import TokenOwners
from megatron_selfdistill.sources.source import StepBatch

Parcel = list[NDArray[Any]]
"""Some contexts: sizes and flags (9 numbers each), token ids, bytes of texts, and the values of their tokens."""


def moved(batch: StepBatch, placement: Sequence[Sequence[int]] | None, grid: RankGrid) -> StepBatch:
    """Return ``batch`` with the contexts that ``placement`` gives to this replica: first those that stay, in order.

    ``placement``: the result of `placement_everywhere`; with None the batch stays as it is.  A context travels with its
    solution, its turn and the log-probs and coefficients of its tokens, whose bits stay the same.
    Collectives: none for None, else `exchange_parcels` and `broadcast_in_replica`, before which the host waits for the
    device.
    """
    if placement is None:
        return batch
    here, values = grid.dp_rank, _values_of_tokens(batch)

    def parcel_for(replica: int) -> Parcel:
        return _parcel(batch, values, [i for i, to in enumerate(placement[here]) if to == replica])

    receivers, senders = {*placement[here]} - {here}, [r for r, to in enumerate(placement) if r != here and here in to]
    received: Parcel = []
    if grid.is_first_of_replica:
        outgoing = {grid.first_rank_of(replica): parcel_for(replica) for replica in sorted(receivers)}
        parcels = exchange_parcels(outgoing, [grid.first_rank_of(replica) for replica in senders], grid.device)
        received = [array for replica in senders for array in parcels[grid.first_rank_of(replica)]]
    else:
        exchange_parcels({}, [], grid.device)
    arrays = [*parcel_for(here), *broadcast_in_replica(received, grid)]
    return _opened(batch, [np.concatenate(arrays[kind::4]) for kind in range(4)], grid.device)


def chosen(batch: StepBatch, indices: Sequence[int], device: torch.device) -> StepBatch:
    """Return ``batch`` with the contexts of ``indices`` alone, in this order; the bits of what belongs to them stay.

    The host waits for the device.  Collectives: none.
    """
    return _opened(batch, _parcel(batch, _values_of_tokens(batch), indices), device)


def _parcel(batch: StepBatch, values: NDArray[np.float64], indices: Sequence[int]) -> Parcel:
    """Return the contexts of ``indices``; ``values``: the result of `_values_of_tokens`."""
    spans = list(pairwise(accumulate(batch.response_lengths, initial=0)))
    solutions = batch.solutions or [""] * len(spans)
    sizes: list[int] = []
    tokens: list[int] = []
    texts: list[bytes] = []
    of_tokens = [values[:0]]
    for i in indices:
        context = batch.contexts[i]
        of_teacher = [token for one in context.of_teachers for token in one.prompt] or context.teacher_prompt
        of_teacher = [*of_teacher, *(token for prompt in context.control_prompts for token in prompt)]
        ids = context.student_prompt, of_teacher, context.response
        named = context.problem_id, solutions[i], context.teacher, _description(context)
        names = [text.encode("utf-8", "surrogatepass") for text in named]
        sizes += [*map(len, ids), *map(len, names), context.truncated, context.guided]
        tokens += [token for part in ids for token in part]
        texts += names
        of_tokens.append(values[slice(*spans[i])])
    bytes_of_texts = np.frombuffer(b"".join(texts), np.uint8)
    return [np.array(sizes, np.int32), np.array(tokens, np.int32), bytes_of_texts, np.concatenate(of_tokens).ravel()]


def _opened(batch: StepBatch, parcel: Parcel, device: torch.device) -> StepBatch:
    """Return ``batch`` with the contexts of ``parcel``, and what describes them and their tokens, in place of its own.

    Collectives: none.
    """
    sizes = parcel[0].reshape(-1, 9)
    tokens, texts = cut(parcel[1], sizes[:, :3].ravel()), cut(parcel[2], sizes[:, 3:7].ravel())
    contexts, solutions = [], []
    for truncated, guided in sizes[:, 7:9].tolist():
        student, teacher, response = islice(tokens, 3)
        name, text, reads, described = (bytes(part).decode("utf-8", "surrogatepass") for part in islice(texts, 4))
        teacher, several, turn, controls = _described(described, teacher)
        whether = bool(truncated), bool(guided)
        found = ContextPair(name, student, teacher, response, *whether, reads, several, turn, controls)
        contexts.append(found)
        solutions.append(text)
    lengths = [len(context.response) for context in contexts]
    values = torch.from_numpy(parcel[3].reshape(sum(lengths), len(_tensors(batch))))
    columns = iter(values.unbind(1))

    def of_tokens(tensor: Tensor) -> Tensor:
        return next(columns).to(tensor.dtype)

    def owners(old: TokenOwners) -> TokenOwners:
        return TokenOwners.of(lengths, old.over_ranks)

    on_host = [_rebuilt(tree, of_tokens, owners) for tree in (batch.sampler_log_probs, batch.token_coefficients)]
    sampler_log_probs, token_coefficients = to_device_in_one_copy(on_host, device)
    return replace(
        batch,
        contexts=contexts,
        solutions=solutions,
        sampler_log_probs=sampler_log_probs,
        token_coefficients=token_coefficients,
    )


def _description(context: ContextPair) -> str:
    """Return the teachers, the turn and the lengths of the controls as a text; "" for a context with none of them."""
    several = [(one.teacher, one.share, len(one.prompt)) for one in context.of_teachers]
    turn, controls = None if context.turn is None else asdict(context.turn), [*map(len, context.control_prompts)]
    return json.dumps([several, turn, controls]) if several or turn or controls else ""


def _described(
    text: str, tokens: list[int]
) -> tuple[list[int], tuple[TeacherPrompt, ...], EpisodeTurn | None, tuple[list[int], ...]]:
    """Return the teacher's prompt, and the teachers, the turn and the control prompts of a `_description`.

    ``tokens``: the prompts of the teacher, or of all teachers, and of the controls, one after the other.
    """
    several, turn, controls = json.loads(text) if text else ([], None, [])
    alone, prompts = len(tokens) - sum(controls), iter(tokens)
    teachers = tuple(TeacherPrompt(name, share, [*islice(prompts, length)]) for name, share, length in several)
    teacher = teachers[0].prompt if teachers else [*islice(prompts, alone)]
    of_controls = tuple([*islice(prompts, length)] for length in controls)
    return teacher, teachers, None if turn is None else EpisodeTurn(**turn), of_controls


def _values_of_tokens(batch: StepBatch) -> NDArray[np.float64]:
    """Return the values of `_tensors`, [R_total, k] float64, on the host."""
    tensors = _tensors(batch)
    if not tensors:
        return np.empty((sum(batch.response_lengths), 0))
    return torch.stack([tensor.double() for tensor in tensors], 1).cpu().numpy()


def _tensors(batch: StepBatch) -> list[Tensor]:
    """Return the k tensors [R_total] with a value for each response token, in an order that is equal on all ranks."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        assert tensor.shape == (sum(batch.response_lengths),), "every tensor of a coefficient has a value per token"
        found.append(tensor)
        return tensor

    for tree in (batch.sampler_log_probs, batch.token_coefficients):
        _rebuilt(tree, note, lambda owners: owners)
    return found


def _rebuilt(tree: Any, of_tokens: Callable[[Tensor], Tensor], of_owners: Callable[[TokenOwners], TokenOwners]) -> Any:
    """Return ``tree``, nested dataclasses, with its tensors and its `TokenOwners` replaced."""
    if isinstance(tree, Tensor):
        return of_tokens(tree)
    if isinstance(tree, TokenOwners):
        return of_owners(tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        changed = {f.name: _rebuilt(getattr(tree, f.name), of_tokens, of_owners) for f in fields(tree)}
        return replace(tree, **changed)
    return tree
