# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The data of a run: tokenizer, problems and prompts, read and checked on every rank before process groups exist."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_selfdistill.config import Config, DataConfig
from megatron_selfdistill.config.schema.method_config import FOUND, FUNCTION, GIVEN
from megatron_selfdistill.config.world_checks import longest_context
from megatron_selfdistill.data.acceptance import load_rule
from megatron_selfdistill.data.contexts import (
    LOOKED_AT,
    ContextCounts,
    HintCost,
    PromptPair,
    about_unknown_tokens,
    check_student_prompt,
    check_teacher_prompt,
    hint_cost,
    mean_cost,
    plan_contexts,
)
from megatron_selfdistill.data.conversations import load_conversations
from megatron_selfdistill.data.problems import Problem, ProblemSet, load_problems, with_solutions_from
from megatron_selfdistill.data.prompts import (
    DEFAULT_TEACHER_TEMPLATE,
    END_OF_THOUGHTS,
    PromptBuilder,
    PromptTemplates,
    PromptView,
)
from megatron_selfdistill.data.records import RecordSource
from megatron_selfdistill.data.replies import Turn, TurnCounts, TurnReader, Unusable
from megatron_selfdistill.data.tokenizer import Tokenizer, load_tokenizer
from megatron_selfdistill.environments import REPLY_ROLES
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.tool_calls import schemas_of, tool_class


