# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Templates, tokenizers and the two prompts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompt_templates import PromptTemplates, PromptView
from megatron_selfdistill.data.prompts import PromptBuilder, last_user_text
from megatron_selfdistill.data.tokenizer_files import load_tokenizer

PROBLEM = Problem("p", ({"role": "user", "content": "What is 3 + 4?"},), "It is 7.", "7", "sums.jsonl:1")


def chat(*turns: tuple[str, str], solution: str = "It is 7.") -> Problem:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Problem("p", messages, solution, None, "sums.jsonl:1")


def builder(directory: Path, chat_template: str | None = None, **templates: Any) -> PromptBuilder:
    both = {key: templates.pop(key) for key in ("system_prompt", "chat_template_kwargs") if key in templates}
    views = {f"{name}_view": PromptView(**both, **templates.pop(name + "_only", {})) for name in ("student", "teacher")}
    tokenizer = load_tokenizer(directory, chat_template=chat_template)
    return PromptBuilder(tokenizer, PromptTemplates(**views, **templates))


PHI = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
)
"""A template that writes an end of the text where it writes no generation prompt, like those of Phi-3 and Phi-4."""


def test_a_template_that_ends_the_text_without_a_generation_prompt_gives_both_prompts_the_same_one(chat_directory):
    build = builder(chat_directory, PHI)
    student, teacher = build.prompt_pair(PROBLEM)
    decode = build.tokenizer.decode
    assert decode(student) == "<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n<|im_start|>assistant\n"
    assert decode(teacher).endswith("that a solution was given.<|im_end|>\n<|im_start|>assistant\n")
    assert build.generation_prompts(PROBLEM) == ("<|im_start|>assistant\n",) * 2
    peeking = PHI.replace("assistant\n{%", "assistant{{ ' hinted' * ('hint' in messages[-1].content) }}\n{%")
    with pytest.raises(ValueError, match="generation prompt"):
        builder(chat_directory, peeking).prompt_pair(PROBLEM)


@pytest.mark.parametrize(
    ("view", "template"),
    [("teacher", "{solution}"), ("teacher", "{problem} {solution} {hint}"), ("student", "{problem} {solution}")],
)
def test_a_missing_or_unknown_slot_is_an_error(view: str, template: str) -> None:
    with pytest.raises(ValueError, match=f"{view}_template"):
        PromptTemplates(**{view: template})


def test_a_first_token_is_there_only_if_the_template_writes_it(chat_directory: Path, chat_template: str) -> None:
    assert AutoTokenizer.from_pretrained(chat_directory)("x")["input_ids"][0] == 0, "tokenizing alone adds it"
    assert 0 not in builder(chat_directory).student_prompt(PROBLEM)
    assert builder(chat_directory, "<|endoftext|>" + chat_template).student_prompt(PROBLEM).count(0) == 1


def test_texts_with_braces_and_slots_are_left_alone(chat_directory: Path) -> None:
    problem = chat(("user", "Let {solution} be {x} in {{y}}."), solution=r"\boxed{7} {problem} {0}")
    build = builder(chat_directory, teacher=r"{problem} / {solution} / \boxed{} {{answer}} {{}} { }")
    text = build.tokenizer.decode(build.teacher_prompt(problem))
    wording = r"Let {solution} be {x} in {{y}}. / \boxed{7} {problem} {0} / \boxed{} {answer} {{}} { }"
    assert f"user\n{wording}<|im_end|>" in text
    assert "user\nLet {solution} be {x} in {{y}}.<" in build.tokenizer.decode(build.student_prompt(problem))


def test_the_teachers_wording_replaces_the_last_user_message_only(chat_directory: Path) -> None:
    problem = chat(("system", "S."), ("user", "one"), ("assistant", "a"), ("user", "two"), ("tool", "t"))
    build = builder(chat_directory, teacher="[{problem}|{solution}]", system_prompt="unused")
    assert build.tokenizer.decode(build.teacher_prompt(problem)).startswith(
        "<|im_start|>system\nS.<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\n[two|It is 7.]<|im_end|>\n<|im_start|>tool\nt<|im_end|>\n"
    )
    assert problem.messages[3]["content"] == "two", "the problem itself is not changed"


def test_the_wording_stays_at_the_problem_where_an_environment_has_replied_as_the_user(chat_directory: Path) -> None:
    build = builder(chat_directory, teacher="{problem}|{solution}", student="{problem}?")
    problem = replace(chat(("user", "3 + 4"), ("assistant", "8"), ("user", "Wrong.")), reworded=0)
    assert all(f"user\n{said}<|im_end|>" in build.student_text(problem) for said in ("3 + 4?", "Wrong."))
    assert "user\n3 + 4|It is 7.<|im_end|>" in build.tokenizer.decode(build.teacher_prompt(problem))
    assert last_user_text(problem) == "3 + 4" and last_user_text(replace(problem, reworded=None)) == "Wrong."


THINKING = {"chat_template_kwargs": {"enable_thinking": True}}
AT_ONCE = {"chat_template_kwargs": {"enable_thinking": False}}


