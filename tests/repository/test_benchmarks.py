# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The benchmarks run, and count what they say they count; no test states their times."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ranks import RankError, RankPool
from scripts import load_script
from tiers import combinations

from megatron_selfdistill.loss import Target, VocabShard

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "benchmarks"
TWO_RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run(tool: str, *arguments: str, launcher: Sequence[str] = ()) -> str:
    """Run a script as users run it, and return its standard output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, str(TOOLS / tool), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_on_this_rank(tool: str, arguments: list[str]) -> None:
    sys.argv = [tool, *arguments]
    sys.path.insert(0, str(TOOLS))
    runpy.run_path(str(TOOLS / tool), run_name="__main__")


def measure(ranks: RankPool, directory: Path, *arguments: str, world_size: int = 1) -> None:
    options = ["--repeats=1", f"--out={directory}/found", *arguments]
    ranks.run(run_on_this_rank, "loss_time.py", options, world_size=world_size, init_process_group=False)


def measurements(directory: Path) -> dict[str, list[dict]]:
    """Return the measurements of each contender in every size."""
    assert (directory / "found.md").read_text().count("collectives") > 0
    by_name: dict[str, list[dict]] = {}
    for size in json.loads((directory / "found.json").read_text())["sizes"]:
        for found in size["found"]:
            by_name.setdefault(found["name"], []).append(found)
    return by_name


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a script of tools/benchmarks/ as a module, which can import the scripts beside it."""
    monkeypatch.syspath_prepend(str(TOOLS))
    for name in ("loss_contenders", "loss_measurements", "step_parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return lambda name: load_script(TOOLS / f"{name}.py")


def case_of(contenders: ModuleType, tokens: int, vocab: int, dtype: torch.dtype, kind: str = "reverse_kl") -> Any:
    return contenders.Case(tokens, vocab, None, dtype, torch.device("cpu"), VocabShard(0, vocab, vocab), kind)


@pytest.mark.full
def test_the_loss_is_measured_at_every_size_with_its_error_and_a_plot(ranks, tmp_path):
    measure(ranks, tmp_path, "--tokens", "40", "80", "--vocab", "1000", "3000", f"--plot={tmp_path}/loss.png")
    found = measurements(tmp_path)
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert {len(sizes) for sizes in found.values()} == {3}
    for ours in (*found["torch"], *found["naive PyTorch"]):
        assert ours["loss_error"] < 1e-5 and ours["gradient_error"] < 1e-4 and ours["failure"] is None
    assert found["naive PyTorch"][0]["moved_u"] > 600 and found["naive PyTorch"][0]["peak_u"] > 10
    assert found["Megatron's fused cross entropy"][0]["collectives"] == 2


@pytest.mark.full
def test_the_fused_output_layer_is_measured_against_its_products(ranks, tmp_path):
    measure(ranks, tmp_path, "--tokens=768", "--vocab=8192", "--hidden=64", "--chunk=64", "--divergence=jsd")
    found = {name: sizes[0] for name, sizes in measurements(tmp_path).items()}
    assert found["fused, keep_gradient"]["peak_u"] < 0.8 * found["materialised"]["peak_u"]
    assert found["fused, low_memory"]["peak_u"] < 0.7 * found["fused, keep_gradient"]["peak_u"]
    passes = {"materialised": 13, "fused, keep_gradient": 13, "fused, low_memory": 15}
    for name, by_design in passes.items():
        assert found[name]["gradient_error"] < 1e-4
        assert found[name]["passes_by_design"] == by_design
        assert found[name]["passes_measured"] == by_design + 2, "in fp32 both rows are read for their maxima, too"
        assert found[name]["floor_u"] is None
    assert found["4 products alone"]["loss_error"] is None
    assert found["4 products alone"]["passes_by_design"] == found["4 products alone"]["passes_measured"] == 4


@pytest.mark.parametrize("options", [["--vocab=2000"], ["--vocab=2000", "--hidden=32", "--chunk=16"]])
@pytest.mark.full
def test_errors_are_told_also_where_the_vocabulary_is_over_two_ranks(ranks, tmp_path, options):
    """The gradient of hidden states is right only where it is summed over the ranks."""
    measure(ranks, tmp_path, "--tokens=40", "--divergence=forward_kl", *options, world_size=2)
    found = measurements(tmp_path)
    ours = {name: sizes[0] for name, sizes in found.items() if sizes[0]["loss_error"] is not None}
    assert len(ours) == (1 if "--hidden=32" not in options else 3)
    for one in ours.values():
        assert 0 < one["loss_error"] < 1e-5 and 0 < one["gradient_error"] < 1e-5
    sums = {"4 products alone": 1, "materialised": 4}  # of dgrad; and the loss's own three
    assert all(found[name][0]["collectives"] == sums[name] for name in found.keys() & sums)


PASSES = {"reverse_kl": 7, "forward_kl": 7, "jsd": 9}


@combinations(dtype={"bf16": torch.bfloat16, "fp32": torch.float32}, kind=PASSES.keys(), strength=1)
def test_passes_are_those_of_the_design_and_the_floor_follows_dtype_and_divergence(tools, dtype, kind):
    module, size, passes = tools("loss_measurements"), dtype.itemsize // 2, PASSES[kind]
    contenders = sys.modules["loss_contenders"]
    case = case_of(contenders, 256, 4096, dtype, kind)  # of 64 rows in a chunk
    entrants = contenders.contenders(argparse.Namespace(hidden=None, divergence=kind), case.device, 1)
    report = module.report_of(case, [one for one in entrants if one.name == "torch"], 1)
    (found,) = report.found
    assert found.failure is None and report.floor_u == passes * size
    assert (found.passes_by_design, found.floor_u) == (passes, passes * size)
    # In fp32 a chunk of rows is read for its maximum, and again, out of a cache, for the difference to it.
    assert found.passes_measured == passes + (2 if dtype is torch.float32 else 0)


def test_one_contender_at_a_time_holds_tensors(tools):
    module = tools("loss_measurements")
    contenders = sys.modules["loss_contenders"]
    case, alive = case_of(contenders, 8, 300, torch.float32), weakref.WeakSet()

    class Logits:
        """The record of one run."""

    def prepare(case: Any) -> Any:
        assert not alive, "those of an earlier run are still there"
        logits = Logits()
        alive.add(logits)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            return case.student.new_zeros(8) * bool(logits), case.student

        return run

    found = module.measure(case, [contenders.Contender(name, prepare) for name in "abc"], 2)
    assert [one.failure for one in found] == [None] * 3
    assert not alive


class FailsAt:
    """A contender that works so many times, and then does not."""

    def __init__(self, times: int, works: Callable[[Any], Any]) -> None:
        self.left, self.works = times, works

    def __call__(self, case: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise CompilationFailed("no such | instruction\nat line 7")
        return self.works(case)


class CompilationFailed(Exception):
    """An error like that of Triton, which is no RuntimeError."""


@pytest.mark.parametrize("times", [0, 1, 2, 3, 4], ids=["prepared", "timed", "peak", "operators", "errors"])
def test_a_contender_that_fails_leaves_the_others_rows(tools, capsys, times):
    module = tools("loss_time")
    contenders, measurements = sys.modules["loss_contenders"], sys.modules["loss_measurements"]
    case, works = case_of(contenders, 8, 300, torch.float32), contenders.ours(backend="torch")
    failing = contenders.Contender("naive PyTorch", FailsAt(times, works))
    report = measurements.report_of(case, [failing, contenders.Contender("torch", works, passes=7, floor=7)], 1)
    assert report.found[0].failure == "CompilationFailed: no such | instruction"
    assert report.found[1].failure is None and report.found[1].loss_error < 1e-5
    arguments = argparse.Namespace(hidden=None, dtype="float32", divergence="reverse_kl")
    heading, _, failed, row = module.table(report, arguments, 1).splitlines()[-4:]
    assert failed.startswith(r"| naive PyTorch | CompilationFailed: no such \| instruction | ")
    cells = [cell.strip() for cell in row.split("|")]
    column = [cell.strip() for cell in heading.split("|")].index("to naive PyTorch")
    assert cells[column] == "-" and "nan" not in row
    assert failed.replace(r"\|", "").count("|") == row.count("|") == heading.count("|")


def test_files_hold_the_sizes_before_one_that_ends_the_run(ranks, tmp_path):
    with pytest.raises(RankError, match="VocabShard needs"):
        measure(ranks, tmp_path, "--tokens=40", "--vocab", "1000", str(2**24))
    assert len(measurements(tmp_path)["torch"]) == 1


@pytest.mark.parametrize(
    ("launcher", "fused"),
    [([], "none"), (TWO_RANKS, "low_memory")],
    ids=["one rank", "TP2, low_memory"],
)
@pytest.mark.full
def test_a_step_is_measured_by_parts(tmp_path, launcher, fused):
    sizes = "--layers=1 --hidden=64 --head-size=32 --vocab=256 --problems=3 --response=16 --tokens=256 --repeats=1"
    options = [f"--tp={2 if launcher else 1}", f"--json={tmp_path}/found", f"--fused={fused}", "--chunk=8"]
    shown = run("step_time.py", *options, *sizes.split(), launcher=launcher)
    assert "| self-distillation, whole step |" in shown
    assert "output layer materialised" in shown if fused == "none" else f"fused, {fused}, chunks of 8" in shown
    found = json.loads((tmp_path / "found").read_text())
    (parts,) = found["parts"]
    assert min(parts[name] for name in parts if name != "weight sync") > 0
    assert sorted(parts) == sorted(
        "rollout,teacher forward,student forward,output layer,loss,backward,optimizer,weight sync".split(",")
    )
    # Contexts of 80 tokens, with their hints of 144: three in a row of 256 tokens, in pairs one.
    in_pairs = {"student's step": 3, "teacher's forward": 3, "self-distillation": 6}
    assert found["num_microbatches"] == {"next token": 1} | in_pairs
    assert [sorted(seconds) for seconds in found["seconds"]] == [sorted(found["num_microbatches"])]
    assert "of the student's step and the teacher's forward together" in shown


def test_an_anchored_target_costs_the_products_and_states_of_its_mode(ranks, tmp_path):
    sizes = "--layers=1 --hidden=64 --head-size=32 --vocab=300 --problems=3 --response=16 --tokens=256 --repeats=1"
    options = [*sizes.split(), "--rows=14", "--width=64", "--columns=200", f"--json={tmp_path}/found"]
    ranks.run(run_on_this_rank, "anchored_cost.py", options, world_size=1, init_process_group=False)
    found = json.loads((tmp_path / "found").read_text())["found"]
    costs = {
        name: (one["forwards"], one["products_forward"], one["products_backward"], round(one["kept"], 1), one["moved"])
        for name, one in found.items()
    }
    anchored, to_reference = "anchor=reference", "anchor=reference, match=reference"
    assert costs == {
        "anchor=student": (2, 2, 2, 1, 2),
        "anchor=student, measured": (2, 2, 2, 1, 2),
        f"{anchored}, k = 1 + w": (3, 2, 2, 1, 4),
        f"{anchored}, k = 1 + w, measured": (3, 4, 2, 3, 8),
        f"{anchored}, match=student": (3, 2, 2, 1, 4),
        f"{anchored}, match=student, measured": (3, 4, 2, 3, 8),
        to_reference: (3, 3, 2, 1, 4),
        f"{to_reference}, measured": (3, 5, 2, 3, 8),
        f"{to_reference}, own weights": (3, 4, 2, 2, 4),
    }
    assert all(len(one["seconds"]) == 1 and one["seconds"][0] > 0 for one in found.values())


def test_adapters_hold_their_own_gradients_and_state_and_no_teacher(ranks, tmp_path):
    sizes = "--layers=1 --hidden=64 --head-size=32 --vocab=300 --problems=2 --response=8 --tokens=256 --repeats=1"
    options = [*sizes.split(), "--ranks=4", f"--json={tmp_path}/found"]
    ranks.run(run_on_this_rank, "adapter_cost.py", options, world_size=1, init_process_group=False)
    found = json.loads((tmp_path / "found").read_text())
    whole, adapted = found["bytes"]["0"], found["bytes"]["4"]
    assert whole["update"] == whole["weights"] == whole["teacher"] and adapted["teacher"] == 0
    assert adapted["weights"] - whole["weights"] == adapted["update"] < whole["update"] / 4
    for one in (whole, adapted):
        assert one["gradients"] == pytest.approx(one["update"], rel=0.1), "Megatron pads its buffers"
        assert one["optimizer"] == 2 * one["update"], "two moments in float32"
    (seconds,) = found["seconds"]
    assert min(value for times in seconds.values() for value in times.values()) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_error_of_a_folded_row_is_that_of_rounding_alone(tools, monkeypatch, dtype):
    module, generator = tools("folded_row_error"), torch.Generator().manual_seed(1)
    monkeypatch.setattr(module, "ROUNDED", dtype)
    weight = module.output_weight(300, 64, generator)
    states = module.random_rows(50, 64, generator)
    for target in (Target("fixed", anchor="reference"), Target(anchor="reference")):
        rows = module.rows_of(states, weight, target)
        for one, other in module.PAIRS:
            found = module.differences(rows[one], rows[other])
            assert 0 < found["loss"][1] <= found["loss"][0], "every pair rounds differently"
            largest = max(maximum for maximum, _ in found.values())
            assert largest < 2e-4 if dtype is torch.float32 else 1e-3 < largest < 0.5
    nasty = module.nasty_rows(33, weight, generator)
    assert {len(part) for part in vars(nasty).values()} == {33}
    assert torch.equal(nasty.student[:5], nasty.teacher[:5]) and torch.equal(
        nasty.teacher[5:10], -nasty.reference[5:10]
    )
    assert "nan" not in module.table({"k": target}, 14, 64, 200, torch.device("cpu"))


class Sampler:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., list]:
        return lambda *_: self.calls.append(name) or []


def test_weights_are_sent_once_per_step_and_not_within_the_rollout(tools, monkeypatch):
    module, sampler = tools("step_time"), Sampler()
    rest = dict.fromkeys(("grid", "chunks", "teacher", "optimizer", "vocab", "token_loss"))
    bench = module._Bench(**rest, sampler=sampler, arguments=argparse.Namespace(response=4))
    monkeypatch.setattr(bench, "packed", lambda responses: None)

    def train(batch: Any, clock: Any) -> None:
        for name in module.PARTS:
            with clock(name):
                pass

    monkeypatch.setattr(bench, "train", train)
    bench.by_part()
    assert sampler.calls == ["update_weights", "generate", "sleep"]


def test_seconds_within_a_part_count_for_that_part_alone(tools, monkeypatch):
    module, times = tools("step_parts"), iter([0.0, 1.0, 3.0, 4.0, 4.5, 10.0])
    monkeypatch.setattr(module, "now", lambda: next(times))
    clock = module.Clock(on=True)
    with clock("backward"):
        with clock("loss"):
            pass
        with clock("loss"):
            pass
    assert clock.seconds == {"backward": 7.5, "loss": 2.5}


@pytest.mark.parametrize("words", [["--placement", "server"], ["--placement=server"]])
def test_a_weight_sync_to_servers_is_measured_by_its_own_script(tools, monkeypatch, words):
    called: list[list[str]] = []
    stand_in = ModuleType("server_sync")
    stand_in.main = lambda: called.append(sys.argv[1:])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "server_sync", stand_in)
    monkeypatch.setattr(sys, "argv", ["weight_sync.py", "--layers=2", *words, "--transfers", "gloo"])
    tools("weight_sync").main()
    assert called == [["--layers=2", "--transfers", "gloo"]]


