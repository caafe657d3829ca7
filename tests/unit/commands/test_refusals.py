# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Every command refuses a command line that cannot work before it imports torch, which takes seconds."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked_programs import Done, ForkedPrograms
from tiers import combinations

from megatron_selfdistill.cli import COMMANDS
from megatron_selfdistill.commands import evaluate, prechecks
from megatron_selfdistill.config import load
from megatron_selfdistill.errors import CheckpointError, ConfigError
from megatron_selfdistill.instruments.explorer import explore_command as explore
from megatron_selfdistill.instruments.plan.plan_checks import check_plan

REPOSITORY = Path(__file__).resolve().parents[3]
HEAVY = "torch megatron transformers tokenizers datasets numpy tensorboard rich safetensors wandb".split()

# What every command imports before its checks; a heavy module among it would show in every command.
LIGHT = ["hydra", "megatron_selfdistill.config", "megatron_selfdistill.commands.prechecks"]
TRAIN = "megatron_selfdistill.train"
PROGRAM = "megatron_selfdistill"
"""Run as ``python -m`` runs it, which is what ``selfdistill`` runs, too."""
CONVERT, EVALUATE, SOLUTIONS, DOCTOR = (
    str(REPOSITORY / "tools" / f"{name}.py") for name in ("convert", "evaluate", "make_solutions", "doctor")
)
RUNNABLE = ["run_dir=run", "data.path=data.jsonl", "data.tokenizer=hf"]
PLAN = ["dry_run=true", "cluster.num_gpus=16", "model.vocab_size=1000"]
OUT = ["--out", "out"]
EVALUATED = ["--hf", "hf", "--data", "data.jsonl", *OUT]
EXPLORED = ["--problem", "1 + 1", "--solution", "2"]
SOLVED = ["--out", "own.jsonl", "--hf", "hf", "data.path=data.jsonl"]
THREE = "parallel.tensor_model_parallel_size=3"
NOT_CUT = "the world size 1 must be a multiple of TP x PP x CP = 3 x 1 x 1 = 3"
NO_CHECKPOINT = "expected a Megatron torch_dist checkpoint"

