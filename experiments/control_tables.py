# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The table of docs/results.md about controls, from the lines of control_map.py; anchored_tables.py writes it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from cell_lines import RESULTS, Line
from page_tables import markdown, short, spread

LINES = RESULTS / "control_map.jsonl"
CHOOSING_TASKS = ("leak", "quickstart", "wrong_hints", "many_answers", "hard")
"""The tasks on which the setting is chosen."""
LABELS = {
    "anchored_matched": "the default",
    "student_matched": "mix with the student",
    "teacher_alone": "teacher alone",
    "k1": "controls, K = 1",
    "k2": "controls, K = 2",
    "k4": "controls, K = 4",
    "k8": "controls, K = 8",
    "w050": "controls, K = 4, w = .5",
    "w150": "controls, K = 4, w = 1.5",
    "reference": "controls, K = 4, anchored",
    "share_0.1_k1": "controls, K = 1, l = .1",
    "share_0.1": "controls, K = 2, l = .1",
    "share_0.2": "controls, K = 2, l = .2",
}
"""The arms of the table of choices."""
FIXED_TARGETS = ("anchored_matched", "student_matched", "teacher_alone")
"""The arms without controls; their lines on the seeds that are reported are those of anchored_map.py."""
SHARED = "controls_with_share"
"""The arm that is compared with them: that of share_0.1."""
TIMES = 4
LONG = f"_x{TIMES}"
"""The end of the name of an experiment of `TIMES` the steps of its task."""
OF_LONG_RUNS = {"controls_of_student": "the student", SHARED: "l = .1"}
"""The arms of these runs, and their anchors."""
RIVALS = {"topd": "TOP-D", "trust_region": "SDPO's trust region"}
"""Targets of others."""
ABLATIONS = {"controls_own_hint": "the own hint as every control", "controls_other_hint": "another problem's hint"}
"""Targets with controls, and the student as the anchor, that should learn nothing of a problem."""
AGAIN = "_again"
"""The end of the names of the fixed targets on later bases, which the rivals have on the same tasks."""


def table_of_choices(lines: Sequence[Line]) -> list[str]:
    """Return the sampled accuracy of each setting after the last step, over the seeds with a line for each of them."""
    found = {(line["arm"], line["experiment"], line["seed"]): line["sampled"][-1] for line in lines}
    seeds = [s for s in (1, 2) if all((arm, task, s) in found for arm in LABELS for task in CHOOSING_TASKS)]
    scores = {(arm, task): [found[arm, task, s] for s in seeds] for arm in LABELS for task in CHOOSING_TASKS}
    best = {task: max(mean(scores[arm, task]) for arm in LABELS) for task in CHOOSING_TASKS}
    of_seeds = f"seed{'s' * (len(seeds) > 1)} {' and '.join(map(str, seeds))}"
    rows = [[of_seeds, *CHOOSING_TASKS, "mean loss", "worst loss"], ["---"] * (3 + len(CHOOSING_TASKS))]
    for arm, label in LABELS.items():
        losses = [best[task] - mean(scores[arm, task]) for task in CHOOSING_TASKS]
        rows.append([label, *(spread(scores[arm, t]) for t in CHOOSING_TASKS), short(mean(losses)), short(max(losses))])
    return markdown(rows)


def table_of_long_runs(lines: Sequence[Line]) -> list[str]:
    """Return accuracy and entropy of the runs of four times the steps, after a fifth, a half and all of them."""
    shown = (1, 4, 9)  # points, of ten
    rows = [["task", "anchor", "seeds", "sampled at .8", "2", "4 times the steps", "entropy at .8", "2", "4"]]
    rows.append(["---"] * len(rows[0]))
    long = [line for line in lines if line["experiment"].endswith(LONG)]
    for task in dict.fromkeys(line["experiment"] for line in long):
        for arm, anchor in OF_LONG_RUNS.items():
            runs = [line for line in long if (line["experiment"], line["arm"]) == (task, arm)]
            seeds = " ".join(str(line["seed"]) for line in sorted(runs, key=lambda line: line["seed"]))
            sampled = [spread([line["sampled"][at] for line in runs]) for at in shown]
            entropies = [f"{mean(line['entropy'][at] for line in runs):.2g}".lstrip("0") for at in shown]
            rows.append([task.removesuffix(LONG), anchor, seeds, *sampled, *entropies])
    return markdown(rows)


