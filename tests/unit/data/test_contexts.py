# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The prompts that fit, the shortening of solutions, and the pairing with responses."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
from tiny import builder, problem
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_selfdistill.data.contexts import ContextPair, PromptPair
from megatron_selfdistill.data.fitted_prompts import fit_teacher_prompt
from megatron_selfdistill.data.given_solutions import build_contexts
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.prompt_checks import (
    HintCost,
    check_student_prompt,
    check_teacher_prompt,
    hint_cost,
    mean_cost,
)
from megatron_selfdistill.data.prompt_templates import PromptView
from megatron_selfdistill.data.prompts import PromptBuilder


@pytest.fixture(scope="module")
def characters(character_directory: Path, plain_template: str) -> PromptBuilder:
    """Return prompts with one token per character; the teacher's prompt is ``H<solution>|<problem>``."""
    return builder(character_directory, plain_template, teacher="H{solution}|{problem}")


@pytest.fixture(scope="module")
def bpe(chat_directory: Path) -> PromptBuilder:
    return builder(chat_directory)


def fit(build: PromptBuilder, which: Problem, max_length: int, policy: str) -> tuple[str, str, bool] | None:
    pair = fit_teacher_prompt(build, which, max_length=max_length, max_new_tokens=10, policy=policy)
    if pair is None:
        return None
    decode = build.tokenizer.decode
    return decode(pair.student_prompt), decode(pair.teacher_prompt), pair.solution_truncated


def test_what_fits_exactly_is_left_alone_and_what_does_not_fit_follows_the_policy(characters: PromptBuilder) -> None:
    for policy in ("error", "drop", "truncate_start", "truncate_end"):
        assert fit(characters, problem("1-1:", "0123"), 20, policy) == ("1-1:", "H0123|1-1:", False)
    long = problem("1-1:", "01234567")
    assert fit(characters, long, 20, "drop") is None
    assert fit(characters, long, 20, "truncate_start") == ("1-1:", "H4567|1-1:", True)
    assert fit(characters, long, 20, "truncate_end") == ("1-1:", "H0123|1-1:", True)
    assert fit(characters, long, 17, "truncate_end") == ("1-1:", "H0|1-1:", True)
    assert fit(characters, long, 16, "truncate_end") is None, "nothing of the solution would be left"
    with pytest.raises(ValueError, match=r"^file\.jsonl:1: .* teacher's .* 10 .*, got 14"):
        fit(characters, long, 20, "error")


def test_what_cannot_be_cut_is_dropped_or_an_error(characters: PromptBuilder) -> None:
    no_room_for_the_frame, long_student = problem("1-1:", "0"), problem("11111111-1:", "0")
    for policy in ("drop", "truncate_start", "truncate_end"):
        assert fit(characters, no_room_for_the_frame, 15, policy) is None
        assert fit(characters, long_student, 20, policy) is None
    with pytest.raises(ValueError, match=r"student's .* 10 .* got 11"):
        fit(characters, long_student, 20, "error")


@pytest.mark.parametrize("policy", ["truncate_start", "truncate_end"])
@pytest.mark.parametrize("room", range(66, 90))
def test_a_cut_solution_is_as_long_as_fits_and_stays_text(bpe: PromptBuilder, policy: str, room: int) -> None:
    solution = "first add the units é数 then the tens, \\boxed{42} " * 4
    which = problem("What is the sum?", solution)
    empty = len(bpe.teacher_prompt(which, ""))
    pair = fit_teacher_prompt(bpe, which, max_length=empty + room - 60 + 10, max_new_tokens=10, policy=policy)
    assert pair is not None and pair.solution_truncated
    # Within a token or two of the room: characters outside the vocabulary are three tokens each.
    assert room - 60 - 3 <= len(pair.teacher_prompt) - empty <= room - 60
    text = bpe.tokenizer.decode(pair.teacher_prompt)
    before, after = bpe.tokenizer.decode(bpe.teacher_prompt(which, "@@")).split("@@")
    kept = text.removeprefix(before).removesuffix(after)
    assert kept and "\ufffd" not in text
    assert solution.endswith(kept) if policy == "truncate_start" else solution.startswith(kept)


def test_contexts_pair_each_response_with_its_prompts() -> None:
    pairs = [PromptPair("a", [1, 2], [1, 2, 3]), PromptPair("b", [4], [5, 6])]
    contexts = build_contexts(pairs, [SimpleNamespace(token_ids=ids, truncated=len(ids) == 1) for ids in ([7, 8], [9])])
    assert contexts == [ContextPair("a", [1, 2], [1, 2, 3], [7, 8], False), ContextPair("b", [4], [5, 6], [9], True)]
    assert [(c.student_length, len(c.teacher_prompt)) for c in contexts] == [(4, 3), (2, 2)]