@dataclass(frozen=True)
class RunData:
    """The problems that a run trains on and evaluates, the tokenizer, and the builder of prompts."""

    tokenizer: Tokenizer
    builder: PromptBuilder
    problems: ProblemSet
    """Problems whose contexts fit."""
    counts: ContextCounts
    """Numbers of problems that were kept, had their solution shortened, or were dropped."""
    evaluation: list[Problem]
    vocab_size: int
    """Tokens of the vocabulary, without padding."""
    max_length: int
    """Length of the longest context, in tokens."""
    stop_token_ids: tuple[int, ...]
    about_prompts: str | None = None
    """Line for the log about the tokens that the teacher's prompts add, and about unknown tokens; None for neither."""
    about_conversations: tuple[str, ...] = ()
    """Lines for the log with numbers of conversations and turns."""
    skipped: tuple[str, ...] = ()
    """One message, with file and line, for every skipped conversation and every unusable turn that was read."""

    @classmethod
    def load(cls, config: Config) -> RunData:
        """Read and check all data of the run.

        Raises: `ConfigError`, which names the file, the line or the key.
        """
        try:
            return cls._load(config)
        except (ValueError, OSError) as error:
            raise ConfigError(str(error)) from error

    @classmethod
    def load_evaluation(cls, config: Config, with_solutions: bool = False) -> RunData:
        """Read and check the problems of ``evaluation.path``; the result has no problems to train on.

        With ``with_solutions`` every problem must have a solution.  Prompts may be as long as the model and
        ``data.max_length`` allow, since nothing is packed.

        Raises: `ConfigError`, which names the file, the line or the key.
        """
        data, evaluation = config.data, config.evaluation
        if evaluation.path is None or data.tokenizer is None:
            missing = "evaluation.path" if evaluation.path is None else "data.tokenizer"
            raise ConfigError(f"{missing} is not set: an evaluation needs a file of problems and a tokenizer")
        try:
            tokenizer = _tokenizer(data)
            builder = PromptBuilder(tokenizer, _templates(config))
            return cls(
                tokenizer=tokenizer,
                builder=builder,
                problems=ProblemSet([]),
                counts=ContextCounts(),
                evaluation=_evaluation_problems(
                    config, _evaluation_fields(data), builder, require_solution=with_solutions, hinted=with_solutions
                ),
                vocab_size=_vocab_size(config, tokenizer),
                max_length=data.max_length or config.model.max_position_embeddings,
                stop_token_ids=_stop_tokens(config, tokenizer),
            )
        except (ValueError, OSError) as error:
            raise ConfigError(str(error)) from error

    @classmethod
    def of_problem(cls, config: Config, problem: Problem) -> RunData:
        """Return the data of one problem, as those of an evaluation.

        Raises: `ConfigError`, which names the key.
        """
        try:
            assert config.data.tokenizer is not None, "the caller has set data.tokenizer"
            tokenizer = _tokenizer(config.data)
            return cls(
                tokenizer=tokenizer,
                builder=PromptBuilder(tokenizer, _templates(config)),
                problems=ProblemSet([]),
                counts=ContextCounts(),
                evaluation=[problem],
                vocab_size=_vocab_size(config, tokenizer),
                max_length=config.data.max_length or config.model.max_position_embeddings,
                stop_token_ids=_stop_tokens(config, tokenizer),
            )
        except (ValueError, OSError) as error:
            raise ConfigError(str(error)) from error

    @classmethod
    def _load(cls, config: Config) -> RunData:
        data = config.data
        if data.path is None or data.tokenizer is None:
            missing = "data.path" if data.path is None else "data.tokenizer"
            raise ConfigError(
                f"{missing} is not set: give a file of problems and a tokenizer, or see `make quickstart`"
            )
        tokenizer = _tokenizer(data)
        if data.kind == "conversations":
            return cls._load_conversations(config, tokenizer)
        builder = PromptBuilder(tokenizer, _templates(config))
        fields: dict[str, str | None] = {**data.fields}
        hint, only_replies = config.needs.hint, config.environment.exists and not config.has_teacher
        # A function of the user may read the solutions; an environment needs none where no teacher sees any.
        of_data = data.solutions in ("given", "other")
        if not of_data or hint not in (GIVEN, FUNCTION) or only_replies:
            fields["solution"] = None
        required = of_data and hint == GIVEN and config.reads_solutions
        problems = load_problems(_record_source(config, fields), require_solution=required)
        shown = with_solutions_from(data.solutions, problems.problems, config.seed, required=config.reads_solutions)
        problems = replace(problems, problems=shown)
        _refuse_shares_in_streams(config, shown)
        max_length = longest_context(config)
        problems, counts, about_prompts = _fitting_problems(problems, builder, max_length, config)
        if config.environment.one_sequence:
            _require_bridges(builder, problems.problems[0], config.has_teacher)
        return cls(
            tokenizer=tokenizer,
            builder=builder,
            problems=problems,
            counts=counts,
            evaluation=_evaluation_problems(config, fields, builder, require_solution=required),
            vocab_size=_vocab_size(config, tokenizer),
            max_length=max_length,
            stop_token_ids=_stop_tokens(config, tokenizer),
            about_prompts=about_prompts,
        )

    @classmethod
    def _load_conversations(cls, config: Config, tokenizer: Tokenizer) -> RunData:
        data, wanted, max_length = config.data, config.conversations, longest_context(config)
        builder = PromptBuilder(tokenizer, _templates(config), wanted.show_contents)
        stop_token_ids = _stop_tokens(config, tokenizer)
        log = load_conversations(
            _record_source(config, data.fields),
            rule=None if config.needs.hint_follows else load_rule(wanted.accepted_rule),
            turns=wanted.turns,
            show_contents=wanted.show_contents,
        )
        skipped = [*log.turns.skipped]
        if config.logged:
            problems, counts = log.turns, ContextCounts()
            reader = _reader(data, builder, stop_token_ids, max_length)
            about_prompts: str | None
            read, unusable, about_prompts = _look_at(problems.problems, reader, config)
            skipped += unusable
            about: tuple[str, ...] = (read,)
        else:
            problems, counts, about_prompts = _fitting_problems(log.turns, builder, max_length, config)
            about = ()
        return cls(
            tokenizer=tokenizer,
            builder=builder,
            problems=problems,
            counts=counts,
            evaluation=_evaluation_problems(config, _evaluation_fields(data), builder),
            vocab_size=_vocab_size(config, tokenizer),
            max_length=max_length,
            stop_token_ids=stop_token_ids,
            about_prompts=about_prompts,
            about_conversations=(log.about, *about),
            skipped=tuple(skipped),
        )


