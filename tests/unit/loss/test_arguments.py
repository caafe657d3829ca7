# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The public functions of the loss refuse rows that do not belong together, labels out of range, and bad settings."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from megatron_selfdistill import loss
from megatron_selfdistill.loss import Divergence, Target, VocabShard

T, V, H = 4, 7, 5
LOGITS = torch.linspace(-2, 2, 3 * T * V).view(3, T, V)
STATES, WEIGHT, IDS = torch.ones(T, H), torch.ones(V, H), torch.zeros(T, dtype=torch.int64)
OWN = {"target": Target(anchor="student"), "divergence": Divergence(), "vocab": VocabShard(0, V, V)}
ANCHORED = {**OWN, "target": Target(), "reference_entropy": torch.ones(T), "teacher_weights": torch.ones(T)}
STUDENT_TEACHER = {"student_logits": LOGITS[0], "teacher_logits": LOGITS[1]}
HIDDEN = {f"{model}_hidden": STATES for model in ("student", "teacher", "reference")}
WEIGHTS = {f"{model}_weight": WEIGHT for model in ("student", "teacher", "reference")}
COMMON: dict[str, Any] = {
    **{"labels_or_mask": torch.tensor([1, 2, 6, -100]), "target": Target(), "divergence": "jsd", "reduction": "mean"},
    **{"num_items_in_batch": 3, "vocab_size": V, "check_nan": True},
}
GOOD: dict[str, dict[str, Any]] = {
    "self_distillation_loss": {**STUDENT_TEACHER, **{"reference_logits": LOGITS[2], "process_group": None}, **COMMON},
    "linear_self_distillation_loss": {**HIDDEN, **WEIGHTS, "chunk_tokens": 2, "mode": "low_memory", **COMMON},
    "distillation_loss": {**STUDENT_TEACHER, "response_tokens": IDS, **ANCHORED, "inplace_backward": False},
    "fused_distillation_loss": {
        **{name: HIDDEN[name] for name in ("student_hidden", "teacher_hidden")},
        **{name: WEIGHTS[name] for name in ("student_weight", "teacher_weight")},
        **{"response_tokens": IDS, "chunk_tokens": 2, "mode": "low_memory"},
        **{"reference": (STATES, WEIGHT), **ANCHORED},
    },
    "solve_target": {**STUDENT_TEACHER, "target": Target(), "vocab": OWN["vocab"], "reference_entropy": torch.ones(T)},
    "mixed_target": {**STUDENT_TEACHER, "target": Target(), "reference_logits": LOGITS[2]},
    "divergence": {"log_p": LOGITS[0], "log_q": LOGITS[1], "divergence": Divergence()},
    "divergence_gradient": {"log_p": LOGITS[0], "log_q": LOGITS[1], "divergence": Divergence()},
}


@pytest.mark.parametrize("name", GOOD)
def test_rows_that_do_not_belong_together_are_refused(name: str) -> None:
    function, good = getattr(loss, name), GOOD[name]
    function(**good)
    for argument, value in good.items():
        if isinstance(value, Tensor):
            with pytest.raises(ValueError, match=rf"{name}: \w+ must be \[.*row by row for the same tokens; got \["):
                function(**good | {argument: value[1:]})


SELF, LINEAR = "self_distillation_loss", "linear_self_distillation_loss"


