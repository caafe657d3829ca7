# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Everything that a run reads before it starts: tokenizer, problems, prompts, all checked on every rank
before any process group exists."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_selfdistill.config import Config, ConfigError, DataConfig
from megatron_selfdistill.data.acceptance import load_rule
from megatron_selfdistill.data.contexts import ContextCounts, plan_contexts
from megatron_selfdistill.data.conversations import ConversationSet, load_conversations
from megatron_selfdistill.data.problems import Problem, ProblemSet, load_problems
from megatron_selfdistill.data.prompts import (
    DEFAULT_TEACHER_TEMPLATE,
    PromptBuilder,
    PromptTemplates,
    Tokenizer,
    load_tokenizer,
)
from megatron_selfdistill.data.replies import TurnCounts, TurnReader, Unusable

_LOOKED_AT = 64  # logged turns, before the start


@dataclass(frozen=True)
class Inputs:
    """What is trained and evaluated on, as texts and as the rules that turn texts into prompts."""

    tokenizer: Tokenizer
    builder: PromptBuilder
    problems: ProblemSet
    """Those whose contexts fit."""
    counts: ContextCounts
    """How many problems were kept, had their solution shortened, or were dropped."""
    evaluation: list[Problem]
    vocab_size: int
    """Valid columns of the output layer."""
    max_length: int
    """Longest context in tokens."""
    stop_token_ids: tuple[int, ...]
    about_conversations: tuple[str, ...] = ()
    """What became of a log of conversations, in numbers, for people."""
    left_out: tuple[str, ...] = ()
    """One sentence, with file and line, for every conversation that is left out, and for turns that were read."""

    @classmethod
    def load(cls, config: Config) -> Inputs:
        """Read and check everything; `ConfigError` names the file, the line or the key in one sentence."""
        try:
            return cls._load(config)
        except (ValueError, OSError) as error:
            raise ConfigError(str(error)) from error

    @classmethod
    def load_evaluation(cls, config: Config, with_solutions: bool = False) -> Inputs:
        """Only what is evaluated on, ``evaluation.path``, and how it is shown; there are no problems to train on.

        ``with_solutions``: every problem must have one.  Prompts may be as long as the model and ``data.max_length``
        allow, since nothing is packed.  Raises: `ConfigError` in one sentence.
        """
        data, evaluation = config.data, config.evaluation
        if evaluation.path is None or data.tokenizer is None:
            missing = "evaluation.path" if evaluation.path is None else "data.tokenizer"
            raise ConfigError(f"{missing} is not set: an evaluation needs a file of problems and a tokenizer")
        try:
            tokenizer = load_tokenizer(data.tokenizer, chat_template=_chat_template(data))
            problems = load_problems(
                evaluation.path,
                fields=_evaluation_fields(data),
                on_bad_record="error",
                limit=evaluation.limit,
                require_solution=with_solutions,
            )
            return cls(
                tokenizer=tokenizer,
                builder=PromptBuilder(tokenizer, _templates(data)),
                problems=ProblemSet([]),
                counts=ContextCounts(),
                evaluation=problems.problems,
                vocab_size=_vocab_size(config, tokenizer),
                max_length=data.max_length or config.model.max_position_embeddings,
                stop_token_ids=_stop_tokens(config, tokenizer),
            )
        except (ValueError, OSError) as error:
            raise ConfigError(str(error)) from error

    @classmethod
    def _load(cls, config: Config) -> Inputs:
        data = config.data
        if data.path is None or data.tokenizer is None:
            missing = "data.path" if data.path is None else "data.tokenizer"
            raise ConfigError(
                f"{missing} is not set: give a file of problems and a tokenizer, or see `make quickstart`"
            )
        tokenizer = load_tokenizer(data.tokenizer, chat_template=_chat_template(data))
        if data.kind == "conversations":
            return cls._load_conversations(config, tokenizer)
        builder = PromptBuilder(tokenizer, _templates(data))
        fields: dict[str, str | None] = {**data.fields}
        if data.solutions == "own":
            fields["solution"] = None
        problems = load_problems(
            data.path,
            fields=fields,
            split=data.split,
            on_bad_record=data.on_bad_record,
            limit=data.limit,
        )
        max_length = longest_context(config)
        problems, counts = _those_that_fit(problems, builder, max_length, config)
        return cls(
            tokenizer=tokenizer,
            builder=builder,
            problems=problems,
            counts=counts,
            evaluation=_evaluation_problems(config, fields),
            vocab_size=_vocab_size(config, tokenizer),
            max_length=max_length,
            stop_token_ids=_stop_tokens(config, tokenizer),
        )

    @classmethod
    def _load_conversations(cls, config: Config, tokenizer: Tokenizer) -> Inputs:
        data, wanted, max_length = config.data, config.conversations, longest_context(config)
        assert data.path is not None
        builder = PromptBuilder(tokenizer, _templates(data), wanted.show_contents)
        stop_token_ids = _stop_tokens(config, tokenizer)
        log = load_conversations(
            data.path,
            rule=load_rule(wanted.accepted_rule),
            turns=wanted.turns,
            fields=data.fields,
            split=data.split,
            on_bad_record=data.on_bad_record,
            limit=data.limit,
            show_contents=wanted.show_contents,
        )
        left_out = [*log.turns.skipped]
        if config.logged:
            problems, counts = log.turns, ContextCounts()
            reader = _reader(data, builder, stop_token_ids, max_length)
            read, unusable = _look_at(problems.problems, reader, config.seed)
            left_out += unusable
            about: tuple[str, ...] = (read,)
        else:
            problems, counts = _those_that_fit(log.turns, builder, max_length, config)
            about = ()
        return cls(
            tokenizer=tokenizer,
            builder=builder,
            problems=problems,
            counts=counts,
            evaluation=_evaluation_problems(config, _evaluation_fields(data)),
            vocab_size=_vocab_size(config, tokenizer),
            max_length=max_length,
            stop_token_ids=stop_token_ids,
            about_conversations=(_about(log), *about),
            left_out=tuple(left_out),
        )