def cells_of(printed: str) -> dict[str, list[str]]:
    """Return the cells of a printed table by the first cell of each row, without the first two rows of each table."""
    rows = [line.strip("|").split("|") for line in printed.splitlines() if line.startswith("| ")]
    return {first.strip(): [cell.strip() for cell in cells] for first, *cells in rows}


@pytest.mark.full
def test_the_ways_of_overlap_train_on_responses_of_their_ages():
    sizes = ["--problems=4", "--new-tokens=8", "--layers=1", "--hidden=32", "--steps=2", "--rounds=1"]
    printed, _, ratios = run("overlap_time.py", *sizes).partition("\n\n")
    ages = {way: float(cells[-1]) for way, cells in cells_of(printed).items() if way != "way"}
    assert ages == {"turns": 0, "ahead, wait": 1, "ahead, keep": ages["ahead, keep"]}
    assert all(0 <= age <= 1 for age in ages.values())
    assert cells_of(ratios)["turns"][0] == "1.00"


@pytest.mark.full
def test_losses_of_one_table_agree_and_a_peer_that_cannot_run_says_so():
    shown = run("loss_peers.py", "--positions=24", "--vocab=600", "--hidden=16", "--repeats=1")
    tables = shown.split("\n\n")[2::2]
    rows = [cells_of(table) for table in tables]
    for table in rows:
        names = list(table)
        assert names[1] == "naive PyTorch" and table["naive PyTorch"][1] == "1.00"
        for name in names[1:]:
            cells = table[name]
            if cells[0].startswith("not run: "):
                assert name.startswith(("TRL", "liger-kernel")) and not any(cells[1:])
            else:
                assert all(float(value) < 1e-4 for value in cells[-1].split("; ")), name
    assert len(rows) == 3 and sum("liger-kernel" in name for table in rows for name in table) == 3


