# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The results of an evaluation: verdicts on responses, shares, estimates and transcripts."""

from __future__ import annotations

import json
from dataclasses import dataclass

from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.evaluation.estimators import majority_at_k, pass_at_k


@dataclass(frozen=True)
class Transcript:
    """One response as text."""

    problem_id: str
    sample: int | None
    """Index of the sample; None is the greedy response."""
    prompt: str
    """With its special tokens."""
    response: str
    """As the verifier saw it."""
    correct: bool
    length: int
    """Tokens, with the stop token."""
    truncated: bool
    """It reached the limit; it then counts as wrong."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on one response."""

    correct: bool
    length: int
    """Tokens, with the stop token."""
    truncated: bool
    """It reached the limit; it then counts as wrong."""
    answer: str | None
    """What it votes for in a majority (`voted_answer`); None where it is truncated or says nothing, and where the
    evaluation reads no votes."""


@dataclass(frozen=True)
class ProblemResult:
    """The verdicts on the responses to one problem."""

    id: str
    greedy: Verdict
    samples: list[Verdict]

    @property
    def num_correct(self) -> int:
        """The number of correct samples."""
        return sum(verdict.correct for verdict in self.samples)

    def avg(self) -> float:
        """Return avg@k for every k: its estimate from all samples is the share of correct samples."""
        return self.num_correct / len(self.samples)

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
    """All that were judged, greedy and sampled."""
    num_with_answer: int
    """Those that mention the answer (`mentions_answer`) and did not reach the limit."""
    examples: list[tuple[Problem, str]]
    """The first ones' problems, and the ends of these responses."""

    def lines(self, verifier: str, show_contents: bool = True) -> list[str]:
        """Return the lines about these responses for the log.

        ``verifier``: the value of evaluation.verifier.  ``show_contents``: whether the lines may quote responses.
        """
        remedy = _REMEDIES.get(verifier, "look at what your verifier compares")
        shown = [
            f"  {problem.location}: the answer {json.dumps(problem.answer, ensure_ascii=False)}, "
            f"the end of the response {json.dumps(end, ensure_ascii=False)}"
            for problem, end in self.examples
        ]
        return [
            f"0 of {self.num_responses} responses are right by evaluation.verifier={verifier}, but "
            f"{self.num_with_answer} of them mention the answer: {remedy}",
            *(shown if show_contents else ()),
        ]


_REMEDIES = {
    "exact_match": (
        "exact_match compares the whole of the last \\boxed{..}, of what follows the last ####, or of the last line; "
        "set evaluation.verifier=math_verify, or name a function of your own"
    ),
    "math_verify": (
        "math_verify reads the last formula or number; ask for a form that it reads, such as \\boxed{..}, with "
        "data.system_prompt, or name a function of your own in evaluation.verifier"
    ),
}


@dataclass(frozen=True)
class EvaluationResult:
    """The numbers of an evaluation; shares refer to all responses of the kind, and lengths are in tokens."""

    num_problems: int
    num_samples: int
    """Sampled responses per problem; what is said of samples is None where there are none."""
    greedy_accuracy: float
    greedy_mean_length: float
    greedy_truncated_share: float
    sampled_accuracy: float | None
    sampled_mean_length: float | None
    sampled_truncated_share: float | None
    pass_at_k: dict[int, float]
    """k -> mean over problems of the unbiased estimate from the samples."""
    majority_at_k: dict[int, float]
    """The same of the majority's answer."""
    problems: list[ProblemResult]
    """One per problem, in their order."""
    transcripts: list[Transcript]
    """The responses to the first problems: the greedy one, then the samples, problem by problem."""
    overlooked: Overlooked | None = None
    """None where a response is right, or none mentions its answer."""

    def metrics(self, prefix: str = "evaluation") -> dict[str, float]:
        """Return the numbers under flat keys, such as evaluation/greedy_accuracy and evaluation/pass_at_8.

        avg_at_N of N samples is another name of sampled_accuracy.
        """
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, float)}
        if self.sampled_accuracy is not None:
            numbers[f"avg_at_{self.num_samples}"] = self.sampled_accuracy
        numbers |= {f"pass_at_{k}": value for k, value in self.pass_at_k.items()}
        numbers |= {f"majority_at_{k}": value for k, value in self.majority_at_k.items()}
        return {f"{prefix}/{name}": value for name, value in numbers.items()}
