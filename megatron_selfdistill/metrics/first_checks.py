# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""What the first step of a run is checked for, and what it warns of."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_selfdistill.config import Config, method_class
from megatron_selfdistill.config.schema.data_config import plays_episodes
from megatron_selfdistill.config.schema.whole_config import trains_all_weights
from megatron_selfdistill.metrics.guards import LOOPS, MANY_LOOPS, TRUNCATED, RunUnhealthy

OF_SAMPLES = ("student_nll", "entropy/student", TRUNCATED, LOOPS)
"""The metrics that say something about the student only if the student samples the responses."""
SILENT_KL = 1e-6
"""The KL in nats per token below which the teacher does not differ from the student."""
WANDERING = 1.5
"""The entropy and the mean negative log-prob, in nats per token, above both of which samples wander off."""
MANY_CUT = 1 / 3
"""The share of responses cut at the limit of tokens above which the ends of responses are hardly trained."""
LITTLE_LET_THROUGH = 0.1
"""The share of the hint that the target lets through below which a run learns little of the hint.

At k = 1 + w and a small difference between teacher and anchor, the share is (w / (1 + w))^2, .18 for the default w."""
LITTLE_CHANGE = 0.01
"""The change of what a layer computes, relative to its size, below which a run learns nothing that shows.  A run of
`docs/real_model.md` that learns its instruction in ten steps has .06, and the default learning rate there has .003."""


def check_identity(loss: float, tolerance: float | None) -> None:
    """Raise `RunUnhealthy` unless ``|loss| <= tolerance``, in nats per token; None checks nothing.

    ``loss``: the mean divergence with the same weights and the same prompt for student and teacher.  The target is then
    the student's own distribution, and every divergence from it is 0.
    """
    if tolerance is not None and not abs(loss) <= tolerance:
        raise RunUnhealthy(
            "identity check: the same weights and the same prompt for student and teacher must give a loss of at most "
            f"{tolerance:g} nats per token, got {loss:g}; student and teacher do not compute the same "
            "function: look at dropout, the parallel sizes, packing and a model.provider of your own, and "
            "compare with a run on one rank (guards.start.identity_tolerance=null turns this check off)"
        )


def check_teacher_canary(teacher_cross_entropy: float, maximum: float | None) -> None:
    """Raise `RunUnhealthy` unless ``teacher_cross_entropy <= maximum``, in nats per token; None checks nothing.

    ``teacher_cross_entropy``: the metric of this name (`metrics.step_metrics`) for the first responses.
    """
    if maximum is not None and not teacher_cross_entropy <= maximum:
        raise RunUnhealthy(
            "teacher canary: the teacher's cross-entropy on the first responses must be at most "
            f"{maximum:g} nats per token, got {teacher_cross_entropy:g}; the teacher does not recognise the "
            "responses of the student: look at checkpoint.load, the tokenizer, the chat template and "
            "data.teacher_template (guards.start.max_teacher_cross_entropy=null turns this check off)"
        )


def warning_of_a_silent_teacher(metrics: Mapping[str, float], teacher_weight: float) -> str | None:
    """Return a warning if the mean KL(student || target) of the first step is below `SILENT_KL`; else None.

    At the first step teacher and student have the same weights, so the hint alone can make them differ.  There is no
    warning without loss/reverse_kl (a baseline, or no tokens), and none if the target is the student by definition
    (``teacher_weight`` 0).
    """
    kl = metrics.get("loss/reverse_kl")
    if kl is None or teacher_weight == 0 or not kl < SILENT_KL:
        return None
    return (
        f"warning: the mean KL of the first step is {kl:.1e} nats per token, so that there is nearly nothing to learn: "
        "teacher and student predict the same; look at data.teacher_template, data.chat_template and the solutions"
    )


def first_step_warnings(config: Config, metrics: Mapping[str, float]) -> list[str]:
    """Return the `first_step_advice` of a run for the metrics of its first step, as warnings.

    The responses are judged if the student samples them.  The target is judged if the teacher differs from its
    anchor, by more than `SILENT_KL`.
    """
    differs = metrics.get("teacher/kl_to_anchor", 0.0) >= SILENT_KL and not config.needs.reads_one_prompt
    known = {
        key: value
        for key, value in metrics.items()
        if (config.student_samples or key not in OF_SAMPLES) and (differs or key != "target/let_through")
    }
    return [f"warning: {sentence}" for sentence in first_step_advice(config, known)]


