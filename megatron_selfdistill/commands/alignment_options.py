# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The options of `selfdistill alignment`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_selfdistill.commands.model_options import add_models, parsed

DESCRIPTION = """Measure whether distillation pushes a model towards tokens with which it succeeds.

    selfdistill alignment /models/Qwen3-8B --data problems.jsonl -o alignment.json evaluation.verifier=math_verify
    selfdistill alignment runs/first --data problems.jsonl --limit 4 --nodes 8

The model responds to each problem.  At some tokens of the response, the nodes, the likely tokens of student, teacher
and target are tried: the model completes the response after each of them, and a verifier judges the completions.  This
gives the direction in which the logits of the node make success more likely.  The alignment of a loss is the cosine
between this direction and the step that the loss takes, averaged over nodes: 1 is the best direction, 0 is no help, and
below 0 the loss makes success less likely.

Problems need solutions for the teacher and answers for the verifier.  A run directory stands for its latest checkpoint,
with the prompts, the target and the sampling of the run.  The work is nodes x candidates x completions samples for each
problem: at most 16 x 12 x 8 with the defaults.

With several --teacher-context, the same responses are read with each of the hints, and each hint has its own table:

    selfdistill alignment /models/Qwen3-8B --data problems.jsonl --teacher-context solution --teacher-context answer

key=value changes any key of the trainer: target.teacher_weight=2, data.teacher_template=..., rollout.engine=vllm,
parallel.tensor_model_parallel_size=2.  On several ranks:

    torchrun --nproc-per-node 2 -m megatron_selfdistill alignment /models/Qwen3-8B --data problems.jsonl
"""
"""The text of --help."""


def alignment_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options of `selfdistill alignment`; ends the process with status 2 for options that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="selfdistill alignment", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_models(parser)
    parser.add_argument(
        "--data", required=True, metavar="PATH", help="problems with solutions and answers, in any form of data.path"
    )
    parser.add_argument(
        "--limit", type=_positive, default=8, metavar="N", help="number of first problems (default: %(default)s)"
    )
    parser.add_argument(
        "--teacher-context",
        action="append",
        metavar="HINT",
        help="what the teacher sees: solution, answer, or a file of `selfdistill solutions`; several times for several "
        "contexts (default: solution)",
    )
    parser.add_argument(
        "--nodes", type=_positive, default=16, metavar="N", help="nodes of a response (default: %(default)s)"
    )
    parser.add_argument(
        "--top",
        type=_positive,
        default=4,
        metavar="N",
        help="most likely tokens of each of student, teacher and target that are tried (default: %(default)s)",
    )
    parser.add_argument(
        "--completions", type=_positive, default=8, metavar="N", help="completions per token (default: %(default)s)"
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("alignment.json"),
        metavar="FILE",
        help="the results as JSON (default: alignment.json)",
    )
    arguments = parsed(parser, argv)
    arguments.teacher_context = arguments.teacher_context or ["solution"]
    return arguments


def _positive(text: str) -> int:
    value = int(text) if text.strip().lstrip("+-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return value
