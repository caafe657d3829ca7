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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from megatron_selfdistill.choices import DIVERGENCES
from megatron_selfdistill.instruments.evaluate.evaluation_tables import console

if TYPE_CHECKING:
    from megatron_selfdistill.data.tokenizer import Tokenizer

MODELS = ("student", "teacher", "target")
"""The distributions of `CandidateToken`, in the order of `candidate_log_probs`."""
LOSSES = tuple(f"{model}_{kind}" for model in ("teacher", "target") for kind in DIVERGENCES)
"""The losses whose alignment is measured: towards the teacher alone and towards the target, with each divergence."""

PARTS = ("beginning", "middle", "end")
"""The thirds of a response."""

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
    """Return the cosine between two directions; None if one of them is shorter than `SHORTEST`, which is 0."""
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
    ``jsd_lambda``: as for `descent`. The result is None if all candidates succeed equally often, and where the
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


@dataclass(frozen=True)
class CandidateToken:
    """One candidate for the next token at a node."""

    token: int
    student: float
    """The student's probability of the token; likewise for the teacher and the target."""
    teacher: float
    target: float


@dataclass(frozen=True)
class Node:
    """A prefix of a response, and the candidates for the next token."""

    problem_id: str
    position: int
    """The number of tokens of the prefix."""
    chosen_by: str
    """The rule that has chosen the node (`chosen_nodes`): position or kl."""
    kl: float
    """KL(student || target) at the node, in nats."""
    response_length: int
    """The number of tokens of the response, with the stop token."""
    correct: bool
    """Whether the response is right."""
    candidates: list[CandidateToken]
    teacher_context: str = "solution"
    """The hint that the teacher's prompt shows: solution, answer, or the file of the hints."""

    def measured(self, success: Mapping[int, float], jsd_lambda: float = 0.5) -> MeasuredNode:
        """Return the node with the alignment of each loss.

        ``success``: the candidate's token -> the share of right completions after the token.  ``jsd_lambda``: of the
        divergence jsd.
        """
        student, teacher, target = (np.array([getattr(it, name) for it in self.candidates]) for name in MODELS)
        after = np.array([success[it.token] for it in self.candidates])
        towards = {"teacher": teacher, "target": target}
        found = {}
        for loss in LOSSES:
            model, _, divergence = loss.partition("_")
            found[loss] = alignment(student, towards[model], after, divergence, jsd_lambda)
        return MeasuredNode(self, after.tolist(), found)


@dataclass(frozen=True)
class MeasuredNode:
    """A node with the success of its candidates and the alignment of each loss."""

    node: Node
    success: list[float]
    """The share of right completions after each candidate."""
    alignment: dict[str, float | None]
    """The loss (`LOSSES`) -> the cosine; None if there is no direction (`cosine`)."""

    @property
    def part(self) -> str:
        """The third of the response in which the node lies: beginning, middle or end."""
        return PARTS[3 * self.node.position // self.node.response_length]

    def record(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the node as JSON values, with the texts of the candidates."""
        values = asdict(self.node)
        for candidate, success in zip(values["candidates"], self.success, strict=True):
            candidate |= {"text": tokenizer.decode([candidate["token"]]), "success": success}
        return {**values, "part": self.part, "alignment": self.alignment}


@dataclass(frozen=True)
class NodeGroup:
    """The mean alignment of the nodes that have something in common."""

    name: str
    num_nodes: int
    num_decided: int
    """The number of nodes whose candidates do not all succeed equally often; the others have no ideal direction."""
    alignment: dict[str, float | None]
    """The loss (`LOSSES`) -> the mean of the cosines of the decided nodes; None without one."""
    teacher_context: str = "solution"
    """The hint that the teacher's prompt shows, as in `Node`."""


def node_groups(measured: Sequence[MeasuredNode]) -> list[NodeGroup]:
    """Return the groups of the nodes: all, by correctness, by rule, by third of the response, and by both.

    The nodes of each teacher's context are groups of their own, context by context.  A group without nodes is left out.
    """
    contexts = dict.fromkeys(it.node.teacher_context for it in measured)
    return [
        replace(group, teacher_context=context)
        for context in contexts
        for group in _groups_of_one_context([it for it in measured if it.node.teacher_context == context])
    ]


def _groups_of_one_context(measured: Sequence[MeasuredNode]) -> list[NodeGroup]:
    kinds: dict[str, Callable[[MeasuredNode], bool]] = {"all": lambda it: True}
    kinds |= {"right": lambda it: it.node.correct, "wrong": lambda it: not it.node.correct}
    kinds |= {f"chosen by {rule}": partial(_is_chosen_by, rule) for rule in ("position", "kl")}
    parts = {part: partial(_lies_in, part) for part in PARTS}
    kinds |= parts
    for outcome in ("right", "wrong"):
        kinds |= {f"{outcome}, {part}": _both(kinds[outcome], lies) for part, lies in parts.items()}
    found = {name: [it for it in measured if belongs(it)] for name, belongs in kinds.items()}
    return [_group(name, nodes) for name, nodes in found.items() if nodes]


def _is_chosen_by(rule: str, it: MeasuredNode) -> bool:
    return it.node.chosen_by == rule


def _lies_in(part: str, it: MeasuredNode) -> bool:
    return it.part == part


def _both(one: Callable[[MeasuredNode], bool], other: Callable[[MeasuredNode], bool]) -> Callable[[MeasuredNode], bool]:
    return lambda it: one(it) and other(it)


def _group(name: str, nodes: Sequence[MeasuredNode]) -> NodeGroup:
    means = {}
    for loss in LOSSES:
        cosines = [cosine for it in nodes if (cosine := it.alignment[loss]) is not None]
        means[loss] = sum(cosines) / len(cosines) if cosines else None
    return NodeGroup(name, len(nodes), sum(len(set(it.success)) > 1 for it in nodes), means)


def show_alignment(groups: Sequence[NodeGroup], num_problems: int, line: str) -> None:
    """Print the mean alignment of the groups of nodes, a table per teacher's context, with ``line`` below them."""
    caption = (
        "mean cosine between the step of a loss and the gradient of success; decided: nodes at which\n"
        f"the candidates do not all succeed equally often\n{line}"
    )
    contexts = list(dict.fromkeys(it.teacher_context for it in groups))
    for context in contexts:
        title = f"gradient alignment, {num_problems} problems, the teacher sees: {context}"
        table = Table(title=title, caption=caption if context == contexts[-1] else None)
        table.add_column("nodes", no_wrap=True)
        for column in ("number", "decided", *(loss.replace("_", "\n", 1) for loss in LOSSES)):
            table.add_column(column, justify="right")
        for it in groups:
            if it.teacher_context == context:
                cosines = ("-" if (value := it.alignment[loss]) is None else f"{value:+.3f}" for loss in LOSSES)
                table.add_row(it.name, str(it.num_nodes), str(it.num_decided), *cosines)
        console().print(table)
