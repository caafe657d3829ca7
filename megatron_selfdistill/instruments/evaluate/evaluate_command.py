# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The command `selfdistill evaluate`: the evaluation of one model, and the comparison of two evaluations."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_selfdistill.commands.model_command import ended, parsed
from megatron_selfdistill.config.schema.data_config import plays_episodes
from megatron_selfdistill.config.world_checks import check_ranks, check_world

if TYPE_CHECKING:  # these imports take seconds, for which --help and a mistyped option should not wait
    from megatron_selfdistill.config import Config
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.evaluation.evaluation_result import EvaluationResult
    from megatron_selfdistill.instruments.evaluate.first_step import FirstStep

DESCRIPTION = """Evaluate a model on problems with answers, and compare two evaluations.

    selfdistill evaluate --hf /models/Qwen3-8B --data test.jsonl --out results/before
    selfdistill evaluate --megatron runs/first --iteration 100 --data test.jsonl --out results/after
    selfdistill evaluate compare results/before results/after
    selfdistill evaluate --hf /models/Qwen3-8B --data test.jsonl --out results/hinted --hinted

key=value changes any key of the trainer: rollout.temperature=0.7, rollout.engine=vllm, evaluation.verifier=math_verify,
optimizer.precision=fp32 (of the weights), seed=1, parallel.tensor_model_parallel_size=2.  The results do not depend on
the layout.  On several ranks:

    torchrun --nproc-per-node 8 -m megatron_selfdistill evaluate --hf /models/Qwen3-8B --data test.jsonl --out results
"""
"""The text of --help."""

NUM_SAMPLES = 16
"""The default of --num-samples: enough for pass@16 and for intervals that show small differences."""
_HINTED = "show the model the teacher's prompt, with the solution; also print what the first step of a run would see"

