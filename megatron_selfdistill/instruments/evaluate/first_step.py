# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the first step of a run would see: samples of the model without hints, and what a target takes from the hint.

Before the first update student, teacher and reference have the same weights.  Therefore one model reads everything: the
student and the reference read a sample r after the problem, with the logits s, and the teacher reads r after the prompt
with the hint, with the logits t.  The share of the hint that a target q lets through is

    sum over the tokens of KL(q || softmax(s)) / sum over the tokens of KL(softmax(t) || softmax(s))

It is 1 for the teacher alone.  It is equal for target.anchor=reference and student, because both anchors have the
logits s.  The two differ after the first update, since the mix with the student follows the student.

The teacher also reads r after the hints of other problems, whose mean is c (target.control).  KL(c || softmax(s)) is
the general part of its news, which any hint gives, and KL(softmax(t) || c) the specific part of this hint alone.

`readiness` says whether a run is worth its time, from the gain of the hint on the same problems.  `recommended` chooses
a target from three numbers: how many different hints there are, and the accuracy without and with the hint.
docs/real_model.md has the rule, and how it does beside every fixed target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from megatron_selfdistill.config import Config
from megatron_selfdistill.config.schema.target_config import why_no_control
from megatron_selfdistill.data.contexts import PromptPair
from megatron_selfdistill.data.controls import Controls, num_controls
from megatron_selfdistill.data.given_solutions import GivenSolutions, build_contexts
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.distributed.collectives import gather_items
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.evaluation.estimators import Interval, bootstrap
from megatron_selfdistill.evaluation.evaluation_result import EvaluationResult
from megatron_selfdistill.evaluation.inference import Inference
from megatron_selfdistill.evaluation.verify import Verifier, judged_by_all, right_response
from megatron_selfdistill.loss.target import Divergence, Target
from megatron_selfdistill.metrics.first_checks import MANY_CUT, OF_SAMPLES, SILENT_KL, first_step_advice
from megatron_selfdistill.metrics.leakage import ends_in_loop
from megatron_selfdistill.pipeline.score import Reading, read
from megatron_selfdistill.pipeline.token_losses import self_distillation
from megatron_selfdistill.pipeline.token_measures import TokenMeasurement

MAX_PROBLEMS = 64
"""The largest number of problems with a sample; the first ones are taken."""
NEVER_SOLVED, SOLVED_BY_HINT = 0.01, 0.2
"""The largest accuracy of a base that never solves its problems, and the smallest of one whose hints solve them."""
UNTRAINED = 0.9
"""The share of ln V, the entropy of guessing among V tokens, above which a model looks untrained."""
SOLVED = 0.9
"""The accuracy without the hint from which on the hint has little to add."""
FEWEST = 5
"""The fewest problems that show a gain: five in a row happen by chance in one of 32 cases."""
GUIDED = (
    *("loss.divergence=forward_kl", "target.teacher_weight=2", "rollout.guidance=mixed"),
    *("rollout.temperature=1", "rollout.top_k=0", "rollout.top_p=1"),
)
"""The settings of guided rollouts, which sample from the target itself."""
_TOP = 10  # one in this number of tokens is among those with the most difference


