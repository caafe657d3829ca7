# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The figures of a report: their metrics, what a healthy and a sick curve look like, and the rules of a sick curve.

docs/monitoring.md repeats the sentences of a figure in the row of its first metric; a test compares both.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_selfdistill.instruments.report.run_record import RunRecord
from megatron_selfdistill.instruments.report.sick_rules import Rule, falls, falls_again, flat, once_above, rises

NATS, SHARE = "nats per token", "share"


@dataclass(frozen=True)
class ReportFigure:
    """One figure of a report: some metrics over the steps."""

    title: str
    metrics: dict[str, str]
    """The key of a metric -> its name in the legend.  A key may end with ``*``, which stands for a number; ``*`` in the
    name is the same number."""
    unit: str
    """The unit of the values, as the axis shows it."""
    healthy: str
    """A sentence about a healthy curve."""
    sick: str
    """A sentence about a sick curve."""
    rules: Sequence[Rule] = ()
    """The rules (`sick_rules`) that compute what ``sick`` says; empty for a figure that only a reader can judge."""
    guarded: str | None = None
    """The metric whose limits (`run_record.limits`) the figure shows; None for a figure without limits."""

    def present(self, keys: Collection[str]) -> dict[str, str]:
        """Return the metrics of the figure that are in ``keys``, without ``*``, in the order of the legend."""
        found: dict[str, str] = {}
        for pattern, name in self.metrics.items():
            form = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
            matches = [(key, match) for key in keys if (match := form.fullmatch(key)) is not None]
            for key, match in sorted(matches, key=lambda pair: [int(number) for number in pair[1].groups()]):
                found[key] = name.replace("*", match[1]) if match.groups() else name
        return found

    def sick_since(self, run: RunRecord) -> int | None:
        """Return the step since which a run is sick by one of the rules; None if it is not."""
        return min((since for rule in self.rules if (since := rule(run)) is not None), default=None)


_TRAINED_AND_EVALUATED = ("training", "evaluation, greedy", "evaluation, sampled")
_HINT_8GRAMS = ("leak/hint_8grams", "evaluation/greedy_hint_8grams", "evaluation/sampled_hint_8grams")
_LEAK_WORDS = ("leak/words_per_1000", *(f"evaluation/{kind}_leak_words_per_1000" for kind in ("greedy", "sampled")))