def test_each_view_has_its_own_variables_system_prompt_and_generation_prompt(chat_directory: Path) -> None:
    """The lengths and the contents of the generation prompts differ, and neither view reads the other's."""
    build = builder(chat_directory, student_only=AT_ONCE, teacher_only=THINKING | {"system_prompt": "Teach."})
    student, teacher = map(build.tokenizer.decode, build.prompt_pair(PROBLEM))
    assert student == "<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n<|im_start|>assistant\n"
    assert teacher.startswith("<|im_start|>system\nTeach.<|im_end|>\n<|im_start|>user\nWhat is 3 + 4?\n\nHere is")
    assert teacher.endswith("<|im_start|>assistant\n<think>\n")
    assert build.prompt_pair(PROBLEM) == (build.student_prompt(PROBLEM), build.teacher_prompt(PROBLEM))
    assert build.generation_prompts(PROBLEM) == ("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    assert build.filled_text(PROBLEM, "{problem} {more}", {"more": "Why?"}) == student.replace("4?", "4? Why?")
    written = builder(chat_directory, student_only={"generation_prompt": "<|im_start|>assistant\n<think>\n\n"})
    student, teacher = map(written.tokenizer.decode, written.prompt_pair(PROBLEM))
    assert student.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n\n") and student.count("assistant") == 1
    assert teacher.endswith("<|im_start|>assistant\n<think>\n")


def test_generation_prompts_that_differ_are_an_error(chat_directory: Path, chat_template: str) -> None:
    switch = chat_template.replace(
        "{% if enable_thinking is not defined or enable_thinking %}", "{% if '/no_think' not in messages[-1].content %}"
    )
    build = builder(chat_directory, switch)
    build.prompt_pair(PROBLEM)
    with pytest.raises(ValueError, match=r"^sums.jsonl:1: .* generation"):
        build.prompt_pair(chat(("user", "x"), solution="say /no_think"))
    counting = "{% for m in messages %}{{ m.content }}{% endfor %}"
    counting += "{% if add_generation_prompt %}{{ messages|length }}:{% endif %}"
    assert builder(chat_directory, counting).prompt_pair(PROBLEM)
    with pytest.raises(ValueError, match="generation prompt"):
        builder(chat_directory, counting, teacher_only={"system_prompt": "S"}).prompt_pair(PROBLEM)


def test_a_token_that_spans_message_and_generation_prompt_may_differ(chat_directory: Path) -> None:
    plain = "{{ messages[-1].content }}{% if add_generation_prompt %}{{ '\n\n' }}assistant:{% endif %}"
    build = builder(chat_directory, plain, teacher="{problem} {solution} truly.")
    problem = chat(("user", "really?"))
    student, teacher = build.prompt_pair(problem)
    assert build.tokenizer.encode("?\n\n") == build.tokenizer.encode("really?\n\n")[-1:], "one token spans"
    tail = len(build.tokenizer.encode("assistant:"))
    assert student[-tail:] == teacher[-tail:] and student[-tail - 1] != teacher[-tail - 1]
    # One side spans, the other ends cleanly.
    builder(chat_directory, plain, teacher="{problem} {solution} the end").prompt_pair(problem)
    late = plain.replace("assistant:", "assistant {{ messages[-1].content|length }}:")
    with pytest.raises(ValueError, match="generation prompt"):
        builder(chat_directory, late, teacher="{problem} {solution} truly.").prompt_pair(problem)


def test_sentencepiece_text_is_what_the_library_itself_encodes(sentencepiece_file: Path, tmp_path: Path) -> None:
    shutil.copy(sentencepiece_file, tmp_path)
    tokenizer = load_tokenizer(tmp_path)  # a directory with nothing else
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    text = "What is the sum?\n  <|im_start|>seven é 数 <think> tens"
    assert tokenizer.encode(text) == library.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text, "bytes and spaces survive"
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (library.get_piece_size(), library.eos_id())


def test_sentencepiece_control_pieces_become_ids_only_as_a_whole(sentencepiece_file: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_file)
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    ids = tokenizer.encode("<s>What is it?</s>")
    assert ids == [library.bos_id(), *library.encode("What is it?"), library.eos_id()]
    assert tokenizer.decode(ids) == "<s>What is it?</s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "What is it?"
    assert library.bos_id() not in tokenizer.encode("<s what")


def test_a_place_without_a_tokenizer_and_a_tokenizer_without_a_chat_template_are_refused(
    tmp_path: Path, character_directory: Path, sentencepiece_file: Path
) -> None:
    (tmp_path / "broken.model").write_bytes(b"nonsense")
    for place in (tmp_path / "no.model", tmp_path / "broken.model", tmp_path):
        with pytest.raises((FileNotFoundError, ValueError), match=str(place)):
            load_tokenizer(place)
    for place in (character_directory, sentencepiece_file):
        with pytest.raises(ValueError, match=r"data\.chat_template"):
            builder(place).student_prompt(PROBLEM)
