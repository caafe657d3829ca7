# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""``selfdistill doctor --selftest`` passes on a sound node, finds each fault by its check, and always ends."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from selftest_table import CHECKS, verdicts

from megatron_selfdistill.instruments.doctor import doctor_command as doctor
from megatron_selfdistill.instruments.doctor.findings import examine
from megatron_selfdistill.instruments.selftest.outcome import Outcome

REPOSITORY = Path(__file__).resolve().parents[4]
PATIENT = ["--minutes", "20"]
"""However busy the machine is."""
SOUND = dict.fromkeys(CHECKS, "ok") | {CHECKS[2]: "not done"}
"""On a CPU."""


def self_tested(
    fault: str, faulty_rank: int | None = None, only: Sequence[str] = CHECKS, *, warm_up: bool = True
) -> tuple[int, str]:
    """Return the exit status and the output of this rank, with a fault on all ranks or on one.

    ``only``: the checks that run.  Without ``warm_up`` they begin at once: it does all that they do, so it finds faults
    of its own, but no check depends on it.
    """
    from megatron_selfdistill.instruments.selftest import node_test

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(doctor, "examine", lambda ranks, **options: examine(ranks, imports=False))
        patch.setattr(node_test, "CHECKS", {name: node_test.CHECKS[name] for name in only})
        if not warm_up:
            patch.setattr(node_test, "warm_up", lambda launch, phase: None)
        if faulty_rank in (None, int(os.environ["RANK"])):
            FAULTS[fault](patch)
        status = doctor.main(["--selftest", "--sampler", "megatron", *PATIENT])
    return status, printed.getvalue()


# -- one fault for each check, in the product's own code ------------------------------------------------------------


def no_teacher_taken_for_unset(patch: pytest.MonkeyPatch) -> None:
    from megatron_selfdistill.loss.target import Target

    right = Target.mix_weights.fget
    patch.setattr(Target, "mix_weights", property(lambda self: right(self) if self.teacher_weight else (0.75, 1.0)))


def gradient_off_by_a_thousandth(patch: pytest.MonkeyPatch) -> None:
    from megatron_selfdistill.loss.sharded import vocab_parallel

    write = vocab_parallel._TORCH.write_gradient

    def write_more(*args: Any) -> None:
        write(*args)
        args[5].mul_(1.001)  # out

    patch.setattr(vocab_parallel, "_TORCH", replace(vocab_parallel._TORCH, write_gradient=write_more))


def an_engine_with_another_epsilon(patch: pytest.MonkeyPatch) -> None:
    an_engine_that_is_the_local_layers(patch, epsilon=3e-3)


def an_engine_that_is_the_local_layers(patch: pytest.MonkeyPatch, epsilon: float | None = None) -> None:
    from megatron_selfdistill.instruments.selftest import training
    from megatron_selfdistill.model import build

    spec = build.layer_spec

    def local(config: Any, vp_stage: int | None = None, *, transformer_engine: bool | None = None) -> Any:
        if transformer_engine and epsilon is not None:
            config.layernorm_epsilon = epsilon
        return spec(config, vp_stage, transformer_engine=False)

    patch.setattr(training, "why_not", lambda: "")
    patch.setattr(build, "layer_spec", local)


def pairs_in_another_sequence(patch: pytest.MonkeyPatch) -> None:
    from megatron_selfdistill.pipeline import schedule

    order = schedule._order

    def other_order(batch: Any, pair_order: str, with_teacher: bool, **options: bool) -> list[tuple[str, int]]:
        right = order(batch, pair_order, with_teacher=with_teacher, **options)
        if pair_order == "alternating" and with_teacher:
            size = 3 if options["with_reference"] else 2
            return [item for i in range(len(right) - size, -1, -size) for item in right[i : i + size]]
        return right

    patch.setattr(schedule, "_order", other_order)


def a_place_in_the_data_that_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    from megatron_selfdistill.sources.source import CommittedState

    patch.setattr(CommittedState, "load_state_dict", lambda self, state: None)


