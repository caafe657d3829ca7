# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The protocol of methods: what a published method adds to a step, and the parts of a run that it may use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:  # a method is imported with the configuration, before Megatron
    from torch import Tensor

    from megatron_selfdistill.config import Config, MethodSettings
    from megatron_selfdistill.data.contexts import ContextPair, PromptPair
    from megatron_selfdistill.data.given_solutions import GivenSolutions
    from megatron_selfdistill.data.problem_sampler import ProblemSampler
    from megatron_selfdistill.data.problems import Problem
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed.ranks import RankGrid
    from megatron_selfdistill.metrics.phases import Phases
    from megatron_selfdistill.pipeline.token_losses import TokenCoefficients
    from megatron_selfdistill.rollout.base import Request, Response, Sampler, SamplingParams
    from megatron_selfdistill.sources.judge import Judge
    from megatron_selfdistill.sources.rollouts import Rollout
    from megatron_selfdistill.sources.signals import Clip, Signals, Terms

Metrics = Mapping[str, float]


class ReadingModels(Protocol):
    """The models of a run as readers of given responses.  Every method is collective over the world."""

    def token_signals(self, contexts: Sequence[ContextPair]) -> dict[str, Tensor]:
        """Return the `MEASURED_SIGNALS` of every response token, [R] float64 each, on the host."""

    def read_tokens(self, contexts: Sequence[ContextPair], temperature: float = 1.0) -> Tensor:
        """Return log p, log p_teacher and KL(p || p_teacher) of every response token, [3, R] float64, on the host."""

    def candidate_log_probs(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> Tensor:
        """Return the teacher's log-probs of n candidates for the token after each prompt, [B, n] float64."""


@dataclass(frozen=True)
class MethodTools:
    """The parts of a run that a method may use, on one rank."""

    config: Config
    run_data: RunData
    grid: RankGrid
    phases: Phases
    sampler: Sampler
    """The sampler of the run, which begins with the weights of its last `Sampler.update_weights`."""
    sampling: SamplingParams
    """How responses are sampled."""
    readers: ReadingModels
    """The models as readers, for which the sampler must have given its memory back."""
    judge: Judge
    """The verifier of the run, with the reward function of the method, if it has one."""
    given: GivenSolutions
    """The prompts that show a solution."""

    @property
    def models(self) -> ReadingModels:
        """The models as readers; the sampler, which needs memory on the same device, sleeps from now on."""
        self.sampler.sleep()
        return self.readers

    def generate(self, step: int, requests: Sequence[Request]) -> list[Response]:
        """Return one response per request of this replica, sampled with the student's weights of ``step``.

        Collective over the world.  Raises: `EngineError` on all ranks.
        """
        self.sampler.update_weights(step)
        return self.sampler.generate(requests, self.sampling)


class Method(Protocol):
    """A published method, as a value: what a step changes goes into a new object, and no object ever changes.

    `methods.default.SelfDistillation` has the default recipe's version of every hook, so that a method derives from it
    and replaces the hooks in which it differs.  All ranks of the world call the hooks in the same order, and all ranks
    of a replica get the same results.  ``rollouts`` are those of this replica, group by group.
    """

    Settings: ClassVar[type[MethodSettings]]
    """The settings of the method, the section ``method`` of the configuration."""

    @property
    def prepare(self) -> Callable[[int, SamplingParams, ProblemSampler], tuple[Method, Metrics]] | None:
        """The hook ``prepare(step, sampling, problem_sampler)`` before a step, or None.

        It returns the method for the step that ``step`` optimizer steps precede, and metrics.  ``problem_sampler``
        samples the problems that come next; the caller's step begins with its first batch.  Collective.
        """

    @property
    def record(self) -> Callable[[Sequence[Rollout]], Method] | None:
        """The hook ``record(rollouts)``, or None.

        It returns the method of later steps, once all rollouts of the step are known.  Collective.
        """

    @property
    def warnings(self) -> Callable[[Metrics], list[str]] | None:
        """The hook ``warnings(metrics)``, which returns what the metrics of a step warn of; or None."""

    @classmethod
    def made(cls, settings: Any, tools: MethodTools) -> Method:
        """Return the method at the beginning of a run.  Raises: `ConfigError` for data that it cannot use."""

    @property
    def weighs_tokens(self) -> bool:
        """Whether the method gives response tokens `terms` other than a divergence of weight 1."""

    @property
    def token_weights(self) -> Callable[[Signals], Tensor] | None:
        """The function whose result [R] float64 multiplies the terms of each token, or None."""

    @property
    def divides_by_weights(self) -> bool:
        """Whether the loss divides by the sum of `token_weights` over the global batch, not by the number of tokens."""

    @property
    def comparable(self) -> bool:
        """Whether the sampler's log-probs are those of the student for the tokens that are trained on."""

    @property
    def clip(self) -> Clip:
        """The bounds of the ratio p / mu of advantages."""

    def prompts(self, problem: Problem) -> PromptPair:
        """Return both prompts of a problem before it is answered."""

    def has_solution(self, problem: Problem) -> bool:
        """Return whether the teacher's prompt of `prompts` shows a solution."""

    def rewarded(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return the rollouts with their rewards, and metrics of the rewards.  Collective over the world."""

    def select(self, step: int, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return the rollouts that are trained on, with the prompts that show their hints, and metrics.

        Collective over the world.
        """

    def texts(self, rollouts: Sequence[Rollout], selected: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return what the step trains on: the ``selected`` rollouts in each view, and further texts; and metrics.

        ``rollouts``: all rollouts of the step.  Collective over the data-parallel ranks.
        """

    def coefficients(
        self, step: int, rollouts: Sequence[Rollout], contexts: Sequence[ContextPair]
    ) -> TokenCoefficients | None:
        """Return the coefficients of the tokens of ``contexts``, the contexts of ``rollouts``.

        None stands for the divergence alone, with a weight of 1 for each token.  Collective over the world.
        """

    def terms(self, step: int, rollouts: Sequence[Rollout], signals: Signals) -> Terms:
        """Return the terms of all tokens, from what is known of them."""

    def state_dict(self) -> dict[str, Any]:
        """Return the changes that steps have made, as plain values."""

    def restored(self, state: Mapping[str, Any]) -> Method:
        """Return this method with what `state_dict` returned."""