def test_a_peer_of_the_loss_needs_its_package_and_for_triton_a_gpu():
    sys.path.insert(0, str(TOOLS))  # for what lies beside the script
    peers = load_script(TOOLS / "loss_peers.py")
    here = peers.Contender("torch", None, ("torch",))
    assert here.why_not(torch.device("cpu")) is None
    assert peers.Contender("absent", None, ("absent",)).why_not(torch.device("cpu")) == "needs absent, not installed"
    kernel = peers.Contender("kernel", None, ("torch",), on_gpu_only=True)
    assert kernel.why_not(torch.device("cpu")) == "its Triton kernels need a GPU"
    assert kernel.why_not(torch.device("cuda")) is None


@pytest.mark.full
def test_the_ways_of_teachers_are_measured_beside_the_frozen_start(tmp_path):
    sizes = ["--problems=4", "--new-tokens=8", "--layers=1", "--hidden=32", "--vocab=64", "--steps=1", "--rounds=1"]
    cells = cells_of(run("teachers_time.py", *sizes, f"--json={tmp_path}/found.json"))
    teachers = [*(f"{count} teacher{'s' * (count > 1)}" for count in (1, 2, 4)), "1 teacher, its own model"]
    ways = ["the frozen start", *teachers, "2 teachers, nothing fetched", "2 teachers, offloaded"]
    assert [way for way in cells if way != "way"] == ways and cells[ways[0]][-1] == "1.00"
    (turn,) = json.loads((tmp_path / "found.json").read_text())["turns"]
    assert list(turn) == ways and min(turn.values()) > 0


