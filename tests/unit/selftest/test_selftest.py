# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""``selfdistill doctor --selftest`` passes on a sound node, finds each fault by its check, and always ends."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ports import free_port
from tiers import combinations

from megatron_selfdistill.commands import doctor
from megatron_selfdistill.selftest.outcome import Figure, Outcome, largest, lines, over_ranks

REPOSITORY = Path(__file__).resolve().parents[3]
CHECKS = [
    "identity law",
    "vocabulary-parallel loss against float64",
    "Transformer Engine's layers against local ones",
    "both pair orders",
    "save and resume",
    "weight sync to the sampler",
]

PATIENT = ["--minutes", "20"]
"""However busy the machine is."""
SOUND = dict.fromkeys(CHECKS, "ok") | {CHECKS[2]: "not done"}
"""On a CPU."""


def verdicts(table: str) -> dict[str, str]:
    """Return the verdicts from the lines that begin with the name of a check."""
    rows = [(name, line) for line in table.splitlines() for name in CHECKS if line.startswith(f"{name}  ")]
    return {name: line.split("  ")[-1].strip() for name, line in rows}


def self_tested(fault: str, faulty_rank: int | None = None, only: Sequence[str] = CHECKS) -> tuple[int, str]:
    """Exit status and output of one rank, in this process, with a fault on all ranks or one; ``only`` some checks."""
    from megatron_selfdistill.selftest import node_test

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(node_test, "CHECKS", {name: node_test.CHECKS[name] for name in only})
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
    from megatron_selfdistill.loss.sharded import backend

    write = backend._TORCH.write_gradient

    def write_more(*args: Any) -> None:
        write(*args)
        args[-1].mul_(1.001)

    patch.setattr(backend, "_TORCH", replace(backend._TORCH, write_gradient=write_more))


def an_engine_with_another_epsilon(patch: pytest.MonkeyPatch) -> None:
    an_engine_that_is_the_local_layers(patch, epsilon=3e-3)


def an_engine_that_is_the_local_layers(patch: pytest.MonkeyPatch, epsilon: float | None = None) -> None:
    from megatron_selfdistill.model import build
    from megatron_selfdistill.selftest import layer_kinds

    spec = build.layer_spec

    def local(config: Any, vp_stage: int | None = None, *, transformer_engine: bool | None = None) -> Any:
        if transformer_engine and epsilon is not None:
            config.layernorm_epsilon = epsilon
        return spec(config, vp_stage, transformer_engine=False)

    patch.setattr(layer_kinds, "why_not", lambda: "")
    patch.setattr(build, "layer_spec", local)


def pairs_in_another_sequence(patch: pytest.MonkeyPatch) -> None:
    from megatron_selfdistill.pipeline import schedule

    order = schedule._order

    def other_order(batch: Any, pair_order: str, with_teacher: bool) -> list[tuple[str, int]]:
        right = order(batch, pair_order, with_teacher)
        if pair_order == "alternating" and with_teacher:
            return [item for i in range(len(right) - 2, -1, -2) for item in right[i : i + 2]]
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
    from megatron_selfdistill.selftest import training

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


@combinations(check=CHECKS, quick={"check": ["save and resume"]}, strength=1)
def test_a_fault_fails_the_check_that_is_made_for_it_and_no_other(ranks, check):
    [(status, table)] = ranks.run(self_tested, CAUGHT[check].__name__, world_size=1, init_process_group=False)
    assert verdicts(table) == SOUND | {check: "FAILURE"}, table
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


def left_after_the_others_were_done() -> tuple[float, float, bool]:
    """Return when this rank's check returned and when its groups ended; rank 1's check takes longer."""
    from megatron_selfdistill.selftest import meeting as module

    rank, times = int(os.environ["RANK"]), []

    def check() -> Outcome:
        time.sleep(0.5 * rank)
        times.append(time.monotonic())
        return Outcome((Figure("a figure", float(rank), 0.5),))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_POLL_S", 0.02 + 0.5 * rank)  # rank 1 reads what it needs when rank 0 is long done
        with module.Meeting(rank, 2, broken_off=lambda outcome: None) as meeting:
            outcome = meeting.hold("slow", check, leave=lambda: times.append(time.monotonic()))
    return times[0], times[1], outcome.passed


