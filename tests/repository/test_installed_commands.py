# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Every command works from a wheel, in a fresh environment and outside of a checkout."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import tiny
import tiny_run
from forked_programs import ForkedPrograms

from megatron_selfdistill.cli import COMMANDS

pytestmark = pytest.mark.full

SMALL = ["rollout.max_new_tokens=4", "rollout.kv_cache_gb=0.05", "optimizer=fp32", "evaluation.verifier=exact_match"]
TEMPLATE = "data.teacher_template='{problem}H{solution}|'"
OUTSIDE = {k: v for k, v in os.environ.items() if k not in "PYTHONPATH PYTHONHOME RANK WORLD_SIZE LOCAL_RANK".split()}
OUTSIDE |= {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_NO_INDEX": "1"}
OUTSIDE |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}

# What most commands import, which takes seconds; a fork of the process that has imported it starts at once.
HEAVY = ["megatron_selfdistill.compat.repairs", "megatron_selfdistill.trainer", "transformers", "tokenizers"]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), cwd=cwd, env=OUTSIDE, capture_output=True, text=True, timeout=300)


def environment(directory: Path, wheel: Path) -> Path:
    """Make an environment with the wheel and nothing else, and return its directory of programs."""
    venv.create(directory, with_pip=False)
    programs = directory / "bin"
    install = ("install", "--quiet", "--no-deps", wheel)
    done = run(sys.executable, "-m", "pip", "--python", programs / "python", *install, cwd=directory)
    assert done.returncode == 0, done.stderr
    return programs


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("bare"), wheel)


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory) -> Path:
    """Make an environment with the wheel and with the packages of these tests' own environment."""
    directory = tmp_path_factory.mktemp("environment")
    programs = environment(directory, wheel)
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # Python does not read the .pth files of these directories, and so not this project's editable installation either.
    (next(directory.rglob("site-packages")) / "packages.pth").write_text("".join(f"{path}\n" for path in packages))
    return programs


