# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Sample solutions from a model, verify them against the answers, and write the best ones as JSONL.

    selfdistill solutions --out own.jsonl --hf Qwen3-8B data.path=problems.jsonl rollout.max_new_tokens=4096
    selfdistill solutions --out own.jsonl checkpoint.load=runs/first/checkpoints data.path=problems.jsonl \\
        data.tokenizer=Qwen3-8B evaluation.verifier=math_verify --num-samples 16 --keep 2 --pick learnable
    torchrun --nproc-per-node 8 -m megatron_selfdistill solutions --out own.jsonl ...
    selfdistill data.path=own.jsonl ...

Settings are those of `selfdistill`: model, layout, data, rollout (which sampler, and how it draws), the verifier, and
for --pick learnable how logits are read (loss.backend, loss.fused).  A problem needs an answer and no solution.  The
file appears when all problems are done; until then, and afterwards as a record, what became of each problem stands in
own.attempts.jsonl.  The same command goes on where it was killed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_selfdistill.choices import SOLUTION_RANKINGS

if TYPE_CHECKING:  # seconds of imports, which --help and a mistyped option need not wait for
    from megatron_selfdistill.config import Config
    from megatron_selfdistill.data.problems import Problem
    from megatron_selfdistill.distributed.ranks import RankGrid
    from megatron_selfdistill.evaluation.inference import Inference
    from megatron_selfdistill.run_data import RunData
    from megatron_selfdistill.sources.solution_search import Attempt, Candidate, Score

