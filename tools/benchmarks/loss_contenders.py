# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The contenders that loss_time.py measures, and their inputs: this project's loss, naive PyTorch, and the peers."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_selfdistill.choices import FUSED_MODES
from megatron_selfdistill.compat import cpu  # noqa: F401  (before megatron.core)
from megatron_selfdistill.loss import Divergence, Target, VocabShard, distillation_loss
from megatron_selfdistill.loss.sharded.fused_linear import fused_distillation_loss

W = 0.75
TARGET = Target(teacher_weight=W, anchor="student")
Run = Callable[[], tuple[Tensor | None, Tensor | None]]
"""Forward and backward: returns (loss per row, gradient); each is None for another loss than this project's."""


@dataclass
class Case:
    """One size: the inputs of this rank, equal for all contenders.

    chunk: tokens of a chunk, from hidden states.
    """

    tokens: int
    vocab: int
    hidden: int | None
    dtype: torch.dtype
    device: torch.device
    shard: VocabShard
    kind: str
    chunk: int = 4096
    student: Tensor = field(init=False)
    teacher: Tensor = field(init=False)
    response: Tensor = field(init=False)
    states: tuple[Tensor, Tensor] = field(init=False)
    weight: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device)

        # The shared columns are sampled first; then each rank samples its own columns.
        self.response = torch.randint(self.vocab, (self.tokens,), device=self.device, generator=generator)
        if self.hidden is None:
            generator.manual_seed(1 + self.rank)
            # Rows as of a language model: a few likely columns, a long tail, a teacher that mostly agrees.
            scores = -1.2 * torch.arange(1, self.shard.size + 1, device=self.device).log()
            student = scores[torch.randperm(self.shard.size, generator=generator, device=self.device)]
            self.student = (student + normal(self.tokens, self.shard.size)).to(self.dtype)
            self.teacher = (self.student + 0.5 * normal(self.tokens, self.shard.size)).to(self.dtype)
        else:
            states = normal(self.tokens, self.hidden), normal(self.tokens, self.hidden)
            self.states = states[0].to(self.dtype), (states[0] + 0.3 * states[1]).to(self.dtype)
            generator.manual_seed(1 + self.rank)
            self.weight = (normal(self.shard.size, self.hidden) * 2 / math.sqrt(self.hidden)).to(self.dtype)

    @property
    def rank(self) -> int:
        """The rank in the tensor-parallel group."""
        return 0 if self.shard.group is None else dist.get_rank(self.shard.group)

    @property
    def u(self) -> int:
        """The bytes of one read or write of the shard's logits in bf16."""
        return self.tokens * self.shard.size * 2

    @property
    def divergence(self) -> Divergence:
        """The divergence of the case."""
        return Divergence(self.kind)


@dataclass(frozen=True)
class Contender:
    """One way to compute a loss.

    ``prepare(case) -> run`` is not timed; ``run() -> (loss per row or None, gradient or None)`` is timed.
    """

    name: str
    prepare: Callable[[Case], Run]
    same_loss: bool = True
    """Whether the loss is this project's, so that its error can be reported."""
    passes: int | None = None
    """Reads and writes of every row of logits, by design."""
    floor: int | None = None
    """The reads and writes that this loss takes at least; None for another loss, and where products bound the time."""
    seen: bool = True
    """Whether PyTorch's operators do the work, so that their traffic can be counted; a kernel's traffic cannot."""


def passes_of_loss(divergence: str) -> int:
    """Return the reads and writes of rows that the loss takes.

    The first pass, the second pass and the JSD's own pass read both rows; then both are read once more, and the
    gradient is written over one of them.  The third pass reads no row that the second pass settles, and it settles all
    rows here.
    """
    return 2 + 2 + 2 * (divergence == "jsd") + 3


# -- contenders from logits ------------------------------------------------------------------------------------------


