# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What a step is about: its problems, the responses to them, and the solutions behind which the teacher reads those."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_selfdistill.config import Config
from megatron_selfdistill.data.chat.replies import Turn
from megatron_selfdistill.data.contexts import ContextPair, PromptPair, build_contexts, fit_teacher_prompt
from megatron_selfdistill.data.problems import Problem, ProblemStream, shard
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.evaluation.verify import check_answers, judge, load_verifier
from megatron_selfdistill.logged import LoggedTurns
from megatron_selfdistill.metrics import Phases
from megatron_selfdistill.rollout.base import Request, Response, Sampler, SamplingParams, response_text, stream_seed
from megatron_selfdistill.rollout.recorded import Recording, record
from megatron_selfdistill.rollout.solutions import OwnSolutions, Score, Search, of_all_replicas, prompts_with
from megatron_selfdistill.rollout.success import SuccessRates, Visit
from megatron_selfdistill.run_data import RunData

Key = tuple[int, str, int]
"""(step, problem id, sample index): what names a sample, and its random stream."""


class Rollouts:
    """Problems, responses and solutions of this replica, step by step.

    Every rank of the world makes the same calls in the same order.  Until `finish_step`, the state is that before the
    step, so that a checkpoint in the middle of one redoes it.
    """

    def __init__(
        self, config: Config, run_data: RunData, grid: RankGrid, sampler: Sampler, phases: Phases, score: Score
    ) -> None:
        """``score``: how learnable responses are (`OwnSolutions`, pick=learnable).

        Raises: `ConfigError` where answers are needed and missing; ValueError for a recording that cannot be read.
        """
        self.config, self.run_data, self.grid, self.sampler = config, run_data, grid, sampler
        self._phases, self._score = phases, score
        self._verifier = load_verifier(config.evaluation.verifier)
        self._stream = ProblemStream(run_data.problems, batch_size=config.data.global_batch_size, seed=config.seed)
        self._recording = Recording(config.rollout.replay) if config.rollout.replay else None
        self._success = SuccessRates(config.rollout.guide_below) if config.rollout.guide_below is not None else None
        self._own: OwnSolutions | None = None
        if config.data.solutions == "own":
            wanted = config.solutions
            search = Search(wanted.num_samples, wanted.keep, wanted.pick, config.seed)
            self._own = OwnSolutions(search, wanted.refresh_every)
        if self._own is not None or self._success is not None:
            check_answers(run_data.problems.problems, self._verifier)
        self._sampler_step: int | None = None  # whose weights the sampler has
        self._before: dict[str, Any] = {}  # while a step is under way: what it has changed, as it was before
        self._visits: list[Visit] = []  # of the step under way
        self._metrics: dict[str, float] = {}
        self._logged = LoggedTurns(config, run_data, grid, self._stream) if config.logged else None
        self._turns: dict[str, Turn] = {}  # of this step, where the responses are those of a log

    # -- a step --------------------------------------------------------------------------------------------------

    def next_problems(self, step: int, sampling: SamplingParams) -> list[Problem]:
        """This replica's share of the next global batch; where it is time, solutions are looked for first."""
        self._before = {"stream": self._stream.state_dict()}
        if self._own is not None and self._own.due(step):
            self._before["own"] = self._own.state_dict()
            self._find_solutions(self._own, step, sampling)
        if self._logged is not None:
            return self._next_logged(self._logged)
        batch = self._stream.next_batch()
        first = _first_sample_indices(batch, self.config.rollout.num_samples)
        self._first_samples = shard(first, self.grid.dp_rank, self.grid.dp_size)
        problems = shard(batch, self.grid.dp_rank, self.grid.dp_size)
        self._prompt_pairs = {problem.id: self.prompts(problem) for problem in problems}
        return problems

    def generate(self, problems: Sequence[Problem], step: int, sampling: SamplingParams) -> list[Response]:
        """``rollout.num_samples`` responses per problem, problem by problem, or the one that its log has; `EngineError`
        is raised on all ranks."""
        if self.config.objective == "sft":
            return [self._solution(problem) for problem in problems]
        if self.config.logged:
            return [_logged_response(self._turns[problem.id]) for problem in problems]
        keys = [
            (step, problem.id, first + i)
            for problem, first in zip(problems, self._first_samples, strict=True)
            for i in range(self.config.rollout.num_samples)
        ]
        if self._recording is None:
            self.send_weights(step)
        with self._phases("rollout"):
            responses = self._recording.responses(keys) if self._recording else self._sample(problems, keys, sampling)
            if self.config.rollout.record:
                record(self.config.rollout.record, keys, responses, self.grid.dp_group, self.grid.is_reporter)
        return responses

    def contexts(
        self, problems: Sequence[Problem], responses: Sequence[Response]
    ) -> tuple[list[ContextPair], list[Response]]:
        """Both contexts of each response that is trained on, and those responses."""
        samples = len(responses) // max(len(problems), 1)
        pairs = list(zip([p for p in problems for _ in range(samples)], responses, strict=True))
        if self.config.objective == "rft":
            right = self._right(pairs)
            pairs = [pair for pair, keep in zip(pairs, right, strict=True) if keep]
        if self._own is not None:
            prompts, kept = self._with_own_solutions(self._own, pairs)
        else:
            prompts, kept = [self._prompt_pairs[problem.id] for problem, _ in pairs], [r for _, r in pairs]
        return build_contexts(prompts, kept), kept

    def finish_step(self) -> dict[str, float]:
        """The step is done.  Returns what the sampler and the search for solutions have to say, equal on all ranks."""
        if self._success is not None:
            self._success.record(self._visits)
        self._before, self._visits = {}, []
        metrics, self._metrics = self._metrics | self.sampler.metrics(), {}
        return metrics

    # -- beside a step -------------------------------------------------------------------------------------------

    def send_weights(self, step: int) -> None:
        """The weights of this moment to the sampler, unless it has them."""
        if self._sampler_step != step:
            with self._phases("sync"):
                self.sampler.update_weights(step)
            self._sampler_step = step

    def prompts(self, problem: Problem) -> PromptPair:
        """Both prompts of a problem; the teacher's with the best own solution, where there is one."""
        if self._own is not None and (solution := self._own.solution_for(problem.id)) is not None:
            problem = replace(problem, solution=solution.text)  # what a guided rollout reads
        if problem.id in self._turns:
            return self._turns[problem.id].prompts
        policy = self.config.data.on_long_context
        pair = fit_teacher_prompt(self.run_data.builder, problem, policy=policy, **self._sizes)
        assert pair is not None, "RunData.load kept only the problems that fit"
        return pair

    def solution_read(self, context: ContextPair) -> str:
        """Return the solution that the teacher reads with this response of the present step, in full even where it was
        shortened; "" without a teacher."""
        if self.config.objective != "self_distillation":
            return ""
        if self._own is not None:
            response = Response(context.response, [], [], "length" if context.truncated else "stop")
            own = self._own.solution_for(context.problem_id, response_text(response, self.run_data.tokenizer))
            return own.text if own is not None else ""
        return next(p.solution for p in self.run_data.problems.problems if p.id == context.problem_id)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for the checkpoint; in the middle of a step, what was before it."""
        parts = {"stream": self._stream, "success": self._success, "own": self._own}
        return {
            name: self._before[name] if name in self._before else part and part.state_dict()
            for name, part in parts.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self._stream.load_state_dict(state["stream"])
        for name, part in (("success", self._success), ("own", self._own)):
            if part is not None and state.get(name) is not None:
                part.load_state_dict(state[name])

    # -- what they need ------------------------------------------------------------------------------------------

    @property
    def _sizes(self) -> dict[str, int]:
        return {"max_length": self.run_data.max_length, "max_new_tokens": self.config.rollout.max_new_tokens}

    def _next_logged(self, logged: LoggedTurns) -> list[Problem]:
        with self._phases("read"):
            of_step = logged.next_turns()
        self._turns, self._metrics = of_step.turns, self._metrics | of_step.metrics
        self._prompt_pairs = {problem.id: self.prompts(problem) for problem in of_step.problems}
        return of_step.problems

    def _sample(self, problems: Sequence[Problem], keys: Sequence[Key], sampling: SamplingParams) -> list[Response]:
        guided = {problem.id for problem in problems if self._guides(problem)}
        requests = []
        for key in keys:
            pair, stream = self._prompt_pairs[key[1]], stream_seed(self.config.seed, *key)
            requests.append(Request(pair.student_prompt, stream, pair.teacher_prompt if key[1] in guided else None))
        responses = self.sampler.generate(requests, sampling)
        if self._success is not None:
            self._visits = self._visited(problems, guided, responses)
        return responses

    def _guides(self, problem: Problem) -> bool:
        if self.config.rollout.guidance == "none":
            return False
        if self._own is not None and self._own.solution_for(problem.id) is None:
            return False  # nothing to be guided by
        return self._success is None or self._success.guides(problem.id)

    def _visited(
        self, problems: Sequence[Problem], guided: Collection[str], responses: Sequence[Response]
    ) -> list[Visit]:
        """Those of all replicas' problems, equal on all ranks."""
        samples = self.config.rollout.num_samples
        right = self._right(list(zip([p for p in problems for _ in range(samples)], responses, strict=True)))
        mine = [
            (problem.id, problem.id in guided, sum(right[i * samples : (i + 1) * samples]) / samples)
            for i, problem in enumerate(problems)
        ]
        return of_all_replicas(mine, self.grid)

    def _right(self, pairs: Sequence[tuple[Problem, Response]]) -> list[bool]:
        """Whether each response is right, the same on all ranks of the replica; a truncated one is not."""
        texts = [None if r.truncated else response_text(r, self.run_data.tokenizer) for _, r in pairs]
        questions = {
            (self.grid.dp_rank, i): (problem, text)
            for i, ((problem, _), text) in enumerate(zip(pairs, texts, strict=True))
        }
        verdicts = judge(questions, self._verifier, self.grid)
        return [verdicts[key] for key in questions]

    def _find_solutions(self, own: OwnSolutions, step: int, sampling: SamplingParams) -> None:
        """Of the problems of the coming steps, by the weights of this moment."""
        self.send_weights(step)
        with self._phases("solutions"):
            self._metrics |= own.refresh(
                step,
                self._stream.coming(self.config.solutions.refresh_every),
                self.config.data.global_batch_size,
                grid=self.grid,
                generate=lambda requests: self.sampler.generate(requests, sampling),
                builder=self.run_data.builder,
                verifier=self._verifier,
                score=self._score,
                fits=lambda problem, text: self._prompts_with(problem, text) is not None,
            )

    def _with_own_solutions(
        self, own: OwnSolutions, pairs: Sequence[tuple[Problem, Response]]
    ) -> tuple[list[PromptPair], list[Response]]:
        """The prompts and responses of those that have a solution which is not the response itself."""
        prompts, kept = [], []
        for problem, response in pairs:
            solution = own.solution_for(problem.id, response_text(response, self.run_data.tokenizer))
            prompt_pair = self._prompts_with(problem, solution.text) if solution is not None else None
            if prompt_pair is not None:
                prompts.append(prompt_pair)
                kept.append(response)
        counts = torch.tensor([len(pairs) - len(kept), len(pairs)], device=self.grid.device)
        dist.all_reduce(counts, group=self.grid.dp_group)
        self._metrics["solutions/left_out_share"] = int(counts[0]) / max(int(counts[1]), 1)
        return prompts, kept

    def _prompts_with(self, problem: Problem, solution: str) -> PromptPair | None:
        policy = self.config.data.on_long_context
        return prompts_with(self.run_data.builder, problem, solution, policy=policy, **self._sizes)

    def _solution(self, problem: Problem) -> Response:
        """The solution's own text as the response: what fine-tuning on solutions imitates."""
        limit = self.config.rollout.max_new_tokens
        tokens = [*self.run_data.tokenizer.encode(problem.solution), self.run_data.stop_token_ids[0]]
        unknown = [math.nan] * min(len(tokens), limit)
        return Response(tokens[:limit], unknown, unknown, "stop" if len(tokens) <= limit else "length")


def _logged_response(turn: Turn) -> Response:
    """What another policy wrote, with log-probs that nobody knows."""
    unknown = [math.nan] * len(turn.reply)
    return Response(turn.reply, unknown, unknown, "stop")


def _first_sample_indices(batch: Sequence[Problem], num_samples: int) -> list[int]:
    """0 for each problem; where an epoch ends within the batch a problem can come again, and its samples count on."""
    seen: Counter[str] = Counter()
    first = []
    for problem in batch:
        first.append(seen[problem.id])
        seen[problem.id] += num_samples
    return first
