# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Hugging Face -> Megatron -> Hugging Face is the identity, through any layout; a misfit gives one message."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkpointed_run
import hf_models
import models
import pytest
import torch
from checkpointed_run import Setup
from safetensors.torch import load_file, save_file

from megatron_selfdistill.checkpoint import conversion
from megatron_selfdistill.checkpoint.conversion import hf_to_megatron, megatron_to_hf
from megatron_selfdistill.checkpoint.conversion_progress import Progress
from megatron_selfdistill.checkpoint.formats import safetensors_directory
from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.errors import CheckpointError, ConfigError
from megatron_selfdistill.model.build import unwrapped
from megatron_selfdistill.model.hf.mapping import family_of

REPOSITORY = Path(__file__).resolve().parents[3]
KINDS = list(hf_models.CONFIGS)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def assert_same_tensors(one: Path, two: Path) -> None:
    a, b = tensors_of(one), tensors_of(two)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# There and back


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_the_identity(hf_directory, tmp_path, kind):
    hf = hf_directory(kind)
    said: list[str] = []
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", progress=Progress(report=said.append))
    assert_same_tensors(hf, tmp_path / "back")
    assert config_of(hf) == config_of(tmp_path / "back")
    assert (hf / "generation_config.json").read_text() == (tmp_path / "back" / "generation_config.json").read_text()
    assert said[0] == "vocabulary: 101 of 128 rows on disk"


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_original_config_transformers_computes_the_same(hf_directory, tmp_path, kind):
    import transformers

    hf = hf_directory(kind)
    release = hf_to_megatron(hf, tmp_path / "megatron")
    shutil.rmtree(release / conversion.HF_ASSETS)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_tensors(hf, tmp_path / "back")
    tokens = torch.tensor([hf_models.SEQUENCES[0]])
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(f).eval() for f in (hf, tmp_path / "back"))
    with torch.no_grad():
        assert torch.equal(before(tokens).logits, after(tokens).logits)


def test_shards_are_bounded_and_load(hf_directory, tmp_path):
    hf = hf_directory("qwen3")
    hf_to_megatron(hf, tmp_path / "megatron")
    back = megatron_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=30_000)
    shards = sorted(back.glob("*.safetensors"))
    assert len(shards) > 3 and max(file.stat().st_size for file in shards) <= 30_000
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert_same_tensors(hf, back)
    hf_to_megatron(back, tmp_path / "again")  # an index and many files are read, too
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight alone needs .* raise --max-shard-size"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "none", max_shard_bytes=10_000)
    assert not (tmp_path / "none").exists()