GROUPS: dict[str, list[ReportFigure]] = {
    "Accuracy on held-out problems": [
        ReportFigure(
            "Accuracy",
            {"evaluation/greedy_accuracy": "greedy", "evaluation/sampled_accuracy": "sampled"},
            SHARE,
            "The accuracy rises.",
            "The accuracy falls again: use an earlier checkpoint.",
            [falls_again("evaluation/greedy_accuracy"), falls_again("evaluation/sampled_accuracy")],
        ),
        ReportFigure(
            "Several samples per problem",
            {"evaluation/pass_at_*": "pass@*", "evaluation/majority_at_*": "majority@*"},
            SHARE,
            "All curves rise.",
            "The accuracy rises while pass@k with a large k falls: the responses lose their variety.",
        ),
        ReportFigure(
            "Different right answers",
            {"evaluation/distinct_right": "different right answers per problem"},
            "answers",
            "The number rises with the accuracy, or stays where each problem has one right answer.",
            "The number falls while the accuracy rises: the samples become one response.",
        ),
        ReportFigure(
            "Overconfidence",
            {"evaluation/greedy_ocg": "greedy", "evaluation/sampled_ocg": "sampled"},
            "mean confidence less accuracy",
            "The gap stays near its first value or comes nearer to 0.",
            "The gap rises: the confidence grows faster than the accuracy.",
            [rises(f"evaluation/{kind}_ocg", by=0.05, span=(-1, 1)) for kind in ("greedy", "sampled")],
        ),
        ReportFigure(
            "Accuracy with hints",
            {"evaluation_hinted/greedy_accuracy": "greedy", "evaluation_hinted/sampled_accuracy": "sampled"},
            SHARE,
            "The accuracy with hints is clearly above the accuracy without hints.",
            "Both are about equal: the method cannot teach what the model cannot do with its hint.",
        ),
    ],
    "Loss": [
        ReportFigure(
            "Loss",
            {"loss/mean": "loss"},
            NATS,
            "The loss falls over the run.",
            "The loss does not fall by a fifth over tens of steps.",
            [flat("loss/mean")],
        ),
        ReportFigure(
            "Reverse KL of student and target",
            {"loss/reverse_kl": "reverse KL"},
            NATS,
            "The divergence is clearly above 0 at the first step, and falls.",
            "The divergence is below 1e-6 at the first step: the hint changes nothing.",
        ),
        ReportFigure(
            "Reverse KL along the response",
            {f"reverse_kl/tenth_{n:02d}": f"tenth {n}" for n in (1, 4, 7, 10)},
            NATS,
            "All parts of a response have a part of the divergence.",
            "Only the first tenth or only the last tenth has any: the hint decides how responses begin or end.",
        ),
        ReportFigure(
            "Surprise at the response",
            {"student_nll": "student", "teacher_cross_entropy": "teacher"},
            NATS,
            "The teacher's curve comes down to the student's curve.",
            "The teacher's curve rises: the responses move away from what the teacher would write.",
            [rises("teacher_cross_entropy", ratio=1.5, by=0.1)],
        ),
    ],
    "Entropy": [
        ReportFigure(
            "Entropy",
            {"entropy/student": "student", "entropy/teacher": "teacher", "entropy/target": "target"},
            NATS,
            "The entropy falls slowly, within the guards.",
            "The entropy rises, or it falls below a fiftieth of its first value.",
            [rises("entropy/student", ratio=2, by=0.05), falls("entropy/student", ratio=1 / 50)],
            guarded="entropy/student",
        ),
        ReportFigure(
            "Entropy of the target minus entropy of the student",
            {"entropy/target_minus_student": "target - student"},
            NATS,
            "The difference is at most 0 with the bound of k, and comes near 0 as the student learns.",
            "The difference is clearly above 0.",
        ),
        ReportFigure(
            "News of the hint",
            {"control/general": "what any hint does", "control/specific": "what only this one says"},
            NATS,
            "The specific part is clearly above 0.",
            "The specific part is near 0: the hints say little about single problems.",
        ),
        ReportFigure(
            "Same most likely token",
            {"top1_agreement": "student and teacher"},
            SHARE,
            "The agreement of student and teacher rises.",
            "The agreement is near 1 from the start: the hint changes nothing.",
        ),
    ],
    "Temperature of the mix": [
        ReportFigure(
            "k",
            {"k/mean": "mean", "k/p01": "first percentile", "k/p99": "99th percentile"},
            "temperature",
            "The mean is steady, and lies between the percentiles.",
            "All curves lie at the bound of k: the bound decides everywhere, and the entropy does not.",
        ),
        ReportFigure(
            "Tokens at the bound of k",
            {"status/capped": "all tokens", "forks/capped": "forks"},
            SHARE,
            "Some tokens are at the bound; whether that closes forks, their entropy shows.",
            "The share of all tokens is near 1.",
        ),
        ReportFigure(
            "Matched tokens",
            {"status/matched": "matched", "status/undetermined": "undetermined", "status/given": "given"},
            SHARE,
            "Most tokens are matched, or undetermined because the student is certain.",
            "Few tokens are matched or undetermined although the target matches the entropy.",
        ),
        ReportFigure(
            "Tokens without a match",
            {"status/unconverged": "unconverged", "status/out_of_range": "out of range"},
            SHARE,
            "No token is unconverged, and few tokens are out of range.",
            "A token is unconverged: report this fault with the configuration of the run.",
            [once_above("status/unconverged", 0)],
        ),
    ],
    "Responses": [
        ReportFigure(
            "Length of the responses",
            {"response/length_mean": "mean", "response/length_max": "longest"},
            "tokens",
            "The mean length stays near its first value.",
            "The mean length falls below a quarter of its first value: the responses no longer show their work.",
            [falls("response/length_mean", ratio=1 / 4)],
            guarded="response/length_mean",
        ),
        ReportFigure(
            "Responses that are cut",
            {"response/truncated_share": "training", "evaluation/greedy_truncated_share": "evaluation, greedy"},
            SHARE,
            "The share stays near 0.",
            "The share rises: read the samples, and raise rollout.max_new_tokens.",
            [rises("response/truncated_share", by=0.1), rises("evaluation/greedy_truncated_share", by=0.1)],
        ),
        ReportFigure(
            "Responses that end in a loop",
            {"response/loop_share": "training", "evaluation/greedy_loop_share": "evaluation, greedy"},
            SHARE,
            "The share stays near 0, or near its first value.",
            "The share rises: read the samples, and resume from an earlier checkpoint with a lower optimizer.lr.",
            [rises("response/loop_share", by=0.1), rises("evaluation/greedy_loop_share", by=0.1)],
        ),
        ReportFigure(
            "Length of the responses in evaluations",
            {"evaluation/greedy_mean_length": "greedy", "evaluation/sampled_mean_length": "sampled"},
            "tokens",
            "The lengths stay near their first values.",
            "The lengths fall together with the accuracy.",
        ),
    ],
    "Optimizer": [
        ReportFigure(
            "Norm of the gradient",
            {"gradient_norm": "norm"},
            "norm before clipping",
            "The norm stays near its first values.",
            "The norm is far above its first values: lower optimizer.lr.",
            [rises("gradient_norm", ratio=10, by=0.1)],
        ),
        ReportFigure(
            "Learning rate",
            {"learning_rate": "learning rate"},
            "learning rate",
            "The curve has the form of optimizer.lr_decay.style.",
            "The rate is 0, or another rate than the configuration gives.",
        ),
    ],
    "What only the hint gives": [
        ReportFigure(
            "Target's mass on tokens that a model hardly considers",
            {"target/mass_on_rare_student": "student", "target/mass_on_rare_reference": "reference"},
            SHARE,
            "The mass is far below the mass of recipe=teacher_alone.",
            "The mass rises: the target asks for tokens that the model did not consider.",
            [rises(f"target/mass_on_rare_{of}", ratio=2, by=1e-3) for of in ("student", "reference")],
        ),
        ReportFigure(
            "Entropy at the forks",
            {"forks/entropy_student": "student", "forks/entropy_target": "target"},
            "nats per fork",
            "Both curves are about equal.",
            "The target's curve is far below the student's curve while the accuracy falls: the target closes forks.",
        ),
        ReportFigure(
            "Pieces of the hint in the responses",
            dict(zip(_HINT_8GRAMS, _TRAINED_AND_EVALUATED, strict=True)),
            "share of the 8-grams",
            "The share stays near its first value.",
            "The share rises towards the value of an evaluation with hints: the responses recite the hint.",
            [rises(key, by=0.1) for key in _HINT_8GRAMS],
        ),
        ReportFigure(
            "Words about the hint",
            dict(zip(_LEAK_WORDS, _TRAINED_AND_EVALUATED, strict=True)),
            "per 1000 tokens",
            "The number stays near its first value.",
            "The number rises: the responses speak of a hint that they do not have.",
            [rises("leak/words_per_1000", ratio=2, by=1)],
        ),
    ],
    "Sampler and trainer": [
        ReportFigure(
            "Difference of the log-probs",
            {"sampler/log_prob_mean_abs_diff": "mean", "sampler/log_prob_max_abs_diff": "largest"},
            "nats",
            "The difference is small and steady.",
            "The difference grows: sampler and trainer compute different models.",
            [rises("sampler/log_prob_mean_abs_diff", ratio=3, by=0.01)],
            guarded="sampler/log_prob_mean_abs_diff",
        ),
        ReportFigure(
            "Correction for the sampler",
            {"correction/weight_mean": "mean weight", "correction/capped": "tokens at the cap"},
            "weight, share",
            "The mean weight is near 1, and few tokens are at the cap.",
            "The share of tokens at the cap grows.",
            [rises("correction/capped", by=0.1)],
        ),
        ReportFigure(
            "Guided responses",
            {"guided/log_ratio": "log q - log p"},
            NATS,
            "The distance of the guided responses is steady.",
            "The distance grows: guided responses are far off-policy.",
            [rises("guided/log_ratio", ratio=2, by=0.1)],
        ),
        ReportFigure(
            "Age of the sampler's weights",
            {"rollout/staleness_mean": "mean of the tokens", "rollout/staleness_max": "oldest token"},
            "steps",
            "The age is at most rollout.max_staleness.",
            "The mean is near its bound: most responses come from weights that are several steps old.",
        ),
        ReportFigure(
            "Servers",
            {"rollout/servers_alive": "alive"},
            "servers",
            "All servers answer.",
            "The number falls: read the log of the server in run_dir/servers.",
        ),
    ],
    "Own solutions and chat logs": [
        ReportFigure(
            "Problems with own solutions",
            {"solutions/available_share": "have a solution", "solutions/pass_rate": "samples that are right"},
            SHARE,
            "Most problems have a solution.",
            "Only few problems have a solution: raise method.num_samples.",
        ),
        ReportFigure(
            "Log-prob of the logged turns",
            {"turns/log_prob_mean": "mean", "turns/log_prob_min": "lowest turn"},
            NATS,
            "The mean stays near its first value.",
            "The mean falls steadily: the log has become off-policy.",
            [falls("turns/log_prob_mean", by=0.5)],
        ),
    ],
    "Time and memory": [
        ReportFigure(
            "Throughput",
            {"tokens_per_second/rollout": "sampling", "tokens_per_second/train": "training"},
            "tokens per second",
            "Both curves are steady after the first step.",
            "A curve falls over the run, or drops for some steps: another job uses the machine.",
        ),
        ReportFigure(
            "Duration of a step",
            {"seconds/step": "step", "seconds/rollout": "sampling", "seconds/train": "training"},
            "seconds",
            "The durations are steady, apart from steps after an evaluation or a save.",
            "The duration of a step grows while the responses keep their length.",
        ),
        ReportFigure(
            "Trainer and servers",
            {
                "rollout/generation_seconds": "servers generate",
                "rollout/waited_seconds": "trainer waits for responses",
                "rollout/servers_waited_seconds": "servers wait",
            },
            "seconds",
            "One of both waits is short: the slower side is never idle.",
            "Both wait: set rollout.ahead=1.",
        ),
        ReportFigure(
            "Generation and training at the same time",
            {"overlap/share": "of the step"},
            SHARE,
            "With rollout.ahead, the share is high.",
            "The share is 0: generation and training take turns.",
        ),
        ReportFigure(
            "Memory",
            {"memory/peak_gib": "peak on the GPU", "memory/rss_gib": "resident on the host"},
            "GiB",
            "The memory is flat after the first steps.",
            "The memory rises steadily.",
            [rises(f"memory/{of}_gib", ratio=1.25) for of in ("peak", "rss")],
        ),
    ],
}
"""The title of a group -> its figures, in the order of the page."""
