# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Evaluate a model on problems with answers, and compare two evaluations.

    selfdistill evaluate --hf Qwen3-8B --data test.jsonl --out results/before --num-samples 16 --pass-at-k 1 4 16
    selfdistill evaluate --megatron runs/first/checkpoints --iteration 100 --data test.jsonl --out results/after
    selfdistill evaluate compare results/before results/after

key=value changes any key of the trainer: rollout.temperature=0.7, rollout.engine=vllm, evaluation.verifier=math_verify,
optimizer.precision=fp32 (of the weights), seed=1, parallel.tensor_model_parallel_size=2.  The results do not depend on
the layout.  On several ranks:

    torchrun --nproc-per-node 8 -m megatron_selfdistill evaluate --hf Qwen3-8B --data test.jsonl --out results/before
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # seconds of imports, which --help and a mistyped option need not wait for
    from megatron_selfdistill.config import Config
    from megatron_selfdistill.distributed.ranks import RankGrid
    from megatron_selfdistill.run_data import RunData

EXIT_REFUSED, EXIT_FAILED = 2, 4
RESERVED = {
    "evaluation.path": "--data",
    "evaluation.num_samples": "--num-samples",
    "evaluation.pass_at_k": "--pass-at-k",
    "checkpoint.load": "--megatron or --hf",
    "run_dir": "--out",
}
"""Keys that options set."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 with one sentence for bad input, 4 with one where an engine or a
    verifier failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    comparing = argv[:1] == ["compare"]
    arguments = _compare_parser().parse_args(argv[1:]) if comparing else _evaluate_arguments(argv)
    from megatron_selfdistill.compat.known_warnings import silence_known_warnings
    from megatron_selfdistill.errors import CheckpointError, ConfigError

    silence_known_warnings()
    try:
        if comparing:
            return compare(arguments)
        check(arguments)
        return evaluate(arguments)
    except (CheckpointError, ConfigError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return EXIT_REFUSED


# -- one model ------------------------------------------------------------------------------------------------------


def check(arguments: argparse.Namespace) -> None:
    """Raise `ConfigError` or `CheckpointError` for what can be seen without torch, which takes seconds to import."""
    from megatron_selfdistill import prechecks
    from megatron_selfdistill.distributed.roll_call import world_size
    from megatron_selfdistill.errors import ConfigError
    from megatron_selfdistill.evaluation.evaluation_directory import require_free

    prechecks.require_answers_per_problem(arguments.num_samples, arguments.pass_at_k, arguments.majority_at_k)
    if arguments.hf is not None and arguments.iteration is not None:
        raise ConfigError("--iteration chooses among Megatron checkpoints: it needs --megatron, not --hf")
    config, _ = _loaded(arguments)
    require_free(arguments.out, arguments.overwrite)
    if arguments.hf is not None:
        prechecks.require_hugging_face(arguments.hf)
    else:
        prechecks.require_checkpoint(arguments.megatron, arguments.iteration)
    prechecks.require_data(config)
    config.check_ranks(world_size())


def evaluate(arguments: argparse.Namespace) -> int:
    """Every rank comes here; rank 0 writes and prints.  Returns the exit status."""
    from megatron_selfdistill.errors import EngineError, VerifierError

    try:
        return _evaluate(arguments)
    except (EngineError, VerifierError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return EXIT_FAILED


def _evaluate(arguments: argparse.Namespace) -> int:
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.distributed.roll_call import world_size
    from megatron_selfdistill.evaluation.inference import converted
    from megatron_selfdistill.evaluation.verify import check_answers, load_verifier
    from megatron_selfdistill.run_data import RunData

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that temporary folders go
    model = _model(arguments)
    config = _configured(arguments, model)
    config.check_world(world_size())
    run_data = RunData.load_evaluation(config, arguments.hinted)
    check_answers(run_data.evaluation, load_verifier(config.evaluation.verifier))
    grid = ranks.initialize(config.parallel, config.seed)
    try:
        with _temporary_folder(arguments.tmp or arguments.out.parent, grid) as folder, ExitStack() as stack:
            load = model["path"]
            if arguments.hf is not None:
                load = str(stack.enter_context(converted(arguments.hf, folder / "converted")))
            checkpoint = dataclasses.replace(config.checkpoint, load=load)
            config = dataclasses.replace(config, checkpoint=checkpoint, run_dir=str(folder / "run"))
            _evaluate_with(config, run_data, grid, arguments, model)
    finally:
        ranks.shutdown()
    return 0


def _evaluate_with(
    config: Config, run_data: RunData, grid: RankGrid, arguments: argparse.Namespace, model: dict[str, Any]
) -> None:
    from megatron_selfdistill.evaluation import held_out as evaluation
    from megatron_selfdistill.evaluation.evaluations import write_evaluation
    from megatron_selfdistill.evaluation.inference import open_inference
    from megatron_selfdistill.evaluation.tables import show_summary
    from megatron_selfdistill.evaluation.verify import load_verifier

    with open_inference(config, run_data, grid) as inference:
        began = time.perf_counter()
        result = evaluation.evaluate(
            inference.sampler,
            run_data.builder,
            run_data.tokenizer,
            run_data.evaluation,
            load_verifier(config.evaluation.verifier),
            params=inference.sampling,
            num_samples=arguments.num_samples,
            ks=arguments.pass_at_k,
            majority_ks=arguments.majority_at_k,
            seed=config.seed,
            step=0,  # whatever the iteration: two models compared draw from the same streams
            grid=grid,
            max_length=run_data.max_length,
            hinted=arguments.hinted,
            num_transcripts=arguments.responses,
        )
        seconds = time.perf_counter() - began
    if grid.is_reporter:
        about = {"model": model, "data": _data(run_data, arguments), "settings": _settings(config, run_data, arguments)}
        summary = write_evaluation(arguments.out, result, about)
        num_tokens = sum(verdict.length for it in result.problems for verdict in (it.greedy, *it.samples))
        show_summary(summary, f"{num_tokens} tokens in {seconds:.1f} s; written to {arguments.out}")
        if result.overlooked is not None:
            print(*result.overlooked.lines(config.evaluation.verifier), sep="\n")


def _model(arguments: argparse.Namespace) -> dict[str, Any]:
    """What summary.json says of the model; it is there, as far as a look at it tells."""
    from megatron_selfdistill.checkpoint.formats.full_weights import open_weights

    if arguments.hf is not None:
        return {"format": "hugging_face", "path": str(arguments.hf), "iteration": None}
    weights = open_weights(arguments.megatron, arguments.iteration)
    return {"format": "megatron", "path": str(weights.path), "iteration": weights.iteration}


def _configured(arguments: argparse.Namespace, model: dict[str, Any]) -> Config:
    """The trainer's configuration, with what the options say and the architecture that the model has."""
    from megatron_selfdistill.checkpoint.formats.stored_model import with_stored_architecture
    from megatron_selfdistill.checkpoint.vocabulary import require_same_tokenizer

    config, given = _loaded(arguments)
    tokenizer = config.data.tokenizer or _tokenizer_of(Path(model["path"]), model["format"])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))
    if arguments.hf is not None:
        return _with_hf_architecture(config, given, arguments.hf)
    checkpoint = dataclasses.replace(config.checkpoint, load=model["path"], resume=False)
    config = with_stored_architecture(dataclasses.replace(config, checkpoint=checkpoint), given)
    require_same_tokenizer(config)
    return config


