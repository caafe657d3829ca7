# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Test the teacher's weights over steps: frozen, averaged (against a float64 average), and the student's own."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import models
import pytest
import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_selfdistill.config import OptimizerConfig, ParallelConfig
from megatron_selfdistill.model.build import build_chunks, build_optimizer, wrap_for_training
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.model.teacher_weights import Teacher

TP2_SP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)
PP2_VPP2 = dataclasses.replace(PP2, virtual_pipeline_model_parallel_size=2)
EP2 = ParallelConfig(expert_model_parallel_size=2)
EXPERT_BIAS = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}


@dataclasses.dataclass(frozen=True)
class Setup:
    weights: str = "ema"
    precision: str = "fp32"
    distributed: bool = False
    overlap: bool = False
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    kind: str = "shallow"
    model_changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    decay: float = 0.9
    lr: float = 1e-3
    offload: bool = False


class Training:
    """The student, trained by gradients that are functions of parameter and step, equal on data-parallel ranks."""

    def __init__(self, setup: Setup, seed: int = 0) -> None:
        config = OptimizerConfig(
            precision=setup.precision,
            lr=setup.lr,
            clip_grad=0.0,
            use_distributed_optimizer=setup.distributed,
            overlap_grad_reduce=setup.overlap,
            overlap_param_gather=setup.overlap,
        )
        model = models.model_config(setup.kind, **setup.model_changes)
        chunks, grid = models.build(model, setup.parallel, optimizer=config, seed=seed)
        transformer = unwrapped(chunks[0]).config
        self.student = wrap_for_training(chunks, config)
        self.optimizer, self.scheduler = build_optimizer(self.student, config, 100)
        self.teacher = Teacher(
            setup.weights,
            self.student,
            lambda: build_chunks(model, transformer, grid, models.VOCAB_SIZE),
            ema_decay=setup.decay,
            offload=setup.offload,
        )

    def parameters(self) -> list[Tensor]:
        return [p for chunk in self.student for p in unwrapped(chunk).parameters()]

    def taught(self) -> list[Tensor]:
        return [p for chunk in self.teacher.chunks for p in unwrapped(chunk).parameters()]

    def step(self, number: int) -> None:
        for index, parameter in enumerate(self.parameters()):
            drift, noise = (
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                for seed in (index, 1000 * (number + 1) + index)
            )
            parameter.main_grad.copy_(drift + 0.3 * noise)
        self.scheduler.step(1)
        self.optimizer.step()
        self.teacher.update(self.optimizer)


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def all_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and a.equal(b) for a, b in zip(some, others, strict=True))


def average_against_float64(setup: Setup, steps: int) -> dict[str, float]:
    """Return the largest differences of master and copy from a float64 average, and the way that it has moved."""
    training = Training(setup)

    def main_parameters() -> list[Tensor]:
        names = "main_param" if setup.precision == "bf16" else "data"
        return [getattr(p, names).detach().double() for p in training.parameters()]

    start = [p.clone() for p in main_parameters()]
    average = [p.clone() for p in start]
    for number in range(steps):
        training.step(number)
        average = [setup.decay * a + (1 - setup.decay) * p for a, p in zip(average, main_parameters(), strict=True)]
    masters = training.teacher.masters
    assert all(m.dtype == torch.float32 for m in masters)
    return {
        "difference": worst(masters, average),
        "from the student": min(
            float((m.double() - p).abs().max()) for m, p in zip(masters, main_parameters(), strict=True)
        ),
        "way": min(float((m.double() - s).abs().max()) for m, s in zip(masters, start, strict=True)),
        "copy": worst(training.taught(), [m.to(p.dtype) for m, p in zip(masters, training.taught(), strict=True)]),
    }


def worst(some: list[Tensor], others: list[Tensor]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.full), "bf16"])
def test_the_average_equals_one_in_float64_over_20_steps(ranks, precision):
    (seen,) = ranks.run(average_against_float64, Setup(precision=precision), 20, world_size=1)
    assert seen["difference"] < 3e-6, "rounding of float32 only"
    assert seen["way"] > 5e-3 and seen["from the student"] > 2e-3, "or the average was never tested"
    assert seen["copy"] == 0.0, "the copy is the cast of the master"


def masters_after(setup: Setup, steps: int) -> tuple[list[Tensor], list[Tensor], bool]:
    training = Training(setup)
    for number in range(steps):
        training.step(number)
    masters = training.teacher.masters
    is_cast = all_equal(copies(training.taught()), [m.bfloat16() for m in masters])
    return copies(masters), copies(training.parameters()), is_cast


