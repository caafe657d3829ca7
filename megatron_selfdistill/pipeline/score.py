# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The measuring pass, which returns numbers of every token of given texts, without gradients.

`read_tokens` runs student and teacher and returns both log-probs of every token, and the divergence of both models.
The distillation loss takes log-probs and divergence as statistics anyway, so the pass computes logits as training does:
the logits of a microbatch or, where the output layer is fused with the loss, the logits of a chunk of tokens.

`candidate_log_probs` returns the log-probs of a few candidates for the next token of prompts: one position per prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.models.gpt import GPTModel

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.packed_batch import PackedBatch
from megatron_selfdistill.distributed.integers import max_over_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.loss.sharded.vocab_parallel import NO_OPTIONS, TokenOptions, TokenStats, VocabShard
from megatron_selfdistill.loss.target import Divergence, Target
from megatron_selfdistill.model.forward import Fusion, ResponsePositions, unwrapped
from megatron_selfdistill.model.fused_loss import FusedLoss
from megatron_selfdistill.pipeline import schedule, token_losses
from megatron_selfdistill.pipeline.batch import pack_everywhere
from megatron_selfdistill.pipeline.configured_packing import packing_of_model
from megatron_selfdistill.pipeline.schedule import Reference, ScheduledTeacher
from megatron_selfdistill.pipeline.token_losses import StepOutput
from megatron_selfdistill.pipeline.token_measures import TokenMeasurement


@dataclass(frozen=True)
class ScoringModels:
    """The models that read contexts without gradients, on one rank, and the way in which contexts reach them."""

    student: Sequence[torch.nn.Module]
    """The student's chunks of this rank."""
    teacher: Sequence[torch.nn.Module] | None
    """The teacher's chunks, with the same cuts; the student's own chunks where one model is both.

    None is for a loss without a teacher.
    """
    grid: RankGrid
    vocab: VocabShard
    max_tokens: int
    """Largest number of tokens of a packed sequence."""
    fusion: Fusion | None = None
    """As for `token_losses.self_distillation`, and equal on all ranks."""
    backend: str | None = None
    """As for `token_losses.self_distillation`, and equal on all ranks."""
    reference: Reference | None = None
    """As for `schedule.run`."""
    pair_order: str = "alternating"
    """As in `Packing`; alternating keeps the teacher's states of one packed sequence, for any number of texts."""
    joins_turns: bool = False
    """As in `Packing`."""


@dataclass(frozen=True)
class Reading:
    """The contexts of a pass without gradients as microbatches, and what this rank read in them."""

    batch: PackedBatch
    output: StepOutput
    grid: RankGrid

    def numbers(self, *names: str) -> Tensor:
        """Return the named `TokenStats` of every response token, [len(names), R] float64, on the host.

        Bits, order and collectives: as for `on_whole_replica`.
        """
        stats = self.output.stats
        own = None if stats is None else torch.stack([getattr(stats, name) for name in names]).double()
        return self.on_whole_replica(own, len(names))

    def on_whole_replica(self, own: Tensor | None, num_rows: int) -> Tensor:
        """Return rows of values of all response tokens, [num_rows, R] float64, on the host.

        ``own [num_rows, len(output.response_ids)]``: the values that this rank has; None if it has none.  The result
        has the order of ``batch.response_tokens`` and the same bits on every rank of the replica.  Collectives: one sum
        over CP and one broadcast each over TP and PP.
        """
        grid = self.grid
        values = torch.zeros(num_rows, len(self.batch.response_tokens), dtype=torch.float64, device=grid.device)
        if own is not None:
            values[:, self.output.response_ids] = own
        if grid.is_last_stage:
            over_last_stage(values, grid)
        if grid.pp_size > 1:
            dist.broadcast(values, grid.last_stage_rank, group=grid.pp_group)
        return values.cpu()


def over_last_stage(values: Tensor, grid: RankGrid) -> Tensor:
    """Sum ``values`` in place over context-parallel ranks, give all TP ranks the bits of TP rank 0, and return them.

    The ranks of one replica's last stage call it; each context-parallel rank holds a part of the values and zeros
    elsewhere. Collectives: a sum over CP, a broadcast over TP.
    """
    if grid.cp_size > 1:
        dist.all_reduce(values, group=grid.cp_group)
    if grid.tp_size > 1:  # each rank took its own sums, which need not have the same bits
        dist.broadcast(values, dist.get_global_rank(grid.tp_group, 0), group=grid.tp_group)
    return values


