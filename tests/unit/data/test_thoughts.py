# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The final answer of a response is what follows the thoughts, in the format of each family."""

from __future__ import annotations

import re

import pytest
from tiny import problem_with
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_selfdistill.data.thoughts import FORMATS, final_part, num_thoughts, parts, readable
from megatron_selfdistill.data.tokenizer_files import load_tokenizer
from megatron_selfdistill.evaluation.verify import exact_match, judged_text, math_verify, mentions_answer
from megatron_selfdistill.rollout.base import Response, response_text

WRITTEN = {
    "Qwen3, DeepSeek, GLM, Kimi-K2": "<think>\nIs it 7? No, \\boxed{7}.\n</think>\n\n42",
    "a prompt that opened the thoughts": "Is it 7? No, \\boxed{7}.\n</think>\n\n42",
    "Seed-OSS": "<seed:think>Is it 7?<seed:cot_budget_reflect>500</seed:cot_budget_reflect></seed:think>42",
    "Kimi-VL": "◁think▷Is it 7?◁/think▷42",
    "Magistral": "[THINK]Is it 7?[/THINK]42",
    "Command A": "<|START_THINKING|>Is it 7?<|END_THINKING|><|START_RESPONSE|>42<|END_RESPONSE|>",
    "Gemma 4": "<|channel>thought\nIs it 7?<channel|>42",
    "gpt-oss": "<|channel|>analysis<|message|>Is it 7?<|end|><|start|>assistant<|channel|>final<|message|>42",
    "gpt-oss with a preamble": (
        "<|channel|>analysis<|message|>Is it 7?<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>final <|constrain|>json<|message|>42"
    ),
}
UNFINISHED = {
    "Qwen3": "<think>\nIs it 42",
    "Qwen3, again": "<think>7</think><think>42",
    "gpt-oss": "<|channel|>analysis<|message|>It is 42",
    "gpt-oss calls a tool": "<|channel|>commentary to=functions.add <|constrain|>json<|message|>42",
    "Seed-OSS": "<seed:think>It is 42",
}
TEXTS = "".join([*WRITTEN.values(), *UNFINISHED.values()])
MARKS = sorted({*re.findall(r"</?[a-z:_]+>|<\|?\w+\|?>|◁/?think▷|\[/?THINK\]", TEXTS), "<|return|>"})


@pytest.fixture(scope="module", params=["special", "plain"])
def tokenizer(request, tmp_path_factory):
    """Return a tokenizer of bytes whose marks are special tokens, or tokens that a decoded text keeps."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    own = Tokenizer(models.BPE(letters, merges=[]))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    (own.add_special_tokens if request.param == "special" else own.add_tokens)(MARKS)
    own.add_special_tokens(["<|eos|>"])
    directory = tmp_path_factory.mktemp(request.param)
    PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|eos|>").save_pretrained(directory)
    return load_tokenizer(directory)


def response(tokenizer, text: str) -> Response:
    return Response.unsampled([*tokenizer.encode(text), tokenizer.eos_id])


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
def test_verifiers_read_the_final_answer_alone(tokenizer, written):
    for answer in ("42", "Paris"):
        text, _, judged = judged_text(response(tokenizer, written.replace("42", answer)), tokenizer, None)
        assert final_part(text).strip() in (answer, f"<|START_RESPONSE|>{answer}<|END_RESPONSE|>")
        if "START_RESPONSE" not in final_part(text):
            assert exact_match(judged, problem_with(answer)) and math_verify(judged, problem_with(answer))
        assert mentions_answer(judged, problem_with(answer))
        assert not mentions_answer(judged, problem_with("7")) and not math_verify(judged, problem_with("7"))


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
def test_the_answer_begins_after_the_last_of_several_thoughts(written):
    """A model that thinks again has not meant its first answer."""
    thoughts, answer = parts(written.rpartition("42")[0] + "41" + written)
    assert answer.strip() in ("42", "<|START_RESPONSE|>42<|END_RESPONSE|>") and "41" in thoughts


@pytest.mark.parametrize("written", UNFINISHED.values(), ids=UNFINISHED)
def test_thoughts_that_do_not_end_have_no_final_answer(tokenizer, written):
    text = response_text(response(tokenizer, written), tokenizer)
    assert final_part(text) == "" and not exact_match(text, problem_with("42"))


def test_a_text_for_people_has_one_form_of_thoughts_and_no_special_tokens(tokenizer):
    for name in ("Seed-OSS", "gpt-oss", "Gemma 4", "Kimi-VL"):
        text = readable(tokenizer.encode(WRITTEN[name]), tokenizer)
        assert text.startswith("<think>Is it 7?") and text.endswith("</think>42"), text
        if tokenizer.special_tokens() and "<think>" in tokenizer.special_tokens():
            assert not any(mark in text for mark in MARKS if "think>" not in mark)
    assert readable(tokenizer.encode("<|channel|>final<|message|>42"), tokenizer) == "42"


def test_a_text_without_thoughts_is_its_own_final_answer(tokenizer):
    for text in ("42", "  42\n", "a < b", "analysis: it is 42", "It is final, 42.", "</b> 42", "assistantfinal 42"):
        assert readable(tokenizer.encode(text), tokenizer) == text
        assert parts(text) == (None, text) and num_thoughts(text) == 0


def test_the_first_format_whose_marks_a_text_has_is_that_of_the_text():
    assert final_part("<seed:think>hm</seed:think>Write </think> at the end.") == "Write </think> at the end."
    assert final_part("analysisLet me think.assistantfinal42") == "42", "gpt-oss, in data without special tokens"


@pytest.mark.parametrize("begin", [begin for _, begin, _ in FORMATS])
def test_a_long_text_of_marks_is_cut_before_the_limit_of_a_test(begin):
    """The text has half a million characters; a scan whose time grows with the square takes hours."""
    text = begin.replace("\\", "").replace("?", "") * 20_000 + "<|channel|>" * 20_000 + "analysis" * 20_000
    assert parts(text)[0] is None or parts(text)[1] == ""
