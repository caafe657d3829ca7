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
from damage import flip_bit
from hf_contents import config_of, tensors_of
from ranks import RankError
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_selfdistill.errors import CheckpointError, ConfigError
from megatron_selfdistill.interop import safetensors_directory
from megatron_selfdistill.interop.conversion import hf_to_megatron, megatron_to_hf
from megatron_selfdistill.interop.convert_command import main
from megatron_selfdistill.interop.foreign_models import convert_found, converted
from megatron_selfdistill.interop.release import Progress

# Mistakes that are found before anything is written


def edited(hf: Path, out: Path, config: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None) -> Path:
    """Return a copy of ``hf`` with other config fields and tensors; None removes a field or tensor."""
    out.mkdir(parents=True)
    kept = tensors_of(hf) | (tensors or {})
    save_file({n: t for n, t in kept.items() if t is not None}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config_of(hf) | (config or {})))
    return out


NORM, DOWN = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.down_proj.weight"
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "architecture": ({"architectures": ["GPT5ForCausalLM"]}, {}, "GPT5ForCausalLM"),
    "missing": ({}, {NORM: None}, f"{NORM} is missing"),
    "extra": ({}, {"model.layers.1.self_attn.sinks": torch.zeros(4)}, r"self_attn\.sinks is unexpected"),
    "more layers": ({"num_hidden_layers": 3, "layer_types": None}, {}, r"model\.layers\.3.* is unexpected"),
    "shape": ({}, {DOWN: torch.zeros(36, 45)}, rf"{DOWN} has shape \[36, 45\], expected \[36, 44\]"),
    "activation": ({"hidden_act": "gelu"}, {}, "hidden_act"),
    "type": ({"hidden_size": "36"}, {}, "hidden_size '36'"),
    "a text for false": ({"tie_word_embeddings": "false"}, {}, "share_embeddings_and_output_weights 'false'"),
    "contradiction": ({"model_type": "llama"}, {}, "model_type='llama'"),
    "9000 layers": ({"num_hidden_layers": 9000}, {}, "num_hidden_layers=9000, but only 47 tensors"),
    "a billion layers": ({"num_hidden_layers": 10**9}, {}, "num_hidden_layers=1000000000"),
}
"""Mistake -> changes of config.json, changes of the tensors, and what the message names."""


def test_a_directory_that_does_not_fit_is_refused_before_anything_is_written(hf_directory, tmp_path):
    for mistake, (config, tensors, named) in CHANGES.items():
        hf = edited(hf_directory("qwen3"), tmp_path / mistake / "hf", config, tensors)
        with pytest.raises((ConfigError, CheckpointError), match=named):
            hf_to_megatron(hf, tmp_path / mistake / "out")
        assert [path.name for path in (tmp_path / mistake).iterdir()] == ["hf"], mistake


def test_names_in_a_foreign_directory_do_not_steer_the_terminal(hf_directory, tmp_path, capsys):
    steering = {"\x1b]52;c;eA==\x07[/red]": torch.zeros(1)}
    hf = edited(hf_directory("llama2"), tmp_path / "hf", tensors=steering)
    assert main(["hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "out")]) == 2
    assert r"\x1b]52;c;eA==\x07[/red] is unexpected" in (shown := capsys.readouterr().err) and "\x1b" not in shown
    linked = edited(hf_directory("llama2"), tmp_path / "linked")
    (linked / "\x1b[2J[red]notes").symlink_to(hf / "config.json")
    assert main(["hf-to-megatron", "--hf", str(linked), "--out", str(tmp_path / "out")]) == 0
    assert r"\x1b[2J[red]notes is not copied" in (shown := capsys.readouterr().err) and "\x1b" not in shown


def test_a_damaged_megatron_checkpoint_is_named(hf_directory, tmp_path):
    file = hf_to_megatron(hf_directory("llama2"), tmp_path / "megatron") / "__0_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=rf"bytes of __0_0\.distcp, expected {len(whole)}"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    file.write_bytes(whole)
    flip_bit(file, 5000)
    with pytest.raises(CheckpointError, match=r"corrupt __0_0\.distcp"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert not (tmp_path / "back").exists()


# Failures during a conversion


def test_a_disk_that_fills_up_leaves_nothing_behind(hf_directory, small_disk, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 0, 2**40))
    disk = small_disk("512k")
    (disk / "other").write_bytes(bytes(300_000))
    with pytest.raises(OSError, match="No space left on device"):
        hf_to_megatron(hf_directory("mixtral"), disk / "megatron")
    assert [path.name for path in disk.iterdir()] == ["other"]


def convert_for_a_while(hf: Path, out: Path) -> list[str]:
    """Return the names of the files of a conversion that ends with its context."""
    with converted(hf, out):
        return [path.name for path in (out / "release").iterdir()]


def test_what_a_killed_process_has_left_is_replaced(ranks, hf_directory, tmp_path):
    hf, out = hf_directory("llama2"), tmp_path / "megatron"
    for left in (out.with_name("megatron.partial"), tmp_path / "for a while"):
        (left / "release").mkdir(parents=True)
        (left / "release" / "__9_9.distcp").write_text("half")
    convert_found(hf, out)
    (names,) = ranks.run(convert_for_a_while, hf, tmp_path / "for a while", world_size=1)
    assert sorted(names) == sorted(path.name for path in (out / "release").iterdir())
    assert "__0_0.distcp" in names and "__9_9.distcp" not in names
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


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


def test_nothing_is_overwritten(hf_directory, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    (tmp_path / "out.old").mkdir()
    with pytest.raises(CheckpointError, match="exists and is not overwritten"):
        hf_to_megatron(hf_directory("llama2"), tmp_path / "out")
    (tmp_path / "out" / "mine").unlink()
    hf_to_megatron(hf_directory("llama2"), tmp_path / "out")  # an empty directory is no loss
    assert (tmp_path / "out.old").is_dir()


def test_a_failing_write_leaves_nothing_behind(hf_directory, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    hf_to_megatron(hf_directory("llama2"), tmp_path / "megatron")
    monkeypatch.setattr(safetensors_directory, "save_file", full)
    with pytest.raises(OSError, match="No space left") as raised:
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert raised.value.errno == 28
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]
