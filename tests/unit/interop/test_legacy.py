# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Megatron-LM's legacy format loads from any layout into any other, whichever layer spec named its tensors."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import layouts
import legacy_files
import models
import pytest
import torch
from hf_contents import tensors_of
from models import parallel
from tiers import combinations

from megatron_selfdistill.checkpoint.formats.stored_model import architecture_from_args, stored_args
from megatron_selfdistill.config import ModelConfig, ParallelConfig
from megatron_selfdistill.errors import CheckpointError
from megatron_selfdistill.interop.conversion import megatron_to_hf
from megatron_selfdistill.interop.describe import describe
from megatron_selfdistill.interop.full_weights import open_weights
from megatron_selfdistill.model.model_values import differences

CASES = {
    "gqa, TP2xPP2 -> one rank": ("gqa", "local", parallel(tp=2, pp=2), 4, parallel(), 1),
    "gqa, PP2xVPP2 -> TP2": ("gqa", "te", parallel(pp=2, vpp=2), 2, parallel(tp=2), 2),
    "gqa, one rank -> TP2xPP2": ("gqa", "local", parallel(), 1, parallel(tp=2, pp=2), 4),
    "tied, PP2 -> TP2": ("tied", "te", parallel(pp=2), 2, parallel(tp=2), 2),
    "moe, PP2xEP2 -> one rank": ("moe", "te", parallel(pp=2, ep=2), 4, parallel(), 1),
    "moe, TP2xEP2 -> EP2": ("moe", "local", parallel(tp=2, ep=2, sp=True), 4, parallel(ep=2), 2),
    "moe, TP2xEP2 ETP1 -> PP2": ("moe", "te", parallel(tp=2, ep=2, etp=1, sp=True), 2, parallel(pp=2), 2),
}
"""Case -> kind of the model, the layer spec whose names the file has, and both layouts with their ranks."""


def load(model: ModelConfig, cuts: ParallelConfig, path: Path) -> dict:
    from megatron_selfdistill.checkpoint.external import load_weights

    chunks, _ = models.build(model, cuts, seed=9)
    assert load_weights(path, chunks, models.VOCAB_SIZE) == 4
    return layouts.shards(chunks, lambda p: p.detach().clone())


def weights_of(kinds: list[str]) -> dict[str, dict]:
    """Return the weights that `legacy_files.save` writes, by the kind of the model."""
    built = {kind: models.build(models.model_config(kind), parallel())[0] for kind in kinds}
    return {kind: layouts.shards(chunks, lambda p: p.detach().clone()) for kind, chunks in built.items()}


@pytest.fixture(scope="module")
def expected(ranks) -> dict[str, dict]:
    (weights,) = ranks.run(weights_of, ["gqa", "tied", "moe"], world_size=1)
    return {kind: layouts.join([shards]) for kind, shards in weights.items()}


@combinations(case=CASES, quick={"case": ["gqa, PP2xVPP2 -> TP2"]}, strength=1)
def test_any_layout_loads_into_any_other(ranks, expected, tmp_path, case):
    kind, names, written, num_writers, read, num_readers = case
    model = models.model_config(kind)
    ranks.run(legacy_files.save, tmp_path, model, written, names, world_size=num_writers)
    loaded = ranks.run(load, model, read, tmp_path, world_size=num_readers)
    assert layouts.worst_difference(layouts.join(loaded), expected[kind])[0] == 0


def test_release_and_the_architecture_are_read(ranks, tmp_path):
    model, changes = models.model_config("moe"), {"tokenizer_type": "NullTokenizer", "vocab_size": 60}
    ranks.run(legacy_files.save, tmp_path, model, parallel(pp=2, ep=2), "te", world_size=4, **changes)
    (tmp_path / "iter_0000004").rename(tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    stored = architecture_from_args(stored_args(tmp_path))
    assert differences(stored, model) == {} and stored.vocab_size == 61
    found = describe(tmp_path)
    assert "61 true rows" in found["vocabulary"] and found["written by"] == "TP 1 x PP 2 x VPP 1 x EP 2"


@pytest.mark.full
def test_it_becomes_a_hugging_face_directory(saved, tmp_path):
    tensors = tensors_of(megatron_to_hf(saved, tmp_path / "back"))
    full = models.full_weight("decoder.layers.mlp.linear_fc1.weight", (4, 128, 32))[3]
    assert torch.equal(tensors["model.layers.3.mlp.gate_proj.weight"], full[:64])
    assert torch.equal(tensors["model.layers.3.mlp.up_proj.weight"], full[64:])
    rows = models.full_weight("embedding.word_embeddings.weight", (61, 32))
    assert torch.equal(tensors["model.embed_tokens.weight"], rows)


# What does not fit


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("legacy")
    ranks.run(legacy_files.save, directory, models.model_config("gqa"), parallel(tp=2, pp=2), "te", world_size=4)
    return directory


def refuse_each(cases: list[tuple[dict[str, Any], str]], path: Path) -> None:
    from megatron_selfdistill.checkpoint.external import load_weights

    for changes, named in cases:
        chunks, _ = models.build(models.model_config("gqa", **changes), parallel(), seed=9)
        before = [p.detach().clone() for p in chunks[0].parameters()]
        with pytest.raises(CheckpointError, match=named):
            load_weights(path, chunks)
        assert all(torch.equal(a, b) for a, b in zip(before, chunks[0].parameters(), strict=True))


MISFITS = [
    ({"num_layers": 3}, r"linear_proj.weight\[3\] is unexpected"),
    ({"num_layers": 5}, r"linear_proj.weight\[4\] is missing"),
    ({"add_qkv_bias": True}, r"linear_qkv.bias\[0\] is missing"),
]


def test_another_model_is_refused_before_anything_is_loaded(ranks, saved):
    ranks.run(refuse_each, MISFITS, saved, world_size=1)


def test_missing_damaged_and_old_files_are_named(saved, tmp_path):
    directory = Path(shutil.copytree(saved, tmp_path / "copy"))
    file = directory / "iter_0000004" / "mp_rank_01_001" / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"mp_rank_01_001/model_optim_rng.pt is corrupt"):
        open_weights(directory)
    shutil.rmtree(file.parent)
    with pytest.raises(CheckpointError, match=r"has 1 of 2 shards of decoder\.layers"):
        open_weights(directory).source.sizes()
    old = tmp_path / "mp_rank_00" / "model_optim_rng.pt"
    old.parent.mkdir()
    torch.save({"args": argparse.Namespace(num_layers=2), "checkpoint_version": 2.0, "model": {}}, old)
    with pytest.raises(CheckpointError, match=r"checkpoint_version 2\.0"):
        open_weights(tmp_path)
