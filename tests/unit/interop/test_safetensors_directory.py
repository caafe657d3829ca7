# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Published MXFP4 experts are read as the numbers that transformers reads, and others are refused."""

from __future__ import annotations

import json
from pathlib import Path

import hf_models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_selfdistill.errors import CheckpointError, ConfigError
from megatron_selfdistill.interop.conversion import hf_to_megatron, megatron_to_hf
from megatron_selfdistill.interop.describe import describe

EXPERTS = "model.layers.{layer}.mlp.experts.{name}"


def random_mxfp4(experts: int, rows: int, groups: int, low: int = 118, high: int = 130) -> tuple[Tensor, Tensor]:
    """Return random blocks and scales, whose exponents lie between ``low`` and ``high`` (exclusive)."""
    generator = torch.Generator().manual_seed(rows)
    blocks = torch.randint(256, (experts, rows, groups, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(low, high, (experts, rows, groups), generator=generator).to(torch.uint8)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Return a directory of a tiny GPT-OSS as it is published: the experts in MXFP4, the rest in bf16."""
    hf_models.write("gpt_oss", tmp_path, hidden_size=64, intermediate_size=96)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    for layer in range(4):
        for name, rows, groups in (("gate_up_proj", 192, 2), ("down_proj", 64, 3)):
            whole = EXPERTS.format(layer=layer, name=name)
            del tensors[whole]
            tensors[f"{whole}_blocks"], tensors[f"{whole}_scales"] = random_mxfp4(4, rows, groups)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_published_directory_converts_and_returns_in_bf16(published, tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    hf_to_megatron(published, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    before, after = load_file(published / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    packed = {name for name in before if name.endswith(("_blocks", "_scales"))}
    assert after.keys() == before.keys() - packed | {
        name.removesuffix("_blocks") for name in packed if "_b" in name[-7:]
    }
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        if (expected := before.get(name)) is None:
            expected = convert_moe_packed_tensors(before[f"{name}_blocks"], before[f"{name}_scales"])
        assert tensor.equal(expected), name


def test_an_inspection_counts_the_numbers_and_not_the_bytes(published):
    assert "bfloat16" in str(describe(published)) and "uint8" not in str(describe(published))


@pytest.mark.parametrize("lost", ["scales", "blocks"])
def test_what_is_not_mxfp4_is_refused_with_its_name(published, tmp_path, lost):
    file, whole = published / "model.safetensors", EXPERTS.format(layer=2, name="down_proj")
    tensors = load_file(file)
    del tensors[f"{whole}_{lost}"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises((CheckpointError, ConfigError, KeyError), match=r"layers\.2\.mlp\.experts\.down_proj"):
        hf_to_megatron(published, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()