def _evaluation_fields(data: DataConfig) -> dict[str, str | None]:
    """Beside a log of conversations, ``messages`` and ``id`` are the log's columns."""
    ours = ("problem", "solution", "answer") if data.kind == "conversations" else tuple(data.fields)
    return {name: column for name, column in data.fields.items() if name in ours}


def _about(log: ConversationSet) -> str:
    return (
        f"{log.num_conversations} conversations, the accepted answer of {log.num_marked} marked in the log and of "
        f"{log.num_conversations - log.num_marked} found by the rule; {log.num_resolved_at_once} without a turn to "
        f"train on; {log.num_later_turns} turns after the accepted answer left out; left out as unresolved: "
        f"{log.num_unresolved}, as bad: {log.turns.num_skipped - log.num_unresolved}"
    )


def turn_reader(config: Config, inputs: Inputs) -> TurnReader:
    """How the run reads logged turns."""
    return _reader(config.data, inputs.builder, inputs.stop_token_ids, inputs.max_length)


def _reader(data: DataConfig, builder: PromptBuilder, stop_token_ids: tuple[int, ...], max_length: int) -> TurnReader:
    return TurnReader(builder, stop_token_ids, max_length, data.on_long_context, data.on_bad_record)


def _look_at(problems: Sequence[Problem], reader: TurnReader, seed: int) -> tuple[str, list[str]]:
    """Some logged turns read as the steps will read them: a template that cannot show them is found before the start.

    Returns what became of them, in numbers, and a sentence for each unusable one.  Raises: ValueError in one sentence
    for one that may not be left out, and where none can be used.
    """
    numbers = sorted(random.Random(f"{seed}/turns").sample(range(len(problems)), min(_LOOKED_AT, len(problems))))
    turns = reader.read([problems[number] for number in numbers])
    for turn in turns:
        reader.check(turn)
    counts, unusable = TurnCounts.of(turns), [turn.sentence for turn in turns if isinstance(turn, Unusable)]
    if not counts.usable:
        raise ConfigError(f"none of {len(turns)} turns that were looked at can be used; the first: {unusable[0]}")
    which = f"all {len(turns)}" if len(turns) == len(problems) else f"{len(turns)} of {len(problems)}"
    return f"{which} turns were read: {counts}", unusable


