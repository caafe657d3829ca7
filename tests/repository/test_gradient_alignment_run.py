# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Gradient alignment of a tiny model through the real sampler, on one rank and on two."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import hf_models
import pytest
import tiny_run

sys.path.append(str(tiny_run.REPOSITORY / "experiments" / "alignment"))
import gradient_alignment as tool

SETTINGS = (
    "optimizer=fp32",
    "rollout.max_new_tokens=24",
    "rollout.kv_cache_gb=0.1",
    "evaluation.verifier=tiny_run.starts_with_an_even_token",
    "data.teacher_template='{problem}H{solution}|'",
)
SMALL = ("--nodes", "4", "--top", "2", "--completions", "3", "--limit", "3")
GREEDY = ("rollout.temperature=0", "rollout.stop_token_ids=[7,2]", "--nodes", "8")


def run_tool(arguments: list[str]) -> int:
    return tool.main(arguments)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Return a directory with problems, and an untrained model in both formats, with another one as a teacher."""
    from megatron_selfdistill.interop.conversion import hf_to_megatron

    directory = tmp_path_factory.mktemp("alignment")
    tiny_run.write_data(directory, 4)
    for name, seed in {"hf": 0, "first": 1}.items():
        hf_models.write("qwen3", directory / name, seed, vocab_size=23)
        for path in (directory / "tokenizer").iterdir():
            shutil.copy(path, directory / name / path.name)
    hf_to_megatron(directory / "hf", directory / "megatron")
    return directory


def arguments(directory: Path, model: str, out: Path, *more: str) -> list[str]:
    data = ["--data", str(directory / "problems.jsonl"), "-o", str(out)]
    return [str(directory / model), *data, *SMALL, *SETTINGS, *more]


def align(ranks, directory: Path, model: str, name: str, *more: str, world_size: int = 1) -> dict[str, Any]:
    out = directory / f"{name}.json"
    given = arguments(directory, model, out, *more)
    assert ranks.run(run_tool, given, world_size=world_size, init_process_group=False) == [0] * world_size
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def alone(directory, ranks) -> dict[str, Any]:
    """Return the results of the checkpoint on one rank, with another teacher."""
    return align(ranks, directory, "megatron", "alone", "--teacher", str(directory / "first"))


def test_the_file_has_every_node_and_its_candidates(alone):
    nodes = alone["nodes"]
    assert len({node["problem_id"] for node in nodes}) == 3 and 3 <= len(nodes) <= 12
    for node in nodes:
        assert 0 <= node["position"] < node["response_length"] <= 24 and node["kl"] > 0
        assert 2 <= len(node["candidates"]) <= 6
        for name in ("student", "teacher", "target"):
            assert 0 < sum(candidate[name] for candidate in node["candidates"]) <= 1 + 1e-9
        assert {candidate["success"] for candidate in node["candidates"]} <= {0, 1 / 3, 2 / 3, 1}
        is_decided = len({candidate["success"] for candidate in node["candidates"]}) > 1
        assert {cosine is not None for cosine in node["alignment"].values()} == {is_decided}
    everything = alone["groups"][0]
    assert everything["name"] == "all" and everything["num_nodes"] == len(nodes) > everything["num_decided"] > 1
    assert sum(group["num_nodes"] for group in alone["groups"] if group["name"] in ("right", "wrong")) == len(nodes)
    assert alone["settings"]["num_completions"] == 3 and alone["data"]["num_problems"] == 3


@pytest.mark.full
def test_each_context_of_the_teacher_has_its_own_groups_on_the_same_responses(directory, ranks, alone):
    own = directory / "own.jsonl"
    records = [json.loads(line) for line in (directory / "problems.jsonl").read_text().splitlines()]
    ids = list(dict.fromkeys(node["problem_id"] for node in alone["nodes"]))
    lines = [{"problem_id": name, "solution": record["solution"]} for name, record in zip(ids, records, strict=False)]
    own.write_text("".join(json.dumps(line) + "\n" for line in lines))
    contexts = [argument for name in ("solution", str(own), "answer") for argument in ("--teacher-context", name)]
    many = align(ranks, directory, "megatron", "contexts", "--teacher", str(directory / "first"), *contexts)
    found = {name: [it for it in many["nodes"] if it["teacher_context"] == name] for name in contexts[1::2]}
    assert found["solution"] == alone["nodes"]
    without_name = [[{**it, "teacher_context": None} for it in found[name]] for name in ("solution", str(own))]
    assert without_name[0] == without_name[1], "the file holds the same hints"
    assert {it["correct"] for it in found["answer"]} == {it["correct"] for it in found["solution"]}
    assert next(g["name"] for g in many["groups"] if g["teacher_context"] == "answer") == "all"
    assert [g for g in many["groups"] if g["teacher_context"] == "solution"] == alone["groups"]


@pytest.fixture(scope="module")
def greedy(directory, ranks) -> dict[str, Any]:
    """Return the results of greedy responses and completions, some of which are right."""
    return align(ranks, directory, "megatron", "greedy", *GREEDY)


@pytest.mark.full
def test_a_greedy_completion_after_the_response_s_own_token_is_the_response(greedy):
    outcomes, num_decided = set(), 0
    for node in greedy["nodes"]:
        own = node["candidates"][0]  # the likeliest token, which a greedy response takes
        assert own["success"] == node["correct"], node["position"]
        outcomes.add(node["correct"])
        going_on = [it["success"] for it in node["candidates"] if it["token"] not in (2, 7)]
        num_decided += node["position"] > 0 and len(set(going_on)) > 1
        ended = {it["success"] for it in node["candidates"] if it["token"] in (2, 7)}
        assert not node["position"] or len(ended) <= 1, "the response ends here, and its first token decides"
    assert outcomes == {True, False} and num_decided > 0, "another token makes another completion"


@pytest.mark.full
def test_completions_are_the_same_where_the_model_has_room_for_no_more_than_the_response(directory, ranks, greedy):
    """The longest teacher's prompt has 13 tokens; with more room, completions of several lengths are one call."""
    tight = align(ranks, directory, "megatron", "tight", *GREEDY, "data.max_length=37")
    assert tight["nodes"] == greedy["nodes"]


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(2, [], marks=pytest.mark.full),
        pytest.param(2, ["parallel.tensor_model_parallel_size=2"], marks=pytest.mark.full),
        pytest.param(2, ["parallel.pipeline_model_parallel_size=2"], marks=pytest.mark.full),
    ],
)
def test_every_layout_and_both_formats_give_the_same_nodes(directory, ranks, alone, world_size, layout):
    name = "-".join(["two", *layout])
    teacher = ["--teacher", str(directory / "first")]
    many = align(ranks, directory, "hf", name, *teacher, *layout, world_size=world_size)
    assert len(many["nodes"]) == len(alone["nodes"])
    for found, expected in zip(many["nodes"], alone["nodes"], strict=True):
        for key in ("problem_id", "position", "chosen_by", "correct", "response_length", "part"):
            assert found[key] == expected[key], key
        assert [it["token"] for it in found["candidates"]] == [it["token"] for it in expected["candidates"]]
        assert [it["success"] for it in found["candidates"]] == [it["success"] for it in expected["candidates"]]
        assert found["kl"] == pytest.approx(expected["kl"], rel=1e-3, abs=1e-6)
        assert found["alignment"] == pytest.approx(expected["alignment"], abs=1e-3)
    assert not list(directory.glob(".selfdistill-*")), "temporary directories are left"