def test_a_type_is_taken_by_all_weights_but_the_expert_bias(hf_directory, tmp_path):
    hf_to_megatron(hf_directory("deepseek_v3"), tmp_path / "megatron", dtype=torch.bfloat16)
    tensors = tensors_of(megatron_to_hf(tmp_path / "megatron", tmp_path / "back"))
    for name, original in tensors_of(hf_directory("deepseek_v3")).items():
        bias = name.endswith("e_score_correction_bias")
        assert tensors[name].dtype == (torch.float32 if bias else torch.bfloat16)
        assert torch.equal(tensors[name], original if bias else original.bfloat16())
    config = config_of(tmp_path / "back")
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def with_fp8(hf: Path, out: Path) -> dict[str, torch.Tensor]:
    """``hf`` with block-scaled FP8 weights in its MLPs; returns these dequantised."""
    tensors, dequantised = {}, {}
    for name, tensor in tensors_of(hf).items():
        if ".experts." not in name or not name.endswith("proj.weight"):
            tensors[name] = tensor.bfloat16() if not name.endswith("_bias") else tensor
            continue
        rows, columns = (-(-size // 16) for size in tensor.shape)
        scales = 0.01 + torch.rand(rows, columns)
        wide = scales.repeat_interleave(16, 0)[: tensor.shape[0]].repeat_interleave(16, 1)[:, : tensor.shape[1]]
        tensors[name] = (tensor / wide).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
        dequantised[name] = (tensors[name].double() * wide.double()).bfloat16()
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    (out / "config.json").write_text(json.dumps(config_of(hf) | {"quantization_config": quantization}))
    return dequantised


def test_fp8_weights_come_back_dequantised(hf_directory, tmp_path):
    expected = with_fp8(hf_directory("deepseek_v3"), tmp_path / "fp8")
    hf_to_megatron(tmp_path / "fp8", tmp_path / "megatron")
    tensors = tensors_of(megatron_to_hf(tmp_path / "megatron", tmp_path / "back"))
    assert expected
    for name, values in expected.items():
        assert tensors[name].dtype == torch.bfloat16 and torch.equal(tensors[name], values), name
    assert "quantization_config" not in config_of(tmp_path / "back")
    assert not [name for name in tensors if name.endswith("_scale_inv")]


def with_mtp_layer(hf: Path, out: Path) -> None:
    """``hf`` with one multi-token-prediction layer behind its last one, as DeepSeek publishes it."""
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
    for name in ("embed_tokens.weight", "shared_head.head.weight"):
        tensors[prefix + name] = torch.randn_like(tensors["model.embed_tokens.weight"])
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config.pop("num_mtp_layers", None)
    (out / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))


def test_multi_token_prediction_layers_are_carried_both_ways(hf_directory, tmp_path, ranks):
    with_mtp_layer(hf_directory("deepseek_v3"), tmp_path / "hf")
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_tensors(tmp_path / "hf", tmp_path / "back")
    assert config_of(tmp_path / "back")["num_nextn_predict_layers"] == 1
    ranks.run(load_and_compare, tmp_path / "hf", tmp_path / "megatron", ParallelConfig(), world_size=1)


# Into Megatron, in any layout

LAYOUTS = {
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "tp2_pp2": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "pp2_vpp2": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "ep2": ParallelConfig(expert_model_parallel_size=2),
}
CASES = [
    ("llama2", "pp2_vpp2"),
    *(pytest.param("llama2", layout, marks=pytest.mark.full) for layout in ("tp2", "tp2_pp2")),
    pytest.param("qwen2", "tp2_pp2", marks=pytest.mark.full),
    ("mixtral", "ep2"),
    pytest.param("qwen3_moe_mixed", "pp2", marks=pytest.mark.full),
    pytest.param("deepseek_v3", "pp2", marks=pytest.mark.full),
    ("deepseek_v3", "ep2"),
]
WORLD = {"tp2": 2, "pp2": 2, "tp2_pp2": 4, "pp2_vpp2": 2, "ep2": 2}


def load_and_compare(hf: Path, megatron: Path, parallel: ParallelConfig) -> None:
    """Compare `load_weights` from the converted checkpoint with the rules on a live model, bit for bit."""
    from megatron_selfdistill.checkpoint.run.external import load_weights

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


@pytest.mark.parametrize("kind, layout", CASES)
def test_a_converted_checkpoint_loads_in_any_layout(ranks, hf_directory, tmp_path, kind, layout):
    hf_to_megatron(hf_directory(kind), tmp_path / "megatron")
    ranks.run(load_and_compare, hf_directory(kind), tmp_path / "megatron", LAYOUTS[layout], world_size=WORLD[layout])


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


# What does not fit is said before anything is written


def edited(hf: Path, out: Path, *, config: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None) -> Path:
    """Return a copy of ``hf`` with other config fields and tensors; None removes a field or tensor."""
    out.mkdir()
    kept = tensors_of(hf) | (tensors or {})
    save_file({n: t for n, t in kept.items() if t is not None}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config_of(hf) | (config or {})))
    return out


