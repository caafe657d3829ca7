# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Every command refuses a command line that cannot work before it imports torch, which takes seconds."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from forked_programs import Done, ForkedPrograms
from tiers import combinations

from megatron_selfdistill import train
from megatron_selfdistill.cli import COMMANDS
from megatron_selfdistill.commands import prechecks
from megatron_selfdistill.commands.prechecks import require_packages
from megatron_selfdistill.config import load
from megatron_selfdistill.errors import CheckpointError, ConfigError

REPOSITORY = Path(__file__).resolve().parents[3]
HEAVY = "torch megatron transformers tokenizers datasets numpy tensorboard rich safetensors wandb".split()

# What every command imports before its checks; a heavy module among it would show in every command.
LIGHT = ["hydra", "megatron_selfdistill.config", "megatron_selfdistill.commands.prechecks"]
TRAIN = "megatron_selfdistill.train"
PROGRAM = "megatron_selfdistill"
"""Run as ``python -m`` runs it, which is what ``selfdistill`` runs, too."""
EVALUATE, SOLUTIONS = (str(REPOSITORY / "tools" / f"{name}.py") for name in ("evaluate", "make_solutions"))
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
    "train, no directory": ([TRAIN, *RUNNABLE[1:]], "run_dir is not set"),
    "train, a missing checkpoint": ([TRAIN, *RUNNABLE, "checkpoint.load=nope"], NO_CHECKPOINT),
    "train, a Hugging Face directory": ([TRAIN, *RUNNABLE, "checkpoint.load=hf"], "hf is a Hugging Face directory"),
    "train, a layout": ([TRAIN, *RUNNABLE, THREE], NOT_CUT),
    "train, heads": ([TRAIN, *RUNNABLE, "model.hidden_size=65"], "must be a multiple of model.num_attention_heads"),
    "train, a type": ([TRAIN, "num_steps=three"], "num_steps: Value 'three' of type 'str' could not be converted"),
    "evaluate, a reserved key": ([EVALUATE, *EVALUATED, "run_dir=x"], "run_dir cannot be set here"),
    "evaluate, results in the way": ([EVALUATE, *EVALUATED[:4], "--out", "full"], "add --overwrite"),
    "evaluate, too few samples": (
        [EVALUATE, *EVALUATED, "--num-samples", "2", "--pass-at-k", "3"],
        "expected every k of pass@k from 1 to the 2 samples, got [3]",
    ),
    "explore, a missing checkpoint": ([PROGRAM, "explore", "nope", *EXPLORED], NO_CHECKPOINT),
    "solutions, no model": ([SOLUTIONS, *SOLVED[:2], SOLVED[4]], "expected one model"),
    "explanations, no model": ([PROGRAM, "explanations", *SOLVED[:2], SOLVED[4]], "expected one model"),
    "plan, an unknown number of GPUs": ([PROGRAM, "plan"], "a dry run without a launch needs cluster.num_gpus"),
    "plan, a layout": ([PROGRAM, "plan", *PLAN[1:], THREE], "the world size 16 must be a multiple of TP x PP x CP = 3"),
    "a word that is no command": ([PROGRAM, "trian", *RUNNABLE], "there is no command 'trian'; did you mean 'train'?"),
    "no arguments": ([PROGRAM], "usage: selfdistill COMMAND"),
    "key=value without a command": ([PROGRAM, *RUNNABLE, THREE], NOT_CUT),
    "report": ([PROGRAM, "report", "nope"], "expected a run directory, got nope, which has neither metrics.jsonl"),
    "doctor": ([PROGRAM, "doctor", "--minutes", "3"], "--minutes needs --selftest"),
    "serve": ([PROGRAM, "serve"], "the following arguments are required: --hf-config"),
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
            "evaluate, too few samples",
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
    [["train", *RUNNABLE, f"data.tokenizer='./{STEERING}'"], ["convert", "inspect", STEERING], ["report", STEERING]],
    ids=lambda arguments: arguments[0],
)
def test_a_name_in_a_message_does_not_steer_the_terminal(run, arguments):
    done = run(PROGRAM, *arguments)
    assert done.status == 2 and r"no\x1b]52;c;eA==\x07\x1b[2Jpe" in done.stderr, done.stderr
    assert not set(done.stderr) & {"\x1b", "\x07"}


@combinations(name=list(COMMANDS), quick={"name": ["train", "evaluate"]}, strength=1)
def test_the_help_of_a_command_shows_an_example_and_imports_nothing_heavy(run, name):
    done = run(PROGRAM, name, "--help")
    assert (done.status, heavy_modules(done)) == (0, set())
    assert f"usage: selfdistill {name} " in done.stdout
    assert re.search(rf"^ +selfdistill {name}\b", done.stdout, re.MULTILINE), "an example"


def test_a_run_with_checkpoints_of_its_own_needs_neither_the_one_that_it_started_from_nor_its_architecture(tmp_path):
    (tmp_path / "run" / "checkpoints" / "iter_0000005").mkdir(parents=True)
    begun = [f"run_dir={tmp_path}/run", f"checkpoint.load={tmp_path}/removed"]
    prechecks.require_start(load(begun))
    with pytest.raises(CheckpointError, match="expected a Megatron torch_dist checkpoint"):
        prechecks.require_start(load([*begun, "checkpoint.resume=false"]))
    heads = ["parallel.tensor_model_parallel_size=5"]
    prechecks.require_ranks(load([begun[0], *heads]), 5)
    with pytest.raises(ConfigError, match=r"must be a multiple of TP"):
        prechecks.require_ranks(load([f"run_dir={tmp_path}/new", *heads]), 5)


SERVERS = ("rollout.engine=vllm", "rollout.placement=server", "rollout.servers=[http://n1:8000]")


@pytest.fixture
def absent(monkeypatch):
    """Hide vLLM, where the machine that runs the tests has it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)


def test_a_missing_package_is_one_message_before_anything_is_built(absent, monkeypatch, capsys):
    monkeypatch.setattr(prechecks, "RUN", {})
    assert train.main(["rollout.engine=vllm", "data.path=none.jsonl", "data.tokenizer=none", "run_dir=none"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "rollout.engine=vllm needs vllm, which this Python lacks: run pip install -e '.[vllm]'" in line


def test_a_package_of_every_run_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(prechecks, "RUN", {"megatron-core": "megatron.absent"})
    with pytest.raises(ConfigError, match=r"a run needs megatron-core, .*: run pip install -e '\.\[train\]'"):
        require_packages(load([]))


@pytest.mark.parametrize("overrides", [[], SERVERS, ["recipe=chat_logs", "rollout.engine=vllm"]])
def test_a_package_that_is_not_needed_here_is_not_missed(absent, monkeypatch, overrides):
    monkeypatch.setattr(prechecks, "RUN", {})
    require_packages(load([*overrides]))
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    require_packages(load(["rollout.engine=vllm"]))
