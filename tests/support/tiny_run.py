# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Whole training runs of a tiny model on column subtraction, in this process or on ranks."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from recordings import taken_out
from rounded_json import read_lines

if TYPE_CHECKING:
    from ranks import RankPool

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY / "examples"))

# These metrics differ between equal runs: times and memory.
NOT_REPRODUCIBLE = (
    *("seconds/", "tokens_per_second/", "memory/", "overlap/"),
    *("rollout/generation_seconds", "rollout/waited_seconds", "rollout/servers_waited_seconds"),
)
TRACKER = "latest_checkpointed_iteration.txt"
TWO_RANKS: dict[str, list[str]] = {
    "TP2": ["parallel.tensor_model_parallel_size=2"],
    "CP2": ["parallel.context_parallel_size=2"],
    "PP2": ["parallel.pipeline_model_parallel_size=2"],
    "DP2": [],
}


def write_data(directory: Path, num_problems: int = 40) -> None:
    """Write a tokenizer and problems with answers as hints into ``directory``."""
    from _lib import subtraction
    from _lib.pretraining import write_records, write_tokenizer

    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory / "tokenizer", subtraction.TASK.alphabet)
    pairs = subtraction.distinct(num_problems, "train", seed=1)
    write_records(directory / "problems.jsonl", [subtraction.record(a, b) for a, b in pairs])


def write_chats(directory: Path, replies: Sequence[str], file: str = "chats.jsonl") -> None:
    """Write logged conversations of one turn each, and their template."""
    write_conversations(directory, [(f"{i:03d}-0=", reply, "thanks") for i, reply in enumerate(replies)], file)


