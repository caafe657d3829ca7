# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A conversion that cannot be done gives one message and leaves nothing behind, also where it is interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_contents import config_of, tensors_of
from ranks import RankError
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_selfdistill.errors import CheckpointError, ConfigError
from megatron_selfdistill.interop import safetensors_directory
from megatron_selfdistill.interop.conversion import hf_to_megatron, megatron_to_hf
from megatron_selfdistill.interop.convert_command import main
from megatron_selfdistill.interop.release import Progress

# Mistakes that are found before anything is written


def edited(hf: Path, out: Path, *, config: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None) -> Path:
    """Return a copy of ``hf`` with other config fields and tensors; None removes a field or tensor."""
    out.mkdir()
    kept = tensors_of(hf) | (tensors or {})
    save_file({n: t for n, t in kept.items() if t is not None}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config_of(hf) | (config or {})))
    return out


NORM, DOWN = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.down_proj.weight"
CHANGES = {
    "architecture": ({"config": {"architectures": ["GPT5ForCausalLM"]}}, "GPT5ForCausalLM, which is not known here"),
    "missing": ({"tensors": {NORM: None}}, f"{NORM} is missing"),
    "extra": ({"tensors": {"model.layers.1.self_attn.sinks": torch.zeros(4)}}, "self_attn.sinks is unexpected"),
    "more layers": ({"config": {"num_hidden_layers": 3, "layer_types": None}}, "model.layers.3.* is unexpected"),
    "shape": ({"tensors": {DOWN: torch.zeros(36, 45)}}, rf"{DOWN} has shape \[36, 45\], expected \[36, 44\]"),
    "activation": ({"config": {"hidden_act": "gelu"}}, "hidden_act"),
    "type": ({"config": {"hidden_size": "36"}}, "makes model.hidden_size '36': expected a value of the type int"),
    "a text for false": (
        {"config": {"tie_word_embeddings": "false"}},
        "makes model.share_embeddings_and_output_weights 'false': expected a value of the type bool",
    ),
    "contradiction": ({"config": {"model_type": "llama"}}, "model_type='llama', by which transformers chooses another"),
    "9000 layers": ({"config": {"num_hidden_layers": 9000}}, "num_hidden_layers=9000, but only 47 tensors"),
    "a billion layers": ({"config": {"num_hidden_layers": 10**9}}, "num_hidden_layers=1000000000, but only"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_directory_that_does_not_fit_gives_one_message(hf_directory, tmp_path, change):
    changes, message = CHANGES[change]
    hf = edited(hf_directory("qwen3"), tmp_path / "hf", **changes)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        hf_to_megatron(hf, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_names_in_a_foreign_directory_do_not_steer_the_terminal(hf_directory, tmp_path, capsys):
    steering = {"\x1b]52;c;eA==\x07[/red]": torch.zeros(1)}
    hf = edited(hf_directory("llama2"), tmp_path / "hf", tensors=steering)
    assert main(["hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "out")]) == 2
    assert r"\x1b]52;c;eA==\x07[/red] is unexpected" in (shown := capsys.readouterr().err) and "\x1b" not in shown
    linked = edited(hf_directory("llama2"), tmp_path / "linked")
    (linked / "\x1b[2J[red]notes").symlink_to(hf / "config.json")
    assert main(["hf-to-megatron", "--hf", str(linked), "--out", str(tmp_path / "out")]) == 0
    assert r"\x1b[2J[red]notes is not copied" in (shown := capsys.readouterr().err) and "\x1b" not in shown


def test_truncated_and_missing_safetensors_are_named(hf_directory, tmp_path):
    hf = edited(hf_directory("qwen3"), tmp_path / "hf")
    file = hf / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupt or cut off"):
        hf_to_megatron(hf, tmp_path / "out")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"has no weights"):
        hf_to_megatron(hf, tmp_path / "out")
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lacks model-1.safetensors"):
        hf_to_megatron(hf, tmp_path / "out")


def test_a_damaged_megatron_checkpoint_is_named(hf_directory, tmp_path):
    file = hf_to_megatron(hf_directory("llama2"), tmp_path / "megatron") / "__0_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=rf"{len(whole) - 1} bytes of __0_0.distcp, expected {len(whole)}"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    file.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(CheckpointError, match=r"has a corrupt __0_0.distcp: its checksum"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_nothing_is_overwritten(hf_directory, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    (tmp_path / "out.old").mkdir()
    with pytest.raises(CheckpointError, match="exists and is not overwritten"):
        hf_to_megatron(hf_directory("llama2"), tmp_path / "out")
    (tmp_path / "out" / "mine").unlink()
    hf_to_megatron(hf_directory("llama2"), tmp_path / "out")  # an empty directory is no loss
    assert (tmp_path / "out.old").is_dir()


# Failures during a conversion


def test_a_disk_that_fills_up_leaves_nothing_behind(hf_directory, small_disk, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 0, 2**40))
    disk = small_disk("512k")
    (disk / "other").write_bytes(bytes(300_000))
    with pytest.raises(OSError, match="No space left on device"):
        hf_to_megatron(hf_directory("mixtral"), disk / "megatron")
    assert [path.name for path in disk.iterdir()] == ["other"]


def test_a_failing_write_leaves_nothing_behind(hf_directory, tmp_path, monkeypatch):
    hf_to_megatron(hf_directory("llama2"), tmp_path / "megatron")
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(safetensors_directory, "save_file", fail_with(full))
    with pytest.raises(OSError, match="No space left") as raised:
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert raised.value.errno == 28
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


def fail_with(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def convert_and_be_interrupted(hf: Path, out: Path, number: int) -> None:
    """Convert, and receive the signal ``number`` once a file with weights exists."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt(_: int) -> None:
        if list(out.parent.glob(".writing_*/release/*.distcp")):
            os.kill(os.getpid(), number)

    hf_to_megatron(hf, out, progress=Progress(advance=interrupt))


@pytest.mark.parametrize(
    "number, ending",
    [
        (signal.SIGKILL, "exit code -9"),
        pytest.param(signal.SIGTERM, "SystemExit: 1", marks=pytest.mark.full),
        pytest.param(signal.SIGINT, "KeyboardInterrupt", marks=pytest.mark.full),
    ],
)
def test_after_an_interruption_a_second_conversion_starts_clean(ranks, hf_directory, tmp_path, number, ending):
    hf, out = hf_directory("llama2"), tmp_path / "megatron"
    with pytest.raises(RankError, match=ending):
        ranks.run(convert_and_be_interrupted, hf, out, number, world_size=1, init_process_group=False)
    assert not out.exists()
    assert bool(list(tmp_path.iterdir())) == (number == signal.SIGKILL)
    hf_to_megatron(hf, out)
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]