CASES: dict[str, tuple[list[str], str]] = {
    "train, a missing file": ([TRAIN, *RUNNABLE, "data.path=nope.jsonl"], "got nope.jsonl, which matches none"),
    "train, missing problems to evaluate": ([TRAIN, *RUNNABLE, "evaluation.path=nope.jsonl"], "got nope.jsonl"),
    "train, a missing tokenizer": ([TRAIN, *RUNNABLE, "data.tokenizer=./nope"], "got ./nope; correct data.tokenizer"),
    "train, no data": ([TRAIN, "run_dir=here", "data.path="], "data.path is not set"),
    "train, no tokenizer": ([TRAIN, "run_dir=here", "data.path=data.jsonl"], "data.tokenizer is not set"),
    "train, no directory": ([TRAIN, *RUNNABLE[1:]], "run_dir is not set"),
    "train, no evaluation": ([TRAIN, *RUNNABLE, "evaluation.every=3"], "evaluation.path is not set"),
    "train, a missing checkpoint": ([TRAIN, *RUNNABLE, "checkpoint.load=nope"], NO_CHECKPOINT),
    "train, an empty directory": ([TRAIN, *RUNNABLE, "checkpoint.load=empty"], "empty has no metadata.json"),
    "train, a Hugging Face directory": ([TRAIN, *RUNNABLE, "checkpoint.load=hf"], "hf is a Hugging Face directory"),
    "train, a layout": ([TRAIN, *RUNNABLE, THREE], NOT_CUT),
    "train, another number of ranks": ([TRAIN, *RUNNABLE, "cluster.num_gpus=16"], "but the launch has 1 rank:"),
    "train, heads": ([TRAIN, *RUNNABLE, "model.hidden_size=65"], "must be a multiple of model.num_attention_heads"),
    "train, a recipe": ([TRAIN, "recipe=nope"], "Could not find 'recipe/nope'"),
    "train, a type": ([TRAIN, "num_steps=three"], "num_steps: Value 'three' of type 'str' could not be converted"),
    "a plan, a layout": ([TRAIN, *PLAN, THREE], "the world size 16 must be a multiple of TP x PP x CP = 3"),
    "a plan, engines": ([TRAIN, *PLAN, "rollout.engine=vllm", "rollout.engine_tp=3"], "ranks form one engine"),
    "a plan, no vocabulary": ([TRAIN, *PLAN, "model.vocab_size=null"], "the vocabulary's size is not known"),
    "a plan, a checkpoint": ([TRAIN, *PLAN, "checkpoint.load=nope"], NO_CHECKPOINT),
    "convert, no command": ([CONVERT], "the following arguments are required: COMMAND"),
    "convert, a missing directory": (
        [CONVERT, "hf-to-megatron", "--hf", "nope", *OUT],
        "nope/config.json cannot be read, expected",
    ),
    "convert, an empty directory": (
        [CONVERT, "hf-to-megatron", "--hf", "empty", *OUT],
        "empty/config.json cannot be read, expected",
    ),
    "convert, a file": (
        [CONVERT, "hf-to-megatron", "--hf", "data.jsonl", *OUT],
        "data.jsonl/config.json cannot be read, expected",
    ),
    "convert, a name on the hub": (
        [CONVERT, "hf-to-megatron", "--hf", "Qwen/Qwen3-0.6B", *OUT],
        "download it with `hf download Qwen/Qwen3-0.6B --local-dir DIR`",
    ),
    "convert, a mistyped path": ([CONVERT, "inspect", "full/nope"], "full/nope does not exist\n"),
    "explore, a name on the hub": (
        [PROGRAM, "explore", "Qwen/Qwen3-0.6B", *EXPLORED],
        "download it with `hf download Qwen/Qwen3-0.6B --local-dir DIR`",
    ),
    "convert, no weights": ([CONVERT, "hf-to-megatron", "--hf", "no_weights", *OUT], "no_weights has no weights"),
    "convert, a directory in the way": (
        [CONVERT, "hf-to-megatron", "--hf", "hf", "--out", "full"],
        "full exists and is not overwritten",
    ),
    "convert back, a missing directory": ([CONVERT, "megatron-to-hf", "--megatron", "nope", *OUT], NO_CHECKPOINT),
    "convert back, an iteration": (
        [CONVERT, "megatron-to-hf", "--megatron", "empty", "--iteration", "7", *OUT],
        "empty/iter_0000007 does not exist",
    ),
    "convert back, a directory in the way": (
        [CONVERT, "megatron-to-hf", "--megatron", "empty", "--out", "full"],
        "full exists and is not",
    ),
    "inspect, this directory": ([CONVERT, "inspect", "."], NO_CHECKPOINT),
    "inspect": ([CONVERT, "inspect", "nope"], NO_CHECKPOINT),
    "evaluate, a key": ([EVALUATE, *EVALUATED, "rollot.top_p=1"], "did you mean"),
    "evaluate, an option": ([EVALUATE, *OUT], "the following arguments are required: --data"),
    "evaluate, a reserved key": ([EVALUATE, *EVALUATED, "run_dir=x"], "run_dir cannot be set here"),
    "evaluate, a missing file": ([EVALUATE, "--hf", "hf", "--data", "nope.jsonl", *OUT], "got nope.jsonl"),
    "evaluate, a missing directory": (
        [EVALUATE, "--hf", "nope", "--data", "data.jsonl", *OUT],
        "nope/config.json cannot be read, expected",
    ),
    "evaluate, a missing checkpoint": ([EVALUATE, "--megatron", "nope", "--data", "data.jsonl", *OUT], NO_CHECKPOINT),
    "evaluate, results in the way": ([EVALUATE, *EVALUATED[:4], "--out", "full"], "add --overwrite"),
    "evaluate, too few samples": (
        [EVALUATE, *EVALUATED, "--num-samples", "2", "--pass-at-k", "3"],
        "expected every k of pass@k from 1 to the 2 samples, got [3]",
    ),
    "explore, a missing text": ([PROGRAM, "explore", "hf", "--problem", "nope.txt", "--solution", "x"], "got nope.txt"),
    "explore, a missing checkpoint": ([PROGRAM, "explore", "nope", *EXPLORED], NO_CHECKPOINT),
    "explore, a reserved key": ([PROGRAM, "explore", "hf", *EXPLORED, "data.path=x"], "data.path cannot be set here"),
    "explore, a layout": ([PROGRAM, "explore", "hf", *EXPLORED, THREE], NOT_CUT),
    "evaluate, a layout": ([EVALUATE, *EVALUATED, THREE], NOT_CUT),
    "compare": ([EVALUATE, "compare", "nope", "empty"], "expected an evaluation in nope, got no summary.json"),
    "solutions, a key": ([SOLUTIONS, *SOLVED, "rollot.top_p=1"], "did you mean"),
    "solutions, a missing file": ([SOLUTIONS, *SOLVED[:4], "data.path=nope.jsonl"], "got nope.jsonl"),
    "solutions, a missing directory": (
        [SOLUTIONS, *SOLVED[:3], "nope", SOLVED[4]],
        "nope/config.json cannot be read, expected",
    ),
    "solutions, no model": ([SOLUTIONS, *SOLVED[:2], SOLVED[4]], "expected one model"),
    "solutions, a directory in the way": ([SOLUTIONS, "--out", "full", *SOLVED[2:]], "got the directory full"),
    "solutions, a layout": ([SOLUTIONS, *SOLVED, THREE], NOT_CUT),
    "explanations, a key": ([PROGRAM, "explanations", *SOLVED, "rollot.top_p=1"], "did you mean"),
    "explanations, no solutions": (
        [PROGRAM, "explanations", *SOLVED, "data.solutions=own"],
        "data.solutions must be one of given, answer",
    ),
    "explanations, no model": ([PROGRAM, "explanations", *SOLVED[:2], SOLVED[4]], "expected one model"),
    "explanations, a layout": ([PROGRAM, "explanations", *SOLVED, THREE], NOT_CUT),
    "plan, an unknown number of GPUs": ([PROGRAM, "plan"], "a dry run without a launch needs cluster.num_gpus"),
    "plan, a layout": ([PROGRAM, "plan", *PLAN[1:], THREE], "the world size 16 must be a multiple of TP x PP x CP = 3"),
    "plan, no plan": ([PROGRAM, "plan", *PLAN[1:], "dry_run=false"], "dry_run=false contradicts `selfdistill plan`"),
    "a word that is no command": ([PROGRAM, "trian", *RUNNABLE], "there is no command 'trian'; did you mean 'train'?"),
    "no arguments": ([PROGRAM], "usage: selfdistill COMMAND"),
    "key=value without a command": ([PROGRAM, *RUNNABLE, THREE], NOT_CUT),
    "train": ([PROGRAM, "train", *RUNNABLE, THREE], NOT_CUT),
    "convert": (
        [PROGRAM, "convert", "hf-to-megatron", "--hf", "nope", *OUT],
        "nope/config.json cannot be read, expected",
    ),
    "evaluate": ([PROGRAM, "evaluate", *EVALUATED, THREE], NOT_CUT),
    "solutions": ([PROGRAM, "solutions", *SOLVED, THREE], NOT_CUT),
    "report": ([PROGRAM, "report", "nope"], "expected a run directory, got nope, which has neither metrics.jsonl"),
    "doctor": ([PROGRAM, "doctor", "--minutes", "3"], "--minutes needs --selftest"),
    "serve": ([PROGRAM, "serve"], "the following arguments are required: --hf-config"),
    "doctor, an option": ([DOCTOR, "--minutes", "3"], "--minutes needs --selftest"),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    (directory / "data.jsonl").write_text('{"problem": "1 + 1", "solution": "2", "answer": "2"}\n')
    for name in ("hf", "no_weights", "empty", "full"):
        (directory / name).mkdir()
    for name in ("hf", "no_weights"):
        (directory / name / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (directory / "hf" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (directory / "full" / "file").write_text("")
    return directory


@pytest.fixture(scope="module")
def run(directory) -> Iterator[Callable[..., Done]]:
    """Return a function that runs a command in the directory."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    with ForkedPrograms(sys.executable, LIGHT, environment | {"PYTHONPATH": str(REPOSITORY)}) as programs:
        yield lambda *command: programs.run(*command, cwd=directory)


def heavy_modules(done: Done) -> set[str]:
    return set(HEAVY) & done.modules


def test_a_heavy_module_is_seen(run, directory):
    (directory / "heavy.py").write_text("import numpy\n")
    assert heavy_modules(run(directory / "heavy.py")) == {"numpy"}
    (directory / "heavy.py").unlink()


SERVE = "megatron_selfdistill.engines.vllm.server.serve"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: --hf-config"),
        (["--hf-config", "hf", "--host", "0.0.0.0"], "set the environment variable SELFDISTILL_SERVER_TOKEN"),
        (["--hf-config", "hf", "--nnodes", "2"], "and --master-addr with --nnodes above 1"),
    ],
    ids=["an option", "a host", "a node"],
)
def test_a_server_refuses_before_it_imports_anything_heavy(run, arguments, words):
    done = run(SERVE, *arguments)
    assert (done.status, heavy_modules(done)) == (2, set())
    assert words in done.stderr and "Traceback" not in done.stderr


@combinations(
    case=list(CASES),
    quick={
        "case": [
            "train, a missing file",
            "train, no directory",
            "train, a missing checkpoint",
            "train, heads",
            "convert, a directory in the way",
            "convert, a name on the hub",
            "convert, a mistyped path",
            "evaluate, too few samples",
            "compare",
            "solutions, no model",
            "plan, a layout",
            "a word that is no command",
            "serve",
            "report",
        ]
    },
    strength=1,
)
def test_a_refusal_imports_nothing_heavy_and_writes_nothing(run, directory, case):
    command, words = CASES[case]
    before = sorted(directory.rglob("*"))
    done = run(*command)
    assert (done.status, heavy_modules(done)) == (2, set()), done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert sorted(directory.rglob("*")) == before


STEERING = "no\x1b]52;c;eA==\x07\x1b[2Jpe"
"""A name that writes the clipboard of some terminals and clears all of them."""


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", *RUNNABLE, f"data.tokenizer='./{STEERING}'"],
        ["convert", "inspect", STEERING],
        ["report", STEERING],
        *(
            pytest.param(arguments, marks=pytest.mark.full)
            for arguments in (
                ["plan", *PLAN, f"checkpoint.load='{STEERING}'"],
                ["evaluate", "--hf", STEERING, "--data", "data.jsonl", *OUT],
                ["explore", STEERING, *EXPLORED],
                ["solutions", *SOLVED[:3], STEERING, SOLVED[4]],
                ["explanations", *SOLVED[:3], STEERING, SOLVED[4]],
            )
        ),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_name_in_a_message_does_not_steer_the_terminal(run, arguments):
    done = run(PROGRAM, *arguments)
    assert done.status == 2 and r"no\x1b]52;c;eA==\x07\x1b[2Jpe" in done.stderr, done.stderr
    assert not set(done.stderr) & {"\x1b", "\x07"}


@pytest.mark.parametrize(
    ("option", "word"), [("--version", "torch "), ("--keys", "num_steps="), ("--recipes", "recipe=")]
)
def test_what_the_program_tells_about_itself_imports_nothing_heavy(run, option, word):
    done = run(PROGRAM, option)
    assert (done.status, heavy_modules(done)) == (0, set()) and word in done.stdout


@combinations(
    command=[PROGRAM, TRAIN, CONVERT, EVALUATE, SOLUTIONS, DOCTOR], quick={"command": [PROGRAM, DOCTOR]}, strength=1
)
def test_help_imports_nothing_heavy(run, command):
    done = run(command, "--help")
    assert (done.status, heavy_modules(done)) == (0, set())


@combinations(name=list(COMMANDS), quick={"name": ["train", "evaluate"]}, strength=1)
def test_the_help_of_a_command_shows_an_example_and_imports_nothing_heavy(run, name):
    done = run(PROGRAM, name, "--help")
    assert (done.status, heavy_modules(done)) == (0, set())
    assert f"usage: selfdistill {name} " in done.stdout
    assert re.search(rf"^ +selfdistill {name}\b", done.stdout, re.MULTILINE), "an example"


@pytest.mark.parametrize(
    ("command", "arguments"),
    [(evaluate, EVALUATED), (explore, ["hf", *EXPLORED])],
    ids=["evaluate", "explore"],
)
def test_an_interruption_is_a_line_and_no_traceback(monkeypatch, capsys, command, arguments):
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "checked", interrupted)
    assert command.main(arguments) == 130
    assert capsys.readouterr().err.endswith(": interrupted; no results were written\n")


def test_a_run_with_checkpoints_of_its_own_needs_neither_the_one_that_it_started_from_nor_its_architecture(tmp_path):
    (tmp_path / "run" / "checkpoints" / "iter_0000005").mkdir(parents=True)
    begun = [f"run_dir={tmp_path}/run", f"checkpoint.load={tmp_path}/removed"]
    prechecks.require_start(load(begun))
    with pytest.raises(CheckpointError, match="expected a Megatron torch_dist checkpoint"):
        prechecks.require_start(load([*begun, "checkpoint.resume=false"]))
    heads = ["parallel.tensor_model_parallel_size=5"]
    prechecks.require_ranks(load([begun[0], *heads]), 5)
    check_plan(load([begun[0], *heads, "cluster.num_gpus=5"]))
    with pytest.raises(ConfigError, match=r"must be a multiple of TP"):
        prechecks.require_ranks(load([f"run_dir={tmp_path}/new", *heads]), 5)
