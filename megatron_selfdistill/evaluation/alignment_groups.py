# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The gradient alignment of nodes, each a prefix of a response, and its means over groups of nodes.  No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_selfdistill.choices import DIVERGENCES
from megatron_selfdistill.evaluation.alignment import alignment

if TYPE_CHECKING:
    from megatron_selfdistill.data.tokenizer import Tokenizer

MODELS = ("student", "teacher", "target")
"""The distributions of `CandidateToken`, in the order of `candidate_log_probs`."""
LOSSES = tuple(f"{model}_{kind}" for model in ("teacher", "target") for kind in DIVERGENCES)
"""The losses whose alignment is measured: towards the teacher alone and towards the target, with each divergence."""

PARTS = ("beginning", "middle", "end")
"""The thirds of a response."""


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
    """The loss (`LOSSES`) -> the cosine; None where there is no direction (`cosine`)."""

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
