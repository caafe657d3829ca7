# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The data of a run: tokenizer, problems and prompts, read and checked on every rank before process groups exist."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_selfdistill.checkpoint.formats import directory
from megatron_selfdistill.checkpoint.formats.directory import HF_ASSETS, hf_assets_of
from megatron_selfdistill.config import Config, DataConfig
from megatron_selfdistill.config.schema.data_config import log_reader, plays_episodes, shown_tools
from megatron_selfdistill.config.schema.method_config import FOUND, FUNCTION, GIVEN
from megatron_selfdistill.config.schema.whole_config import record_teachers
from megatron_selfdistill.config.world_checks import longest_context
from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.controls import num_controls
from megatron_selfdistill.data.end_tokens import EndTokens, end_tokens
from megatron_selfdistill.data.fitted_prompts import fit_teacher_prompt
from megatron_selfdistill.data.problems import Problem, ProblemSet, load_problems, with_solutions_from
from megatron_selfdistill.data.prompt_checks import (
    LOOKED_AT,
    HintCost,
    about_date,
    about_prefix,
    about_unknown_tokens,
    check_student_prompt,
    check_teacher_prompt,
    hint_cost,
    mean_cost,
)
from megatron_selfdistill.data.prompt_templates import DEFAULT_TEACHER_TEMPLATE, PromptTemplates, PromptView
from megatron_selfdistill.data.prompts import PromptBuilder
from megatron_selfdistill.data.records import RecordSource
from megatron_selfdistill.data.thoughts import num_thoughts
from megatron_selfdistill.data.tokenizer import Tokenizer, chat_template_text
from megatron_selfdistill.data.tokenizer_files import load_tokenizer
from megatron_selfdistill.errors import ConfigError


