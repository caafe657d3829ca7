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
PROGRAM = "megatron_selfdistill"
"""Run as ``python -m`` runs it, which is what ``selfdistill`` runs, too."""
TRAIN, SERVE = f"{PROGRAM}.train", f"{PROGRAM}.engines.vllm.server.serve"
EVALUATE, SOLUTIONS = (str(REPOSITORY / "tools" / f"{name}.py") for name in ("evaluate", "make_solutions"))
RUNNABLE = "run_dir=run data.path=data.jsonl data.tokenizer=hf"
EVALUATED = "--hf hf --data data.jsonl"
UNSOLVED = "--out own.jsonl data.path=data.jsonl"
THREE = "parallel.tensor_model_parallel_size=3"

CASES = {
    f"{TRAIN} data.path=data.jsonl data.tokenizer=hf": "run_dir",
    f"{TRAIN} {RUNNABLE} checkpoint.load=nope": "nope",
    f"{TRAIN} {RUNNABLE} checkpoint.load=hf": "hf is a Hugging Face directory",
    f"{TRAIN} {RUNNABLE} {THREE}": "the world size 1",
    f"{TRAIN} {RUNNABLE} model.hidden_size=65": "model.num_attention_heads",
    f"{TRAIN} num_steps=three": "num_steps",
    f"{EVALUATE} {EVALUATED} --out full": "--overwrite",
    f"{EVALUATE} {EVALUATED} --out out --num-samples 2 --pass-at-k 3": "pass@k",
    f"{PROGRAM} explore nope --problem 1+1 --solution 2": "nope",
    f"{SOLUTIONS} {UNSOLVED}": "one model",
    f"{PROGRAM} plan": "cluster.num_gpus",
    f"{PROGRAM} plan cluster.num_gpus=16 model.vocab_size=1000 {THREE}": "the world size 16",
    f"{PROGRAM} trian {RUNNABLE}": "'train'",
    f"{PROGRAM} report nope": "nope",
    f"{PROGRAM} doctor --minutes 3": "--selftest",
    f"{PROGRAM} serve": "--hf-config",
    f"{SERVE} --hf-config hf --host 0.0.0.0": "SELFDISTILL_SERVER_TOKEN",
    f"{SERVE} --hf-config hf --nnodes 2": "--master-addr",
}
"""Command line -> what its refusal names."""
QUICK = [case for case in CASES if re.search("load=hf|size=65|0.0.0.0|trian|pass-at-k|plan cluster", case)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    (directory / "data.jsonl").write_text('{"problem": "1 + 1", "solution": "2", "answer": "2"}\n')
    for name in ("hf", "full"):
        (directory / name).mkdir()
        (directory / name / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (directory / "hf" / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    return directory


@pytest.fixture(scope="module")
def run(directory) -> Iterator[Callable[..., Done]]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    with ForkedPrograms(sys.executable, LIGHT, environment | {"PYTHONPATH": str(REPOSITORY)}) as programs:
        yield lambda *command: programs.run(*command, cwd=directory)


def heavy_modules(done: Done) -> set[str]:
    return set(HEAVY) & done.modules


def test_a_heavy_module_is_seen(run, directory):
    (directory / "heavy.py").write_text("import numpy\n")
    assert heavy_modules(run(directory / "heavy.py")) == {"numpy"}
    (directory / "heavy.py").unlink()


@combinations(case=list(CASES), quick={"case": QUICK}, strength=1)
def test_a_refusal_imports_nothing_heavy_and_writes_nothing(run, directory, case):
    before = sorted(directory.rglob("*"))
    done = run(*case.split())
    assert (done.status, heavy_modules(done)) == (2, set()), done.stderr
    assert CASES[case] in done.stderr and "Traceback" not in done.stderr
    assert sorted(directory.rglob("*")) == before


STEERING = "no\x1b]52;c;eA==\x07\x1b[2Jpe"
"""A name that writes the clipboard of some terminals and clears all of them."""


STEERED = [["report", STEERING], ["convert", "inspect", STEERING]]
STEERED += [["train", *RUNNABLE.split(), f"data.tokenizer='./{STEERING}'"]]


@combinations(command={arguments[0]: arguments for arguments in STEERED}, quick={"command": ["report"]}, strength=1)
def test_a_name_in_a_message_does_not_steer_the_terminal(run, command):
    done = run(PROGRAM, *command)
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
    with pytest.raises(CheckpointError, match="removed"):
        prechecks.require_start(load([*begun, "checkpoint.resume=false"]))
    heads = ["parallel.tensor_model_parallel_size=5"]
    prechecks.require_ranks(load([begun[0], *heads]), 5)
    with pytest.raises(ConfigError, match=r"must be a multiple of TP"):
        prechecks.require_ranks(load([f"run_dir={tmp_path}/new", *heads]), 5)


@pytest.fixture
def absent(monkeypatch):
    """Hide vLLM, where the machine that runs the tests has it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)


def test_a_missing_package_is_named_with_its_extra_before_anything_is_built(absent, monkeypatch, capsys):
    monkeypatch.setattr(prechecks, "RUN", {"megatron-core": "megatron.absent"})
    with pytest.raises(ConfigError, match=r"megatron-core.*'\.\[train\]'"):
        require_packages(load([]))
    monkeypatch.setattr(prechecks, "RUN", {})
    assert train.main(["rollout.engine=vllm", "data.path=none.jsonl", "data.tokenizer=none", "run_dir=none"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "rollout.engine=vllm needs vllm" in line and "'.[vllm]'" in line
