# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The nodes of a response at which gradient alignment is measured, and the candidates for the next token there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_selfdistill.evaluation.alignment import chosen_nodes
from megatron_selfdistill.evaluation.alignment_groups import CandidateToken, Node
from megatron_selfdistill.loss.sharded.logit_summary import LogitSummary
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.metrics.explored import ExploredResponse


def nodes_of(explored: ExploredResponse, correct: bool, num_nodes: int, num_top: int) -> list[Node]:
    """Return the nodes of a response that every model has read, at most ``num_nodes``, ascending.

    The candidates of a node are the union of the ``num_top`` most likely tokens of student, teacher and target.
    """
    kl = explored.numbers["reverse_kl"]
    chosen = chosen_nodes(kl, num_nodes)
    rows = torch.tensor(list(chosen))
    summary = LogitSummary(**{name: values[rows] for name, values in vars(explored.summary).items()})
    beta = torch.tensor([explored.numbers["beta"][position] for position in chosen], dtype=torch.float64)
    log_probs = candidate_log_probs(summary, beta, explored.settings.target)
    nodes = []
    for row, (position, rule) in enumerate(chosen.items()):
        nodes.append(
            Node(
                problem_id=explored.context.problem_id,
                position=position,
                chosen_by=rule,
                kl=kl[position],
                response_length=len(explored.context.response),
                correct=correct,
                candidates=_candidates(summary.ids[row], log_probs[row], num_top),
            )
        )
    return nodes


def candidate_log_probs(summary: LogitSummary, beta: Tensor, target: Target) -> Tensor:
    """Return the log-probs [T, 3, C] of the candidates of T tokens under student, teacher and target; -inf for none.

    ``beta``: [T] of the target.  Student and teacher are exact.  The target's normaliser is exact if the candidates are
    the complete vocabulary; otherwise the tokens in bins are known by the moments of their logits (`LogitSummary`).
    """
    own = summary.logits[:, :2] - summary.log_normalisers[:, :2, None]
    num_models = summary.logits.shape[1]
    of_teacher, of_anchor = target.mix_weights
    weights = torch.zeros(num_models, dtype=torch.float64)
    weights[1] = of_teacher
    weights[2 if target.is_anchored else 0] += of_anchor
    used = weights != 0
    mix = torch.einsum("m,tmc->tc", weights[used], summary.logits[:, used])
    mix = torch.where(summary.ids >= 0, mix, -torch.inf) * beta[:, None]
    mean = torch.einsum("m,tmb->tb", weights, summary.means) * beta[:, None]
    pairs = [(i, j) for i in range(num_models) for j in range(i, num_models)]
    factors = torch.stack([weights[i] * weights[j] * (1 if i == j else 2) for i, j in pairs])
    variance = torch.einsum("p,tpb->tb", factors, summary.covariances).clamp(min=0) * beta[:, None] ** 2
    binned = summary.counts.log() + mean + variance / 2  # log 0 = -inf for an empty bin
    normaliser = torch.cat([mix, binned], 1).logsumexp(1, keepdim=True)
    return torch.cat([own, (mix - normaliser)[:, None]], 1)


def _candidates(ids: Tensor, log_probs: Tensor, num_top: int) -> list[CandidateToken]:
    """Return the union of the most likely tokens of each model, by descending probability under the student."""
    count = min(num_top, int((ids >= 0).sum()))
    places = log_probs.topk(count, dim=1).indices.flatten().unique()
    ordered: Sequence[int] = places[log_probs[0, places].argsort(descending=True, stable=True)].tolist()
    return [CandidateToken(int(ids[place]), *log_probs[:, place].exp().tolist()) for place in ordered]