def test_no_rank_ends_its_groups_while_another_still_computes_and_all_have_the_worst_figure(ranks):
    outcomes = ranks.run(left_after_the_others_were_done, world_size=2, init_process_group=False)
    last_done = max(done for done, _, _ in outcomes)
    assert all(left >= last_done for _, left, _ in outcomes)
    assert not any(passed for *_, passed in outcomes), "rank 1's figure is out of its bound on both"


HANGING = """
import sys, time
from megatron_selfdistill.selftest.meeting import Meeting
from megatron_selfdistill.commands import doctor
from megatron_selfdistill.selftest.outcome import Figure, Outcome

rank, limit_s, share, what = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), sys.argv[4]

def check():
    if rank == 1 and what == "raises":
        raise OSError("no space left")
    if rank == 1 or what == "raises":
        time.sleep(1000)  # longer than the test waits
    return Outcome((Figure("a figure", 0.0, 1.0),))

def broken_off(outcome):
    print(outcome.name, "|", outcome.error)

with Meeting(rank, 2, broken_off, limit_s=limit_s, grace_s=1.0) as meeting:
    print(meeting.hold("sound", lambda: Outcome((Figure("a figure", 0.0, 1.0),)), leave=lambda: None).passed)
    meeting.hold("deaf", check, leave=lambda: None, share=share)
"""


@pytest.mark.parametrize(
    ("what", "limit_s", "share", "message"),
    [
        ("hangs", 4000.0, 0.001, r"deaf \| rank 1 did not return from this check within 4 s \(--minutes .*\)"),
        ("raises", 500.0, 0.5, r"deaf \| rank 1: OSError: no space left; then rank 0 did not return within 1 s"),
    ],
)
def test_ranks_that_never_return_are_named_and_all_processes_end(what, limit_s, share, message):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = os.environ | address | {"PYTHONPATH": str(REPOSITORY)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HANGING, str(rank), str(limit_s), str(share), what],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1]
    assert re.fullmatch(f"True\n{message}\n", said[0]) and said[1] == "True\n", said


HASTY = """
import sys, time
sys.argv = ["doctor.py"]
from megatron_selfdistill.selftest import node_test as run
run.warm_up = lambda node, phase: None
from megatron_selfdistill.commands import doctor
from megatron_selfdistill.selftest.outcome import Figure, Outcome

NAMES = list(run.CHECKS)
sound = lambda node: Outcome((Figure("a figure", 0.0, 1.0),))
run.CHECKS = dict.fromkeys(NAMES, sound)
run.CHECKS[NAMES[0]] = lambda node: time.sleep(5.0) or sound(node)
run.CHECKS[NAMES[HANGING]] = lambda node: time.sleep(1000)
run.write_texts = lambda folder: time.sleep(1000 * SLOW)
run.selftest("megatron", limit_s=LIMIT)
"""


@pytest.mark.parametrize(
    ("hanging", "limit_s", "slow", "first"),
    [
        pytest.param(  # half of what is left
            2, 20.0, False, "did not return from this check within [0-7] s", marks=pytest.mark.full
        ),
        pytest.param(  # all that is left
            5, 20.0, False, "did not return from this check within ([0-9]|1[0-5]) s", marks=pytest.mark.full
        ),
        (5, 2.0, True, "not reached: rank 0 did not come to it within the self-test's 2 s"),
    ],
)
def test_one_clock_ends_all_checks_and_the_table_says_what_was_not_reached(hanging, limit_s, slow, first):
    code = HASTY.replace("HANGING", str(hanging)).replace("LIMIT", str(limit_s)).replace("SLOW", str(slow))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    reached = [] if slow else CHECKS[:hanging]
    assert verdicts(done.stdout) == dict.fromkeys(CHECKS, "FAILURE") | dict.fromkeys(reached, "ok"), done.stdout
    assert re.search(first, done.stdout), done.stdout
    assert done.stdout.count("-> not reached") == len(CHECKS) - len(reached) - (not slow)
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"{len(CHECKS) - len(reached)} of 6 checks failed in "), last


