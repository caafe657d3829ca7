# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Leakage and loops are counted as they are defined, in every layout."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace

import torch

from megatron_selfdistill.config.schema.run_config import MetricsConfig
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.problems import are_one_hint
from megatron_selfdistill.metrics.leakage import (
    LeakCounts,
    ends_in_loop,
    leak_counts,
    word_counts,
    word_pattern,
)
from megatron_selfdistill.metrics.step import rollout_metrics

ONE_RANK = SimpleNamespace(is_first_of_replica=True, world_size=1, device=torch.device("cpu"))
WORDS = ["hint", "reference solution"]
TOKENIZER = SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join(chr(i) for i in ids if i))  # 0 is special


def ids(text: str) -> list[int]:
    return [ord(character) for character in text]


def contexts() -> list[ContextPair]:
    """Return contexts whose responses copy more or less of the hint; letters repeat, so that 8-grams do, too."""
    rng, pairs = random.Random(4), []
    for index in range(7):
        prompt, hint = ("".join(rng.choices("ab", k=30)) for _ in range(2))
        start = rng.randrange(20)
        text = "".join(rng.choices("ab", k=rng.randrange(40))) + hint[start : start + 2 * index] + index % 3 * " Hint!"
        pairs.append(ContextPair(str(index), ids(prompt), ids(prompt + "|" + hint), [*ids(text), 0], False))
    return pairs


def leakage_metrics(contexts, words, grid):
    found = rollout_metrics([], grid, leaks=leak_counts(contexts, words, TOKENIZER))
    assert found.pop("tokens/rollout") == 0
    return found


def metrics_in_layout(sizes: dict[str, int]) -> dict[str, float]:
    from megatron_selfdistill.config import ParallelConfig
    from megatron_selfdistill.distributed import ranks

    grid = ranks.initialize(ParallelConfig(**sizes), 0)
    of_replica = contexts()[grid.dp_rank :: grid.dp_size]
    return leakage_metrics(of_replica[grid.replica_rank :: grid.replica_size], WORDS, grid)


def test_metrics_are_the_shares_of_the_definition():
    num_leaked = num_grams = num_words = num_tokens = num_quoting = 0
    for pair in contexts():
        read = (pair.response, pair.student_prompt, pair.teacher_prompt)
        text, student, teacher = (bytes(part).decode() for part in read)
        grams = [text[i : i + 8] for i in range(len(text) - 7)]
        leaked = [gram for gram in grams if gram in teacher and gram not in student]
        num_leaked += len(leaked)
        num_quoting += bool(leaked)
        num_grams += len(grams)
        num_words += "Hint" in text
        num_tokens += len(text)
    found = leakage_metrics(contexts(), WORDS, ONE_RANK)
    assert found == {
        "leak/hint_8grams": num_leaked / num_grams,
        "leak/words_per_1000": 1000 * num_words / num_tokens,
        "response/quoted_hint_share": num_quoting / len(contexts()),
    }
    assert 0 < num_quoting < len(contexts())
    assert 0.02 < found["leak/hint_8grams"] < 0.9 and found["leak/words_per_1000"] > 0


def test_several_replicas_of_several_ranks_have_the_numbers_of_one_rank(ranks):
    alone = leakage_metrics(contexts(), WORDS, ONE_RANK)
    assert ranks.run(metrics_in_layout, {"tensor_model_parallel_size": 2}, world_size=4) == [alone] * 4


