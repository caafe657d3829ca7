# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the first step of a run would see: samples of the model without hints, and what a target takes from the hint.

Before the first update student, teacher and reference have the same weights.  Therefore one model reads everything: the
student and the reference read a sample r after the problem, with the logits s, and the teacher reads r after the prompt
with the hint, with the logits t.  The share of the hint that a target q lets through is

    sum over the tokens of KL(q || softmax(s)) / sum over the tokens of KL(softmax(t) || softmax(s))

It is 1 for the teacher alone.  It is equal for target.anchor=reference and student, because both anchors have the
logits s.  The two differ after the first update, since the mix with the student follows the student.

`recommended` chooses a target from three numbers: how many different hints there are, and the accuracy without and with
the hint.  docs/real_model.md has the rule, and how it does beside every fixed target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.config import Config
from megatron_selfdistill.data.contexts import PromptPair, build_contexts
from megatron_selfdistill.distributed.collectives import gather_items
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.evaluation.inference import Inference
from megatron_selfdistill.evaluation.verify import Verifier, judged_by_all, right_response
from megatron_selfdistill.loss.target import Divergence, Target
from megatron_selfdistill.metrics.guards import SILENT_KL, first_step_advice
from megatron_selfdistill.metrics.leakage import ends_in_loop
from megatron_selfdistill.pipeline.score import Reading, Want, read
from megatron_selfdistill.pipeline.token_losses import TokenMeasurement, self_distillation
from megatron_selfdistill.run_data import RunData

MAX_PROBLEMS = 64
"""The largest number of problems with a sample; the first ones are taken."""
WEIGHTS = (0.75, 2.0, 4.0)
"""The teacher's weights whose targets are compared with the configured target."""
CONFIGURED, TEACHER_ALONE = "as configured", "target=teacher_alone"
NEVER_SOLVED, SOLVED_BY_HINT = 0.01, 0.2
"""The largest accuracy of a base that never solves its problems, and the smallest of one whose hints solve them."""
GUIDED = (
    *("loss.divergence=forward_kl", "target.teacher_weight=2", "rollout.guidance=mixed"),
    *("rollout.temperature=1", "rollout.top_k=0", "rollout.top_p=1"),
)
"""The settings of guided rollouts, which sample from the target itself."""
_TOP = 10  # one in this number of tokens is among those with the most difference


