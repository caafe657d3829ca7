# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Time, memory and accuracy of the loss: this project's paths, naive PyTorch and the peers, side by side in one run.

    python tools/benchmark_loss.py --vocab 32768 --tokens 512
    python tools/benchmark_loss.py --vocab 152064 19008 --tokens 16384 4096 --hidden 8192 --plot loss.png --out loss
    torchrun --nproc-per-node 2 tools/benchmark_loss.py ...        # the vocabulary over both ranks

Forward and backward, from the logits of one rank's shard or, with ``--hidden``, from hidden states.  1u is one read or
write of the shard's logits in bf16.  All contenders see the same inputs and take turns, so that whatever else the
machine does hits all of them; medians are compared.  The yardstick is a copy of the logits, measured in the same run.

    to ...      time, on a CPU the processor's, to that of the first contender
    u, ops      bytes that PyTorch's operators read and write (views are free), in u: what eager code moves.  Chunked
                code moves most of it within a core's cache.  Kernels are not seen: theirs is by design, in brackets
    speed       those bytes in this time, to the speed of the copy; above 100 % where a cache holds it
    floor       time of 7u (two reads of both rows, one more with the write in place) at the copy's speed, to the time
    peak        most memory beyond the inputs, in u; a gradient written over the student's logits costs none
    error       of loss (nats) and gradient (to its largest value) against float64, on some rows

The first size of --vocab goes with each of --tokens, and the other way round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself otherwise, when torch is imported

import torch
import torch.distributed as dist
from loss_contenders import TARGET, Case, Contender, Run, contenders
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_selfdistill.loss import VocabShard, mixed_target
from megatron_selfdistill.loss.divergence import divergence, divergence_gradient

FLOOR_U, CHECKED_ROWS = 7, 32


def main() -> None:
    arguments = _parser().parse_args()
    arguments.dtype = arguments.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    if not torch.cuda.is_available():
        torch.set_num_threads(arguments.threads)
    device, group = _start()
    rank, tp_size = dist.get_rank(), dist.get_world_size()
    entrants = contenders(arguments, device, tp_size)
    sizes = [(arguments.tokens[0], vocab) for vocab in arguments.vocab]
    sizes += [(tokens, arguments.vocab[0]) for tokens in arguments.tokens[1:]]
    reports = []
    for tokens, vocab in sizes:
        shard = VocabShard.from_group(vocab, vocab, group if tp_size > 1 else None)
        dtype = getattr(torch, arguments.dtype)
        case = Case(tokens, vocab, arguments.hidden, dtype, device, shard, arguments.divergence)
        copied = _copy_seconds(case, arguments.repeats)
        reports.append(Report(tokens, vocab, case.u, copied, measure(case, entrants, arguments.repeats)))
        if rank == 0:
            print(table(reports[-1], arguments, tp_size), flush=True)
    if rank == 0 and arguments.out:
        where = {"arguments": vars(arguments), "where": _where(), "torch": torch.__version__, "tp_size": tp_size}
        Path(f"{arguments.out}.json").write_text(json.dumps(where | {"sizes": [asdict(r) for r in reports]}, indent=2))
        Path(f"{arguments.out}.md").write_text("\n".join(table(report, arguments, tp_size) for report in reports))
    if rank == 0 and arguments.plot:
        plot(reports, arguments)
    dist.destroy_process_group()


@dataclass
class Found:
    """What one contender did in one case."""

    name: str
    seconds: float
    cpu_seconds: float
    peak_u: float
    ops_u: float
    by_design: int | None
    collectives: int
    loss_error: float | None
    gradient_error: float | None
    failure: str | None = None


