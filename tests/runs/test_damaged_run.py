# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A run directory that is corrupt, or removed during the run: the run reports the damage and loses nothing silently."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import common_state
import pytest
import tiny_run
from damage import flip_bit
from tiers import combinations
from tiny_run import bytes_of, overrides, reproducible_metrics, saved_step, start_and_listen, train


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"iter_{step:07d}"


def started(ranks, arguments: list[str]) -> tuple[int, str]:
    (outcome,) = ranks.run(start_and_listen, arguments, world_size=1, init_process_group=False)
    return outcome


def cut_metadata(path: Path) -> str:
    (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:-9])
    return f"{path.name} has "


def flip(path: Path) -> str:
    file = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    flip_bit(file)
    return f"{path.name} has a corrupt {file.name}"


def flip_arguments(path: Path) -> str:
    return f"{path.name} has a corrupt {common_state.flip_bit_in(path)}"


def lose_manifest(path: Path) -> str:
    (path / "manifest.json").unlink()
    return f"{path.name} has no manifest.json"


def lose(path: Path) -> str:
    shutil.rmtree(path)
    return ""


@combinations(
    damages={"cut": (cut_metadata, flip), "lost manifest": (lose_manifest, lose), "lost": (lose, lose)},
    quick={"damages": ["cut"]},
    strength=1,
)
def test_where_no_checkpoint_can_be_used_nothing_starts_and_nothing_is_overwritten(
    ranks, data, run, damages: tuple[Callable[[Path], str], ...]
):
    reasons = [damage(checkpoint(run, step)) for damage, step in zip(damages, (6, 3), strict=True)]
    before = bytes_of(run)
    status, output = started(ranks, overrides(data, run))
    assert status == 2 and "Traceback" not in output
    (message,) = [line for line in output.splitlines() if f"none of the checkpoints in {run}/checkpoints" in line]
    assert all(reason in message for reason in reasons)
    assert damages != (lose, lose) or "iter_0000006 does not exist" in message  # the tracker file names it
    assert bytes_of(run) == before


@pytest.mark.parametrize("damage", [flip, pytest.param(flip_arguments, marks=pytest.mark.full)])
def test_with_one_good_checkpoint_the_run_goes_back_to_it_and_reports_each_damage_once(ranks, data, run, damage):
    """Besides, the tracker file is no text, and then the newest checkpoint counts; logs and settings have odd bytes."""
    before = reproducible_metrics(run)
    (run / "checkpoints" / tiny_run.TRACKER).write_bytes(b"\xff\xfe6")
    with (run / "config.yaml").open("ab") as file:
        file.write(b"# \xff\n")
    for name in ("metrics.jsonl", "events.jsonl"):
        lines = (run / name).read_bytes().splitlines(keepends=True)
        (run / name).write_bytes(b"".join([lines[0], b"\xff\n[1, 2]\n", *lines[1:]]))
    reason = damage(checkpoint(run, 6))
    status, output = started(ranks, overrides(data, run))
    assert status == 0 and saved_step(run) == 6 and "Traceback" not in output
    (line,) = [line for line in output.splitlines() if "iter_0000006" in line]
    assert line.startswith(reason) and line.endswith("continues from iter_0000003, 3 steps earlier")
    assert f"{run}/metrics.jsonl: 2 lines were skipped, the first: line 2" in output
    assert reproducible_metrics(run) == before


def removed_in_step_5(arguments: list[str], run: Path) -> tuple[int, str]:
    """Start a run and delete its directory during the 5th step; return the exit status and the output."""
    from megatron_selfdistill.trainer import Trainer

    update = Trainer.update

    def update_and_lose(self, step):
        if self.step == 4 and self.grid.rank == 0:
            while run.exists():  # a writer in the background may make files while others are removed
                shutil.rmtree(run, ignore_errors=True)
        return update(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", update_and_lose)
        return start_and_listen(arguments)


BACKGROUND = ("checkpoint.async_save=true", "checkpoint.save_every=2")


@combinations(case={"one rank": (1, ()), "DP2": (2, ()), "background": (2, BACKGROUND)}, quick={"case": ["one rank"]})
def test_a_run_directory_that_is_deleted_is_written_again_and_resumes(ranks, data, finished, tmp_path, case):
    run, (world_size, options) = tmp_path / "run", case
    arguments = overrides(data, run, *options)
    outcomes = ranks.run(removed_in_step_5, arguments, run, world_size=world_size, init_process_group=False)
    assert [status for status, _ in outcomes] == [0] * world_size, outcomes
    if not options:
        output = outcomes[0][1]
        for name in (run, run / "teacher"):
            assert len([line for line in output.splitlines() if line.startswith(f"{name} ")]) == 1, output
        config = (finished / "config.yaml").read_text().replace(str(finished), str(run))
        assert (run / "config.yaml").read_text() == config
        assert [line["step"] for line in reproducible_metrics(run)] == [5, 6] and saved_step(run) == 6
    if world_size == 1:
        assert reproducible_metrics(run) == reproducible_metrics(finished)[-2:]
    train(ranks, [*arguments, "num_steps=7"])
    assert saved_step(run) == 7