def test_by_default_a_warm_node_has_less_than_three_minutes_and_a_cold_one_less_than_six():
    from megatron_selfdistill.selftest.meeting import LIMIT_S

    assert 60 * doctor.MINUTES + doctor.MARGIN_S < 180 and LIMIT_S < 180
    assert 2 * 60 * doctor.MINUTES + doctor.MARGIN_S < 360


WARMING = """
import sys, time
from megatron_selfdistill.selftest import meeting as module
from megatron_selfdistill.commands import doctor
from megatron_selfdistill.selftest.outcome import Figure, Outcome

rank, what, jumped = int(sys.argv[1]), sys.argv[2], [0.0]

class Clock:
    def __getattr__(self, name):
        return getattr(time, name)
    def monotonic(self):
        return time.monotonic() + jumped[0]

module.time = Clock()

def work(phase):
    phase("the first collective")
    phase("compiling")
    if what == "hangs":  # in real time: rank 0 must not be at its limit before rank 1 has said what it is at
        return time.sleep(1000 * rank)
    jumped[0] += 1000.0
    if rank == 1 and what == "raises":
        raise OSError("no compiler")

def sound():
    return Outcome((Figure("a figure", 0.0, 1.0),))

def broken_off(outcome):
    print(outcome.name, "|", outcome.error)

with module.Meeting(rank, 2, broken_off, limit_s=400.0, grace_s=500.0) as meeting:
    meeting.hold("together", sound, leave=lambda: None)
    warm = meeting.warm_up(work, leave=lambda: None, limit_s=5.0 if what == "hangs" else 2000.0)
    print(warm.name, warm.error)
    print(meeting.hold("first", sound, leave=lambda: None, share=0.5).passed, meeting._share_s > 100.0)
"""