@pytest.mark.parametrize(
    ("kind", "parallel"),
    [pytest.param("shallow", ParallelConfig(), marks=pytest.mark.full), ("moe", EP2)],
    ids=["DP2", "EP2, two optimizers"],
)
def test_the_average_under_the_distributed_optimizer_is_that_of_the_plain_one(ranks, kind, parallel):
    setup = Setup(precision="bf16", kind=kind, parallel=parallel)
    plain = ranks.run(masters_after, setup, 4, world_size=2)
    cut = ranks.run(masters_after, dataclasses.replace(setup, distributed=True), 4, world_size=2)
    for (masters, parameters, is_cast), (expected, expected_parameters, _) in zip(cut, plain, strict=True):
        assert is_cast and all_equal(parameters, expected_parameters)
        assert all_equal(masters, expected)
    if kind == "shallow":
        assert all_equal(cut[0][0], cut[1][0]), "ranks of one replica group hold the same average"


def test_the_average_has_the_newest_parameters_of_all_ranks_before_they_are_gathered(ranks):
    plain = ranks.run(masters_after, Setup(), 4, world_size=2)
    late = ranks.run(masters_after, Setup(distributed=True, overlap=True), 4, world_size=2)
    assert not all_equal(late[0][1], plain[0][1]), "or nothing is late"
    assert all(all_equal(masters, plain[0][0]) for masters, *_ in late)


def frozen_teacher(setup: Setup) -> dict[str, bool]:
    training = Training(setup)
    start, taught = copies(training.parameters()), copies(training.taught())
    pointers = [p.data_ptr() for p in training.taught()]
    for number in range(3):
        training.step(number)
    stays, is_student = all_equal(copies(training.taught()), taught), all_equal(start, taught)
    moved = not any(a.equal(b) for a, b in zip(training.parameters(), start, strict=True))
    models.fill_from_names(training.student, seed=5)
    training.teacher.copy_student()  # as where the student loads its checkpoint after the teacher was made
    return {
        "starts as the student": is_student,
        "stays": stays,
        "is copied anew": all_equal(copies(training.taught()), copies(training.parameters())),
        "the student moved": moved,
        "shares no memory": not {p.data_ptr() for p in training.parameters()} & set(pointers),
        "asks for no gradient": not any(p.requires_grad for p in training.taught()),
        "is in evaluation mode": not any(chunk.training for chunk in training.teacher.chunks),
        "has no masters": training.teacher.masters == [],
    }


@pytest.mark.parametrize(
    ("setup", "world_size"),
    [
        (Setup(weights="frozen", precision="bf16", distributed=True), 2),
        (Setup(weights="frozen", kind="tied", parallel=PP2), 2),
    ],
    ids=["distributed", "PP2 tied"],
)
def test_a_frozen_teacher_never_changes_while_the_student_trains(ranks, setup, world_size):
    for seen in ranks.run(frozen_teacher, setup, world_size=world_size):
        assert all(seen.values()), seen


def offloaded(weights: str, precision: str) -> dict[str, bool]:
    setups = [Setup(weights=weights, precision=precision, offload=offload) for offload in (True, False)]
    training, plain = map(Training, setups)
    start = copies(training.taught())
    resting = [p.data_ptr() for p in training.taught()]
    for number in range(2):
        for each in (training, plain):
            each.step(number)
        with training.teacher.on_device() as chunks:
            loaded = [p.data_ptr() for c in chunks for p in unwrapped(c).parameters()]
            with torch.no_grad():
                next(unwrapped(chunks[0]).parameters()).add_(1.0)  # a pass that only reads must leave nothing behind
    return {
        "what runs is a copy": not set(loaded) & set(resting),
        "which is gone afterwards": [p.data_ptr() for p in training.taught()] == resting,
        "the weights are those of a teacher that stays": all_equal(copies(training.taught()), copies(plain.taught())),
        "and so is the average": all_equal(training.teacher.masters, plain.teacher.masters),
        "the average has moved": all_equal(training.taught(), start) == (weights == "frozen"),
    }


# In float32 an average and its copy share their memory.
@pytest.mark.parametrize(
    ("weights", "precision"), [("frozen", "fp32"), pytest.param("ema", "fp32", marks=pytest.mark.full), ("ema", "bf16")]
)
def test_offloaded_weights_come_for_a_pass_and_change_only_with_the_average(ranks, weights, precision):
    (seen,) = ranks.run(offloaded, weights, precision, world_size=1)
    assert all(seen.values()), seen


