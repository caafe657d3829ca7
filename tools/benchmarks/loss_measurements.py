# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The measurements of one size in loss_time.py: time, memory, traffic, collectives and accuracy of every contender."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest import mock

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself otherwise, when torch is imported

import torch
import torch.distributed as dist
from loss_contenders import TARGET, Case, Contender, Run, passes_of_loss
from peak_memory import peak_bytes, wait
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_selfdistill.loss import mixed_target
from megatron_selfdistill.loss.definition import divergence, divergence_gradient

CHECKED_ROWS, FAILURE_CHARACTERS = 32, 100
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Found:
    """The measurements of one contender in one case; with a ``failure`` there is nothing else."""

    name: str
    failure: str | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_u: float | None = None
    moved_u: float | None = None
    """The traffic, in u, by PyTorch's operators, or by design where ``moved_by_design``; None where it is unknown."""
    moved_by_design: bool = False
    passes_by_design: int | None = None
    passes_measured: float | None = None
    floor_u: float | None = None
    """The traffic, in u, that this loss takes at least."""
    collectives: int | None = None
    loss_error: float | None = None
    gradient_error: float | None = None


@dataclass(frozen=True)
class Report:
    """The measurements of all contenders for one size."""

    tokens: int
    vocab: int
    u: int
    """The bytes of one u."""
    floor_u: float
    """The traffic of this project's loss, in u."""
    copy_seconds: float
    """The seconds of one read and one write of 1u each."""
    found: list[Found]


def report_of(case: Case, entrants: list[Contender], repeats: int) -> Report:
    """Return the report of one size, with the copy that is its yardstick.

    It is equal on all ranks except for times and memory.
    """
    floor = in_u(passes_of_loss(case.kind), case)
    return Report(
        case.tokens, case.vocab, case.u, floor, _copy_seconds(case, repeats), measure(case, entrants, repeats)
    )


def in_u(passes: float, case: Case) -> float:
    """Return the u (bytes in bf16) of so many reads and writes of all logits."""
    return passes * case.dtype.itemsize / 2


def measure(case: Case, entrants: list[Contender], repeats: int) -> list[Found]:
    """Measure every contender; report a contender that fails with its failure, and continue with the others."""
    seconds: dict[str, list[tuple[float, float]]] = {one.name: [] for one in entrants}
    found: dict[str, Found] = {}
    for repeat in range(repeats + 1):
        for one in entrants:
            if one.name in found:
                continue
            # Prepared anew, since logits are overwritten, and dropped before the next one is.
            took, failure = _attempted(lambda one=one: _timed(one.prepare(case)), case)  # type: ignore[misc]
            if took is None:
                found[one.name] = Found(one.name, failure)
            elif repeat:  # the first round warms up
                seconds[one.name].append(took)
    reference = _reference(case)
    for one in entrants:
        if one.name in found:
            continue
        entry, failure = _attempted(lambda one=one: _found(one, case, seconds[one.name], reference), case)  # type: ignore[misc]
        found[one.name] = entry or Found(one.name, failure)
    return [found[one.name] for one in entrants]


def _attempted(work: Callable[[], _Result], case: Case) -> tuple[_Result | None, str | None]:
    """Return (the result of ``work``, None) or (None, the failure in a few words), the same on all ranks."""
    result, failure = None, None
    try:
        result = work()
    except (
        Exception
    ) as error:  # a compiler may fail, or memory run out: the benchmark reports the failure and continues
        message = (str(error).strip().splitlines() or [""])[0]
        failure = f"{type(error).__name__}: {message}"[:FAILURE_CHARACTERS]
    if case.shard.group is not None:
        failed = torch.tensor(float(failure is not None), device=case.device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=case.shard.group)
        if failed.item() and failure is None:
            result, failure = None, "failed on another rank"
    return result, failure


def _found(one: Contender, case: Case, seconds: list[tuple[float, float]], reference: _Reference) -> Found:
    wall, processor = (statistics.median(column) for column in zip(*seconds, strict=True))
    peak = peak_bytes(one.prepare(case), case.device)
    traffic, num_collectives = _operators(one.prepare(case), case)
    loss_error, gradient_error = _errors(one.prepare(case)(), reference, case) if one.same_loss else (None, None)
    moved = traffic.num_bytes / case.u if one.seen else None
    if not one.seen and one.passes is not None and case.hidden is None:
        moved = in_u(one.passes, case)
    return Found(
        name=one.name,
        seconds=wall,
        cpu_seconds=processor,
        peak_u=peak / case.u,
        moved_u=moved,
        moved_by_design=not one.seen,
        passes_by_design=one.passes,
        passes_measured=traffic.row_elements / (case.tokens * case.shard.size) if one.seen else None,
        floor_u=None if one.floor is None else in_u(one.floor, case),
        collectives=num_collectives,
        loss_error=loss_error,
        gradient_error=gradient_error,
    )


# -- time and memory -------------------------------------------------------------------------------------------------


def _timed(run: Run) -> tuple[float, float]:
    wait()
    wall, processor = time.perf_counter(), time.process_time()
    run()
    wait()
    return time.perf_counter() - wall, time.process_time() - processor