def _evaluation_problems(config: Config, fields: Mapping[str, str | None]) -> list[Problem]:
    if config.evaluation.path is None:
        return []
    return load_problems(
        config.evaluation.path, fields=fields, on_bad_record="error", limit=config.evaluation.limit
    ).problems


def longest_context(config: Config) -> int:
    """The longest prompt + response in tokens: what the model, the data and one packed row allow."""
    p = config.parallel
    multiple = p.tensor_model_parallel_size * (2 * p.context_parallel_size if p.context_parallel_size > 1 else 1)
    row = config.schedule.max_tokens // multiple * multiple
    if row < 1:
        raise ConfigError(f"schedule.max_tokens ({config.schedule.max_tokens}) must be at least {multiple}")
    wanted = config.data.max_length
    if wanted is not None and wanted > row:
        raise ConfigError(
            f"data.max_length ({wanted}) exceeds the longest row within schedule.max_tokens ({row}); raise the latter"
        )
    if wanted is not None and config.model.provider is None and wanted > config.model.max_position_embeddings:
        raise ConfigError(
            f"data.max_length ({wanted}) exceeds model.max_position_embeddings ({config.model.max_position_embeddings})"
        )
    limit = wanted if wanted is not None else config.model.max_position_embeddings
    return min(limit, row)


def _those_that_fit(
    problems: ProblemSet, builder: PromptBuilder, max_length: int, config: Config
) -> tuple[ProblemSet, ContextCounts]:
    kept, counts = [], ContextCounts()
    for problem in problems.problems:  # one by one: the prompts of a whole data set need not be in memory
        # Own solutions are found later; until then the answer stands for them.
        shown = problem if problem.solution or not problem.answer else replace(problem, solution=problem.answer)
        pairs, count = plan_contexts(
            builder,
            [shown],
            max_length=max_length,
            max_new_tokens=config.rollout.max_new_tokens,
            policy=config.data.on_long_context,
        )
        counts += count
        if pairs:
            kept.append(problem)
    if not kept:
        raise ConfigError(
            f"{config.data.path}: no problem fits: prompt, solution and rollout.max_new_tokens "
            f"({config.rollout.max_new_tokens}) exceed {max_length} tokens in all {len(problems)} records"
        )
    return replace(problems, problems=kept), counts


def _chat_template(data: DataConfig) -> str | None:
    """The template itself, or the contents of the file that ``data.chat_template`` names."""
    template = data.chat_template
    if template is not None and "{" not in template:
        return Path(template).read_text()
    return template


def _templates(data: DataConfig) -> PromptTemplates:
    return PromptTemplates(
        teacher=data.teacher_template if data.teacher_template is not None else DEFAULT_TEACHER_TEMPLATE,
        student=data.student_template,
        system_prompt=data.system_prompt,
        chat_template_kwargs=data.chat_template_kwargs,
    )


def _vocab_size(config: Config, tokenizer: Tokenizer) -> int:
    stated = config.model.vocab_size
    if stated is not None and stated < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {stated}, but {config.data.tokenizer} has {tokenizer.vocab_size} tokens: "
            "the model could not read some of them"
        )
    return stated if stated is not None else tokenizer.vocab_size


def _stop_tokens(config: Config, tokenizer: Tokenizer) -> tuple[int, ...]:
    stops = dict.fromkeys(
        [*([tokenizer.eos_id] if tokenizer.eos_id is not None else []), *config.rollout.stop_token_ids]
    )
    if not stops:
        raise ConfigError(
            f"{config.data.tokenizer} has no end-of-sequence token: name one in rollout.stop_token_ids, "
            "or no response would ever end"
        )
    return tuple(stops)