@dataclass(frozen=True)
class RunData:
    """The problems that a run trains on and evaluates, the tokenizer, and the builder of prompts."""

    tokenizer: Tokenizer
    builder: PromptBuilder
    problems: ProblemSet
    """Problems whose contexts fit."""
    evaluation: list[Problem]
    vocab_size: int
    """Tokens of the vocabulary, without padding."""
    num_sampled_ids: int
    """Number of ids that samplers choose from, the first ones: those of the tokenizer, unless a key allows all."""
    max_length: int
    """Length of the longest context, in tokens."""
    ends: EndTokens
    """The tokens that end a response."""
    about_prompts: str | None = None
    """Line for the log about the tokens that the teacher's prompts add, and warnings about them; None for neither."""
    first_prompts: Sequence[tuple[list[int], list[int]]] = ()
    """The prompts of student and teacher for the first problems; () in an evaluation."""
    num_shortened: int = 0
    """Number of problems whose solution was shortened to fit."""
    num_too_long: int = 0
    """Number of problems that were dropped since they do not fit."""
    num_controls: int = 0
    """Number of hints of other problems that the teacher reads each response after; 0 for a target without controls."""
    kind: str = "problems"
    """What ``problems`` are, for messages: problems or turns."""
    about_records: tuple[str, ...] = ()
    """Lines for the log with numbers of the records that are no problems."""
    skipped: tuple[str, ...] = ()
    """One message, with file and line, for every such record that was read and cannot be used."""
    skipped_later: Path | None = None
    """The file that will list what a step finds to be unusable; None if all records were read before the first step."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end a response; the first one ends a reply of the chat template, if any does."""
        return self.ends.ids

    @property
    def prompts_digest(self) -> str:
        """Hash of the first prompts, which may depend on the day, and of the ends of responses."""
        return hashlib.sha256(json.dumps([self.first_prompts, sorted(self.ends.ids)]).encode()).hexdigest()[:16]

    @property
    def digest(self) -> str:
        """Hash of all problems and of what `prompts_digest` has."""
        return f"{self.problems.fingerprint}-{ProblemSet(self.evaluation).fingerprint}-{self.prompts_digest}"

    @classmethod
    def load(cls, config: Config) -> RunData:
        """Read and check all data of the run, whose ``data.path`` and ``data.tokenizer`` are set.

        Raises: `ConfigError`, which names the file, the line or the key.
        """
        with _config_errors():
            builder = PromptBuilder(_tokenizer(config.data), _templates(config), config.shows_contents)
            max_length, of_model = longest_context(config), _of_model(config, builder)
            facts: dict[str, Any] = {}
            if log_reader(config) is None:
                problems, evaluation, looked_at = *_problems(config, builder), None
            else:
                source = _record_source(config, config.data.fields)
                problems, looked_at, facts = log_reader(config)(config, source, builder, of_model["ends"], max_length)
                evaluation = _evaluation_problems(config, _evaluation_fields(config.data), builder)
            if looked_at is None:
                problems, counts, looked_at = _fitting_problems(problems, builder, max_length, config)
                facts |= counts
            return cls(
                **of_model,
                **facts,
                problems=problems,
                evaluation=evaluation,
                max_length=max_length,
                about_prompts=_about_prompts(builder, looked_at, config),
                first_prompts=[(pair.student_prompt, pair.teacher_prompt) for _, pair in looked_at],
                num_controls=num_controls(config, problems.problems),
            )

    @classmethod
    def load_evaluation(cls, config: Config, with_solutions: bool = False) -> RunData:
        """Read and check the problems of ``evaluation.path``; the result has no problems to train on.

        ``data.tokenizer`` is set.  With ``with_solutions`` every problem must have a solution.  Prompts may be as long
        as the model and ``data.max_length`` allow, since nothing is packed.

        Raises: `ConfigError`, which names the file, the line or the key.
        """
        with _config_errors():
            builder = PromptBuilder(_tokenizer(config.data), _templates(config))
            fields = _evaluation_fields(config.data)
            solutions = {"require_solution": with_solutions, "hinted": with_solutions}
            return cls._of_evaluation(config, builder, _evaluation_problems(config, fields, builder, **solutions))

    @classmethod
    def of_problem(cls, config: Config, problem: Problem) -> RunData:
        """Return the data of one problem, as those of an evaluation; ``data.tokenizer`` is set.

        Raises: `ConfigError`, which names the key.
        """
        with _config_errors():
            return cls._of_evaluation(config, PromptBuilder(_tokenizer(config.data), _templates(config)), [problem])

    @classmethod
    def _of_evaluation(cls, config: Config, builder: PromptBuilder, problems: list[Problem]) -> RunData:
        prompts = [builder.student_prompt(problem) for problem in problems[:LOOKED_AT]]
        about = (about_prefix(builder.tokenizer, prompts), about_date(builder))
        return cls(
            **_of_model(config, builder),
            problems=ProblemSet([]),
            evaluation=problems,
            max_length=config.data.max_length or config.model.max_position_embeddings,
            about_prompts="; ".join(it for it in about if it) or None,
        )


@contextlib.contextmanager
def _config_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def _problems(config: Config, builder: PromptBuilder) -> tuple[ProblemSet, list[Problem]]:
    """Return the problems of ``data.path`` with the solutions that data.solutions names, and the held-out problems."""
    data, needs = config.data, config.needs
    fields: dict[str, str | None] = {**data.fields}
    only_replies = plays_episodes(config) and not config.has_teacher
    # A function of the user may read the solutions; a reply needs none where no teacher sees any.
    of_data = data.solutions in ("given", "other")
    if not of_data or needs.hint not in (GIVEN, FUNCTION) or only_replies:
        fields["solution"] = None
    required = of_data and needs.hint == GIVEN and needs.reads_solutions
    problems = load_problems(_record_source(config, fields), require_solution=required)
    shown = with_solutions_from(data.solutions, problems.problems, config.seed, required=needs.reads_solutions)
    return replace(problems, problems=shown), _evaluation_problems(config, fields, builder, require_solution=required)