def write_conversations(directory: Path, chats: Sequence[Sequence[str]], file: str = "chats.jsonl") -> None:
    """Write logged conversations, whose texts are in turn those of a user and an assistant, and their template."""
    from _lib.pretraining import write_records

    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}${% endif %}{% endfor %}"
    (directory / "template.jinja").write_text(template)
    roles = ("user", "assistant")
    records = [{"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]} for texts in chats]
    write_records(directory / file, records)


def overrides(data: Path, run_dir: Path, *more: str) -> list[str]:
    """Return the overrides of a run of 6 steps of 8 problems; ``more`` comes last."""
    return [
        *(f"run_dir={run_dir}", f"data.path={data}/problems.jsonl", f"data.tokenizer={data}/tokenizer"),
        *("data.teacher_template='{problem}H{solution}|'", "data.global_batch_size=8", "rollout.max_new_tokens=14"),
        *("schedule.max_tokens=256", "model.num_layers=2", "model.hidden_size=32", "model.num_query_groups=2"),
        *("model.make_vocab_size_divisible_by=8", "model.max_position_embeddings=128", "model.init_method_std=0.2"),
        *("optimizer=fp32", "optimizer.lr=1e-3", "optimizer.lr_warmup_steps=2", "num_steps=6"),
        "optimizer.constants.adam_eps=1e-5",  # with 1e-8 a first step, g / |g|, is one of rounding where g is near zero
        "metrics.measure_every_token=1",  # which tokens are measured depends on the layout
        *("checkpoint.save_every=3", "metrics.console_every=0", "metrics.loggers=[]", "report.every=0"),
        *("metrics.explore_samples=0", *more),
    ]


def with_trainer(overrides: Sequence[str], use: Callable[[Any], Any]) -> Any:
    from megatron_selfdistill.config import load
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.trainer import Trainer

    config = load(overrides)
    run_data = RunData.load(config)
    grid = ranks.initialize(config.parallel, config.seed)
    try:
        trainer = Trainer(config, run_data, grid)
        try:
            return use(trainer)
        finally:
            trainer.close()
    finally:
        ranks.shutdown()


def start(arguments: Sequence[str], kill_at: str | None = None) -> int:
    """Train on this rank with arguments of the command line and of `recordings`; ``kill_at``: see `killed_at`."""
    from megatron_selfdistill.train import main

    with pytest.MonkeyPatch.context() as patch:
        if kill_at is not None:
            killed_at(kill_at, patch)
        return main(taken_out(arguments, patch))


def start_and_listen(arguments: Sequence[str]) -> tuple[int, str]:
    """Call `start`; return its status and its output on standard output and standard error, with warnings."""
    with contextlib.redirect_stderr(io.StringIO()) as output, contextlib.redirect_stdout(output):
        status = start(arguments)
    return status, output.getvalue()


def refusal(ranks: RankPool, arguments: Sequence[str], world_size: int = 1) -> str:
    """Return the output of a start whose ranks must all end with status 2."""
    ends = ranks.run(start_and_listen, arguments, world_size=world_size, init_process_group=False)
    assert {status for status, _ in ends} == {2}, ends
    return "".join(output for _, output in ends)


def start_each(runs: Sequence[Sequence[str]]) -> list[int]:
    return [start(arguments) for arguments in runs]


def start_with(arguments: Sequence[str], owner: Any, name: str, replacement: Any) -> int:
    """Call `start` while ``owner.name`` is ``replacement``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, replacement)
        return start(arguments)


def train(
    ranks: RankPool, arguments: Sequence[str], world_size: int = 1, *, start=start, expected=0, **options: Any
) -> None:
    """Call ``start(arguments)`` on each rank and assert its status; ``options`` go to ``start`` or to the ranks."""
    statuses = ranks.run(start, arguments, world_size=world_size, init_process_group=False, **options)
    assert statuses == [expected] * world_size


def train_each(ranks: RankPool, runs: Sequence[Sequence[str]], *, expected: int = 0) -> None:
    """Start one run after the other in one process of one rank; assert that the exit status of each is ``expected``."""
    assert ranks.run(start_each, runs, world_size=1, init_process_group=False) == [[expected] * len(runs)]


def killed_at(place: str, patch: pytest.MonkeyPatch) -> None:
    """Make this process kill itself during its 5th step (``step``) or while it saves its 2nd checkpoint."""

    def kill(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if place == "step":
        from megatron_selfdistill.trainer import Trainer

        update = Trainer.update

        def update_or_die(self: Any, step: Any) -> Any:
            if self.step == 4:
                apply = self.learner.apply_gradients
                # The weights have changed, and the step is not counted.
                self.learner.apply_gradients = lambda norm: kill(apply(norm))
            return update(self, step)

        patch.setattr(Trainer, "update", update_or_die)
    else:
        from megatron_selfdistill.checkpoint.formats import directory

        calls = []
        publish = directory.publish

        def publish_or_die(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            if len(calls) > 2:  # the frozen teacher, the checkpoint of step 3, and now that of step 6
                kill()
            return publish(*args, **kwargs)

        patch.setattr(directory, "publish", publish_or_die)


def reproducible_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Return metrics.jsonl without times and memory; assert that docs/metrics.md explains every key."""
    from metric_keys import undocumented

    from megatron_selfdistill.metrics.run_log import read_metrics

    assert undocumented(key for line in read_metrics(run_dir) for key in line) == set()
    return [{k: v for k, v in line.items() if not k.startswith(NOT_REPRODUCIBLE)} for line in read_metrics(run_dir)]


def recorded(path: Path, step: int) -> dict[tuple[str, int], list[int]]:
    """Return the recorded rollouts of a step: (problem, sample) -> token ids."""
    records = [record for record in read_lines(path) if record["step"] == step]
    return {(record["problem_id"], record["sample_index"]): record["token_ids"] for record in records}


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file()
    }


def saved_step(run_dir: Path) -> int:
    path = run_dir / "checkpoints" / TRACKER
    return int(path.read_text()) if path.exists() else 0


def go_back_to_step(step: int, run_dir: Path) -> None:
    """Remove the checkpoints of a run after ``step``.

    The resumed run repeats the later steps with the settings of the whole run, which a shorter run would not have.
    """
    checkpoints = run_dir / "checkpoints"
    for later in checkpoints.glob("iter_*"):
        if int(later.name.removeprefix("iter_")) > step:
            shutil.rmtree(later)
    (checkpoints / TRACKER).write_text(str(step))


def final_tensors(run_dir: Path, step: int = 6) -> dict[str, Any]:
    from megatron.core.dist_checkpointing import load_plain_tensors

    tensors: dict[str, Any] = load_plain_tensors(str(run_dir / "checkpoints" / f"iter_{step:07d}"))
    return tensors


def differences(one: Path, other: Path, step: int = 6) -> list[tuple[str, float]]:
    """Return the tensors that differ between two runs' checkpoints, with their largest differences, in a group."""
    a, b = final_tensors(one, step), final_tensors(other, step)
    assert a.keys() == b.keys()
    return [
        (key, float((a[key].double() - b[key].double()).abs().max()))
        for key in a
        if hasattr(a[key], "equal") and not a[key].equal(b[key])
    ]


def assert_equal_runs(ranks: RankPool, one: Path, other: Path, num_steps: int = 6) -> None:
    """Assert that two runs are equal bit for bit: metrics of every step, weights, optimizer state, EMA weights."""
    assert len(reproducible_metrics(one)) == num_steps
    assert reproducible_metrics(one) == reproducible_metrics(other)
    assert ranks.run(differences, one, other, num_steps, world_size=1) == [[]]


def assert_steps_equal(
    expected_run: Path, found_run: Path, groups: tuple[str, ...], num_steps: int | None = None
) -> None:
    """Assert that two runs have the same metrics of ``groups`` and norms in the first ``num_steps`` or all steps."""
    steps = zip(reproducible_metrics(expected_run), reproducible_metrics(found_run), strict=True)
    for expected, found in itertools.islice(steps, num_steps):
        compared = {key for key in expected if key.startswith(groups)}
        assert compared and compared == {key for key in found if key.startswith(groups)}
        for key in compared:
            assert found[key] == pytest.approx(expected[key], abs=2e-5), key
        assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-3)


