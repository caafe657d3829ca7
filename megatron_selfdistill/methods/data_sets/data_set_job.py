# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A data set that a model writes: the problems in groups, each group sampled on all ranks and kept in a journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from megatron_selfdistill.checkpoint.formats.directory import find, iteration_of
from megatron_selfdistill.commands.model_command import phases_shown
from megatron_selfdistill.config import Config
from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.problem_sampler import shard
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.distributed.collectives import gather_items, run_on_rank_0
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.evaluation.inference import Inference, open_inference
from megatron_selfdistill.evaluation.verify import check_answers, load_verifier
from megatron_selfdistill.loss.sharded.vocab_parallel import in_use
from megatron_selfdistill.methods.data_sets.solution_journal import Journal, summarize
from megatron_selfdistill.methods.own_solutions import OwnSolutionsSettings
from megatron_selfdistill.methods.parts.learnability import learnabilities, with_reference
from megatron_selfdistill.methods.parts.solution_search import Attempt, Candidate, Score, solve
from megatron_selfdistill.methods.rlt import explanation_in
from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.pipeline.score import read_tokens
from megatron_selfdistill.rollout.base import Request, Response
from megatron_selfdistill.rollout.sampling import sample_seed
from megatron_selfdistill.sources.configured_source import given_solutions

WORDING = (
    "tokenizer chat_template chat_template_kwargs system_prompt views student_template teacher_template "
    "on_long_context solutions"
).split()

STEP = 0  # the model is not trained here, so every sample belongs to step 0

Lines = list[dict[str, Any]]
"""Lines of the journal, one per problem."""
DataSetWork: TypeAlias = "SolutionWork | ExplanationWork"
"""What a command does with the problems of a data set.  Every rank of the world makes the same calls."""
Solve = Callable[[Sequence[Problem]], Lines]
"""A function that gets the problems of all replicas, and returns the lines of this replica's problems.

The function is a collective of the world.  It raises RuntimeError on every rank where an engine or the verifier failed.
"""


@dataclass(frozen=True)
class WorkWithModel:
    """What both kinds of `DataSetWork` share."""

    config: Config
    """The configuration, whose ``checkpoint.load`` names the model."""
    run_data: RunData
    grid: RankGrid
    model: Path | None
    """The model that the provenance names; None stands for ``checkpoint.load``."""

    def check(self, problems: Sequence[Problem]) -> None:
        """Accept all problems: `RunData.load` has refused those that no command can use."""

    def common_provenance(self, wording: Sequence[str]) -> dict[str, Any]:
        """Return the model, the data and the sampling; ``wording``: the keys of ``data`` of the prompts."""
        config = self.config
        assert config.checkpoint.load is not None
        path, _ = find(Path(config.checkpoint.load))
        names = "engine max_new_tokens temperature top_k top_p".split()
        sampling = {name: getattr(config.rollout, name) for name in names}
        data = asdict(config.data)
        return {
            "model": str((self.model or path).absolute()),
            "iteration": iteration_of(path),
            "data": self.run_data.problems.fingerprint,
            "seed": config.seed,
            "sampling": {**sampling, "stop_token_ids": list(self.run_data.stop_token_ids)},
            "prompts": {name: data[name] for name in wording},
        }


def write_data_set(out: Path, group_size: int, work: DataSetWork) -> None:
    """Work on the problems that the journal lacks, then write the data set to ``out`` and print a summary.

    ``group_size``: the number of problems that are worked on, and saved in the journal, at a time.
    Every rank of the world calls this function; rank 0 writes and prints.  Raises: `ConfigError`, `CheckpointError`.
    """
    grid, problems = work.grid, work.run_data.problems.problems
    work.check(problems)
    journal = Journal(out, {**work.provenance(), "group_size": group_size}, group_size)
    done = run_on_rank_0(lambda: journal.begin(len(problems)))
    if done < len(problems):
        phases = Phases(grid.device)
        with (
            phases_shown(phases, enabled=grid.is_reporter),
            open_inference(work.config, work.run_data, grid, phases) as inference,
            phases("the data set"),
        ):
            solve_group = work.opened(inference)
            for start in range(done, len(problems), group_size):
                group = problems[start : start + group_size]
                try:
                    own = solve_group(group)
                except RuntimeError as error:  # the verifier or an engine failed: the groups in the journal are kept
                    raise ConfigError(f"{error}; after a fix, the same command continues from here") from error
                by_id = {line["problem_id"]: line for line in gather_items(own, grid.dp_group)}
                lines = [by_id[problem.id] for problem in group]
                run_on_rank_0(lambda lines=lines: journal.append(lines))  # type: ignore[misc]
    run_on_rank_0(lambda: journal.finish({problem.id for problem in problems}))
    if grid.is_reporter:
        work.summarize(journal.lines(), out)


