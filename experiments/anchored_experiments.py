# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The experiments of the map of docs/results.md: tasks, arms, steps, and what a cell measures."""

from __future__ import annotations

import dataclasses
import importlib.util
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import choosing_subtraction
import leak_classes
import unsolved_leaking_subtraction
from leak_sweep import measured_leaks
from refreshed_anchors import AVERAGED, EVERY, watch_refreshed
from thinking_forks import measured_thinking

from _lib import additions, leaking_subtraction, subtraction, subtraction_chats, unsolved_subtraction
from _lib.pretraining import Base, make_base, write_records
from _lib.task import Record, Task
from _lib.variants import Variant
from _lib.watched_runs import WITHOUT_GUARDS, Point, share_with_work, watch

if TYPE_CHECKING:  # torch and Megatron are imported by the functions that need them, so that --help answers at once
    from megatron_selfdistill.trainer import Trainer

SEEDS = (11, 12, 13, 14, 15)
"""The seeds that are reported; the settings were chosen on seeds 1 and 2."""
FORWARD = "loss.divergence=forward_kl"
GUIDED = "rollout.guidance=mixed"
SIX = {
    "teacher_alone": ("target=teacher_alone",),
    "student_matched": ("target=capped", "target.anchor=student"),
    "student_strict": ("target=strict", "target.anchor=student"),
    "anchored_fixed": ("target=geometric_mean", "target.anchor=reference"),
    "anchored_matched": ("target=capped", "target.anchor=reference"),
    "anchored_strict": ("target=strict", "target.anchor=reference"),
}
"""The six arms: the teacher alone; the mix with the student, matched with the bound and strictly; the anchored target
with k = 1 + w, matched with the bound (the default) and matched strictly."""
ABLATIONS = {
    "other_hint": (*SIX["anchored_matched"], "data.solutions=other"),
    "no_hint": (*SIX["anchored_matched"], "data.solutions=none"),
}
"""The default whose teacher reads the hint of another problem, or the wording of a hint alone."""
TWO_BEST = ("anchored_matched", "anchored_fixed")
FOR_UNSOLVED = {
    "teacher_alone": SIX["teacher_alone"],
    "student_matched": SIX["student_matched"],
    "anchored_matched": SIX["anchored_matched"],
    "anchored_matched_w2": (*SIX["anchored_matched"], "target.teacher_weight=2"),
    "teacher_alone_forward": (*SIX["teacher_alone"], FORWARD),
    "student_matched_forward": (*SIX["student_matched"], FORWARD),
    "anchored_matched_forward": (*SIX["anchored_matched"], FORWARD),
    "anchored_matched_forward_w2": (*SIX["anchored_matched"], FORWARD, "target.teacher_weight=2"),
}
GUIDED_AND_RFT = {
    "student_matched_guided": (*SIX["student_matched"], GUIDED),
    "student_matched_forward_guided": (*SIX["student_matched"], FORWARD, GUIDED),
    "rft": ("method.name=rft",),
}
GUIDED_AND_ANCHORED = {
    "anchored_matched_forward_guided": (*SIX["anchored_matched"], FORWARD, GUIDED),
    "anchored_matched_forward_w2_guided": (*SIX["anchored_matched"], FORWARD, "target.teacher_weight=2", GUIDED),
}
"""Guided rollouts from the anchored target."""
GUIDED_ABLATIONS = {
    **ABLATIONS,
    **{
        f"guided_{name}": (*GUIDED_AND_ANCHORED["anchored_matched_forward_w2_guided"], overrides[-1])
        for name, overrides in ABLATIONS.items()
    },
    "teacher_alone_forward_guided": (*SIX["teacher_alone"], FORWARD, GUIDED),
}
"""The ablations, the same with guided rollouts, w = 2 and forward KL, and guided rollouts without any anchor."""
WEIGHTS = (0.25, 0.75, 2)
SWEEP = {
    f"{rule}_w{weight}_{mark}": (*SIX[f"anchored_{rule}"], f"target.teacher_weight={weight}")
    for mark in leak_classes.HINT_LEAKS
    for rule in ("matched", "fixed")
    for weight in WEIGHTS
}
"""Rule, w, and the mark of the hint's leak in leak_classes.py: one run for each, with all four leaks of the base."""
Figures = dict[str, Any]
"""The figures of one cell, by name."""


