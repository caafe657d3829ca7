# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The work of gradient_alignment.py on every rank: respond, read with every model, complete from every node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from alignment_nodes import CandidateToken, MeasuredNode, Node, chosen_nodes, limit_groups
from torch import Tensor

from megatron_selfdistill.config import Config
from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.fitted_prompts import fit_teacher_prompt
from megatron_selfdistill.data.given_solutions import build_contexts
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.distributed.collectives import gather_items
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.evaluation.inference import Inference, open_inference
from megatron_selfdistill.evaluation.verify import judged_by_all, judged_text, load_verifier, verdict_of
from megatron_selfdistill.instruments.explorer.exploration import AllModels, read_by_all_models
from megatron_selfdistill.instruments.explorer.explored import ExploredResponse, cut
from megatron_selfdistill.instruments.explorer.logit_summary import LogitSummary
from megatron_selfdistill.loss.target import Target
from megatron_selfdistill.rollout.base import Request, Response
from megatron_selfdistill.rollout.sampling import sample_seed

Key = tuple[int, int, int, int]
"""A completion: the index of the problem, the position of the node, the candidate's token, the index of the sample."""


@dataclass(frozen=True)
class AlignmentJob:
    """The problems, and what is measured on the response to each of them."""

    config: Config
    """The configuration, whose ``checkpoint.load`` names the student."""
    run_data: RunData
    """The data, whose ``evaluation`` problems have solutions."""
    prompts: Mapping[str, Sequence[PromptPair]]
    """The teacher's context -> the prompts of each problem, which differ in the teacher's prompt alone."""
    num_nodes: int
    """The largest number of nodes of a response."""
    num_top: int
    """The number of most likely tokens of each model that are candidates at a node."""
    num_completions: int
    """The number of completions after each candidate."""

    @classmethod
    def of_problems(
        cls,
        config: Config,
        run_data: RunData,
        hints: Mapping[str, Sequence[Problem]],
        *,
        num_nodes: int,
        num_top: int,
        num_completions: int,
    ) -> AlignmentJob:
        """Return the job for ``run_data.evaluation``.

        ``hints``: the teacher's context -> these problems, with the hint of this context as the solution.
        Raises: `ConfigError` for a problem that does not fit.
        """
        prompts = {context: [_fitted(problem, config, run_data) for problem in hints[context]] for context in hints}
        return cls(config, run_data, prompts, num_nodes, num_top, num_completions)

    @property
    def plain(self) -> Sequence[PromptPair]:
        """The prompts of each problem in the first context, for the student's prompt, which all contexts share."""
        return next(iter(self.prompts.values()))

    def measured(self, grid: RankGrid, teacher: str | None, reference: str | None) -> list[MeasuredNode]:
        """Return the nodes of all problems in their order, context by context, the same on every rank.

        All contexts share the responses, and the completions of equal nodes.

        ``teacher``, ``reference``: as for `AllModels.load`.  The replicas share the problems.
        Every rank of the world calls this method.
        Raises: `ConfigError`, `CheckpointError`, `EngineError`, `VerifierError`.
        """
        own = range(grid.dp_rank, len(self.plain), grid.dp_size)
        with open_inference(self.config, self.run_data, grid) as inference:
            requests = [Request(self.plain[p].student_prompt, self._seed(p, "response", 0)) for p in own]
            responses = dict(zip(own, inference.sampler.generate(requests, inference.sampling), strict=True))
            is_right = self._judged({(p, 0, 0, 0): response for p, response in responses.items()}, grid)
            inference.sampler.sleep()
            models = AllModels.load(self.config, self.run_data, grid, inference.chunks, teacher, reference)
            nodes = [it for name in self.prompts for it in self._nodes(name, responses, is_right, models, grid)]
            completed = self._completed(nodes, responses, inference)
        verdicts = self._judged(completed, grid)
        jsd_lambda = self.config.loss.jsd_lambda
        found = [(p, node.measured(self._success(p, node, verdicts), jsd_lambda)) for p, node in nodes]
        everywhere = gather_items(found if grid.replica_rank == 0 else [])
        place = {name: number for number, name in enumerate(self.prompts)}
        everywhere.sort(key=lambda pair: (place[pair[1].node.teacher_context], pair[0], pair[1].node.position))
        return [it for _, it in everywhere]

    def _nodes(
        self, name: str, responses: dict[int, Response], is_right: dict[Key, bool], models: AllModels, grid: RankGrid
    ) -> list[tuple[int, Node]]:
        """Return the nodes of this replica's responses in the context ``name``.

        Every replica reads one response at a time.
        """
        found, prompts = [], self.prompts[name]
        for start in range(0, len(prompts), grid.dp_size):
            p = start + grid.dp_rank
            contexts, solutions = [], []
            if p in responses:
                contexts = [cut(it) for it in build_contexts([prompts[p]], [responses[p]])]
                solutions = [prompts[p].solution]
            for explored in read_by_all_models(self.config, self.run_data, models, contexts, solutions, grid):
                for node in nodes_of(explored, is_right[p, 0, 0, 0], self.num_nodes, self.num_top):
                    found.append((p, replace(node, teacher_context=name)))
        return found

    def _completed(
        self, nodes: Sequence[tuple[int, Node]], responses: dict[int, Response], inference: Inference
    ) -> dict[Key, Response]:
        """Return the responses that go on after each candidate of this replica's nodes.

        A completion may have as many tokens as the response could still have.  A candidate that ends the response, or
        that is its last possible token, has no completion and is judged once.
        """
        longest, stops = self.config.rollout.max_new_tokens, set(self.run_data.stop_token_ids)
        done: dict[Key, Response] = {}
        wanted: dict[int, dict[Key, list[int]]] = {}
        for p, node in nodes:
            limit = longest - node.position - 1
            for token in (candidate.token for candidate in node.candidates):
                begun = [*responses[p].token_ids[: node.position], token]
                if token in stops or limit == 0:
                    done[p, node.position, token, 0] = Response.unsampled(begun, "stop" if token in stops else "length")
                else:
                    keys: list[Key] = [(p, node.position, token, i) for i in range(self.num_completions)]
                    wanted.setdefault(limit, {}).update(dict.fromkeys(keys, begun))
        room = self.run_data.max_length - longest - max(len(it.student_prompt) for it in self.plain)
        for group in limit_groups(gather_items(list(wanted)), room):
            asked = [(key, begun, limit) for limit in group for key, begun in wanted.get(limit, {}).items()]
            done |= self._generated(asked, group[0], inference)
        return done

    def _generated(
        self, asked: Sequence[tuple[Key, list[int], int]], longest: int, inference: Inference
    ) -> dict[Key, Response]:
        """Return the responses of (key, begun tokens, limit), sampled in one call with the limit ``longest``."""
        requests = [
            Request(self.plain[key[0]].student_prompt + begun, self._seed(key[0], f"{key[1]}/{key[2]}", key[3]))
            for key, begun, _ in asked
        ]
        params = replace(inference.sampling, max_new_tokens=longest)
        found = {}
        for (key, begun, limit), rest in zip(asked, inference.sampler.generate(requests, params), strict=True):
            ended = rest.finish_reason == "stop" and len(rest.token_ids) <= limit
            found[key] = Response.unsampled(begun + rest.token_ids[:limit], "stop" if ended else "length")
        return found

    def _judged(self, responses: dict[Key, Response], grid: RankGrid) -> dict[Key, bool]:
        """Return whether each response is right, over all replicas; a response without an end is wrong."""
        pattern, tokenizer = self.config.evaluation.confidence_pattern, self.run_data.tokenizer
        questions: dict[Key, tuple[Problem, str | None]] = {}
        for key, response in responses.items():
            _, _, text = judged_text(response, tokenizer, pattern)
            questions[key] = self.run_data.evaluation[key[0]], None if response.truncated else text
        return judged_by_all(questions, verdict_of(load_verifier(self.config.evaluation.verifier)), grid)

    def _success(self, p: int, node: Node, verdicts: dict[Key, bool]) -> dict[int, float]:
        """Return the share of right completions after each candidate of a node."""
        found = {}
        for token in (candidate.token for candidate in node.candidates):
            keys: list[Key] = [(p, node.position, token, i) for i in range(self.num_completions)]
            outcomes = [verdicts[key] for key in keys if key in verdicts]
            found[token] = sum(outcomes) / len(outcomes)
        return found

    def _seed(self, p: int, name: str, index: int) -> int:
        return sample_seed(self.config.seed, 0, f"alignment/{name}/{self.run_data.evaluation[p].id}", index)