RESERVED = {
    "evaluation.path": "--data",
    "evaluation.num_samples": "--num-samples",
    "evaluation.pass_at_k": "--pass-at-k",
    "checkpoint.load": "--megatron or --hf",
    "run_dir": "--out",
}
"""The keys that options set -> the options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit status.

    0 is success; `ended` has the others, each of which follows a message.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    comparing = argv[:1] == ["compare"]
    arguments = comparison_arguments(argv[1:]) if comparing else evaluation_arguments(argv)

    def work() -> int:
        if comparing:
            return compare(arguments)
        return evaluate(arguments, *checked(arguments))

    return ended("evaluate", work)


# -- one model ------------------------------------------------------------------------------------------------------


def checked(arguments: argparse.Namespace) -> tuple[Config, frozenset[str]]:
    """Return the configuration before the model is known, and the keys that the user has set.

    Raises: `ConfigError` or `CheckpointError` for every mistake that can be found without importing torch.
    """
    from megatron_selfdistill.annexes import door
    from megatron_selfdistill.checkpoint.formats.directory import require_checkpoint
    from megatron_selfdistill.commands import prechecks
    from megatron_selfdistill.commands.model_command import given_config
    from megatron_selfdistill.distributed.roll_call import world_size
    from megatron_selfdistill.errors import ConfigError
    from megatron_selfdistill.evaluation.evaluation_directory import require_free

    prechecks.require_answers_per_problem(arguments.num_samples, arguments.pass_at_k, arguments.majority_at_k)
    if arguments.hf is not None and arguments.iteration is not None:
        raise ConfigError("--iteration chooses among Megatron checkpoints: it needs --megatron, not --hf")
    measured = {"path": str(arguments.data), "num_samples": arguments.num_samples, "pass_at_k": arguments.pass_at_k}
    config, keys = given_config(arguments, RESERVED, measured)
    require_free(arguments.out, arguments.overwrite)
    if arguments.hf is not None:
        arguments.hf = door("hugging_face").model_directory(arguments.hf)
    else:
        require_checkpoint(arguments.megatron, arguments.iteration)
    prechecks.require_data(config)
    prechecks.require_packages(config)
    check_ranks(config, world_size())
    return config, keys


def evaluate(arguments: argparse.Namespace, given: Config, keys: frozenset[str]) -> int:
    """Evaluate one model, on every rank, and return the exit status; rank 0 writes and prints.

    ``given``, ``keys``: the result of `checked`.
    """
    if os.environ.get("RANK", "0") == "0":
        print("evaluate: imports its packages and reads the data", file=sys.stderr, flush=True)
    from megatron_selfdistill.commands.given_model import computed_in, configured, find_model, temporary_directory
    from megatron_selfdistill.commands.model_command import phases_shown
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.distributed.roll_call import world_size
    from megatron_selfdistill.evaluation import held_out
    from megatron_selfdistill.evaluation.inference import open_inference
    from megatron_selfdistill.evaluation.verify import check_answers, load_verifier
    from megatron_selfdistill.instruments.evaluate.first_step import measure_first_step
    from megatron_selfdistill.interop.foreign_models import converted
    from megatron_selfdistill.metrics.leakage import telling_words
    from megatron_selfdistill.metrics.phases import Phases
    from megatron_selfdistill.sources.configured_source import evaluation_player

    model = find_model(arguments.hf, arguments.megatron, arguments.iteration)
    config = configured(given, keys, model)
    check_world(config, world_size())
    run_data = RunData.load_evaluation(config, arguments.hinted)
    verifier = load_verifier(config.evaluation.verifier)
    check_answers(run_data.evaluation, verifier)
    about_types = computed_in(config, model)
    grid = ranks.initialize(config.parallel, config.seed)
    if grid.is_reporter:
        print(about_types, file=sys.stderr, flush=True)
    phases = Phases(grid.device)
    first: FirstStep | None = None
    try:
        with ExitStack() as stack:
            directory = stack.enter_context(temporary_directory(arguments.tmp or arguments.out.parent, grid))
            stack.enter_context(phases_shown(phases, enabled=grid.is_reporter))
            load = model["path"]
            if arguments.hf is not None:
                with phases("converting the model"):
                    load = str(stack.enter_context(converted(arguments.hf, directory / "converted")))
            checkpoint = dataclasses.replace(config.checkpoint, load=load)
            config = dataclasses.replace(config, checkpoint=checkpoint, run_dir=str(directory / "run"))
            inference = stack.enter_context(open_inference(config, run_data, grid, phases))
            player = stack.enter_context(evaluation_player(config, run_data, inference.sampler, 0, grid))
            began = time.perf_counter()
            # Step 0 is independent of the iteration, so that compared models sample with the same seeds.
            words = telling_words(config.metrics.leak_words, run_data.evaluation)
            own = {
                "num_transcripts": arguments.responses,
                "majority_at_k": arguments.majority_at_k,
                "leak_words": words,
            }
            options = held_out.EvaluationOptions.configured(config, inference.sampling, 0, arguments.hinted, **own)
            with phases("evaluation"):
                result = held_out.evaluate(inference.sampler, run_data, verifier, options, grid, player)
            seconds = time.perf_counter() - began
            if arguments.hinted:
                with phases("first step"):
                    first = measure_first_step(inference, config, run_data, verifier, grid)
        if grid.is_reporter:
            _report(result, first, seconds, config, run_data, arguments, model)
    finally:
        ranks.shutdown()
    return 0


def _report(
    result: EvaluationResult,
    first: FirstStep | None,
    seconds: float,
    config: Config,
    run_data: RunData,
    arguments: argparse.Namespace,
    model: dict[str, Any],
) -> None:
    from megatron_selfdistill.evaluation.evaluations import data_fingerprint, write_evaluation
    from megatron_selfdistill.instruments.evaluate import evaluation_tables as tables
    from megatron_selfdistill.instruments.evaluate.first_step import readiness, recommended

    problems = run_data.evaluation
    about: dict[str, Any] = {
        "model": model,
        "data": {"path": str(arguments.data), "fingerprint": data_fingerprint(problems), "num_problems": len(problems)},
        "settings": _settings(config, run_data, arguments),
    }
    advice: list[str] = []
    if first is not None:
        advice = first.advice(config)
        about["first_step"] = asdict(first)
        if plays_episodes(config):  # the samples of the first step are no episodes
            print("no verdict: compare with the same command without --hinted (selfdistill evaluate compare)\n")
        else:
            ready = readiness(config, first, result)
            with_hint = ready.right_hinted / ready.num_hinted
            target = recommended(first.num_hints, len(problems), first.accuracy, with_hint)
            about["first_step"] |= {"recommended": asdict(target), "verdict": asdict(ready)}
            tables.show_readiness(ready, target)
    summary = write_evaluation(arguments.out, result, about)
    num_tokens = sum(verdict.length for it in result.problems for verdict in (it.greedy, *it.samples))
    tables.show_summary(summary, f"{num_tokens} tokens in {seconds:.1f} s; written to {arguments.out}")
    if first is not None:
        tables.show_first_step(about["first_step"], advice)
    if result.overlooked is not None:
        print(*result.overlooked.lines(config.evaluation.verifier), sep="\n")


def _settings(config: Config, run_data: RunData, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings on which the numbers depend besides the model and the problems."""
    rollout, data, played = config.rollout, asdict(config.data), config.environment
    return {
        "num_samples": arguments.num_samples,
        "hinted": arguments.hinted,
        "seed": config.seed,
        "verifier": config.evaluation.verifier,
        "confidence": config.evaluation.confidence,
        "environment": f"{played.name}, {played.max_turns} turns" if plays_episodes(config) else None,
        "engine": rollout.engine if rollout.engine == "megatron" else f"{rollout.engine} {rollout.placement}",
        "precision": config.optimizer.precision,
        **{name: getattr(rollout, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p")},
        "stop_token_ids": list(run_data.stop_token_ids),
        "leak_words": list(config.metrics.leak_words),
        "views": (data["views"] if arguments.hinted else data["views"].get("student")) or None,
        "teacher_template": data["teacher_template"] if arguments.hinted else None,
        **{name: data[name] for name in "system_prompt student_template chat_template chat_template_kwargs".split()},
    }


# -- two models -----------------------------------------------------------------------------------------------------


def compare(arguments: argparse.Namespace) -> int:
    """Print the comparison of two evaluations, write it with --out, and return the exit status."""
    from megatron_selfdistill.evaluation import evaluations
    from megatron_selfdistill.instruments.evaluate.evaluation_tables import show_comparison

    compared = evaluations.compare(*map(evaluations.read_evaluation, (arguments.a, arguments.b)))
    show_comparison(compared)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(asdict(compared), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


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
    model.add_argument(
        "--hf",
        type=Path,
        metavar="DIR",
        help="Hugging Face directory or model of the hub, which is converted temporarily",
    )
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
        "--pass-at-k", nargs="+", metavar="K", help="chance that one of K samples is right (default: 1 4 16 .. up to N)"
    )
    parser.add_argument(
        "--majority-at-k",
        nargs="+",
        metavar="K",
        help="chance that the most frequent answer of K samples is right (default: 4 16 ..)",
    )
    parser.add_argument("--hinted", action="store_true", help=_HINTED)
    parser.add_argument(
        "--responses", type=int, default=0, metavar="N", help="write the responses to the first N problems as text"
    )
    arguments = parsed(parser, argv)
    for name in ("pass_at_k", "majority_at_k"):  # what follows the numbers are overrides
        words = getattr(arguments, name) or []
        ks = list(itertools.takewhile(str.isdecimal, words))
        arguments.overrides = [*arguments.overrides, *words[len(ks) :]]
        setattr(arguments, name, [int(k) for k in ks] if words else None)
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
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the comparison to FILE, as JSON")
    return parser.parse_args(argv)