@pytest.fixture(scope="module")
def forked(programs) -> Iterator[ForkedPrograms]:
    with ForkedPrograms(programs / "python", HEAVY, OUTSIDE) as started:
        yield started


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Problems, and an untrained model as a Hugging Face directory with its tokenizer."""
    directory = tiny.model_with_data(tmp_path_factory.mktemp("inputs"), 4, checkpoint=False)
    (directory / "logged").mkdir()
    (directory / "logged" / "metrics.jsonl").write_text('{"step": 1, "loss/mean": 0.5}\n')
    return directory


def attempts(path: Path) -> int:
    return len(path.read_text().splitlines())


HF, DATA, SHORT = ("--hf", "hf"), "data.path=problems.jsonl", (*SMALL, TEMPLATE)
ONE_STEP = tiny_run.overrides(Path(), Path("run"), "num_steps=1", "model.num_layers=2")
USES: dict[str, tuple[Sequence[str], Callable[[str, Path], bool]]] = {
    "report": (["logged"], lambda shown, at: "uPlot" in (at / "logged" / "report.html").read_text()),
    "train": (ONE_STEP, lambda shown, at: (at / "run" / "checkpoints" / "iter_0000001" / "metadata.json").is_file()),
    "plan": (
        ["recipe=qwen3_8b", "data.global_batch_size=64"],
        lambda shown, at: "torchrun --standalone" in shown and " recipe=qwen3_8b data.global_batch_size=64 " in shown,
    ),
    "convert": (
        ["hf-to-megatron", *HF, "--out", "megatron"],
        lambda shown, at: "load it with checkpoint.load=megatron" in shown,
    ),
    "evaluate": (
        [*HF, "--data", "problems.jsonl", "--out", "results", "--num-samples", "1", *SMALL],
        lambda _, at: json.loads((at / "results" / "summary.json").read_text())["data"]["num_problems"] == 4,
    ),
    "explore": (
        ["hf", "--problem", "500-408:", "--solution", "092", "-o", "target.html", *SHORT],
        lambda shown, at: "function targetOf(" in (at / "target.html").read_text(encoding="utf-8"),
    ),
    "solutions": (
        ["--out", "own.jsonl", *HF, "--num-samples", "2", DATA, *SHORT],
        lambda shown, at: (at / "own.jsonl").is_file() and attempts(at / "own.attempts.jsonl") == 1 + 4,
    ),
    "explanations": (
        ["--out", "explained.jsonl", *HF, DATA, *SHORT],
        lambda shown, at: attempts(at / "explained.attempts.jsonl") == 1 + 4,
    ),
    "doctor": (["--brief"], lambda shown, at: ": ok; python 3." in shown and "megatron-core " in shown),
}
"""Command -> a small use, and whether the use has worked, from what it has printed and the directory of its files."""


def test_the_program_of_the_wheel_finds_every_command(programs, forked, tmp_path):
    code = "import megatron_selfdistill; print(megatron_selfdistill.__file__)"
    assert run(programs / "python", "-c", code, cwd=tmp_path).stdout.startswith(str(programs.parent))
    shown = run(programs / "selfdistill", "--help", cwd=tmp_path)
    assert shown.returncode == 0 and all(f"\n  {name} " in shown.stdout for name in COMMANDS), shown
    for name in COMMANDS:
        done = forked.run(programs / "selfdistill", name, "--help", cwd=tmp_path)
        assert done.status == 0 and f"  selfdistill {name} " in done.stdout.replace("doctor\n", "doctor \n"), done


@pytest.mark.parametrize("name", USES)
def test_a_command_works_as_installed(programs, forked, directory, name):
    arguments, works = USES[name]
    done = forked.run(programs / "selfdistill", name, *arguments, cwd=directory)
    assert done.status == 0, done.stdout + done.stderr
    assert works(done.stdout, directory), done


@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here: the server would start"
)
def test_serve_says_that_it_needs_vllm(programs, forked, directory):
    assert COMMANDS.keys() == USES.keys() | {"serve"}
    done = forked.run(programs / "selfdistill", "serve", "--hf-config", "hf", cwd=directory)
    assert done.status == 2 and "Traceback" not in done.stderr
    assert "this server needs vLLM" in done.stderr and "in its clone: pip install -e '.[vllm]'" in done.stderr


def test_without_any_other_package_the_doctor_reports_and_other_commands_name_it(bare, tmp_path):
    report = run(bare / "selfdistill", "doctor", cwd=tmp_path)
    assert report.returncode == 1 and "Traceback" not in report.stderr, report.stderr
    assert 'pip install "megatron-core>=0.16.1,<0.20"' in report.stdout
    assert run(bare / "selfdistill", "--help", cwd=tmp_path).returncode == 0
    assert "pip install -e '.[train]' in a clone of this project installs what a run needs" in report.stdout


def test_without_the_packages_of_a_run_a_program_names_the_extra(bare, directory, tmp_path):
    named = {name: ("selfdistill", name, "--help") for name in COMMANDS.keys() - {"doctor", "report", "serve"}}
    programs = {**named, "train.py": ("python", "-m", "megatron_selfdistill.train", "num_steps=1")}
    programs["report"] = ("selfdistill", "report", directory / "logged")
    for name, (program, *arguments) in programs.items():
        refused = run(bare / program, *arguments, cwd=tmp_path)
        extra = "report" if name == "report" else "train"
        assert refused.returncode == 2 and f"run pip install -e '.[{extra}]'" in refused.stderr, refused
        assert refused.stderr.count("\n") == 1, refused
    for module in ("megatron_selfdistill.train", "megatron_selfdistill.trainer"):
        imported = run(bare / "python", "-c", f"import {module}", cwd=tmp_path)
        assert imported.returncode == 1 and f"MissingExtraError: {module} needs " in imported.stderr, imported