def test_a_response_without_a_hint_is_not_among_those_that_could_quote_one():
    """Two responses have no hint, one quotes its hint twice, and one quotes nothing."""
    prompt, hinted = ids("abcdefgh, what?"), ids("abcdefgh, what? 12345678!")
    pairs = [(prompt, "12345678"), (prompt[:3], "12345678"), (hinted, "12345678 12345678"), (hinted, "1234567")]
    students = [prompt, ids("abcd"), prompt, prompt]
    contexts = [
        ContextPair(str(i), student, teacher, ids(text), False)
        for i, (student, (teacher, text)) in enumerate(zip(students, pairs, strict=True))
    ]
    counts = leak_counts(contexts, [], TOKENIZER)
    assert (counts.quoting, counts.hinted) == (1, 2)
    assert leakage_metrics(contexts, [], ONE_RANK)["response/quoted_hint_share"] == 0.5
    assert "response/quoted_hint_share" not in leakage_metrics(contexts[:2], [], ONE_RANK)


def num_words(text: str, words: Sequence[str] = WORDS) -> int:
    counts = word_counts(text, 50, word_pattern(words))
    assert counts == LeakCounts(words=counts.words, tokens=50)
    return counts.words


def test_words_are_whole_words_in_either_case_and_the_longest_phrase_counts_once():
    for count, texts in {
        0: ["hints hinted chinthint", "reference-solution", "a hint_1", ""],
        1: ["The hint says, and the HINT says", "a reference\n solution.", "hint", "(hint)"],
        2: ["The hint says, and the reference solution"],
    }.items():
        assert {text: num_words(text) for text in texts} == dict.fromkeys(texts, count)
    phrases = ["solution", "given solution", "c++ (given)"]  # signs are plain text
    assert num_words("the given solution", phrases) == num_words("C++ (given) cxx given", phrases) == 1


def test_a_response_that_speaks_of_what_it_was_given_counts_and_the_ordinary_word_does_not():
    words = MetricsConfig().leak_words
    for text in ("Tea is a drink with a hint of flavor.", "Hints of lemon.", "a solution of salt"):
        assert num_words(text, words) == 0
    for text in ("As the hint says, 4.", "By the given  solution", "The reference solution is 4.", "see the hints"):
        assert num_words(text, words) == 1


def test_a_hint_that_all_problems_share_can_not_leak():
    assert are_one_hint(["Answer briefly."] * 3)
    for hints in (["4", "5", "4"], ["4"], ["", ""], []):  # the hints "" come later
        assert not are_one_hint(hints)


def test_what_cannot_be_counted_has_no_key():
    short = [ContextPair("0", [1], [1, 2], [3] * 7, False)]
    assert leakage_metrics(short, [], ONE_RANK) == {}
    assert leakage_metrics(short, WORDS, ONE_RANK) == {"leak/words_per_1000": 0.0}
    assert leakage_metrics([], WORDS, ONE_RANK) == {}


def loops(tokens: Sequence[int]) -> bool:
    """Return by definition whether ``tokens``, or all but the last of them, end in a loop."""
    return any(
        len(part) >= size and all(part[-i] == part[-i - period] for i in range(1, size - period + 1))
        for part in (list(tokens), list(tokens[:-1]))
        for period in range(1, 65)
        for size in [max(3 * period, 24)]
    )


def test_random_responses_loop_as_defined():
    """Random tokens before, within and after a part that repeats, with each period to beyond the bound."""
    rng, found = random.Random(7), []
    for period in range(1, 70):
        for _ in range(12):
            part = rng.choices(range(rng.choice([1, 2, 50])), k=period)
            repeated = (part * 30)[: max(3 * period, 24) + rng.randrange(-2, 3)]
            tokens = rng.choices(range(50), k=rng.randrange(5)) + repeated + rng.choices(range(50), k=rng.randrange(3))
            if rng.random() < 0.2:
                tokens[rng.randrange(len(tokens))] = 51
            found.append(ends_in_loop(tokens))
            assert found[-1] == loops(tokens), tokens
    assert 0.2 < sum(found) / len(found) < 0.8
    loop = [3, 4, 5] * 8
    assert ends_in_loop([*loop, 999]) and not ends_in_loop([*loop, 998, 999]), "one stop token hides no loop"
    assert not ends_in_loop([*loop[1:], 999]), "the stop token is no part of the loop"
