# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The directory with the config.json from which vLLM builds the trainer's model, and the names of its tensors."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_selfdistill.checkpoint.formats import directory
from megatron_selfdistill.checkpoint.formats.directory import HF_ASSETS, hf_assets_of
from megatron_selfdistill.config import Config, ModelConfig
from megatron_selfdistill.distributed.collectives import raise_on_all_ranks
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.errors import ConfigError, EngineError
from megatron_selfdistill.interop.conversion import DTYPES
from megatron_selfdistill.interop.hf.family import Family
from megatron_selfdistill.interop.hf.mapping import family_of, family_of_model, text_config
from megatron_selfdistill.interop.hf.rules import Rule
from megatron_selfdistill.interop.hf_files import read_config
from megatron_selfdistill.model.model_values import architecture

_MTP_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")


def engine_directory(config: Config, vocab_size: int, run_dir: Path, grid: RankGrid) -> tuple[Path, list[Rule]]:
    """Write ``run_dir/engine`` with a config.json of the trained model; return it and the rules of the tensors.

    The config.json comes from ``rollout.hf_config``, else from the Hugging Face assets of ``checkpoint.load`` or of the
    run directory, else from ``config.model``.  It has ``vocab_size``, the trainer's dtype, and neither quantisation nor
    multi-token-prediction layers, which are not trained.  Rank 0 writes it.

    Collectives: as in `raise_on_all_ranks`.  Raises, on all ranks alike: `ConfigError` where a config.json describes
    another model or an unknown one, and where ``model.provider`` leaves the model unknown; CheckpointError where it
    cannot be read; `EngineError` where the file cannot be written.
    """
    target = Path(run_dir) / "engine"
    with raise_on_all_ranks(EngineError):
        hf_config, rules = _described(config, vocab_size, run_dir)
        if grid.rank == 0:
            target.mkdir(parents=True, exist_ok=True)
            partial = target / "config.json.partial"
            partial.write_text(json.dumps(hf_config, indent=2) + "\n")
            os.replace(partial, target / "config.json")
    return target, rules


def _described(config: Config, vocab_size: int, run_dir: Path) -> tuple[dict[str, Any], list[Rule]]:
    source = _source(config, run_dir)
    original = None
    if source is not None:
        original = dict(text_config(read_config(source)))  # an engine holds what is trained
        untrained = {name: 0 for name in _MTP_LAYERS if name in original or name in family_of(original).defaults}
        # Rows without a token, which many directories have, would take a share of every softmax.
        original |= {"vocab_size": vocab_size, **untrained}
    model, family = _model(config, original, vocab_size)
    _require_yarns_positions(model)
    _require_known_gpt_oss(model, family)
    dtype = str(DTYPES[config.optimizer.precision]).removeprefix("torch.")
    try:
        hf_config = family.hf_config(model, dtype, original)
    except ConfigError as error:
        where = "" if source is None else f"{source}: "
        raise ConfigError(f"{where}{error}; set rollout.hf_config to the directory of the trained model") from error
    return {"architectures": [family.architecture], **hf_config}, family.rules(model)


def _source(config: Config, run_dir: Path) -> Path | None:
    if config.rollout.hf_config is not None:
        return Path(config.rollout.hf_config)
    if config.model.provider is not None:
        raise ConfigError(
            "vLLM does not know the model: name a directory with its Hugging Face config.json in rollout.hf_config"
        )
    found = None
    if config.checkpoint.load is not None:
        load = Path(config.checkpoint.load)
        found = hf_assets_of(directory.tracked(load) or load)
    if found is None and (run_dir / HF_ASSETS / "config.json").is_file():
        found = run_dir / HF_ASSETS
    return found


def _require_yarns_positions(model: ModelConfig) -> None:
    """Raise ConfigError for more positions than the table of vLLM's YaRN holds, behind whose end vLLM reads NaN."""
    if model.position_embedding_type != "yarn":
        return
    held = int(model.yarn.rotary_scaling_factor * model.yarn.original_max_position_embeddings)
    if model.max_position_embeddings > held:
        raise ConfigError(
            f"model.max_position_embeddings={model.max_position_embeddings} exceeds the {held} positions of YaRN in "
            f"vLLM: set it to at most {held}"
        )


def _require_known_gpt_oss(model: ModelConfig, family: Family) -> None:
    """Raise ConfigError for a GPT-OSS model whose config.json vLLM does not read in full.

    vLLM's class has the window in every other layer, beginning with the first, clamps at 7, and has YaRN.
    """
    if family.architecture != "GptOssForCausalLM":
        return
    arch = architecture(model)
    alternating = [(layer + 1) % 2 for layer in range(model.num_layers)]
    wrong = [
        name
        for name, differs in {
            "layer_types": arch["window_attn_skip_freq"] not in (None, alternating),
            "swiglu_limit": arch["activation_func_clamp_value"] != 7.0,
            "rope_scaling": arch["position_embedding_type"] != "yarn",
        }.items()
        if differs
    ]
    if wrong:
        raise ConfigError(
            f"vLLM's GptOssForCausalLM does not read {' and '.join(wrong)} of this model's config.json, whose values "
            "are not the published ones: set rollout.engine=megatron"
        )


def _model(config: Config, original: dict[str, Any] | None, vocab_size: int) -> tuple[ModelConfig, Family]:
    if config.model.provider is not None:
        assert original is not None
        family = family_of(original)
        return family.model_config(original), family
    model = replace(config.model, vocab_size=vocab_size, num_passthrough_mtp_layers=0)
    return model, family_of_model(model) if original is None else family_of(original)