def line_of(
    problem: Problem, prompt: str, responses: Sequence[Response], kept: list[dict[str, Any]], **found: Any
) -> dict[str, Any]:
    """Return the journal's line of one problem; ``found``: what the work has found in the ``responses``."""
    return {
        "problem_id": problem.id,
        **question_of(problem),
        "answer": problem.answer,
        "prompt": prompt,
        **found,
        "lengths": [len(response.token_ids) for response in responses],
        "truncated": [response.truncated for response in responses],
        "solutions": kept,
    }


def question_of(problem: Problem) -> dict[str, Any]:
    """Return the fields of a line that ask ``problem``, as ``data.path`` reads them: its text, or its messages."""
    messages = list(problem.messages)
    is_text = len(messages) == 1 and set(messages[0]) == {"role", "content"} and messages[0]["role"] == "user"
    return {"problem": messages[0]["content"]} if is_text else {"messages": messages}


@dataclass(frozen=True)
class SolutionWork(WorkWithModel):
    """The search for solutions to the problems of ``run_data``, on one rank."""

    settings: OwnSolutionsSettings
    """The settings of the search."""

    def provenance(self) -> dict[str, Any]:
        """Return everything that the solutions depend on, except the layout."""
        solutions = self.settings
        wording = "tokenizer chat_template chat_template_kwargs system_prompt views student_template".split()
        if solutions.pick == "learnable":
            wording += ["teacher_template", "on_long_context"]
        return {
            **self.common_provenance(wording),
            "verifier": self.config.evaluation.verifier,
            "confidence": self.config.evaluation.confidence,
            **{name: getattr(solutions, name) for name in ("num_samples", "keep", "pick", "alpha", "ratio_weight")},
        }

    def check(self, problems: Sequence[Problem]) -> None:
        """Raise `ConfigError` for problems that cannot be verified or scored, and for an impossible loss.backend."""
        config = self.config
        try:
            check_answers(problems, load_verifier(config.evaluation.verifier))
            if self.settings.pick == "learnable":
                for problem in problems:
                    with_reference(problem)
                dtype = torch.bfloat16 if config.optimizer.precision == "bf16" else torch.float32
                in_use(config.loss.backend, self.grid.device, dtype)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def opened(self, inference: Inference) -> Solve:
        """Return the function that solves a group of problems.

        Raises: `ConfigError` if the model cannot have the configured ``loss.fused``.
        """
        score = self._scorer(inference) if self.settings.pick == "learnable" else None
        return lambda group: self._solve(group, inference, score)

    def summarize(self, lines: Iterator[dict[str, Any]], out: Path) -> None:
        """Print the share of right samples, and the number of solutions in ``out``."""
        summarize(lines, out, self.settings.num_samples, "solution", "pass rate", lambda line: line["num_correct"])

    def _solve(self, group: Sequence[Problem], inference: Inference, score: Score | None) -> Lines:
        attempts = solve(
            group,
            self.settings,
            STEP,
            seed=self.config.seed,
            generate=lambda requests: inference.sampler.generate(requests, inference.sampling),
            builder=self.run_data.builder,
            verifier=load_verifier(self.config.evaluation.verifier),
            confidence=self.config.evaluation.confidence_pattern,
            grid=self.grid,
            score=score,
        )
        return [self._line(attempt) for attempt in attempts]

    def _scorer(self, inference: Inference) -> Score:
        models = inference.as_both_models(self.config, [[]], self.grid)
        models = replace(models, max_tokens=self.config.schedule.max_tokens)
        return lambda candidates: learnabilities(
            candidates,
            partial(read_tokens, models=models),
            self.config,
            self.run_data,
            self.settings.alpha,
            self.settings.ratio_weight,
        )

    def _line(self, attempt: Attempt) -> dict[str, Any]:
        problem, candidates = attempt.problem, attempt.candidates
        prompt = self.run_data.tokenizer.decode(self.run_data.builder.student_prompt(problem))
        verdicts = [candidate.correct for candidate in candidates]
        kept = [_solution(candidate) for candidate in attempt.kept]
        responses = [candidate.response for candidate in candidates]
        return line_of(problem, prompt, responses, kept, num_correct=sum(verdicts), verdicts=verdicts)


