# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A prompt that does not show its problem or its solution is found, with tokenizers that rewrite text too."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_selfdistill.data.hints import HintCost, check_student_prompt, check_teacher_prompt, hint_cost, mean_cost
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompts import PromptBuilder, PromptTemplates
from megatron_selfdistill.data.tokenizer import load_tokenizer

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
TRIMMED = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
EMPTY = "{% for m in messages %}x{% endfor %}"
FIRST_WORDS = "{% for m in messages %}<{{ m.role }}>{{ m.content[:30] }}</>{% endfor %}"
LAST_WORDS = "{% for m in messages %}<{{ m.role }}>{{ m.content[-20:] }}</>{% endfor %}"
SOLUTION = "  É: first the UNITS,\n\tthen  the tens; ﬁnally 92, that is 数学 \\boxed{042}!\n"
PROBLEM = Problem("p", ({"role": "user", "content": " Compute 500 - 408,\nin Full."},), SOLUTION, None, "sums.jsonl:7")


def byte_level(directory: Path) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return saved(tokenizer, directory)


def lower_casing_word_pieces(directory: Path) -> Path:
    """Return a tokenizer like BERT's: lower case, no accents, words in pieces, unknown words as one token."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.:;!?\\{}<>/-"
    pieces = ["[UNK]", "units", "the", "##he", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return saved(tokenizer, directory)


def saved(tokenizer: Tokenizer, directory: Path) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(directory)
    return directory


def normalising_sentencepiece(directory: Path) -> Path:
    """NFKC, lower case, white space collapsed, a space put in front, and characters that it does not know."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            ["compute the units, first the tens; finally that is in full 0123456789 <user></> -:.!"] * 9
        ),
        model_writer=model,
        model_type="unigram",
        vocab_size=60,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc_cf",
        minloglevel=2,
    )
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory


TOKENIZERS: list[Callable[[Path], Path]] = [byte_level, lower_casing_word_pieces, normalising_sentencepiece]


@pytest.fixture(scope="module", params=TOKENIZERS, ids=lambda make: make.__name__)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp("tokenizer") / "it")


def builder(directory: Path, template: str, **templates: str) -> PromptBuilder:
    return PromptBuilder(load_tokenizer(directory, chat_template=template), PromptTemplates(**templates))


def check(build: PromptBuilder, problem: Problem = PROBLEM, solution: str | None = None) -> None:
    solution = problem.solution if solution is None else solution
    student, teacher = build.student_prompt(problem), build.teacher_prompt(problem, solution)
    check_student_prompt(build, problem, student)
    check_teacher_prompt(build, problem, student, teacher, solution)


def refusal(build: PromptBuilder, problem: Problem = PROBLEM) -> str:
    with pytest.raises(ValueError) as caught:
        check(build, problem)
    sentence = str(caught.value)
    assert sentence.startswith("sums.jsonl:7: expected the ") and "data.chat_template" in sentence
    assert "units" not in sentence and "500" not in sentence, "it names the place and quotes nothing"
    return sentence


@pytest.mark.parametrize("template", [PLAIN, TRIMMED])
@pytest.mark.parametrize("wording", ["{problem}{solution}", "{solution}|{problem}", "数{problem}学{solution}数"])
def test_prompts_that_show_both_texts_pass_with_any_tokenizer(directory: Path, template: str, wording: str) -> None:
    build = builder(directory, template, teacher=wording)
    check(build)
    for solution in ("7", "042", "units 数学", "É the", "a" * 500):
        check(build, solution=solution)


def test_a_template_without_contents_is_found_in_the_students_prompt(directory: Path) -> None:
    assert "the student's prompt to show the problem" in refusal(builder(directory, EMPTY))


def test_a_teachers_prompt_that_is_the_students_is_named_as_that(directory: Path) -> None:
    build = builder(directory, "{{ messages[-1].content.split('@')[0] }}", teacher="{problem}@{solution}")
    assert "to show the solution, got the " in (sentence := refusal(build)) and "of the student's prompt" in sentence


def test_a_template_that_cuts_the_solution_or_the_problem_is_refused(directory: Path) -> None:
    assert "to show the solution, got " in refusal(builder(directory, FIRST_WORDS, teacher="{problem}{solution}"))
    hidden = builder(directory, LAST_WORDS, teacher="{problem} It is: {solution}")
    short = Problem("p", ({"role": "user", "content": "5 - 4 and 8?"},), "that is 1", None, "sums.jsonl:7")
    assert "the teacher's prompt to show the problem" in refusal(hidden, short)


def test_a_choice_that_stands_in_the_problem_anyway_must_change_the_prompt(directory: Path) -> None:
    choice = Problem("p", ({"role": "user", "content": "even or odd: units 500 - 408?"},), "odd", None, "sums.jsonl:7")
    hidden = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('-:')[0] }}</>{% endfor %}"
    sentence = refusal(builder(directory, hidden, teacher="{problem}, first the tens -: {solution}"), choice)
    assert "to show the solution, got the same " in sentence and "tokens with and without a solution" in sentence
    check(builder(directory, PLAIN, teacher="{problem}, first the tens -: {solution}"), choice)


def test_a_solution_of_which_the_tokenizer_keeps_nothing_is_not_shown(tmp_path: Path) -> None:
    digits = Tokenizer(models.WordLevel({digit: i for i, digit in enumerate("0123456789")}, unk_token="0"))
    digits.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    digits.normalizer = normalizers.Replace(pattern=Regex("[^0-9]"), content="")
    build = builder(saved(digits, tmp_path / "digits"), PLAIN, teacher="1{problem}{solution}")
    assert "to show the solution" in refusal(
        build, Problem("p", ({"role": "user", "content": "4"},), "seven", None, "sums.jsonl:7")
    )


def test_the_cost_is_the_wording_and_the_solution_in_tokens(chat_directory: Path) -> None:
    build = PromptBuilder(load_tokenizer(chat_directory), PromptTemplates())
    student, teacher, empty = (
        build.student_prompt(PROBLEM),
        build.teacher_prompt(PROBLEM),
        build.teacher_prompt(PROBLEM, ""),
    )
    cost = hint_cost(build, PROBLEM, student, teacher)
    assert cost == HintCost(len(empty) - len(student), len(teacher) - len(empty))
    assert cost.wording > 50 and cost.solution > 20, "the default wording is long"
    assert mean_cost([HintCost(2, 5), HintCost(4, 8)]) == HintCost(3, 6.5)


def test_a_character_that_the_tokenizer_joins_with_the_wording_does_not_hide_a_solution(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    composing = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    composing.normalizer = normalizers.NFC()
    composing.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    composing.decoder = decoders.ByteLevel()
    build = builder(saved(composing, tmp_path / "composing"), PLAIN, teacher="{problem} e{solution}")
    check(build, solution="\u0301 is the accent")
    assert "é is the accent" in build.tokenizer.decode(build.teacher_prompt(PROBLEM, "\u0301 is the accent"))
