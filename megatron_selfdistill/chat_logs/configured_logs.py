# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The log of conversations that a configuration names, as the data of a run and as the source of its responses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_selfdistill.chat_logs.acceptance import BUILT_IN
from megatron_selfdistill.chat_logs.conversations import load_conversations
from megatron_selfdistill.chat_logs.replies import SKIPPED_FILE, Turn, TurnReader, Unusable, about_turns, turn_counts
from megatron_selfdistill.config import Config, function_named
from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.end_tokens import EndTokens
from megatron_selfdistill.data.problems import Problem, ProblemSet
from megatron_selfdistill.data.prompt_checks import LOOKED_AT
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.data.records import RecordSource
from megatron_selfdistill.errors import ConfigError


def read_log(
    config: Config, source: RecordSource, builder: PromptBuilder, ends: EndTokens, max_length: int
) -> tuple[ProblemSet, Sequence[tuple[Problem, PromptPair]] | None, dict[str, Any]]:
    """Read and check the conversations of ``source``, and look at a sample of the logged turns.

    Returns the turns, some of them with their prompts as the steps will read them (None if the responses to the turns
    are sampled), and the fields of `RunData` that say what was read and skipped.
    ``ends``, ``max_length``: as the fields of `TurnReader`.
    Raises: as `load_conversations`; ValueError for an unusable turn that may not be skipped, and for a sample without
    any usable turn.
    """
    wanted = config.conversations
    rule = None
    if not config.needs.hint_follows:
        rule = function_named("conversations.accepted_rule", wanted.accepted_rule, BUILT_IN)
    log = load_conversations(source, rule=rule, turns=wanted.turns, show_contents=wanted.show_contents)
    hides = config.metrics.show_samples and not wanted.show_contents
    shown = ["metrics.show_samples: no samples, since conversations.show_contents=false"] if hides else []
    if not config.logged:
        facts = {"about_records": (*shown, log.about), "skipped": tuple(log.turns.skipped)}
        return log.turns, None, {"kind": "turns", **facts}
    reader, problems = TurnReader(builder, ends, max_length, config.data), log.turns.problems
    # A sample of the turns, read as the steps will read them, shows an unfit chat template before the start.
    numbers = sorted(random.Random(f"{config.seed}/turns").sample(range(len(problems)), min(LOOKED_AT, len(problems))))
    looked_at = [problems[number] for number in numbers]
    turns = reader.read(looked_at)
    for turn in turns:
        reader.check(turn)
    counts, unusable = turn_counts(turns), [turn.message for turn in turns if isinstance(turn, Unusable)]
    if not counts["usable"]:
        raise ConfigError(f"none of {len(turns)} turns that were read can be used; the first: {unusable[0]}")
    which = f"all {len(turns)}" if len(turns) == len(problems) else f"{len(turns)} of {len(problems)}"
    pairs = [(p, turn.prompts) for p, turn in zip(looked_at, turns, strict=True) if isinstance(turn, Turn)]
    about = f"{which} turns were read: {about_turns(counts)}"
    facts = {"about_records": (*shown, log.about, about), "skipped": (*log.turns.skipped, *unusable)}
    return log.turns, pairs, {"kind": "turns", "skipped_later": Path(config.run_dir) / SKIPPED_FILE, **facts}
