# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The measurement of stale responses: the page shows its lines, every cell runs once, and ages are the wanted ones."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from ranks import RankPool
from scripts import load_script

from megatron_selfdistill.rollout.base import Request, Response, SamplingParams, request_key

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = REPOSITORY / "tools" / "benchmarks"


@pytest.fixture
def tool(tools: Callable[[str], ModuleType]) -> ModuleType:
    return tools("staleness")


def test_the_page_shows_the_tables_of_the_lines(tool):
    assert tool.main(["--check"]) == 0, "run python tools/benchmarks/staleness.py --write"
    page = tool.PAGE.read_text(encoding="utf-8")
    assert [name for name in tool.TABLES if f"<!-- table {name} -->" not in page] == []


def test_every_line_is_the_only_one_of_its_cell_and_has_the_overrides_of_its_arm(tool):
    lines = tool.read_lines(tool.LINES)
    cells = [(line["arm"], line["seed"]) for line in lines]
    assert len(set(cells)) == len(cells) > 0
    for line in lines:
        assert line["seed"] in tool.SEEDS
        if line["arm"] == tool.BEFORE:
            assert line["step"] == [0]
        else:
            assert line["overrides"] == list(tool.ARMS[line["arm"]].overrides), line
            assert line["step"] == list(tool.STEPS)


def test_cells_whose_line_is_there_are_not_run_again(tool, monkeypatch, tmp_path):
    lines, run = tmp_path / "lines.jsonl", []
    monkeypatch.setattr(tool, "run_cell", lambda *cell: run.append(cell[:2]))
    lines.write_text(json.dumps({"arm": "student_reverse_4", "seed": 21}) + "\n")
    asked = ["--seeds", "21", "22", "--arms", "student_reverse_4", "base", f"--lines={lines}"]
    assert tool.main(asked) == 0
    assert run == [("base", 21), ("student_reverse_4", 22), ("base", 22)]


def tiny_runs(arms: Sequence[str], directory: Path) -> None:
    """Run the cells of a seed: three steps from a base of three steps, measured on 12 problems after two and three."""
    sys.path[:0] = [str(TOOLS), str(REPOSITORY / "examples")]
    module = load_script(TOOLS / "staleness.py")
    quickstart = module.EXPERIMENTS["quickstart"]
    few = quickstart.task.held_out_problems()[:12]
    task = dataclasses.replace(quickstart.task, pretraining_steps=3, held_out_problems=lambda: few)
    module.EXPERIMENTS, module.STEPS = {"quickstart": dataclasses.replace(quickstart, task=task)}, (2, 3)
    files = [f"--lines={directory}/lines.jsonl", f"--directory={directory}/runs"]
    assert module.main(["--seeds", "21", "--arms", *arms, *files]) == 0


@pytest.mark.full
def test_cells_run_with_the_base_and_with_responses_of_every_age(ranks: RankPool, tool, tmp_path):
    arms = ["base", "student_reverse_1", "student_reverse_4_truncated"]
    ranks.run(tiny_runs, arms, tmp_path, world_size=1, init_process_group=False)
    lines = tool.read_lines(tmp_path / "lines.jsonl")
    assert [(line["arm"], line["step"]) for line in lines] == list(zip(arms, ([0], [2, 3], [2, 3]), strict=True))
    assert all(0 <= accuracy <= 1 for line in lines for accuracy in line["sampled"])
    assert lines[1]["entropy"] != lines[2]["entropy"], "the responses of the third step have other weights"


class Engine:
    """A sampler whose responses name its weights."""

    version = 0

    def update_weights(self, version: int) -> None:
        self.version = version

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Response]:
        return [Response([1], [0.0], [0.0], "stop", weight_version=self.version) for _ in requests]


def test_responses_have_the_weights_of_the_step_that_asked_for_them(tools):
    sampler = tools("stale_responses").GeneratesAtOnce(Engine())
    request, params = Request([1, 2], seed=3), SamplingParams(max_new_tokens=4)
    ticket = sampler.start([request], params, used_at=4)
    sampler.update_weights(4)
    (response,) = sampler.collect(ticket)
    assert response.weight_version == 0 and sampler.generate([request], params)[0].weight_version == 4
    assert sampler.finished(ticket) == {request_key(request, params): response}
    (wave,) = sampler.stream(ticket, None)
    assert wave.responses == {0: response} and wave.is_last


