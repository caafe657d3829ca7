# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""``model=NAME``: a run begins at a model of the Hugging Face hub, or of a directory, and ends as a directory of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import hf_models
import huggingface_hub
import pytest
from tiny_run import reproducible_metrics

from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.interop.hf_files import model_directory

SETTINGS = "data.teacher_template={problem}H{solution}| batch=4 rollout.max_new_tokens=8 report.every=0".split()


@pytest.fixture(scope="module")
def model(data, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "Tiny"
    hf_models.write("qwen3", directory, vocab_size=23)
    return Path(shutil.copytree(data / "tokenizer", directory, dirs_exist_ok=True))


def started(data: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "megatron_selfdistill",
        "train",
        f"data.path={data}/problems.jsonl",
        "steps=2",
        *SETTINGS,
    ]
    return subprocess.run([*command, *words], env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True)


@pytest.mark.full
def test_a_run_converts_a_model_once_beside_itself_trains_and_exports_it(data, model, tmp_path):
    first = started(data, f"model={model}", f"run_dir={tmp_path}/first", "export=true")
    assert first.returncode == 0, first.stderr
    [converted] = tmp_path.glob("Tiny-*-megatron")
    assert f"converts {model} to {converted}, once" in first.stdout
    assert first.stdout.endswith(f"exported: {tmp_path}/first/hf\n")
    assert {path.name for path in model.iterdir()} <= {path.name for path in (tmp_path / "first" / "hf").iterdir()}
    second = started(data, "--ranks", "2", f"model={model}", f"run_dir={tmp_path}/second")
    assert second.returncode == 0 and "once" not in second.stdout, second.stderr
    losses = [[step["loss/mean"] for step in reproducible_metrics(tmp_path / name)] for name in ("first", "second")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    namesake = Path(shutil.copytree(model, tmp_path / "other" / "Tiny"))
    third = started(data, f"model={namesake}", f"run_dir={tmp_path}/third", "steps=1", "adapter.rank=2", "export=true")
    assert f"converts {namesake} to " in third.stdout and (tmp_path / "third/hf/adapter_config.json").exists()
    longer = started(data, f"model={model}", f"run_dir={tmp_path}/first", "steps=3", "export=true")
    assert longer.returncode == 2 and f"{tmp_path}/first/hf" in longer.stderr, (
        "the export of step 2 is no export of step 3"
    )


@pytest.mark.full
def test_a_wrong_key_or_a_missing_file_costs_no_conversion(data, model, tmp_path):
    for words in (["optimizer.lrr=1"], ["data.path=none.jsonl"]):
        ended = started(data, f"model={model}", f"run_dir={tmp_path}/run", *words)
        assert ended.returncode == 2 and not list(tmp_path.iterdir())


def test_a_name_of_the_hub_is_downloaded_or_the_command_is_named(model, monkeypatch):
    def downloaded(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert name == "some/model" and "*.py" in allow_patterns, "or a tokenizer lacks the code of its auto_map"
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", downloaded)
    assert model_directory(Path("some/model")) == model and model_directory(model) == model
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"some/model cannot be had .*`hf download some/model --local-dir DIR`"):
        model_directory(Path("some/model"))
