# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The chat templates of published models, those that TRL ships: prompts, ends of replies, thoughts, final answers."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_selfdistill.data.end_tokens import reply_end
from megatron_selfdistill.data.thoughts import final_part, num_thoughts, readable
from megatron_selfdistill.data.tokenizer import Tokenizer as OwnTokenizer
from megatron_selfdistill.data.tokenizer_files import load_tokenizer

SPEC = importlib.util.find_spec("trl")
PLACE = Path(SPEC.submodule_search_locations[0]) / "chat_templates" if SPEC else Path()  # type: ignore[index]
IMAGES = ("smolvlm", "idefics3", "llava_next")  # a content must have parts
NAMES = sorted(path.stem for path in PLACE.glob("*.jinja"))
ALL = [name for name in NAMES if not name.startswith(IMAGES) and not name.endswith("_training")]
THINKING = [
    *("qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8", "glm4moe", "deepseekv3", "gptoss", "gemma4_v5"),
    *("nemotron_3_nano", "nemotron_3_super", "lfm2_2_5"),
]
ENDS = {"phi3": "<|end|>", "phi3_5": "<|end|>", "glm4moe": "<|user|>", "qwen3": "<|im_end|>", "llama3_1": "<|eot_id|>"}
QUESTION = {"role": "user", "content": "What is 6 x 7?"}


def tokenizer_of(name: str, directory: Path) -> OwnTokenizer:
    """Return a tokenizer of bytes with a template of TRL, whose marks are special tokens."""
    template = (PLACE / f"{name}.jinja").read_text()
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    own = Tokenizer(models.BPE(letters, merges=[]))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marks = re.findall(r"<\|[^<>{}'\" ]+?\|>|</?\w*think\w*>|<\|channel>|<channel\|>", template)
    own.add_special_tokens(sorted({*marks, "<bos>", "<eos>", "<|return|>"}))
    fast = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = template
    fast.save_pretrained(directory)
    return load_tokenizer(directory)


@pytest.mark.parametrize("name", ALL)
def test_student_and_teacher_end_in_the_same_generation_prompt(name, tmp_path):
    builder, problem = tiny.builder(tokenizer_of(name, tmp_path)), tiny.problem(QUESTION["content"], "6 x 7 = 42", "42")
    student, teacher = builder.prompt_pair(problem)
    texts = [builder.tokenizer.decode(ids) for ids in (student, teacher)]
    assert "What is 6 x 7?" in texts[0] and "6 x 7 = 42" in texts[1]
    prompts = builder.generation_prompts(problem)
    assert prompts.student == prompts.teacher and texts[0].endswith(prompts.student)


@pytest.mark.parametrize("name", THINKING)
def test_the_final_answer_of_a_reply_is_what_follows_its_thoughts(name, tmp_path):
    tokenizer = tokenizer_of(name, tmp_path)
    thoughts = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "It is \\boxed{7}, no.")
    if name == "deepseekv3":  # its template takes the thoughts of a content
        reply = {"role": "assistant", "content": f"<think>{thoughts['thinking']}</think>42"}
        whole = f"<think>{thoughts['thinking']}</think>42"
    else:
        reply = {"role": "assistant", "content": "42", **thoughts}
        variables = {"enable_thinking": True}
        prompt = tokenizer.render_chat([QUESTION], **variables)
        rendered = tokenizer.render_chat([QUESTION, reply], add_generation_prompt=False, **variables)
        whole = rendered[len(prompt) :] if rendered.startswith(prompt) else rendered.rpartition("6 x 7?")[2]
    assert "boxed" in whole and num_thoughts(whole) == 1, whole
    text = readable(tokenizer.encode(whole), tokenizer)
    assert final_part(text).strip().startswith("42") and "boxed" not in final_part(text), text


@pytest.mark.parametrize("name", ENDS)
def test_the_end_of_a_reply_is_the_token_that_the_template_writes(name, tmp_path):
    tokenizer = tokenizer_of(name, tmp_path)
    [end] = tokenizer.encode(ENDS[name])
    assert reply_end(tokenizer, [tokenizer.eos_id, end], {}) == end
