# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Collectives over Python values, and the one rule for an error that only some ranks meet.

Every function here is a collective: all ranks of the group call it, in the same order.

**After an error.** Each function that runs ``work`` either returns on every rank or raises on every rank, with the same
type and the same message, once every rank has ended its ``work``.  A rank that catches this error may therefore go on
with the next collective, since no rank waits in an earlier one.  The exceptions of `errors` that a user meets and plain
ValueErrors keep their types.  Any other exception becomes the function's ``unexpected`` type, and its message begins
with the name of its own type.  The error has the type that the first failing rank raised, its message names the ranks,
and on a failing rank the original exception is its cause.

``work`` may call a collective only if that collective fails on all ranks alike.  An error of a collective itself (a
rank died, a timeout) is different: it leaves the process group unusable, and the process must end.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_selfdistill.distributed.integers import device_of_world, max_over_ranks
from megatron_selfdistill.errors import OF_ALL_RANKS, CheckpointError, first_few

T = TypeVar("T")

_HEARTBEAT_SECONDS = 10.0
_Failure = tuple[type[Exception], str]


def run_on_rank_0(work: Callable[[], T], unexpected: type[Exception] = CheckpointError) -> T:
    """Run ``work`` on rank 0 of the world and return its result, pickled, on every rank.

    ``work`` ends within the timeout of a collective; `run_long_on_rank_0` is for longer work.
    Collectives: one broadcast.  Raises on all ranks what ``work`` raises.
    """
    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as raised:
            error, outcome[1] = raised, _failure(raised, unexpected)
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome
    if failure is not None:
        kind, message = failure
        raise kind(message) from error
    return result  # type: ignore[no-any-return]


def run_long_on_rank_0(work: Callable[[], T], unexpected: type[Exception] = CheckpointError) -> T | None:
    """Run ``work`` on rank 0 of the world, for longer than a collective may wait, and return its result there.

    The other ranks return None.  ``work`` runs in a thread on the rank's own device and calls no collective.
    Collectives: a broadcast every few seconds, then a broadcast of whether ``work`` failed.
    Raises on all ranks what ``work`` raises.
    """
    results: list[T] = []
    errors: list[Exception] = []
    ended = threading.Event()
    device, is_rank_0 = device_of_world(), dist.get_rank() == 0

    def run() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            results.append(work())
        except Exception as error:
            errors.append(error)
        except BaseException as error:  # the other ranks must not wait for ever for a thread that has ended
            errors.append(unexpected(f"{type(error).__name__}: {error}"))
        finally:
            ended.set()

    if is_rank_0:
        threading.Thread(target=run, name="work of rank 0", daemon=True).start()
    is_running = torch.ones(1, dtype=torch.int32, device=device)
    while is_running.item():
        if is_rank_0:
            is_running.fill_(not ended.wait(_HEARTBEAT_SECONDS))
        dist.broadcast(is_running, src=0)

    def check() -> None:
        if errors:
            raise errors[0]

    run_on_rank_0(check, unexpected)
    return results[0] if results else None


@contextlib.contextmanager
def raise_on_all_ranks(unexpected: type[Exception] = CheckpointError) -> Iterator[None]:
    """Raise on every rank of the world, at the end of the block, what any rank raises inside the block.

    Where all ranks fail with one message, the error has this message; otherwise it names each failing rank with its
    message.
    Collectives, at the end of the block: a maximum of one integer, and where a rank failed an all_gather_object.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if not max_over_ranks([error is not None])[0]:
        return
    found = gather_objects(None if error is None else _failure(error, unexpected))
    failures = {rank: failure for rank, failure in enumerate(found) if failure is not None}
    kind, _ = next(iter(failures.values()))
    raise kind(_joined({rank: message for rank, (_, message) in failures.items()}, len(found))) from error


def run_on_each_rank(work: Callable[[], T]) -> T:
    """Return the result of ``work`` on this rank, after `raise_on_all_ranks`."""
    results: list[T] = []
    with raise_on_all_ranks():
        results.append(work())
    return results[0]


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the pickled ``value`` of each rank of ``group`` (None: the world), in the order of its ranks.

    Collectives: one all_gather_object; none in a group of one rank, which gets the value itself.  A process without a
    process group is a world of one rank.
    """
    size = dist.get_world_size(group) if dist.is_initialized() else 1
    if size == 1:
        return [value]
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def gather_items(items: Sequence[T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the items of all ranks of ``group`` as one list, in the order of its ranks; see `gather_objects`."""
    return [item for part in gather_objects(items, group) for item in part]


def broadcast_object(value: T) -> T:
    """Return rank 0's ``value``, pickled, on every rank of the world.  Collectives: one broadcast."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def error_message(error: BaseException) -> str:
    """Return one line for ``error``: the message of an error of this package, else the type's name and the message."""
    return str(error) if isinstance(error, OF_ALL_RANKS) else f"{type(error).__name__}: {error}"


def _failure(error: Exception, unexpected: type[Exception]) -> _Failure:
    """Return the type and the message with which all ranks raise ``error``."""
    for kind in OF_ALL_RANKS:
        if isinstance(error, kind):
            return kind, str(error)
    if type(error) is ValueError:  # the messages of subclasses such as UnicodeDecodeError are not for the user
        return ValueError, str(error)
    return unexpected, error_message(error)


def _joined(messages: Mapping[int, str], world_size: int) -> str:
    """Return one message of the failing ranks' ``messages``, which names the ranks unless all failed alike."""
    ranks_by_message: dict[str, list[int]] = {}
    for rank, message in messages.items():
        ranks_by_message.setdefault(message, []).append(rank)
    if len(messages) == world_size and len(ranks_by_message) == 1:
        return next(iter(ranks_by_message))
    parts = []
    for message, ranks in ranks_by_message.items():
        parts.append(f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: {message}")
    return first_few(parts)
