# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Convert a Hugging Face directory into a Megatron checkpoint and back, one tensor at a time.

The converter checks everything before it writes anything, and renames the output directory to its final name only when
the output is complete.  One process without a process group converts; Megatron shards the result when it loads it.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.adapters.stored_adapters import read_stored_adapters
from megatron_selfdistill.checkpoint.formats import manifest
from megatron_selfdistill.checkpoint.formats.directory import hf_assets_of
from megatron_selfdistill.checkpoint.formats.megatron_args import model_args
from megatron_selfdistill.checkpoint.formats.model_tensors import PASSTHROUGH, names
from megatron_selfdistill.checkpoint.formats.saved_run import CONFIGURATION, RUN_TEMPLATE, read_saved_run
from megatron_selfdistill.checkpoint.formats.stored_model import architecture_from_args
from megatron_selfdistill.config import ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
from megatron_selfdistill.errors import CheckpointError, first_few
from megatron_selfdistill.interop.describe import num_tokens, true_vocab_size
from megatron_selfdistill.interop.full_weights import Weights, open_weights, verify_checksums
from megatron_selfdistill.interop.hf.family import Family
from megatron_selfdistill.interop.hf.mapping import (
    check_counts,
    check_names,
    check_shapes,
    family_of,
    family_of_model,
    text_config,
    tied_output_layer,
)
from megatron_selfdistill.interop.hf.rules import (
    MegatronSlice,
    Rows,
    Rule,
    dequantise_blocks,
    passthrough_layer,
    rows,
    stack_shapes,
)
from megatron_selfdistill.interop.hf_files import copy_hf_assets, read_config
from megatron_selfdistill.interop.new_directory import created, require_free
from megatron_selfdistill.interop.release import Progress, hf_assets_bytes, write_release
from megatron_selfdistill.interop.safetensors_directory import (
    SafetensorsWriter,
    WeightsDirectory,
    dequantised,
    open_weights_directory,
)
from megatron_selfdistill.interop.torch_dist_tensors import Piece
from megatron_selfdistill.model.architecture import padded_vocab_size, transformer_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}
_MTP_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")


def hf_to_megatron(hf: Path, out: Path, *, dtype: torch.dtype | None = None, progress: Progress | None = None) -> Path:
    """Write the model in the Hugging Face directory ``hf`` as a torch_dist checkpoint; return ``out/release``.

    ``dtype``: the type of all weights, except the weights that Megatron keeps in float32.  Null keeps the type of each
    weight; FP8 becomes bf16, and tensors that are joined take the widest of their types, which ``progress`` reports.
    Memory: the tensors of one rule, and the result of the rule where it rearranges the tensors.

    Raises: CheckpointError or ConfigError before the function writes anything; OSError while the function writes.
    After an error the function removes its output.
    """
    hf, out, progress = Path(hf), Path(out), progress or Progress()
    require_free(out)
    model, rules, tensors = _read_hf(hf)
    block = (read_config(hf).get("quantization_config") or {}).get("weight_block_size")
    pieces = _pieces(model, rules, _HFReader(tensors, block, dtype), progress)
    args = converted_args(model, _main_dtype((piece.dtype, piece.num_bytes) for piece in pieces))
    return write_release(out, pieces, args, empty_objects=_extra_states(rules), assets=hf, progress=progress)


