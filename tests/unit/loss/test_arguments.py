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
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_a_batch_without_a_position_is_refused(name: str, shape: tuple[int, ...]) -> None:
    rows = {key: value for key, value in GOOD[name].items() if key.endswith(("_logits", "_hidden"))}
    empty = {key: value.new_zeros(*shape, value.size(-1)) for key, value in rows.items()}
    for labels in (None, torch.zeros(shape, dtype=torch.int64)):
        with pytest.raises(ValueError, match=f"{name}: at least one position must have a loss; the student has 0"):
            getattr(loss, name)(**GOOD[name] | empty | {"labels_or_mask": labels})


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
    one, other = (loss.self_distillation_loss(**GOOD[SELF] | {"labels_or_mask": it}) for it in (labels, labels != -100))
    assert one == other


def solve(betas: list[float], wanted: float = 1.0) -> float:
    return loss.solve_batch_k(wanted, betas, [2.0, 1.0], None)


def shard_loss(target: Target, **options: Any) -> None:
    entropy = torch.ones(T) if target.needs_reference_entropy else None
    common = {"divergence": Divergence(), "vocab": OWN["vocab"], "reference_entropy": entropy}
    loss.distillation_loss(LOGITS[0], LOGITS[1], IDS, target=target, **common | options)


def fused_loss(target: Target, reference: tuple[Tensor, Tensor]) -> None:
    common = {"divergence": Divergence(), "vocab": OWN["vocab"]}
    loss.fused_distillation_loss(STATES, STATES, WEIGHT, None, IDS, target=target, reference=reference, **common)


def of(name: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    return getattr(loss, name), GOOD[name] | changes


LABELS = [
    (torch.tensor([1, 2, 7, -100]), "labels_or_mask must be tokens from 0 to 6.*got 0 to 7"),
    (torch.tensor([1, -1, 3, -100]), "labels_or_mask must be tokens from 0 to 6.*got -1 to 3"),
    (torch.full((T,), -100), "at least one position must have a loss; labels_or_mask leaves"),
    (torch.tensor([0, 1, 1, 0]), r"all 0 or 1: pass the mask as \.bool\(\)"),
]
NAN = LOGITS[1].index_fill(0, torch.tensor([1, 2, 3]), math.nan)  # the last one is ignored
CONTROLLED, GEOMETRIC = Target(anchor="student", num_controls=3), Target("fixed", anchor="reference")
OF_TOKENS = {"teacher_weights": torch.ones(T)}
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (Target, {"rule": "mixed"}, "Target.rule"),
    (Target, {"teacher_weight": -1.0}, "teacher_weight"),
    (Target, {"k_max": "w"}, "k_max"),
    (Target, {"k_max": 0.1}, r"above \(1 \+ w\) / 16"),
    (Target, {"rule": "fixed", "k": 0.0}, "Target.k"),
    (Target, {"k": 2.0}, "Target.k"),
    (Target, {"anchor": "student", "match": "reference"}, "Target.anchor"),
    (Target, {"anchor": "teacher"}, "Target.anchor"),
    (Target, {"anchor": 0.0}, "Target.anchor"),
    (Target, {"anchor": 1.0}, "Target.anchor"),
    (Target, {"anchor": "reference", "match": "teacher"}, "Target.anchor"),
    (Target, {"rule": "teacher_alone", "anchor": "reference"}, "anchor"),
    (Target, {"rule": "teacher_alone", "anchor": 0.2}, "Target.anchor"),
    (Target, {"rule": "teacher_alone", "anchor": "student", "num_controls": 1}, "Target.num_controls"),
    (Divergence, {"kind": "kl"}, "kind"),
    (Divergence, {"kind": "jsd", "jsd_lambda": 1.0}, "jsd_lambda"),
    (Divergence, {"kind": "forward_kl", "forward_above": 0.8}, "forward_above"),
    (Divergence, {"kind": "jsd", "forward_above": 0.8}, "forward_above"),
    (Divergence, {"forward_above": math.nan}, "forward_above"),
    (Divergence, {"order": 0.0}, "order"),
    (Divergence, {"kind": "forward_kl", "order": 4.1}, "order"),
    (Divergence, {"order": math.nan}, "order"),
    (Divergence, {"kind": "jsd", "order": 2.0}, "order"),
    (Divergence, {"forward_above": 0.8, "order": 2.0}, "forward_above"),
    (VocabShard, {"start": 0, "size": 8, "vocab_size": 2**24}, "vocab_size"),
    (solve, {"betas": [1.0, 2.0], "wanted": math.nan}, "finite"),
    (solve, {"betas": [1.0]}, "equally long"),
    *((solve, {"betas": betas}, "rising") for betas in ([2.0, 1.0], [-1.0, 1.0], [0.0, 1.0], [1.0, 1.0])),
    (shard_loss, {"target": Target(anchor="student"), **OF_TOKENS}, "anchor=reference"),
    (shard_loss, {"target": Target(num_controls=2), **OF_TOKENS}, "controls"),
    (shard_loss, {"target": Target("batch", k=1.3), **OF_TOKENS}, "Target.k "),
    (shard_loss, {"target": Target("fixed", k=1.3), **OF_TOKENS}, "Target.k "),
    (shard_loss, {"target": Target(k_max=1.5), **OF_TOKENS}, "Target.k_max"),
    (shard_loss, {"target": Target(), "reference_entropy": None}, "reference_entropy"),
    (fused_loss, {"target": Target(anchor="student"), "reference": (STATES, WEIGHT)}, "reference"),
    (fused_loss, {"target": GEOMETRIC, "reference": (STATES[:2], WEIGHT)}, "reference_hidden"),
    (fused_loss, {"target": GEOMETRIC, "reference": (STATES, WEIGHT[:5])}, "reference_weight"),
    (*of("mixed_target", reference_logits=None), "reference_logits"),
    (*of("mixed_target", target=OWN["target"]), "reference_logits"),
    (*of(SELF, target=CONTROLLED, reference_logits=None), "num_controls"),
    (*of(SELF, target=CONTROLLED, reference_logits=None, control_logits=LOGITS[:2]), "num_controls"),
    (*of(SELF, target=OWN["target"], reference_logits=None, control_logits=LOGITS), "num_controls"),
    (*of(SELF, target=CONTROLLED, reference_logits=None, control_logits=LOGITS[:, :2]), "control_logits must be"),
    (*of(SELF, reference_logits=None), "reference_logits"),
    (*of(SELF, target=OWN["target"]), "reference_logits"),
    (*of(SELF, target=Target("batch")), "one k"),
    (*of(SELF, reduction="average"), "reduction"),
    (*of(SELF, reduction="sum"), "reduction='sum'"),
    (*of(SELF, teacher_logits=NAN), r"2 of 3 have not, and the first, at \(1,\), has nan"),
    (*of(LINEAR, teacher_hidden=STATES * math.nan), r"3 of 3 have not, and the first, at \(0,\)"),
    (*of(LINEAR, target=OWN["target"], reference_hidden=None), "reference_weight needs reference_hidden"),
    *((*of(name, labels_or_mask=it), words) for name in (SELF, LINEAR) for it, words in LABELS),
    *((*of(name, vocab_size=V + 1), "at least vocab_size 8") for name in (SELF, LINEAR)),
]


@pytest.mark.parametrize(("make", "arguments", "named"), REFUSED)
def test_settings_that_cannot_be_are_refused_by_name(make: Any, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make(**arguments)