def _require_bridges(builder: PromptBuilder, problem: Problem, has_teacher: bool) -> None:
    """Raise ValueError if the chat template lets no message follow a response that stays as it was sampled."""
    errors = []
    for role in REPLY_ROLES:
        reply = {"role": role, "content": "A reply."}
        try:
            builder.student_bridge(problem, reply, -1)
            if has_teacher:
                builder.teacher_bridge(problem, problem.solution, reply, -1)
        except ValueError as error:
            errors.append(error)
    if len(errors) == len(REPLY_ROLES):
        raise errors[0]


def _refuse_shares_in_streams(config: Config, problems: Sequence[Problem]) -> None:
    """Raise ValueError for a record with several teachers in a step whose number of tokens is not known at once."""
    several = next((problem for problem in problems if problem.shares), None)
    if several is not None and config.rollout.overlap == "stream":
        raise ValueError(
            f"{several.location}: a record with several teachers needs all responses of a step at once: set "
            "rollout.overlap=none, or name one teacher per record"
        )


def _record_source(config: Config, fields: Mapping[str, str | None]) -> RecordSource:
    """Return the records of ``data.path``, which is set, with their columns."""
    data = config.data
    assert data.path is not None
    teachers = config.named_teachers
    return RecordSource(
        *(data.path, data.split, data.subset, fields, data.on_bad_record, data.limit),
        section="data",
        teachers=teachers,
        choice=config.teacher_choice,
    )


def _evaluation_fields(data: DataConfig) -> dict[str, str | None]:
    """Return the columns of held-out problems; the keys messages and id name columns of a log only."""
    ours = ("problem", "solution", "answer") if data.kind == "conversations" else tuple(data.fields)
    return {name: column for name, column in data.fields.items() if name in ours}


def turn_reader(config: Config, run_data: RunData) -> TurnReader:
    """Return the reader of logged turns of the run."""
    return _reader(config.data, run_data.builder, run_data.stop_token_ids, run_data.max_length)


def _reader(data: DataConfig, builder: PromptBuilder, stop_token_ids: tuple[int, ...], max_length: int) -> TurnReader:
    return TurnReader(builder, stop_token_ids, max_length, data.on_long_context, data.on_bad_record)


def _look_at(problems: Sequence[Problem], reader: TurnReader, config: Config) -> tuple[str, list[str], str]:
    """Read a sample of logged turns as the steps will read them, to find an unfit chat template before the start.

    Return a line with their numbers, a message for each unusable turn, and a line about the cost of their prompts.

    Raises: ValueError for an unusable turn that may not be skipped, for a sample without any usable turn, and for a
    teacher's prompt that does not show the accepted answer.
    """
    numbers = sorted(random.Random(f"{config.seed}/turns").sample(range(len(problems)), min(LOOKED_AT, len(problems))))
    looked_at = [problems[number] for number in numbers]
    turns = reader.read(looked_at)
    for turn in turns:
        reader.check(turn)
    counts, unusable = TurnCounts.of(turns), [turn.message for turn in turns if isinstance(turn, Unusable)]
    if not counts.usable:
        raise ConfigError(f"none of {len(turns)} turns that were read can be used; the first: {unusable[0]}")
    which = f"all {len(turns)}" if len(turns) == len(problems) else f"{len(turns)} of {len(problems)}"
    pairs = [(p, turn.prompts) for p, turn in zip(looked_at, turns, strict=True) if isinstance(turn, Turn)]
    shown_part = "accepted answer" if config.needs.hint == GIVEN else "text in place of a hint"
    return f"{which} turns were read: {counts}", unusable, _about_prompts(reader.builder, pairs, shown_part)


