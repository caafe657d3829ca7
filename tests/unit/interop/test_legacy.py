# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Megatron-LM's legacy format loads from any layout into any other, whichever layer spec named its tensors."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import layouts
import legacy_files
import models
import pytest
import torch

from megatron_selfdistill.checkpoint.formats.stored_model import architecture_from_args, stored_args
from megatron_selfdistill.config import ModelConfig, ParallelConfig
from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.interop.conversion import megatron_to_hf
from megatron_selfdistill.interop.describe import describe
from megatron_selfdistill.interop.full_weights import open_weights
from megatron_selfdistill.model.model_values import differences

ONE = ParallelConfig()
TP2 = ParallelConfig(tensor_model_parallel_size=2)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)
TP2_PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
VPP2 = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
EP2 = ParallelConfig(expert_model_parallel_size=2)
PP2_EP2 = ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2)
TP2_EP2 = ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2, sequence_parallel=True)
TP2_EP2_ETP1 = ParallelConfig(
    tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1, sequence_parallel=True
)
WORLD = {id(ONE): 1, id(TP2_PP2): 4, id(PP2_EP2): 4, id(TP2_EP2): 4}

CASES = [
    ("gqa", "local", TP2_PP2, ONE),
    pytest.param("gqa", "te", TP2_PP2, VPP2, marks=pytest.mark.full),
    ("gqa", "te", VPP2, TP2),
    pytest.param("gqa", "local", ONE, TP2_PP2, marks=pytest.mark.full),
    ("tied", "te", PP2, TP2),
    pytest.param("tied", "local", TP2, PP2, marks=pytest.mark.full),
    pytest.param("moe", "te", PP2_EP2, ONE, marks=pytest.mark.full),
    ("moe", "local", TP2_EP2, EP2),
    ("moe", "te", TP2_EP2_ETP1, PP2),
    ("moe", "local", ONE, PP2_EP2),
]


def world(parallel: ParallelConfig) -> int:
    return WORLD.get(id(parallel), 2)


def load(model: ModelConfig, parallel: ParallelConfig, path: Path) -> dict:
    from megatron_selfdistill.checkpoint.external import load_weights

    chunks, _ = models.build(model, parallel, seed=9)
    assert load_weights(path, chunks, models.VOCAB_SIZE) == 4
    return layouts.shards(chunks, lambda p: p.detach().clone())


def weights_of(kinds: list[str]) -> dict[str, dict]:
    """Return the weights that `legacy_files.save` writes, by the kind of the model."""
    built = {kind: models.build(models.model_config(kind), ONE)[0] for kind in kinds}
    return {kind: layouts.shards(chunks, lambda p: p.detach().clone()) for kind, chunks in built.items()}


@pytest.fixture(scope="module")
def expected(ranks) -> dict[str, dict]:
    (weights,) = ranks.run(weights_of, ["gqa", "tied", "moe"], world_size=1)
    return {kind: layouts.join([shards]) for kind, shards in weights.items()}


@pytest.mark.parametrize("kind, names, written, read", CASES)
def test_any_layout_loads_into_any_other(ranks, expected, tmp_path, kind, names, written, read):
    model = models.model_config(kind)
    ranks.run(legacy_files.save, tmp_path, model, written, names, world_size=world(written))
    loaded = ranks.run(load, model, read, tmp_path, world_size=world(read))
    assert layouts.worst_difference(layouts.join(loaded), expected[kind])[0] == 0


def test_release_and_the_architecture_are_read(ranks, tmp_path):
    model = models.model_config("moe")
    ranks.run(
        legacy_files.save, tmp_path, model, PP2_EP2, "te", tokenizer_type="NullTokenizer", vocab_size=60, world_size=4
    )
    (tmp_path / "iter_0000004").rename(tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    stored = architecture_from_args(stored_args(tmp_path))
    assert differences(stored, model) == {} and stored.vocab_size == 61
    found = describe(tmp_path)
    assert (
        found["vocabulary"] == "61 true rows, 64 with padding" and found["written by"] == "TP 1 x PP 2 x VPP 1 x EP 2"
    )


def test_it_becomes_a_hugging_face_directory(ranks, tmp_path):
    from safetensors.torch import load_file

    model = models.model_config("gqa")
    ranks.run(legacy_files.save, tmp_path / "megatron", model, TP2_PP2, "te", world_size=4)
    tensors = load_file(megatron_to_hf(tmp_path / "megatron", tmp_path / "back") / "model.safetensors")
    full = models.full_weight("decoder.layers.mlp.linear_fc1.weight", (4, 128, 32))[3]
    assert torch.equal(tensors["model.layers.3.mlp.gate_proj.weight"], full[:64])
    assert torch.equal(tensors["model.layers.3.mlp.up_proj.weight"], full[64:])
    rows = models.full_weight("embedding.word_embeddings.weight", (61, 32))
    assert torch.equal(tensors["model.embed_tokens.weight"], rows)


# What does not fit


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("legacy")
    ranks.run(legacy_files.save, directory, models.model_config("gqa"), TP2_PP2, "te", world_size=4)
    return directory


def refuse(model: ModelConfig, path: Path, message: str) -> None:
    from megatron_selfdistill.checkpoint.external import load_weights

    chunks, _ = models.build(model, ONE, seed=9)
    before = [p.detach().clone() for p in chunks[0].parameters()]
    with pytest.raises(CheckpointError, match=message):
        load_weights(path, chunks)
    assert all(torch.equal(a, b) for a, b in zip(before, chunks[0].parameters(), strict=True))


@pytest.mark.parametrize(
    "model, message",
    [
        (models.model_config("gqa", num_layers=3), r"linear_proj.weight\[3\] is unexpected"),
        (models.model_config("gqa", num_layers=5), r"linear_proj.weight\[4\] is missing"),
        (models.model_config("gqa", add_qkv_bias=True), r"linear_qkv.bias\[0\] is missing"),
    ],
)
def test_another_model_is_refused_before_anything_is_loaded(ranks, saved, model, message):
    ranks.run(refuse, model, saved, message, world_size=1)


def test_a_missing_or_damaged_file_is_named(saved, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(saved, directory)
    file = directory / "iter_0000004" / "mp_rank_01_001" / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"mp_rank_01_001/model_optim_rng.pt is corrupt"):
        open_weights(directory)
    shutil.rmtree(file.parent)
    with pytest.raises(CheckpointError, match=r"has 1 of 2 shards of decoder\.layers"):
        open_weights(directory).source.sizes()


def test_old_versions_are_refused(tmp_path):
    file = tmp_path / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir()
    torch.save({"args": argparse.Namespace(num_layers=2), "checkpoint_version": 2.0, "model": {}}, file)
    with pytest.raises(CheckpointError, match=r"has checkpoint_version 2.0, expected 3.0"):
        open_weights(tmp_path)