def table_of_comparison(lines: Sequence[Line], of_fixed: Sequence[Line]) -> list[str]:
    """Return the sampled accuracy of the fixed targets and of controls with a shared anchor, on the same seeds.

    The rivals are beside them, where they have run on these seeds and on the same bases.
    ``lines``: those of controls; ``of_fixed``: those of anchored_map.py.
    """
    arms = (*FIXED_TARGETS, SHARED)
    shown = [line for line in (*of_fixed, *lines) if line["arm"] in (*arms, *RIVALS)]
    found = {(line["experiment"], line["arm"], line["seed"]): line["sampled"][-1] for line in shown}
    labels = [*(LABELS[arm] for arm in (*FIXED_TARGETS, "share_0.1")), *RIVALS.values()]
    rows, losses = [["task", "seeds", *labels], ["---"] * (2 + len(labels))], []
    compared, later = {line["experiment"] for line in of_fixed}, tasks_of_later_bases(lines)
    for task in dict.fromkeys(x["experiment"] for x in lines if x["arm"] == SHARED and x["experiment"] in compared):
        seeds = sorted(line["seed"] for line in lines if (line["experiment"], line["arm"]) == (task, SHARED))
        scores = [[found[task, arm, seed] for seed in seeds] for arm in arms]
        losses.append([max(map(mean, scores)) - mean(own) for own in scores])
        of_rivals = [[found[task, arm, seed] for seed in seeds if (task, arm, seed) in found] for arm in RIVALS]
        beside = ["" if task in later or len(own) < len(seeds) else short(mean(own)) for own in of_rivals]
        of_targets = (*(short(mean(own)) for own in scores[:-1]), spread(scores[-1]))
        rows.append([task, f"{seeds[0]}-{seeds[-1]}", *of_targets, *beside])
    for name, of in (("mean loss", mean), ("worst loss", max)):
        rows.append([name, "", *(short(of(column)) for column in zip(*losses, strict=True)), *[""] * len(RIVALS)])
    return markdown(rows)


def table_of_later_bases(lines: Sequence[Line]) -> list[str]:
    """Return the sampled accuracy of the fixed targets and the rivals on later bases of the same seeds."""
    labels = {f"{arm}{AGAIN}": LABELS[arm] for arm in FIXED_TARGETS} | RIVALS
    found = {(line["experiment"], line["arm"], line["seed"]): line["sampled"][-1] for line in lines}
    seeds = sorted({seed for task, arm, seed in found if arm.endswith(AGAIN)})
    rows = [[f"seeds {seeds[0]}-{seeds[-1]}", *labels.values()], ["---"] * (1 + len(labels))]
    for task in tasks_of_later_bases(lines):
        scores = [[found[task, arm, seed] for seed in seeds if (task, arm, seed) in found] for arm in labels]
        rows.append([task, *(spread(own) if len(own) == len(seeds) else "" for own in scores)])
    return markdown(rows)


def table_of_ablations(lines: Sequence[Line]) -> list[str]:
    """Return the sampled accuracy and the entropy of `ABLATIONS` after the last step."""
    found = [line for line in lines if line["arm"] in ABLATIONS]
    seeds = sorted({line["seed"] for line in found})
    columns = [f"{label}: {what}" for label in ABLATIONS.values() for what in ("sampled", "entropy")]
    rows = [[f"seeds {seeds[0]}-{seeds[-1]}", *columns], ["---"] * (1 + len(columns))]
    for task in CHOOSING_TASKS:
        runs = [[line for line in found if (line["arm"], line["experiment"]) == (arm, task)] for arm in ABLATIONS]
        cells = [spread([line[key][-1] for line in own]) for own in runs for key in ("sampled", "entropy")]
        rows.append([task, *cells])
    return markdown(rows)


def tasks_of_later_bases(lines: Sequence[Line]) -> list[str]:
    """Return the tasks on which a fixed target has run again."""
    return list(dict.fromkeys(line["experiment"] for line in lines if line["arm"].endswith(AGAIN)))


TABLES = {
    "controls": table_of_choices,
    "ablations_of_controls": table_of_ablations,
    "long": table_of_long_runs,
    "again": table_of_later_bases,
}
"""Name of a table -> the function that returns its rows from the lines."""