EXIT_REFUSED = 2
STEP = 0  # of the random streams: the model is not trained here


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 with one sentence where something does not fit."""
    arguments = _parser().parse_intermixed_args(argv)
    from megatron_selfdistill.compat.known_warnings import silence_known_warnings
    from megatron_selfdistill.errors import CheckpointError, ConfigError

    silence_known_warnings()
    try:
        check(arguments)
        return make_solutions(arguments)
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"solutions: [rank {os.environ.get('RANK', '0')}] {error}", file=sys.stderr, flush=True)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        print("solutions: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def check(arguments: argparse.Namespace) -> None:
    """Raise `ConfigError` or `CheckpointError` for what can be seen without torch, which takes seconds to import."""
    from megatron_selfdistill import prechecks
    from megatron_selfdistill.distributed.roll_call import world_size

    config = _configured(arguments)
    if arguments.hf is not None:
        prechecks.require_hugging_face(arguments.hf)
    prechecks.require_data(config)
    prechecks.require_start(config)
    config.check_ranks(world_size())


def make_solutions(arguments: argparse.Namespace) -> int:
    """The whole of it, on every rank."""
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.evaluation.inference import converted

    out = arguments.out
    config = _configured(arguments)
    out.parent.mkdir(parents=True, exist_ok=True)
    grid = ranks.initialize(config.parallel, config.seed)
    try:
        hf = arguments.hf
        with converted(hf, _beside(out, ".model")) if hf is not None else nullcontext() as checkpoint:
            _find(arguments, _of_checkpoint(config, arguments, checkpoint), grid)
        return 0
    finally:
        ranks.shutdown()


def _find(arguments: argparse.Namespace, config: Config, grid: RankGrid) -> None:
    from megatron_selfdistill.distributed.collectives import run_on_rank_0
    from megatron_selfdistill.errors import ConfigError
    from megatron_selfdistill.evaluation.inference import open_inference
    from megatron_selfdistill.evaluation.verify import check_answers, load_verifier
    from megatron_selfdistill.run_data import RunData

    config.check_world(grid.world_size)
    run_data = RunData.load(config)
    problems = run_data.problems.problems
    try:
        check_answers(problems, load_verifier(config.evaluation.verifier))
        if config.solutions.pick == "learnable":
            _check_scoring(problems, config, grid)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    header = provenance(config, run_data, arguments)
    journal = Journal(arguments.out, header, arguments.group_size)
    done, refusal = run_on_rank_0(lambda: journal.begin(len(problems)))
    if refusal:
        raise ConfigError(refusal)
    if done < len(problems):
        with open_inference(config, run_data, grid) as inference, _progress(len(problems), done, grid) as advance:
            score = _scorer(config, run_data, inference, grid) if config.solutions.pick == "learnable" else None
            for start in range(done, len(problems), arguments.group_size):
                group = problems[start : start + arguments.group_size]
                lines = _attempts(group, config, run_data, inference, score, grid)
                run_on_rank_0(lambda lines=lines: journal.append(lines))  # type: ignore[misc]
                advance(len(lines))
    run_on_rank_0(lambda: journal.finish({problem.id for problem in problems}))
    if grid.is_reporter:
        summarize(journal.lines(), arguments.out, config.solutions.num_samples)


def _check_scoring(problems: Sequence[Problem], config: Config, grid: RankGrid) -> None:
    """Raises: ValueError for a problem that cannot be scored, or a loss.backend that cannot run."""
    import torch

    from megatron_selfdistill.loss.sharded.backend import in_use
    from megatron_selfdistill.pipeline.score import with_reference

    for problem in problems:
        with_reference(problem)
    in_use(config.loss.backend, grid.device, torch.bfloat16 if config.optimizer.precision == "bf16" else torch.float32)


def _attempts(
    group: Sequence[Problem],
    config: Config,
    run_data: RunData,
    inference: Inference,
    score: Score | None,
    grid: RankGrid,
) -> list[dict[str, Any]]:
    """What became of these problems of all replicas, in their order; the same on every rank."""
    from megatron_selfdistill.distributed.collectives import gather_items
    from megatron_selfdistill.errors import ConfigError
    from megatron_selfdistill.evaluation.verify import load_verifier
    from megatron_selfdistill.sources.solution_search import Search, solve

    wanted = config.solutions
    try:
        attempts = solve(
            group,
            Search(wanted.num_samples, wanted.keep, wanted.pick, config.seed),
            STEP,
            generate=lambda requests: inference.sampler.generate(requests, inference.sampling),
            builder=run_data.builder,
            verifier=load_verifier(config.evaluation.verifier),
            grid=grid,
            score=score,
        )
    except RuntimeError as error:  # the verifier or an engine: what was done before is kept
        raise ConfigError(f"{error}; when that is fixed, the same command goes on from here") from error
    mine = [_line(attempt, run_data) for attempt in attempts]
    by_id = {line["problem_id"]: line for line in gather_items(mine, grid.dp_group)}
    return [by_id[problem.id] for problem in group]


def _scorer(config: Config, run_data: RunData, inference: Inference, grid: RankGrid) -> Score:
    """The learnability of candidates, where the model is student and teacher.  Raises: `ConfigError` for a loss.fused
    that cannot be had."""
    from megatron_selfdistill.evaluation.inference import decided_output_layer
    from megatron_selfdistill.pipeline.score import learnabilities

    fusion = decided_output_layer(config, inference.chunks).fusion
    return lambda candidates: learnabilities(
        candidates,
        builder=run_data.builder,
        student=inference.chunks,
        teacher=inference.chunks,
        grid=grid,
        vocab=inference.vocab,
        max_tokens=config.schedule.max_tokens,
        fusion=fusion,
        backend=config.loss.backend,
        max_length=run_data.max_length,
        max_new_tokens=config.rollout.max_new_tokens,
        policy=config.data.on_long_context,
        alpha=config.solutions.alpha,
    )


def _line(attempt: Attempt, run_data: RunData) -> dict[str, Any]:
    """One problem in the journal."""
    problem, candidates = attempt.problem, attempt.candidates
    messages = list(problem.messages)
    is_text = len(messages) == 1 and set(messages[0]) == {"role", "content"} and messages[0]["role"] == "user"
    asked = {"problem": messages[0]["content"]} if is_text else {"messages": messages}

    def solution(candidate: Candidate) -> dict[str, Any]:
        return {
            "sample": candidate.sample,
            "solution": candidate.text,
            "num_tokens": len(candidate.response.token_ids),
            "mean_log_prob": candidate.mean_log_prob,
            "learnability": candidate.score,
        }

    return {
        "problem_id": problem.id,
        **asked,
        "answer": problem.answer,
        "prompt": run_data.tokenizer.decode(run_data.builder.student_prompt(problem)),
        "num_correct": sum(candidate.correct for candidate in candidates),
        "verdicts": [candidate.correct for candidate in candidates],
        "lengths": [len(candidate.response.token_ids) for candidate in candidates],
        "truncated": [candidate.response.truncated for candidate in candidates],
        "solutions": [solution(candidate) for candidate in attempt.kept],
    }


def provenance(config: Config, run_data: RunData, arguments: argparse.Namespace) -> dict[str, Any]:
    """All that the solutions depend on, save the layout: the journal's first line, and in each line of the file."""
    from megatron_selfdistill.checkpoint.directory import find, iteration_of
    from megatron_selfdistill.config import writable

    assert config.checkpoint.load is not None
    path, _ = find(Path(config.checkpoint.load))
    rollout, wanted, written = config.rollout, config.solutions, writable(config)
    sampling = {name: getattr(rollout, name) for name in "engine max_new_tokens temperature top_k top_p".split()}
    wording = "tokenizer chat_template chat_template_kwargs system_prompt student_template".split()
    if wanted.pick == "learnable":
        wording += ["teacher_template", "on_long_context"]
    return {
        "model": str((arguments.hf or path).absolute()),
        "iteration": iteration_of(path),
        "data": run_data.problems.fingerprint,
        "seed": config.seed,
        "sampling": {**sampling, "stop_token_ids": list(run_data.stop_token_ids)},
        "prompts": {name: written["data"][name] for name in wording},
        "verifier": written["evaluation"]["verifier"],
        **{name: value for name, value in asdict(wanted).items() if name != "refresh_every"},
        "group_size": arguments.group_size,
    }