def a_sampler_at_another_temperature(patch: pytest.MonkeyPatch) -> None:
    from megatron_selfdistill.rollout.megatron import megatron_sampler

    select = megatron_sampler.select_tokens
    patch.setattr(megatron_sampler, "select_tokens", lambda logits, *rest: select(logits * 0.99, *rest))


def a_rank_that_raises(patch: pytest.MonkeyPatch) -> None:
    from megatron_selfdistill.instruments.selftest import training

    def broken(*args: Any, **options: Any) -> None:
        raise ValueError("this GPU fell off\nthe bus")

    patch.setattr(training, "step_metrics", broken)


CAUGHT = dict(
    zip(
        CHECKS,
        (
            no_teacher_taken_for_unset,
            gradient_off_by_a_thousandth,
            an_engine_with_another_epsilon,
            pairs_in_another_sequence,
            a_place_in_the_data_that_is_forgotten,
            a_sampler_at_another_temperature,
        ),
        strict=True,
    )
)
FAULTS = {fault.__name__: fault for fault in (*CAUGHT.values(), an_engine_that_is_the_local_layers, a_rank_that_raises)}


RESUMING = "save and resume"
"""This check trains two runs, which takes longer than all other checks together."""


def test_a_fault_fails_its_check_and_no_other_of_the_quick_ones(ranks):
    assert_caught(ranks, "weight sync to the sampler", [name for name in CHECKS if name != RESUMING])


@pytest.mark.full
@pytest.mark.parametrize("check", CHECKS)
def test_a_fault_fails_the_check_that_is_made_for_it_and_no_other(ranks, check):
    assert_caught(ranks, check, CHECKS)


def assert_caught(ranks: Any, check: str, only: Sequence[str]) -> None:
    """Assert that of the checks ``only`` a self-test with the fault for ``check`` fails this check."""
    options = {"warm_up": False, "world_size": 1, "init_process_group": False}
    [(status, table)] = ranks.run(self_tested, CAUGHT[check].__name__, None, only, **options)
    assert verdicts(table) == {name: SOUND[name] for name in only} | {check: "FAILURE"}, table
    assert status == 1
    assert table.rstrip().splitlines()[-1].endswith(f" s: {check}")


@pytest.mark.full
def test_two_kinds_of_layers_that_are_one_function_pass(ranks):
    """The comparison itself, which without a GPU has nothing to compare: carried over by name, in bf16."""
    fault, only = an_engine_that_is_the_local_layers.__name__, CHECKS[2:3]
    status, table = ranks.run(self_tested, fault, None, only, world_size=2, init_process_group=False)[0]
    assert status == 0 and "1 of 1 checks" in table and "TP 2" in table, table


@pytest.mark.full
def test_what_one_rank_raises_fails_that_check_on_all_ranks_and_the_next_ones_go_on(ranks):
    fault, only = a_rank_that_raises.__name__, [CHECKS[0], CHECKS[3], CHECKS[1]]
    outcomes = ranks.run(self_tested, fault, 1, only, world_size=2, init_process_group=False)
    assert [status for status, _ in outcomes] == [1, 1]
    table = outcomes[0][1]
    assert verdicts(table) == dict(zip(only, ("FAILURE", "FAILURE", "ok"), strict=True)), table
    assert table.count("-> rank 1: ValueError: this GPU fell off the bus; afterwards 1 other failed") == 3, (
        "in the warm-up, too"
    )
    assert "self-test" not in outcomes[1][1], "only rank 0 speaks"