def first_step_advice(config: Config, metrics: Mapping[str, float]) -> list[str]:
    """Return a sentence, with keys to try, for each number of a first step with which a run learns little.

    ``metrics``: `OF_SAMPLES` and target/let_through, as far as they are known.  The last one bounds what a run learns
    only with a frozen reference: with target.anchor=student, every step starts where the last one ended.
    """
    rollout, target, found = config.rollout, config.target, []
    nll, entropy, truncated_share, loop_share = (metrics.get(key, 0.0) for key in OF_SAMPLES)
    if min(nll, entropy) > WANDERING:
        found.append(
            f"the samples of the first step wander: expected an entropy or a mean -log p of at most {WANDERING:g} nats "
            f"per token, got {entropy:.3g} and {nll:.3g}; try rollout.temperature={0.7 * rollout.temperature:.2g}"
        )
    if truncated_share > MANY_CUT and config.guards.min_length_ratio is not None:
        found.append(
            f"{truncated_share:.0%} of the responses of the first step are cut, expected at most a third, so that few "
            f"ends are trained; try rollout.max_new_tokens={2 * rollout.max_new_tokens}, or "
            "guards.min_length_ratio=null where the hint asks for shorter responses"
        )
    if loop_share > MANY_LOOPS:
        found.append(
            f"{loop_share:.0%} of the responses of the first step end in a loop, expected at most {MANY_LOOPS:.0%}; "
            f"try a rollout.temperature above {rollout.temperature:g}, and compare the prompts in the samples with the "
            "format that the model knows (data.chat_template)"
        )
    let_through = metrics.get("target/let_through", math.inf)
    if config.is_anchored and let_through < LITTLE_LET_THROUGH:
        keys = [f"a target.teacher_weight above {target.teacher_weight:g}"]
        keys += ["target.anchor=student (equal at the first step, then it follows the student)"]
        keys += ["loss.divergence=forward_kl"] * (config.loss.divergence != "forward_kl")
        found.append(
            f"the target lets {let_through:.1%} of the hint through, expected at least {LITTLE_LET_THROUGH:.0%} if the "
            f"hint tells what to do or what is true; then try {', '.join(keys)}"
        )
    return found


def first_step_lines(config: Config, metrics: Mapping[str, float]) -> list[str]:
    """Return what the first step shows: where the rewards come from and their mean, and steps that are too small."""
    lines, steps, lr = [], config.num_steps, config.optimizer.lr
    # The rewards of episodes, and those of a method with a hook of its own, are none of a verifier.
    hook = method_class(config.method.name).rewarded.__qualname__
    if config.needs.rewards and hook == "SelfDistillation.rewarded" and not plays_episodes(config):
        reward, mean = getattr(config.method, "reward", None), metrics.get("rewards/mean", math.nan)
        judge = f"evaluation.verifier={config.evaluation.verifier}" if reward is None else f"method.reward={reward}"
        lines.append(f"rewards: {judge}; {mean:.2f} {'of the responses are right' if reward is None else 'on average'}")
    if 0 < (change := largest_change(config)) < LITTLE_CHANGE:
        norm, factor = metrics.get("gradient_norm", math.nan), LITTLE_CHANGE / change
        lines.append(
            f"warning: optimizer.lr={lr:g} is small for {steps} steps: Adam moves a weight by at most this much per "
            f"step, whatever the gradient (its norm is {norm:.2g}), so that the run changes what a layer computes by "
            f"at most {change:.2%}, expected at least {LITTLE_CHANGE:.0%}: nothing will be learned; try "
            f"optimizer.lr={10 * lr * factor:.0e}, or num_steps above {math.ceil(steps * factor)}"
        )
    return lines


def largest_change(config: Config) -> float:
    """Return the largest relative change of what a layer computes over all steps of a run.

    Adam moves each element of a weight by about lr per step, whatever the size of its gradient.  If all N steps point
    the same way, the spectral norm of the change of a d x d matrix is at most N lr d, while that of random elements
    with the standard deviation s is 2 s sqrt(d).  The ratio is N lr sqrt(d) / (2 s).
    It is infinite for SGD, whose steps have no bound, and for adapters, one of whose factors begins at 0.
    """
    model, optimizer = config.model, config.optimizer
    if optimizer.optimizer != "adam" or not trains_all_weights(config) or not model.init_method_std:
        return math.inf
    return config.num_steps * optimizer.lr * math.sqrt(model.hidden_size) / (2 * model.init_method_std)
