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
from megatron_selfdistill.interop.safetensors_directory import dequantise_mxfp4

EXPERTS = "model.layers.{layer}.mlp.experts.{name}"


def random_mxfp4(experts: int, rows: int, groups: int, low: int = 118, high: int = 130) -> tuple[Tensor, Tensor]:
    """Return random blocks and scales, whose exponents lie between ``low`` and ``high`` (exclusive)."""
    generator = torch.Generator().manual_seed(rows)
    blocks = torch.randint(256, (experts, rows, groups, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(low, high, (experts, rows, groups), generator=generator).to(torch.uint8)


@pytest.mark.parametrize(("low", "high"), [(118, 130), (1, 254)])
def test_the_numbers_are_those_of_transformers_bit_by_bit(low, high):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_mxfp4(3, 70, 4, low, high)
    got, expected = dequantise_mxfp4(blocks, scales), convert_moe_packed_tensors(blocks, scales)
    assert got.shape == (3, 128, 70) and got.dtype == expected.dtype == torch.bfloat16
    assert got.view(torch.int16).equal(expected.view(torch.int16))


def test_a_byte_holds_two_numbers_the_lower_half_first():
    blocks, scales = torch.zeros(1, 1, 1, 16, dtype=torch.uint8), torch.full((1, 1, 1), 129, dtype=torch.uint8)
    blocks[..., 0] = 0x7A  # -1 and 6, times 4
    assert dequantise_mxfp4(blocks, scales)[0, :3, 0].tolist() == [-4.0, 24.0, 0.0]


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
        expected = (
            before[name] if name in before else dequantise_mxfp4(before[f"{name}_blocks"], before[f"{name}_scales"])
        )
        assert tensor.equal(expected), name


def test_an_inspection_counts_the_numbers_and_not_the_bytes(published):
    assert "bfloat16" in str(describe(published)) and "uint8" not in str(describe(published))


@pytest.mark.parametrize("fault", ["scales lost", "blocks lost", "scales of another shape"])
def test_what_is_not_mxfp4_is_refused_with_its_name(published, tmp_path, fault):
    file, whole = published / "model.safetensors", EXPERTS.format(layer=2, name="down_proj")
    tensors = load_file(file)
    if fault == "scales of another shape":
        tensors[f"{whole}_scales"] = tensors[f"{whole}_scales"][:, :, :2].contiguous()
    else:
        del tensors[f"{whole}_{fault.split()[0]}"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises((CheckpointError, ConfigError, KeyError), match=r"layers\.2\.mlp\.experts\.down_proj"):
        hf_to_megatron(published, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()
