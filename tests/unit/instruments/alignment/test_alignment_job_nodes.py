# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Nodes have the probabilities that full rows of logits give, and groups of nodes have the means of their members."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from explored_records import Words, explored_of, logit_rows
from torch import Tensor

from megatron_selfdistill.instruments.alignment.alignment import (
    LOSSES,
    CandidateToken,
    MeasuredNode,
    Node,
    alignment,
    node_groups,
    show_alignment,
)
from megatron_selfdistill.instruments.alignment.alignment_job import nodes_of
from megatron_selfdistill.loss.target import Target, mixed_target

STUDENT_MIX = Target(teacher_weight=2, k_max=None, anchor="student")
ANCHORED = Target(anchor="reference")


def full_rows(rows: list[Tensor], target: Target) -> Tensor:
    """Return the probabilities [3, T, V] of student, teacher and target, float64, from full rows."""
    student, teacher, *reference = (row.double() for row in rows)
    found = mixed_target(student, teacher, target, reference[0] if target.is_anchored else None)
    return torch.stack([student.softmax(-1), teacher.softmax(-1), found.log_q.exp()])


@pytest.mark.parametrize(
    ("target", "vocab_size", "tolerance"),
    [
        (STUDENT_MIX, 40, 1e-5),  # the candidates are the whole vocabulary
        (ANCHORED, 40, 1e-5),
        (STUDENT_MIX, 3000, 2e-3),  # most tokens are in bins
        (ANCHORED, 3000, 2e-3),
        (Target("teacher_alone", anchor="student"), 3000, 2e-3),
        (Target("fixed", k=1.5, anchor="student"), 3000, 2e-3),
    ],
    ids=str,
)
def test_a_node_has_the_likely_tokens_of_every_model_with_their_probabilities(target, vocab_size, tolerance):
    rows = logit_rows(24, vocab_size, 3 if target.is_anchored else 2)
    expected, explored = full_rows(rows, target), explored_of(rows, target)
    nodes = nodes_of(explored, True, 7, 4)
    assert [node.position for node in nodes] == sorted({node.position for node in nodes}) and len(nodes) == 7
    for node in nodes:
        at = expected[:, node.position]
        tokens = [candidate.token for candidate in node.candidates]
        assert set(tokens) == {*itertools.chain(*(at[model].topk(4).indices.tolist() for model in range(3)))}
        found = np.array([[it.student, it.teacher, it.target] for it in node.candidates]).T
        assert found == pytest.approx(at[:, tokens].numpy(), rel=tolerance, abs=1e-7)
        assert sorted(found[0], reverse=True) == found[0].tolist(), "by the student's probability"
        kl = (at[0] * (at[0].log() - at[2].log())).sum()
        assert node.kl == pytest.approx(float(kl), rel=2e-3, abs=1e-5)


def test_a_vocabulary_that_is_smaller_than_the_candidates_is_tried_as_a_whole():
    nodes = nodes_of(explored_of(logit_rows(5, 3, 2), STUDENT_MIX), False, 16, 4)
    assert len(nodes) == 5 and not any(node.correct for node in nodes)
    for node in nodes:
        assert sorted(it.token for it in node.candidates) == [0, 1, 2]
        assert sum(it.target for it in node.candidates) == pytest.approx(1, abs=1e-9)


def node(position: int, *, correct: bool, chosen_by: str = "kl") -> Node:
    candidates = [CandidateToken(5, 0.5, 0.1, 0.2), CandidateToken(8, 0.25, 0.5, 0.4)]
    return Node("p", position, chosen_by, 0.5, 9, correct, candidates)


def test_each_loss_has_the_cosine_of_its_probabilities():
    found = node(0, correct=True).measured({8: 1.0, 5: 0.25})
    student, success = np.array([0.5, 0.25]), np.array([0.25, 1.0])
    assert found.success == success.tolist() and tuple(found.alignment) == LOSSES
    towards = {"teacher": np.array([0.1, 0.5]), "target": np.array([0.2, 0.4])}
    for loss, cosine in found.alignment.items():
        model, _, divergence = loss.partition("_")
        assert cosine == alignment(student, towards[model], success, divergence) > 0
    record = found.record(Words())
    assert record["candidates"][0] == {
        "token": 5, "student": 0.5, "teacher": 0.1, "target": 0.2, "text": " w5", "success": 0.25
    }  # fmt: skip


def test_groups_have_the_means_of_their_decided_nodes(capsys):
    measured = [
        node(0, correct=True, chosen_by="position").measured({8: 1.0, 5: 0.0}),
        node(2, correct=True).measured({8: 0.0, 5: 1.0}),
        node(3, correct=True).measured({8: 0.5, 5: 0.5}),
        node(8, correct=False).measured({8: 1.0, 5: 0.25}),
    ]
    assert [it.part for it in measured] == ["beginning", "beginning", "middle", "end"]
    groups = {group.name: group for group in node_groups(measured)}
    assert {name: (group.num_nodes, group.num_decided) for name, group in groups.items()} == {
        "all": (4, 3),
        "right": (3, 2),
        "wrong": (1, 1),
        "chosen by position": (1, 1),
        "chosen by kl": (3, 2),
        "beginning": (2, 2),
        "middle": (1, 0),
        "end": (1, 1),
        "right, beginning": (2, 2),
        "right, middle": (1, 0),
        "wrong, end": (1, 1),
    }
    assert groups["middle"].alignment == dict.fromkeys(LOSSES)
    for loss in LOSSES:
        cosines = [measured[i].alignment[loss] for i in (0, 1, 3)]
        assert groups["all"].alignment[loss] == pytest.approx(sum(cosines) / 3)
        assert cosines[1] < 0 < cosines[0]
    show_alignment(list(groups.values()), 1, "written to here")
    shown = " ".join(capsys.readouterr().out.split())
    assert "right, beginning" in shown and "│ middle │ 1 │ 0 │ - │ - │ - │ - │" in shown


def test_no_nodes_have_no_groups():
    empty: list[MeasuredNode] = []
    assert node_groups(empty) == []
