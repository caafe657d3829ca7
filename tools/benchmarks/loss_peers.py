# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Compare the loss in one call with naive PyTorch, TRL's GKD loss and liger-kernel's JSD: time, memory and agreement.

    OMP_NUM_THREADS=1 python tools/benchmarks/loss_peers.py
    python tools/benchmarks/loss_peers.py --positions 8192 --vocab 152064 --hidden 4096      # for a GPU

Every table is one loss, and all its rows must return the same number and the same gradient; the last column is their
difference from naive PyTorch.  The peers have no mixed target, so that the first two tables have the Jensen-Shannon
divergence (lambda 1/2) of the student and the teacher alone.  The third has the default target with a reference.
A step is forward and backward; the rows take turns, and the first turn warms up.  Peak: memory beyond the inputs, with
the gradients, in units of the student's logits.  The ratios are those to naive PyTorch, in the same run.

The peers are no requirement of the project: a row whose package is missing, or whose kernels need a GPU, says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself otherwise, when torch is imported
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from peak_memory import peak_bytes, wait
from torch import Tensor

from megatron_selfdistill.loss import Divergence, Target, linear_self_distillation_loss, self_distillation_loss

JSD, ALONE, MIXED = Divergence("jsd"), Target("teacher_alone", anchor="student"), Target()
HALVINGS = 30
"""The steps of naive PyTorch's bisection, after which k has float32's accuracy."""


@dataclass(frozen=True)
class Case:
    """Logits [n, V] of student, teacher and reference, and hidden states [n, h] of a student and a teacher."""

    logits: tuple[Tensor, Tensor, Tensor]
    states: tuple[Tensor, Tensor]
    weight: Tensor
    """[V, h] the weight of both output layers."""
    chunk: int
    """The positions whose logits exist at a time, where a loss makes them in chunks."""

    @classmethod
    def random(cls, positions: int, vocab: int, hidden: int, chunk: int, device: torch.device) -> Case:
        """Return random float32 inputs, of which those of teacher and reference are noisy copies of the student's."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        student, states = 3 * normal(positions, vocab), normal(positions, hidden)
        logits = student, student + normal(positions, vocab), student + normal(positions, vocab) / 2
        weight = 3 * normal(vocab, hidden) / hidden**0.5
        first, second, third = (one.to(device) for one in logits)
        both = states.to(device), (states + normal(positions, hidden) / 3).to(device)
        return cls((first, second, third), both, weight.to(device), chunk)


Loss = Callable[..., Tensor]
"""A function of a case and its trained tensors, which returns the mean loss of all positions."""


@dataclass(frozen=True)
class Contender:
    """One row of a table."""

    name: str
    loss: Loss
    needs: tuple[str, ...] = ()
    """The modules without which the loss cannot run."""
    on_gpu_only: bool = False

    def why_not(self, device: torch.device) -> str | None:
        """Return the reason why the loss cannot run here; None if it can."""
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            return f"needs {' and '.join(missing)}, not installed"
        return "its Triton kernels need a GPU" if self.on_gpu_only and device.type != "cuda" else None


# -- naive PyTorch ---------------------------------------------------------------------------------------------------


def naive_jsd(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean JSD of two rows of logits, as its definition reads."""
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    return ((q * (log_q - log_m)).sum(-1) + (p * (log_p - log_m)).sum(-1)).mean() / 2


def naive_mixed(student: Tensor, teacher: Tensor, reference: Tensor) -> Tensor:
    """Return the mean KL(student || target) with the default target, whose k is found by bisection on full rows."""
    with torch.no_grad():
        mix = MIXED.teacher_weight * teacher + reference
        wanted = entropy(reference)
        low = torch.full_like(wanted, MIXED.beta_range[0])
        high = torch.full_like(wanted, MIXED.beta_range[1])
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            is_soft = entropy(middle[:, None] * mix) > wanted
            low, high = torch.where(is_soft, middle, low), torch.where(is_soft, high, middle)
        log_q = (low[:, None] * mix).log_softmax(-1)
    log_p = student.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of every row in nats."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


# -- the peers -------------------------------------------------------------------------------------------------------


def trl_jsd(case: Case, student: Tensor) -> Tensor:
    """Return the loss of TRL's GKD trainer."""
    from trl.experimental.gkd import GKDTrainer

    total: Tensor = GKDTrainer.generalized_jsd_loss(student, case.logits[1], beta=0.5, reduction="sum")
    return total / len(student)


def liger_jsd(case: Case, student: Tensor) -> Tensor:
    """Return liger-kernel's JSD of log-probabilities, a Triton kernel."""
    from liger_kernel.transformers import LigerJSD

    loss: Tensor = LigerJSD()(student.log_softmax(-1), case.logits[1].log_softmax(-1))
    return loss


def liger_chunked(case: Case, states: Tensor, weight: Tensor) -> Tensor:
    """Return liger-kernel's JSD of hidden states in chunks, in PyTorch; compiled on a GPU, as it is meant."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    labels = torch.zeros(len(states), dtype=torch.int64, device=states.device)
    loss = LigerFusedLinearJSDLoss(0.0, 1.0, compiled=states.device.type == "cuda", chunk_size=case.chunk)
    found: Tensor = loss(states, weight, case.states[1], case.weight, labels)
    return found


def liger_fused(case: Case, states: Tensor, weight: Tensor) -> Tensor:
    """Return liger-kernel's JSD of hidden states with its Triton kernel."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    found: Tensor = LigerFusedLinearJSD()(states, weight, case.states[1], case.weight)
    return found


# -- this project ----------------------------------------------------------------------------------------------------


def our_jsd(case: Case, student: Tensor) -> Tensor:
    """Return this project's JSD from logits."""
    return self_distillation_loss(student, case.logits[1], target=ALONE, divergence=JSD)


