# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""``selfdistill explore``: pages of a tiny model, from both formats, on one rank and on two, and its refusals."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import hf_models
import pytest
import tiny_run
import torch
from explored_records import summary_of, target_of
from logit_pairs import by_bisection
from reported_runs import blocks_of
from summed_target import matching_beta, weights_of
from torch import Tensor

from megatron_selfdistill import config as configuration
from megatron_selfdistill.instruments.explorer import explore_command as tool
from megatron_selfdistill.loss import Target

SETTINGS = ("optimizer=fp32", "rollout.max_new_tokens=9", "rollout.kv_cache_gb=0.1", "target.teacher_weight=2")
TEXTS = ("--problem", "500-408:", "--solution", "092")


def record_of(page: Path) -> dict[str, Any]:
    blocks = blocks_of(page.read_text())
    numbered = [blocks[f"block-{number}"] for number in range(len(blocks) - 2)]
    return {**blocks["overview"], "texts": blocks["texts"], "blocks": numbered}


@pytest.fixture(scope="module")
def directory(untrained, tmp_path_factory) -> Path:
    """Return a directory with two problems, an untrained model in both formats, and another one, with tokenizers."""
    directory = Path(shutil.copytree(untrained, tmp_path_factory.mktemp("explore"), dirs_exist_ok=True))
    tiny_run.write_data(directory, 2)
    hf_models.write("qwen3", directory / "first", 1, vocab_size=23)
    shutil.copytree(directory / "tokenizer", directory / "first", dirs_exist_ok=True)
    return directory


def explore_run(ranks, directory: Path, name: str, overrides: list[str], *more: str) -> dict[str, Any]:
    shutil.copytree(directory / "megatron", directory / name / "checkpoints")
    settings = ["data.teacher_template='{problem}H{solution}|'", "rollout.max_new_tokens=4", *overrides]
    (directory / name / "config.yaml").write_text(configuration.to_yaml(configuration.load(settings)))
    out = directory / f"{name}.html"
    arguments = [str(directory / name), *TEXTS, "-o", str(out), "optimizer=fp32", "rollout.kv_cache_gb=0.1", *more]
    assert ranks.run(tool.main, arguments, world_size=1, init_process_group=False) == [0]
    return record_of(out)


def explore(ranks, model: Path, out: Path, *more: str, world_size: int = 1) -> dict[str, Any]:
    arguments = [str(model), *TEXTS, "-o", str(out), *SETTINGS, "data.teacher_template='{problem}H{solution}|'", *more]
    assert ranks.run(tool.main, arguments, world_size=world_size, init_process_group=False) == [0] * world_size
    return record_of(out)


@pytest.mark.full
def test_the_page_has_a_generated_response_and_the_target_of_each_token(directory, ranks):
    record = explore(ranks, directory / "megatron", directory / "generated.html", "target.anchor=student")
    tokens, summary, target = record["tokens"], summary_of(record), target_of(record)
    assert 1 <= len(tokens["id"]) <= 9 and target.teacher_weight == 2 and record["models"] == ["student", "teacher"]
    assert record["prompt"] == "500-408:" and record["solution"] == "092"
    for row, wanted in enumerate(tokens["student_entropy"]):
        assert 1 / matching_beta(summary, row, wanted, target) == pytest.approx(tokens["k"][row], rel=1e-3)
    assert sum(tokens["reverse_kl"]) > 0
    assert not list(directory.glob(".selfdistill-*")), "temporary directories are left"


@pytest.mark.full
@pytest.mark.parametrize("layout", sorted(tiny_run.TWO_RANKS.keys() - {"CP2"}))
def test_a_given_response_has_the_same_page_in_both_formats_and_in_every_layout(directory, ranks, layout):
    (directory / "response.txt").write_text("092$", encoding="utf-8")
    options = ["--response", str(directory / "response.txt"), "target.teacher_weight=2"]
    one = explore(ranks, directory / "megatron", directory / "one.html", *options)
    options += ["--teacher", str(directory / "megatron"), *tiny_run.TWO_RANKS[layout]]
    many = explore(ranks, directory / "hf", directory / "many.html", *options, world_size=2)
    assert "".join(one["tokens"]["text"])[:3] == "092" and one["models"] == ["student", "teacher", "reference"]
    assert many["tokens"]["id"] == one["tokens"]["id"]
    for key in ("k", "reverse_kl", "student_entropy", "reference_entropy", "teacher_log_prob"):
        assert many["tokens"][key] == pytest.approx(one["tokens"][key], rel=1e-3, abs=1e-5), key


