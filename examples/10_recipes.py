# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The recipes of the literature side by side: equal budgets, one base, three tasks.

Every row samples 32 responses per step for 100 steps: one response to each of 32 problems, or eight to each of 4 where
a recipe compares responses to the same problem.  All rows have the optimizer and the learning rate of the examples,
the hint format of their base, and temperature 1; the published learning rates, batches, templates and temperatures
belong to other models.  What a recipe says about target, divergence, teacher, weights and rewards stays as published.

Six blocks:
    subtraction   one right text per problem; the base is right in a third of its samples
    additions     many right answers per problem: which recipe keeps them?
    unsolved      subtraction that the base never solves, so that rewards are silent
    calculator    subtraction with a tool, turn by turn
    stating       subtraction by a base that states an honest confidence: which recipe keeps it honest?
    checked       subtraction by a base that reads critiques, skills and responses, and gives scores

    python examples/10_recipes.py --block subtraction
    python examples/10_recipes.py --block unsolved --only default sdft grpo
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from _lib import (
    additions,
    calculator,
    checked_subtraction,
    row_records,
    stating_subtraction,
    subtraction,
    tables,
    unsolved_subtraction,
)
from _lib.command_line import console, example_parser, prepare_process
from _lib.curves import GREEDY, SAMPLED
from _lib.measurement import Measurement, measure
from _lib.pretraining import Base, prepared_base, write_records
from _lib.task import Task
from _lib.variants import Outcome, Variant, run_variant
from _lib.watched_runs import WITHOUT_GUARDS
from megatron_selfdistill.metrics.run_log import read_metrics

NUM_RESPONSES, NUM_STEPS = 32, 100
REWARD = "episodes/reward_mean"


@dataclass(frozen=True)
class Row:
    """A recipe with what it learns from."""

    title: str
    sees: str
    """What the teacher sees, or what the recipe has in place of a teacher."""
    num_samples: int
    """Episodes per problem; an episode is one response where the recipe has no second turn."""
    overrides: tuple[str, ...]
    turns: int = 1
    """The greatest number of responses per episode, where the recipe itself asks for a second one."""
    records: str = "problems"
    """What the row trains on: problems, worked (problems whose solution is the whole work, where a response shows any),
    skills (problems with a skill as their solution), logs (conversations of the base with a user who checks it), or
    explanations (of a teacher that sees the solutions)."""
    teacher: tuple[str, ...] = ()
    """The overrides of the run that trains the writer of explanations; empty where the base writes them."""

    @property
    def num_problems(self) -> int:
        """The problems of a step, so that a step has at most `NUM_RESPONSES` responses."""
        return NUM_RESPONSES // (self.num_samples * self.turns)

    @property
    def budget(self) -> str:
        """The responses of a step: problems x responses per problem."""
        return f"{self.num_problems} x {self.num_samples * self.turns}"


