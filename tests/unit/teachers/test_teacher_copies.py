# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One copy of a model has the weights of the teacher that is asked for, bit for bit, in any order."""

from __future__ import annotations

import math
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_models
import models
import pytest
import torch
from adapted import merge, other_factors
from models import parallel
from tiers import combinations

from megatron_selfdistill.adapters.low_rank_adapters import WithOtherAdapters, WithoutAdapters, add_adapters
from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.build import build_chunks
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.teachers import teacher_copies
from megatron_selfdistill.teachers.teacher_copies import AdapterTeacher, NamedTeachers, require_host_memory

SEEDS = {"math": 3, "code": 4}
BIASES = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}


def tensors_of(chunks: Any) -> list[torch.Tensor]:
    return [it.detach().clone() for chunk in chunks for _, it in named_tensors(chunk)]


def named_tensors(chunk: Any) -> list[tuple[str, torch.Tensor]]:
    return [*unwrapped(chunk).named_parameters(), *unwrapped(chunk).named_buffers()]


def filled(chunks: Any, name: str) -> None:
    models.fill_from_names(chunks, seed=SEEDS[name])
    for chunk in chunks:
        for buffer in unwrapped(chunk).buffers():
            buffer.fill_(SEEDS[name])


def visits(cuts: ParallelConfig, names: list[str], kind: str, offload: bool, changes: dict[str, Any]) -> list[str]:
    """Return the order in which teachers loaded, and assert that each visit has all tensors of its teacher."""
    model = models.model_config(kind, **changes)
    chunks, grid = models.build(model, cuts)
    config, loaded = unwrapped(chunks[0]).config, []
    expected = {}
    for name in names:
        filled(chunks, name)
        expected[name] = tensors_of(chunks)

    def load(path: Path, into: Any) -> None:
        loaded.append(str(path))
        filled(into, str(path))

    teachers = NamedTeachers(
        {name: Path(name) for name in names},
        lambda: build_chunks(model, config, grid, models.VOCAB_SIZE),
        load,
        offload=offload,
    )
    for name, fetched in [
        *zip(names, [*names[1:], names[0]], strict=True),
        (names[-1], names[0]),
        *zip(names, names, strict=True),
    ]:
        with teachers.on_device(name) as on_device:
            found = tensors_of(on_device)
            assert len(found) == len(expected[name]) > 4
            assert all(a.equal(b) for a, b in zip(found, expected[name], strict=True))
            assert not any(p.requires_grad for chunk in on_device for p in chunk.parameters())
            teachers.fetch("of another copy")
            teachers.fetch(fetched)
            places = [it for chunk in chunks for it, _ in named_tensors(chunk)]
            for place, own, other, tensor in zip(
                places, expected[name], expected[fetched], tensors_of(on_device), strict=True
            ):
                is_fetched = place.startswith("decoder.") and not offload
                assert tensor.equal(other if is_fetched else own), "the loss still projects with the output layer"
    return loaded


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("names", [["math", "code"], ["math"]])
@pytest.mark.parametrize(
    ("cuts", "kind", "changes"),
    [(parallel(pp=2, vpp=2), "gqa", {}), (parallel(ep=2), "moe", BIASES)],
    ids=["PP2xVPP2", "EP2 with biases"],
)
def test_each_teacher_has_all_its_tensors_whenever_it_is_asked_for(ranks, cuts, kind, changes, names, offload):
    found = ranks.run(visits, cuts, names, kind, offload, changes, world_size=2)
    assert found == [sorted(names)] * 2, "the order of loading is that of the names"


def test_one_teacher_on_the_device_takes_no_host_memory(ranks):
    assert ranks.run(resting, False, world_size=1) == [0] and ranks.run(resting, True, world_size=1) == [1]


