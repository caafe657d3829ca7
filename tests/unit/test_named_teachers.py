# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One copy of a model has the weights of the teacher that is asked for, bit for bit, in any order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import parallel

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.model.build import build_chunks
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.named_teachers import NamedTeachers

SEEDS = {"math": 3, "code": 4}
BIASES = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}


def tensors_of(chunks: Any) -> list[torch.Tensor]:
    return [
        it.detach().clone() for chunk in chunks for it in (*unwrapped(chunk).parameters(), *unwrapped(chunk).buffers())
    ]


def filled(chunks: Any, name: str) -> None:
    """Give all tensors of ``chunks`` values of the teacher ``name``."""
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
    for name in [*names, names[-1], *names]:
        with teachers.on_device(name) as on_device:
            found = tensors_of(on_device)
            assert len(found) == len(expected[name]) > 4
            assert all(a.equal(b) for a, b in zip(found, expected[name], strict=True))
            assert not any(p.requires_grad for chunk in on_device for p in chunk.parameters())
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


def resting(offload: bool) -> int:
    chunks, _ = models.build(models.model_config("shallow"), ParallelConfig())
    teachers = NamedTeachers({"one": Path("one")}, lambda: chunks, lambda path, into: None, offload=offload)
    return len(teachers._resting)