@dataclass(frozen=True)
class FirstStep:
    """What the first step of a run would see; the same on every rank."""

    num_samples: int
    num_tokens: int
    log_prob_mean: float
    """The mean log-prob of a sample's tokens under the model at temperature 1, in nats."""
    entropy_mean: float
    """The mean entropy of the model at temperature 1, in nats per token."""
    truncated_share: float
    """The share of the samples that were cut at rollout.max_new_tokens."""
    loop_share: float
    """The share of the samples that end in a loop (`ends_in_loop`)."""
    teacher_kl: float
    """The mean KL(teacher || reference) in nats per token."""
    accuracy: float
    """The share of the samples, which saw no hint, that are right."""
    are_right: tuple[bool, ...]
    """Which of the samples are right, in the order of their problems."""
    num_hints: int
    """The number of different solutions among all problems of the evaluation."""
    vocab_size: int
    let_through: float | None
    """The share of the hint that the configured target lets through; None if teacher and reference predict the same."""
    let_through_top_tenth: float | None
    """The same over the tenth of the tokens with the largest KL(teacher || reference)."""
    general_kl: float | None = None
    """The mean KL(c || reference) in nats per token, with the mean c of the controls; None without controls."""
    specific_kl: float | None = None
    """The mean KL(teacher || c) in nats per token; None without controls."""
    why_no_controls: str | None = None
    """Why the hints of other problems make no control; None where they do."""

    @property
    def is_untrained(self) -> bool:
        """Whether the model nearly guesses among all tokens of its vocabulary."""
        return self.entropy_mean > UNTRAINED * math.log(self.vocab_size)

    def advice(self, config: Config) -> list[str]:
        """Return a sentence, with keys to try, for each number with which a run learns little."""
        nll = 0.0 if self.is_untrained else -self.log_prob_mean  # no temperature helps an untrained model
        numbers = dict(zip(OF_SAMPLES, (nll, self.entropy_mean, self.truncated_share, self.loop_share), strict=True))
        if self.let_through is not None and not (self.num_hints == 1 and config.target.anchor == "auto"):
            numbers["target/let_through"] = self.let_through  # with hints of one text a run follows the student
        return first_step_advice(config, numbers)


@dataclass(frozen=True)
class Readiness:
    """Whether a run is worth its time: how often responses to the same problems are right without and with the hint."""

    right: int
    """The right samples without the hint, one per problem."""
    num_problems: int
    right_hinted: int
    """The right samples with the hint, or greedy responses where nothing is sampled."""
    num_hinted: int
    """All samples with the hint."""
    gain: Interval
    """The mean over the problems of the share with the hint minus the share without."""
    cause: str = ""
    """Why a run would teach little; empty for a run that is worth its time."""
    change: str = ""
    """The key to set, or a sentence about what to change, before the command runs again."""


def readiness(config: Config, first: FirstStep, result: EvaluationResult) -> Readiness:
    """Return whether a run is worth its time: whether the hint clearly helps, and a fifth of its responses is right.

    ``result``: the evaluation with the hint.
    """
    hinted_verdicts = [[it.correct for it in one.samples or [one.greedy]] for one in result.problems]
    pairs = list(zip(first.are_right, hinted_verdicts, strict=False))  # the problems with a sample without the hint
    gains = np.array([[sum(seen) / len(seen) - right] for right, seen in pairs])
    counts = sum(sum(seen) for _, seen in pairs), sum(len(seen) for _, seen in pairs)
    found = Readiness(sum(first.are_right), len(pairs), *counts, bootstrap(gains)[0])
    verifier, new = config.evaluation.verifier, config.rollout
    hinted, is_clear = found.right_hinted / found.num_hinted, found.gain.low > 0 and found.num_problems >= FEWEST
    cut = result.greedy_truncated_share if result.sampled_truncated_share is None else result.sampled_truncated_share
    if first.is_untrained:
        cause = "this model looks untrained, or tokenizer and weights do not belong together: its entropy is "
        cause += f"{first.entropy_mean:.2f} nats per token, and ln({first.vocab_size}) {math.log(first.vocab_size):.2f}"
        change = "name a trained model, and the tokenizer with which it was trained (data.tokenizer=DIR)"
    elif is_clear and hinted >= SOLVED_BY_HINT:
        return found
    elif result.overlooked is not None:
        cause = result.overlooked.lines(verifier)[0]
        fits = verifier == "exact_match"
        change = "evaluation.verifier=math_verify" if fits else "change the verifier after a look at the ends below"
    elif cut > MANY_CUT:
        cause = f"{cut:.0%} of the responses with the hint are cut at rollout.max_new_tokens={new.max_new_tokens}"
        change = f"rollout.max_new_tokens={2 * new.max_new_tokens}"
    elif found.right >= SOLVED * found.num_problems:
        cause, change = "the model solves these problems without the hint", "take harder problems (--data)"
    elif first.num_hints == 1 < len(result.problems):
        cause = f"all hints are one text, and evaluation.verifier={verifier} does not find that it is followed"
        change = "set evaluation.verifier to a function that judges what this text asks for"
    elif found.gain.mean > 0 and not is_clear and found.num_problems < MAX_PROBLEMS:
        cause = f"{found.num_problems} problems are too few to tell the gain from chance"
        change = "give --data more problems"
    else:
        cause = f"the hint helps too little: {hinted:.0%} of the responses that see it are right"
        change = "try another hint (data.fields.solution), another data.teacher_template, or a stronger model"
    return replace(found, cause=cause, change=change)