def _loaded(arguments: argparse.Namespace) -> tuple[Config, frozenset[str]]:
    """The configuration of the command line, before the model is known, and the keys that it sets."""
    from megatron_selfdistill import config as configuration
    from megatron_selfdistill.distributed.roll_call import world_size
    from megatron_selfdistill.errors import ConfigError

    named = (arguments.overrides, arguments.config_name, arguments.config_dir)
    config, given = configuration.load(*named), configuration.given_keys(*named)
    overridden = {override.lstrip("+~").partition("=")[0] for override in arguments.overrides}
    if taken := sorted(overridden & RESERVED.keys()):
        raise ConfigError(f"{taken[0]} cannot be set here: say it with {RESERVED[taken[0]]}")
    # The problems are those of --data; nothing is trained: the size of a batch limits no layout.
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=None, global_batch_size=world_size()),
        evaluation=dataclasses.replace(
            config.evaluation,
            path=str(arguments.data),
            num_samples=arguments.num_samples,
            pass_at_k=arguments.pass_at_k,
        ),
    )
    return config, given


def _with_hf_architecture(config: Config, given: frozenset[str], hf: Path) -> Config:
    """What `with_stored_architecture` will find in the checkpoint that ``hf`` becomes."""
    from megatron_selfdistill.checkpoint.formats.hf_files import read_config
    from megatron_selfdistill.checkpoint.formats.stored_model import reconcile
    from megatron_selfdistill.model.hf.mapping import family_of

    description = read_config(hf)
    fields = {key.removeprefix("model.") for key in given if key.startswith("model.")}
    stored = family_of(description).model_config(description)
    return dataclasses.replace(config, model=reconcile(config.model, fields, stored))


def _tokenizer_of(path: Path, model_format: str) -> str:
    """The tokenizer that lies in a Hugging Face folder, or that a checkpoint carries from one."""
    from megatron_selfdistill.checkpoint.describe import hf_assets_of
    from megatron_selfdistill.errors import ConfigError

    folder = path if model_format == "hugging_face" else hf_assets_of(path)
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    if folder is None or not any((folder / name).is_file() for name in files):
        raise ConfigError(f"{path} carries no tokenizer: name one with data.tokenizer=DIR")
    return str(folder)


