# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""SmolLM2-135M-Instruct: logits and greedy texts of its GGUF file are those of transformers, and the example learns."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import hf_models
import models
import pytest
import torch
import transformers
from scripts import load_script
from torch import Tensor

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.evaluation.evaluation_directory import RESPONSES
from megatron_selfdistill.instruments.evaluate import evaluate_command as evaluate
from megatron_selfdistill.interop.convert_command import main

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))  # as `python examples/...` does
from _lib import real_model

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Tom has 3 apples and buys 4 more. How many apples does Tom have?",
    "Write one sentence about the sea.",
]
MAX_NEW_TOKENS = 32
# A rounding of every weight to float32 moves these logits, which reach 39, by 7e-5 to 9e-5: the bound is that of three.
LOGITS_BOUND = 3e-4
VOCAB_SIZE, END = 49_152, 2
LAYOUTS = {
    "TP1": (ParallelConfig(), 1),
    "TP3": (ParallelConfig(tensor_model_parallel_size=3), 3),
    "PP2": (ParallelConfig(pipeline_model_parallel_size=2), 2),
}


@pytest.fixture(scope="session")
def file() -> Path:
    return real_model.fetched(real_model.default_directory())


@pytest.fixture(scope="session")
def theirs(file) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


@pytest.fixture(scope="session")
def hf(file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "hf"
    real_model.write_hugging_face(file, out)
    return out


@pytest.fixture(scope="session")
def tokenizer(hf) -> Any:
    return transformers.AutoTokenizer.from_pretrained(hf)


@pytest.fixture(scope="session")
def prompts(tokenizer) -> list[list[int]]:
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]) for chat in asked]


def test_the_tokenizer_takes_digits_alone_and_the_chat_ends_at_id_2(file, hf, tokenizer, prompts):
    generation = json.loads((hf / "generation_config.json").read_text())
    assert (tokenizer.eos_token, tokenizer.eos_token_id, generation["eos_token_id"]) == ("<|im_end|>", END, END)
    assert tokenizer.tokenize("x  12\n\n345") == ["x", "ĠĠ", "1", "2", "ĊĊ", "3", "4", "5"]
    start = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    shown = f"{start}<|im_start|>user\n{QUESTIONS[0]}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompts[0]) == shown
    of_file = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert of_file(shown)["input_ids"] == prompts[0]


def logits_of(megatron: Path, hf: Path, parallel: ParallelConfig, sequences: list[list[int]]) -> Tensor | None:
    from megatron_selfdistill.checkpoint.external import load_weights
    from megatron_selfdistill.interop.hf.mapping import family_of
    from megatron_selfdistill.interop.hf_files import read_config

    config = read_config(hf)
    chunks, grid = models.build(family_of(config).model_config(config), parallel, seed=None)
    load_weights(megatron, chunks, VOCAB_SIZE)
    return hf_models.logits_through_the_pipeline(chunks, grid, sequences, VOCAB_SIZE)


@pytest.fixture(scope="session")
def megatron(hf) -> Path:
    out = hf.parent / "megatron"
    assert main(["hf-to-megatron", "--hf", str(hf), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def their_texts(theirs, prompts) -> list[list[int]]:
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "eos_token_id": END, "pad_token_id": END}
    with torch.no_grad():
        return [theirs.generate(torch.tensor([prompt]), **settings)[0].tolist() for prompt in prompts]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_transformers_on_the_file_in_any_layout(ranks, theirs, hf, megatron, their_texts, layout):
    parallel, world_size = LAYOUTS[layout]
    found = ranks.run(logits_of, megatron, hf, parallel, their_texts, world_size=world_size)
    ours = found[-1]
    assert ours is not None
    difference = (ours - hf_models.hf_logits(theirs, their_texts)).abs().max()
    print(f"{layout}: {len(ours)} positions, largest difference {difference:.1e}")
    assert difference < LOGITS_BOUND


def test_greedy_texts_of_evaluate_are_those_of_transformers_on_the_file(
    ranks, megatron, tokenizer, prompts, their_texts, tmp_path
):
    lines = [json.dumps({"problem": question, "answer": "none"}) for question in QUESTIONS]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    arguments = ["--megatron", str(megatron), "--data", str(tmp_path / "problems.jsonl"), "--out", str(out)]
    arguments += ["--num-samples", "0", "--responses", str(len(QUESTIONS))]
    arguments += ["optimizer=fp32", f"rollout.max_new_tokens={MAX_NEW_TOKENS}", "rollout.kv_cache_gb=0.1"]
    assert ranks.run(evaluate.main, arguments, world_size=1, init_process_group=False) == [0]
    found = [json.loads(line) for line in (out / RESPONSES).read_text().splitlines()]
    responses = [text[len(prompt) :] for prompt, text in zip(prompts, their_texts, strict=True)]
    assert {response[-1] == END for response in responses} == {False, True}, "one ends by itself, one is cut"
    expected = [
        (tokenizer.decode(prompt), tokenizer.decode(response, skip_special_tokens=True), len(response))
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    assert [(line["prompt"], line["response"], line["length"]) for line in found] == expected


def test_an_instruction_moves_from_the_prompt_into_the_weights_of_a_real_model(tmp_path, monkeypatch):
    example = load_script(Path(__file__).resolve().parents[2] / "examples" / "12_real_model.py")
    monkeypatch.setattr(example, "NUM_HELD_OUT", 16)
    monkeypatch.setattr(example, "QUESTIONS", example.QUESTIONS[:8])
    assert example.main(["--directory", str(tmp_path), "--steps", "2"]) == 0
    figures = json.loads((tmp_path / "real_model" / "results.json").read_text())
    before, after = figures["before"], figures["after"]
    assert before["greedy_accuracy"] == 0.0 and after["greedy_accuracy"] >= 0.3
    assert after["greedy_mean_length"] < before["greedy_mean_length"]
    assert 0.9 < after["perplexity"] / before["perplexity"] < 1.1
