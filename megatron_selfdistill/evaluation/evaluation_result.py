# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The results of an evaluation: verdicts on responses, shares, estimates and transcripts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.distributed.terminal import visible
from megatron_selfdistill.evaluation.estimators import Calibration, majority_at_k, pass_at_k


@dataclass(frozen=True)
class Transcript:
    """The text of one response."""

    problem_id: str
    sample: int | None
    """The index of the sample; None is the greedy response."""
    prompt: str
    """The prompt as text, with its special tokens."""
    response: str
    """The response as the verifier reads it."""
    correct: bool
    length: int
    """The length of the response in tokens, with the stop token."""
    truncated: bool
    """Whether the response reached the length limit; such a response counts as wrong."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on one response."""

    correct: bool
    length: int
    """The length of the response in tokens, with the stop token."""
    truncated: bool
    """Whether the response reached the length limit; such a response counts as wrong."""
    answer: str | None
    """The answer for which the response votes in a majority (`voted_answer`).  None if the response is truncated or
    has no answer, or if the evaluation counts no votes."""
    confidence: float | None = None
    """The confidence in the response (`Confidence`), in [0, 1]; None if it is unknown."""
    states_confidence: bool = False
    """Whether the text of the response states ``confidence``."""
    loops: bool = False
    """Whether the response ends in a loop (`ends_in_loop`)."""
    turns: int = 1
    """The number of responses, of which the verdict is on the last one; ``length`` counts all."""
    reward: float | None = None
    """The sum of the rewards of the responses; None if nothing gives rewards."""


@dataclass(frozen=True)
class ProblemResult:
    """The verdicts on the responses to one problem."""

    id: str
    greedy: Verdict
    samples: list[Verdict]
    distinct_right: int | None = None
    """The number of different answers among the right samples (`diversity.distinct_right`); None without samples."""
    distinct_4grams: float | None = None
    """The share of different 4-grams in the samples (`distinct_grams`); None if the samples have no 4-gram."""

    @property
    def num_correct(self) -> int:
        """The number of correct samples."""
        return sum(verdict.correct for verdict in self.samples)

    def pass_at_k(self, k: int) -> float:
        """Return the estimate of pass@k for this problem (`estimators.pass_at_k`)."""
        return pass_at_k(len(self.samples), self.num_correct, k)

    def majority_at_k(self, k: int) -> float:
        """Return the estimate of majority@k for this problem (`estimators.majority_at_k`)."""
        return majority_at_k([it.answer for it in self.samples], [it.correct for it in self.samples], k)


@dataclass(frozen=True)
class Overlooked:
    """The responses that mention the answer of their problem, in an evaluation without any correct response."""

    num_responses: int
    """The number of judged responses, greedy and sampled."""
    num_with_answer: int
    """The number of responses that mention the answer (`mentions_answer`) and did not reach the length limit."""
    examples: list[tuple[Problem, str]]
    """The first responses that mention the answer: the problem, and the end of the response."""

    def lines(self, verifier: str, show_contents: bool = True) -> list[str]:
        """Return the lines about these responses for the log.

        ``verifier``: the value of evaluation.verifier.  ``show_contents``: whether the lines may quote responses.
        """
        fix = _FIXES.get(verifier, "look at what your verifier compares")
        shown = [
            visible(
                f"  {problem.location}: the answer {json.dumps(problem.answer, ensure_ascii=False)}, "
                f"the end of the response {json.dumps(end, ensure_ascii=False)}"
            )
            for problem, end in self.examples
        ]
        return [
            f"0 of {self.num_responses} responses are right by evaluation.verifier={verifier}, but "
            f"{self.num_with_answer} of them mention the answer: {fix}",
            *(shown if show_contents else ()),
        ]


_FIXES = {
    "exact_match": (
        "exact_match compares the complete last \\boxed{..}, the complete text after the last ####, or the complete "
        "last line; set evaluation.verifier=math_verify, or to the path of your own function"
    ),
    "math_verify": (
        "math_verify reads the last formula or number; ask the model for a readable form, such as \\boxed{..}, with "
        "data.system_prompt, or set evaluation.verifier to the path of your own function"
    ),
}


@dataclass(frozen=True)
class EvaluationResult:
    """The numbers of an evaluation; shares refer to all responses of the kind, and lengths are in tokens.

    A field sampled_NAME is greedy_NAME of the sampled responses.
    """

    num_problems: int
    num_samples: int
    """The number of sampled responses per problem; if the number is 0, the fields about samples are None."""
    greedy_accuracy: float
    greedy_mean_length: float
    greedy_truncated_share: float
    greedy_loop_share: float
    sampled_accuracy: float | None
    sampled_mean_length: float | None
    sampled_truncated_share: float | None
    sampled_loop_share: float | None
    pass_at_k: dict[int, float]
    """k -> the mean over problems of the unbiased estimate of pass@k."""
    majority_at_k: dict[int, float]
    """k -> the mean over problems of the unbiased estimate of majority@k."""
    problems: list[ProblemResult]
    """The results of the problems, in the order of the problems."""
    transcripts: list[Transcript]
    """The responses to the first problems as text: for each problem the greedy response, then the samples."""
    overlooked: Overlooked | None = None
    """The wrong responses that mention the answer; None if a response is right or no response mentions the answer."""
    further: Mapping[str, float] = field(default_factory=dict)
    """Further numbers by the names that docs/metrics.md has under ``evaluation/``; a mean over nothing is not there.
    They are hint_8grams, leak_words_per_1000 and quoted_hint_share of both kinds of responses, over the problems that
    have a solution; with rewards mean_reward and mean_turns; distinct_right and distinct_4grams of the samples."""
    greedy_calibration: Calibration | None = None
    """The calibration of the greedy responses; None if a confidence is unknown."""
    sampled_calibration: Calibration | None = None

    def metrics(self, prefix: str = "evaluation") -> dict[str, float]:
        """Return the numbers under flat keys, such as evaluation/greedy_accuracy and evaluation/pass_at_8.

        avg_at_N of N samples is another name of sampled_accuracy.  pass_over_avg_at_k is pass_at_k over avg_at_N, for
        each k above 1: 1 if the samples of each problem are all right or all wrong, and at most k.
        """
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, float)} | dict(self.further)
        if self.sampled_accuracy is not None:
            numbers[f"avg_at_{self.num_samples}"] = self.sampled_accuracy
        numbers |= {f"pass_at_{k}": value for k, value in self.pass_at_k.items()}
        numbers |= {f"majority_at_{k}": value for k, value in self.majority_at_k.items()}
        if self.sampled_accuracy:
            above_1 = {k: value for k, value in self.pass_at_k.items() if k > 1}
            numbers |= {f"pass_over_avg_at_{k}": value / self.sampled_accuracy for k, value in above_1.items()}
        for kind, found in (("greedy", self.greedy_calibration), ("sampled", self.sampled_calibration)):
            measured = {} if found is None else vars(found)
            numbers |= {f"{kind}_{name}": value for name, value in measured.items() if value is not None}
        return {f"{prefix}/{name}": value for name, value in numbers.items()}

    def records(self, num_problems: int) -> list[dict[str, Any]]:
        """Return the greedy response and the first sample of the first ``num_problems`` problems, as JSON values.

        Only responses among ``transcripts`` are there.
        """
        first = {problem.id for problem in self.problems[:num_problems]}
        shown = [t for t in self.transcripts if t.problem_id in first and t.sample in (None, 0)]
        return [asdict(transcript) for transcript in shown]
