# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Requests of all replicas to the engines, their responses back: what a sampler beside the training weights needs.

    pooled = pool(requests, grid)  # everybody's requests, on every rank
    with agreement(grid.device):
        written = {index: response, ...}  # this rank's share; an error here is raised on all ranks
    responses = hand_back(written, pooled)  # those of this rank's replica, in order

Every function is a collective over the world.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.config import ConfigError
from megatron_selfdistill.errors import EngineError
from megatron_selfdistill.rollout.base import FINISH_REASONS, Request, Response, SamplingParams, require_room

if TYPE_CHECKING:
    from megatron_selfdistill.distributed.ranks import RankGrid

_NONE = -1
_HEADER_WORDS = 1
"""int64 in front of all packed responses of one sender: their number."""
_RESPONSE_WORDS = 5
"""int64 of one packed response beside its tokens and their numbers."""
_HEARTBEAT_SECONDS = 10.0

T = TypeVar("T")


@dataclass(frozen=True)
class Pool:
    """The requests of all replicas."""

    requests: list[Request]
    """One replica's after the other's."""
    first: int
    """Index of this replica's first request."""
    count: int
    """Requests of this replica."""
    device: torch.device
    """Where collectives take their tensors."""


def pool(requests: Sequence[Request], grid: RankGrid) -> Pool:
    """Everybody's requests on every rank, in the order of the replicas.

    ``requests`` are those of this data-parallel replica, the same on each of its ranks.
    Collectives: two all-gathers over ``grid.dp_group``; prompts travel as packed integers, padded to the longest share.
    """
    packed = torch.from_numpy(_packed_requests(requests)).to(grid.device)
    shares = _all_gather_uneven(packed, grid.dp_group)
    pooled = [_unpacked_requests(share) for share in shares]
    first = sum(len(share) for share in pooled[: grid.dp_rank])
    return Pool([request for share in pooled for request in share], first, len(requests), grid.device)


def hand_back(written: Mapping[int, Response], pooled: Pool) -> list[Response]:
    """The responses to this replica's requests, in order.

    ``written``: what this rank has, by index into ``pooled.requests``; each index on exactly one rank, on the others
    it is absent.  Raises `EngineError` on all ranks alike where a response is missing or there twice.
    Collectives over the world: a sum of a table of sizes, and one all-to-all in which each rank receives the responses
    to its own replica's requests and no others.
    """
    sizes = {index: _words_of(response) for index, response in written.items()}
    table = _Table.summed(sizes, pooled)
    if (table.copies != 1).any():
        index = int((table.copies != 1).argmax())
        raise EngineError(
            f"expected one response to each of {len(table.copies)} requests, got {table.copies.sum()}: request {index} "
            f"has {table.copies[index]}"
        )
    shares: dict[range, np.ndarray] = {}  # the ranks of a replica get the same
    for wanted in table.wanted_by_rank:
        if wanted not in shares:
            shares[wanted] = _packed_responses({index: written[index] for index in wanted if index in written})
    sent = [shares[wanted] for wanted in table.wanted_by_rank]
    own = range(pooled.first, pooled.first + pooled.count)
    received_words = [_HEADER_WORDS + int(words) for words in table.words_by_writer(own)]
    received = torch.empty(sum(received_words), dtype=torch.int64, device=pooled.device)
    dist.all_to_all_single(
        received,
        torch.from_numpy(np.concatenate(sent)).to(pooled.device),
        received_words,
        [len(share) for share in sent],
    )
    responses: dict[int, Response] = {}
    for share in np.split(received.cpu().numpy(), np.cumsum(received_words)[:-1]):
        responses |= _unpacked_responses(share)
    return [responses[index] for index in own]


@dataclass(frozen=True)
class _Table:
    """Who wrote what, and who wants what, as every rank knows it."""

    copies: np.ndarray
    """[requests] int64: ranks that have a response to each."""
    words: np.ndarray
    """[requests] int64: what the response takes in a packed share."""
    writer: np.ndarray
    """[requests] int64: the rank that has it, where one rank has."""
    wanted_by_rank: list[range]
    """Indices of the requests of each rank's replica."""

    @classmethod
    def summed(cls, sizes: Mapping[int, int], pooled: Pool) -> _Table:
        """``sizes``: of the responses that this rank has, in words.  Collectives: one sum over the world."""
        world_size, rank, count = dist.get_world_size(), dist.get_rank(), len(pooled.requests)
        table = np.zeros((count, 3), dtype=np.int64)
        for index, words in sizes.items():
            table[index] = 1, words, rank
        wanted = np.zeros((world_size, 2), dtype=np.int64)
        wanted[rank] = pooled.first, pooled.first + pooled.count
        everything = torch.from_numpy(np.concatenate([table.ravel(), wanted.ravel()])).to(pooled.device)
        dist.all_reduce(everything)
        total = everything.cpu().numpy()
        copies, packed_words, writer = total[: 3 * count].reshape(count, 3).T
        bounds = total[3 * count :].reshape(-1, 2).tolist()
        return cls(copies, packed_words, writer, [range(first, behind) for first, behind in bounds])

    def words_by_writer(self, wanted: range) -> np.ndarray:
        """Return [world_size] int64: the words of each rank's responses to the requests ``wanted``."""
        part = slice(wanted.start, wanted.stop)
        words = np.zeros(len(self.wanted_by_rank), dtype=np.int64)
        np.add.at(words, self.writer[part], self.words[part])
        return words