def our_linear(mode: str) -> Loss:
    """Return this project's JSD from hidden states."""

    def loss(case: Case, states: Tensor, weight: Tensor) -> Tensor:
        return linear_self_distillation_loss(
            states,
            weight,
            case.states[1],
            case.weight,
            target=ALONE,
            divergence=JSD,
            chunk_tokens=case.chunk,
            mode=mode,
        )

    return loss


TABLES: dict[str, tuple[bool, list[Contender]]] = {
    "JSD to the teacher alone, from logits": (
        False,
        [
            Contender("naive PyTorch", lambda case, student: naive_jsd(student, case.logits[1])),
            Contender("TRL, `GKDTrainer.generalized_jsd_loss`", trl_jsd, ("trl",)),
            Contender("liger-kernel, `LigerJSD`", liger_jsd, ("liger_kernel", "triton"), on_gpu_only=True),
            Contender("`self_distillation_loss`", our_jsd),
        ],
    ),
    "JSD to the teacher alone, from hidden states": (
        True,
        [
            Contender(
                "naive PyTorch", lambda case, own, weight: naive_jsd(own @ weight.t(), case.states[1] @ case.weight.t())
            ),
            Contender("liger-kernel, `LigerFusedLinearJSDLoss`", liger_chunked, ("liger_kernel",)),
            Contender("liger-kernel, `LigerFusedLinearJSD`", liger_fused, ("liger_kernel", "triton"), on_gpu_only=True),
            Contender("`linear_self_distillation_loss`", our_linear("low_memory")),
            Contender('the same, mode="keep_gradient"', our_linear("keep_gradient")),
        ],
    ),
    "reverse KL to the mixed target with a reference, from logits": (
        False,
        [
            Contender("naive PyTorch", lambda case, student: naive_mixed(student, *case.logits[1:])),
            Contender(
                "`self_distillation_loss`", lambda case, student: self_distillation_loss(student, *case.logits[1:])
            ),
        ],
    ),
}
"""The title of a table -> whether its losses start from hidden states, and its rows, naive PyTorch first."""


# -- measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """The measurements of one row."""

    wall: list[float]
    processor: list[float]
    peak: int
    loss: float
    gradients: list[Tensor]


def step(one: Contender, case: Case, from_states: bool) -> tuple[float, list[Tensor]]:
    """Return the loss and the gradients of one forward and backward pass."""
    given = (case.states[0], case.weight) if from_states else (case.logits[0],)
    trained = [tensor.detach().requires_grad_() for tensor in given]
    loss = one.loss(case, *trained)
    loss.backward()
    return loss.item(), [tensor.grad for tensor in trained if tensor.grad is not None]


def measure(rows: list[Contender], case: Case, from_states: bool, repeats: int) -> dict[str, Measured]:
    """Return the measurements of all rows, which take turns."""
    found: dict[str, Measured] = {}
    for one in rows:  # the first turn warms up
        loss, gradients = step(one, case, from_states)
        device = case.weight.device
        peak = peak_bytes(lambda one=one: step(one, case, from_states), device)  # type: ignore[misc]
        found[one.name] = Measured([], [], peak, loss, gradients)
    for _ in range(repeats):
        for one in rows:
            wait()
            wall, processor = time.perf_counter(), time.process_time()
            step(one, case, from_states)
            wait()
            found[one.name].wall.append(time.perf_counter() - wall)
            found[one.name].processor.append(time.process_time() - processor)
    return found


def table(rows: list[Contender], found: dict[str, Measured], device: torch.device, unit: int) -> list[str]:
    """Return the lines of a table in Markdown, with the rows that cannot run here."""
    lines = [
        "| loss | s | ratio | CPU s | ratio | peak, in logits | ratio | difference of loss; of gradient |",
        "|---" * 8 + "|",
    ]
    naive = found[rows[0].name]
    for one in rows:
        if one.name not in found:
            lines.append(f"| {one.name} | not run: {one.why_not(device)} |" + " |" * 6)
            continue
        own = found[one.name]
        cells = [one.name]
        for values, other in ((own.wall, naive.wall), (own.processor, naive.processor)):
            seconds = statistics.median(values)
            cells += [f"{seconds:.3g}", f"{seconds / statistics.median(other):.2f}"]
        cells += [f"{own.peak / unit:.2f}", f"{own.peak / naive.peak:.2f}"]
        apart = max(
            ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(own.gradients, naive.gradients, strict=True)
        )
        cells.append(f"{abs(own.loss / naive.loss - 1):.0e}; {apart:.0e}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def versions(names: tuple[str, ...] = ("torch", "trl", "liger_kernel", "triton")) -> str:
    """Return the versions of what takes part, or that it is not installed."""
    shown = []
    for name in names:
        there = importlib.util.find_spec(name) is not None
        shown.append(f"{name} {importlib.metadata.version(name) if there else 'not installed'}")
    return ", ".join(shown)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"positions": 1024, "vocab": 32768, "hidden": 512, "chunk": 256, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU of {os.cpu_count()} cores, threads: {torch.get_num_threads()}"
    )
    sizes = (
        f"{options.positions} positions in chunks of {options.chunk}, {options.vocab} columns, width {options.hidden}"
    )
    print(f"{place}; {versions()}; {sizes}, float32")
    case = Case.random(options.positions, options.vocab, options.hidden, options.chunk, device)
    for title, (from_states, contenders) in TABLES.items():
        can_run = [one for one in contenders if one.why_not(device) is None]
        found = measure(can_run, case, from_states, options.repeats)
        print(f"\n{title}:\n")
        print("\n".join(table(contenders, found, device, case.logits[0].nbytes)), flush=True)


if __name__ == "__main__":
    main()