SHOWN = "{% for m in messages %}<{{ m.role }}>{{ CONTENT }}</>{% endfor %}"
PLAIN, TRIMMED = SHOWN.replace("CONTENT", "m.content"), SHOWN.replace("CONTENT", "m.content | trim")
FIRST_WORDS, LAST_WORDS = SHOWN.replace("CONTENT", "m.content[:30]"), SHOWN.replace("CONTENT", "m.content[-20:]")
EMPTY, CUT = SHOWN.replace("CONTENT", "''"), SHOWN.replace("CONTENT", "m.content.split('-:')[0]")
SOLUTION = "  É: first the UNITS,\n\tthen  the tens; ﬁnally 92, that is 数学 \\boxed{042}!\n"
PROBLEM = problem(" Compute 500 - 408,\nin Full.", SOLUTION, location="sums.jsonl:7")


def lower_casing_word_pieces(directory: Path) -> Path:
    """Return a tokenizer like BERT's: lower case, no accents, words in pieces, unknown words as one token."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.:;!?\\{}<>/-"
    pieces = ["[UNK]", "units", "the", "##he", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(directory)
    return directory


def normalising_sentencepiece(directory: Path) -> Path:
    """NFKC, lower case, white space collapsed, a space put in front, and characters that it does not know."""
    model = io.BytesIO()
    text = "compute the units, first the tens; finally that is in full 0123456789 <user></> -:.!"
    options = {"model_type": "unigram", "vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2}
    options |= {"sentence_iterator": iter([text] * 9), "normalization_rule_name": "nmt_nfkc_cf"}
    sentencepiece.SentencePieceTrainer.train(model_writer=model, **options)
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory


@pytest.fixture(scope="module", params=[lower_casing_word_pieces, normalising_sentencepiece])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp("tokenizer") / "it")


def check(build: PromptBuilder, asked: Problem = PROBLEM, solution: str | None = None) -> None:
    solution = asked.solution if solution is None else solution
    student, teacher = build.student_prompt(asked), build.teacher_prompt(asked, solution)
    check_student_prompt(build, asked, student)
    check_teacher_prompt(build, asked, student, teacher, solution)


@pytest.mark.parametrize("template", [PLAIN, TRIMMED])
@pytest.mark.parametrize("wording", ["{problem}{solution}", "{solution}|{problem}", "数{problem}学{solution}数"])
def test_prompts_that_show_both_texts_pass_with_any_tokenizer(directory: Path, template: str, wording: str) -> None:
    build = builder(directory, template, teacher=wording)
    check(build)
    for solution in ("7", "042", "units 数学", "É the", "a" * 500):
        check(build, solution=solution)


CHOICE = problem("even or odd: units 500 - 408?", "odd", location="sums.jsonl:7")
"""A problem in which its solution stands anyway."""
BESIDE = "{problem}, first the tens -: {solution}"
TOOLS = PromptView(chat_template_kwargs={"tools": [{"type": "function", "function": {"name": "compute"}}]})


@pytest.mark.parametrize(
    ("template", "asked", "templates", "named"),
    [
        (EMPTY, PROBLEM, {}, "student's prompt to show the problem"),
        (PLAIN, PROBLEM, {"student_view": TOOLS, "teacher_view": TOOLS}, "student's prompt to show the tools"),
        (FIRST_WORDS, PROBLEM, {"teacher": "{problem}{solution}"}, "teacher's prompt to show the solution"),
        (
            LAST_WORDS,
            replace(PROBLEM, messages=({"role": "user", "content": "5 - 4 and 8?"},), solution="that is 1"),
            {"teacher": "{problem} It is: {solution}"},
            "teacher's prompt to show the problem",
        ),
        (CUT, CHOICE, {"teacher": BESIDE}, "teacher's prompt to show the solution, got the same"),
    ],
    ids=["no contents", "no tools", "first words", "last words", "a choice"],
)
def test_a_template_that_hides_something_is_refused_without_a_quotation(directory, template, asked, templates, named):
    with pytest.raises(ValueError) as caught:
        check(builder(directory, template, **templates), asked)
    sentence = str(caught.value)
    assert sentence.startswith("sums.jsonl:7: ") and "data.chat_template" in sentence and named in sentence
    assert "units" not in sentence and "500" not in sentence


def test_tools_and_a_choice_that_change_the_prompt_pass(directory: Path) -> None:
    shown = "{% for t in tools %}{{ t.function.name }}:{% endfor %}" + PLAIN
    check(builder(directory, shown, student_view=TOOLS, teacher_view=TOOLS))
    check(builder(directory, PLAIN, teacher=BESIDE), CHOICE)


def test_the_cost_is_the_wording_and_the_solution_in_tokens(bpe: PromptBuilder) -> None:
    student, teacher, empty = (*bpe.prompt_pair(PROBLEM), bpe.teacher_prompt(PROBLEM, ""))
    cost = hint_cost(bpe, PROBLEM, student, teacher)
    assert cost == HintCost(len(empty) - len(student), len(teacher) - len(empty))
    assert cost.wording > 50 and cost.solution > 20, "the default wording is long"
    assert mean_cost([HintCost(2, 5), HintCost(4, 8)]) == HintCost(3, 6.5)
