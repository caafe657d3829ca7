# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Adapters go to the library PEFT and come back: the logits are those of our model with its adapters."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import hf_models
import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_checkpoints import raises
from tiers import combinations

from megatron_selfdistill.adapters.stored_adapters import StoredAdapters, read_stored_adapters
from megatron_selfdistill.checkpoint.formats.weights_digest import base_digest
from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.interop.conversion import hf_to_megatron, megatron_to_hf
from megatron_selfdistill.interop.convert_command import main
from megatron_selfdistill.interop.peft_adapters import megatron_to_peft, peft_to_megatron
from megatron_selfdistill.interop.release import Progress

LATENT = "linear_proj linear_q_down_proj linear_q_up_proj linear_kv_down_proj linear_kv_up_proj linear_fc1 linear_fc2"
PLAIN = AdapterConfig(rank=3, alpha=1.5)
LATENT_ADAPTERS = AdapterConfig(rank=2, alpha=0.5, rank_stabilised=True, layers=LATENT.split())
LOGITS_BOUND = 7.5e-4
"""The largest difference of the logits of two float32 implementations of a model with large adapters: a rounding of
every weight moves them by 5e-6 to 2.4e-4, and the bound is that of three roundings."""


@dataclass(frozen=True)
class Adapted:
    """A base as a Hugging Face directory and as a checkpoint, and a checkpoint of adapters on it."""

    hf: Path
    base: Path
    adapters: Path


def live(hf: Path, settings: AdapterConfig) -> tuple[list[torch.nn.Module], object]:
    """Return the model of a Hugging Face directory with large adapters, on one rank."""
    from megatron_selfdistill.adapters.low_rank_adapters import add_adapters

    chunks, grid = models.build(hf_models.read(hf)[1], ParallelConfig())
    add_adapters(chunks, settings, grid)
    models.fill_from_names(chunks, seed=5)
    return chunks, grid


def save_adapters(hf: Path, base: Path, settings: AdapterConfig, run_dir: Path, nan: str = "") -> torch.Tensor:
    """Save adapters as a run does, and return the logits of the model with them; the factor named ``nan`` has a NaN."""
    from megatron_selfdistill.adapters.configured_adapters import TrainedAdapters
    from megatron_selfdistill.checkpoint import sharded_io, state
    from megatron_selfdistill.checkpoint.external import load_weights
    from megatron_selfdistill.checkpoint.formats.megatron_args import megatron_args
    from megatron_selfdistill.checkpoint.formats.torch_dist import CONTENT

    _, model, _, _ = hf_models.read(hf)
    plain, _ = models.build(model, ParallelConfig())
    load_weights(base, plain, hf_models.VOCAB_SIZE)
    chunks, grid = live(hf, settings)
    chunks[0].load_state_dict(plain[0].state_dict(), strict=False)
    if nan:
        chunks[0].get_parameter(nan).data[0, 0] = torch.nan
    target = run_dir / "checkpoints" / "iter_0000005"
    stored = StoredAdapters(target, settings, base_digest(base), base)
    contents = {"args": megatron_args(chunks[0], model), "iteration": 5, "checkpoint_version": 3.0}
    contents |= TrainedAdapters.stored(state.model_state(chunks, CONTENT))
    request, _ = sharded_io.begin_write(contents, target, texts={"adapters.json": stored.text()})
    sharded_io.write_now(request, target)
    return hf_models.megatron_logits(chunks[0], grid, hf_models.SEQUENCES)


def read_adapters(hf: Path, adapters: Path) -> torch.Tensor:
    """Return the logits of our model with a checkpoint of adapters, loaded as an evaluation loads it."""
    from megatron_selfdistill.adapters.configured_adapters import load_adapters
    from megatron_selfdistill.adapters.low_rank_adapters import add_adapters
    from megatron_selfdistill.checkpoint.external import load_weights
    from megatron_selfdistill.distributed.ranks import current_grid

    stored = read_stored_adapters(adapters)
    assert stored is not None
    _, model, _, _ = hf_models.read(hf)
    chunks, _ = models.build(model, ParallelConfig())
    load_weights(stored.base_place(), chunks, hf_models.VOCAB_SIZE)
    grid = current_grid(ParallelConfig())
    padding = chunks[0].embedding.word_embeddings.weight.data[hf_models.VOCAB_SIZE :]
    padding.fill_(torch.nan)  # the adapters are not to blame for what other programs leave in the base
    assert len(padding)
    add_adapters(chunks, stored.settings, grid)
    load_adapters(adapters, chunks)
    return hf_models.megatron_logits(chunks[0], grid, hf_models.SEQUENCES)


