# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Which right responses does each rule of method.pick keep?  The task is experiments/choosing_subtraction.py.

A base samples responses of up to three attempts.  The teacher, which is the base after a hint, names the right letter
at once.  The table compares the kept responses: their attempts, the share whose first attempt is right, and their
statistics under both models.  `log-ratio` is the score of version 0.1.0, with log p_teacher - log p of the sampled
token in place of the divergence.  All figures are means over problems with several different right responses.

    python experiments/learnable_picks.py
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import choosing_subtraction

from _lib.command_line import CONFIG_NAME, prepare_process
from _lib.pretraining import Base, prepared_base, write_records

if TYPE_CHECKING:  # torch and Megatron are imported by the functions that need them, so that --help answers at once
    from megatron_selfdistill.methods.parts.learnability import Scores

ALPHA = 0.01


@dataclass(frozen=True)
class RightResponse:
    """A right response with its statistics under student and teacher."""

    problem_id: str
    text: str
    num_tokens: int
    scores: Scores
    mean_log_ratio: float
    """Mean over the tokens of log p_teacher - log p."""
    max_log_ratio: float
    """Maximum over the tokens of log p_teacher - log p."""

    @property
    def by_log_ratio(self) -> float:
        """The score with the sampled log-ratio in place of the divergence."""
        likelihood = self.scores.mean_log_prob + ALPHA * self.scores.min_log_prob
        return likelihood - (self.mean_log_ratio + ALPHA * self.max_log_ratio)


RULES: dict[str, Callable[[RightResponse], float]] = {
    "random": lambda response: random.Random(f"{response.problem_id}/{response.text}").random(),
    "shortest": lambda response: -response.num_tokens,
    "most_likely": lambda response: response.scores.mean_log_prob,
    "log-ratio": lambda response: response.by_log_ratio,
    "learnable, ratio_weight 1": lambda response: response.scores.learnability(ALPHA, 1.0),
    "learnable, ratio_weight 3": lambda response: response.scores.learnability(ALPHA, 3.0),
}
"""Name of a rule -> the value of a response, of which the greatest is kept."""


def main(argv: Sequence[str] | None = None) -> int:
    """Make or find the bases, sample from them, and print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13], help="(default: 11 12 13)")
    parser.add_argument("--directory", type=Path, default=Path("runs"), help="directory of the bases (default: runs)")
    parser.add_argument("--problems", type=int, default=100, help="problems per seed (default: 100)")
    parser.add_argument("--samples", type=int, default=16, help="responses per problem (default: 16)")
    options = parser.parse_args(argv)
    prepare_process()
    kept: dict[str, list[list[RightResponse]]] = {name: [] for name in RULES}
    for seed in options.seeds:
        base = prepared_base(choosing_subtraction.TASK, seed, options.directory)
        problems = write_records(
            options.directory / "learnable_picks" / f"seed{seed}.jsonl", base.task.training_problems(seed)
        )
        groups = several_texts(right_responses(base, problems, options.problems, options.samples))
        for name, chosen in picks(groups).items():
            kept[name].append(chosen)
    print("\n".join(table(kept)))
    return 0


def right_responses(base: Base, problems: Path, num_problems: int, num_samples: int) -> list[RightResponse]:
    """Return the right responses that ``base`` samples to the first problems of a file; the base is also the teacher.

    The function starts and ends the process group of one rank.
    """
    from megatron_selfdistill import config as configuration
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.evaluation.inference import open_inference
    from megatron_selfdistill.evaluation.verify import load_verifier
    from megatron_selfdistill.methods.parts.learnability import candidate_contexts, score_texts
    from megatron_selfdistill.pipeline.score import ScoringModels, read_tokens
    from megatron_selfdistill.rollout.base import Request, response_text
    from megatron_selfdistill.rollout.sampling import sample_seed

    given = (*base.overrides, f"data.path={problems}", f"data.limit={num_problems}", "loss.fused=none")
    config = configuration.load([*given], CONFIG_NAME)
    run_data, verifier = RunData.load(config), load_verifier(config.evaluation.verifier)
    samples = [(problem, i) for problem in run_data.problems.problems for i in range(num_samples)]
    prompt = run_data.builder.student_prompt
    requests = [Request(prompt(p), sample_seed(base.seed, 0, f"solution/{p.id}", i)) for p, i in samples]
    grid = ranks.initialize(config.parallel, config.seed)
    try:
        with open_inference(config, run_data, grid) as inference:
            responses = inference.sampler.generate(requests, inference.sampling)
            texts = [response_text(response, run_data.tokenizer) for response in responses]
            right = [
                (problem, response, text)
                for (problem, _), response, text in zip(samples, responses, texts, strict=True)
                if not response.truncated and verifier(text, problem)
            ]
            chunks, max_tokens = inference.chunks, config.schedule.max_tokens
            models = ScoringModels(chunks, chunks, grid, inference.vocab, max_tokens, fusion=None, backend=None)
            pairs = candidate_contexts([(problem, response) for problem, response, _ in right], config, run_data)
            scores = score_texts(pairs, partial(read_tokens, models=models))
            student, teacher, _ = read_tokens(pairs, models)
    finally:
        ranks.shutdown()
    ratios = (teacher - student).split([len(pair.response) for pair in pairs])
    return [
        RightResponse(problem.id, text, len(ratio), of_text, ratio.mean().item(), ratio.max().item())
        for (problem, _, text), of_text, ratio in zip(right, scores, ratios, strict=True)
    ]


def several_texts(responses: Iterable[RightResponse]) -> list[list[RightResponse]]:
    """Return the responses of each problem with several different texts; the first response of a text counts."""
    by_problem: dict[str, dict[str, RightResponse]] = {}
    for response in responses:
        by_problem.setdefault(response.problem_id, {}).setdefault(response.text, response)
    return [list(texts.values()) for texts in by_problem.values() if len(texts) > 1]


def picks(groups: Sequence[Sequence[RightResponse]]) -> dict[str, list[RightResponse]]:
    """Return, for each rule, the response to each problem that the rule keeps."""
    return {name: [max(group, key=value) for group in groups] for name, value in RULES.items()}


def table(kept: dict[str, list[list[RightResponse]]]) -> list[str]:
    """Return the lines of a Markdown table: of each rule, the figures of its kept responses, one number per seed."""
    lines = ["| rule | attempts | first attempt right | mean log-prob | mean divergence |", "|---|---|---|---|---|"]
    for name, of_seeds in kept.items():
        attempts = [[len(choosing_subtraction.attempts(response.text)) for response in chosen] for chosen in of_seeds]
        cells = (
            (f"{mean(counts):.2f}" for counts in attempts),
            (f"{mean(count == 1 for count in counts):.2f}" for counts in attempts),
            (f"{mean(response.scores.mean_log_prob for response in chosen):.3f}" for chosen in of_seeds),
            (f"{mean(response.scores.mean_kl for response in chosen):.3f}" for chosen in of_seeds),
        )
        lines.append(f"| {name} | {' | '.join(', '.join(cell) for cell in cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