def log_probs(model: Path, prompt: str, response: list[int]) -> Tensor:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model).encode(prompt, add_special_tokens=False)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)(torch.tensor([ids + response])).logits
    return logits[0, len(ids) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize(("anchor", "tp_size"), [("reference", 1), pytest.param("student", 2, marks=pytest.mark.full)])
def test_with_controls_the_page_has_what_any_hint_says_and_what_only_this_one_says(directory, ranks, anchor, tp_size):
    """The controls are the hints of all problems of the data; the page has the values of transformers in float64."""
    data = directory / "problems.jsonl"
    others = [json.loads(line)["solution"] for line in data.read_text().splitlines()]
    controls = ["--data", str(data), "target.control=other", f"target.num_controls={len(others)}"]
    options = [f"target.anchor={anchor}", f"parallel.tensor_model_parallel_size={tp_size}", "--response", "0923"]
    options += ["--teacher", str(directory / "hf"), "target.k_max=null"]
    record = explore(ranks, directory / "first", directory / "c.html", *controls, *options, world_size=tp_size)
    tokens, summary = record["tokens"], summary_of(record)
    first, hf = (partial(log_probs, directory / name, response=tokens["id"]) for name in ("first", "hf"))
    t, c_j = hf("500-408:H092|"), torch.stack([hf(f"500-408:H{other}|") for other in others])
    student, reference, c = first("500-408:"), hf("500-408:"), c_j.exp().mean(0).log()
    a, match = (reference, "reference") if anchor == "reference" else (student, None)
    target = Target(teacher_weight=2.0, k_max=None, anchor=anchor, match=match, num_controls=len(others))
    log_q, beta = by_bisection(student, t, target, reference, c_j)
    assert record["models"] == ["student", "teacher", *["reference"] * (anchor == "reference"), "other hints"]
    rows = (summary.logits[:, :, :23] - summary.log_normalisers[:, :, None]).unbind(1)
    near = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)
    anchored = rows[-2 if anchor == "reference" else 0]
    for found, expected in ((rows[1], t), (rows[-1], c), (rows[1] - rows[-1], t - c), (anchored, a)):
        near(found, expected)
    w, k = weights_of(target_of(record), len(rows)), torch.tensor(tokens["k"], dtype=torch.float64)
    near(k, 1 / beta)
    q = (sum(weight * row for weight, row in zip(w, rows, strict=True)) / k[:, None]).softmax(-1)
    near(q, log_q.exp())
    near(torch.tensor(tokens["general_kl"]).double(), (c.exp() * (c - a)).sum(-1))
    near(torch.tensor(tokens["specific_kl"]).double(), (t.exp() * (t - c)).sum(-1))
    assert (t - c).abs().max() > 0.1 and (k - 1).abs().min() > 0.01


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("target.control=other", "--data"),
        ("target.anchor=0.5", "target.anchor"),
        ("data.chat_template=\"{% for message in messages %}{{ 'H' }}{% endfor %}\"", "to show the problem"),
    ],
)
def test_what_cannot_be_explored_is_refused_with_its_key(directory, capsys, override, named):
    assert tool.main([str(directory / "megatron"), *TEXTS, *SETTINGS, override]) == 2
    assert named in capsys.readouterr().err


def test_a_run_directory_gives_its_settings_and_its_teacher(directory, ranks):
    settings = ["target.teacher_weight=3", "loss.divergence=jsd", f"checkpoint.load={directory / 'hf'}"]
    record = explore_run(ranks, directory, "run", settings, "target.k_max=null")
    assert record["settings"]["teacher_weight"] == 3 and record["settings"]["k_max"] is None
    assert record["settings"]["divergence"] == "jsd" and len(record["tokens"]["id"]) <= 4
    assert record["teacher"] == str(directory / "hf") and sum(record["tokens"]["reverse_kl"]) > 0


@pytest.mark.full
@pytest.mark.parametrize("anchor", ["reference", "student"])
def test_a_run_with_a_moving_teacher_is_mixed_with_its_first_weights_or_with_the_student(directory, ranks, anchor):
    settings = ["teacher.weights=current", f"target.anchor={anchor}", f"checkpoint.load={directory / 'first'}"]
    record = explore_run(ranks, directory, f"moving {anchor}", settings)
    assert record["settings"]["anchor"] == anchor
    assert record["models"] == ["student", "teacher", "reference"][: 2 + (anchor == "reference")]
    if anchor == "reference":
        tokens = record["tokens"]
        assert tokens["reference_entropy"] != pytest.approx(tokens["student_entropy"], rel=1e-3)