def _copy_seconds(case: Case, repeats: int) -> float:
    source = torch.ones(case.u // 2, dtype=torch.bfloat16, device=case.device)
    target = torch.empty_like(source)
    return statistics.median(_timed(lambda: (target.copy_(source), None))[0] for _ in range(max(5, repeats)))


# -- what operators move ---------------------------------------------------------------------------------------------


def _operators(run: Run, case: Case) -> tuple[_Traffic, int]:
    """Return the bytes that operators read and write, and the number of collectives."""
    with _Traffic(case) as traffic, _counted_collectives() as calls:
        run()
    return traffic, len(calls)


class _Traffic(TorchDispatchMode):
    """A mode that adds up the bytes that operators read and write; an operator that returns a view moves nothing.

    num_bytes: of all tensors.  row_elements: of tensors that hold rows of logits, or derived rows, for all tokens (from
    hidden states: of a chunk of tokens).  PyTorch's loss has temporaries of a few rows, which stay in a core's cache
    and are not counted.
    """

    EMPTY = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"})
    MAKING = frozenset({"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"})
    """Operators that take a tensor for its shape, and only write."""
    FILLING = frozenset({"copy_", "fill_", "zero_"})
    """Operators that do not read the tensor to which they write."""
    PICKING = frozenset({"gather", "index", "index_select"})
    """Operators that read as much as they write."""
    PUTTING = frozenset({"scatter_", "index_put_"})
    """Operators that touch as many elements as their third argument has."""
    PRODUCTS = frozenset({"mm", "addmm", "addmm_"})

    def __init__(self, case: Case) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.columns = case.shard.size
        self.rows = case.tokens if case.hidden is None else min(case.chunk, case.tokens)
        self.num_bytes = self.row_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or func.overloadpacket.__name__ in self.EMPTY:
            return result
        for tensor, weight in self._moved(func, args, kwargs or {}, result):
            num = tensor.numel()
            self.num_bytes += num * tensor.element_size()
            self.row_elements += num * (weight and self._holds_rows(tensor))
        return result

    def _moved(self, func: Any, args: Any, kwargs: Any, result: Any) -> Iterator[tuple[Tensor, bool]]:
        """Return (tensor, whether it may hold rows of logits), once for a read and once for a write."""
        name = func.overloadpacket.__name__
        if name in self.PICKING:
            yield from ((tensor, False) for tensor in (result, result))
            return
        if name in self.PUTTING:
            yield from ((tensor, False) for tensor in (*tensors_in(args[2]), *tensors_in(args[3:])))
            return
        for index, argument in enumerate(func._schema.arguments if name not in self.MAKING else ()):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if not (written and (argument.kwarg_only or name in self.FILLING)):
                # The second factor of a product is a weight, which may have as many rows as there are tokens.
                rows = not (name in self.PRODUCTS and argument.name == "mat2")
                yield from ((tensor, rows) for tensor in tensors_in(value))
        yield from ((tensor, True) for tensor in tensors_in(result))

    def _holds_rows(self, tensor: Tensor) -> bool:
        transposed = tensor.dim() > 1 and tensor.stride(0) == 1
        wide = tensor.dim() > 1 and self.columns == tensor.shape[0 if transposed else -1]
        return wide and tensor.untyped_storage().nbytes() >= self.rows * self.columns * tensor.element_size()


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in arguments, however nested."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def _counted_collectives() -> Iterator[list[str]]:
    calls: list[str] = []

    def counting(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return work(*args, **kwargs)

        return counted

    names = ["all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor"]
    names += [name for name in ("all_gather_single", "reduce_scatter_single") if hasattr(dist, name)]
    with contextlib.ExitStack() as patches:
        for name in names:
            patches.enter_context(mock.patch.object(dist, name, counting(name, getattr(dist, name))))
        yield calls


# -- accuracy --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reference:
    """The float64 reference of the first rows over all columns: the loss, this rank's gradient, its largest value."""

    loss: Tensor
    gradient: Tensor
    largest: Tensor


def _reference(case: Case) -> _Reference:
    rows = slice(0, CHECKED_ROWS)
    if case.hidden is None:
        student, teacher = case.student[rows], case.teacher[rows]
    else:  # logits as the products give them: their rounding is not the loss's
        student, teacher = (states[rows] @ case.weight.t() for states in case.states)
    student, teacher = (_all_columns(logits.double(), case) for logits in (student, teacher))
    log_p = student.log_softmax(-1)
    log_q = mixed_target(student, teacher, TARGET).log_q
    gradient = divergence_gradient(log_p, log_q, case.divergence)
    largest = gradient.abs().amax()
    gradient = gradient[:, case.shard.start : case.shard.start + case.shard.size]
    if case.hidden is not None:
        gradient = gradient @ case.weight.double()
        if case.shard.group is not None:
            dist.all_reduce(gradient, group=case.shard.group)
        largest = gradient.abs().amax()
    return _Reference(divergence(log_p, log_q, case.divergence), gradient, largest)


def _all_columns(logits: Tensor, case: Case) -> Tensor:
    """Return the columns of all ranks, in rank order."""
    group = case.shard.group
    if group is None:
        return logits
    parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, logits.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def _errors(got: tuple[Tensor | None, Tensor | None], reference: _Reference, case: Case) -> tuple[float, float]:
    """Return the errors of the loss, in nats, and of the gradient, relative to its largest value.

    Each is the largest of all ranks.
    """
    loss, gradient = got
    assert loss is not None and gradient is not None
    rows = slice(0, CHECKED_ROWS)
    errors = torch.stack(
        [
            (loss[rows].double() - reference.loss).abs().amax(),
            (gradient[rows].double() - reference.gradient).abs().amax() / reference.largest,
        ]
    )
    if case.shard.group is not None:
        dist.all_reduce(errors, op=dist.ReduceOp.MAX, group=case.shard.group)
    loss_error, gradient_error = errors.tolist()
    return loss_error, gradient_error