NORM, DOWN = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.down_proj.weight"
CHANGES = {
    "architecture": (
        {"config": {"architectures": ["GPT5ForCausalLM"]}},
        "GPT5ForCausalLM, expected one of",
    ),
    "missing": ({"tensors": {NORM: None}}, f"{NORM} is missing"),
    "extra": ({"tensors": {"model.layers.1.self_attn.sinks": torch.zeros(4)}}, "self_attn.sinks is unexpected"),
    "more layers": ({"config": {"num_hidden_layers": 3}}, "model.layers.3.* is unexpected"),
    "shape": ({"tensors": {DOWN: torch.zeros(36, 45)}}, rf"{DOWN} has shape \[36, 45\], expected \[36, 44\]"),
    "activation": ({"config": {"hidden_act": "gelu"}}, "hidden_act"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_directory_that_does_not_fit_is_one_sentence(hf_directory, tmp_path, change):
    changes, sentence = CHANGES[change]
    hf = edited(hf_directory("qwen3"), tmp_path / "hf", **changes)
    with pytest.raises((ConfigError, CheckpointError), match=sentence):
        hf_to_megatron(hf, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


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
    release = hf_to_megatron(hf_directory("llama2"), tmp_path / "megatron")
    file = release / "__0_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=rf"{len(whole) - 1} bytes of __0_0.distcp, expected {len(whole)}"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    file.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(CheckpointError, match=r"has a corrupt __0_0.distcp: its checksum"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_another_config_than_the_checkpoints_shows_both(hf_directory, tmp_path):
    hf_to_megatron(hf_directory("llama2"), tmp_path / "megatron")
    other = edited(hf_directory("llama2"), tmp_path / "other", config={"rms_norm_eps": 1e-6})
    with pytest.raises(ConfigError, match="layernorm_epsilon would be 1e-06 but the model has 1e-05"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", hf_config=other)
    with pytest.raises(CheckpointError, match="has no iteration 7; it has none"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", iteration=7)


def test_nothing_is_overwritten(hf_directory, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    (tmp_path / "out.old").mkdir()
    with pytest.raises(CheckpointError, match="exists and is not overwritten"):
        hf_to_megatron(hf_directory("llama2"), tmp_path / "out")
    (tmp_path / "out" / "mine").unlink()
    hf_to_megatron(hf_directory("llama2"), tmp_path / "out")  # an empty directory is no loss
    assert (tmp_path / "out.old").is_dir()


# What goes wrong on the way


def run_tool(*arguments: Any, **options: Any) -> subprocess.CompletedProcess:
    command = [sys.executable, REPOSITORY / "tools" / "convert.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


def test_the_tool_converts_and_describes(hf_directory, tmp_path):
    done = run_tool(
        "hf-to-megatron", "--hf", hf_directory("mixtral"), "--out", tmp_path / "megatron", "--dtype", "bf16"
    )
    assert done.returncode == 0, done.stderr
    assert f"flags of Megatron-LM core_v0.16.1: --load {tmp_path / 'megatron'} " in done.stdout
    assert "--num-experts 4" in done.stdout and "--bf16" in done.stdout
    found = run_tool("inspect", tmp_path / "megatron").stdout
    assert done.stdout.partition("core_v0.16.1: ")[2].strip() in found
    for part in (
        "MixtralForCausalLM",
        "101 true rows, 128 with padding",
        "bfloat16",
        "4 of width 44, 2 per token",
        "TP 1",
    ):
        assert part in found
    refused = run_tool("megatron-to-hf", "--megatron", tmp_path / "nothing", "--out", tmp_path / "back")
    assert refused.returncode == 2 and last_line_alone(refused.stderr).startswith("convert: ")


def test_a_disk_that_is_too_small_is_told_first(hf_directory, small_disk):
    disk = small_disk("512k")
    with pytest.raises(CheckpointError, match=r"bytes but .* has .* free: make room"):
        hf_to_megatron(hf_directory("llama2"), disk / "megatron")
    assert not list(disk.iterdir())


def test_a_disk_that_fills_up_leaves_nothing_behind(hf_directory, small_disk, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 0, 2**40))
    disk = small_disk("512k")
    (disk / "other").write_bytes(bytes(300_000))
    with pytest.raises(OSError, match="No space left on device"):
        hf_to_megatron(hf_directory("mixtral"), disk / "megatron")
    assert [path.name for path in disk.iterdir()] == ["other"]


def test_a_failing_write_leaves_nothing_behind(hf_directory, tmp_path, monkeypatch):
    hf_to_megatron(hf_directory("llama2"), tmp_path / "megatron")
    monkeypatch.setattr(safetensors_directory.os, "pwrite", fail_with(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


def fail_with(error: Exception) -> Any:
    def fail(*_: Any) -> None:
        raise error

    return fail


def last_line_alone(error: str) -> str:
    """Return the last line of standard error, before which torch may have warned of the nvcc on the path."""
    *before, last = error.splitlines()
    assert "convert: " not in "".join(before) and "Traceback" not in error, error
    return last


@pytest.mark.full
def test_a_target_that_cannot_be_written_is_one_sentence(hf_directory, tmp_path):
    done = run_tool("hf-to-megatron", "--hf", hf_directory("llama2"), "--out", "/proc/megatron")
    assert done.returncode == 2 and last_line_alone(done.stderr).startswith("convert: ")


@pytest.mark.parametrize(
    "kill",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.full),
        pytest.param(signal.SIGINT, marks=pytest.mark.full),
    ],
)
def test_after_an_interruption_a_second_run_starts_clean(hf_directory, tmp_path, kill):
    hf, out = hf_directory("llama2"), tmp_path / "megatron"
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOWLY, str(hf), str(out)], cwd=REPOSITORY, stderr=subprocess.DEVNULL
    )
    while not list(tmp_path.glob(".writing_*/release/*.distcp")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(kill)
    process.wait()
    assert not out.exists()
    assert bool(list(tmp_path.iterdir())) == (kill == signal.SIGKILL)
    hf_to_megatron(hf, out)
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


_SLOWLY = """
import signal, sys, time
from pathlib import Path
from megatron_selfdistill.checkpoint.conversion import hf_to_megatron
from megatron_selfdistill.checkpoint.conversion_progress import Progress
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a script is born deaf to it
hf_to_megatron(Path(sys.argv[1]), Path(sys.argv[2]), progress=Progress(advance=lambda _: time.sleep(0.5)))
"""
