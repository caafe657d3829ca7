# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Gradient alignment: whether distillation pushes the next token towards the tokens with which the student succeeds.

A node is a prefix of a response.  With P_j the student's probability of the next token j and S_j the probability that
the student's response is right after token j, the student succeeds with probability sum_j P_j S_j.  The gradient of
this probability by the student's logits is the ideal direction

    g_j = P_j (S_j - sum_k P_k S_k)

and the alignment of a loss is the cosine between g and the descent of the loss, its negative gradient by the logits.
The idea is that of arXiv 2605.10889.  All arrays are float64 of shape ``[n]``, over the next tokens or over candidates
and one last entry for all other tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SMALLEST = 1e-12
"""The probability that stands for a smaller one in a logarithm, so that the rounding of a sum cannot become infinite.
"""
SHORTEST = 1e-9
"""The length of a direction below which only rounding may be left of it."""


def ideal_direction(student: Array, success: Array) -> Array:
    """Return g, the gradient of the probability of success by the student's logits.

    ``student``: P, which adds up to 1.  ``success``: S, the probability of success after each token.
    """
    return student * (success - student @ success)


def descent(student: Array, target: Array, divergence: str, jsd_lambda: float = 0.5) -> Array:
    """Return the negative gradient by the student's logits of a divergence between ``student`` P and ``target`` q.

    reverse_kl, KL(P || q): ``P_j (D_j - sum_k P_k D_k)`` with D = log q - log P.
    forward_kl, KL(q || P): ``q_j - P_j``.
    jsd, lam KL(q || M) + (1 - lam) KL(P || M) with M = lam q + (1 - lam) P and lam = ``jsd_lambda``:
    ``(1 - lam) P_j (D_j - sum_k P_k D_k)`` with D = log M - log P.
    Raises: ValueError for another divergence.
    """
    if divergence == "forward_kl":
        return target - student
    if divergence not in ("reverse_kl", "jsd"):
        raise ValueError(f"descent: expected reverse_kl, forward_kl or jsd, got {divergence!r}.")
    weight = 1.0
    if divergence == "jsd":
        weight, target = 1 - jsd_lambda, jsd_lambda * target + (1 - jsd_lambda) * student
    gap = np.log(np.maximum(target, SMALLEST)) - np.log(np.maximum(student, SMALLEST))
    down: Array = weight * student * (gap - student @ gap)
    return down


def cosine(a: Array, b: Array) -> float | None:
    """Return the cosine between two directions; None where one of them is shorter than `SHORTEST`, which is 0."""
    lengths = math.sqrt(a @ a), math.sqrt(b @ b)
    return float(np.clip(a @ b / math.prod(lengths), -1, 1)) if min(lengths) >= SHORTEST else None


def with_rest(probabilities: Array) -> Array:
    """Return the probabilities of the candidates and, as the last entry, the probability of all other tokens."""
    return np.append(probabilities, max(0.0, 1 - float(probabilities.sum())))


def success_with_rest(student: Array, success: Array) -> Array:
    """Return the success of the candidates and, as the last entry, the mean success of the candidates under P.

    No completion tries the other tokens.  With the mean, the ideal direction asks neither for more nor for less of
    them.  ``student``: P of the candidates, without the last entry.
    """
    total = float(student.sum())
    mean = student @ success / total if total > 0 else success.mean()
    return np.append(success, mean)


def alignment(student: Array, target: Array, success: Array, divergence: str, jsd_lambda: float = 0.5) -> float | None:
    """Return the cosine between the ideal direction and the `descent` of a divergence, over candidates and the rest.

    ``student``, ``target``: probabilities of the candidates. ``success``: the success of the candidates.
    ``jsd_lambda``: as for `descent`. The result is None where all candidates succeed equally often, and where the
    target is the student.
    """
    p, q = with_rest(student), with_rest(target)
    return cosine(ideal_direction(p, success_with_rest(student, success)), descent(p, q, divergence, jsd_lambda))


def chosen_nodes(kl: Sequence[float], number: int) -> dict[int, str]:
    """Return ``number`` positions of a response, ascending, with the rule that has chosen each: position or kl.

    Half of the positions, rounded up, lie at equal distances over the response; the others have the largest ``kl``
    among the rest, and the first of equal ones.  A response of at most ``number`` tokens gives all positions.
    ``kl``: one value per token of the response; NaN counts as the lowest.
    """
    length = len(kl)
    if length <= number:
        return dict.fromkeys(range(length), "position")
    half = -(-number // 2)
    chosen = {(2 * i + 1) * length // (2 * half): "position" for i in range(half)}
    values = [-math.inf if math.isnan(value) else value for value in kl]
    rest = sorted((i for i in range(length) if i not in chosen), key=lambda i: (-values[i], i))
    chosen |= dict.fromkeys(rest[: number - len(chosen)], "kl")
    return dict(sorted(chosen.items()))


def limit_groups(limits: Sequence[int], slack: int) -> list[list[int]]:
    """Return the different ``limits`` in groups whose largest and smallest limit differ by at most ``slack``.

    A limit is the number of tokens that a completion may have.  Groups and limits descend.  Completions of one group
    are sampled in one call, with the largest limit of the group.
    """
    groups: list[list[int]] = []
    for limit in sorted(set(limits), reverse=True):
        if groups and groups[-1][0] - limit <= slack:
            groups[-1].append(limit)
        else:
            groups.append([limit])
    return groups