def megatron_to_hf(
    megatron: Path,
    out: Path,
    *,
    iteration: int | None = None,
    hf_config: Path | None = None,
    dtype: torch.dtype | None = None,
    vocab_size: int | None = None,
    max_shard_size: str | int = "5GB",
    progress: Progress | None = None,
) -> Path:
    """Write the Megatron checkpoint at ``megatron``, torch_dist or legacy, as the Hugging Face directory ``out``.

    ``hf_config``: a directory with the original config.json and tokenizer files.  Null takes the files in the
    checkpoint; without such files the function makes a config.json from the stored arguments.  ``dtype``: the type of
    all floating-point weights; null keeps the type of each weight.  ``vocab_size``: the size of the true vocabulary,
    where it does not follow from the checkpoint (`true_vocab_size`).  ``max_shard_size``: the most bytes of the tensors
    of a file, or a text such as 500MB.
    Memory: one full tensor of Megatron, its parts where the rule rearranges the tensor, and one shard.

    Raises: CheckpointError or ConfigError before the function writes anything; OSError while the function writes.
    """
    out, progress = Path(out), progress or Progress()
    require_free(out)
    weights = open_weights(megatron, iteration)
    if read_stored_adapters(weights.path) is not None:
        raise CheckpointError(
            f"{weights.path} holds adapters alone, expected full weights: convert it with megatron-to-peft, and merge "
            "the result with merge_and_unload() of PEFT"
        )
    verify_checksums(weights, progress.report)
    assets = Path(hf_config) if hf_config is not None else hf_assets_of(weights.path)
    original = read_config(assets) if assets is not None and (hf_config or (assets / "config.json").is_file()) else None
    model, family = _model_and_family(weights, original, assets, vocab_size, progress)
    rules = [rule for rule in family.rules(model) if not rule.may_be_absent or weights.place(rule)]
    carried = carried_rules(family, weights.passthrough)
    rules += carried
    weights.check_shapes(rules)
    read = dict.fromkeys(rules, weights.read)
    kept = {rule: dtype if dtype and not rule.float32 else weights.dtype(rule) for rule in rules}
    if family.carried and not carried:
        directory, carried = _carried_by_hf(weights, family, hf_config)
        read |= {rule: lambda rule: directory.read(rule.hf_names[0]) for rule in carried}
        kept |= {rule: dtype or directory.tensors[rule.hf_names[0]].dtype for rule in carried}
        rules += carried
    main = _main_dtype((kept[rule], math.prod(rule.shape) * kept[rule].itemsize) for rule in rules)
    config = _config(family, model, str(main).removeprefix("torch."), original, weights)
    tensors = [
        (name, kept[rule], shape) for rule in rules for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True)
    ]
    num_bytes = sum(math.prod(shape) * kind.itemsize for _, kind, shape in tensors)
    with created(out, num_bytes + (hf_assets_bytes(assets) if assets is not None else 0)) as temporary:
        progress.start(num_bytes)
        writer = SafetensorsWriter(temporary, tensors, max_shard_size)
        for rule in rules:
            parts = list(rule.to_hf(read[rule](rule)))
            for name in rule.hf_names:
                part = parts.pop(0).to(kept[rule])
                writer.write(name, part)
                progress.advance(part.nbytes)
        writer.close()
        if assets is not None:
            copy_hf_assets(assets, temporary, progress.report)
        write_prompt_settings(weights.path, temporary, progress.report)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        manifest.sync(temporary / "config.json")
    return out


def write_prompt_settings(checkpoint: Path, out: Path, report: Callable[[str], None]) -> None:
    """Write the chat template behind which a run trained into ``out``, a Hugging Face directory.

    ``report`` gets a line for the template, and one for the keys that shaped the run's prompts and have no place in
    such a directory.  A checkpoint that no run has saved changes nothing.
    """
    template = checkpoint.parent.parent / RUN_TEMPLATE
    try:
        data = read_saved_run(checkpoint).trainer_state.get(CONFIGURATION, {}).get("data", {})
    except CheckpointError:
        return
    if data.get("chat_template") is not None and template.is_file():
        (out / RUN_TEMPLATE).write_bytes(template.read_bytes())
        report(f"{RUN_TEMPLATE} is the chat template behind which the run trained (data.chat_template)")
    elif data.get("chat_template") is not None:
        report(f"warning: the run trained behind another chat template (data.chat_template), and {template} is missing")
    view = data.get("views", {}).get("student", {})
    wording = data.get("student_template")
    shaped = {
        "data.system_prompt": data.get("system_prompt"),
        "data.chat_template_kwargs": data.get("chat_template_kwargs"),
        "data.student_template": None if wording == "{problem}" else wording,
        **{f"data.views.student.{name}": value for name, value in view.items()},
    }
    if named := [f"{key}={value}" for key, value in shaped.items() if value]:
        report(
            f"no file can hold what else shaped the prompts of the run; repeat it where you serve: {'; '.join(named)}"
        )


