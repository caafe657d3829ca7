# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Time, memory and accuracy of the loss: this project's paths, naive PyTorch and the peers, side by side in one run.

    python tools/benchmarks/loss_time.py --vocab 32768 --tokens 512
    python tools/benchmarks/loss_time.py --vocab 152064 19008 --tokens 16384 4096 --hidden 8192 --plot loss.png
    torchrun --nproc-per-node 2 tools/benchmarks/loss_time.py ...        # the vocabulary over both ranks

Forward and backward run from the logits of one rank's shard or, with ``--hidden``, from hidden states.  1u is one read
or write of the shard's logits in bf16.  All contenders see the same inputs and take turns, so that other work of the
machine affects all of them; medians are compared.  The yardstick is a copy of the logits, measured in the same run.

    to ...      time divided by the time of the first contender; on a CPU the processor's time
    floor       the time of the reads and writes of the loss's passes at the copy's speed, divided by the time: 7 of
                them (two reads of both rows, one more with the write in place), 9 for JSD.  Each is 1u in bf16 and 2u
                in fp32.  Rows that need the third pass take 2 more; no row here does.  There is no floor from hidden
                states, where the products bound the time
    passes      reads and writes of every row of logits: by design / as PyTorch's operators make them, on tensors that
                hold all rows, or a chunk's from hidden states.  Repeated reads of a chunk in a core's cache count
    u           bytes that PyTorch's operators read and write (views are free), in u: the traffic of eager code.
                Chunked code moves most of it within a core's cache.  The traffic of kernels cannot be counted: it is
                given by design, in brackets
    speed       these bytes divided by the time, relative to the speed of the copy; above 100 % where a cache holds them
    peak        most memory beyond the inputs, in u; a gradient written over the student's logits costs none
    error       of loss (nats) and gradient (relative to its largest value) against float64, on some rows

A contender that fails is listed with its failure.  Files are written anew after each size.
The first size of --vocab is measured with each size of --tokens, and the first size of --tokens with each of --vocab.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from loss_contenders import Case, contenders
from loss_measurements import Found, Report, report_of

from megatron_selfdistill.loss import VocabShard


def main() -> None:
    """Measure every contender at every size and write the tables that the options ask for."""
    arguments = _parser().parse_args()
    arguments.dtype = arguments.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    if not torch.cuda.is_available():
        torch.set_num_threads(arguments.threads)
    device, group = _start()
    rank, tp_size = dist.get_rank(), dist.get_world_size()
    entrants = contenders(arguments, device, tp_size)
    sizes = [(arguments.tokens[0], vocab) for vocab in arguments.vocab]
    sizes += [(tokens, arguments.vocab[0]) for tokens in arguments.tokens[1:]]
    reports: list[Report] = []
    for tokens, vocab in sizes:
        shard = VocabShard.from_group(vocab, vocab, group if tp_size > 1 else None)
        dtype = getattr(torch, arguments.dtype)
        case = Case(tokens, vocab, arguments.hidden, dtype, device, shard, arguments.divergence, arguments.chunk)
        reports.append(report_of(case, entrants, arguments.repeats))
        del case  # before the next one's logits are made
        if rank == 0:
            print(table(reports[-1], arguments, tp_size), flush=True)
            write(reports, arguments, tp_size)
    dist.destroy_process_group()


def write(reports: list[Report], arguments: argparse.Namespace, tp_size: int) -> None:
    """Write the requested files, with all sizes so far."""
    if arguments.out:
        where = {"arguments": vars(arguments), "where": _where(), "torch": torch.__version__, "tp_size": tp_size}
        Path(f"{arguments.out}.json").write_text(json.dumps(where | {"sizes": [asdict(r) for r in reports]}, indent=2))
        Path(f"{arguments.out}.md").write_text("\n".join(table(report, arguments, tp_size) for report in reports))
    if arguments.plot:
        plot(reports, arguments)


# -- showing ---------------------------------------------------------------------------------------------------------