def _record_source(config: Config, fields: Mapping[str, str | None]) -> RecordSource:
    data = config.data
    assert data.path is not None
    place = (data.path, data.split, data.subset, fields, data.on_bad_record, data.limit)
    return RecordSource(*place, section="data", teachers=record_teachers(config))


def _evaluation_fields(data: DataConfig) -> dict[str, str | None]:
    """Return the columns of held-out problems; the keys messages and id name columns of a log only."""
    ours = tuple(data.fields) if data.kind == "problems" else ("problem", "solution", "answer")
    return {name: column for name, column in data.fields.items() if name in ours}


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
    problems = load_problems(source, require_solution=require_solution and solutions in ("given", "other")).problems
    if hinted:
        problems = with_solutions_from(solutions, problems, config.seed)
    prompts = [builder.student_prompt(problem) for problem in problems[:LOOKED_AT]]
    for problem, student in zip(problems, prompts, strict=False):
        check_student_prompt(builder, problem, student)
        if hinted:
            check_teacher_prompt(builder, problem, student, builder.teacher_prompt(problem), problem.solution)
    about_unknown_tokens(builder.tokenizer, prompts)
    return problems


def _about_prompts(
    builder: PromptBuilder, looked_at: Sequence[tuple[Problem, PromptPair]], config: Config
) -> str | None:
    """Check that the first prompts show their texts, and return a line about their cost, with warnings about them.

    Raises: ValueError for the first prompt that does not show its texts, and if most of them are unknown tokens.
    """
    students = [pair.student_prompt for _, pair in looked_at]
    teachers = [pair.teacher_prompt for _, pair in looked_at] if config.has_teacher else []
    for problem, pair in looked_at:
        check_student_prompt(builder, problem, pair.student_prompt)
        if config.has_teacher:
            check_teacher_prompt(builder, problem, pair.student_prompt, pair.teacher_prompt, pair.solution)
    about = [
        _about_hints(builder, looked_at, config) if config.has_teacher else None,
        about_unknown_tokens(builder.tokenizer, students, teachers),
        _about_views(builder, looked_at[0][0]) if config.has_teacher else None,
        about_prefix(builder.tokenizer, [*students, *teachers]),
        about_date(builder),
    ]
    return "; ".join(it for it in about if it) or None


def _about_hints(builder: PromptBuilder, looked_at: Sequence[tuple[Problem, PromptPair]], config: Config) -> str:
    costs: dict[str, list[HintCost]] = {}
    for it, pair in looked_at:
        costs.setdefault(it.teacher, []).append(hint_cost(builder, it, pair.student_prompt, pair.teacher_prompt))
    shown_parts = {GIVEN: _SHOWN[config.data.solutions], FOUND: "answer, until there are own solutions"}
    if config.data.kind != "problems":
        shown_parts = {GIVEN: "accepted answer"}
    shown_part = shown_parts.get(config.needs.hint, "text in place of a hint")
    lines = []
    for name, own in costs.items():
        whose, cost = (f"the prompt of the teacher {name}" if name else "the teacher's prompt"), mean_cost(own)
        lines.append(
            f"{whose} adds {cost.wording:.0f} token{'s' * (round(cost.wording) != 1)} of wording "
            f"(data.teacher_template) and on average {cost.solution:.0f} of the {shown_part} (in {len(own)} prompts)"
        )
    return "; ".join(lines)


def _about_views(builder: PromptBuilder, problem: Problem) -> str | None:
    """Return what the two views begin the response with, and a warning where they are known to fail; None if equal.

    The published pairings are those of the thinking of Qwen3-4B (arXiv 2609.38995).  A generation prompt that closes
    the thoughts, as chat templates write it where thinking is off, leaves the model no room to think.
    """
    student, teacher = builder.generation_prompts(problem)
    if student == teacher:
        return None
    about = f"the student's response begins after {student!r}, and the teacher reads it after {teacher!r}"
    if num_thoughts(student) or not num_thoughts(teacher):
        return about
    return (
        f"{about}; warning: the student thinks and the teacher does not, a pairing that is known to collapse: "
        "published runs ended at an accuracy of .00 from about .60 (arXiv 2609.38995), where a thinking teacher of a "
        "student that does not think kept .57; switch thinking off for the student (data.views), or on for both"
    )


