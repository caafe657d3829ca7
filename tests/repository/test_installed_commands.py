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
from collections.abc import Callable, Iterator
from pathlib import Path

import hf_models
import pytest
import tiny_run
from forked_programs import Done, ForkedPrograms
from packaging.requirements import Requirement

from megatron_selfdistill.cli import COMMANDS

pytestmark = pytest.mark.full

REPOSITORY = Path(__file__).resolve().parents[2]
HAS_VLLM = importlib.util.find_spec("vllm") is not None
SMALL = ["rollout.max_new_tokens=4", "rollout.kv_cache_gb=0.05", "optimizer=fp32", "evaluation.verifier=exact_match"]
LIGHT = ("plan", "report", "serve")
"""Commands that start without the heavy imports, so that none of those hides a module that the wheel lacks."""
TEMPLATE = "data.teacher_template='{problem}H{solution}|'"
OUTSIDE = {k: v for k, v in os.environ.items() if k not in "PYTHONPATH PYTHONHOME RANK WORLD_SIZE LOCAL_RANK".split()}
OUTSIDE |= {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_NO_INDEX": "1"}
OUTSIDE |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}

# What most commands import, which takes seconds; a fork of the process that has imported it starts at once.
HEAVY = ["megatron_selfdistill.compat.repairs", "megatron_selfdistill.trainer", "transformers", "tokenizers"]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), cwd=cwd, env=OUTSIDE, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    tree = directory / "source"  # a build leaves files in the tree that it builds from
    tree.mkdir()
    for name in "setup.py pyproject.toml MANIFEST.in LICENSE README.md configs megatron_selfdistill tools".split():
        done = run("cp", "-r", REPOSITORY / name, tree / name, cwd=directory)
        assert done.returncode == 0, done.stderr
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", directory)
    done = run(sys.executable, "-m", "pip", "wheel", *options, tree, cwd=directory)
    assert done.returncode == 0, done.stderr
    return next(directory.glob("*.whl"))


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


def distributions_of(wanted: Requirement, found: dict[str, importlib.metadata.Distribution], seen: set[str]) -> None:
    """Add to ``found`` the installed distribution that is ``wanted``, and all that it requires here, by name.

    ``seen``: the requirements that have been looked at, with their extras, such as those of torch's build for CUDA.
    """
    if str(wanted) in seen:
        return
    seen.add(str(wanted))
    one = found.setdefault(wanted.name, importlib.metadata.distribution(wanted.name))
    for requirement in map(Requirement, one.requires or []):
        if any(requirement.marker is None or requirement.marker.evaluate({"extra": it}) for it in ("", *wanted.extras)):
            distributions_of(requirement, found, seen)


@pytest.fixture(scope="module")
def with_torch(wheel, tmp_path_factory) -> Path:
    """Make an environment with torch alone, let pip install the wheel there, and return its directory of programs.

    Links stand for the files of torch and its requirements.  There is no index, so that pip fails if the wheel requires
    any other package.
    """
    directory = tmp_path_factory.mktemp("with_torch")
    venv.create(directory, with_pip=False)
    site_packages, linked = next(directory.rglob("site-packages")), {}
    distributions_of(Requirement("torch"), linked, set())
    for one in linked.values():
        for name in {file.parts[0] for file in one.files or []} - {"..", "__pycache__"}:
            if not (site_packages / name).exists():
                (site_packages / name).symlink_to(one.locate_file(name))
    python = directory / "bin" / "python"
    done = run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", wheel, cwd=directory)
    assert done.returncode == 0, done.stderr
    return directory / "bin"


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
def light(programs) -> Iterator[ForkedPrograms]:
    with ForkedPrograms(programs / "python", ["megatron_selfdistill.config"], OUTSIDE) as forked:
        yield forked


