# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Every response token's teacher state reaches the student's microbatch that holds the token, wherever it rested."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from host_traffic import host_traffic
from layouts import contexts

from megatron_selfdistill.data.packed_batch import PackedBatch, PackingRules
from megatron_selfdistill.data.packing import pack
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard, chosen
from megatron_selfdistill.pipeline import schedule
from megatron_selfdistill.pipeline.batch import DeviceBatch
from megatron_selfdistill.pipeline.schedule import TeacherHiddenStates

WIDTH = 6
GRID = SimpleNamespace(
    cp_size=1, cp_rank=0, tp_size=1, tp_rank=0, sequence_parallel=False, device=torch.device("cpu"), cp_group=None
)


def bank_of(batch: PackedBatch, store_bytes: float) -> TeacherHiddenStates:
    on_device = DeviceBatch.of(batch, GRID, with_teacher=True, local_attention=False)
    return TeacherHiddenStates(on_device, GRID, WIDTH, store_bytes)


def hidden_of(batch: PackedBatch, index: int) -> torch.Tensor:
    """``[s, 1, h]``, where the state at the position of a response token is the token's id in the batch, h times."""
    microbatch = batch.teacher[index]
    hidden = torch.full((batch.seq_length, 1, WIDTH), -1.0)
    hidden[microbatch.response_positions] = microbatch.response_ids[:, None, None].float().expand(-1, 1, WIDTH)
    return hidden


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("store_bytes", [float("inf"), 500, 0])
@pytest.mark.parametrize(
    ("reference", "mix_weight", "keeps_both"),
    [(False, None, False), (True, None, True), (True, 3.0, True), (True, 3.0, False)],
    ids=["teacher alone", "apart", "mix and both", "mix"],
)
def test_the_student_finds_the_states_of_its_own_tokens(
    reference, mix_weight, keeps_both, store_bytes, paired, monkeypatch
):
    """The reference's states are 100 more than the teacher's, and those of the mix with w = 3 are 25 more."""
    batch = pack(contexts(), PackingRules(max_tokens=56, cp_size=1, tp_size=1, paired=paired))
    bank, pinned, empty = bank_of(batch, store_bytes), [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: pinned.append(bool(k.get("pin_memory"))) or empty(*a, **k))
    with host_traffic() as found:
        for index in range(len(batch.teacher)):
            bank.put(index, hidden_of(batch, index))
            assert bank.bytes_on_device <= store_bytes
        for index, microbatch in enumerate(batch.student if reference else []):
            states = 100 + microbatch.response_ids[:, None, None].float().expand(-1, 1, WIDTH)
            entropy = microbatch.response_ids.double()
            bank.add_reference(index, states, entropy, mix_weight=mix_weight, keeps_both=keeps_both)
            assert bank.bytes_on_device <= store_bytes
        taken = [bank.take(index, torch.float32) for index in range(len(batch.student))]
    for kept, microbatch in zip(taken, batch.student, strict=True):
        ids = microbatch.response_ids[:, None].float().expand(-1, WIDTH)
        expected = {
            "teacher": ids if keeps_both or not reference else None,
            "reference": 100 + ids if keeps_both else None,
        }
        expected["mix"] = None if mix_weight is None else ids + 25
        for name, states in expected.items():
            got = getattr(kept, name)
            assert (got is None) == (states is None)
            assert states is None or torch.equal(got, states), name
        assert not reference or torch.equal(kept.reference_entropy, microbatch.response_ids.double())
    assert len(batch.student) > 1 and any(pinned) == (store_bytes < float("inf"))
    assert found == [], "neither way may wait for the device"
    assert bank.bytes_on_device == 0
    with pytest.raises(RuntimeError, match="came before the teacher"):
        bank.take(0, torch.float32)


def test_states_of_equal_microbatches_are_kept_without_another_copy():
    batch = pack(contexts(), PackingRules(max_tokens=56, cp_size=1, tp_size=1, paired=True))
    bank = bank_of(batch, float("inf"))
    for index, teacher in enumerate(bank.batch.teacher):
        (route,) = teacher.routes
        assert (route.student_index, route.chosen, route.place) == (index, None, None)


def test_a_student_that_needs_no_state_gets_an_empty_tensor_of_the_asked_dtype():
    batch = pack(contexts()[:1], PackingRules(max_tokens=56, cp_size=1, tp_size=1, paired=True))
    nothing = torch.empty(0, dtype=torch.int64)
    student = dataclasses.replace(batch.student[0], response_positions=nothing, response_ids=nothing)
    batch = dataclasses.replace(batch, student=[student])
    states = bank_of(batch, 0).take(0, torch.bfloat16).teacher
    assert states.shape == (0, WIDTH) and states.dtype == torch.bfloat16


def test_the_configured_backend_subtracts_controls(monkeypatch):
    asked, torch_backend = [], chosen("torch", torch.zeros(1, 1), torch.zeros(1, 1))
    monkeypatch.setattr(schedule, "chosen", lambda name, *_: asked.append(name) or torch_backend)
    step = SimpleNamespace(vocab=VocabShard(0, 5, 5), backend="torch", _projected=lambda states: states)
    logits, controls = torch.arange(15.0).view(3, 5), torch.arange(30.0).view(2, 3, 5)
    schedule.ScheduledStep._subtract_controls(step, logits, controls)
    assert asked == ["torch"] and logits.abs().max() < 1e-5, "rows that differ by a number have equal probabilities"