MIX = ("target=capped", "target.anchor=reference")
"""The mix with the frozen base in place of the teacher alone: the target of the default recipe."""
GUIDED = ("rollout.guidance=mixed", "loss.divergence=forward_kl", "target.teacher_weight=2")
"""Responses sampled from the target itself, and the settings that example 03 needs on problems that nobody solves."""
CHECKER = "environment.name=_lib.checker.Checker"
EXPLAINING = ("recipe=rlt", "method.closing_tag=';'")
"""RLT on column subtraction: the columns explain the answer, which stands after the semicolon."""
IMITATION = ("method.name=sft",)
HINDSIGHT = ("method.judge=_lib.checked_subtraction.hint", "method.min_length=1")
ROWS = {
    "default": Row("default", "the solution", 1, ("recipe=default",)),
    "other_hint": Row(
        "ablation: default, another hint",
        "the solution of another problem",
        1,
        ("recipe=default", "data.solutions=other"),
    ),
    "no_hint": Row("ablation: default, no hint", "the wording alone", 1, ("recipe=default", "data.solutions=none")),
    "opsa": Row("ablation: OPSA", "no teacher: a penalty on unlikely tokens", 1, ("recipe=opsa",)),
    "guided": Row("default, guided", "the solution, and it guides", 1, ("recipe=default", *GUIDED)),
    "teacher_alone": Row("teacher alone", "the solution", 1, ("recipe=teacher_alone",)),
    "own": Row("own solutions", "an own right response, of 8 more", 1, ("recipe=default", "method.name=own_solutions")),
    "off_policy": Row(
        "off-policy distillation",
        "the solution, and it writes",
        1,
        ("recipe=teacher_alone", "method.view=privileged", "loss.divergence=forward_kl"),
    ),
    "sdft": Row("SDFT", "the solution", 1, ("recipe=sdft",)),
    "sdft_frozen": Row("SDFT, frozen teacher", "the solution", 1, ("recipe=sdft", "teacher.weights=frozen")),
    "opsd": Row("OPSD", "the solution", 1, ("recipe=opsd",)),
    "pw_opsd": Row("PW-OPSD", "the solution", 1, ("recipe=pw_opsd",)),
    "tip": Row("TIP", "the solution", 1, ("recipe=tip",)),
    "eopd": Row("EOPD", "the solution", 1, ("recipe=eopd",)),
    "beta_opsd": Row("beta-OPSD", "the solution", 1, ("recipe=beta_opsd",)),
    "sr_opsd": Row("SR-OPSD", "the solution", 1, ("recipe=sr_opsd",)),
    "veto": Row("Veto", "the solution", 1, ("recipe=veto",)),
    "dapd": Row("DAPD", "the solution or the response, and it judges both", 1, ("recipe=dapd",), records="worked"),
    "past": Row(
        "PAST",
        "the solution and the attempt, and it retries what failed, 4 times",
        1,
        ("recipe=past", "method.hint_template='{attempt}H{solution}'"),
    ),
    "u_opsd": Row("U-OPSD", "the answer of most responses", 8, ("recipe=u_opsd",)),
    "rlcsd": Row("RLCSD", "no teacher: rewards, and right and wrong responses as hints", 8, ("recipe=rlcsd",)),
    "sdpo": Row("SDPO", "another right response", 8, ("recipe=sdpo",)),
    "sdpo_frozen": Row("SDPO, frozen teacher", "another right response", 8, ("recipe=sdpo", "teacher.weights=frozen")),
    "sdpo_mix": Row("SDPO, mix", "another right response", 8, ("recipe=sdpo", *MIX)),
    "opsd_rl": Row("OPSD with rewards", "the solution, beside rewards", 8, ("recipe=opsd_rl",)),
    "opsd_rl_mix": Row("OPSD with rewards, mix", "the solution, beside rewards", 8, ("recipe=opsd_rl", *MIX)),
    "pi_distill": Row("pi-Distill", "the solution, and it writes", 8, ("recipe=pi_distill",)),
    "scope": Row("SCOPE", "the solution, for wrong responses", 8, ("recipe=scope",)),
    "uni_opd": Row("Uni-OPD", "the solution, shifted by rewards", 8, ("recipe=uni_opd",)),
    "sod": Row("SOD", "the solution, weaker in late turns", 8, ("recipe=sod",)),
    "grpo": Row("GRPO", "no teacher: rewards", 8, ("recipe=grpo",)),
    "rft": Row("RFT", "no teacher: own right responses", 8, ("recipe=rft",)),
    "sft": Row("SFT", "no teacher: the solution as a response", 1, IMITATION),
    "sft_worked": Row(
        "SFT on worked solutions", "no teacher: the worked solution as a response", 1, IMITATION, records="worked"
    ),
    "caopd": Row("CaOPD", "the solution, and the confidence to state", 8, ("recipe=caopd",)),
    "caopd_frozen": Row(
        "CaOPD, frozen teacher",
        "the solution, and the confidence to state",
        8,
        ("recipe=caopd", "teacher.weights=frozen"),
    ),
    "sdpo_feedback": Row(
        "SDPO with feedback",
        "another right response, else a critique",
        8,
        ("recipe=sdpo_feedback", CHECKER, "environment.max_turns=1"),
    ),
    "rltf_sd": Row(
        "RLTF-SD", "no teacher: rewards, and a critique before the revision", 8, ("recipe=rltf_sd", CHECKER), 2
    ),
    "rltf_fm": Row(
        "RLTF-FM",
        "no teacher: rewards, and a critique to predict",
        8,
        ("recipe=rltf_fm", CHECKER, "method.reply_template='{problem}{response}'"),
        2,
    ),
    "skill_sd": Row(
        "Skill-SD, 100 problems",
        "a skill of earlier responses, beside rewards",
        8,
        ("recipe=skill_sd", "method.summarizer=_lib.checked_subtraction.summarize", "data.limit=100"),
    ),
    "skald": Row(
        "SKALD",
        "a skill, beside rewards, where it helps 8 more responses",
        8,
        ("recipe=skald",),
        records="skills",
    ),
    "openclaw": Row(
        "OpenClaw-RL",
        "the user's critique in a log, beside rewards",
        1,
        ("recipe=openclaw", *HINDSIGHT, "method.reward=_lib.checked_subtraction.satisfaction"),
        records="logs",
    ),
    "openclaw_full": Row(
        "OpenClaw-RL, full divergence",
        "the user's critique in a log",
        1,
        ("recipe=openclaw", *HINDSIGHT, "method.signal=full", "method.weight=0"),
        records="logs",
    ),
    "ovd": Row(
        "OVD",
        "no teacher: rewards, and the solution to give scores",
        8,
        ("recipe=ovd", f"method.template='{checked_subtraction.QUESTION}'"),
    ),
    "rlt": Row(
        "RLT, then SFT",
        "no teacher: explanations of a trained teacher",
        1,
        IMITATION,
        records="explanations",
        teacher=EXPLAINING,
    ),
    "explained": Row(
        "explanations of the base, SFT",
        "no teacher: explanations of the base",
        1,
        IMITATION,
        records="explanations",
    ),
}
ASKING = (
    "sdpo_feedback",
    "rltf_sd",
    "rltf_fm",
    "skill_sd",
    "skald",
    "openclaw",
    "openclaw_full",
    "ovd",
    "rlt",
    "explained",
)
"""The rows whose base must read critiques, skills or scores, or explain the solution."""
ABLATIONS = ("other_hint", "no_hint")
"""The rows that show what the hint of the row ``default`` does."""
COMMON = tuple(row for row in ROWS if row not in ("sdft_frozen", "caopd", "caopd_frozen", "sod", "sft_worked", *ASKING))
"""The rows of the blocks with one turn whose responses state no confidence."""
WITH_WORK = (*COMMON, "sft_worked")
"""The rows of such a block whose right responses show work that the solution leaves out."""


