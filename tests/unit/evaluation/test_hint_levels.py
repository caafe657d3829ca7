# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Hint levels: the gain is a derivative, and the numbers are those of transformers in float64 in every layout."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import hf_models
import pytest
import tiny_run
import torch
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.commands import evaluate as tool
from megatron_selfdistill.commands.given_model import configured, find_model
from megatron_selfdistill.config import load
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.distributed import ranks as grids
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.evaluation.hint_levels import (
    HintLevel,
    at_level,
    level_of,
    measure_hint_levels,
    predicted_order,
)
from megatron_selfdistill.evaluation.inference import open_inference
from megatron_selfdistill.run_data import RunData

LEVELS = ("none", "other", "answer", "solution", "kind")
Calls = list[list[tuple[list[int], list[int], bool]]]
"""Per call of the sampler: prompt, response, and whether the response was cut."""


def test_the_gain_is_the_slope_of_the_accuracy_towards_the_teacher():
    """A policy of two tokens whose sequences can all be listed: each stands as often as its probability says."""
    first, second = torch.tensor([0.25, 0.75]), torch.tensor([[0.5, 0.5], [0.125, 0.875]])
    p = [first.double(), second.double()]
    q = [torch.tensor([0.6, 0.4]).double(), torch.tensor([[0.9, 0.1], [0.3, 0.7]]).double()]

    def moved(e: float) -> list[Tensor]:
        mixed = [(1 - e) * a.log() + e * b.log() for a, b in zip(p, q, strict=True)]
        return [it.softmax(-1) for it in mixed]

    def is_right(a: int, b: int) -> bool:
        return (a, b) in {(0, 1), (1, 0)}

    def accuracy(policy: list[Tensor]) -> float:
        pairs = itertools.product(range(2), range(2))
        return sum(float(policy[0][a] * policy[1][a, b]) for a, b in pairs if is_right(a, b))

    rows, rights = [], []
    for a, b in itertools.product(range(2), range(2)):
        count = round(float(p[0][a] * p[1][a, b]) * 64)
        gap = float(p[0][a].log() - q[0][a].log() + p[1][a, b].log() - q[1][a, b].log())
        kl = float((p[0] * (p[0] / q[0]).log()).sum() + (p[1][a] * (p[1][a] / q[1][a]).log()).sum())
        rows += [[gap, kl, 2.0]] * count
        rights += [is_right(a, b)] * count
    assert len(rows) == 64
    found = level_of("x", torch.tensor(rows, dtype=torch.float64), torch.tensor(rights), [True, False])
    step = 1e-5
    assert found.gain == pytest.approx((accuracy(moved(step)) - accuracy(moved(-step))) / (2 * step), rel=1e-6)
    assert found.accuracy == pytest.approx(accuracy(p)) and abs(found.gain) > 0.01


def test_the_numbers_of_a_level_by_hand():
    sums = torch.tensor([[2.0, 1.0, 4], [-1.0, 3.0, 2], [6.0, 0.5, 2]], dtype=torch.float64)
    found = level_of("x", sums, torch.tensor([False, True, False]), [True, True, False])
    assert (found.num_samples, found.accuracy, found.hinted_accuracy) == (3, 1 / 3, 2 / 3)
    assert (found.utility, found.divergence) == (pytest.approx(1 / 3), 4.5 / 8)
    assert found.contrast == pytest.approx((2 + 6) / 6 - (-1 / 2))
    g = torch.tensor([1 - 2.0, 3 + 1.0, 0.5 - 6.0])
    assert found.gain == pytest.approx(float((torch.tensor([-1 / 3, 2 / 3, -1 / 3]) * g).mean()))


@pytest.mark.parametrize("right", [True, False])
def test_samples_that_are_all_alike_show_no_contrast_and_no_gain(right):
    sums = torch.tensor([[2.0, 1.0, 4], [-1.0, 3.0, 2]], dtype=torch.float64)
    found = level_of("x", sums, torch.tensor([right, right]), [True, True])
    assert found.contrast is None and found.gain == 0


def test_the_gain_decides_the_order_and_then_the_utility():
    def level(name: str, gain: float, utility: float) -> HintLevel:
        return HintLevel(name, 1, 0.0, utility, utility, 0.0, None, gain)

    levels = [level("a", 0.1, 0.0), level("b", 0.2, -0.5), level("c", 0.1, 0.3), level("d", -0.1, 0.9)]
    assert predicted_order(levels) == ["b", "c", "a", "d"]


def test_a_level_is_a_value_of_a_key_or_a_column():
    config = load(["data.fields.solution=worked", "data.fields.problem=question"])
    assert at_level(config, "other").data.solutions == "other" and at_level(config, "none").data.solutions == "none"
    assert at_level(config, "solution") == config
    column = at_level(config, "kind").data
    assert (column.solutions, column.fields) == ("given", {"solution": "kind", "problem": "question"})


# -- a model ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Return the directory of a tiny model and of problems, whose records have a column kind beside the solution."""
    from megatron_selfdistill.interop.conversion import hf_to_megatron

    directory = tmp_path_factory.mktemp("hint_levels")
    tiny_run.write_data(directory, 7)
    file = directory / "problems.jsonl"
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    file.write_text("".join(json.dumps({**it, "kind": "..", "answer": it["solution"][::-1]}) + "\n" for it in records))
    hf_models.write("qwen3", directory / "hf", vocab_size=23)
    shutil.copytree(directory / "tokenizer", directory / "hf", dirs_exist_ok=True)
    hf_to_megatron(directory / "hf", directory / "megatron")
    return directory


