# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Describe a checkpoint in a few lines for people: Megatron (torch_dist or legacy) or Hugging Face."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from megatron_selfdistill.adapters.stored_adapters import read_stored_adapters
from megatron_selfdistill.checkpoint.formats.directory import hf_assets_of, is_hugging_face
from megatron_selfdistill.checkpoint.formats.stored_model import architecture_from_args, stored_vocab_size
from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import CheckpointError, ConfigError
from megatron_selfdistill.interop.full_weights import open_weights
from megatron_selfdistill.interop.hf.family import Family
from megatron_selfdistill.interop.hf.mapping import check_counts, family_of, family_of_model
from megatron_selfdistill.interop.hf_files import read_config
from megatron_selfdistill.interop.safetensors_directory import dequantised, open_weights_directory
from megatron_selfdistill.model.model_values import architecture


def describe(path: Path) -> dict[str, str]:
    """Return the properties of a checkpoint by name: family, sizes, layout, iteration, parameters, vocabulary."""
    path = Path(path)
    if is_hugging_face(path):
        config = read_config(path)
        family = family_of(config)
        check_counts(family, config, dequantised(open_weights_directory(path)).tensors)
        lines = {"checkpoint": str(path), "format": "Hugging Face", "parameters": _parameters(sizes_of(path))}
        return lines | _describe_model(family.model_config(config), family)
    weights = open_weights(path)
    lines = {"checkpoint": f"{weights.path}", "format": weights.format, "iteration": str(weights.iteration)}
    sizes = weights.source.sizes()
    adapters = read_stored_adapters(weights.path)
    lines["parameters"] = f"{_parameters(sizes)}, {'padding included' if adapters is None else 'of the adapters alone'}"
    if adapters is not None:
        lines |= adapters.properties()
    if weights.args is None:
        return lines | {"arguments": "none are stored: the architecture is not known"}
    args, assets = weights.args, hf_assets_of(weights.path)
    model = architecture_from_args(args)
    if adapters is None:
        try:
            vocab_size = true_vocab_size(args, num_tokens(assets), weights.num_rows)
            lines["vocabulary"] = f"{vocab_size} true rows, {weights.num_rows} with padding"
        except CheckpointError as error:
            vocab_size = weights.num_rows
            lines["vocabulary"] = str(error)
        model = replace(model, vocab_size=vocab_size)
    lines["written by"] = " x ".join(f"{axis} {getattr(args, name, None) or 1}" for axis, name in _LAYOUT.items())
    return lines | _describe_model(model)


def true_vocab_size(args: argparse.Namespace | None, tokenizer_size: int | None, num_rows: int) -> int:
    """Return the number of rows of embedding and output layer without padding.

    The number comes from the stored arguments, else from the tokenizer of the checkpoint, else from the rows on disk.
    A model may have more rows than its tokenizer has tokens, but neither fewer rows nor more rows than are on disk.

    Raises: CheckpointError with all three numbers where they contradict each other, or where the function cannot decide
    whether rows are padding.
    """
    stored = stored_vocab_size(args) if args is not None else None
    padded = getattr(args, "padded_vocab_size", None) if args is not None else None
    chosen = next((size for size in (stored, tokenizer_size) if size is not None), num_rows)
    unclear = chosen > num_rows or (tokenizer_size or 0) > chosen
    unclear = unclear or (stored is not None and (padded or num_rows) < stored)
    if stored is None and tokenizer_size is not None and num_rows != tokenizer_size:
        multiple = getattr(args, "make_vocab_size_divisible_by", None) or 128
        multiple *= getattr(args, "tensor_model_parallel_size", None) or 1
        unclear = unclear or num_rows != math.ceil(tokenizer_size / multiple) * multiple
    if unclear:
        raise CheckpointError(
            f"the true vocabulary is unclear: the arguments say {stored} ({padded} with padding), the tokenizer has "
            f"{tokenizer_size} tokens, {num_rows} rows are on disk; set it with --vocab-size"
        )
    return chosen


def num_tokens(assets: Path | None) -> int | None:
    """Return the number of tokens of the tokenizer in ``assets``; None if there is no tokenizer."""
    if assets is None or not any((assets / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    if (assets / "tokenizer.json").is_file():
        content = json.loads((assets / "tokenizer.json").read_text())
        vocabulary = content.get("model", {}).get("vocab") or {}
        ids = [*vocabulary.values()] if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = [token["id"] for token in content.get("added_tokens", [])]
        return max([*ids, *added], default=-1) + 1 or None
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(assets / "tokenizer.model")).vocab_size()


_LAYOUT = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "EP": "expert_model_parallel_size",
}


def sizes_of(path: Path) -> Mapping[torch.dtype, int]:
    """Return the number of elements of the weights in a checkpoint or a Hugging Face directory by type."""
    if not is_hugging_face(path):
        return open_weights(path).source.sizes()
    sizes: Counter[torch.dtype] = Counter()
    for tensor in dequantised(open_weights_directory(path)).tensors.values():
        sizes[tensor.dtype] += math.prod(tensor.shape)
    return sizes


def _describe_model(model: ModelConfig, family: Family | None = None) -> dict[str, str]:
    """Return the family, and every value of the `architecture` that is set, by Megatron's names."""
    try:
        name = (family or family_of_model(model)).architecture
    except ConfigError as error:
        name = f"none that Hugging Face has ({error})"
    values = {key: value for key, value in architecture(model).items() if value not in (None, False)}
    return {"family": name, **{key: str(value) for key, value in values.items()}}


def _parameters(sizes: Mapping[torch.dtype, int]) -> str:
    kinds = ", ".join(f"{count:,} {str(dtype).removeprefix('torch.')}" for dtype, count in sizes.items())
    return f"{sum(sizes.values()):,} ({kinds})"