@dataclass(frozen=True)
class Journal:
    """``NAME.attempts.jsonl``: the provenance, then one line per problem, in their order; only rank 0 touches it."""

    out: Path
    header: dict[str, Any]
    group_size: int
    """Problems that are solved, and written down, at a time."""

    @property
    def path(self) -> Path:
        return self.out.with_name(f"{self.out.stem}.attempts.jsonl")

    def begin(self, num_problems: int) -> tuple[int, str | None]:
        """(problems that are done, None), or (0, the sentence that says why this is another job's)."""
        if not self.path.exists():
            if self.out.exists():
                return 0, f"{self.out} exists, and no {self.path.name} beside it: choose another --out, or remove it"
            self.path.write_text(json.dumps(self.header) + "\n", encoding="utf-8")
            return 0, None
        text = self.path.read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1].splitlines()  # a killed process may have left a part of a line
        try:
            header, *attempts = (json.loads(line) for line in lines)
            assert all("problem_id" in attempt for attempt in attempts) and "model" in header
        except (ValueError, TypeError, AssertionError):
            return 0, f"{self.path} is not what this command writes: choose another --out, or remove it"
        wanted = json.loads(json.dumps(self.header))
        other = [name for name in {**wanted, **header} if header.get(name) != wanted.get(name)]
        if other:
            name = other[0]
            return 0, (
                f"{self.path} was begun with {name} = {header.get(name)!r}, and now it is {wanted.get(name)!r}: choose "
                "another --out, or remove it"
            )
        done = len(attempts)
        if done < num_problems:  # a group is solved as a whole, so that its batches and their rounding are the same
            done -= done % self.group_size
        whole = "".join(line + "\n" for line in lines[: done + 1])
        with self.path.open("r+", encoding="utf-8") as file:
            file.truncate(len(whole.encode()))
        return done, None

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> Iterator[dict[str, Any]]:
        """What became of each problem."""
        with self.path.open(encoding="utf-8") as file:
            next(file)
            yield from map(json.loads, file)

    def finish(self, ids: set[str]) -> None:
        """Write the solutions, all at once, as ``data.path`` takes them: one per line, with an id of its own.

        A problem's best solution has the problem's ``id``; ``ids`` are those of all problems.
        """
        taken = set(ids)
        temporary = _beside(self.out, ".partial")
        with temporary.open("w", encoding="utf-8") as file:
            for attempt in self.lines():
                for rank, solution in enumerate(attempt.pop("solutions")):
                    name = attempt["problem_id"] if rank == 0 else f"{attempt['problem_id']}#{rank + 1}"
                    while rank > 0 and name in taken:
                        name += "'"
                    taken.add(name)
                    record = {"id": name, **attempt, **solution, "provenance": self.header}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        temporary.replace(self.out)