def _problems(base: Base, seed: int) -> list[Record]:
    found: list[Record] = base.task.training_problems(seed)
    return found


def _wrong_hints(base: Base, seed: int) -> list[Record]:
    found: list[Record] = _example("02_wrong_hints").problems_with_wrong_hints(seed, 0.6)
    return found


def _hard_problems(base: Base, seed: int) -> list[Record]:
    return subtraction.hard_training_problems()


def _hard_wrong_hints(base: Base, seed: int) -> list[Record]:
    """Return the hard problems; 60 % of the hints have one wrong digit, whose answers stay right."""
    rng = random.Random(seed)
    records = subtraction.hard_training_problems()
    return [
        entry | {"solution": subtraction.with_one_wrong_digit(entry["answer"], rng)} if rng.random() < 0.6 else entry
        for entry in records
    ]


def _surer_hints(base: Base, seed: int) -> list[Record]:
    """Return the problems of choosing_subtraction.py with the hint after which the base checks least."""
    return choosing_subtraction.training_problems(seed, "K")


def _conversations(base: Base, seed: int) -> list[Record]:
    found: list[Record] = _example("08_chat_logs").conversations(base, seed)
    return found


def _example(name: str) -> ModuleType:
    """Return an example as a module; its name begins with a digit and cannot be imported."""
    file = Path(__file__).resolve().parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _refreshed(variant: Variant, base: Base, run_dir: Path, steps: Sequence[int]) -> Figures:
    return columns(watch_refreshed(variant, base, run_dir, steps, num_samples=2))


@dataclass(frozen=True)
class Experiment:
    """Runs on one task that differ in their arm and their seed."""

    name: str
    title: str
    task: Task
    steps: tuple[int, ...]
    """The steps at which a run is measured; the last one is the length of the run."""
    arms: Mapping[str, Sequence[str]] = field(default_factory=lambda: SIX)
    """Name of an arm -> its overrides."""
    settings: tuple[str, ...] = ()
    """Further overrides of all arms; {directory} stands for the directory of the experiment."""
    problems: Callable[[Base, int], list[Record]] = _problems
    """The records to train on, of a base and a seed."""
    held_out: Callable[[], list[Record]] | None = None
    """The held-out problems; None is those of the task."""
    num_samples: int = 2
    """Sampled responses per held-out problem at each point."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Files that ``settings`` name: name in {directory} -> text."""
    measure: Callable[[Variant, Base, Path, Sequence[int]], Figures] | None = None
    """Trains and measures a run in place of `watch`, from the variant, the base, the run directory and the steps."""


@dataclass(frozen=True)
class Cell:
    """One experiment, one arm and one seed; the arm ``base`` measures the base with and without hints."""

    experiment: Experiment
    arm: str
    seed: int
    patch: Callable[[], AbstractContextManager[None]] = nullcontext
    """What is in force while the run trains, and not while its base is pretrained."""

    def run(self, root: Path, directory: Path) -> Figures:
        """Train and measure in ``directory``, with the base under ``root``; return the figures of the cell's line."""
        experiment, shared = self.experiment, directory.parent
        base = make_base(experiment.task, self.seed, root / "bases")
        if experiment.held_out is not None:
            base = dataclasses.replace(base, held_out=write_records(shared / "held_out.jsonl", experiment.held_out()))
        problems = shared / f"train-seed{self.seed}.jsonl"
        if not problems.exists():
            write_records(problems, experiment.problems(base, self.seed))
        for name, text in experiment.files.items():
            (shared / name).write_text(text, encoding="utf-8")
        settings = [setting.format(directory=shared) for setting in experiment.settings]
        arm = experiment.arms.get(self.arm, ())
        overrides, shown = (*arm, *settings), {"overrides": [*arm, *experiment.settings]}
        unguarded = Variant(self.arm, (*overrides, *WITHOUT_GUARDS))
        if experiment.arms is SWEEP:
            return shown | self._leaks(unguarded, base, directory)
        variant = unguarded.on(problems)
        with self.patch():
            if experiment.measure is not None:
                steps = (0,) if self.arm == "base" else experiment.steps
                return shown | experiment.measure(variant, base, directory, steps)
            if self.arm == "base":
                return measured_base(variant, base, directory, experiment)
            return shown | self._columns(variant, base, directory)

    def _columns(self, variant: Variant, base: Base, directory: Path) -> Figures:
        experiment = self.experiment
        return columns(watch(variant, base, directory, experiment.steps, num_samples=experiment.num_samples))

    def _leaks(self, variant: Variant, base: Base, directory: Path) -> Figures:
        rule, weight, mark = self.arm.split("_")
        chosen = [r for r in leak_classes.training_problems(self.seed) if r["id"].endswith(mark)]
        held_out = [r for r in leak_classes.held_out_problems() if r["id"].endswith(mark)]
        here = directory.parent / f"{self.arm}-seed{self.seed}"
        base = dataclasses.replace(base, held_out=write_records(here / "held_out.jsonl", held_out))
        problems = write_records(here / "train.jsonl", chosen)
        return measured_leaks(
            variant.on(problems), base, directory / "run", self.experiment.steps, rule, float(weight[1:])
        )