def warmed(what: str) -> list[subprocess.CompletedProcess]:
    """Run two ranks whose checks have 400 seconds together, half for the first check, after a warm-up of 1000."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = os.environ | address | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", WARMING]
    processes = [
        subprocess.Popen([*command, str(rank), what], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        return [subprocess.CompletedProcess([], p.wait(), p.communicate(timeout=300)[0]) for p in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.full
def test_a_slow_warm_up_takes_nothing_of_the_first_checks_share():
    for done in warmed("slow"):
        assert (done.returncode, done.stdout) == (0, "warm-up \nTrue True\n"), done.stdout


@pytest.mark.full
def test_a_warm_up_that_raises_is_said_and_the_checks_follow():
    for done in warmed("raises"):
        assert (done.returncode, done.stdout) == (0, "warm-up rank 1: OSError: no compiler\nTrue True\n"), done.stdout


def test_a_rank_that_hangs_in_the_warm_up_is_named_with_what_it_was_at():
    first, second = warmed("hangs")
    assert first.returncode == second.returncode == 1
    message = "rank 1 did not return from the warm-up within 5 s (--minutes gives them more); rank 1 is at compiling"
    assert first.stdout == f"warm-up | {message}\n", first.stdout


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

    from megatron_selfdistill.selftest import node_test, warming
    from megatron_selfdistill.selftest.meeting import Meeting

    phases: list[str] = []
    losses: list[Any] = []
    with tempfile.TemporaryDirectory() as folder, Meeting(0, 1, broken_off=print) as meeting:
        node_test.write_texts(Path(folder))
        node = node_test.LaunchUnderTest(0, 1, Path(folder), "megatron", meeting.open_group, 100.0)
        with pytest.MonkeyPatch.context() as patch:
            errors = warming.errors
            patch.setattr(warming, "errors", lambda *arguments: losses.append(errors(*arguments)))
            meeting.hold("", lambda: warming.warm_up(node, phases.append) or Outcome(not_done="warm"), node_test._leave)
    return phases, len(losses)


def deterministic_as_on_a_gpu() -> tuple[bool, str, bool, bool]:
    import torch

    from megatron_selfdistill.selftest import resume

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume.cpu, "ON_CPU", False)
        patch.delenv(resume._TE_SWITCH, raising=False)
        with resume.deterministic():
            within = torch.are_deterministic_algorithms_enabled(), os.environ[resume._TE_SWITCH]
        return *within, torch.are_deterministic_algorithms_enabled(), resume._TE_SWITCH in os.environ


def test_on_a_gpu_kernels_repeat_their_bits_for_the_time_of_a_comparison(ranks):
    assert ranks.run(deterministic_as_on_a_gpu, world_size=1) == [(True, "0", False, False)]


def test_a_cache_that_others_could_write_to_is_not_used(tmp_path, monkeypatch):
    from megatron_selfdistill.selftest import launch_environment

    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr(launch_environment.tempfile, "gettempdir", lambda: str(tmp_path))
    for name in names:
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / f"selfdistill_cache_{os.getuid()}"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    launch_environment.share_caches()
    assert not any(name in os.environ for name in names)
    folder.chmod(0o700)
    monkeypatch.setenv(names[0], "/mine")
    launch_environment.share_caches()
    assert os.environ[names[0]] == "/mine" and os.environ.pop(names[1]) == str(folder / "inductor")


def test_a_self_test_whose_ranks_never_meet_ends_as_well(tmp_path):
    """In the middle of its imports, say."""
    code = (
        "import time; from megatron_selfdistill.commands import doctor; doctor.MARGIN_S = 0.0; "
        "doctor.examine = lambda *_, **__: time.sleep(1000); doctor.main()"
    )
    command = [sys.executable, "-c", code, "--selftest", "--minutes", "0.02"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "the self-test did not end within 2 s" in done.stdout, done.stdout + done.stderr


def test_a_node_that_cannot_run_is_not_tested(monkeypatch, capsys):
    failure = doctor.Finding("torch", "not installed", doctor.FAILURE, "fix")
    monkeypatch.setattr(doctor, "examine", lambda ranks, **options: [failure])
    monkeypatch.setitem(sys.modules, "megatron_selfdistill.selftest.node_test", None)  # its import would be an error
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


# -- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figure", "passes"),
    [
        (Figure("", 1.0, 1.0), True),
        (Figure("", 1.1, 1.0), False),
        (Figure("", math.nan, 1.0), False),
        (Figure("", None, 1.0), False),
        (Figure("", 1.0, 1.0, at_least=True), True),
        (Figure("", 0.9, 1.0, at_least=True), False),
        (Figure("", math.nan, 1.0, at_least=True), False),
    ],
)
def test_a_figure_passes_within_its_bound_only_and_never_unmeasured(figure, passes):
    assert figure.passed is passes
    assert Outcome((figure,)).passed is passes


def test_over_ranks_the_worst_figure_counts_and_nan_is_the_worst():
    def outcome(upper: float | None, lower: float | None, seconds: float = 0.0) -> Outcome:
        return Outcome((Figure("up", upper, 1.0), Figure("low", lower, 1.0, at_least=True)), seconds=seconds)

    joined = over_ranks([outcome(0.1, 3.0), outcome(None, 2.0, 7.0), outcome(0.4, None)])
    assert [figure.value for figure in joined.figures] == [0.4, 2.0] and joined.seconds == 7.0
    joined = over_ranks([outcome(0.1, 3.0), outcome(math.nan, math.nan)])
    assert not any(figure.passed for figure in joined.figures)
    assert over_ranks([outcome(None, None)] * 2).figures[0].value is None
    assert math.isnan(largest("", {"a": 2.0, "b": math.nan, "c": 3.0}, 1.0).value)


def test_ranks_that_disagree_about_what_can_be_done_have_failed():
    joined = over_ranks([Outcome((Figure("a", 0.0, 1.0),)), Outcome(not_done="no Transformer Engine here")])
    assert not joined.passed and "rank 1: no Transformer Engine here" in joined.error


def test_a_check_without_figures_has_not_passed():
    assert not Outcome().passed
    assert Outcome(not_done="no GPU").passed and Outcome(not_done="no GPU").verdict == "not done"


def test_a_figure_out_of_bounds_says_in_which_case():
    (_, row) = lines(Outcome((largest("loss", {"reverse KL": 1e-9, "forward KL": 0.3}, 1e-5),)))
    assert row.endswith("FAILURE (forward KL)")