def through_a_state_dict(setup: Setup) -> dict[str, bool]:
    """Load the state of a teacher, copied as by a checkpoint, into the teacher of another run."""
    first, second = Training(setup), Training(setup, seed=1)
    for number in range(2):
        first.step(number)
    state = first.teacher.sharded_state_dict()
    values = [value for chunk in state.values() for value in chunk.values()]
    tensors = [v for v in values if isinstance(v, ShardedTensor | ShardedTensorFactory)]
    saved = first.teacher.masters or first.taught()
    stored = {name: {key: copy.deepcopy(v.data) for key, v in chunk.items()} for name, chunk in state.items()}
    differed = not all_equal(copies(first.taught()), copies(second.taught()))
    second.teacher.load_state_dict(stored)
    return {
        "one entry per chunk": list(state) == [f"teacher{i}" for i in range(len(first.student))],
        "names": all(key.startswith("teacher.") for chunk in state.values() for key in chunk),
        "sharded names": all(v.key.startswith("teacher.") for v in tensors),
        "holds the masters, shared": {v.data.data_ptr() for v in tensors} >= {m.data_ptr() for m in saved},
        "they differed": differed,
        "the weights are loaded": all_equal(copies(first.taught()), copies(second.taught())),
        "the masters are loaded": all_equal(first.teacher.masters, second.teacher.masters),
        "the buffers are loaded": all_equal(buffers(first), buffers(second)),
        "the dtypes stayed": {p.dtype for p in first.taught()} == {p.dtype for p in first.parameters()},
        "one master per weight": len(second.teacher.masters) == len(first.teacher.masters),
    }


def buffers(training: Training) -> list[Tensor]:
    return [b for c in training.teacher.chunks for n, b in unwrapped(c).named_buffers() if n.endswith("expert_bias")]


@pytest.mark.parametrize(
    ("setup", "world_size"),
    [
        pytest.param(Setup(precision="bf16"), 1, marks=pytest.mark.full),
        pytest.param(Setup(precision="bf16", parallel=TP2_SP), 2, marks=pytest.mark.full),
        pytest.param(Setup(precision="bf16", parallel=PP2, kind="tied"), 2, marks=pytest.mark.full),
        (Setup(precision="bf16", parallel=PP2_VPP2, kind="gqa"), 2),
        (Setup(precision="bf16", parallel=EP2, kind="moe", model_changes=EXPERT_BIAS, distributed=True), 2),
        (Setup(weights="frozen", precision="bf16", parallel=TP2_SP), 2),
        pytest.param(Setup(weights="frozen", parallel=PP2_VPP2, kind="gqa"), 2, marks=pytest.mark.full),
    ],
    ids=["ema", "ema TP2+SP", "ema PP2 tied", "ema PP2xVPP2", "ema EP2", "frozen TP2+SP", "frozen PP2xVPP2"],
)
def test_a_teacher_goes_through_a_checkpoint_bit_for_bit(ranks, setup, world_size):
    for seen in ranks.run(through_a_state_dict, setup, world_size=world_size):
        assert all(seen.values()), seen


def expert_biases(weights: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return the student's biases at the start, and the teacher's at the start and after a step of the student."""
    training = Training(Setup(weights=weights, precision="bf16", kind="moe", model_changes=EXPERT_BIAS, decay=0.5))
    routers = [layer.mlp.router for chunk in training.student for layer in unwrapped(chunk).decoder.layers]

    def set_biases(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for router in routers:
            router._maintain_float32_expert_bias()
            router.expert_bias.copy_(torch.randn(4, generator=generator))
        return copies([router.expert_bias for router in routers])

    first = set_biases(0)
    training.teacher.copy_student()
    at_start = copies(buffers(training))
    second = set_biases(1)
    training.step(0)
    after = copies(buffers(training))
    assert not all_equal(first, second) and first[0].dtype == torch.float32
    return (first if weights == "frozen" else second), at_start if weights == "frozen" else second, after


def test_expert_biases_follow_the_student_exactly_and_stay_when_frozen(ranks):
    ((expected, at_start, after),) = ranks.run(expert_biases, "frozen", world_size=1)
    assert all_equal(at_start, expected) and all_equal(after, expected), "float32, although the model is bf16"
    ((expected, _, after),) = ranks.run(expert_biases, "ema", world_size=1)
    assert all_equal(after, expected)