def _main_dtype(sizes: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """Return the type that has most of the bytes of a model."""
    total: dict[torch.dtype, int] = {}
    for dtype, num_bytes in sizes:
        total[dtype] = total.get(dtype, 0) + num_bytes
    return max(total, key=lambda dtype: total[dtype])


def _read_hf(hf: Path) -> tuple[ModelConfig, list[Rule], WeightsDirectory]:
    """Return the model of a Hugging Face directory, the rules of its tensors, and the tensors, after all checks."""
    config = read_config(hf)
    family = family_of(config)
    tensors = dequantised(open_weights_directory(hf))
    check_counts(family, config, tensors.tensors)
    model = family.model_config(config)
    shapes = {name: tensor.shape for name, tensor in tensors.tensors.items()}
    carried = carried_rules(family, shapes)
    rules = check_names([*family.rules(model), *carried], shapes)
    check_shapes(rules, shapes)
    layers = {passthrough_layer(rule.hf_names[0]) for rule in rules if rule.is_passthrough and rule not in carried}
    model = replace(model, num_passthrough_mtp_layers=len(layers))
    embedding = rules[0].hf_names[0]
    head = tied_output_layer(embedding)
    tied = model.share_embeddings_and_output_weights and head in shapes
    if tied and not torch.equal(tensors.read(head), tensors.read(embedding)):
        raise CheckpointError(f"{hf} ties its embeddings (tie_word_embeddings), but {head} differs from {embedding}")
    return model, rules, tensors


class _HFReader:
    """A reader of full, dequantised tensors of a Hugging Face directory, in the types of the checkpoint."""

    def __init__(self, tensors: WeightsDirectory, block: Sequence[int] | None, dtype: torch.dtype | None) -> None:
        self.tensors, self._block, self._dtype = tensors, block, dtype

    def dtype(self, rule: Rule, name: str) -> torch.dtype:
        """Return the type in which the checkpoint stores the tensor ``name`` of ``rule``."""
        found = self.tensors.tensors[name].dtype
        if self._dtype is not None:
            return torch.float32 if rule.float32 else self._dtype
        return torch.bfloat16 if found in _FLOAT8 else found

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return the tensor ``name`` in the type ``dtype``."""
        tensor = self.tensors.read(name)
        if tensor.dtype in _FLOAT8:
            scales = f"{name}_scale_inv"
            if scales not in self.tensors.tensors or self._block is None:
                raise CheckpointError(f"{name} is {tensor.dtype}, but {scales} or quantization_config is missing")
            tensor = dequantise_blocks(tensor, self.tensors.read(scales), self._block)
        return tensor.to(dtype)


def _pieces(model: ModelConfig, rules: list[Rule], reader: _HFReader, progress: Progress) -> list[Piece]:
    """Return the pieces of the checkpoint, without reading tensors.

    ``progress`` receives a message where tensors of several types are stored under one key.
    """
    stacks = stack_shapes(rule.megatron for rule in rules)
    kept: dict[str, torch.dtype] = {}
    for rule in rules:
        key = rule.megatron.key
        for name in rule.hf_names:
            dtype = reader.dtype(rule, name)
            kept[key] = torch.promote_types(kept.get(key, dtype), dtype)  # one type for all layers of a key
    stored = {name: kept[rule.megatron.key] for rule in rules for name in rule.hf_names}
    widened = [name for rule in rules for name in rule.hf_names if reader.dtype(rule, name) != stored[name]]
    if widened:
        wide = str(stored[widened[0]]).removeprefix("torch.")
        progress.report(f"{first_few(widened, ', ')} become {wide}, like the other tensors of their keys")
    return [
        piece
        for rule in rules
        for piece in _pieces_of(rule, stacks[rule.megatron.key], kept[rule.megatron.key], model, reader)
    ]


def _extra_states(rules: list[Rule]) -> list[str]:
    """Return the keys under which Megatron looks for FP8 statistics of linear layers, norms and attention.

    The keys serve every layer spec.  Megatron's loader fails for a missing key, and accepts None as the statistics.
    """
    states: dict[MegatronSlice, None] = {}
    for rule in rules:
        module, _, name = rule.megatron.key.rpartition(".")
        if rule.is_passthrough or module.endswith(("word_embeddings", "output_layer", "router")):
            continue
        for expert in [()] if rule.num_experts is None else [(expert,) for expert in range(rule.num_experts)]:
            states[MegatronSlice(module, (*rule.megatron.index, *expert))] = None
        if name == "layer_norm_weight":  # the norm is a module of its own in the local spec
            others = (other.rpartition(".")[0] for other in names(rule.megatron.key))
            states |= {MegatronSlice(other, rule.megatron.index): None for other in others}
        if module.endswith("self_attention.linear_proj"):
            states[MegatronSlice(module.replace("linear_proj", "core_attention"), rule.megatron.index)] = None
    stacks = stack_shapes(states)
    found = ((state.key, state.index or (0,), stacks[state.key] or (1,)) for state in states)
    return [f"{key}._extra_state/shard_{'.'.join(map(str, i))}_{'.'.join(map(str, n))}" for key, i, n in found]


def converted_args(model: ModelConfig, dtype: torch.dtype) -> argparse.Namespace:
    """Return the arguments of Megatron-LM that describe ``model``; ``dtype`` is the type of its weights."""
    precision = "fp32" if dtype == torch.float32 else "bf16"
    config = transformer_config(model, ParallelConfig(), OptimizerConfig(precision=precision), ScheduleConfig())
    assert model.vocab_size is not None
    args = model_args(
        config,
        model,
        model,
        max_position_embeddings=model.max_position_embeddings,
        padded_vocab_size=padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by, 1),
        rope_scaling=model.rope_scaling_factor is not None,
        seq_len_interpolation_factor=model.seq_len_interpolation_factor,
    )
    args.params_dtype, args.bf16, args.fp16 = dtype, dtype == torch.bfloat16, dtype == torch.float16
    return args


def _pieces_of(
    rule: Rule, stacked: tuple[int, ...], dtype: torch.dtype, model: ModelConfig, reader: _HFReader
) -> Iterator[Piece]:
    key, index, leading = rule.megatron.key, rule.megatron.index, (1,) * len(rule.megatron.index)
    padded = rule.shape
    if rule.vocabulary:
        padded = (padded_vocab_size(rule.shape[0], model.make_vocab_size_divisible_by, 1), *rule.shape[1:])
    tail = (0,) * (len(padded) - 1)

    def piece(row: int, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Piece:
        sizes = leading + shape
        return Piece(key, stacked + padded, (*index, row, *tail), sizes, dtype, lambda: make().reshape(sizes))

    if isinstance(rule.arrangement, Rows):  # each tensor is a rectangle of its own, which is read alone
        row = 0
        for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True):
            yield piece(row, shape, functools.partial(reader.read, name, dtype))
            row += shape[0]
    else:
        yield piece(0, rule.shape, lambda: rule.to_megatron(*(reader.read(name, dtype) for name in rule.hf_names)))
    if padded != rule.shape:
        rest = (padded[0] - rule.shape[0], *padded[1:])
        yield piece(rule.shape[0], rest, lambda: torch.zeros(rest, dtype=dtype))


def _model_and_family(
    weights: Weights,
    original: Mapping[str, Any] | None,
    assets: Path | None,
    vocab_size: int | None,
    progress: Progress,
) -> tuple[ModelConfig, Family]:
    if weights.args is None and original is None:
        raise CheckpointError(f"{weights.path} stores no arguments: set --hf-config to a directory with config.json")
    if weights.args is not None:
        model = architecture_from_args(weights.args)
    else:
        model = family_of(original or {}).model_config(original or {})
    if vocab_size is None:
        # A config.json may count rows that belong to no token.
        described = text_config(original) if original is not None else {}
        known = max(described.get("vocab_size") or 0, num_tokens(assets) or 0)
        vocab_size = true_vocab_size(weights.args, known or None, weights.num_rows)
    elif vocab_size > weights.num_rows:
        raise CheckpointError(f"--vocab-size {vocab_size} exceeds the {weights.num_rows} rows on disk")
    progress.report(f"vocabulary: {vocab_size} of {weights.num_rows} rows on disk")
    model = replace(model, vocab_size=vocab_size)
    of_layers = [name for name in weights.passthrough if name.startswith(("model.layers.", "mtp."))]
    num_layers = len({passthrough_layer(name) for name in of_layers})
    if model.num_passthrough_mtp_layers != num_layers:
        progress.report(
            f"{model.num_passthrough_mtp_layers} multi-token-prediction layers of the original are not in it"
        )
        model = replace(model, num_passthrough_mtp_layers=num_layers)
    family = family_of(original) if original is not None else family_of_model(model)
    progress.report(f"{family.architecture}; {weights.format}; iteration {weights.iteration}")
    return model, family


def _config(
    family: Family, model: ModelConfig, dtype: str, original: Mapping[str, Any] | None, weights: Weights
) -> dict[str, Any]:
    """Return the config.json of the converted model: the original, if the original describes this model."""
    if original is None or family.model_config(original).num_passthrough_mtp_layers == model.num_passthrough_mtp_layers:
        return family.hf_config(model, dtype, original)
    counts = {name: model.num_passthrough_mtp_layers for name in _MTP_LAYERS if name in original} or {_MTP_LAYERS[0]: 0}
    config = family.hf_config(model, dtype, {**original, **counts})
    if getattr(weights.args, "num_passthrough_mtp_layers", None) == model.num_passthrough_mtp_layers:
        # The original directory had no such layers either, although its config.json counted them.
        config = {name: original.get(name, value) for name, value in config.items() if name in original}
        config |= {name: dtype for name in ("dtype", "torch_dtype") if name in config}
    return config


def carried_rules(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> list[Rule]:
    """Return one rule for each tensor that ``family`` carries along, from the shapes by Hugging Face names."""
    return [
        rows(MegatronSlice(PASSTHROUGH + name), {name: tuple(shape)})
        for name, shape in shapes.items()
        if family.carried and name.startswith(family.carried)
    ]


def _carried_by_hf(weights: Weights, family: Family, hf: Path | None) -> tuple[WeightsDirectory, list[Rule]]:
    """Return the Hugging Face directory ``hf`` and the rules of the tensors that ``family`` carries along from it.

    A converted checkpoint holds the carried tensors itself; a checkpoint of a run does not.
    """
    if hf is not None:
        directory = open_weights_directory(hf)
        if rules := carried_rules(family, {name: held.shape for name, held in directory.tensors.items()}):
            return directory, rules
    names = " and ".join(f"{prefix}*" for prefix in family.carried)
    raise CheckpointError(
        f"{weights.path} has no {names}: set --hf-config to the Hugging Face directory of the start, with its weights"
    )