def sequence_for(num_tokens: int, grid: RankGrid) -> int:
    """Return the smallest length of packed sequences that holds ``num_tokens`` and that the layout can cut."""
    multiple = 16 * grid.tp_size * 2 * grid.cp_size
    return -(-num_tokens // multiple) * multiple


def read(
    contexts: Sequence[ContextPair],
    models: ScoringModels,
    loss: token_losses.TokenLoss | FusedLoss,
    measurement: TokenMeasurement | None = None,
) -> Reading:
    """Pack the ``contexts`` of this replica, and return what ``models`` read in them without gradients.

    ``loss``: its statistics are read.  ``measurement``: the measures beside them.
    ``contexts``: the same on each rank of the replica; replicas may have different numbers of contexts, also none.
    Every rank of the world calls the function.  Collectives: those of `pack_everywhere` and `schedule.run`.

    Raises: `NoResponseTokens` on all ranks where no replica has a response token; ValueError for a context that is
    longer than a packed sequence, or a backend that cannot run.
    """
    packing = packing_of_model(
        unwrapped(models.student[0]).config,
        max_tokens=models.max_tokens,
        pair_order=models.pair_order,
        with_teacher=models.teacher is not None,
        with_reference=models.reference is not None,
        joins_turns=models.joins_turns,
        num_controls=0 if measurement is None else measurement.target.num_controls,
    )
    batch = pack_everywhere(contexts, packing, models.grid)
    output = schedule.run(
        models.student,
        None if models.teacher is None else ScheduledTeacher(models.teacher),
        batch,
        loss,
        models.grid,
        models.vocab,
        reference=models.reference,
        measurement=measurement,
        forward_only=True,
    )
    return Reading(batch, output, models.grid)


def read_tokens(pairs: Sequence[ContextPair], models: ScoringModels, temperature: float = 1.0) -> Tensor:
    """Return log p, log p_teacher and KL(p || p_teacher) of every response token, [3, R] float64, in nats, on the host.

    The student reads the token after its own prompt, and the teacher after the teacher's prompt.  The tokens have the
    order of ``PackedBatch.response_tokens``: response after response, in the order of ``pairs``.  A response without
    tokens is allowed and adds none.

    ``pairs``: the pairs of this replica, the same on each of its ranks; replicas may have different numbers of pairs,
    also none.  ``temperature``: the number that divides the logits of both models; the quotient is rounded in the dtype
    of the logits or, where the output layer is fused, of the hidden states.

    Memory: where ``models`` have a fused output layer, of either mode, ``[2 chunk_tokens, V / tp]`` logits exist at a
    time, besides the temporaries of the loss's passes.  No activation is kept.

    Returns: the same bits on every rank of the replica; empty tensors where no replica has a token.  Another layout
    changes float32 log-probs by their rounding.

    Collectives: every rank of the world calls it; one maximum over the data-parallel ranks, those of `pack_everywhere`
    and `schedule.run`, and of ``[3, R]`` numbers in float64 one sum over CP and one broadcast each over TP and PP.

    Raises: ValueError for a context that is longer than a packed sequence, or a backend that cannot run.
    """
    if not max_over_ranks([sum(len(pair.response) for pair in pairs)], models.grid.dp_group)[0]:
        return torch.empty(3, 0, dtype=torch.float64)
    reading = read(pairs, models, _reading_loss(models.fusion, models.backend, temperature))
    return reading.numbers("student_log_prob", "teacher_log_prob", "reverse_kl")


def _reading_loss(fusion: Fusion | None, backend: str | None, temperature: float) -> token_losses.TokenLoss | FusedLoss:
    """Return the loss whose statistics hold the log-probs and KL(student || teacher) at the lowest cost.

    Its target needs no beta, and q is the teacher.
    """
    target, divergence = Target("teacher_alone", anchor="student"), Divergence()
    if fusion is not None:
        return _FusedAtTemperature(target, divergence, fusion, backend, temperature)
    loss = token_losses.self_distillation(target, divergence, backend)
    assert not isinstance(loss, FusedLoss), "without fusion the loss takes logits"

    def at_temperature(
        student: Tensor,
        teacher: Tensor | None,
        response_tokens: Tensor,
        vocab: VocabShard,
        options: TokenOptions = NO_OPTIONS,
    ) -> TokenStats:
        assert teacher is not None
        if temperature != 1.0:
            student, teacher = student.div_(temperature), teacher.div_(temperature)  # nobody else reads the logits
        return loss(student, teacher, response_tokens, vocab, options)

    return at_temperature


@dataclass(frozen=True)
class _FusedAtTemperature(FusedLoss):
    """The fused loss of logits that are divided by a temperature; a fused output layer is linear without a bias."""

    temperature: float = 1.0

    def __call__(
        self,
        student: GPTModel,
        teacher: GPTModel | Tensor,
        hidden: Tensor,
        positions: ResponsePositions,
        teacher_hidden: Tensor,
        *rest: Any,
        **further: Any,
    ) -> TokenStats:
        """Return the statistics of the tokens at this temperature; see `FusedLoss`."""
        if self.temperature != 1.0:
            hidden, teacher_hidden = hidden / self.temperature, teacher_hidden / self.temperature
        return super().__call__(student, teacher, hidden, positions, teacher_hidden, *rest, **further)


def candidate_log_probs(
    prompts: Sequence[Sequence[int]],
    token_ids: Sequence[int],
    chunks: Sequence[torch.nn.Module],
    grid: RankGrid,
    vocab: VocabShard,
    *,
    max_tokens: int,
) -> Tensor:
    """Return log p(token | prompt) of the n tokens ``token_ids`` after each prompt, [B, n] float64 nats, on the host.

    The probabilities are those over the whole valid vocabulary at temperature 1; the sums are in float64.
    ``prompts``: the B prompts of this replica as token ids, the same on each of its ranks; replicas may have different
    numbers of prompts, also none.  ``chunks``: the model's chunks of this rank.  ``max_tokens``: the largest number of
    tokens of a packed sequence.  Only the logits of one position per prompt exist, ``[prompts of a microbatch, V /
    tp]`` at a time.

    Returns: the same bits on every rank of the replica; no rows where no replica has a prompt.
    Collectives: every rank of the world calls it; one maximum over the data-parallel ranks, the collectives of
    `pack_everywhere` and `schedule.run`, three reductions over TP per microbatch, and of ``[n, B]`` numbers one sum
    over CP and one broadcast each over TP and PP.
    Raises: ValueError for a prompt that is longer than a packed sequence, and for a token that is no valid column.
    """
    if not all(0 <= token < vocab.vocab_size for token in token_ids):
        raise ValueError(
            f"candidate_log_probs: expected tokens of a vocabulary of {vocab.vocab_size}, got {list(token_ids)}."
        )
    if not max_over_ranks([len(prompts)], grid.dp_group)[0]:
        return torch.empty(0, len(token_ids), dtype=torch.float64)
    # A context has one response token, whose place is that of the candidates; which token it is does not matter.
    pairs = [ContextPair("", list(prompt), list(prompt), [token_ids[0]], truncated=False) for prompt in prompts]
    models = ScoringModels(chunks, None, grid, vocab, max_tokens, pair_order="teacher_first")
    candidates = _Candidates(torch.tensor(token_ids, device=grid.device))
    reading = read(pairs, models, candidates)
    values = torch.cat(candidates.found).T if candidates.found else None
    return reading.on_whole_replica(values, len(token_ids)).T


@dataclass
class _Candidates:
    """A token loss that keeps the candidates' log-probs of every microbatch, in the order of the schedule's results."""

    token_ids: Tensor
    found: list[Tensor] = field(default_factory=list)
    """[rows, n] float64 per microbatch."""

    def __call__(
        self,
        logits: Tensor,
        teacher: Tensor | None,
        response_tokens: Tensor,
        vocab: VocabShard,
        options: TokenOptions = NO_OPTIONS,
    ) -> TokenStats:
        """Keep the log-probs; the statistics that the schedule asks for are zeros."""
        self.found.append(log_probs_of_columns(logits, self.token_ids, vocab))
        zeros = logits.new_zeros(len(response_tokens), dtype=torch.float32)
        values = {f.name: zeros for f in fields(TokenStats)}
        values |= {"status": torch.zeros_like(response_tokens)}
        values |= {"grid_betas": zeros[:0], "grid_entropies": zeros.new_empty(len(zeros), 0)}
        return TokenStats(**values)


@torch.no_grad()
def log_probs_of_columns(logits: Tensor, token_ids: Tensor, vocab: VocabShard) -> Tensor:
    """Return log softmax(logits) of the valid columns ``token_ids [n]``, [R, n] float64, equal on the ranks of a group.

    ``logits [R, V / tp]``: this rank's shard, of any float dtype, with padding columns.
    Collectives over ``vocab.group``: one maximum and two sums.
    """
    valid = logits[:, : vocab.num_valid].double()
    peak = valid.new_full((len(valid),), -torch.inf) if vocab.num_valid == 0 else valid.amax(-1)
    _reduce(peak, dist.ReduceOp.MAX, vocab)
    total = (valid - peak[:, None]).exp().sum(-1)
    _reduce(total, dist.ReduceOp.SUM, vocab)
    chosen = valid.new_zeros(len(valid), len(token_ids))
    columns = token_ids - vocab.start
    mine = (columns >= 0) & (columns < vocab.num_valid)
    chosen[:, mine] = valid[:, columns[mine]]
    _reduce(chosen, dist.ReduceOp.SUM, vocab)
    return chosen - peak[:, None] - total.log()[:, None]


def _reduce(values: Tensor, operation: dist.ReduceOp.RedOpType, vocab: VocabShard) -> None:
    if vocab.group is not None and dist.get_world_size(vocab.group) > 1:
        dist.all_reduce(values, operation, group=vocab.group)
