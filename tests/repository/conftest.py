# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The wheel of the project, which several files look into."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = "setup.py pyproject.toml MANIFEST.in LICENSE README.md CHANGELOG.md configs megatron_selfdistill".split()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel that is built, without a network, from the sdist, so that what the sdist lacks is missed.

    A build leaves files in its tree, which is therefore a copy.
    """
    tree, directory = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    (tree / "tools").mkdir()
    for target, names in {tree: SOURCES, tree / "tools": ["tools/tested_versions.txt"]}.items():
        subprocess.run(["cp", "-r", *names, target], cwd=REPOSITORY, check=True)
    code = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(directory)], cwd=tree, check=True, capture_output=True)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(directory)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(next(directory.glob("*.tar.gz")))]
    done = subprocess.run(command, env=os.environ | {"PIP_NO_INDEX": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(directory.glob("*.whl"))
