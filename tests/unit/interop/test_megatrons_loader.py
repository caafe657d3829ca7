# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Megatron Core's own loader reads converted checkpoints as its own."""

from __future__ import annotations

from pathlib import Path

import hf_models
import models
import pytest
import torch

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.interop.conversion import hf_to_megatron
from megatron_selfdistill.model.forward import unwrapped

pytestmark = pytest.mark.full


def read_as_megatron(release: Path, hf: Path, kind: str) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import StrictHandling

    common = dist_checkpointing.load_common_state_dict(str(release))  # weights_only=True, with Megatron's safe globals
    assert common["checkpoint_version"] == 3.0 and common["iteration"] == 0
    assert dist_checkpointing.load_content_metadata(preloaded_state_dict=common)["singleton_local_shards"] is False
    args = common["args"]
    assert (args.vocab_size, args.padded_vocab_size, args.swiglu) == (101, 128, True)
    assert args.add_qkv_bias == (kind == "qwen2")
    _, model, rules, tensors = hf_models.read(hf, make_vocab_size_divisible_by=128)
    chunks, _ = models.build(model, ParallelConfig(), seed=9)
    mine = unwrapped(chunks[0])
    _, unasked, absent = dist_checkpointing.load(
        mine.sharded_state_dict(), str(release), strict=StrictHandling.RETURN_ALL
    )
    assert not absent and all(key.endswith("._extra_state") for key in unasked)
    loaded = dist_checkpointing.load(mine.sharded_state_dict(), str(release))  # as Megatron-LM does by default
    mine.load_state_dict({name: loaded[name] for name in mine.sharded_state_dict()})
    expected, _ = models.build(model, ParallelConfig())
    hf_models.fill(expected, rules, tensors)
    for name, tensor in unwrapped(expected[0]).named_parameters():
        if "word_embeddings" not in name and "output_layer" not in name:  # padding
            assert torch.equal(tensor, mine.get_parameter(name)), name


@pytest.mark.parametrize("kind", ["qwen2", "mixtral", "qwen3_moe_mixed", "deepseek_v3"])
def test_megatrons_own_loader_sees_nothing_unusual(ranks, hf_directory, tmp_path, kind):
    release = hf_to_megatron(hf_directory(kind), tmp_path / "megatron")
    assert (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").read_text() == "release"
    ranks.run(read_as_megatron, release, hf_directory(kind), kind, world_size=1)