@contextlib.contextmanager
def agreement(device: torch.device) -> Iterator[None]:
    """What is raised inside on some ranks is raised on all of them, when all have left: the first rank's error, by its
    sentence, as the `EngineError`, `ConfigError` or `ValueError` that it was (others become an `EngineError`).

    Nothing inside may be a collective, unless its failure is one on all ranks.
    Collectives: one all-reduce over the world; where there was an error, also a gather of sentences.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    agree(error, device)


def agree(error: Exception | None, device: torch.device) -> None:
    """`agreement` for an error in hand; None where this rank has none."""
    failed = torch.tensor([error is not None], dtype=torch.int32, device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if not failed.item():
        return
    sentences: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(sentences, None if error is None else _sentence(error))
    kind, sentence = next(found for found in sentences if found is not None)
    raise {kind.__name__: kind for kind in (EngineError, ConfigError, ValueError)}[kind](sentence) from error


def on_rank_0(do: Callable[[], T], device: torch.device) -> T | None:
    """What ``do()`` returns, on rank 0, and None on the others, which do not call it.  What it raises there is raised
    on all ranks, as by `agreement`.  ``do`` runs in a thread and uses no collective.

    Collectives: a broadcast over the world every few seconds, since ``do`` may take longer than a collective may wait;
    then those of `agreement`.
    """
    outcome: list[T] = []
    error: list[Exception] = []
    ended = threading.Event()

    def work() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            outcome.append(do())
        except Exception as raised:
            error.append(raised)
        except BaseException as raised:  # the others must not wait for ever for a thread that has left
            error.append(EngineError(f"{type(raised).__name__}: {raised}"))
        finally:
            ended.set()

    is_rank_0 = dist.get_rank() == 0
    if is_rank_0:
        threading.Thread(target=work, name="rank 0 alone", daemon=True).start()
    going_on = torch.ones(1, dtype=torch.int32, device=device)
    while going_on.item():
        if is_rank_0:
            going_on.fill_(not ended.wait(_HEARTBEAT_SECONDS))
        dist.broadcast(going_on, src=0)
    agree(error[0] if error else None, device)
    return outcome[0] if outcome else None


def _sentence(error: Exception) -> tuple[str, str]:
    """The name of the class that it is raised as everywhere, and what it says."""
    for kind in (EngineError, ConfigError):
        if isinstance(error, kind):
            return kind.__name__, str(error)
    if type(error) is ValueError:  # not its subclasses: UnicodeDecodeError and its like are no sentences
        return "ValueError", str(error)
    return "EngineError", f"rank {dist.get_rank()}: {type(error).__name__}: {error}"


def check_requests(
    requests: Sequence[Request], params: SamplingParams, max_length: int, *, guided: bool, who: str
) -> None:
    """Raise ValueError for an empty prompt, one that leaves no room for ``max_new_tokens`` within ``max_length``, and,
    unless ``guided``, one of the teacher, for which ``who`` were not built."""
    prompts = [prompt for r in requests for prompt in (r.prompt, r.teacher_prompt) if prompt is not None]
    lengths = [len(prompt) for prompt in prompts]
    require_room(min(lengths, default=1), max(lengths, default=0), params.max_new_tokens, max_length)
    if not guided and any(request.teacher_prompt is not None for request in requests):
        raise ValueError(
            f"a request has a teacher's prompt, but {who} were built without guided decoding; set "
            "rollout.guidance=mixed"
        )


def staleness(version: int | None, expected: int, max_staleness: int, who: str) -> int:
    """Optimizer steps by which the weights that wrote a response are older than the ``expected`` ones.

    Raises: `EngineError`, beginning with ``who``, where they are unknown, newer or older than ``max_staleness`` allows.
    """
    if version is None or not 0 <= expected - version <= max_staleness:
        raise EngineError(
            f"{who} wrote a response with weights of version {version}, expected {expected} "
            f"(rollout.max_staleness={max_staleness})"
        )
    return expected - version


# A request: prompt length, teacher prompt length or -1, stream; then all prompts, then all teacher prompts.


def _packed_requests(requests: Sequence[Request]) -> np.ndarray:
    teachers = [request.teacher_prompt for request in requests]
    head = np.array(
        [
            (
                len(request.prompt),
                _NONE if teacher is None else len(teacher),
                np.uint64(request.seed).astype(np.int64),
            )
            for request, teacher in zip(requests, teachers, strict=True)
        ],
        dtype=np.int64,
    )
    prompts = [np.asarray(request.prompt, dtype=np.int64) for request in requests]
    prompts += [np.asarray(teacher, dtype=np.int64) for teacher in teachers if teacher is not None]
    return np.concatenate([np.array([len(requests)], dtype=np.int64), head.ravel(), *prompts])


def _unpacked_requests(packed: np.ndarray) -> list[Request]:
    count = int(packed[0])
    head = packed[1 : 1 + 3 * count].reshape(count, 3)
    lengths, teacher_lengths = head[:, 0], head[:, 1]
    ends = np.concatenate([lengths, teacher_lengths.clip(0)]).cumsum() + 1 + 3 * count
    texts = np.split(packed, ends)
    texts[0] = texts[0][1 + 3 * count :]
    return [
        Request(
            prompt=texts[i].tolist(),
            seed=int(head[i, 2].astype(np.uint64)),
            teacher_prompt=None if teacher_lengths[i] == _NONE else texts[count + i].tolist(),
        )
        for i in range(count)
    ]


# A response: index, length, finish reason, guided, weight version or -1; then all tokens; then, as the bits of float64,
# all log-probs, all sampled log-probs, and the teacher's of those that are guided.


def _words_of(response: Response) -> int:
    """Return how many int64 a response takes in `_packed_responses`, beside the header of all."""
    return _RESPONSE_WORDS + len(response.token_ids) * (4 if response.guided else 3)


def _packed_responses(written: Mapping[int, Response]) -> np.ndarray:
    responses = written.values()
    head = [
        (
            index,
            len(response.token_ids),
            FINISH_REASONS.index(response.finish_reason),
            response.guided,
            _NONE if response.weight_version is None else response.weight_version,
        )
        for index, response in written.items()
    ]
    tokens = [np.asarray(response.token_ids, dtype=np.int64) for response in responses]
    columns = [response.log_probs for response in responses]
    columns += [response.sampled_log_probs for response in responses]
    columns += [response.teacher_log_probs for response in responses if response.teacher_log_probs is not None]
    floats = [np.asarray(column, dtype=np.float64).view(np.int64) for column in columns]
    return np.concatenate(
        [np.array([len(head)], dtype=np.int64), np.array(head, dtype=np.int64).ravel(), *tokens, *floats]
    )


def _unpacked_responses(packed: np.ndarray) -> dict[int, Response]:
    """The responses of `_packed_responses`, by index."""
    count = int(packed[0])
    head = packed[1 : 1 + 5 * count].reshape(count, 5)
    lengths, guided = head[:, 1], head[:, 3]
    sizes = np.concatenate([lengths, lengths, lengths, lengths * guided])
    starts = (sizes.cumsum() - sizes + 1 + 5 * count).reshape(4, count)

    def floats(column: int, i: int) -> list[float]:
        start = starts[column, i]
        return packed[start : start + lengths[i]].view(np.float64).tolist()

    responses = {}
    for i, index in enumerate(head[:, 0].tolist()):
        start, version = starts[0, i], int(head[i, 4])
        responses[index] = Response(
            token_ids=packed[start : start + lengths[i]].tolist(),
            log_probs=floats(1, i),
            sampled_log_probs=floats(2, i),
            finish_reason=FINISH_REASONS[head[i, 2]],
            teacher_log_probs=floats(3, i) if guided[i] else None,
            weight_version=None if version == _NONE else version,
        )
    return responses


def _all_gather_uneven(tensor: Tensor, group: dist.ProcessGroup) -> list[np.ndarray]:
    """Return every rank's ``tensor [n]``, of any n, on the host."""
    sizes = _sizes(tensor, group)
    padded = tensor.new_zeros(max(sizes))
    padded[: tensor.numel()] = tensor
    buffers = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(buffers, padded, group=group)
    return [row[:size] for row, size in zip(torch.stack(buffers).cpu().numpy(), sizes, strict=True)]


def _sizes(tensor: Tensor, group: dist.ProcessGroup) -> list[int]:
    size = tensor.new_tensor([tensor.numel()])
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    return torch.cat(sizes).tolist()
