# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The example with a real model, on a tiny stand-in: every stage runs, nothing is fetched twice, an error is clear.

The real model itself is of the tier `external`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shlex
import string
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import hf_models
import pytest
import yaml

from _lib import pretraining, real_model, retention
from _lib.hugging_face import load
from megatron_selfdistill import config as configuration
from megatron_selfdistill.config import command_line

pytestmark = pytest.mark.full
NUM_HELD_OUT = 4
SETTINGS = ["rollout.max_new_tokens=6", "data.global_batch_size=2", "evaluation.num_samples=1"]


def write_stand_in(directory: Path) -> None:
    """Write a random Llama with one token per character as a Hugging Face directory."""
    alphabet = string.ascii_letters + string.digits + " \n.,?!:;'-" + "$_"  # the last two: the end, the padding
    size, changes = len(alphabet), {"tie_word_embeddings": True, "max_position_embeddings": 4096}
    ids = {"bos_token_id": None, "eos_token_id": size - 2, "pad_token_id": size - 1}
    hf_models.write("llama2", directory, vocab_size=size, **changes, **ids)
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
        write = lambda _, out: calls.append("multiplied out") or write_stand_in(out)  # noqa: E731
        patch.setattr(real_model, "write_hugging_face", write)
        statuses = [example.main(["--directory", str(directory), "--steps", "1", *SETTINGS]) for _ in range(2)]
        assert calls == ["fetched", "multiplied out"]
    assert statuses == [0, 0]
    return Done(statuses[-1], shown.getvalue(), directory / "real_model")


def test_the_command_of_the_run_is_short_and_composes_to_the_settings_of_the_run(done, monkeypatch):
    (line,) = [line for line in done.shown.splitlines() if "--config-dir" in line][-1:]
    settings, _, arguments = line.partition("selfdistill ")
    assert settings.startswith("PYTHONPATH=") and len(arguments) < 100 + 3 * len(str(done.root)) and "'" not in line
    given = command_line.parse(shlex.split(arguments))
    by_hand = configuration.load(given.overrides, given.config_name, given.config_dir)
    by_hand = dataclasses.replace(by_hand, target=dataclasses.replace(by_hand.target, anchor="student"))  # the data's
    stored = yaml.safe_load((done.root / "run" / "config.yaml").read_text())
    expected = yaml.safe_load(configuration.to_yaml(by_hand)) | {"model": stored["model"]}
    assert stored | {"run_dir": by_hand.run_dir} == expected
    started = json.loads((done.root / "run" / "events.jsonl").read_text().splitlines()[0])
    assert started["command"].startswith("env PYTHONPATH=") and "--config-dir" in started["command"]


def test_the_figures_are_those_of_the_models_before_and_after(done, example):
    figures = json.loads((done.root / "results.json").read_text())
    assert figures["before"]["step"] == 0 and figures["after"]["step"] == 1
    for name, directory in (("before", "hf"), ("after", "self_distilled")):
        tokenizer, model = load(done.root / directory)
        perplexity = retention.perplexity_of(model, tokenizer(retention.TEXT)["input_ids"])
        assert figures[name]["perplexity"] == pytest.approx(perplexity)
    assert figures["before"]["perplexity"] != figures["after"]["perplexity"]