def arguments_of(directory: Path, *options: str) -> list[str]:
    model = [
        "--megatron",
        f"{directory}/megatron",
        "--data",
        f"{directory}/problems.jsonl",
        "--out",
        f"{directory}/out",
    ]
    settings = ["optimizer=fp32", "rollout.max_new_tokens=9", "data.teacher_template='{problem}H{solution}|'"]
    return [*model, "--overwrite", "--hinted", "--levels", ",".join(LEVELS), *settings, *options]


def is_even(response: str, problem: Problem | None = None) -> bool:
    """Return whether a response is right: whether its length is even."""
    return len(response) % 2 == 0


def measured(
    directory: Path, *options: str
) -> tuple[list[dict[str, Any]], list[list[tuple[list[int], list[int], bool]]]]:
    """Return the levels, and this replica's prompts and responses of each call of the sampler."""
    arguments = tool.evaluation_arguments(arguments_of(directory, *options))
    model = find_model(arguments.hf, arguments.megatron, None)
    config = configured(*tool.loaded(arguments), model)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, load=model["path"]))
    levels = {name: RunData.load_evaluation(at_level(config, name), True) for name in LEVELS}
    grid, drawn = grids.initialize(config.parallel, config.seed), []
    with open_inference(config, levels["none"], grid) as inference:
        generate = inference.sampler.generate

        def recorded(requests, params):
            responses = generate(requests, params)
            pairs = zip(requests, responses, strict=True)
            drawn.append([(list(a.prompt), list(b.token_ids), b.truncated) for a, b in pairs])
            return responses

        inference.sampler.generate = recorded
        found = measure_hint_levels(inference, config, levels, is_even, grid)
    return [dataclasses.asdict(it) for it in found], drawn


def expected(directory: Path, calls: Calls) -> list[dict[str, Any]]:
    """Return the levels from the prompts and responses of all calls, by transformers in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory / "hf", dtype=torch.float64)
    decode = AutoTokenizer.from_pretrained(directory / "tokenizer").decode

    def right(response: list[int], is_cut: bool) -> bool:
        return not is_cut and is_even(decode(response[:-1], skip_special_tokens=True))

    def log_probs(prompt: list[int], response: list[int]) -> Tensor:
        with torch.no_grad():
            return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)

    samples, *hinted = calls
    rights = [right(response, is_cut) for _, response, is_cut in samples]
    found = []
    for name, of_level in zip(LEVELS, hinted, strict=True):
        gaps, kls, lengths = [], [], []
        for (plain, response, _), (prompt, _, _) in zip(samples, of_level, strict=True):
            p, q = log_probs(plain, response), log_probs(prompt, response)
            at = range(len(response)), response
            gaps.append(float((p - q)[at].sum()))
            kls.append(float((p.exp() * (p - q)).sum()))
            lengths.append(len(response))
        split = {
            flag: sum(g for g, r in zip(gaps, rights, strict=True) if r == flag)
            / sum(n for n, r in zip(lengths, rights, strict=True) if r == flag)
            for flag in (True, False)
        }
        accuracy = sum(rights) / len(rights)
        with_hint = sum(right(response, is_cut) for _, response, is_cut in of_level) / len(of_level)
        centred = [float(r) - accuracy for r in rights]
        found.append(
            {
                "name": name,
                "num_samples": len(rights),
                "accuracy": accuracy,
                "hinted_accuracy": with_hint,
                "utility": with_hint - accuracy,
                "divergence": sum(kls) / sum(lengths),
                "contrast": split[False] - split[True],
                "gain": sum(c * (k - g) for c, k, g in zip(centred, kls, gaps, strict=True)) / len(gaps),
            }
        )
    return found


LAYOUTS = {
    "one rank": (1, []),
    "DP2": (2, []),
    "TP2": (2, ["parallel.tensor_model_parallel_size=2"]),
    "PP2": (2, ["parallel.pipeline_model_parallel_size=2"]),
}


@combinations(layout=list(LAYOUTS), quick={"layout": ["DP2"]}, strength=1)
def test_the_numbers_are_those_of_transformers_in_float64(directory, ranks, layout):
    world_size, options = LAYOUTS[layout]
    results = ranks.run(measured, directory, *options, world_size=world_size, init_process_group=False)
    assert len({str(found) for found, _ in results}) == 1, "the same on every rank"
    calls = results[0][1]
    if layout == "DP2":  # every second problem
        of_both = zip(*(drawn for _, drawn in results), strict=True)
        calls = [[*itertools.chain(*zip(a, b, strict=False)), *a[len(b) :]] for a, b in of_both]
    for found, wanted in zip(results[0][0], expected(directory, calls), strict=True):
        assert found.pop("name") == wanted.pop("name") and 0 < found["accuracy"] < 1
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert len({round(it["divergence"], 6) for it in results[0][0]}) == len(LEVELS), "every level is another text"


def test_the_command_writes_the_levels_and_predicts_their_order(directory, capsys):
    options = ["evaluation.verifier=exact_match", "rollout.stop_token_ids=[0,1,2,3,4,5,6,7]", "--num-samples", "0"]
    assert tool.main(arguments_of(directory, *options)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    levels = json.loads((directory / "out" / "summary.json").read_text())["hint_levels"]
    assert [it["name"] for it in levels] == list(LEVELS)
    assert "hint levels before any training: 7 samples" in printed
    assert "predicted order, the best teacher first:" in printed or "no prediction: no sample without a hint" in printed


def test_a_column_that_no_record_has_is_named(directory):
    config = load([f"data.tokenizer={directory}/tokenizer", f"evaluation.path={directory}/problems.jsonl"])
    with pytest.raises(ConfigError, match="category"):
        RunData.load_evaluation(at_level(config, "category"), True)