@pytest.mark.parametrize(
    ("step", "mean", "oldest"), [(0, 0, 0), (3, 3, 3), (9, 4, 4), (9, 3.9, 4), (9, 4, 5), (2, 4, 4)]
)
def test_a_step_with_responses_of_another_age_is_an_error(tools, monkeypatch, step, mean, oldest):
    module = tools("stale_responses")
    metrics = {"rollout/staleness_mean": mean, "rollout/staleness_max": oldest}
    batch = SimpleNamespace(metrics=metrics)
    monkeypatch.setattr(module.AheadOnPolicy, "next_step", lambda *_: batch)
    source = object.__new__(module.CheckedAhead)
    source._ahead = 4
    if mean == oldest == min(step, 4):
        assert source.next_step(step, None) is batch
    else:
        with pytest.raises(RuntimeError, match=f"step {step} needs responses of weights {min(step, 4)} steps old"):
            source.next_step(step, None)


def lines_of(tool: ModuleType, seed: int, arms: Sequence[str], add: float) -> list[dict]:
    """Return lines whose accuracy is a hundredth of the step, and ``add`` more."""
    of_arms = [{"arm": arm, "seed": seed, "step": list(tool.STEPS)} for arm in arms]
    lines = [{"arm": tool.BEFORE, "seed": seed, "step": [0]}, *of_arms]
    return [line | {"sampled": [step / 100 + add for step in line["step"]]} for line in lines]


def test_at_equal_time_overlapped_runs_have_a_quarter_more_steps(tool):
    assert all(steps == 1.25 * time for time, steps in tool.OVERLAPPED.items())
    arms = list(tool.ARMS)
    lines = lines_of(tool, 21, arms, 0.1) + lines_of(tool, 22, arms, 0.12) + lines_of(tool, 23, arms[1:], 0.9)
    heading, _, before, in_turns, streamed, ahead, *_ = tool.rows_of("staleness_time", lines)
    assert heading.startswith("| anchor, divergence; seeds 21, 22 | ahead | time 8 | time 16 |")
    assert before == "| before | | .11 [.10 .12] | | | |"
    assert in_turns.startswith("| student, reverse KL | 0, in turns | .19 [.18 .20] | .27 [.26 .28] |")
    assert streamed.startswith("| student, reverse KL | 0, streamed | .21 [.20 .22] | .31 [.30 .32] |")
    assert ahead.startswith("| student, reverse KL | 1 | .21 [.20 .22] | .31 [.30 .32] |")


def test_at_equal_steps_every_arm_has_a_row(tool):
    lines = lines_of(tool, 21, list(tool.ARMS), 0.1)
    _, _, _, first, *others = tool.rows_of("staleness_steps", lines)
    assert first == "| student, reverse KL | 0 | .18 | .20 | .26 | .30 | .42 | .50 | .74 | .90 |"
    assert len(others) == len(tool.ARMS) - 1
    assert tool.rows_of("staleness_steps", lines[1:]) == ["No seed has a line for every row yet."]


def test_a_difference_is_that_of_one_seed_to_itself_with_fresh_responses(tool):
    lines = []
    for seed, add, lost in ((21, 0.1, 0.02), (22, 0.3, 0.06)):
        of_seed = lines_of(tool, seed, list(tool.ARMS), add)
        lines += [
            line | {"sampled": [v - lost * (line["arm"][-1] == "4") for v in line["sampled"]]} for line in of_seed
        ]
    _, _, first, *others = tool.rows_of("staleness_difference", lines[::-1])
    assert first.startswith("| student, reverse KL | 1 | +0.0 [+0.0 +0.0] |")
    assert others[0].startswith("| student, reverse KL | 4 | -4.0 [-6.0 -2.0] |")
    assert len(others) == len([arm for arm in tool.ARMS.values() if arm.ahead]) - 1