def summarize(attempts: Iterator[dict[str, Any]], out: Path, num_samples: int) -> None:
    """A table of how many problems had how many right samples, and what was written."""
    from rich.console import Console
    from rich.table import Table

    counts: Counter[int] = Counter()
    num_solutions = num_without = num_truncated = 0
    for attempt in attempts:
        counts[attempt["num_correct"]] += 1
        num_solutions += len(attempt["solutions"])
        num_without += not attempt["solutions"]
        num_truncated += sum(attempt["truncated"])
    num_problems = counts.total()
    table = Table(title=f"right samples of {num_samples}", title_justify="left")
    table.add_column("right", justify="right")
    table.add_column("problems", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    most = max(counts.values())
    for right in range(num_samples + 1):
        number = counts[right]
        table.add_row(str(right), str(number), f"{number / num_problems:.1%}", "#" * round(30 * number / most))
    console = Console()
    console.print(table)
    rate = sum(right * number for right, number in counts.items()) / (num_problems * num_samples)
    for line in (
        f"{num_problems} problems, pass rate {rate:.1%}, {num_truncated / (num_problems * num_samples):.1%} cut off",
        f"{num_without} problems without a solution",
        f"{num_solutions} solutions in {out}",
    ):
        console.print(line, highlight=False, soft_wrap=True)


@contextmanager
def _progress(total: int, done: int, grid: RankGrid) -> Iterator[Any]:
    """A bar with problems and the time that is left, where rank 0 has a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("problems"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (grid.is_reporter and console.is_terminal)) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda number: bar.advance(task, number)


def _configured(arguments: argparse.Namespace) -> Config:
    """The configuration, before the model is known."""
    from megatron_selfdistill import config as configuration
    from megatron_selfdistill.errors import ConfigError

    config = configuration.load(["data.solutions=own", *arguments.overrides], arguments.config_name)
    named = {name: getattr(arguments, name) for name in ("num_samples", "keep", "pick", "alpha")}
    config = replace(config, solutions=replace(config.solutions, **named))
    if arguments.num_problems is not None:
        config = replace(config, data=replace(config.data, limit=arguments.num_problems))
    if (arguments.hf is None) == (config.checkpoint.load is None):
        raise ConfigError("expected one model: either --hf DIR or checkpoint.load=DIR")
    if arguments.hf is not None and config.data.tokenizer is None:
        config = replace(config, data=replace(config.data, tokenizer=str(arguments.hf)))
    # No run is resumed here: its folder only holds what an engine needs beside the weights.
    checkpoint = replace(config.checkpoint, resume=False)
    return replace(config, checkpoint=checkpoint, run_dir=str(_beside(arguments.out, ".engine")))


def _of_checkpoint(config: Config, arguments: argparse.Namespace, checkpoint: Path | None) -> Config:
    """The configuration with the architecture of the model, which lies at ``checkpoint``, or at checkpoint.load."""
    from megatron_selfdistill import config as configuration
    from megatron_selfdistill.checkpoint.formats.stored_model import with_stored_architecture
    from megatron_selfdistill.checkpoint.vocabulary import require_same_tokenizer

    if checkpoint is not None:
        config = replace(config, checkpoint=replace(config.checkpoint, load=str(checkpoint)))
    config = with_stored_architecture(config, configuration.given_keys(arguments.overrides, arguments.config_name))
    require_same_tokenizer(config)
    return config


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(f".{out.name}{ending}")


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selfdistill solutions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option(
        "overrides", nargs="*", metavar="key=value", help="settings of selfdistill (`selfdistill --keys` lists them)"
    )
    option("--out", type=Path, required=True, metavar="FILE", help="JSONL that data.path can read")
    option("--hf", type=Path, metavar="DIR", help="a Hugging Face folder as the model, instead of checkpoint.load")
    option("--num-samples", type=_at_least_1, default=8, metavar="N", help="responses per problem (default: 8)")
    option("--keep", type=_at_least_1, default=1, metavar="K", help="solutions per problem, at most (default: 1)")
    option(
        "--pick", choices=SOLUTION_RANKINGS, default="shortest", help="which right ones are kept (default: shortest)"
    )
    option("--alpha", type=float, default=0.01, help="with --pick learnable: weight of the worst token (default: 0.01)")
    option("--num-problems", type=_at_least_1, metavar="N", help="only the first so many (default: all)")
    option("--group-size", type=_at_least_1, default=64, metavar="N", help="problems at a time (default: 64)")
    option("--config-name", default="train", help="the primary configuration (default: train)")
    return parser