def naive(case: Case) -> Run:
    """Return naive PyTorch: two log-softmaxes in float32, 30 halvings of the interval of k, KL by autograd.

    It runs on the whole vocabulary only.
    """
    student = case.student.clone().requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        student.grad = None
        log_p = student.float().log_softmax(-1)
        with torch.no_grad():
            mix = W * case.teacher.float() + student.float()
            wanted = -(log_p.exp() * log_p).sum(-1)
            low = torch.full_like(wanted, 1 / (1 + W))
            high = torch.full_like(wanted, 16 / (1 + W))
            for _ in range(30):
                middle = (low + high) / 2
                log_q = (middle[:, None] * mix).log_softmax(-1)
                soft = -(log_q.exp() * log_q).sum(-1) > wanted
                low, high = torch.where(soft, middle, low), torch.where(soft, high, middle)
            log_q = (low[:, None] * mix).log_softmax(-1)
        if case.kind == "forward_kl":
            loss = (log_q.exp() * (log_q - log_p)).sum(-1)
        elif case.kind == "reverse_kl":
            loss = (log_p.exp() * (log_p - log_q)).sum(-1)
        else:
            log_m = torch.logaddexp(log_q, log_p) - math.log(2)
            loss = ((log_q.exp() * (log_q - log_m)).sum(-1) + (log_p.exp() * (log_p - log_m)).sum(-1)) / 2
        loss.sum().backward()
        assert student.grad is not None
        return loss.detach(), student.grad

    return run


def ours(**options: Any) -> Callable[[Case], Run]:
    """Return `distillation_loss`, with the gradient written over the student's logits."""

    def prepare(case: Case) -> Run:
        student = case.student.clone()

        def run() -> tuple[Tensor, Tensor]:
            logits = student.detach().requires_grad_()
            stats = distillation_loss(
                logits,
                case.teacher,
                case.response,
                target=TARGET,
                divergence=case.divergence,
                vocab=case.shard,
                inplace_backward=True,
                **options,
            )
            (gradient,) = torch.autograd.grad(stats.loss.sum(), logits)
            return stats.loss.detach(), gradient

        return run

    return prepare


def megatron_cross_entropy(fused: bool) -> Callable[[Case], Run]:
    """Return Megatron's loss of next-token training, which does less work: a lower bound."""

    def prepare(case: Case) -> Run:
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
        from megatron.core.parallel_state import get_tensor_model_parallel_group
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        student = case.student.clone().requires_grad_()
        target = case.response.unsqueeze(1)

        def run() -> tuple[Tensor, Tensor]:
            student.grad = None
            logits = student.unsqueeze(1)
            if fused:
                loss = fused_vocab_parallel_cross_entropy(logits, target, get_tensor_model_parallel_group())
            else:
                loss = vocab_parallel_cross_entropy(logits, target)
            loss.sum().backward()
            assert student.grad is not None
            return loss.detach(), student.grad

        return run

    return prepare


def liger_jsd(case: Case) -> Run:
    """Return liger-kernel's JSD of two given rows of log-probabilities, without a mixed target and without shards."""
    from liger_kernel.transformers import LigerJSD

    student, jsd = case.student.clone().requires_grad_(), LigerJSD()

    def run() -> tuple[None, Tensor]:
        student.grad = None
        jsd(student.float().log_softmax(-1), case.teacher.float().log_softmax(-1)).backward()
        assert student.grad is not None
        return None, student.grad

    return run


# -- contenders from hidden states ----------------------------------------------------------------------------------


def gemms(case: Case) -> Run:
    """Return the four products alone: logits of teacher and student, gradients of hidden states and weight.

    The gradients of hidden states are summed over the ranks during the last product.
    """
    (student, teacher), weight, group = case.states, case.weight, case.shard.group

    def run() -> tuple[None, None]:
        teacher @ weight.t()
        gradient = student @ weight.t()
        dgrad = gradient @ weight
        summed = dist.all_reduce(dgrad, group=group, async_op=True) if group is not None else None
        gradient.t() @ student
        if summed is not None:
            summed.wait()
        return None, None

    return run


def _from_hidden(case: Case, loss_of: Callable[[Tensor, Tensor], Tensor], per_row: bool) -> Run:
    """Return forward and backward of ``loss_of(hidden, weight)``, a loss per row or one loss that is not compared."""
    hidden, weight = case.states[0].clone().requires_grad_(), case.weight.clone().requires_grad_()

    def run() -> tuple[Tensor | None, Tensor]:
        hidden.grad = weight.grad = None
        loss = loss_of(hidden, weight)
        loss.sum().backward()
        assert hidden.grad is not None
        return loss.detach() if per_row else None, hidden.grad

    return run


def materialised(case: Case) -> Run:
    """Return Megatron's linear layer, which makes both logits in full, and then `distillation_loss`."""
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

    def logits_of(hidden: Tensor, weight: Tensor) -> Tensor:  # as `ColumnParallelLinear` calls it
        logits: Tensor = linear_with_grad_accumulation_and_async_allreduce(
            input=hidden,
            weight=weight,
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=case.shard.group is not None,
            sequence_parallel=False,
            tp_group=case.shard.group,
        )
        return logits

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = logits_of(case.states[1], weight)
        return distillation_loss(
            logits_of(hidden, weight),
            teacher,
            case.response,
            target=TARGET,
            divergence=case.divergence,
            vocab=case.shard,
            inplace_backward=True,
        ).loss

    return _from_hidden(case, loss_of, per_row=True)


