# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The turns of a step are the next usable turns of the log, divided among the replicas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch

from megatron_selfdistill.chat_logs import logged_responses
from megatron_selfdistill.chat_logs.logged_responses import LikelyTurns, down_weighted, dropped
from megatron_selfdistill.chat_logs.replies import Turn, Unusable
from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.problem_sampler import ProblemSampler
from megatron_selfdistill.data.problems import Problem, ProblemSet
from megatron_selfdistill.distributed.ranks import initialize
from megatron_selfdistill.loss.weighting import TokenOwners

NUM_TURNS, BATCH_SIZE, STEPS = 20, 6, 5
LONG, BAD = {"3", "8", "11"}, {"5", "14"}


class Reader:
    """A reader that refuses the turns LONG and BAD, none of which is an error."""

    data = SimpleNamespace(on_long_context="drop")

    def read(self, problems: Sequence[Problem]) -> list[Turn | Unusable]:
        return [
            Unusable(f"turn {problem.id}", too_long=problem.id in LONG)
            if problem.id in LONG | BAD
            else Turn(PromptPair(problem.id, [1], [2]), [int(problem.id)], accepted=False)
            for problem in problems
        ]

    def check(self, turn: Turn | Unusable) -> None:
        return None


def turns_of_steps(run_dir: Path) -> list[dict[str, Any]]:
    """Return the ids, the replies and the counts of each step on this replica."""
    grid = initialize(models.parallel(), seed=1)
    problems = [Problem(str(i), ({"role": "user", "content": str(i)},), "", None, f"log:{i}") for i in range(NUM_TURNS)]
    run_data = SimpleNamespace(problems=ProblemSet(problems), builder=None, ends=None, max_length=None)
    sampler = ProblemSampler(run_data.problems, batch_size=BATCH_SIZE, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logged_responses, "TurnReader", lambda *fields: Reader())
        turns = logged_responses.LoggedTurns(SimpleNamespace(run_dir=run_dir, data=None), run_data, grid)
    steps = [turns.next_turns(sampler) for _ in range(STEPS)]
    return [
        {"ids": [problem.id for problem, _ in read], "replies": [turn.reply for _, turn in read], "counts": counts}
        for read, counts in steps
    ]


def test_the_next_usable_turns_are_divided_among_the_replicas(ranks, tmp_path):
    [whole] = ranks.run(turns_of_steps, tmp_path / "one", world_size=1)
    halves = ranks.run(turns_of_steps, tmp_path / "two", world_size=2)
    for step, *of_replicas in zip(whole, *halves, strict=True):
        assert len(step["ids"]) == BATCH_SIZE and not set(step["ids"]) & (LONG | BAD)
        for dp_rank, part in enumerate(of_replicas):
            assert part["ids"] == step["ids"][dp_rank::2]
            assert part["replies"] == [[int(name)] for name in part["ids"]]
            assert part["counts"] == step["counts"]
    ids = [name for step in whole[:2] for name in step["ids"]]
    assert len(set(ids)) == 2 * BATCH_SIZE, "no turn comes twice in an epoch"
    skipped = [sum(step["counts"][f"turns/skipped_{kind}"] for step in whole) for kind in ("long", "bad")]
    assert skipped[0] >= len(LONG) and skipped[1] >= len(BAD)
    for name in ("one", "two"):
        lines = (tmp_path / name / logged_responses.SKIPPED_FILE).read_text().splitlines()
        assert sorted(lines) == sorted(f"turn {name}" for name in LONG | BAD), "each unusable turn is listed once"


LENGTHS = [2, 3, 1]
TURNS = torch.tensor([0, 0, 1, 1, 1, 2])
LOG_PROBS = torch.tensor([-1.0, -3.0, -4.0, -2.0, -6.0, -9.0])  # means -2, -4, -9


@pytest.mark.parametrize(
    ("weight", "expected"), [(dropped, [1, 0, 0]), (down_weighted, [1, math.exp(-1), math.exp(-6)])]
)
def test_the_tokens_of_a_turn_share_the_weight_of_its_mean_log_prob(weight, expected):
    weights = LikelyTurns(TokenOwners.of(LENGTHS, lambda sums: sums), -3.0, weight)
    rows = torch.tensor([5, 0, 3, 1, 4, 2])  # rows are packed in another order than the responses
    found = weights(LOG_PROBS[rows].requires_grad_(), rows).divergence
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32)[TURNS[rows]])
    assert not found.requires_grad


def test_a_turn_on_the_threshold_is_likely_and_one_that_is_spread_over_ranks_is_judged_as_a_whole():
    """This rank holds the first token of the second turn; `over_ranks` returns the sums of all ranks."""
    whole = LikelyTurns(TokenOwners.of(LENGTHS[:1], lambda sums: sums), -2.0, dropped)
    assert whole(LOG_PROBS[:2], torch.arange(2)).divergence.tolist() == [1, 1]
    everyone = torch.tensor([[-4.0], [2.0]], dtype=torch.float64)
    weights = LikelyTurns(TokenOwners.of(LENGTHS[:1], lambda sums: everyone), -1.5, dropped)
    assert weights(LOG_PROBS[:1], torch.tensor([0])).divergence.tolist() == [0], "-1 alone would be likely"