def _fitting_problems(
    problems: ProblemSet, builder: PromptBuilder, max_length: int, config: Config
) -> tuple[ProblemSet, dict[str, Any], list[tuple[Problem, PromptPair]]]:
    """Return the problems whose contexts fit, the counts, and the first problems of each teacher with their prompts."""
    kept, num_shortened = [], 0
    looked_at: list[tuple[Problem, PromptPair]] = []
    of_teacher: Counter[str] = Counter()  # each teacher has its own wording
    teachers = record_teachers(config)
    for problem in problems.problems:  # one by one: the prompts of all problems need not be in memory
        # Own solutions are found later; until then the answer takes their place.
        has_text = problem.solution or not problem.answer or config.data.solutions == "none"
        shown = problem if has_text else replace(problem, solution=problem.answer or "")
        pair = fit_teacher_prompt(
            builder,
            shown,
            max_length=max_length,
            max_new_tokens=config.rollout.max_new_tokens,
            policy=config.data.on_long_context,
        )
        if pair is None:
            continue
        kept.append(problem)
        num_shortened += pair.solution_truncated
        for taught, pair_of_one in teachers.each(shown, pair) if teachers else [(shown, pair)]:
            of_teacher[taught.teacher] += 1
            if of_teacher[taught.teacher] <= LOOKED_AT:
                looked_at.append((taught, pair_of_one))
    if not kept:
        raise ConfigError(_none_fits(problems.problems[0], len(problems), builder, max_length, config))
    counts = {"num_shortened": num_shortened, "num_too_long": len(problems) - len(kept)}
    return replace(problems, problems=kept), counts, looked_at


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
    assert data.tokenizer is not None
    template = chat_template_text(data.chat_template)
    return load_tokenizer(data.tokenizer, chat_template=template, trust_remote_code=data.trust_remote_code)


def _templates(config: Config) -> PromptTemplates:
    data, shown, teachers = config.data, shown_tools(config), record_teachers(config)

    def teacher_view(own: Mapping[str, Any]) -> PromptView:
        return _view(data, data.views.get("teacher", {}) | own, shown)

    return PromptTemplates(
        teacher=data.teacher_template or config.method.teacher_template or DEFAULT_TEACHER_TEMPLATE,
        student=data.student_template,
        student_view=_view(data, data.views.get("student", {}), shown),
        teacher_view=teacher_view({}),
        **(teachers.templates(data.student_template, teacher_view) if teachers else {}),
    )


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


def _of_model(config: Config, builder: PromptBuilder) -> dict[str, Any]:
    """Return the fields of `RunData` that do not depend on the problems."""
    vocab_size = _vocab_size(config, builder.tokenizer)
    return {
        "tokenizer": builder.tokenizer,
        "builder": builder,
        "vocab_size": vocab_size,
        "num_sampled_ids": vocab_size if config.rollout.ids_without_token else builder.tokenizer.vocab_size,
        "ends": _ends(config, builder),
    }


def _ends(config: Config, builder: PromptBuilder) -> EndTokens:
    """Return the tokens that end a response, by the tokenizer and by the files of the model and of the run."""
    assert config.data.tokenizer is not None
    places: list[str | Path] = [config.data.tokenizer, Path(config.run_dir) / HF_ASSETS]
    if config.checkpoint.load is not None and (load := Path(config.checkpoint.load)).exists():
        places.append(hf_assets_of(directory.tracked(load) or load) or load)
    own, variables = config.rollout.stop_token_ids, builder.templates.student_view.chat_template_kwargs
    known = [place for place in places if not isinstance(place, Path) or place.is_dir()]
    return end_tokens(builder.tokenizer, known, own, variables)