def _evaluation_problems(
    config: Config,
    fields: Mapping[str, str | None],
    builder: PromptBuilder,
    require_solution: bool = True,
    hinted: bool = False,
) -> list[Problem]:
    """Read ``evaluation.path`` and check the first student's prompts.

    With ``hinted``, the teacher's prompts are checked, too, and show what data.solutions names.
    """
    evaluation = config.evaluation
    if evaluation.path is None:
        return []
    path, split, subset, limit = evaluation.path, evaluation.split, evaluation.subset, evaluation.limit
    source = RecordSource(path, split, subset, fields, on_bad_record="error", limit=limit, section="evaluation")
    solutions = config.data.solutions
    shows_solutions = require_solution and solutions in ("given", "other")
    problems = load_problems(source, require_solution=shows_solutions).problems
    if hinted:
        problems = with_solutions_from(solutions, problems, config.seed)
    prompts = [builder.student_prompt(problem) for problem in problems[:LOOKED_AT]]
    for problem, student in zip(problems, prompts, strict=False):
        check_student_prompt(builder, problem, student)
        if hinted:
            check_teacher_prompt(builder, problem, student, builder.teacher_prompt(problem), problem.solution)
    about_unknown_tokens(builder.tokenizer, prompts)
    return problems


def _about_prompts(builder: PromptBuilder, looked_at: Sequence[tuple[Problem, PromptPair]], shown_part: str) -> str:
    """Check that the prompts show problem and solution, and return a line about their cost and unknown tokens.

    ``shown_part`` is the name of the solution in that line.

    Raises: ValueError for the first prompt that does not show its texts, and if most of them are unknown tokens.
    """
    costs: list[HintCost] = []
    for problem, pair in looked_at:
        student, teacher = pair.student_prompt, pair.teacher_prompt
        check_student_prompt(builder, problem, student)
        check_teacher_prompt(builder, problem, student, teacher, pair.solution)
        costs.append(hint_cost(builder, problem, student, teacher))
    cost = mean_cost(costs)
    students, teachers = zip(*((pair.student_prompt, pair.teacher_prompt) for _, pair in looked_at), strict=True)
    about = [about_unknown_tokens(builder.tokenizer, students, teachers), _about_views(builder, looked_at[0][0])]
    return (
        f"the teacher's prompt adds {cost.wording:.0f} tokens of wording (data.teacher_template) and on average "
        f"{cost.solution:.0f} of the {shown_part} (in {len(costs)} prompts){''.join(f'; {it}' for it in about if it)}"
    )


def _about_views(builder: PromptBuilder, problem: Problem) -> str | None:
    """Return what the two views begin the response with, and a warning where they are known to fail; None if equal.

    The published pairings are those of the thinking of Qwen3-4B (arXiv 2609.38995).  A generation prompt that closes
    the thoughts, as chat templates write it where thinking is off, leaves the model no room to think.
    """
    student, teacher = builder.generation_prompts(problem)
    if student == teacher:
        return None
    about = f"the student's response begins after {student!r}, and the teacher reads it after {teacher!r}"
    if END_OF_THOUGHTS in student or END_OF_THOUGHTS not in teacher:
        return about
    return (
        f"{about}; warning: the student thinks and the teacher does not, a pairing that is known to collapse: "
        "published runs ended at an accuracy of .00 from about .60 (arXiv 2609.38995), where a thinking teacher of a "
        "student that does not think kept .57; switch thinking off for the student (data.views), or on for both"
    )


def _fitting_problems(
    problems: ProblemSet, builder: PromptBuilder, max_length: int, config: Config
) -> tuple[ProblemSet, ContextCounts, str | None]:
    """Return the problems whose contexts fit, the counts, and a line about the cost of the teacher's prompts.

    The first prompts are checked.
    """
    kept, counts = [], ContextCounts()
    looked_at: list[tuple[Problem, PromptPair]] = []
    of_teacher: Counter[str] = Counter()  # each teacher has its own wording
    for problem in problems.problems:  # one by one: the prompts of all problems need not be in memory
        # Own solutions are found later; until then the answer takes their place.
        has_text = problem.solution or not problem.answer or config.data.solutions == "none"
        shown = problem if has_text else replace(problem, solution=problem.answer or "")
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
            for teacher, _ in problem.teacher_shares:
                of_teacher[teacher] += 1
                if of_teacher[teacher] <= LOOKED_AT:
                    looked_at.append(_of_teacher(shown, pairs[0], teacher))
    if not kept:
        raise ConfigError(_none_fits(problems.problems[0], len(problems), builder, max_length, config))
    if not config.has_teacher:
        for problem, pair in looked_at:
            check_student_prompt(builder, problem, pair.student_prompt)
        about = about_unknown_tokens(builder.tokenizer, [pair.student_prompt for _, pair in looked_at])
        return replace(problems, problems=kept), counts, about
    shown_parts = {GIVEN: _SHOWN[config.data.solutions], FOUND: "answer, until there are own solutions"}
    shown_part = shown_parts.get(config.needs.hint, "text in place of a hint")
    return replace(problems, problems=kept), counts, _about_prompts(builder, looked_at, shown_part)


