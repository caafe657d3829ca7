# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Published MXFP4 experts are read as the numbers that transformers reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import hf_models
import pytest
import torch
from hf_contents import config_of, tensors_of
from safetensors.torch import save_file
from torch import Tensor

from megatron_selfdistill.interop.conversion import hf_to_megatron, megatron_to_hf
from megatron_selfdistill.interop.describe import describe

EXPERTS = "model.layers.{layer}.mlp.experts.{name}"


def random_mxfp4(experts: int, rows: int, groups: int) -> tuple[Tensor, Tensor]:
    """Return random blocks and scales, whose exponents lie between 118 and 130."""
    generator = torch.Generator().manual_seed(rows)
    blocks = torch.randint(256, (experts, rows, groups, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(118, 130, (experts, rows, groups), generator=generator).to(torch.uint8)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Return a directory of a tiny GPT-OSS as it is published: the experts in MXFP4, the rest in bf16."""
    hf_models.write("gpt_oss", tmp_path, hidden_size=64, intermediate_size=96)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(tmp_path).items()}
    for layer in range(4):
        for name, rows, groups in (("gate_up_proj", 192, 2), ("down_proj", 64, 3)):
            whole = EXPERTS.format(layer=layer, name=name)
            del tensors[whole]
            tensors[f"{whole}_blocks"], tensors[f"{whole}_scales"] = random_mxfp4(4, rows, groups)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = config_of(tmp_path) | {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_published_directory_converts_and_returns_in_bf16(published, tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    assert "bfloat16" in str(describe(published)) and "uint8" not in str(describe(published)), "numbers, not bytes"
    hf_to_megatron(published, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    before, after = tensors_of(published), tensors_of(tmp_path / "back")
    assert "quantization_config" not in config_of(tmp_path / "back")
    assert config_of(tmp_path / "back")["dtype"] == "bfloat16"
    assert after.keys() == {re.sub("_(blocks|scales)$", "", name) for name in before}
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        if (expected := before.get(name)) is None:
            expected = convert_moe_packed_tensors(before[f"{name}_blocks"], before[f"{name}_scales"])
        assert tensor.equal(expected), name
