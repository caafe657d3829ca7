# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Resuming equals never having stopped: bit for bit in the same layout, to 1e-6 in others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import checkpointed_run
import layouts
import pytest
from checkpointed_run import Setup
from tiers import combinations

TP2, PP2, EP2, VPP2 = {"tp": 2}, {"pp": 2}, {"ep": 2}, {"pp": 2, "vpp": 2}
TP2_PP2 = {"tp": 2, "pp": 2, "sp": True}
WHOLE: dict = {}


def setup_of(
    precision: str = "fp32", distributed: bool = True, overlap: bool = False, num_layers: int = 2, **changes
) -> Setup:
    optimizer = {"precision": precision, "use_distributed_optimizer": distributed}
    optimizer |= {"overlap_grad_reduce": overlap, "overlap_param_gather": overlap}
    adam = dataclasses.replace(checkpointed_run.ADAM, **optimizer)
    return Setup(optimizer=adam, model_changes={"num_layers": num_layers}, **changes)


def assert_alike(resumed: list[dict], never_stopped: list[dict], most: float = 0.0) -> None:
    """Compare the ends of two runs, to the last bit and with all random numbers where ``most`` is 0."""
    for what in ("parameters", "teacher", *(() if most else ("weights",))):
        found, expected = (layouts.join([end[what] for end in run]) for run in (resumed, never_stopped))
        worst, where = layouts.worst_difference(found, expected)
        assert worst <= most, (what, where)
    assert resumed[0]["lr"] == never_stopped[0]["lr"]
    if not most:
        for what in ("lr", "random_numbers"):
            assert [end[what] for end in resumed] == [end[what] for end in never_stopped]


def save_and_resume(setup: Setup, run_dir: Path, async_save: bool = False) -> tuple[dict, dict]:
    """Return the ends of a run that never stopped and of a run that resumes in the same layout."""
    never_stopped = checkpointed_run.save_and_go_on(setup, run_dir, async_save)
    return never_stopped, checkpointed_run.resume_and_go_on(setup, run_dir)


SAME_LAYOUT = {
    "TP1": (1, setup_of()),
    "TP1 plain optimizer bf16": (1, setup_of("bf16", distributed=False)),
    "DP2 overlapped": (2, setup_of("bf16", overlap=True)),
    "TP2xPP2 tied": (4, setup_of("bf16", kind="tied").cut(**TP2_PP2)),
    "PP2xVPP2": (2, setup_of(teacher="frozen", num_layers=4).cut(**VPP2)),
    "EP2": (2, setup_of("bf16", kind="moe").cut(**EP2)),
    "TP2 linear": (2, setup_of("bf16", kind="gated_delta").cut(**TP2)),
}


@combinations(name=list(SAME_LAYOUT), quick={"name": ["DP2 overlapped"]}, strength=1)
def test_resuming_in_the_same_layout_is_bit_for_bit_never_having_stopped(ranks, tmp_path, name):
    world_size, setup = SAME_LAYOUT[name]
    ends = ranks.run(save_and_resume, setup, tmp_path, world_size=world_size)
    assert_alike([resumed for _, resumed in ends], [never_stopped for never_stopped, _ in ends])


FROM_ONE_RANK = {"TP2": TP2, "PP2": PP2, "DP2": WHOLE}
OPTIMIZERS = {
    "fp32": setup_of(),
    "bf16": setup_of("bf16"),
    "plain fp32": setup_of(distributed=False),
    "plain bf16": setup_of("bf16", distributed=False),
}


def save_with_each(directory: Path) -> dict[str, dict]:
    """Save a run with each optimizer below ``directory``; return the ends of the runs without a stop."""
    return {name: checkpointed_run.save_and_go_on(setup, directory / name) for name, setup in OPTIMIZERS.items()}


@pytest.fixture(scope="module")
def saved_on_one_rank(ranks, tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    directory = tmp_path_factory.mktemp("runs")
    return directory, ranks.run(save_with_each, directory, world_size=1)[0]


@combinations(
    optimizer=list(OPTIMIZERS),
    layout=list(FROM_ONE_RANK),
    quick={"optimizer": ["bf16"], "layout": ["TP2"]},
    strength=1,
)
def test_a_run_of_one_rank_goes_on_in_other_layouts(ranks, saved_on_one_rank, layout, optimizer):
    directory, never_stopped = saved_on_one_rank
    setup = OPTIMIZERS[optimizer].cut(**FROM_ONE_RANK[layout])
    resumed = ranks.run(checkpointed_run.resume_and_go_on, setup, directory / optimizer, world_size=2)
    assert_alike(resumed, [never_stopped[optimizer]], 1e-6)


OTHER_LAYOUTS = {
    "TP2xPP2 -> TP1": (4, setup_of(teacher="frozen").cut(**TP2_PP2), 1, WHOLE),
    "TP2xPP2 bf16 -> PP2xVPP2": (4, setup_of("bf16", num_layers=4).cut(**TP2_PP2), 2, VPP2),
    "DP2 overlapped -> PP2, tied": (2, setup_of("bf16", overlap=True, kind="tied"), 2, PP2),
    "CP2 -> one rank": (2, setup_of("bf16").cut(cp=2), 1, WHOLE),
    "EP2 -> one rank": (2, setup_of(kind="moe").cut(**EP2), 1, WHOLE),
    "PP2 -> EP2": (2, setup_of("bf16", kind="moe").cut(**PP2), 2, EP2),
}


@combinations(name=list(OTHER_LAYOUTS), quick={"name": ["PP2 -> EP2"]}, strength=1)
def test_a_run_of_several_ranks_goes_on_in_another_layout(ranks, tmp_path, name):
    world_size, setup, new_world_size, sizes = OTHER_LAYOUTS[name]
    never_stopped = ranks.run(checkpointed_run.save_and_go_on, setup, tmp_path, world_size=world_size)
    resumed = ranks.run(checkpointed_run.resume_and_go_on, setup.cut(**sizes), tmp_path, world_size=new_world_size)
    assert_alike(resumed, never_stopped, 1e-6)


def test_a_background_save_holds_the_moment_of_the_save(ranks, tmp_path):
    ends = ranks.run(save_and_resume, setup_of("bf16").cut(**TP2), tmp_path, async_save=True, world_size=2)
    assert_alike([resumed for _, resumed in ends], [never_stopped for never_stopped, _ in ends])