def _of_teacher(problem: Problem, pair: PromptPair, teacher: str) -> tuple[Problem, PromptPair]:
    """Return a problem and its prompts for one of its teachers alone."""
    if not problem.shares:
        return problem, pair
    prompt = next(one.prompt for one in pair.of_teachers if one.teacher == teacher)
    return replace(problem, teacher=teacher, shares=()), replace(pair, teacher_prompt=prompt, teacher=teacher)


_SHOWN = {
    "given": "solution",
    "answer": "answer",
    "other": "solution of another problem (data.solutions=other)",
    "none": "solution, which data.solutions=none leaves out",
}
"""Value of data.solutions -> the name of the text that the teacher's prompt shows."""


def _none_fits(first: Problem, number: int, builder: PromptBuilder, max_length: int, config: Config) -> str:
    student = builder.student_prompt(first)
    cost = hint_cost(builder, first, student, builder.teacher_prompt(first))
    return (
        f"{config.data.path}: no problem fits, of {number}: prompt, solution and rollout.max_new_tokens "
        f"({config.rollout.max_new_tokens}) exceed data.max_length ({max_length}) in all records; in the first, "
        f"{first.location}, the problem takes {len(student)} tokens, data.teacher_template {cost.wording} and the "
        f"solution {cost.solution}"
    )


def _tokenizer(data: DataConfig) -> Tokenizer:
    """Load ``data.tokenizer``, which is set, with the chat template of the configuration."""
    assert data.tokenizer is not None
    return load_tokenizer(data.tokenizer, chat_template=_chat_template(data), trust_remote_code=data.trust_remote_code)


def _chat_template(data: DataConfig) -> str | None:
    """Return the value of ``data.chat_template``, or the contents of the file that it names."""
    template = data.chat_template
    if template is None or "{" in template:
        return template
    if not Path(template).is_file():
        raise ConfigError(f"data.chat_template: expected a Jinja template or a file that holds one, got {template}")
    return Path(template).read_text(encoding="utf-8")


def _templates(config: Config) -> PromptTemplates:
    data, shown = config.data, _shown_tools(config)
    return PromptTemplates(
        teacher=data.teacher_template or config.method.teacher_template or DEFAULT_TEACHER_TEMPLATE,
        student=data.student_template,
        student_view=_view(data, data.views.get("student", {}), shown),
        teacher_view=_view(data, data.views.get("teacher", {}), shown),
        of_teachers={
            name: teacher.template or data.student_template
            for name, teacher in config.named_teachers.items()
            if teacher.template is not None or not teacher.is_hinted
        },
        views_of_teachers={
            name: _view(data, data.views.get("teacher", {}) | teacher.view, shown)
            for name, teacher in config.named_teachers.items()
            if teacher.view
        },
    )


def _shown_tools(config: Config) -> dict[str, Any]:
    """Return the variable of the chat template with the tools of the environment; empty without such tools."""
    tools = config.environment.options.get("tools") if config.environment.name == "tools" else None
    return {} if tools is None else {"tools": schemas_of(tool_class(tools))}


def _view(data: DataConfig, own: Mapping[str, Any], shown: Mapping[str, Any]) -> PromptView:
    """Return the view of one prompt: what both prompts share and ``shown``, with what this one has for ``own``."""
    return PromptView(
        system_prompt=own.get("system_prompt", data.system_prompt),
        chat_template_kwargs={**shown, **data.chat_template_kwargs, **own.get("chat_template_kwargs", {})},
        generation_prompt=own.get("generation_prompt"),
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
