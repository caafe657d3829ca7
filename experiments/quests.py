# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure what an agent learns from walkthroughs: 16 quests of TextWorld in three commands (_lib/coin_quests.py).

A cell is one arm and one seed, and its result is one line of results/quests.jsonl.  A cell whose line is there is not
run again.  An arm trains `NUM_STEPS` steps of 16 episodes, and is measured without hints on 8 sampled episodes of each
quest, and on greedy ones.  The package textworld must be there, as in the environment of `make test-environments`.

    python experiments/quests.py               every missing cell
    python experiments/quests.py --tables      the table of docs/environments.md from the lines
    python experiments/quests.py --check       the status is 1 if the page has another one
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from cell_lines import DOCS, REPOSITORY, RESULTS, Line, append_line, read_lines
from page_tables import complete, seeds_of, spread, write_or_compare

sys.path[:0] = [str(REPOSITORY / "examples")]

from _lib import coin_quests  # noqa: E402
from _lib.command_line import prepare_process  # noqa: E402
from _lib.episode_measurement import play  # noqa: E402
from _lib.pretraining import Base, make_base, write_records  # noqa: E402
from _lib.watched_runs import QUIET, WITHOUT_GUARDS, opened, train_one_step  # noqa: E402

LINES, PAGE = RESULTS / "quests.jsonl", DOCS / "environments.md"
SEEDS = (11, 12, 13)
NUM_STEPS = 200
RATE = 3e-3
PROBLEMS, HINTED = "problems.jsonl", "hinted.jsonl"
"""The quests, and the quests with their walkthroughs in the prompt."""
BATCH = ("data.global_batch_size=16",)
"""The batch of a step: each quest once."""
ARMS: dict[str, tuple[str, ...]] = {
    "before": (),
    "default": (),
    "student_mix": ("target.anchor=student",),
    "teacher_alone": ("target=teacher_alone",),
    "grpo": ("recipe=grpo", "data.solutions=given", "data.global_batch_size=2", "rollout.num_samples=8"),
    "default_other": ("data.solutions=other",),
}
"""Name of an arm -> its overrides."""
LABELS = {
    "before": "before",
    "default": "default",
    "student_mix": "mix with the student",
    "teacher_alone": "teacher alone",
    "grpo": "GRPO, 8 episodes of 2 quests in a step",
    "default_other": "ablation: default, another quest's walkthrough",
}
"""Name of an arm -> its label in the table."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing cells seed by seed, or write or compare the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help=f"(default: {' '.join(map(str, SEEDS))})")
    parser.add_argument("--rate", type=float, default=RATE, help=f"learning rate (default: {RATE:g})")
    parser.add_argument("--lines", type=Path, default=LINES, help="(default: experiments/results/quests.jsonl)")
    parser.add_argument("--directory", type=Path, default=Path("runs/quests"), help="games, bases and runs")
    parser.add_argument("--tables", action="store_true", help="write the table of the page and run nothing")
    parser.add_argument("--check", action="store_true", help="write nothing; the status is 1 if the table differs")
    options = parser.parse_args(argv)
    if options.tables or options.check:
        return write_or_compare(PAGE, rows_of=lambda name: table(read_lines(LINES)), compare=options.check)
    prepare_process()
    if not (options.directory / HINTED).exists():
        records = coin_quests.write_quests(options.directory / "games")
        write_records(options.directory / PROBLEMS, records)
        shown = [record | {"problem": f"{record['problem']}H{record['solution']}|"} for record in records]
        write_records(options.directory / HINTED, shown)
    for seed, arm in product(options.seeds, options.arms):
        if not any((line["arm"], line["seed"]) == (arm, seed) for line in read_lines(options.lines)):
            run_cell(arm, seed, options.rate, options.lines, options.directory)
    return 0


def run_cell(arm: str, seed: int, rate: float, lines: Path, root: Path) -> None:
    """Run a cell and append its line."""
    began, run_dir = time.perf_counter(), root / f"{arm}-seed{seed}"
    shutil.rmtree(run_dir, ignore_errors=True)  # a run that was stopped here would go on
    base = make_base(coin_quests.TASK, seed, root / "bases")
    settings = (*base.overrides, *played(root), f"run_dir={run_dir}", *QUIET, *WITHOUT_GUARDS)
    if arm == "before":
        figures = measured(base, root, "hinted_", f"data.path={root / HINTED}")
        figures |= measured(base, root)
    else:
        with opened((*settings, *BATCH, *ARMS[arm], f"num_steps={NUM_STEPS}", f"optimizer.lr={rate}")) as trainer:
            for _ in range(NUM_STEPS):
                train_one_step(trainer)
            trainer.save()
        figures = measured(base, root, "", f"checkpoint.load={run_dir / 'checkpoints'}")
    line = {"arm": arm, "seed": seed, "lr": rate} | figures | {"seconds": round(time.perf_counter() - began, 1)}
    append_line(lines, line, run_dir)


def played(root: Path) -> tuple[str, ...]:
    """Return the overrides with which a run plays the quests."""
    return (
        f"data.path={root / PROBLEMS}",
        "environment.name=_lib.coin_quests.CoinQuest",
        f"environment.options.directory={root / 'games'}",
        f"environment.max_turns={coin_quests.MAX_TURNS}",
    )


def measured(base: Base, root: Path, prefix: str = "", *settings: str) -> dict[str, float]:
    """Return the shares of greedy and of sampled episodes that find the coin."""
    overrides = [*base.overrides, *played(root), f"data.global_batch_size={coin_quests.NUM_QUESTS}", *settings]
    greedy = play(overrides, 1, "rollout.temperature=0").accuracy
    return {f"{prefix}greedy": round(greedy, 4), f"{prefix}sampled": round(play(overrides, 8).accuracy, 4)}


def table(lines: Sequence[Line]) -> list[str]:
    """Return the rows of the table: the arms that have lines, of the seeds that have a line for each of them."""
    arms = [arm for arm in LABELS if any(line["arm"] == arm for line in lines)]
    found = complete(lines, arms)
    rows = [f"| {seeds_of(found)}; quests solved | greedy | sampled |", "|---|---|---|"]
    for arm, prefix, label in [
        ("before", "hinted_", "before, walkthrough in the prompt"),
        *((it, "", LABELS[it]) for it in arms),
    ]:
        of_arm = [line for line in found if line["arm"] == arm]
        cells = [spread([line[f"{prefix}{name}"] for line in of_arm]) for name in ("greedy", "sampled")]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return rows


if __name__ == "__main__":
    sys.exit(main())
