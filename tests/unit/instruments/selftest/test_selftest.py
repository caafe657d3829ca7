# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""``selfdistill doctor --selftest`` passes on a sound launch, finds each fault, and names a rank that hangs."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from typing import Any

import pytest

from megatron_selfdistill.distributed import watchdog
from megatron_selfdistill.distributed.signs_of_life import _signs
from megatron_selfdistill.instruments.selftest.proofs import WorstError

PATIENT_S = 1200.0  # however busy the machine is
MEET, LOSS, STEP = (
    "all ranks meet",
    "the vocabulary-sharded loss equals the unsharded one",
    "a training step in the layout equals the step of one rank",
)


def self_tested(fault: str = "", only: str = "", *overrides: str) -> tuple[list[str], str]:
    """Return the proofs that fail, and the output of this rank, with a fault on all ranks; ``only``: one proof."""
    from megatron_selfdistill.instruments.selftest import node_test

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        if only:
            patch.setattr(node_test, "PROOFS", {only: node_test.PROOFS[only]})
        if fault:
            globals()[fault](patch)
        reports = node_test.selftest(overrides, limit_s=PATIENT_S)
    return [name for name, report in reports.items() if not report.holds], printed.getvalue()


def a_sum_that_counts_a_rank_twice(patch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    reduce = dist.all_reduce

    def reduce_twice(tensor: Any, *arguments: Any, **options: Any) -> Any:
        tensor += dist.get_rank()
        return reduce(tensor, *arguments, **options)

    patch.setattr(dist, "all_reduce", reduce_twice)


def a_loss_whose_gradient_is_off_by_a_thousandth(patch: pytest.MonkeyPatch) -> None:
    from megatron_selfdistill.loss.sharded import vocab_parallel

    write = vocab_parallel._TORCH.write_gradient

    def write_more(*arguments: Any) -> None:
        write(*arguments)
        arguments[5].mul_(1.001)  # out

    patch.setattr(vocab_parallel, "_TORCH", replace(vocab_parallel._TORCH, write_gradient=write_more))


def gradients_that_the_ranks_do_not_share(patch: pytest.MonkeyPatch) -> None:
    from megatron_selfdistill.model import build

    patch.setattr(build, "finalize_model_grads", lambda *arguments, **options: None)


@pytest.mark.parametrize(
    ("fault", "proof", "world_size"),
    [
        pytest.param("a_sum_that_counts_a_rank_twice", MEET, 2, marks=pytest.mark.full),
        ("a_loss_whose_gradient_is_off_by_a_thousandth", LOSS, 1),
        pytest.param("gradients_that_the_ranks_do_not_share", STEP, 2, marks=pytest.mark.full),
    ],
)
def test_a_fault_fails_the_proof_that_is_made_for_it(ranks, fault, proof, world_size):
    for failed, _ in ranks.run(self_tested, fault, proof, world_size=world_size, init_process_group=False):
        assert failed == [proof]


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, ["context_parallel_size=2"]),
        pytest.param(4, [], marks=pytest.mark.full),  # TP 2 x PP 2
        pytest.param(2, ["expert_model_parallel_size=2"], marks=pytest.mark.full),
    ],
)
def test_a_sound_launch_passes_in_every_layout_and_rank_0_prints_a_line_per_proof(ranks, world_size, layout):
    overrides = [f"parallel.{key}" for key in layout]
    found = ranks.run(self_tested, "", "", *overrides, world_size=world_size, init_process_group=False)
    assert [failed for failed, _ in found] == [[]] * world_size, found[0][1]
    lines = found[0][1].splitlines()
    assert lines[0] == f"self-test: {world_size} ranks, cpu, over gloo"
    assert [line.split(": ")[0] for line in lines[1:]] == [f"ok       {name}" for name in (MEET, LOSS, STEP)]
    assert not any(printed for _, printed in found[1:]), "only rank 0 speaks"


def watched_phases() -> list[Any]:
    """Return what the watchdog was started with, and the phase of each of two proofs."""
    from megatron_selfdistill.instruments.selftest import node_test

    seen: list[Any] = []

    def watched(rank: int, world_size: int, directory: Any, limit_s: float) -> Any:
        return contextlib.nullcontext(seen.append((rank, world_size, limit_s)))

    def proof(launch: Any, config: Any) -> WorstError:
        seen.append(_signs.phase)
        launch.grid(config.parallel)
        return WorstError(0.0, "")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watchdog, "watched", watched)
        patch.setattr(node_test, "PROOFS", {"first": proof, "second": proof})
        node_test.selftest(limit_s=7.0)
    return seen


def test_the_watchdog_watches_every_proof_under_its_name(ranks):
    """`tests/unit/distributed/test_watchdog.py` proves that it names a rank that hangs, and ends all processes."""
    found = ranks.run(watched_phases, world_size=2, init_process_group=False)
    assert found == [[(rank, 2, 7.0), "first", "second"] for rank in (0, 1)]


def test_nan_is_the_worst_error_and_no_allowed_one():
    reports = [WorstError(0.5, "a"), WorstError(float("nan"), "b"), WorstError(2.0, "c")]
    assert WorstError.worst(reports).case == "b" and not WorstError.worst(reports).holds
    assert [report.holds for report in reports] == [True, False, False]
