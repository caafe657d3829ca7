# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Converted checkpoints load in any layout, also with Megatron's own loader; checkpoints of any layout convert."""

from __future__ import annotations

import json
import math
from pathlib import Path

import checkpointed_run
import hf_models
import models
import pytest
import torch
from checkpointed_run import Setup
from hf_contents import assert_same_tensors, config_of, tensors_of
from safetensors.torch import save_file

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.interop.conversion import hf_to_megatron, megatron_to_hf
from megatron_selfdistill.interop.hf.mapping import family_of
from megatron_selfdistill.model.forward import unwrapped

pytestmark = pytest.mark.full


def load_and_compare(hf: Path, megatron: Path, parallel: ParallelConfig) -> None:
    """Compare `load_weights` from the converted checkpoint with the rules on a live model, bit for bit."""
    from megatron_selfdistill.checkpoint.external import load_weights

    _, model, rules, tensors = hf_models.read(hf)
    expected, _ = models.build(model, parallel)
    hf_models.fill(expected, [rule for rule in rules if not rule.is_passthrough], tensors)
    chunks, _ = models.build(model, parallel, seed=9)
    assert load_weights(megatron, chunks, hf_models.VOCAB_SIZE) == 0
    for loaded, filled in zip(chunks, expected, strict=True):
        wanted = dict(unwrapped(filled).named_parameters()) | dict(unwrapped(filled).named_buffers())
        for name, tensor in [*unwrapped(loaded).named_parameters(), *unwrapped(loaded).named_buffers()]:
            rows = tensor != wanted[name]
            if "word_embeddings" in name or "output_layer" in name:
                rows &= wanted[name] != 3  # padding
            assert not rows.any(), name


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
    state = unwrapped(chunks[0]).sharded_state_dict()
    loaded, unasked, absent = dist_checkpointing.load(state, str(release), strict=StrictHandling.RETURN_ALL)
    assert not absent and all(key.endswith("._extra_state") for key in unasked)
    state = unwrapped(chunks[0]).sharded_state_dict()
    loaded = dist_checkpointing.load(state, str(release))  # as Megatron-LM does by default
    unwrapped(chunks[0]).load_state_dict({name: loaded[name] for name in state})
    expected, _ = models.build(model, ParallelConfig())
    hf_models.fill(expected, rules, tensors)
    for name, tensor in unwrapped(expected[0]).named_parameters():
        if "word_embeddings" not in name and "output_layer" not in name:  # padding
            assert torch.equal(tensor, unwrapped(chunks[0]).get_parameter(name)), name


@pytest.mark.parametrize("kind", ["qwen2", "mixtral", "qwen3_moe_mixed", "deepseek_v3"])
def test_megatrons_own_loader_sees_nothing_unusual(ranks, hf_directory, tmp_path, kind):
    release = hf_to_megatron(hf_directory(kind), tmp_path / "megatron")
    assert (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").read_text() == "release"
    ranks.run(read_as_megatron, release, hf_directory(kind), kind, world_size=1)


def with_mtp_layer(hf: Path, out: Path, copies: bool) -> None:
    """``hf`` with one multi-token-prediction layer behind its last one, as DeepSeek publishes it.

    ``copies``: whether the layer has the copies of embedding and output layer that GLM-4.6 omits.
    """
    tensors = tensors_of(hf)
    config = config_of(hf)
    last, hidden = config["num_hidden_layers"], config["hidden_size"]
    layer = {name: t for name, t in tensors.items() if name.startswith(f"model.layers.{last - 1}.")}
    for name, tensor in layer.items():
        tensors[name.replace(f".{last - 1}.", f".{last}.", 1)] = tensor + 1
    prefix = f"model.layers.{last}."
    tensors |= {
        prefix + name: torch.randn(hidden) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")
    }
    tensors[prefix + "eh_proj.weight"] = torch.randn(hidden, 2 * hidden)
    for name in ("embed_tokens.weight", "shared_head.head.weight") if copies else ():
        tensors[prefix + name] = torch.randn_like(tensors["model.embed_tokens.weight"])
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config.pop("num_mtp_layers", None)
    (out / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))


@pytest.mark.parametrize(("kind", "copies"), [("deepseek_v3", True), ("glm4_moe", False)])
def test_multi_token_prediction_layers_are_carried_both_ways(hf_directory, tmp_path, ranks, kind, copies):
    with_mtp_layer(hf_directory(kind), tmp_path / "hf", copies)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_tensors(tmp_path / "hf", tmp_path / "back")
    assert config_of(tmp_path / "back")["num_nextn_predict_layers"] == 1
    ranks.run(load_and_compare, tmp_path / "hf", tmp_path / "megatron", ParallelConfig(), world_size=1)


# From a checkpoint that a run wrote


def save_as_run(setup: Setup, run_dir: Path) -> None:
    checkpointed_run.start(setup, run_dir).save(3)


@pytest.mark.parametrize(
    "kind, parallel, family",
    [
        pytest.param(
            "gqa",
            {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
            "LlamaForCausalLM",
            marks=pytest.mark.full,
        ),
        pytest.param(
            "tied",
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            "Qwen2ForCausalLM",
            marks=pytest.mark.full,
        ),
        ("moe", {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, "Qwen3MoeForCausalLM"),
    ],
)
def test_a_runs_checkpoint_of_any_layout_is_converted(ranks, tmp_path, kind, parallel, family):
    setup = Setup(kind=kind, teacher="ema").cut(**parallel)
    world_size = math.prod(size for name, size in parallel.items() if not name.startswith("virtual"))
    ranks.run(save_as_run, setup, tmp_path / "run", world_size=world_size)
    back = megatron_to_hf(tmp_path / "run" / "checkpoints", tmp_path / "back", iteration=3)
    config, tensors = config_of(back), tensors_of(back)
    assert config["architectures"] == [family] and config["vocab_size"] == models.VOCAB_SIZE
    rules = family_of(config).rules(family_of(config).model_config(config))
    assert {name for rule in rules for name in rule.hf_names} == tensors.keys()
    depth = setup.model.num_layers
    for rule in rules:
        stacked = {0: (), 1: (depth,), 2: (depth, setup.model.num_moe_experts)}[len(rule.megatron.index)]
        full = models.full_weight(rule.megatron.key, (*stacked, *rule.shape))[rule.megatron.index]
        for name, tensor in zip(rule.hf_names, rule.to_hf(full), strict=True):
            assert torch.equal(tensors[name], tensor), name