@contextmanager
def _temporary_folder(parent: Path, grid: RankGrid) -> Iterator[Path]:
    """A folder that all ranks see, removed afterwards."""
    from megatron_selfdistill.distributed.collectives import run_on_rank_0

    def make() -> str:
        parent.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(dir=parent, prefix=".evaluate-")

    folder = Path(run_on_rank_0(make))
    try:
        yield folder
    finally:
        if grid.is_reporter:
            shutil.rmtree(folder, ignore_errors=True)


def _data(run_data: RunData, arguments: argparse.Namespace) -> dict[str, Any]:
    from megatron_selfdistill.evaluation.evaluations import data_fingerprint

    problems = run_data.evaluation
    return {"path": str(arguments.data), "fingerprint": data_fingerprint(problems), "num_problems": len(problems)}


def _settings(config: Config, run_data: RunData, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on besides model and problems."""
    from megatron_selfdistill.config import writable

    rollout, data = config.rollout, writable(config)["data"]
    return {
        "num_samples": arguments.num_samples,
        "hinted": arguments.hinted,
        "seed": config.seed,
        "verifier": config.evaluation.verifier,
        "engine": rollout.engine if rollout.engine == "megatron" else f"{rollout.engine} {rollout.placement}",
        "precision": config.optimizer.precision,
        "max_new_tokens": rollout.max_new_tokens,
        "temperature": rollout.temperature,
        "top_k": rollout.top_k,
        "top_p": rollout.top_p,
        "stop_token_ids": list(run_data.stop_token_ids),
        "system_prompt": data["system_prompt"],
        "student_template": data["student_template"],
        "teacher_template": data["teacher_template"] if arguments.hinted else None,
        "chat_template": data["chat_template"],
        "chat_template_kwargs": data["chat_template_kwargs"],
    }


# -- two models -----------------------------------------------------------------------------------------------------


def compare(arguments: argparse.Namespace) -> int:
    from megatron_selfdistill.evaluation.evaluation_directory import require_evaluation

    for folder in (arguments.a, arguments.b):
        require_evaluation(folder)
    from megatron_selfdistill.evaluation import comparison
    from megatron_selfdistill.evaluation.evaluations import read_evaluation
    from megatron_selfdistill.evaluation.tables import show_comparison

    compared = comparison.compare(
        read_evaluation(arguments.a),
        read_evaluation(arguments.b),
        num_resamples=arguments.resamples,
        seed=arguments.seed,
    )
    show_comparison(compared)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(compared.json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


# -- command line ---------------------------------------------------------------------------------------------------


class _Ks(argparse.Action):
    """Numbers up to the first word that is none; what follows are overrides."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        ks = [value for value in values if value.isdecimal()]
        rest = values[len(ks) :]
        if values[: len(ks)] != ks or any("=" not in word for word in rest):
            parser.error(f"argument {option}: expected numbers, got {' '.join(values)}")
        setattr(namespace, self.dest, [int(k) for k in ks])
        namespace.more_overrides = [*namespace.more_overrides, *rest]


def _evaluate_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="selfdistill evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--megatron", type=Path, metavar="DIR", help="iter_ or release folder, or the one with the tracker"
    )
    model.add_argument("--hf", type=Path, metavar="DIR", help="Hugging Face folder, converted for the time being")
    parser.add_argument("--iteration", type=int, metavar="N", help="another one than the tracker file names")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="problems with answers")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the results")
    parser.add_argument("--overwrite", action="store_true", help="replace the results that --out holds")
    parser.add_argument("--num-samples", type=int, default=16, metavar="N", help="per problem, besides a greedy one")
    parser.add_argument(
        "--pass-at-k", nargs="+", action=_Ks, metavar="K", help="one of K is right (default: 1 4 16 .. within N)"
    )
    parser.add_argument(
        "--majority-at-k",
        nargs="+",
        action=_Ks,
        metavar="K",
        help="the most frequent answer of K is (default: 4 16 ..)",
    )
    parser.add_argument("--hinted", action="store_true", help="show the teacher's prompt, with the solution")
    parser.add_argument(
        "--responses", type=int, default=0, metavar="N", help="write those to the first N problems, as text"
    )
    parser.add_argument(
        "--tmp",
        type=Path,
        metavar="DIR",
        help="where what --hf becomes lies meanwhile; all nodes see it (default: --out/..)",
    )
    parser.add_argument("--config-name", default="train", help="the primary configuration (default: train)")
    parser.add_argument("--config-dir", action="append", default=[], help="a folder with further configuration groups")
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


def _compare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selfdistill evaluate compare",
        description="Is model B better than model A?  Both were evaluated on the same problems.",
        epilog="example:\n  selfdistill evaluate compare results/before results/after --out comparison.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=Path, metavar="A", help="results of one evaluation")
    parser.add_argument("b", type=Path, metavar="B", help="results of the other")
    parser.add_argument(
        "--resamples", type=_positive, default=10_000, metavar="N", help="of the problems (default: 10000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the comparison there, as JSON")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)