def _solution(candidate: Candidate) -> dict[str, Any]:
    return {
        "sample": candidate.sample,
        "solution": candidate.text,
        "num_tokens": len(candidate.response.token_ids),
        "mean_log_prob": candidate.mean_log_prob,
        "learnability": candidate.score,
    }


@dataclass(frozen=True)
class ExplanationWork(WorkWithModel):
    """The explanations of the solutions of ``run_data``, on one rank.

    A sample is kept if it has its closing tag and an explanation before the tag.  The solution of the data set is the
    explanation, the closing tag and the solution of the data.
    """

    num_samples: int
    """The number of explanations that are sampled per problem."""
    closing_tag: str
    """The text that ends an explanation."""
    keep: int
    """The largest number of explanations per problem that are kept."""

    def provenance(self) -> dict[str, Any]:
        """Return everything that the explanations depend on, except the layout."""
        return {
            **self.common_provenance(WORDING),
            "closing_tag": self.closing_tag,
            "num_samples": self.num_samples,
            "keep": self.keep,
        }

    def opened(self, inference: Inference) -> Solve:
        """Return the function that explains the solutions of a group of problems."""
        return partial(self._explain, inference)

    def summarize(self, lines: Iterator[dict[str, Any]], out: Path) -> None:
        """Print the share of samples with a closing tag, and the number of explanations in ``out``."""
        good, rate = (lambda line: sum(line["closing_tags"])), "samples with the closing tag"
        summarize(lines, out, self.num_samples, "explanation", rate, good)

    def _explain(self, inference: Inference, group: Sequence[Problem]) -> Lines:
        """Return the lines of this replica's problems of ``group``.  Collective over the world."""
        mine = shard(group, self.grid.dp_rank, self.grid.dp_size)
        prompts = given_solutions(self.config, self.run_data)
        pairs = [prompts.pair(problem) for problem in mine]
        requests = [
            Request(pair.teacher_prompt, sample_seed(self.config.seed, STEP, f"explanation/{problem.id}", i))
            for problem, pair in zip(mine, pairs, strict=True)
            for i in range(self.num_samples)
        ]
        responses = inference.sampler.generate(requests, inference.sampling)
        return [
            self._line(problem, pair, responses[n * self.num_samples : (n + 1) * self.num_samples])
            for n, (problem, pair) in enumerate(zip(mine, pairs, strict=True))
        ]

    def _line(self, problem: Problem, pair: PromptPair, responses: Sequence[Response]) -> dict[str, Any]:
        tag, tokenizer = self.closing_tag, self.run_data.tokenizer
        explanations = [explanation_in(response, tokenizer, tag) for response in responses]
        kept: list[dict[str, Any]] = []
        for i, (response, explanation) in enumerate(zip(responses, explanations, strict=True)):
            text = explanation.text(tokenizer)
            if explanation.has_closing_tag and text and len(kept) < self.keep:
                kept.append(
                    {
                        "sample": i,
                        "solution": f"{text}{tag}{problem.solution}",
                        "explanation": text,
                        "num_tokens": len(response.token_ids),
                        "mean_log_prob": sum(response.log_probs) / len(response.log_probs),
                    }
                )
        tags = [explanation.has_closing_tag for explanation in explanations]
        return line_of(problem, tokenizer.decode(pair.teacher_prompt), responses, kept, closing_tags=tags)