def peft_logits(hf: Path, adapters: Path) -> torch.Tensor:
    """Return the logits of transformers' model with adapters that PEFT loads, and check that it uses all of them."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(hf).eval()
    adapted = peft.PeftModel.from_pretrained(model, str(adapters)).eval()
    used = {name.replace(".default", "") for name, _ in adapted.named_parameters() if "lora_" in name}
    assert used == load_file(adapters / "adapter_model.safetensors").keys()
    return hf_models.hf_logits(adapted, hf_models.SEQUENCES)


@pytest.fixture
def adapted(ranks, hf_directory, tmp_path) -> Callable[..., tuple[Adapted, torch.Tensor]]:
    """Return a function that makes a base and adapters of a kind, with the logits of our model; see `save_adapters`."""

    def made(kind: str, settings: AdapterConfig, nan: str = "") -> tuple[Adapted, torch.Tensor]:
        hf, base, run_dir = hf_directory(kind), tmp_path / "base", tmp_path / "run"
        hf_to_megatron(hf, base)
        (logits,) = ranks.run(save_adapters, hf, base, settings, run_dir, nan, world_size=1)
        return Adapted(hf, base, run_dir / "checkpoints" / "iter_0000005"), logits

    return made


@combinations(kind=["qwen3", "deepseek_v3", "qwen3_moe_mixed"], quick={"kind": ["qwen3"]}, strength=1)
def test_peft_computes_what_our_model_does_and_everything_comes_back(ranks, adapted, tmp_path, capsys, kind):
    settings = LATENT_ADAPTERS if kind == "deepseek_v3" else PLAIN
    made, expected = adapted(kind, settings)
    base_logits = hf_models.hf_logits(hf_of(made.hf), hf_models.SEQUENCES)
    assert (expected - base_logits).abs().max() > 0.1, "the adapters must matter"

    out = megatron_to_peft(made.adapters, tmp_path / "peft", base_model="org/model")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/model" and config["r"] == settings.rank
    torch.testing.assert_close(peft_logits(made.hf, out), expected, rtol=0, atol=LOGITS_BOUND)

    arguments = ["--peft", str(out), "--base", str(made.base), "--out", str(tmp_path / "back")]
    assert main(["peft-to-megatron", *arguments]) == 0
    stored = read_stored_adapters(tmp_path / "back")
    assert stored is not None and set(stored.settings.layers) <= set(settings.layers)
    assert replace(stored.settings, layers=settings.layers) == settings
    assert f"adapter.load={tmp_path / 'back'}" in capsys.readouterr().out
    (logits,) = ranks.run(read_adapters, made.hf, tmp_path / "back", world_size=1)
    assert torch.equal(logits, expected)


def refuse_adapters_with_nan(hf: Path, adapters: Path) -> None:
    with raises(r"NaN or infinite elements in decoder.layers.mlp.linear_fc2_adapter.b\[1\]"):
        read_adapters(hf, adapters)


@pytest.mark.full
def test_a_nan_in_a_factor_is_found_when_adapters_are_loaded(ranks, adapted):
    made, _ = adapted("qwen3", PLAIN, "decoder.layers.1.mlp.linear_fc2_adapter.b")
    ranks.run(refuse_adapters_with_nan, made.hf, made.adapters, world_size=1)


def hf_of(directory: Path) -> torch.nn.Module:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.mark.parametrize("rank_stabilised", [True, pytest.param(False, marks=pytest.mark.full)])
def test_adapters_of_peft_with_different_factors_are_stacked_exactly(ranks, hf_directory, tmp_path, rank_stabilised):
    """PEFT's usual adapters: q and v alone have them, each with its own A.  The scale stays where the rank doubles."""
    import peft

    hf = hf_directory("qwen3")
    hf_to_megatron(hf, tmp_path / "base")
    settings = {"r": 2, "lora_alpha": 3, "use_rslora": rank_stabilised, "lora_dropout": 0.1}
    settings |= {"target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        peft.get_peft_model(hf_of(hf), peft.LoraConfig(**settings)).save_pretrained(tmp_path / "peft")
    expected, reports = peft_logits(hf, tmp_path / "peft"), list[str]()
    progress = Progress(report=reports.append)
    out = peft_to_megatron(tmp_path / "peft", tmp_path / "base", tmp_path / "out", progress=progress)
    for named in ("lora_dropout=0.1", "rank 2 becomes 4"):
        assert any(named in line for line in reports)
    stored = read_stored_adapters(out)
    scale = 3 / math.sqrt(2) if rank_stabilised else 3 / 2
    assert stored is not None and stored.settings.rank == 4
    assert stored.settings.scale == pytest.approx(scale, rel=1e-12)
    assert sorted(stored.settings.layers) == ["linear_fc2", "linear_qkv"]
    (logits,) = ranks.run(read_adapters, hf, out, world_size=1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def rewritten(peft: Path, out: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: object) -> Path:
    """Return a copy of a directory of PEFT with changed settings and other factors."""
    out.mkdir()
    config = json.loads((peft / "adapter_config.json").read_text()) | changes
    (out / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors or load_file(peft / "adapter_model.safetensors"), out / "adapter_model.safetensors")
    return out


SETTINGS: dict[str, dict[str, object]] = {
    "use_dora=True": {"use_dora": True},
    "bias='all'": {"bias": "all"},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "one rank and one scale": {"rank_pattern": {"q_proj": 2}},
    "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
    "only LoRA": {"peft_type": "IA3"},
    "cannot be read": {"r": None},
    "adapter_config.json": {"lora_alpha": None},
    "use_rslora='no'": {"use_rslora": "no"},
    r"ranks \[3\], expected r=4": {"r": 4},
}
"""What a refusal names -> the changed settings."""
Q_PROJ = "base_model.model.model.layers.2.self_attn.q_proj"


def factors_that_do_not_fit(factors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Return what a refusal names -> the factors."""
    return {
        r"no factors of .*layers\.1": {name: factor for name, factor in factors.items() if ".layers.1." not in name},
        r"q_proj.lora_B.weight has shape \[3, 3\]": factors | {f"{Q_PROJ}.lora_B.weight": torch.zeros(3, 3)},
        "factors of the ranks": factors | {f"{Q_PROJ}.lora_A.weight": torch.tensor(1.0)},
        "lm_head.lora_A.weight": factors | {"base_model.model.lm_head.lora_A.weight": torch.zeros(3, 36)},
        "no factors of LoRA": {"a.lora_magnitude_vector": torch.zeros(1)},
    }


def test_what_does_not_fit_is_refused_by_its_name(adapted, tmp_path, capsys):
    made, _ = adapted("llama2", PLAIN)
    peft, out = megatron_to_peft(made.adapters, tmp_path / "peft"), tmp_path / "out"
    factors = load_file(peft / "adapter_model.safetensors")
    cases = [(named, rewritten(peft, tmp_path / named[:9], **changes)) for named, changes in SETTINGS.items()]
    for number, (named, tensors) in enumerate(factors_that_do_not_fit(factors).items()):
        cases.append((named, rewritten(peft, tmp_path / f"{number}", tensors)))
    for named, directory in [*cases, ("adapter_model.safetensors of PEFT", made.hf)]:
        with raises(named):
            peft_to_megatron(directory, made.base, out)
    with raises("holds adapters alone"):
        peft_to_megatron(peft, made.adapters, out)
    with raises("holds adapters alone"):
        megatron_to_hf(made.adapters, out)
    assert main(["megatron-to-peft", "--megatron", str(made.base), "--out", str(out)]) == 2
    assert "holds full weights" in capsys.readouterr().err and not out.exists()
