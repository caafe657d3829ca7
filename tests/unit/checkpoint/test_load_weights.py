# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A run starts from weights alone, as Megatron-LM writes them; a message says where the weights do not fit."""

from __future__ import annotations

from pathlib import Path

import checkpointed_run
import common_state
import layouts
import models
import pytest
import torch
from checkpointed_run import Setup
from damage import Payload

from megatron_selfdistill.config import ModelConfig, ParallelConfig


def save_with_payload(setup: Setup, run_dir: Path) -> dict:
    run = checkpointed_run.start(setup, run_dir, steps=1)
    path = run.save(3)
    if run.grid.rank == 0:
        common_state.write(path, {"args": Payload(run_dir / "executed")})
        (path / "manifest.json").unlink()  # as another program would have written it
    return run.weights()


def load(model: ModelConfig, parallel: ParallelConfig, path: Path, vocab_size: int | None = None) -> dict:
    from megatron_selfdistill.checkpoint.external import load_weights

    chunks, _ = models.build(model, parallel, seed=9)
    assert load_weights(path, chunks, vocab_size) == 3
    return layouts.shards(chunks, lambda p: p.detach().clone())


def refuse(model: ModelConfig, parallel: ParallelConfig, path: Path, named: str, vocab_size: int | None = None) -> None:
    """Check that weights are refused with a name, and that nothing of them is loaded."""
    from megatron_selfdistill.checkpoint.external import load_weights
    from megatron_selfdistill.errors import CheckpointError

    chunks, _ = models.build(model, parallel, seed=9)
    before = [p.detach().clone() for chunk in chunks for p in chunk.parameters()]
    with pytest.raises(CheckpointError) as caught:
        load_weights(path, chunks, vocab_size)
    assert named in str(caught.value)
    if "NaN" in str(caught.value):  # found in what has been loaded
        assert "word_embeddings" not in str(caught.value), "padding rows may hold anything"
    else:
        assert all(map(torch.equal, before, (p for chunk in chunks for p in chunk.parameters())))


def refuse_each(cases: list[tuple[ModelConfig, str]], path: Path) -> None:
    for model, named in cases:
        refuse(model, models.parallel(), path, named, model.vocab_size)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> tuple[Path, dict]:
    """Return a directory with one checkpoint, and the weights of the checkpoint."""
    run_dir = tmp_path_factory.mktemp("run")
    shards = ranks.run(save_with_payload, Setup().cut(tp=2), run_dir, world_size=2)
    return run_dir / "checkpoints", layouts.join(shards)


@pytest.mark.parametrize("inside", ["", "iter_0000003"])
def test_weights_load_in_another_layout_and_no_pickle_is_executed(ranks, saved, inside):
    directory, weights = saved
    loaded = ranks.run(load, models.model_config("gqa"), models.parallel(pp=2), directory / inside, world_size=2)
    assert layouts.worst_difference(layouts.join(loaded), weights)[0] == 0
    assert not (directory.parent / "executed").exists()


def test_more_padding_rows_than_on_disk_are_zero(ranks, saved):
    directory, weights = saved
    model = models.model_config("gqa", make_vocab_size_divisible_by=128)
    loaded = ranks.run(load, model, models.parallel(), directory, models.VOCAB_SIZE, world_size=1)
    assert layouts.worst_difference(layouts.join(loaded), weights)[0] == 0
    padding = layouts.join(loaded, rows=128)["output_layer.weight"][64:]
    assert padding.shape == (64, 32) and padding.count_nonzero() == 0


QKV = "decoder.layers.self_attention.linear_qkv"
MISFITS = [
    (models.model_config("gqa", add_qkv_bias=True), f"{QKV}.bias is missing"),
    (models.model_config("gqa", share_embeddings_and_output_weights=True), "output_layer.weight is unexpected"),
    (models.model_config("gqa", hidden_size=64), "final_layernorm.weight has shape [32], expected [64]"),
    (models.model_config("gqa", vocab_size=100), "has 64 rows, expected at least 100"),
]


def test_weights_that_do_not_fit_are_named_before_anything_is_loaded(ranks, saved):
    ranks.run(refuse_each, MISFITS, saved[0], world_size=1)


# Weights that are not finite


def save_with_nan(setup: Setup, run_dir: Path, where: dict[str, int]) -> None:
    """Save with a NaN in row ``where[name]`` of each parameter whose name ends with ``name``."""
    run = checkpointed_run.start(setup, run_dir)
    for name, param in run.chunks[0].named_parameters():
        for end, row in where.items():
            if name.endswith(end):
                param.data[row].fill_(torch.nan)
    run.save(3)


def test_a_nan_in_the_weights_but_not_in_padding_is_found_when_they_are_loaded_and_named_on_every_rank(ranks, tmp_path):
    where = {"layers.2.mlp.linear_fc2.weight": 5, "word_embeddings.weight": models.VOCAB_SIZE}
    where["output_layer.weight"] = models.VOCAB_SIZE + 1
    ranks.run(save_with_nan, Setup(teacher="current"), tmp_path, where, world_size=1)
    arguments = models.model_config("gqa"), models.parallel(pp=2), tmp_path / "checkpoints"
    named = "NaN or infinite elements in decoder.layers.mlp.linear_fc2.weight[2]"
    ranks.run(refuse, *arguments, named, models.VOCAB_SIZE, world_size=2)
