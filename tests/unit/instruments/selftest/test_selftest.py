# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""``selfdistill doctor --selftest`` passes on a sound launch, finds each fault, and names a rank that hangs."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forks import in_a_fork

from megatron_selfdistill.distributed.integers import max_over_ranks
from megatron_selfdistill.distributed.signs_of_life import entered
from megatron_selfdistill.distributed.watchdog import EXIT_HUNG
from megatron_selfdistill.instruments.selftest.proofs import WorstError

REPOSITORY = Path(__file__).resolve().parents[4]
PATIENT_S = 1200.0
"""However busy the machine is."""
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
            FAULTS[fault](patch)
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


FAULTS = {
    fault.__name__: fault
    for fault in (
        a_sum_that_counts_a_rank_twice,
        a_loss_whose_gradient_is_off_by_a_thousandth,
        gradients_that_the_ranks_do_not_share,
    )
}


@pytest.mark.parametrize(
    ("fault", "proof", "world_size"),
    [
        pytest.param("a_sum_that_counts_a_rank_twice", MEET, 2, marks=pytest.mark.full),
        ("a_loss_whose_gradient_is_off_by_a_thousandth", LOSS, 1),
        ("gradients_that_the_ranks_do_not_share", STEP, 2),
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
        pytest.param(
            4, ["pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2"], marks=pytest.mark.full
        ),
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


@pytest.mark.full
def test_the_command_that_a_user_types():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "-m",
        "megatron_selfdistill",
        "doctor",
        "--selftest",
        "--brief",
        "parallel.pipeline_model_parallel_size=2",
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--minutes", "10"], env=environment, capture_output=True, text=True, timeout=PATIENT_S
    )
    assert done.returncode == 0 and done.stdout.count("\nok       ") == 3, done.stdout + done.stderr


def hang(limit_s: float) -> None:
    """Test a launch with a proof that holds, and one from which rank 1 never returns."""
    from megatron_selfdistill.instruments.selftest import node_test

    def sound(launch: Any, config: Any) -> WorstError:
        launch.grid(config.parallel)
        return WorstError(float(launch.rank), "a case")

    def deaf(launch: Any, config: Any) -> WorstError:
        grid = launch.grid(config.parallel)
        entered("the second half")
        if launch.rank == 1:
            time.sleep(1000)  # longer than the test waits
        max_over_ranks([grid.rank])
        return WorstError(0.0, "")

    node_test.PROOFS = {"sound": sound, "deaf": deaf}
    node_test.selftest(limit_s=limit_s)


@pytest.mark.timing
def test_a_rank_that_never_returns_is_named_and_all_processes_end(ranks):
    ended = ranks.run(in_a_fork, hang, 6.0, world_size=2, init_process_group=False)
    assert [status for status, _ in ended] == [EXIT_HUNG] * 2
    assert "ok       sound: 1 of the allowed error (a case)" in ended[0][1], "the worst is known to all"
    assert re.search("rank 1 on [^;]* gets nowhere in phase 'the second half'", "".join(output for _, output in ended))


def test_nan_is_the_worst_error_and_no_allowed_one():
    reports = [WorstError(0.5, "a"), WorstError(float("nan"), "b"), WorstError(2.0, "c")]
    assert WorstError.worst(reports).case == "b" and not WorstError.worst(reports).holds
    assert [report.holds for report in reports] == [True, False, False]