@dataclass(frozen=True)
class Recommended:
    """The target that `recommended` chooses."""

    overrides: tuple[str, ...]
    """The settings beside those of the default recipe; empty for the default target."""
    reason: str
    """The rest of a sentence after "since"."""

    def __str__(self) -> str:
        """Return the recommendation as a sentence."""
        return f"{' '.join(self.overrides) or 'the default target'}, since {self.reason}"


def recommended(num_hints: int, num_problems: int, accuracy: float, hinted_accuracy: float) -> Recommended:
    """Return the target for a model whose ``num_problems`` problems have ``num_hints`` different hints.

    ``accuracy`` and ``hinted_accuracy``: the shares of right responses that did not see, and that saw, the hint.
    """
    if num_hints == 1 < num_problems:
        return Recommended(
            ("target.anchor=student",),
            f"all {num_problems} hints are one text, which tells nothing about a single problem that could leak",
        )
    accuracies = f"{accuracy:.2f} of the samples without the hint are right, and {hinted_accuracy:.2f} with it"
    if accuracy <= NEVER_SOLVED and hinted_accuracy >= SOLVED_BY_HINT:
        reason = (
            "the default anchor would hold the answers back; for facts, which the reference never proposes, take "
            "target=teacher_alone in place of target.teacher_weight; where the hints ask for a behaviour, take "
            "target.anchor=student alone"
        )
        return Recommended(GUIDED, f"{accuracies}: {reason}")
    return Recommended((), f"there are {num_hints} different hints, and {accuracies}")


def measure_first_step(
    inference: Inference, config: Config, run_data: RunData, verifier: Verifier, grid: RankGrid
) -> FirstStep:
    """Sample a response to each of the first `MAX_PROBLEMS` of ``run_data.evaluation``, and read it with all models.

    The problems have solutions, and what ``verifier`` compares responses with.  The samples are those that an
    evaluation without hints draws first.  The sampler sleeps afterwards.
    Every rank of the world calls this function.  Raises: `ConfigError`, `EngineError`, `VerifierError`.
    """
    problems, builder = run_data.evaluation[:MAX_PROBLEMS], run_data.builder
    prompts = [PromptPair(it.id, builder.student_prompt(it), builder.teacher_prompt(it)) for it in problems]
    own = prompts[grid.dp_rank :: grid.dp_size]
    responses = inference.first_samples(problems, [it.student_prompt for it in prompts], config.seed, grid)
    inference.sampler.sleep()

    both = [prompt for it in prompts for prompt in (it.student_prompt, it.teacher_prompt)]
    number, why_none = possible_controls(config, run_data.evaluation)
    of_others = _with_other_hints(config, run_data, problems, number, max(map(len, both)))
    models = inference.as_both_models(config, [*both, *chain.from_iterable(of_others)], grid)
    controls = of_others[grid.dp_rank :: grid.dp_size]
    contexts = [
        replace(context, control_prompts=hinted)
        for context, hinted in zip(build_contexts(own, responses), controls, strict=True)
    ]

    def reading(target: Target) -> Reading:
        loss = self_distillation(target, Divergence(), models.backend, fusion=models.fusion)
        return read(contexts, models, loss, TokenMeasurement(target, config.loss.fused_chunk_tokens, models.backend))

    target = Target.configured(config.target, num_controls=0 if config.target.control == "none" else number)
    as_configured = reading(replace(target, anchor="student", match=None))
    rows = _rows(as_configured)
    if number:
        contrasted = as_configured if target.num_controls else reading(Target(anchor="student", num_controls=number))
        rows = torch.cat([rows, _control_rows(contrasted)])

    is_right = right_response(verifier, run_data.tokenizer, config.evaluation.confidence_pattern)
    asked = zip(problems[grid.dp_rank :: grid.dp_size], responses, strict=True)
    rights = judged_by_all({problem.id: (problem, response) for problem, response in asked}, is_right, grid)
    speaks = grid.replica_rank == 0
    tokens = torch.tensor(gather_items(rows.T.tolist() if speaks else []), dtype=torch.float64)
    are_cut = gather_items([response.truncated for response in responses] if speaks else [])
    are_looping = gather_items([ends_in_loop(response.token_ids) for response in responses] if speaks else [])
    num_hints = len({problem.solution for problem in run_data.evaluation})
    are_right = [rights[problem.id] for problem in problems]
    found = first_step(tokens, are_cut, are_looping, are_right, num_hints, run_data.vocab_size)
    return replace(found, why_no_controls=why_none)