@dataclass(frozen=True)
class Block:
    """A task with its base, and what is measured on it."""

    title: str
    task: Task
    num_measured: int
    """Sampled responses per held-out problem, in the measurement at the end; a quarter of them during the run."""
    results: tuple[str, ...]
    """The figures of `RESULTS` that say something about the task."""
    rows: tuple[str, ...] = COMMON
    """The rows of `ROWS` that run on the task."""
    imitated: tuple[str, ...] = ("data.fields.solution=as_response",)
    """The overrides that give SFT a solution in the form of a response: here the answer without work."""


REACHED = ("greedy", "sampled", "pass_at_8")
COURSE = ("entropy", "sampled_at_quarter", "sampled_at_half")
BLOCKS = {
    "subtraction": Block("One right text", subtraction.TASK, 8, (*REACHED, "shows_work", *COURSE), rows=WITH_WORK),
    "additions": Block("Many right answers", additions.TASK, 32, (*REACHED, "different", *COURSE), imitated=()),
    "unsolved": Block(
        "Never solved by the base",
        unsolved_subtraction.TASK,
        8,
        (*REACHED, "shows_work", *COURSE),
        rows=WITH_WORK,
    ),
    "calculator": Block(
        "Turn by turn with a tool",
        calculator.TASK,
        8,
        ("sampled", "pass_at_8", "length", *COURSE),
        rows=("default", *ABLATIONS, "grpo", "sod"),
    ),
    "stating": Block(
        "Honest about its confidence",
        stating_subtraction.TASK,
        8,
        (*REACHED, "stated", "ocg", "ece", "spr", "entropy"),
        rows=("default", *ABLATIONS, "sdft", "sdft_frozen", "grpo", "caopd", "caopd_frozen"),
    ),
    "checked": Block(
        "Critiques, skills, scores and explanations",
        checked_subtraction.TASK,
        8,
        (*REACHED, "shows_work", *COURSE),
        rows=("default", *ABLATIONS, "grpo", *ASKING),
    ),
}
RESULTS = {
    "greedy": ("greedy", "{:.3f}"),
    "sampled": ("sampled", "{:.3f}"),
    "pass_at_8": ("pass@8", "{:.3f}"),
    "different": ("different", "{:.1f}"),
    "shows_work": ("work", "{:.2f}"),
    "length": ("length", "{:.1f}"),
    "stated": ("stated", "{:.2f}"),
    "ocg": ("OCG", "{:+.3f}"),
    "ece": ("ECE", "{:.3f}"),
    "spr": ("SPR", "{:.2f}"),
    "entropy": ("entropy", "{:.3f}"),
    "sampled_at_quarter": ("at 1/4", "{:.3f}"),
    "sampled_at_half": ("at 1/2", "{:.3f}"),
}
BUDGET = {
    "trained": ("trained", "{:.2f}"),
    "with_hint": ("with hint", "{:.2f}"),
    "tokens": ("tokens", "{:.0f}"),
    "cpu_seconds": ("seconds", "{:.0f}"),
}
"""Figure -> the heading of its column and its format."""
CAPTIONS = (
    "different: different right answers among the samples of a problem; entropy: nats per token; work: share of the "
    "samples that show their work; length: turns of an episode; stated: share of the samples that state a confidence; "
    "OCG: mean confidence less accuracy, above 0 where the model is overconfident; ECE: expected calibration error; "
    "SPR: share of the pairs of a right and a wrong sample in which the right one has the higher confidence; at 1/4, "
    "at 1/2: sampled accuracy after a quarter and half of the steps",
    "budget: problems x responses per step; trained: share of the responses that are trained on; with hint: share "
    "whose teacher sees a hint; tokens: sampled in training; seconds: processor time of the run with its evaluations",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example with the arguments of the command line; return the exit status."""
    parser = example_parser(__doc__)
    parser.add_argument("--block", nargs="+", choices=BLOCKS, default=list(BLOCKS), help="tasks (default: all)")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="recipes (default: all)")
    options = parser.parse_args(argv)
    prepare_process()
    for name in options.block:
        block, directory = BLOCKS[name], options.directory / "recipes" / f"{name}-seed{options.seed}"
        base = prepared_base(block.task, options.seed, options.directory)
        problems = write_records(directory / "train.jsonl", block.task.training_problems(options.seed))
        before = measured(measure(base, num_samples=block.num_measured))
        rows = [row for row in options.only if row in block.rows]
        runs = {row: run(row, block, base, problems, directory, options.steps or NUM_STEPS) for row in rows}
        show(block, before, {row: figures(row, outcome) for row, outcome in runs.items()})
    return 0


def run(
    name: str, block: Block, base: Base, problems: Path, directory: Path, steps: int, settings: Sequence[str] = ()
) -> Outcome:
    """Train the row ``name`` of `ROWS` from ``base`` for ``steps`` steps and measure it; ``settings`` come last."""
    row, overrides = ROWS[name], overrides_of(name, block)
    if row.records == "logs":
        problems, template = row_records.logged_conversations(base, directory)
        overrides = (*overrides, f"data.chat_template={template}")
    elif row.records == "worked" and block.rows is WITH_WORK:
        problems = row_records.worked_problems(problems, directory)
    elif row.records == "skills":
        problems = row_records.problems_with_skills(problems, directory)
    elif row.records == "explanations":
        problems = explained(name, base, problems, directory, steps)
    every = 0 if block.task.environment else max(steps // 4, 1)  # an evaluation plays no episodes
    often = (f"num_steps={steps}", f"evaluation.every={every}", "evaluation.at_start=false")
    quiet = (f"evaluation.num_samples={block.num_measured // 4}", "metrics.show_samples=0", "report.every=0")
    variant = Variant(name, overrides).on(problems, *often, *quiet, *WITHOUT_GUARDS, *settings)
    return run_variant(variant, base, directory, num_samples=block.num_measured)


def explained(name: str, base: Base, problems: Path, directory: Path, steps: int) -> Path:
    """Return explanations of the solutions of ``problems``, by a teacher of ``steps`` steps or by the base itself."""
    wanted, checkpoint = ROWS[name].teacher, base.directory / "checkpoints"
    if wanted:
        quiet = (f"num_steps={steps}", "evaluation.every=0", "evaluation.at_start=false", "report.every=0")
        variant = Variant(f"{name} teacher", (*wanted, *budget_of(NUM_RESPONSES // 8, 8))).on(
            problems, *quiet, *WITHOUT_GUARDS
        )
        checkpoint = run_variant(variant, base, directory).run_dir / "checkpoints"
    return row_records.explained_problems(checkpoint, base, problems, directory, wanted or EXPLAINING, name)


def overrides_of(name: str, block: Block) -> tuple[str, ...]:
    """Return what makes a run of ``block`` a run of the row: its recipe, and the budget that all rows share."""
    row = ROWS[name]
    return (*row.overrides, *(block.imitated if name == "sft" else ()), *budget_of(row.num_problems, row.num_samples))


def budget_of(num_problems: int, num_samples: int) -> tuple[str, ...]:
    """Return the overrides of a step with a number of problems, in which all rows are equal otherwise."""
    budget = (f"data.global_batch_size={num_problems}", f"rollout.num_samples={num_samples}")
    whole = ("rollout.temperature=1", "rollout.top_k=0", "rollout.top_p=1")
    return (*budget, *whole, "optimizer.lr_decay.style=constant")


def measured(measurement: Measurement) -> dict[str, Any]:
    """Return the figures of a measurement by their names, without the transcripts."""
    return {name: value for name, value in asdict(measurement).items() if name != "transcripts"}


def figures(name: str, outcome: Outcome) -> dict[str, Any]:
    """Return the figures of a run: its measurement, what it has cost, and its accuracy by step."""
    logged = read_metrics(outcome.run_dir)
    evaluated = [metrics for metrics in logged if SAMPLED.key in metrics] or episodes_by_quarter(logged)
    sampled = [metrics[SAMPLED.key] for metrics in evaluated]  # after each quarter of the steps
    return measured(outcome.measurement) | {
        "trained": average(logged, "rewards/trained_share", 1.0),
        "rewarded_groups": average(logged, "rewards/mixed_groups", None),
        "with_hint": average(logged, "hints/share", None if ROWS[name].sees.startswith("no teacher") else 1.0),
        "tokens": 0 if ROWS[name].overrides == IMITATION else sum(m.get("tokens/rollout", 0) for m in logged),
        "cpu_seconds": outcome.cpu_seconds,
        "step": [metrics["step"] for metrics in evaluated],
        "greedy_by_step": [metrics[GREEDY.key] for metrics in evaluated if GREEDY.key in metrics],
        "sampled_by_step": sampled,
        "sampled_at_quarter": sampled[0],
        "sampled_at_half": sampled[min(1, len(sampled) - 1)],
    }


def episodes_by_quarter(logged: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return the step after each quarter of a run with an environment, and the mean reward of the ten steps up to it.

    The rewards are those of the episodes on training problems that the steps sample.
    """
    steps = [metrics for metrics in logged if REWARD in metrics]
    ends = [max(len(steps) * quarter // 4, 1) for quarter in range(1, 5)]
    return [
        {
            "step": steps[end - 1]["step"],
            SAMPLED.key: mean(metrics[REWARD] for metrics in steps[max(end - 10, 0) : end]),
        }
        for end in ends
    ]


def average(logged: Sequence[Mapping[str, Any]], key: str, otherwise: float | None) -> float | None:
    """Return the mean of a metric over the steps that have it, or ``otherwise`` where no step has it."""
    values = [metrics[key] for metrics in logged if key in metrics]
    return mean(values) if values else otherwise


def show(block: Block, before: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what every row has reached, and what every row had to learn from."""
    results = {figure: RESULTS[figure] for figure in block.results}
    reached = tables.new_table(block.title, [heading for heading, _ in results.values()], CAPTIONS[0])
    reached.add_row("before", *cells(before, results))
    headings = [heading for heading, _ in BUDGET.values()]
    budgets = tables.new_table("", ["budget", *headings], CAPTIONS[1])
    budgets.add_column("teacher sees", justify="right")  # wraps: the names of the rows must not be cut
    for name, row in rows.items():
        reached.add_row(ROWS[name].title, *cells(row, results))
        budgets.add_row(ROWS[name].title, ROWS[name].budget, *cells(row, BUDGET), ROWS[name].sees)
    console.print(reached, budgets)


def cells(row: Mapping[str, Any], columns: Mapping[str, tuple[str, str]]) -> list[str]:
    """Return the figures of a row as text, empty where the row has no such figure."""
    return ["" if row.get(name) is None else form.format(row[name]) for name, (_, form) in columns.items()]


if __name__ == "__main__":
    sys.exit(main())
