# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The options of `selfdistill evaluate` and `selfdistill evaluate compare`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DESCRIPTION = """Evaluate a model on problems with answers, and compare two evaluations.

    selfdistill evaluate --hf /models/Qwen3-8B --data test.jsonl --out results/before
    selfdistill evaluate --megatron runs/first --iteration 100 --data test.jsonl --out results/after
    selfdistill evaluate compare results/before results/after

key=value changes any key of the trainer: rollout.temperature=0.7, rollout.engine=vllm, evaluation.verifier=math_verify,
optimizer.precision=fp32 (of the weights), seed=1, parallel.tensor_model_parallel_size=2.  The results do not depend on
the layout.  On several ranks:

    torchrun --nproc-per-node 8 -m megatron_selfdistill evaluate --hf /models/Qwen3-8B --data test.jsonl --out results
"""
"""The text of --help."""

NUM_SAMPLES = 16
"""The default of --num-samples: enough for pass@16 and for intervals that show small differences."""
_ALL = "print every metric (default: the six that matter first; the files always have all)"


class _Ks(argparse.Action):
    """An option that takes the numbers up to the first word that is not a number; further words are overrides."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        ks = [value for value in values if value.isdecimal()]
        rest = values[len(ks) :]
        if values[: len(ks)] != ks or any("=" not in word for word in rest):
            parser.error(f"argument {option}: expected numbers, got {' '.join(values)}")
        setattr(namespace, self.dest, [int(k) for k in ks])
        namespace.more_overrides = [*namespace.more_overrides, *rest]


def evaluation_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options of `selfdistill evaluate`; ends the process with status 2 for options that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="selfdistill evaluate", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--megatron",
        type=Path,
        metavar="DIR",
        help="run directory, or Megatron checkpoint (an iter_ directory, or the one with the tracker file)",
    )
    model.add_argument("--hf", type=Path, metavar="DIR", help="Hugging Face directory, which is converted temporarily")
    parser.add_argument(
        "--iteration", type=int, metavar="N", help="iteration to evaluate (default: the tracker file names it)"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="problems with answers")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory for the results")
    parser.add_argument("--overwrite", action="store_true", help="replace the results that --out holds")
    parser.add_argument(
        "--num-samples",
        type=int,
        default=NUM_SAMPLES,
        metavar="N",
        help="samples per problem, besides a greedy response (default: %(default)s; evaluations within a run take "
        "evaluation.num_samples, 1 by default, because the training waits for them)",
    )
    parser.add_argument(
        "--pass-at-k",
        nargs="+",
        action=_Ks,
        metavar="K",
        help="chance that one of K samples is right (default: 1 4 16 .. up to N)",
    )
    parser.add_argument(
        "--majority-at-k",
        nargs="+",
        action=_Ks,
        metavar="K",
        help="chance that the most frequent answer of K samples is right (default: 4 16 ..)",
    )
    parser.add_argument("--hinted", action="store_true", help="show the model the teacher's prompt, with the solution")
    parser.add_argument(
        "--responses", type=int, default=0, metavar="N", help="write the responses to the first N problems as text"
    )
    parser.add_argument("--all", action="store_true", help=_ALL)
    parser.add_argument(
        "--tmp",
        type=Path,
        metavar="DIR",
        help="directory for the converted --hf, which all nodes see (default: --out/..)",
    )
    parser.add_argument("--config-name", default="train", help="the primary configuration (default: train)")
    parser.add_argument(
        "--config-dir", action="append", default=[], help="a directory with further configuration groups"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="hydra overrides, e.g. rollout.top_p=0.95")
    parser.set_defaults(more_overrides=[])
    arguments = parser.parse_intermixed_args(argv)
    arguments.overrides = [*arguments.overrides, *arguments.more_overrides]
    if arguments.num_samples < 0:
        parser.error(f"argument --num-samples: expected at least 0, got {arguments.num_samples}")
    powers = [4**i for i in range(12) if 4**i <= arguments.num_samples]
    arguments.pass_at_k = powers if arguments.pass_at_k is None else arguments.pass_at_k
    arguments.majority_at_k = powers[1:] if arguments.majority_at_k is None else arguments.majority_at_k
    return arguments


def comparison_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options of `selfdistill evaluate compare`."""
    parser = argparse.ArgumentParser(
        prog="selfdistill evaluate compare",
        description="Compare two evaluations of the same problems: is model B better than model A?",
        epilog="example:\n  selfdistill evaluate compare results/before results/after --out comparison.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=Path, metavar="A", help="results of the first evaluation")
    parser.add_argument("b", type=Path, metavar="B", help="results of the second evaluation")
    parser.add_argument(
        "--resamples",
        type=_positive,
        default=10_000,
        metavar="N",
        help="number of resamples of the problems (default: 10000)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the resamples (default: 0)")
    parser.add_argument("--all", action="store_true", help=_ALL)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the comparison to FILE, as JSON")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)