def possible_controls(config: Config, problems: Sequence[Problem]) -> tuple[int, str | None]:
    """Return the number of controls that a response could have, and why it is 0, or None."""
    automatic = replace(config, target=replace(config.target, control="auto"))
    number, one_text = num_controls(automatic, problems), f"all {len(problems)} hints are one text"
    return number, None if number else why_no_control(config) or one_text


def _with_other_hints(
    config: Config, run_data: RunData, problems: Sequence[Problem], number: int, longest: int
) -> list[tuple[list[int], ...]]:
    """Return the teacher's prompts of each problem with the hints of ``number`` others; ``longest``: of its prompts."""
    new = config.rollout.max_new_tokens
    given = GivenSolutions(run_data.builder, max(run_data.max_length, longest + new), new, config.data.on_long_context)
    controls = Controls(run_data.evaluation, given, number, config.seed)
    return [controls.prompts(0, problem) if number else () for problem in problems]


def first_step(
    tokens: Tensor,
    are_cut: Sequence[bool],
    are_looping: Sequence[bool],
    are_right: Sequence[bool],
    num_hints: int,
    vocab_size: int,
) -> FirstStep:
    """Return what the numbers of the tokens say.

    ``tokens`` [R, 4] float64: log p of the token, H(p), KL(t || p), and KL(q || p) of the configured target; with
    controls [R, 6]: also KL(c || p) and KL(t || c).
    ``are_cut``, ``are_looping``, ``are_right``: per sample, whether it reached the limit of tokens, whether it ends in
    a loop, and whether it is right.
    """
    log_prob, entropy, of_teacher, of_target, *of_controls = tokens.unbind(1)
    general, specific = (column.mean().item() for column in of_controls) if of_controls else (None, None)
    top = of_teacher.topk(-(-len(of_teacher) // _TOP)).indices

    def share(target: Tensor, teacher: Tensor) -> float | None:
        return (target.sum() / teacher.sum()).item() if teacher.mean() >= SILENT_KL else None

    return FirstStep(
        num_samples=len(are_cut),
        num_tokens=len(tokens),
        log_prob_mean=log_prob.mean().item(),
        entropy_mean=entropy.mean().item(),
        truncated_share=sum(are_cut) / len(are_cut),
        loop_share=sum(are_looping) / len(are_looping),
        teacher_kl=of_teacher.mean().item(),
        accuracy=sum(are_right) / len(are_right),
        are_right=tuple(are_right),
        num_hints=num_hints,
        vocab_size=vocab_size,
        let_through=share(of_target, of_teacher),
        let_through_top_tenth=share(of_target[top], of_teacher[top]),
        general_kl=general,
        specific_kl=specific,
    )


def _rows(reading: Reading) -> Tensor:
    """Return the numbers of this replica's tokens, [4, R] float64, as `first_step` takes them."""
    stats, measures, own = reading.output.stats, reading.output.measures, None
    if stats is not None and measures is not None:
        assert measures.kl_to_anchor is not None, "the measurement asks for it"
        of_target, of_teacher = measures.kl_to_anchor.unbind(1)
        columns = (stats.student_log_prob, stats.student_entropy, of_teacher, of_target)
        own = torch.stack([column.double() for column in columns])
    return reading.on_whole_replica(own, 4)


def _control_rows(reading: Reading) -> Tensor:
    """Return KL(c || p) and KL(t || c) of this replica's tokens, [2, R] float64."""
    measures = reading.output.measures
    kl = None if measures is None else measures.kl_of_control
    return reading.on_whole_replica(None if kl is None else kl.T, 2)