@pytest.mark.full
def test_episodes_of_twenty_turns_are_measured_beside_those_of_ten(tmp_path):
    sizes = ["--problems=2", "--reply=6", "--layers=1", "--hidden=32", "--steps=1"]
    shown = run("episode_time.py", *sizes, f"--json={tmp_path}/found.json")
    found = json.loads((tmp_path / "found.json").read_text())["found"]
    assert list(found) == [f"{way}, {turns} turns" for way in ("turn by turn", "one sequence") for turns in (10, 20)]
    ratios = [
        found[f"{way}, 20 turns"]["tokens"] / found[f"{way}, 10 turns"]["tokens"]
        for way in ("turn by turn", "one sequence")
    ]
    assert ratios[0] > 3.3 and ratios[1] <= 2.2 and f"{ratios[1]:.2f} |" in shown
    assert all(min(values.values()) > 0 for values in found.values())


@pytest.mark.full
def test_responses_of_servers_are_counted_in_both_forms(tmp_path):
    options = ["--responses=24", "--tokens=50", "--servers=3", "--in-flight=8", "--repeats=1"]
    shown = run("server_responses.py", *options, f"--json={tmp_path}/found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert "| json |" in shown and "| compact |" in shown
    for [one] in (found["json"], found["compact"]):
        assert one["seconds"] > 0 and one["http_seconds"] > 0 and 1 <= one["threads"] <= 12
