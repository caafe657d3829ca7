# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Leakage is counted as it is defined, in every layout."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from megatron_selfdistill.config import MetricsConfig
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.metrics import rollout_metrics
from megatron_selfdistill.metrics.leakage import (
    LeakCounts,
    grams_of_hint,
    hint_counts,
    leak_counts,
    word_counts,
    word_pattern,
)

ONE_RANK = SimpleNamespace(is_first_of_replica=True, world_size=1, device=torch.device("cpu"))
WORDS = ["hint", "reference solution"]


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
    texts = ["".join(chr(i) for i in context.response if i) for context in contexts]  # token 0 is special
    found = rollout_metrics([], grid, leaks=leak_counts(contexts, texts, words))
    assert found.pop("tokens/rollout") == 0
    return found


def metrics_in_layout(sizes: dict[str, int]) -> dict[str, float]:
    from megatron_selfdistill.config import ParallelConfig
    from megatron_selfdistill.distributed import ranks

    grid = ranks.initialize(ParallelConfig(**sizes), 0)
    of_replica = contexts()[grid.dp_rank :: grid.dp_size]
    return leakage_metrics(of_replica[grid.replica_rank :: grid.replica_size], WORDS, grid)


def test_metrics_are_the_shares_of_the_definition():
    num_leaked = num_grams = num_words = num_tokens = 0
    for pair in contexts():
        text, student, teacher = (
            bytes(part).decode() for part in (pair.response, pair.student_prompt, pair.teacher_prompt)
        )
        grams = [text[i : i + 8] for i in range(len(text) - 7)]
        num_leaked += sum(gram in teacher and gram not in student for gram in grams)
        num_grams += len(grams)
        num_words += text.count("Hint")
        num_tokens += len(text)
    found = leakage_metrics(contexts(), WORDS, ONE_RANK)
    assert found == {"leak/hint_8grams": num_leaked / num_grams, "leak/words_per_1000": 1000 * num_words / num_tokens}
    assert 0.02 < found["leak/hint_8grams"] < 0.9 and found["leak/words_per_1000"] > 0


def test_several_replicas_of_several_ranks_have_the_numbers_of_one_rank(ranks):
    alone = leakage_metrics(contexts(), WORDS, ONE_RANK)
    assert ranks.run(metrics_in_layout, {"tensor_model_parallel_size": 2}, world_size=4) == [alone] * 4


def test_eight_tokens_of_the_hint_count_unless_the_prompt_has_them():
    hint = grams_of_hint(ids("abcdefgh, what?"), ids("abcdefgh, what? 12345678!"))
    for response, num_leaked in (("12345678", 1), ("x12345678!", 2), ("abcdefgh", 0), ("1234567", 0), ("1234567x", 0)):
        counts = hint_counts(ids(response), hint)
        assert (counts.hint_grams, counts.grams) == (num_leaked, max(0, len(response) - 7)), response


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("The hint says, and the HINT says", 2),
        ("hints hinted chinthint", 0),
        ("a reference\n solution.", 1),
        ("reference-solution", 0),
        ("hint", 1),
        ("(hint)", 1),
        ("a hint_1", 0),
        ("", 0),
    ],
)
def test_words_are_whole_words_in_either_case(text, count):
    assert word_counts(text, 50, word_pattern(WORDS)) == LeakCounts(words=count, tokens=50)


def test_the_longest_phrase_counts_once_and_signs_are_plain_text():
    pattern = word_pattern(["solution", "given solution", "c++ (given)"])
    assert word_counts("the given solution", 3, pattern).words == 1
    assert word_counts("C++ (given) cxx given", 3, pattern).words == 1


def test_what_cannot_be_counted_has_no_key():
    short = [ContextPair("0", [1], [1, 2], [3] * 7, False)]
    assert leakage_metrics(short, [], ONE_RANK) == {}
    assert leakage_metrics(short, WORDS, ONE_RANK) == {"leak/words_per_1000": 0.0}
    assert leakage_metrics([], WORDS, ONE_RANK) == {}


@pytest.mark.parametrize("words", [[""], ["hint", "  "], [3]])
def test_a_list_with_anything_but_words_is_refused(words):
    with pytest.raises(
        ConfigError,
        match=r"metrics\.leak_words(\[0\] must be a text that is not empty| must hold words or phrases), got",
    ):
        MetricsConfig(leak_words=words)
