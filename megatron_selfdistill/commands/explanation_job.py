# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The work of `selfdistill explanations` on every rank: sample explanations and join them with the solutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_selfdistill.commands.data_set_job import STEP, Lines, provenance_of, question_of
from megatron_selfdistill.config import Config
from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.problems import Problem, shard
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.evaluation.inference import Inference
from megatron_selfdistill.rollout.base import Request, Response, sample_seed
from megatron_selfdistill.run_data import RunData
from megatron_selfdistill.sources.configured_source import given_solutions
from megatron_selfdistill.sources.explanation_rewards import explanation_in

WORDING = (
    "tokenizer chat_template chat_template_kwargs system_prompt student_template teacher_template on_long_context "
    "solutions"
).split()


@dataclass(frozen=True)
class ExplanationWork:
    """The explanations of the solutions of ``run_data``, on one rank: a `DataSetWork`.

    A sample is kept if it has its closing tag and an explanation before the tag.  The solution of the data set is the
    explanation, the closing tag and the solution of the data.
    """

    config: Config
    run_data: RunData
    grid: RankGrid
    model: Path | None
    """The model that the provenance names; None stands for ``checkpoint.load``."""
    num_samples: int
    """The number of explanations that are sampled per problem."""
    keep: int
    """The largest number of explanations per problem that are kept."""

    def provenance(self) -> dict[str, Any]:
        """Return everything that the explanations depend on, except the layout."""
        return {
            **provenance_of(self.config, self.run_data, self.model, WORDING),
            "closing_tag": self.config.explanation.closing_tag,
            "num_samples": self.num_samples,
            "keep": self.keep,
        }

    def check(self, problems: Sequence[Problem]) -> None:
        """Accept all problems: `RunData.load` has refused problems without a solution."""

    def opened(self, inference: Inference) -> Callable[[Sequence[Problem]], Lines]:
        """Return the function that explains the solutions of a group of problems with the model of ``inference``."""
        return lambda group: self._explain(group, inference)

    def summarize(self, lines: Iterator[dict[str, Any]], out: Path) -> None:
        """Print the share of samples with a closing tag, and the number of explanations in ``out``."""
        num_problems = num_tags = num_truncated = num_kept = num_without = 0
        for line in lines:
            num_problems += 1
            num_tags += sum(line["closing_tags"])
            num_truncated += sum(line["truncated"])
            num_kept += len(line["solutions"])
            num_without += not line["solutions"]
        number = num_problems * self.num_samples
        print(f"{num_problems} problems, {num_tags / number:.1%} of the samples with the closing tag, ", end="")
        print(f"{num_truncated / number:.1%} cut off")
        print(f"{num_without} problems without an explanation")
        print(f"{num_kept} explanations in {out}", flush=True)

    def _explain(self, group: Sequence[Problem], inference: Inference) -> Lines:
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
        """Return the journal's line of one problem."""
        tag, tokenizer = self.config.explanation.closing_tag, self.run_data.tokenizer
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
        return {
            "problem_id": problem.id,
            **question_of(problem),
            "answer": problem.answer,
            "prompt": tokenizer.decode(pair.teacher_prompt),
            "closing_tags": [explanation.has_closing_tag for explanation in explanations],
            "lengths": [len(response.token_ids) for response in responses],
            "truncated": [response.truncated for response in responses],
            "solutions": kept,
        }
