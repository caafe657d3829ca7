# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The log-probs of a few candidates for the next token of given prompts: one position per prompt, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.distributed.collectives import max_over_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.loss.sharded.vocab_parallel import TokenStats, VocabShard
from megatron_selfdistill.model.build import unwrapped
from megatron_selfdistill.pipeline import schedule
from megatron_selfdistill.pipeline.batch import Packing, pack_everywhere
from megatron_selfdistill.pipeline.score import over_whole_replica


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
    config = unwrapped(chunks[0]).config
    packing = Packing.of_model(config, max_tokens=max_tokens, pair_order="teacher_first", with_teacher=False)
    batch = pack_everywhere(pairs, packing, grid)
    reading = _Reading(torch.tensor(token_ids, device=grid.device))
    output = schedule.run(chunks, None, batch, reading, grid, vocab, forward_only=True)
    values = torch.cat(reading.found).T if reading.found else None
    return over_whole_replica(values, len(token_ids), output.response_ids, len(batch.response_tokens), grid).T


@dataclass
class _Reading:
    """A token loss that keeps the candidates' log-probs of every microbatch, in the order of the schedule's results."""

    token_ids: Tensor
    found: list[Tensor] = field(default_factory=list)
    """[rows, n] float64 per microbatch."""

    def __call__(
        self, logits: Tensor, teacher: Tensor | None, response_tokens: Tensor, vocab: VocabShard
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