@dataclass(frozen=True)
class LetThrough:
    """The share of the hint that a target lets through; None if teacher and reference predict the same."""

    all_tokens: float | None
    top_tenth: float | None
    """The share over the tenth of the tokens with the largest KL(teacher || reference)."""


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
    num_hints: int
    """The number of different solutions among all problems of the evaluation."""
    let_through: dict[str, LetThrough]
    """The setting -> the share of the hint that its target lets through; `CONFIGURED` is the first."""

    def advice(self, config: Config) -> list[str]:
        """Return a sentence, with keys to try, for each number with which a run learns little."""
        return first_step_advice(
            config,
            nll=-self.log_prob_mean,
            entropy=self.entropy_mean,
            truncated_share=self.truncated_share,
            loop_share=self.loop_share,
            let_through=self.let_through[CONFIGURED].all_tokens,
        )

    def record(self) -> dict[str, Any]:
        """Return the numbers as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Recommended:
    """The target that `recommended` chooses."""

    overrides: tuple[str, ...]
    """The settings beside those of the default recipe; empty for the default target."""
    reason: str
    """The rest of a sentence after "since"."""

    def __str__(self) -> str:
        """Return the recommendation as a sentence."""
        return f"recommended: {' '.join(self.overrides) or 'the default target'}, since {self.reason}"


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
        reason = "the default anchor would hold the answers back; for facts, which the reference never proposes, take "
        return Recommended(GUIDED, f"{accuracies}: {reason}target=teacher_alone in place of target.teacher_weight")
    reason = f"there are {num_hints} different hints, and {accuracies}"
    if hinted_accuracy < SOLVED_BY_HINT:
        reason += "; a teacher that seldom follows its hint teaches little: try another data.teacher_template"
    return Recommended((), reason)


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

    both = (prompt for it in prompts for prompt in (it.student_prompt, it.teacher_prompt))
    models = inference.as_both_models(config, both, grid)
    targets = compared_targets(Target.configured(config.target))
    configured, *others = targets.values()
    loss = self_distillation(configured, Divergence(), models.backend, fusion=models.fusion)
    measurement = TokenMeasurement(configured, config.loss.fused_chunk_tokens, models.backend, other_targets=others)
    rows = _rows(read(build_contexts(own, responses), models, Want(loss, measurement)), len(others))

    is_right = right_response(verifier, run_data.tokenizer, config.evaluation.confidence_pattern)
    asked = zip(problems[grid.dp_rank :: grid.dp_size], responses, strict=True)
    rights = judged_by_all({problem.id: (problem, response) for problem, response in asked}, is_right, grid)
    speaks = grid.replica_rank == 0
    tokens = torch.tensor(gather_items(rows.T.tolist() if speaks else []), dtype=torch.float64)
    are_cut = gather_items([response.truncated for response in responses] if speaks else [])
    are_looping = gather_items([ends_in_loop(response.token_ids) for response in responses] if speaks else [])
    num_hints = len({problem.solution for problem in run_data.evaluation})
    return first_step(tokens, are_cut, are_looping, list(rights.values()), num_hints, list(targets))


def compared_targets(configured: Target) -> dict[str, Target]:
    """Return the setting -> the target at the first step: the configured one, then those of the other `WEIGHTS`.

    A number for k or k_max belongs to one weight, so targets with another weight have the default.
    """
    first = replace(configured, anchor="student", match=None)
    rule = "entropy_matched" if first.rule == "teacher_alone" else first.rule
    k_max = first.k_max if first.k_max is None else "1 + w"
    others = {w: replace(first, rule=rule, teacher_weight=w, k=None, k_max=k_max) for w in WEIGHTS}
    named = {f"target.teacher_weight={w:g}": target for w, target in others.items() if target != first}
    return {CONFIGURED: first, **named}


def first_step(
    tokens: Tensor,
    are_cut: Sequence[bool],
    are_looping: Sequence[bool],
    are_right: Sequence[bool],
    num_hints: int,
    settings: Sequence[str],
) -> FirstStep:
    """Return what the numbers of the tokens say.

    ``tokens`` [R, 3 + settings] float64: log p of the token, H(p), KL(t || p), and KL(q || p) of each setting's target.
    ``are_cut``, ``are_looping``, ``are_right``: per sample, whether it reached the limit of tokens, whether it ends in
    a loop, and whether it is right.
    """
    log_prob, entropy, of_teacher, *of_targets = tokens.unbind(1)
    top = of_teacher.topk(-(-len(of_teacher) // _TOP)).indices

    def share(of_target: Tensor, teacher: Tensor) -> float | None:
        return (of_target.sum() / teacher.sum()).item() if teacher.mean() >= SILENT_KL else None

    let_through = {
        name: LetThrough(share(values, of_teacher), share(values[top], of_teacher[top]))
        for name, values in zip(settings, of_targets, strict=True)
    }
    return FirstStep(
        num_samples=len(are_cut),
        num_tokens=len(tokens),
        log_prob_mean=log_prob.mean().item(),
        entropy_mean=entropy.mean().item(),
        truncated_share=sum(are_cut) / len(are_cut),
        loop_share=sum(are_looping) / len(are_looping),
        teacher_kl=of_teacher.mean().item(),
        accuracy=sum(are_right) / len(are_right),
        num_hints=num_hints,
        let_through={**let_through, TEACHER_ALONE: LetThrough(1.0, 1.0)},
    )


def _rows(reading: Reading, num_others: int) -> Tensor:
    """Return the numbers of this replica's tokens, [4 + others, R] float64, as `first_step` takes them."""
    stats, measures, own = reading.output.stats, reading.output.measures, None
    if stats is not None and measures is not None:
        assert measures.kl_to_anchor is not None and measures.kl_of_others is not None, "the measurement asks for both"
        of_target, of_teacher = measures.kl_to_anchor.unbind(1)
        columns = [stats.student_log_prob, stats.student_entropy, of_teacher, of_target]
        own = torch.stack([*(column.double() for column in columns), *measures.kl_of_others.unbind(1)])
    return reading.on_whole_replica(own, 4 + num_others)
