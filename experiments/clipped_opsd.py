# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure what the clip of OPSD does to a base that thinks, choosing_subtraction.py: how many responses loop.

OPSD clips each column of forward KL at c: the loss of a token is sum over v of min(q_v log(q_v / p_v), c) in place of
KL(q || p).  A clipped column has no gradient of its own, and the other columns push it down through the softmax, so
that the student unlearns what the teacher wants most (arXiv 2609.38995).  This project has no such divergence; the
script puts it in the place of the loss, on one rank.  Student and teacher think in one form here, so that the runs also
answer whether a target keeps a thinking base whose teacher thinks, too.

Responses may have twelve attempts, where the base makes three at most.  A cell is one arm and one seed; its result is
one line of results/clipped_opsd.jsonl, and a cell whose line is there is not run again.  anchored_tables.py writes
tables/thinking.md from the lines.

    python experiments/clipped_opsd.py             every missing cell
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cell_lines import REPOSITORY, RESULTS, Line, append_line, read_lines
from page_tables import complete, markdown, seeds_of, spread

sys.path[:0] = [str(REPOSITORY / "examples")]

import choosing_subtraction  # noqa: E402

from _lib.command_line import prepare_process  # noqa: E402
from _lib.pretraining import make_base, write_records  # noqa: E402
from _lib.variants import Variant  # noqa: E402
from _lib.watched_runs import WITHOUT_GUARDS, watch  # noqa: E402

if TYPE_CHECKING:  # torch and Megatron are imported by the functions that need them, so that --help answers at once
    import torch

    from megatron_selfdistill.evaluation.evaluation_result import Transcript

LINES = RESULTS / "clipped_opsd.jsonl"
SEEDS = (11, 12, 13, 14, 15)
STEPS = (0, 100, 200)
ATTEMPTS = 12
CLIP = 0.05
"""The published bound of a column, in nats."""
FORWARD = "loss.divergence=forward_kl"
ARMS: dict[str, tuple[str, ...]] = {
    "default": (),
    "default_forward": (FORWARD,),
    "teacher_alone": ("target=teacher_alone",),
    "opsd": ("target=teacher_alone", FORWARD),
    "opsd_clipped": ("target=teacher_alone", FORWARD),
    "other_hint": ("data.solutions=other",),
    "no_hint": ("data.solutions=none",),
}
LABELS = {
    "default": "anchored, matched, reverse KL (the default)",
    "default_forward": "anchored, matched, forward KL",
    "teacher_alone": "teacher alone, reverse KL",
    "opsd": "teacher alone, forward KL (OPSD without its clip)",
    "opsd_clipped": f"teacher alone, forward KL, columns clipped at {CLIP} (OPSD)",
    "other_hint": "ablation: the default, another problem's hint",
    "no_hint": "ablation: the default, no hint",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the missing cells seed by seed; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help=f"(default: {' '.join(map(str, SEEDS))})")
    parser.add_argument("--lines", type=Path, default=LINES, help="(default: experiments/results/clipped_opsd.jsonl)")
    parser.add_argument("--directory", type=Path, default=Path("runs/clipped_opsd"), help="bases and runs")
    options = parser.parse_args(argv)
    prepare_process()
    for seed, arm in product(options.seeds, options.arms):
        if not any((line["arm"], line["seed"]) == (arm, seed) for line in read_lines(options.lines)):
            run_cell(arm, seed, options.lines, options.directory)
    return 0


def run_cell(arm: str, seed: int, lines: Path, root: Path) -> None:
    """Run a cell, append its line, and remove its run; the base stays for the other cells."""
    from megatron_selfdistill.pipeline import token_losses

    began, directory = time.perf_counter(), root / f"{arm}-seed{seed}"
    base = make_base(choosing_subtraction.TASK, seed, root / "bases")
    problems = write_records(directory / "train.jsonl", choosing_subtraction.training_problems(seed))
    limit = f"rollout.max_new_tokens={ATTEMPTS * choosing_subtraction.LENGTH_OF_ATTEMPT + 2}"
    room = ("model.max_position_embeddings=512", "schedule.max_tokens=4096")
    variant = Variant(arm, (f"data.path={problems}", f"seed={seed}", limit, *room, *ARMS[arm], *WITHOUT_GUARDS))
    original = token_losses.self_distillation
    if arm.endswith("clipped"):
        token_losses.self_distillation = clipped(original)
    try:
        points = watch(variant, base, directory / "run", STEPS, further=figures_of)
    finally:
        token_losses.self_distillation = original
    found: dict[str, Any] = {"step": list(STEPS), "greedy": [round(it.greedy, 4) for it in points]}
    found |= {name: [round(it.further[name], 4) for it in points] for name in points[0].further}
    line = {"arm": arm, "seed": seed} | found | {"seconds": round(time.perf_counter() - began, 1)}
    append_line(lines, line, directory)


def clipped(self_distillation: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that makes the loss, with the clipped columns of forward KL in the place of the divergence.

    The loss is that of one rank, on whole rows of logits and with the teacher alone as the target.
    """

    def make(*arguments: Any, **options: Any) -> Any:
        loss = self_distillation(*arguments, **options)

        def of_logits(
            student: torch.Tensor, teacher: torch.Tensor, tokens: Any, vocab: Any, *rest: Any, **more: Any
        ) -> Any:
            import torch

            log_p, log_q = (it[:, : vocab.num_valid].float().log_softmax(-1) for it in (student, teacher.detach()))
            columns = (log_q.exp() * (log_q - log_p)).clamp(max=CLIP)
            with torch.no_grad():
                stats = loss(student.detach().clone(), teacher, tokens, vocab, *rest, **more)
            return replace(stats, loss=columns.sum(-1))

        return of_logits

    return make


def figures_of(samples: Sequence[Transcript]) -> Mapping[str, float]:
    """Return the figures of samples: accuracy with three attempts, overlooked attempts, loops and cut responses."""
    from megatron_selfdistill.metrics.leakage import ends_in_loop

    own = choosing_subtraction.figures([(it.problem_id[-1], it.response) for it in samples])
    return {
        "within_3": own["within_3"],
        "overlooked": own["overlooked"],
        "attempts": own["attempts"],
        "loops": sum(ends_in_loop([ord(character) for character in it.response]) for it in samples) / len(samples),
        "cut": sum(it.truncated for it in samples) / len(samples),
    }


def table_of(lines: Sequence[Line]) -> list[str]:
    """Return the rows of the table: a row for each arm, of the seeds that have a line for every arm."""
    found = complete(lines, ARMS)
    headings = ("three attempts", "overlooked", "attempts")
    rows = [[seeds_of(found) if found else "", *headings], ["---"] * 4]
    figures = ("within_3", "overlooked", "attempts")
    before = [line for line in found if line["arm"] == "default"]
    rows.append(["before", *(spread([line[figure][0] for line in before]) for figure in figures)])
    for arm, label in LABELS.items():
        of_arm = [line for line in found if line["arm"] == arm]
        rows.append([label, *(spread([line[figure][-1] for line in of_arm]) for figure in figures)])
    return markdown(rows)


if __name__ == "__main__":
    sys.exit(main())