@pytest.fixture(scope="module")
def heavy(programs) -> Iterator[ForkedPrograms]:
    with ForkedPrograms(programs / "python", HEAVY, OUTSIDE) as forked:
        yield forked


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Problems, and an untrained model as a Hugging Face directory with its tokenizer."""
    directory = tmp_path_factory.mktemp("inputs")
    tiny_run.write_data(directory, 4)
    hf_models.write("qwen3", directory / "hf", vocab_size=23)
    for path in (directory / "tokenizer").iterdir():
        (directory / "hf" / path.name).write_bytes(path.read_bytes())
    (directory / "logged").mkdir()
    (directory / "logged" / "metrics.jsonl").write_text('{"step": 1, "loss/mean": 0.5}\n')
    return directory


@pytest.fixture(scope="module")
def use(programs, request, directory) -> Callable[[str], Done]:
    """Return a function that runs one small use of the command of that name, as the installed program runs it."""
    data, model = "problems.jsonl", ["--hf", "hf"]
    commands = {
        "train": tiny_run.overrides(Path(), Path("run"), "num_steps=1", "model.num_layers=2"),
        "evaluate": [*model, "--data", data, "--out", "results", "--num-samples", "1", *SMALL],
        "explore": ["hf", "--problem", "500-408:", "--solution", "092", "-o", "target.html", *SMALL, TEMPLATE],
        "solutions": ["--out", "own.jsonl", *model, "--num-samples", "2", f"data.path={data}", *SMALL, TEMPLATE],
        "explanations": ["--out", "explained.jsonl", *model, f"data.path={data}", *SMALL, TEMPLATE],
        "convert": ["hf-to-megatron", *model, "--out", "megatron"],
        "plan": ["recipe=qwen3_8b", "data.global_batch_size=64"],
        "report": ["logged"],
        "doctor": ["--brief"],
        "serve": ["--help"] if HAS_VLLM else ["--hf-config", "hf"],
    }
    assert commands.keys() == COMMANDS.keys()

    def used(name: str) -> Done:
        forked = request.getfixturevalue("light" if name in LIGHT else "heavy")
        return forked.run(programs / "selfdistill", name, *commands[name], cwd=directory)

    return used


def test_the_program_is_that_of_the_wheel(programs, tmp_path):
    code = "import megatron_selfdistill; print(megatron_selfdistill.__file__)"
    assert run(programs / "python", "-c", code, cwd=tmp_path).stdout.startswith(str(programs.parent))


def test_the_program_finds_every_command(programs, light, tmp_path):
    shown = run(programs / "selfdistill", "--help", cwd=tmp_path)
    assert shown.returncode == 0 and all(f"\n  {name} " in shown.stdout for name in COMMANDS), shown
    for name in COMMANDS:
        done = light.run(programs / "selfdistill", name, "--help", cwd=tmp_path)
        assert done.status == 0 and f"  selfdistill {name} " in done.stdout.replace("doctor\n", "doctor \n"), done


def attempts(path: Path) -> int:
    return len(path.read_text().splitlines())


WORKS: dict[str, Callable[[str, Path], bool]] = {
    "report": lambda shown, at: "uPlot" in (at / "logged" / "report.html").read_text(),
    "train": lambda shown, at: (at / "run" / "checkpoints" / "iter_0000001" / "metadata.json").is_file(),
    "plan": lambda shown, at: (
        "torchrun --standalone" in shown and " recipe=qwen3_8b data.global_batch_size=64 " in shown
    ),
    "convert": lambda shown, at: "load it with checkpoint.load=megatron" in shown,
    "evaluate": lambda _, at: json.loads((at / "results" / "summary.json").read_text())["data"]["num_problems"] == 4,
    "explore": lambda shown, at: "function targetOf(" in (at / "target.html").read_text(encoding="utf-8"),
    "solutions": lambda shown, at: (at / "own.jsonl").is_file() and attempts(at / "own.attempts.jsonl") == 1 + 4,
    "explanations": lambda shown, at: attempts(at / "explained.attempts.jsonl") == 1 + 4,
    "doctor": lambda shown, at: ": ok; python 3." in shown and "megatron-core " in shown,
}
"""Command -> whether its small use has worked, from what it has printed and the directory of its files."""


@pytest.mark.parametrize("name", WORKS)
def test_a_command_works_as_installed(use, directory, name):
    done = use(name)
    assert done.status == 0, done.stdout + done.stderr
    assert WORKS[name](done.stdout, directory), done


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed here: the server would start")
def test_serve_says_that_it_needs_vllm(use):
    done = use("serve")
    assert done.status == 2 and "Traceback" not in done.stderr
    assert "this server needs vLLM" in done.stderr and "in its clone: pip install -e '.[vllm]'" in done.stderr


def test_without_any_other_package_the_doctor_reports_and_other_commands_name_it(bare, tmp_path):
    report = run(bare / "selfdistill", "doctor", cwd=tmp_path)
    assert report.returncode == 1 and "Traceback" not in report.stderr, report.stderr
    assert 'pip install "megatron-core>=0.16.1,<0.20"' in report.stdout
    assert run(bare / "selfdistill", "--help", cwd=tmp_path).returncode == 0
    assert "pip install -e '.[train]' in a clone of this project installs what a run needs" in report.stdout


LOSS = """
import json, sys, time, warnings
began = time.perf_counter()
import torch  # which warns that there is no NumPy
torch_seconds = time.perf_counter() - began
warnings.simplefilter("error")
before, began = set(sys.modules), time.perf_counter()
from megatron_selfdistill.loss import Target, linear_self_distillation_loss, mixed_target, self_distillation_loss
seconds = time.perf_counter() - began
logits = [torch.linspace(0, n, 60).view(2, 3, 10) for n in (1, 2, 3)]
logits[0].requires_grad_()
loss = self_distillation_loss(*logits)
loss.backward()
weight = torch.ones(10, 10).tril().requires_grad_()
linear = linear_self_distillation_loss(logits[0], weight, logits[1], None, logits[2])
linear.backward()
target = mixed_target(logits[0], logits[1], Target(), reference_logits=logits[2])
new = {name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(json.dumps({
    "losses": [loss.item(), linear.item(), target.log_q.exp().sum().item()],
    "gradients": bool(logits[0].grad.any() and weight.grad.any()),
    "new": sorted(new),
    "heavy": sorted({"megatron", "transformers", "hydra", "omegaconf", "numpy", "psutil"} & set(sys.modules)),
    "share": seconds / torch_seconds,
}))
"""


def test_with_torch_alone_the_loss_is_installed_and_runs(with_torch, tmp_path):
    done = run(with_torch / "python", "-c", LOSS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["gradients"] and all(value > 0 for value in result["losses"])
    # Triton is no package of torch for a CPU; torch for CUDA requires it.
    assert set(result["new"]) - {"triton"} == {"megatron_selfdistill"} and result["heavy"] == []


@pytest.mark.timing
def test_the_import_of_the_loss_takes_a_fraction_of_that_of_torch(with_torch, tmp_path):
    done = run(with_torch / "python", "-c", LOSS, cwd=tmp_path)
    assert json.loads(done.stdout)["share"] < 0.5


def refusal(name: str | Path, extra: str = "train", packages: str = "hydra-core and omegaconf") -> str:
    return (
        f"{name} needs {packages}, which this Python lacks: run pip install -e '.[{extra}]' in a clone of this project "
        "(megatron_selfdistill.loss needs no more than torch).\n"
    )


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"doctor", "report", "serve"}))
def test_without_the_packages_of_a_run_a_command_names_the_extra(with_torch, name, tmp_path):
    refused = run(with_torch / "selfdistill", name, "--help", cwd=tmp_path)
    assert (refused.returncode, refused.stderr) == (2, refusal(f"selfdistill {name}"))


def test_the_report_needs_one_package(with_torch, directory, tmp_path):
    refused = run(with_torch / "selfdistill", "report", directory / "logged", cwd=tmp_path)
    assert (refused.returncode, refused.stderr) == (2, refusal("selfdistill report", "report", "pyyaml"))
    reader = tmp_path / "reader"
    reader.mkdir()
    (reader / "yaml").symlink_to(importlib.metadata.distribution("pyyaml").locate_file("yaml"))
    code = "import sys; sys.path.append(sys.argv.pop(1)); from megatron_selfdistill.cli import main; sys.exit(main())"
    arguments = ("report", directory / "logged", "-o", tmp_path / "light.html")
    done = run(with_torch / "python", "-c", code, reader, *arguments, cwd=tmp_path)
    assert done.returncode == 0 and "uPlot" in (tmp_path / "light.html").read_text(), done.stderr


def test_without_the_packages_of_a_run_the_trainer_names_the_extra(with_torch, tmp_path):
    python = with_torch / "python"
    as_program = run(python, "-m", "megatron_selfdistill.train", "num_steps=1", cwd=tmp_path)
    place = next(with_torch.parent.rglob("megatron_selfdistill/train.py"))
    assert (as_program.returncode, as_program.stderr) == (2, refusal(place))
    for module in ("megatron_selfdistill.train", "megatron_selfdistill.trainer"):
        imported = run(python, "-c", f"import {module}", cwd=tmp_path)
        error = f"megatron_selfdistill.commands.installation.MissingExtraError: {refusal(module)}"
        assert imported.returncode == 1 and imported.stderr.endswith(f"\n{error}")