@dataclass
class Report:
    """One size."""

    tokens: int
    vocab: int
    u: int
    """Bytes."""
    copy_seconds: float
    """Of one read and one write of 1u each."""
    found: list[Found]

    def floor_share(self, seconds: float) -> float:
        """Time of FLOOR_U at the copy's speed, to ``seconds``."""
        return FLOOR_U * self.copy_seconds / 2 / seconds


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(case: Case, entrants: list[Contender], repeats: int) -> list[Found]:
    """Every contender; one that fails (memory) is reported with its sentence."""
    runs: dict[str, Run] = {}
    seconds: dict[str, list[tuple[float, float]]] = {one.name: [] for one in entrants}
    failures: dict[str, str] = {}
    for repeat in range(repeats + 1):
        for one in entrants:
            if one.name in failures:
                continue
            try:
                run = one.prepare(case)  # anew: logits are overwritten
                took = _timed(run)
                runs[one.name] = run
            except (torch.OutOfMemoryError, RuntimeError) as error:
                failures[one.name] = str(error).splitlines()[0]
                continue
            if repeat:  # the first round warms up
                seconds[one.name].append(took)
    reference = _reference(case)
    found = []
    for one in entrants:
        if one.name in failures:
            found.append(Found(one.name, 0, 0, 0, 0, None, 0, None, None, failures[one.name]))
            continue
        wall, processor = (statistics.median(column) for column in zip(*seconds[one.name], strict=True))
        peak = _peak_bytes(one.prepare(case), case)
        moved, collectives = _operators(one.prepare(case), case)
        errors = _errors(one.prepare(case)(), reference) if one.same_loss else (None, None)
        scale = 1 / case.u
        found.append(Found(one.name, wall, processor, peak * scale, moved * scale, one.by_design, collectives, *errors))
    return found


def _timed(run: Run) -> tuple[float, float]:
    _wait()
    wall, processor = time.perf_counter(), time.process_time()
    run()
    _wait()
    return time.perf_counter() - wall, time.process_time() - processor