@pytest.mark.full
def test_two_ranks_of_torchrun_pass():
    """The command that a user types."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "megatron_selfdistill", "doctor", "--selftest"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--sampler", "megatron", *PATIENT], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stdout + done.stderr, "nothing breaks up the table"
    assert verdicts(done.stdout) == SOUND, done.stdout
    assert "device: cpu" in done.stdout and "self-test: 2 ranks" in done.stdout, "the report comes first, once"
    assert done.stdout.count("this node passes, 5 of 6 checks") == 1


def test_the_warm_up_says_what_it_begins_and_runs_the_loss_of_every_kind(ranks):
    phases, backends = ranks.run(warm_alone, world_size=1, init_process_group=False)[0]
    assert [phase.split(" (")[0] for phase in phases] == [
        "the first collective",
        "the first training step",
        "the first loss",
    ]
    assert backends == 18, "two dtypes, three targets, three divergences"


def warm_alone() -> tuple[list[str], int]:
    import tempfile

    from megatron_selfdistill.instruments.selftest import node_test, sharded_loss, training
    from megatron_selfdistill.instruments.selftest.meeting import Meeting

    phases: list[str] = []
    losses: list[Any] = []
    with tempfile.TemporaryDirectory() as directory, Meeting(0, 1, broken_off=print) as meeting:
        node_test.write_texts(Path(directory))
        node = node_test.LaunchUnderTest(0, 1, Path(directory), "megatron", meeting.open_group, 100.0)
        with pytest.MonkeyPatch.context() as patch:
            errors = sharded_loss.errors
            patch.setattr(sharded_loss, "errors", lambda *arguments: losses.append(errors(*arguments)))
            meeting.hold(
                "", lambda: training.warm_up(node, phases.append) or Outcome(not_done="warm"), node_test._leave
            )
    return phases, len(losses)


def deterministic_as_on_a_gpu() -> tuple[bool, str, bool, bool]:
    import torch

    from megatron_selfdistill.instruments.selftest import training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.cpu, "ON_CPU", False)
        patch.delenv(training._TE_SWITCH, raising=False)
        with training.deterministic():
            within = torch.are_deterministic_algorithms_enabled(), os.environ[training._TE_SWITCH]
        return *within, torch.are_deterministic_algorithms_enabled(), training._TE_SWITCH in os.environ


def test_on_a_gpu_kernels_repeat_their_bits_for_the_time_of_a_comparison(ranks):
    assert ranks.run(deterministic_as_on_a_gpu, world_size=1) == [(True, "0", False, False)]


def test_a_cache_that_others_could_write_to_is_not_used(tmp_path, monkeypatch):
    from megatron_selfdistill.instruments.selftest import launch_environment

    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr(launch_environment.tempfile, "gettempdir", lambda: str(tmp_path))
    for name in names:
        monkeypatch.delenv(name, raising=False)
    directory = tmp_path / f"selfdistill_cache_{os.getuid()}"
    directory.mkdir(mode=0o777)
    directory.chmod(0o777)
    launch_environment.share_caches()
    assert not any(name in os.environ for name in names)
    directory.chmod(0o700)
    monkeypatch.setenv(names[0], "/mine")
    launch_environment.share_caches()
    assert os.environ[names[0]] == "/mine" and os.environ.pop(names[1]) == str(directory / "inductor")


def test_a_node_that_cannot_run_is_not_tested(monkeypatch, capsys):
    failure = doctor.Finding("torch", "not installed", doctor.FAILURE, "fix")
    monkeypatch.setattr(doctor, "examine", lambda ranks, **options: [failure])
    monkeypatch.setitem(
        sys.modules, "megatron_selfdistill.instruments.selftest.node_test", None
    )  # its import would be an error
    assert doctor.main(["--selftest"]) == 1
    assert "a run cannot start here: torch" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "3")
    assert doctor.main(["--selftest"]) == 1
    assert capsys.readouterr().out.startswith("rank 3:")


@pytest.mark.parametrize("option", [["--sampler", "vllm"], ["--minutes", "3"]])
def test_what_is_about_the_selftest_is_refused_without_one(capsys, option):
    with pytest.raises(SystemExit, match="2"):
        doctor.main(option)
    assert f"{option[0]} needs --selftest" in capsys.readouterr().err