class Runs:
    """Whole runs, each of which is trained at its first request: the fixture `runs` of tests/runs.

    A run is the options that follow those of `overrides`, and its number of ranks.  Its directory has the responses
    that it has sampled in responses.jsonl.  Tests read a run and do not change it.
    """

    def __init__(self, ranks: RankPool, data: Path, root: Path) -> None:
        self._ranks, self._data, self._root = ranks, data, root
        self._made: dict[str, Path] = {}

    def arguments(self, run_dir: Path, *options: str) -> list[str]:
        """Return the arguments of the run with ``options`` in ``run_dir``."""
        return overrides(self._data, run_dir, *options)

    def __call__(self, *options: str, world_size: int = 1, **how: Any) -> Path:
        """Return the directory of the run with ``options``; ``how``: further arguments of `train`."""
        key = repr((options, world_size, how))
        if key not in self._made:
            run = self._root / str(len(self._made)) / "run"
            record = f"tests.record={run}/responses.jsonl"
            train(self._ranks, self.arguments(run, *options, record), world_size, **how)
            self._made[key] = run
        return self._made[key]

    def replayed(self, *options: str, more: Sequence[str] = (), world_size: int = 2) -> Path:
        """Return the run with ``options`` and ``more`` on the responses of the run with ``options`` on one rank."""
        return self(*options, f"tests.replay={self(*options)}/responses.jsonl", *more, world_size=world_size)

    def continued(
        self, *options: str, step: int, more: Sequence[str] = (), world_size: int = 1, then: int = 0, **how: Any
    ) -> Path:
        """Return a copy of a run that has gone on from its checkpoint of ``step`` with ``more`` options.

        ``then``: the number of ranks from there, if it is another one.
        """
        whole = self(*options, world_size=world_size, **how)
        copy = Path(shutil.copytree(whole, whole.parent / f"continued_{len(list(whole.parent.iterdir()))}"))
        go_back_to_step(step, copy)
        train(self._ranks, self.arguments(copy, *options, *more), then or world_size, **how)
        return copy

    def resumed(self, *options: str, step: int, world_size: int = 1, **how: Any) -> Path:
        """Assert that a run which resumes from a checkpoint of ``step`` stays the same bit for bit; return its copy."""
        whole = self(*options, world_size=world_size, **how)
        halves = self.continued(*options, step=step, world_size=world_size, **how)
        assert_equal_runs(self._ranks, whole, halves, saved_step(whole))
        return halves


def starts_with_an_even_token(text: str, problem: Any) -> bool:
    """Return whether the text begins with an even token: a verifier that an untrained model sometimes satisfies."""
    return text[:1] in set("02468-b,:H~")


def assert_guided_by_the_teacher_of_the_loss(run_dir: Path) -> None:
    """Assert that all responses are guided, with the mean log-probs that the loss computes for student and teacher."""
    records = read_lines(run_dir / "responses.jsonl")
    for step, line in enumerate(reproducible_metrics(run_dir)):
        means = {}
        for name in ("log_probs", "teacher_log_probs"):
            values = [value for record in records if record["step"] == step for value in record[name]]
            means[name] = sum(values) / len(values)
        assert line["guided/share"] == 1
        assert line["teacher_cross_entropy"] == pytest.approx(-means["teacher_log_probs"], abs=1e-4)
        assert line["sampler/log_prob_max_abs_diff"] < 1e-3
        assert step == 0 or abs(means["log_probs"] - means["teacher_log_probs"]) > 1e-3