def _copy_seconds(case: Case, repeats: int) -> float:
    source = torch.ones(case.u // 2, dtype=torch.bfloat16, device=case.device)
    target = torch.empty_like(source)
    return statistics.median(_timed(lambda: (target.copy_(source), None))[0] for _ in range(max(5, repeats)))


def _peak_bytes(run: Run, case: Case) -> int:
    """Most memory at one time beyond what was there before."""
    _wait()
    if case.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        _wait()
        del result
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
        del result
    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def _operators(run: Run, case: Case) -> tuple[int, int]:
    """Bytes that operators read and write, and collectives."""
    with _Traffic() as traffic, _counted_collectives() as calls:
        run()
    return traffic.num_bytes, len(calls)


class _Traffic(TorchDispatchMode):
    """Adds up the bytes of what each operator takes and gives; one that gives a view of what it took moves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in ("empty", "empty_like", "new_empty"):
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
            self.num_bytes += sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))
        return result


@contextlib.contextmanager
def _counted_collectives() -> Iterator[list[str]]:
    calls: list[str] = []

    def counting(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return work(*args, **kwargs)

        return counted

    names = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")
    with contextlib.ExitStack() as patches:
        for name in names:
            patches.enter_context(mock.patch.object(dist, name, counting(name, getattr(dist, name))))
        yield calls


@dataclass(frozen=True)
class _Reference:
    """Of the first rows, in float64; None where the vocabulary is over several ranks."""

    loss: Tensor
    gradient: Tensor


def _reference(case: Case) -> _Reference | None:
    if case.shard.group is not None:
        return None
    rows = slice(0, CHECKED_ROWS)
    if case.hidden is None:
        student, teacher = case.student[rows], case.teacher[rows]
    else:  # logits as the products give them: their rounding is not the loss's
        student, teacher = (states[rows] @ case.weight.t() for states in case.states)
    log_p = student.double().log_softmax(-1)
    log_q = mixed_target(student.double(), teacher.double(), TARGET).log_q
    gradient = divergence_gradient(log_p, log_q, case.divergence)
    if case.hidden is not None:
        gradient = gradient @ case.weight.double()
    return _Reference(divergence(log_p, log_q, case.divergence), gradient)


def _errors(
    got: tuple[Tensor | None, Tensor | None], reference: _Reference | None
) -> tuple[float | None, float | None]:
    loss, gradient = got
    if reference is None or loss is None or gradient is None:
        return None, None
    rows = slice(0, CHECKED_ROWS)
    largest = reference.gradient.abs().amax()
    return (
        float((loss[rows].double() - reference.loss).abs().amax()),
        float((gradient[rows].double() - reference.gradient).abs().amax() / largest),
    )


# -- showing ---------------------------------------------------------------------------------------------------------


def table(report: Report, arguments: argparse.Namespace, tp_size: int) -> str:
    """Markdown."""
    hidden = f", from hidden states of {arguments.hidden}" if arguments.hidden else ""
    copied = 2 * report.u / report.copy_seconds / 1e9
    first = _spent(report.found[0]) if not report.found[0].failure else float("nan")
    lines = [
        "",
        f"{report.tokens} tokens, vocabulary {report.vocab}{f' over TP {tp_size}' if tp_size > 1 else ''}, "
        f"{arguments.dtype}, {arguments.divergence}{hidden}; 1u = {report.u / 2**20:.3g} MiB; a copy runs at "
        f"{copied:.0f} GB/s; torch {torch.__version__}, {_where()}",
        "",
        f"| | ms | CPU s | to {report.found[0].name} | floor | u, ops | speed | peak, u | collectives | "
        "loss error | gradient error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in report.found:
        if one.failure:
            lines.append(f"| {one.name} | {one.failure} |" + " |" * 9)
            continue
        moved = f"[{one.by_design}]" if one.by_design else f"{one.ops_u:.0f}"
        speed = (one.by_design or one.ops_u) * report.copy_seconds / 2 / one.seconds
        errors = ["-" if error is None else f"{error:.1e}" for error in (one.loss_error, one.gradient_error)]
        lines.append(
            f"| {one.name} | {1000 * one.seconds:.3g} | {one.cpu_seconds:.3g} | {_spent(one) / first:.3g} | "
            f"{report.floor_share(one.seconds):.1%} | {moved} | {speed:.1%} | {one.peak_u:.2f} | {one.collectives} | "
            f"{' | '.join(errors)} |"
        )
    return "\n".join(lines)


def _spent(one: Found) -> float:
    """Seconds that tell contenders apart: on a CPU, which others may want too, those of the processor."""
    return one.seconds if torch.cuda.is_available() else one.cpu_seconds


def plot(reports: list[Report], arguments: argparse.Namespace) -> None:
    """Time and peak memory, against the vocabulary and against the tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    along = {
        "vocabulary": [report for report in reports if report.tokens == arguments.tokens[0]],
        "tokens": [report for report in reports if report.vocab == arguments.vocab[0]],
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), sharex="col", layout="constrained")
    for column, (axis_name, chosen) in enumerate(along.items()):
        chosen.sort(key=lambda report: (report.vocab, report.tokens))
        places = [report.vocab if axis_name == "vocabulary" else report.tokens for report in chosen]
        for index, one in enumerate(chosen[0].found):
            entries = [report.found[index] for report in chosen]
            times = [float("nan") if entry.failure else 1000 * entry.seconds for entry in entries]
            peaks = [
                float("nan") if entry.failure else max(entry.peak_u * report.u / 2**20, 1e-3)
                for entry, report in zip(entries, chosen, strict=True)
            ]
            axes[0, column].plot(places, times, "o-", label=one.name)
            axes[1, column].plot(places, peaks, "o-", label=one.name)
        axes[1, column].set_xlabel(axis_name)
        fixed = f"{arguments.tokens[0]} tokens" if axis_name == "vocabulary" else f"vocabulary {arguments.vocab[0]}"
        axes[0, column].set_title(fixed)
    for axis, label in ((axes[0, 0], "ms, forward and backward"), (axes[1, 0], "peak memory beyond the inputs, MiB")):
        axis.set_ylabel(label)
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(f"{_where()}, {arguments.dtype}, {arguments.divergence}", fontsize="medium")
    figure.savefig(arguments.plot, dpi=110)


def _start() -> tuple[torch.device, dist.ProcessGroup]:
    """The process group of this launch, which is the tensor-parallel group; torchrun's, or a world of one."""
    from megatron_selfdistill import parallel
    from megatron_selfdistill.config import ParallelConfig

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    grid = parallel.initialize(ParallelConfig(tensor_model_parallel_size=world_size), seed=0)
    return grid.device, grid.tp_group


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _where() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, threads: {torch.get_num_threads()}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32768], help="columns of the whole vocabulary")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512], help="rows")
    parser.add_argument("--hidden", type=int, help="measure from hidden states of this width")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--divergence", choices=("reverse_kl", "forward_kl", "jsd"), default="reverse_kl")
    parser.add_argument("--chunk", type=int, default=4096, help="tokens of a chunk of the fused output layer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--out", metavar="PATH", help="also write PATH.md and PATH.json")
    parser.add_argument("--plot", metavar="FILE", help="time and memory against vocabulary and tokens")
    return parser


if __name__ == "__main__":
    main()