@pytest.mark.parametrize("name", [SELF, LINEAR])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels_or_mask": torch.tensor([1, 2, 7, -100])}, "labels_or_mask must be tokens from 0 to 6.*got 0 to 7"),
        ({"labels_or_mask": torch.tensor([1, -1, 3, -100])}, "labels_or_mask must be tokens from 0 to 6.*got -1 to 3"),
        ({"labels_or_mask": torch.full((T,), -100)}, "at least one position must have a loss; labels_or_mask leaves"),
        ({"labels_or_mask": torch.tensor([0, 1, 1, 0])}, r"all 0 or 1: pass the mask as \.bool\(\)"),
        ({"vocab_size": V + 1}, "at least vocab_size 8"),
    ],
)
def test_labels_are_tokens_of_the_vocabulary_or_ignored(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        getattr(loss, name)(**GOOD[name] | changes)


@pytest.mark.parametrize("name", [SELF, LINEAR])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_a_batch_without_a_position_is_refused(name: str, shape: tuple[int, ...]) -> None:
    empty = {key: value.new_zeros(*shape, value.size(-1)) for key, value in GOOD[name].items() if is_rows(key)}
    for labels in (None, torch.zeros(shape, dtype=torch.int64)):
        with pytest.raises(ValueError, match=f"{name}: at least one position must have a loss; the student has 0"):
            getattr(loss, name)(**GOOD[name] | empty | {"labels_or_mask": labels})


def is_rows(name: str) -> bool:
    return name.endswith(("_logits", "_hidden"))


def test_an_infinite_loss_is_refused_where_nan_is() -> None:
    student, teacher, reference = LOGITS
    masked = teacher.index_fill(-1, torch.tensor([0]), -math.inf)
    with pytest.raises(ValueError, match=r"4 of 4 have not, and the first, at \(0,\), has inf: .*-inf in student"):
        loss.self_distillation_loss(student, masked, reference)
    assert loss.self_distillation_loss(student, masked, reference, check_nan=False).isinf()
    everywhere = [one.index_fill(-1, torch.tensor([0]), -math.inf) for one in LOGITS]
    fewer = loss.self_distillation_loss(*(one[:, 1:] for one in LOGITS))
    torch.testing.assert_close(loss.self_distillation_loss(*everywhere), fewer)


@pytest.mark.parametrize("count", [6, 6.0, numpy.int64(6), torch.tensor(6), torch.tensor([6]), torch.tensor(6.0)])
def test_a_number_of_items_divides_the_sum_into_a_scalar(count: Any) -> None:
    total = loss.self_distillation_loss(*LOGITS, reduction="sum")
    found = loss.self_distillation_loss(*LOGITS, num_items_in_batch=count)
    assert found.shape == () and found.item() == pytest.approx(total.item() / 6, rel=1e-6)


def test_labels_of_the_first_two_tokens_are_no_mask_where_others_are_ignored() -> None:
    labels = torch.tensor([0, 1, 1, -100])
    by_mask = GOOD[SELF] | {"labels_or_mask": labels != -100}
    assert loss.self_distillation_loss(**GOOD[SELF] | {"labels_or_mask": labels}) == loss.self_distillation_loss(
        **by_mask
    )


def solve(betas: list[float], wanted: float = 1.0) -> float:
    return loss.solve_batch_k(wanted, betas, [2.0, 1.0], None)


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (Target, {"rule": "mixed"}, "Target.rule must be one of entropy_matched, fixed, batch, teacher_alone; got"),
        (Target, {"teacher_weight": -1.0}, "must be a finite number >= 0; got -1.0"),
        (Target, {"k_max": "w"}, r"must be '1 \+ w', a number or None; got 'w'"),
        (Target, {"k_max": 0.1}, r"must be above \(1 \+ w\) / 16 = 0.109375"),
        (Target, {"rule": "fixed", "k": 0.0}, "Target.k must be a finite number > 0"),
        (Target, {"k": 2.0}, "Target.k must be a finite number > 0 of fixed or batch; got 2.0 with entropy_matched"),
        (Target, {"anchor": "student", "match": "reference"}, "Target.anchor must be one of student, reference"),
        (Target, {"anchor": "teacher"}, "Target.anchor must be one of student, reference"),
        (Target, {"anchor": "reference", "match": "teacher"}, "Target.anchor must be one of student, reference"),
        (Target, {"rule": "teacher_alone", "anchor": "reference"}, "whose target is no mix"),
        (Divergence, {"kind": "kl"}, "must be one of reverse_kl, forward_kl, jsd; got 'kl'"),
        (Divergence, {"kind": "jsd", "jsd_lambda": 1.0}, r"strictly between 0 and 1; got 1\.0"),
        (Divergence, {"kind": "forward_kl", "forward_above": 0.8}, "forward_above must be None .* 0.8 with forward_kl"),
        (Divergence, {"kind": "jsd", "forward_above": 0.8}, "forward_above must be None .* got 0.8 with jsd"),
        (Divergence, {"forward_above": math.nan}, "got nan"),
        (Divergence, {"order": 0.0}, "order must be above 0 and at most 4"),
        (Divergence, {"kind": "forward_kl", "order": 4.1}, "order must be above 0 and at most 4"),
        (Divergence, {"order": math.nan}, "order must be above 0 and at most 4"),
        (Divergence, {"kind": "jsd", "order": 2.0}, "and 1 with jsd"),
        (Divergence, {"forward_above": 0.8, "order": 2.0}, r"forward_above=0\.8"),
        (VocabShard, {"start": 0, "size": 8, "vocab_size": 2**24}, r"vocab_size < 2\^24"),
        (solve, {"betas": [1.0, 2.0], "wanted": math.nan}, "must be finite; got nan"),
        (solve, {"betas": [1.0]}, r"equally long, at least 2; got \[1.0\] and 1 and 2"),
        *(
            (solve, {"betas": betas}, "above 0 and rising")
            for betas in ([2.0, 1.0], [-1.0, 1.0], [0.0, 1.0], [1.0, 1.0])
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(make: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**arguments)