def _fitted(problem: Problem, config: Config, run_data: RunData) -> PromptPair:
    """Return both prompts of a problem.  Raises: `ConfigError` where they do not fit."""
    longest = config.rollout.max_new_tokens
    try:
        pair = fit_teacher_prompt(
            run_data.builder, problem, max_length=run_data.max_length, max_new_tokens=longest, policy="error"
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    assert pair is not None, "the policy error returns prompts or raises"
    return pair


def nodes_of(explored: ExploredResponse, correct: bool, num_nodes: int, num_top: int) -> list[Node]:
    """Return the nodes of a response that every model has read, at most ``num_nodes``, ascending.

    The candidates of a node are the union of the ``num_top`` most likely tokens of student, teacher and target.
    """
    kl = explored.numbers["reverse_kl"]
    chosen = chosen_nodes(kl, num_nodes)
    rows = torch.tensor(list(chosen))
    summary = LogitSummary(**{name: values[rows] for name, values in vars(explored.summary).items()})
    beta = torch.tensor([explored.numbers["beta"][position] for position in chosen], dtype=torch.float64)
    log_probs = candidate_log_probs(summary, beta, explored.settings.target)
    nodes = []
    for row, (position, rule) in enumerate(chosen.items()):
        nodes.append(
            Node(
                problem_id=explored.context.problem_id,
                position=position,
                chosen_by=rule,
                kl=kl[position],
                response_length=len(explored.context.response),
                correct=correct,
                candidates=_candidates(summary.ids[row], log_probs[row], num_top),
            )
        )
    return nodes


def candidate_log_probs(summary: LogitSummary, beta: Tensor, target: Target) -> Tensor:
    """Return the log-probs [T, 3, C] of the candidates of T tokens under student, teacher and target; -inf for none.

    ``beta``: [T] of the target.  Student and teacher are exact.  The target's normaliser is exact if the candidates are
    the complete vocabulary; otherwise the tokens in bins are known by the moments of their logits (`LogitSummary`).
    """
    own = summary.logits[:, :2] - summary.log_normalisers[:, :2, None]
    num_models = summary.logits.shape[1]
    of_teacher, of_anchor = target.mix_weights
    weights = torch.zeros(num_models, dtype=torch.float64)
    weights[1] = of_teacher
    weights[2 if target.is_anchored else 0] += of_anchor
    used = weights != 0
    mix = torch.einsum("m,tmc->tc", weights[used], summary.logits[:, used])
    mix = torch.where(summary.ids >= 0, mix, -torch.inf) * beta[:, None]
    mean = torch.einsum("m,tmb->tb", weights, summary.means) * beta[:, None]
    pairs = [(i, j) for i in range(num_models) for j in range(i, num_models)]
    factors = torch.stack([weights[i] * weights[j] * (1 if i == j else 2) for i, j in pairs])
    variance = torch.einsum("p,tpb->tb", factors, summary.covariances).clamp(min=0) * beta[:, None] ** 2
    binned = summary.counts.log() + mean + variance / 2  # log 0 = -inf for an empty bin
    normaliser = torch.cat([mix, binned], 1).logsumexp(1, keepdim=True)
    return torch.cat([own, (mix - normaliser)[:, None]], 1)


def _candidates(ids: Tensor, log_probs: Tensor, num_top: int) -> list[CandidateToken]:
    """Return the union of the most likely tokens of each model, by descending probability under the student."""
    count = min(num_top, int((ids >= 0).sum()))
    places = log_probs.topk(count, dim=1).indices.flatten().unique()
    ordered: Sequence[int] = places[log_probs[0, places].argsort(descending=True, stable=True)].tolist()
    return [CandidateToken(int(ids[place]), *log_probs[:, place].exp().tolist()) for place in ordered]