def table(report: Report, arguments: argparse.Namespace, tp_size: int) -> str:
    """Return the Markdown table."""
    hidden = f", from hidden states of {arguments.hidden}" if arguments.hidden else ""
    copied = 2 * report.u / report.copy_seconds / 1e9
    first = report.found[0]
    heading = (
        f"| | ms | CPU s | to {first.name} | floor | passes | u | speed | peak, u | collectives | loss error | "
        "gradient error |"
    )
    lines = [
        "",
        f"{report.tokens} tokens, vocabulary {report.vocab}{f' over TP {tp_size}' if tp_size > 1 else ''}, "
        f"{arguments.dtype}, {arguments.divergence}{hidden}; 1u = {report.u / 2**20:.3g} MiB, the floor is "
        f"{report.floor_u:.3g}u; a copy runs at {copied:.0f} GB/s; torch {torch.__version__}, {_where()}",
        "",
        heading,
        "|---" * (heading.count("|") - 1) + "|",
    ]
    for one in report.found:
        if one.failure is not None:
            what = one.failure.replace("|", "\\|")
            lines.append(f"| {one.name} | {what} |" + " |" * (heading.count("|") - 3))
            continue
        lines.append(f"| {one.name} | {' | '.join(_cells(one, first, report))} |")
    return "\n".join(lines)


def _cells(one: Found, first: Found, report: Report) -> list[str]:
    seconds = one.seconds
    assert seconds is not None

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    def of_copy(u: float | None) -> str:
        return shown(None if u is None else u * report.copy_seconds / 2 / seconds, "{:.1%}")

    spent, least = _spent(one), _spent(first)
    ratio = None if spent is None or not least else spent / least
    return [
        f"{1000 * seconds:.3g}",
        shown(one.cpu_seconds, "{:.3g}"),
        shown(ratio, "{:.3g}"),
        of_copy(one.floor_u),
        f"{shown(one.passes_by_design, '{}')} / {shown(one.passes_measured, '{:.0f}')}",
        shown(one.moved_u, "[{:.0f}]" if one.moved_by_design else "{:.0f}"),
        of_copy(one.moved_u),
        shown(one.peak_u, "{:.2f}"),
        shown(one.collectives, "{}"),
        shown(one.loss_error, "{:.1e}"),
        shown(one.gradient_error, "{:.1e}"),
    ]


def _spent(one: Found) -> float | None:
    """Return the seconds that distinguish contenders: on a CPU, which other programs share, its own seconds."""
    return one.seconds if torch.cuda.is_available() else one.cpu_seconds


def plot(reports: list[Report], arguments: argparse.Namespace) -> None:
    """Plot time and peak memory, against the vocabulary and against the tokens."""
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
            times = [math.nan if (spent := _spent(entry)) is None else 1000 * spent for entry in entries]
            peaks = [
                math.nan if entry.peak_u is None else max(entry.peak_u * report.u / 2**20, 1e-3)
                for entry, report in zip(entries, chosen, strict=True)
            ]
            axes[0, column].plot(places, times, "o-", label=one.name)
            axes[1, column].plot(places, peaks, "o-", label=one.name)
        axes[1, column].set_xlabel(axis_name)
        fixed = f"{arguments.tokens[0]} tokens" if axis_name == "vocabulary" else f"vocabulary {arguments.vocab[0]}"
        axes[0, column].set_title(fixed)
    time = f"{'' if torch.cuda.is_available() else 'CPU '}ms, forward and backward"
    for axis, label in ((axes[0, 0], time), (axes[1, 0], "peak memory beyond the inputs, MiB")):
        axis.set_ylabel(label)
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(f"{_where()}, {arguments.dtype}, {arguments.divergence}", fontsize="medium")
    figure.savefig(arguments.plot, dpi=110)


def _start() -> tuple[torch.device, dist.ProcessGroup]:
    """Return the device and the process group of this launch: torchrun's group, or a group of one rank."""
    from megatron_selfdistill.config import ParallelConfig
    from megatron_selfdistill.distributed import ranks

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    grid = ranks.initialize(ParallelConfig(tensor_model_parallel_size=world_size), seed=0)
    return grid.device, grid.tp_group


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
