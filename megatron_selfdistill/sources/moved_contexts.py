# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Contexts that go to the replica that trains on them, with everything that the step needs of them.

A batch is moved after every rule that looks at the responses of a group or of a replica: the results of these rules,
the coefficients of the tokens, travel as numbers.  The loss of a step is a sum over the tokens of all replicas, so that
the place of a context changes the order of this sum and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.distributed.host_to_device import to_device
from megatron_selfdistill.distributed.parcels import broadcast_in_replica, exchange_parcels
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.loss.weighting import TokenOwners
from megatron_selfdistill.sources.source import StepBatch


class Parcel(NamedTuple):
    """Some contexts, and what the step needs of them."""

    contexts: list[ContextPair]
    solutions: list[str]
    """The solution of each context; empty if the batch has none."""
    values: NDArray[np.float64]
    """The values of the contexts' response tokens, [R, k]; see `_values_of_tokens`."""


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
    received: list[Parcel] = []
    if grid.is_first_of_replica:
        outgoing = {grid.first_rank_of(replica): parcel_for(replica) for replica in sorted(receivers)}
        parcels = exchange_parcels(outgoing, [grid.first_rank_of(replica) for replica in senders], grid.device)
        received = [parcels[grid.first_rank_of(replica)] for replica in senders]
    else:
        exchange_parcels({}, [], grid.device)
    return _opened(batch, [parcel_for(here), *broadcast_in_replica(received, grid)], grid.device)


def chosen(batch: StepBatch, indices: Sequence[int], device: torch.device) -> StepBatch:
    """Return ``batch`` with the contexts of ``indices`` alone, in this order; the bits of what belongs to them stay.

    The host waits for the device.  Collectives: none.
    """
    return _opened(batch, [_parcel(batch, _values_of_tokens(batch), indices)], device)


def _parcel(batch: StepBatch, values: NDArray[np.float64], indices: Sequence[int]) -> Parcel:
    """Return the contexts of ``indices``; ``values``: the result of `_values_of_tokens`."""
    spans = list(pairwise(accumulate(batch.response_lengths, initial=0)))
    return Parcel(
        [batch.contexts[i] for i in indices],
        [batch.solutions[i] for i in indices] if batch.solutions else [],
        np.concatenate([values[:0], *(values[slice(*spans[i])] for i in indices)]),
    )


def _opened(batch: StepBatch, parcels: Sequence[Parcel], device: torch.device) -> StepBatch:
    """Return ``batch`` with the contexts of ``parcels``, and what describes them and their tokens, in place of its own.

    Collectives: none.
    """
    contexts = [context for parcel in parcels for context in parcel.contexts]
    lengths = [len(context.response) for context in contexts]
    columns = iter(torch.from_numpy(np.concatenate([parcel.values for parcel in parcels])).unbind(1))

    def of_tokens(tensor: Tensor) -> Tensor:
        return next(columns).to(tensor.dtype)

    def owners(old: TokenOwners) -> TokenOwners:
        return TokenOwners.of(lengths, old.over_ranks)

    on_host = [_rebuilt(tree, of_tokens, owners) for tree in (batch.sampler_log_probs, batch.token_coefficients)]
    sampler_log_probs, token_coefficients = to_device(on_host, device)
    return replace(
        batch,
        contexts=contexts,
        solutions=[solution for parcel in parcels for solution in parcel.solutions],
        sampler_log_probs=sampler_log_probs,
        token_coefficients=token_coefficients,
    )


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
        return replace(tree, **{f.name: _rebuilt(getattr(tree, f.name), of_tokens, of_owners) for f in fields(tree)})
    return tree