def measured_base(variant: Variant, base: Base, directory: Path, experiment: Experiment) -> Figures:
    """Return the figures of the base at step 0, and its sampled accuracy and work with hints."""
    hinted: Figures = {}

    def with_hints(trainer: Trainer) -> None:
        result = trainer.evaluate(hinted=True, num_transcripts=None)
        samples = [t for t in result.transcripts if t.sample is not None]
        assert result.sampled_accuracy is not None
        hinted["hinted"] = round(result.sampled_accuracy, 4)
        hinted["hinted_work"] = round(share_with_work(samples, base), 4)

    points = watch(variant, base, directory, (0,), num_samples=experiment.num_samples, at_end=with_hints)
    return columns(points) | hinted


def columns(points: Sequence[Point]) -> Figures:
    """Return a list of the values at all points for each figure."""
    rows = [dataclasses.asdict(point) for point in points]
    rows = [row | row.pop("further") for row in rows]
    return {name: [value and round(value, 4) for value in (row[name] for row in rows)] for name in rows[0]}


LEAK_STEPS = (25, 50, 75, 100, 150, 200, 250, 300, 350, 400)
LONG = (100, 200, 300, 400, 500, 600, 700, 800, 900, 1000)
SHORT = (25, 50, 75, 100, 150)
CHATS = {"chat_template.jinja": subtraction_chats.CHAT_TEMPLATE}
CHAT_SETTINGS = ("recipe=chat_logs", "data.chat_template={directory}/chat_template.jinja")
EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment("leak", "A leaking hint, reverse KL", leaking_subtraction.TASK, LEAK_STEPS),
        Experiment(
            "sweep",
            "The base's own leak and the hint's leak, for three weights",
            leak_classes.TASK,
            (50, 100),
            SWEEP,
            ("rollout.max_new_tokens=8",),
        ),
        Experiment(
            "leak_forward",
            "A leaking hint, forward KL",
            leaking_subtraction.TASK,
            LEAK_STEPS,
            {name: SIX[name] for name in ("student_matched", *TWO_BEST)},
            (FORWARD,),
        ),
        Experiment("quickstart", "The quickstart", subtraction.TASK, SHORT),
        Experiment("wrong_hints", "60 % wrong hints, reverse KL", subtraction.TASK, SHORT, problems=_wrong_hints),
        Experiment(
            "wrong_hints_forward",
            "60 % wrong hints, forward KL",
            subtraction.TASK,
            SHORT,
            settings=(FORWARD,),
            problems=_wrong_hints,
        ),
        Experiment(
            "hard",
            "Hard problems, which the base hardly ever solves",
            subtraction.TASK,
            (25, 50, 100),
            problems=_hard_problems,
            held_out=subtraction.hard_held_out_problems,
        ),
        Experiment("many_answers", "Many right answers", additions.TASK, (50, 100, 150), num_samples=32),
        Experiment(
            "chat_logs",
            "Chat logs",
            subtraction_chats.TASK,
            (25, 50, 75, 100, 150, 200),
            settings=CHAT_SETTINGS,
            problems=_conversations,
            files=CHATS,
        ),
        Experiment(
            "unsolved",
            "Problems that the base never solves",
            unsolved_subtraction.TASK,
            (50, 100),
            FOR_UNSOLVED | GUIDED_AND_RFT,
        ),
        Experiment(
            "unsolved_leaking",
            "Problems that the base never solves, with a leaking hint",
            unsolved_leaking_subtraction.TASK,
            (50, 100, 200),
            FOR_UNSOLVED,
        ),
        Experiment(
            "unsolved_wrong",
            "Problems that the base never solves, with 60 % wrong hints",
            unsolved_subtraction.TASK,
            (50, 100),
            FOR_UNSOLVED,
            problems=_hard_wrong_hints,
        ),
        Experiment(
            "unsolved_guided",
            "Problems that the base never solves, guided rollouts from the anchored target",
            unsolved_subtraction.TASK,
            (50, 100),
            GUIDED_AND_ANCHORED,
        ),
        Experiment(
            "unsolved_leaking_guided",
            "Problems that the base never solves, with a leaking hint, guided rollouts from the anchored target",
            unsolved_leaking_subtraction.TASK,
            (50, 100, 200),
            GUIDED_AND_ANCHORED,
        ),
        Experiment(
            "unsolved_wrong_guided",
            "Problems that the base never solves, with 60 % wrong hints, guided rollouts from the anchored target",
            unsolved_subtraction.TASK,
            (50, 100),
            GUIDED_AND_ANCHORED,
            problems=_hard_wrong_hints,
        ),
        Experiment(
            "choosing",
            "A base that tries, checks and tries again; after the hint, half of the texts check nothing",
            choosing_subtraction.TASK,
            (50, 100, 150, 200),
            measure=measured_thinking,
        ),
        Experiment(
            "choosing_surer",
            "The same; after the hint, nine tenths of the texts check nothing",
            choosing_subtraction.TASK,
            (50, 100, 150, 200),
            SIX | {"anchored_matched_w025": (*SIX["anchored_matched"], "target.teacher_weight=0.25")},
            problems=_surer_hints,
            held_out=lambda: choosing_subtraction.held_out_problems("K"),
            measure=measured_thinking,
        ),
        Experiment(
            "leak_slow",
            "A leaking hint, a third of the learning rate",
            leaking_subtraction.TASK,
            LEAK_STEPS,
            {name: SIX[name] for name in TWO_BEST},
            ("optimizer.lr=1e-4",),
        ),
        Experiment(
            "leak_refreshed",
            f"A leaking hint, an anchor that follows: every {EVERY} steps, or as an average",
            leaking_subtraction.TASK,
            LEAK_STEPS,
            {f"{name}_refreshed": SIX[name] for name in TWO_BEST}
            | {f"{name}_averaged": (*SIX[name], *AVERAGED) for name in TWO_BEST},
            measure=_refreshed,
        ),
        Experiment("leak_long", "A leaking hint, 1000 steps", leaking_subtraction.TASK, LONG),
        Experiment("quickstart_long", "The quickstart, 1000 steps", subtraction.TASK, LONG),
    )
}
WITH_ABLATIONS = {
    **dict.fromkeys(("leak", "quickstart", "hard", "many_answers", "wrong_hints", "wrong_hints_forward"), ABLATIONS),
    **dict.fromkeys(("choosing", "choosing_surer"), ABLATIONS),
    **dict.fromkeys(("unsolved", "unsolved_leaking", "unsolved_wrong"), GUIDED_ABLATIONS),
}
"""Name of an experiment -> the arms of its ablations."""
EXPERIMENTS |= {
    f"{name}_ablations": dataclasses.replace(
        EXPERIMENTS[name], name=f"{name}_ablations", title=f"{EXPERIMENTS[name].title}: ablations", arms=arms
    )
    for name, arms in WITH_ABLATIONS.items()
}
