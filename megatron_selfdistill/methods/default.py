# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
r"""Self-distillation towards what the same model predicts when it sees the solution: the default, and every hook.

Algorithm: The student samples a response after the problem. The teacher reads it after the problem and the solution.
The target of a token is a mix of teacher and anchor whose entropy matches the anchor's, with k at most 1 + w. The loss
is the divergence of student and target at every response token. With recipe=default the target stands still where the
solutions of the data differ: teacher and reference are frozen. docs/method.md explains the choices.

Equation:

    target = softmax(m / k)     m: the mix of docs/method.md, with w = target.teacher_weight
    k: H(target) = H(anchor),  k <= 1 + w
    recipe=default:        D = KL(student || target),   anchor = reference, frozen teacher
                           (anchor = student where all solutions are one text)
    recipe=teacher_alone:  D = KL(student || teacher),  no mix,             frozen teacher
    recipe=literal:        D = KL(target || student),   anchor = student,   current teacher, k unbounded
    recipe=multi_teacher:  as the default, with the teacher that the record names (docs/teachers.md)

Paper: The target is one of this project. The teacher alone is plain on-policy self-distillation.

Differences: recipe=teacher_alone is the baseline of the default. recipe=literal is a documented failure; do not train
with it. Its targets each have the student's entropy, forward KL fits their arithmetic mean, whose entropy is at least
as high, and the next targets have that entropy. Nothing lowers it again.

Command:

    selfdistill recipe=default checkpoint.load=/checkpoints/qwen3-8b data.tokenizer=/models/Qwen3-8B \
        data.path=problems.jsonl num_steps=200 run_dir=runs/first
    selfdistill recipe=teacher_alone checkpoint.load=... data.tokenizer=... data.path=problems.jsonl run_dir=runs/alone
    make quickstart ARGS=--literal

Expected: 150 steps of `make quickstart` raise a model of 0.1 million parameters from .353 to 1.000 greedy and from .353
to .968 sampled (seed 5). The teacher alone ends at 1.000 / .988, 1.000 / .968, 1.000 / .993 (greedy / sampled, seeds 5,
6, 7), and with 30 % wrong hints at .980, .960, .991 sampled. The literal recipe stops with exit status 3 at step 37,
because the guard of entropy ends it (seed 5). docs/results.md has hard problems and problems with many answers.

Known failure:
- A base that can hardly use its hints gets worse: .18 to .11 in `examples/04_many_answers.py` (mix with the student)
  and .18 to .09 (teacher alone). Measure the hinted accuracy first.
- With a good teacher whose hints do not tempt, the mix is no better than the teacher alone. It costs 1 to 2 points of
  sampled accuracy on the quickstart, because the reference keeps a part of the base's noise.
- Under forward KL with 30 % wrong hints, the teacher alone ends below the mix with the student and the default: .034,
  .109, .080 against .186, .412, .232 and .675, .703, .730.
- The student cannot learn a token to which it gives almost no probability: its rollouts do not contain the token, and
  the reference holds the token back (docs/rollouts.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from megatron_selfdistill.config.functions import function_named
from megatron_selfdistill.config.schema.data_config import judges_responses, plays_episodes
from megatron_selfdistill.config.schema.method_config import (
    SAME,
    STUDENT,
    TEACHER,
    MethodSettings,
    Needs,
    sampled_log_probs_key,
)
from megatron_selfdistill.config.schema.ranges import OneOf
from megatron_selfdistill.methods.parts.settings import WEIGHTS, RewardSettings, SelectSettings, WeightSettings

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_selfdistill.data.contexts import ContextPair, PromptPair
    from megatron_selfdistill.data.problems import Problem
    from megatron_selfdistill.pipeline.token_losses import TokenCoefficients
    from megatron_selfdistill.sources.method import MethodTools
    from megatron_selfdistill.sources.rollouts import Rollout
    from megatron_selfdistill.sources.signals import Clip, Signals, Terms

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class DefaultSettings(RewardSettings, SelectSettings, WeightSettings):
    """The settings of self-distillation."""

    view: Annotated[str, OneOf(("plain", "privileged"))] = "plain"
    """The prompt that responses are sampled after: plain (the student's) or privileged (the teacher's, which shows the
    hint: the responses are then the teacher's own, off-policy for the student)."""

    @property
    def needs(self) -> Needs:
        """What the method needs from the core."""
        samples = TEACHER if self.view == "privileged" else STUDENT
        return Needs(samples=samples, log_probs=self.log_probs, rewards=self.select is not None)


@dataclass(frozen=True)
class SelfDistillation:
    """The default method, from which the others derive; the protocol `Method` has the contracts of its hooks."""

    Settings: ClassVar[type[MethodSettings]] = DefaultSettings
    prepare: ClassVar[Any] = None
    record: ClassVar[Any] = None
    warnings: ClassVar[Any] = None
    """The hooks that only methods with a state, or with numbers to warn of, define; see `Method`."""
    settings: Any
    """The settings of the method, an object of ``Settings``."""
    tools: MethodTools
    """The parts of the run that the method may use."""

    @classmethod
    def made(cls, settings: Any, tools: MethodTools) -> Any:
        """Return the method at the beginning of a run.  Raises: `ConfigError` for data that it cannot use."""
        reward = getattr(settings, "reward", None)
        if reward is not None:
            judge = replace(tools.judge, reward=function_named("method.reward", reward, {}))
            tools = replace(tools, judge=judge)
        method = cls(settings, tools)
        method.check_data()
        return method

    def check_data(self) -> None:
        """Raise `ConfigError` where a verifier judges responses to problems without an answer."""
        tools, config = self.tools, self.tools.config
        if judges_responses(config) and tools.judge.reward is None and not plays_episodes(config):
            from megatron_selfdistill.evaluation.verify import check_answers

            check_answers(tools.run_data.problems.problems, tools.judge.verifier)

    @property
    def weighs_tokens(self) -> bool:
        """Whether response tokens have terms other than a divergence of weight 1: by `terms`, or by a function."""
        has_terms = type(self).terms is not SelfDistillation.terms and getattr(self.settings, "weighs_tokens", True)
        return self.token_weights is not None or has_terms

    @property
    def token_weights(self) -> Callable[[Signals], Tensor] | None:
        """The function of method.token_weights, whose result multiplies the terms of each token; or None."""
        name = getattr(self.settings, "token_weights", None)
        if name is None:
            return None
        from megatron_selfdistill.methods.parts.weights import weights_by_name, weights_of_function

        if self.divides_by_weights:
            return partial(weights_by_name, self.settings, self.tools.config.rollout)
        return partial(weights_of_function, name)

    @property
    def divides_by_weights(self) -> bool:
        """Whether the loss divides by the sum of `token_weights`, as it does where these have a name."""
        return getattr(self.settings, "token_weights", None) in WEIGHTS

    @property
    def comparable(self) -> bool:
        """Whether the sampler's log-probs are those of the student for the tokens that are trained on."""
        config = self.tools.config
        edits = getattr(self.settings, "select", None) is not None and sampled_log_probs_key(config) is None
        return not edits and (config.needs.samples != TEACHER or config.needs.reads_one_prompt)

    @property
    def clip(self) -> Clip:
        """The bounds of the ratio p / mu of advantages: those of the settings, or none."""
        from megatron_selfdistill.sources.signals import Clip

        names = ("clip_low", "clip_high", "ratio_cap")
        return Clip(*(getattr(self.settings, name, None) for name in names))

    def prompts(self, problem: Problem) -> PromptPair:
        """Return both prompts of a problem; the teacher's prompt shows its solution."""
        return self.tools.given.pair(problem)

    def has_solution(self, problem: Problem) -> bool:
        """Return True: the data give a solution to every problem."""
        return True

    def rewarded(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return the rollouts with the rewards of the function, the replies or the verifier, and no metrics."""
        judge = self.tools.judge
        if judge.reward is None and plays_episodes(self.tools.config):
            return list(rollouts), {}
        with self.tools.phases("rollout"):
            return judge.rewarded(rollouts)

    def select(self, step: int, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return all rollouts, or those that the function method.select keeps, and no metrics."""
        if getattr(self.settings, "select", None) is None:
            return list(rollouts), {}
        from megatron_selfdistill.methods.parts.selection import selected_by_function

        return selected_by_function(self.settings.select, rollouts, self.tools), {}

    def texts(self, rollouts: Sequence[Rollout], selected: Sequence[Rollout]) -> tuple[list[Rollout], Metrics]:
        """Return the ``selected`` rollouts with the prompts that student and teacher read them after."""
        needs = self.tools.config.needs
        if needs.teacher_prompt != SAME:
            return list(selected), {}
        return [one.in_sampled_view(privileged=needs.samples == TEACHER) for one in selected], {}

    def coefficients(
        self, step: int, rollouts: Sequence[Rollout], contexts: Sequence[ContextPair]
    ) -> TokenCoefficients | None:
        """Return the coefficients that follow from `terms`, the correction and the normalisation of the loss."""
        loss = self.tools.config.loss
        is_plain = (loss.rollout_correction, loss.normalize, loss.skip_first_tokens) == ("none", "tokens", 0)
        if is_plain and not self.weighs_tokens:
            return None
        from megatron_selfdistill.sources.step_terms import step_coefficients

        return step_coefficients(self, self.tools, step, rollouts, contexts)

    def terms(self, step: int, rollouts: Sequence[Rollout], signals: Signals) -> Terms:
        """Return a divergence of weight 1 for the tokens of each response with a hint."""
        from megatron_selfdistill.methods.parts.terms import uniform

        return uniform(signals, weight=1.0, signal="full")

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the method has no state."""
        return {}

    def restored(self, state: Mapping[str, Any]) -> SelfDistillation:
        """Return this method, which has no state."""
        return self