def room_for(available: int) -> str:
    """Return the error of a node with so much memory for two teachers of the model, or its two ranks' bytes of one."""
    chunks, _ = models.build(models.model_config("moe"), parallel(ep=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_copies.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
        try:
            require_host_memory(dict.fromkeys(("code", "math"), chunks))
        except ConfigError as error:
            return str(error)
    return str(sum(2 ** math.ceil(math.log2(tensor.nbytes)) for tensor in tensors_of(chunks)))


def test_a_node_without_room_for_the_weights_of_all_its_ranks_is_refused_with_both_numbers(ranks):
    one = sum(map(int, ranks.run(room_for, 2**40, world_size=2)))
    assert ranks.run(room_for, 2 * one, world_size=2) == [str(one // 2)] * 2
    for message in ranks.run(room_for, 2 * one - 1, world_size=2):
        assert message.startswith("the weights of 2 teachers (teachers.code.load, teachers.math.load) take ")
        assert f"take {2 * one / 2**30:.3g} GiB of host memory on {socket.gethostname()}, which has" in message


def resting(offload: bool) -> int:
    chunks, _ = models.build(models.model_config("shallow"), ParallelConfig())
    teachers = NamedTeachers({"one": Path("one")}, lambda: chunks, lambda path, into: None, offload=offload)
    return len(teachers._resting)


RANKS = {"math": 2, "code": 3}


def adapted_logits(cuts: ParallelConfig, kind: str, own: bool, rests: bool) -> list[float]:
    """Return the relative distance of each adapter teacher from its merged weights; the start keeps all its bits."""
    model = models.model_config(kind, vocab_size=hf_models.VOCAB_SIZE)
    chunks, grid = models.build(model, cuts)
    config = unwrapped(chunks[0]).config
    if own:
        add_adapters(chunks, AdapterConfig(rank=4, alpha=2.0, layers=["linear_qkv", "linear_fc1"]), grid)
        models.fill_from_names(chunks)
    start: list[Any] = [WithoutAdapters(chunk) for chunk in chunks] if own else chunks
    names = list(chunks[0].state_dict())
    before = tensors_of(chunks), logits_of(start, grid), logits_of(chunks, grid)
    teachers, merged = {}, {}
    for name, rank in RANKS.items():
        views = [WithOtherAdapters(chunk, AdapterConfig(rank=rank, alpha=0.3), grid) for chunk in start]
        merged[name] = models_of_merged(model, config, grid, views, SEEDS[name])
        teachers[name] = AdapterTeacher(views, device=grid.device, rests=rests)
    differences = []
    for name in [*RANKS, "math"]:
        with teachers[name].on_device() as on_device:
            found = logits_of(on_device, grid)
        assert (found - before[1]).abs().max() > 0.01, "the adapters do much more than rounding"
        differences.append(float((found - merged[name]).abs().max() / merged[name].abs().max()))
        torch.testing.assert_close(logits_of(start, grid), before[1], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(logits_of(chunks, grid), before[2], rtol=1e-5, atol=1e-4)
    assert all(a.equal(b) for a, b in zip(tensors_of(chunks), before[0], strict=True))
    assert list(chunks[0].state_dict()) == names, "a checkpoint of the start has no factors of teachers"
    assert not any(factor.requires_grad for one in teachers.values() for factor in one._factors)
    return differences


def models_of_merged(model: Any, config: Any, grid: Any, views: list[Any], seed: int) -> torch.Tensor:
    """Fill the factors of ``views``, and return the logits of a model with the start's weights and their product."""
    plain = build_chunks(model, config, grid, hf_models.VOCAB_SIZE)
    models.fill_from_names(plain)
    with views[0].in_place():
        other_factors(views, seed)
        merge(views, plain)
    return logits_of(plain, grid)


def logits_of(chunks: Any, grid: Any) -> torch.Tensor:
    return hf_models.megatron_logits(chunks[0], grid, [range(24), range(10, 50)])


STUDENTS = {
    "one rank": (parallel(), "gqa", False),
    "TP2 with SP, a student with adapters": (parallel(tp=2, sp=True), "gqa", True),
    "TP2 with SP and experts": (parallel(tp=2, sp=True), "moe", False),
}


@combinations(
    student=STUDENTS,
    rests=[False, True],
    quick={"student": ["TP2 with SP, a student with adapters"], "rests": ["True"]},
    strength=1,
)
def test_adapters_are_the_teacher_of_their_merged_weights_and_leave_the_start_as_it_is(ranks, student, rests):
    cuts, kind, own = student
    for differences in ranks.run(adapted_logits, cuts, kind, own, rests, world_size=cuts.tensor_model_parallel_size):
        assert max(differences) < 1e-5