def fused(mode: str) -> Callable[[Case], Run]:
    """Return `fused_distillation_loss`, with no logits beyond a chunk of tokens and what ``mode`` keeps."""

    def prepare(case: Case) -> Run:
        def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
            return fused_distillation_loss(
                hidden,
                case.states[1],
                weight,
                None,
                case.response,
                target=TARGET,
                divergence=case.divergence,
                vocab=case.shard,
                chunk_tokens=case.chunk,
                mode=mode,
            ).loss

        return _from_hidden(case, loss_of, per_row=True)

    return prepare


def liger_distillation(case: Case) -> Run:
    """Return liger-kernel's fused linear JSD in chunks of tokens, without a mixed target and without shards.

    It is written for torch.compile.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return _liger(case, LigerFusedLinearJSDLoss(0.0, 1.0, compiled=case.device.type == "cuda"))


def liger_fused_linear_jsd(case: Case) -> Run:
    """Return liger-kernel's other fused linear JSD, which has a Triton kernel."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    return _liger(case, LigerFusedLinearJSD())


def _liger(case: Case, loss: Callable[..., Tensor]) -> Run:
    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        return loss(hidden, weight, case.states[1], case.weight, case.response)

    return _from_hidden(case, loss_of, per_row=False)


def contenders(arguments: argparse.Namespace, device: torch.device, tp_size: int) -> list[Contender]:
    """Return the contenders that can run here; name the others on standard error, with the reason."""
    gpu, whole = device.type == "cuda", tp_size == 1
    liger = importlib.util.find_spec("liger_kernel") is not None and importlib.util.find_spec("triton") is not None
    from_what = _from_logits if arguments.hidden is None else _from_hidden_states
    found = from_what(arguments.divergence, gpu, whole, liger)
    for contender, needs, there in found:
        if not there:
            print(f"skipped: {contender.name}, which needs {needs}", file=sys.stderr)
    return [contender for contender, _, there in found if there]


def _from_logits(kind: str, gpu: bool, whole: bool, liger: bool) -> list[tuple[Contender, str, bool]]:
    """Return (contender, what it needs, whether this is available) for losses of logits."""
    passes = passes_of_loss(kind)
    found = [(Contender("naive PyTorch", naive, floor=passes), "the whole vocabulary on one rank", whole)]
    for backend, there in (("torch", True), ("triton", gpu)):
        one = Contender(backend, ours(backend=backend), passes=passes, floor=passes, seen=backend == "torch")
        found.append((one, "a GPU", there))
    for name, is_fused in (("Megatron's cross entropy", False), ("Megatron's fused cross entropy", True)):
        found.append((Contender(name, megatron_cross_entropy(is_fused), same_loss=False), "", True))
    peer = Contender("liger-kernel's JSD", liger_jsd, same_loss=False, seen=False)
    return [*found, (peer, "liger-kernel, a GPU, the whole vocabulary on one rank", liger and gpu and whole)]


def _from_hidden_states(kind: str, gpu: bool, whole: bool, liger: bool) -> list[tuple[Contender, str, bool]]:
    """Return (contender, what it needs, whether this is available) for losses of hidden states."""
    seen = not gpu  # there the loss's own backend is triton, and liger-kernel's loss is compiled
    loss, products = passes_of_loss(kind), 4  # written twice, read twice
    passes = {"keep_gradient": products + loss, "low_memory": products + loss + 2}  # both are made once more
    modes = [Contender(f"fused, {mode}", fused(mode), passes=passes[mode], seen=seen) for mode in FUSED_MODES]
    chunked = Contender("liger-kernel's fused linear JSD, chunked", liger_distillation, same_loss=False, seen=seen)
    kernel = Contender("liger-kernel's fused linear JSD, Triton", liger_fused_linear_jsd, same_loss=False, seen=False)
    return [
        (Contender("4 products alone", gemms, same_loss=False, passes=products), "", True),
        (Contender("materialised", materialised, passes=products + loss, seen=seen), "", True),
        *((one, "", True) for one in modes),
        (chunked, "liger-kernel, the whole vocabulary on one rank", liger and whole),
        (kernel, "liger-kernel, a GPU, the whole vocabulary on one rank", liger and gpu and whole),
    ]
