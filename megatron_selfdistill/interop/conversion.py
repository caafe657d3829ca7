# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Convert a Hugging Face directory into a Megatron checkpoint and back, one tensor at a time.

The converter checks everything before it writes anything, and renames the output directory to its final name only when
the output is complete.  One process without a process group converts; Megatron shards the result when it loads it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_selfdistill.checkpoint.formats import manifest
from megatron_selfdistill.checkpoint.formats.directory import hf_assets_of
from megatron_selfdistill.checkpoint.formats.model_tensors import PASSTHROUGH
from megatron_selfdistill.checkpoint.formats.saved_run import CONFIGURATION, RUN_TEMPLATE, read_saved_run
from megatron_selfdistill.checkpoint.formats.stored_model import architecture_from_args
from megatron_selfdistill.checkpoint.formats.tensor_names import names
from megatron_selfdistill.config import ModelConfig
from megatron_selfdistill.errors import CheckpointError, first_few
from megatron_selfdistill.interop.describe import FORMATS, num_tokens, true_vocab_size
from megatron_selfdistill.interop.full_weights import Weights
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
from megatron_selfdistill.interop.hf.rules import MegatronSlice, Rows, Rule, dequantise_blocks, passthrough_layer, rows
from megatron_selfdistill.interop.hf_files import copy_hf_assets, read_config
from megatron_selfdistill.interop.megatron_flags import converted_args
from megatron_selfdistill.interop.new_directory import created, require_free
from megatron_selfdistill.interop.release import Progress, hf_assets_bytes, write_release
from megatron_selfdistill.interop.safetensors_directory import (
    SafetensorsWriter,
    WeightsDirectory,
    dequantised,
    open_weights_directory,
)
from megatron_selfdistill.interop.torch_dist_tensors import Piece, read_ahead
from megatron_selfdistill.model.architecture import padded_vocab_size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}
_MTP_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")


def hf_to_megatron(
    hf: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Path:
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
    pieces = _pieces(model, rules, _HFReader(tensors, _block(hf), dtype), progress)
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
    max_shard_bytes: int = 5 * 10**9,
    base: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the Megatron checkpoint at ``megatron``, torch_dist or legacy, as the Hugging Face directory ``out``.

    Adapters are merged into their base (`merged_weights`); ``base``: the place of the base, where it has moved.

    ``hf_config``: a directory with the original config.json and tokenizer files.  Null takes the files in the
    checkpoint; without such files the function makes a config.json from the stored arguments.  ``dtype``: the type of
    all floating-point weights; null keeps the type of each weight.  ``vocab_size``: the size of the true vocabulary,
    where it does not follow from the checkpoint (`true_vocab_size`).
    Memory: one full tensor of Megatron, its parts where the rule rearranges the tensor, and one shard.

    Raises: CheckpointError or ConfigError before the function writes anything; OSError while the function writes.
    """
    # Only here: a package without the annex adapters converts in the other direction.
    from megatron_selfdistill.interop.merged_weights import MergedWeights, open_merged_weights

    out, progress = Path(out), progress or Progress()
    require_free(out)
    weights = open_merged_weights(megatron, iteration, base=base, dtype=dtype, report=progress.report)
    assets = Path(hf_config) if hf_config is not None else hf_assets_of(weights.path)
    original = read_config(assets) if assets is not None and (hf_config or (assets / "config.json").is_file()) else None
    model, family = _model_and_family(weights, original, assets, vocab_size, progress)
    rules = [rule for rule in family.rules(model) if not rule.may_be_absent or weights.holds(rule)]
    carried = CarriedWeights(weights, family, hf_config)
    carried.check_shapes(rules)
    rules += carried.rules
    kept = {rule: dtype if dtype and not rule.float32 else carried.dtype(rule) for rule in rules}
    main = _main_dtype((kept[rule], math.prod(rule.shape) * kept[rule].itemsize) for rule in rules)
    config = _config(family, model, str(main).removeprefix("torch."), original, weights)
    tensors = [
        (name, kept[rule], shape) for rule in rules for name, shape in zip(rule.hf_names, rule.hf_shapes, strict=True)
    ]
    num_bytes = sum(math.prod(shape) * kind.itemsize for _, kind, shape in tensors)
    with created(out, num_bytes + (hf_assets_bytes(assets) if assets is not None else 0)) as temporary:
        progress.start(num_bytes)
        _write_weights(SafetensorsWriter(temporary, tensors, max_shard_bytes), carried, kept, progress)
        if assets is not None:
            copy_hf_assets(assets, temporary, progress.report)
        write_prompt_settings(weights.path, temporary, progress.report)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        manifest.sync(temporary / "config.json")
    if isinstance(weights, MergedWeights):
        progress.report(str(weights.merge))
    return out


def _write_weights(
    writer: SafetensorsWriter,
    weights: CarriedWeights,
    dtypes: Mapping[Rule, torch.dtype],
    progress: Progress,
) -> None:
    """Write the tensors of all rules in the types ``dtypes``, and close the writer."""

    def parts_of(rule: Rule) -> list[Tensor]:
        return [part.to(dtypes[rule]) for part in rule.to_hf(weights.read(rule))]

    def rule_bytes(rule: Rule) -> int:
        return math.prod(rule.shape) * dtypes[rule].itemsize

    rules = list(dtypes)
    tensors_of_rules = read_ahead(rules, parts_of, rule_bytes)
    for rule in rules:
        parts = next(tensors_of_rules)
        for name in rule.hf_names:
            writer.write(name, parts[0])
            progress.advance(parts.pop(0).numel() * dtypes[rule].itemsize)
    writer.close()


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

    def __init__(self, tensors: WeightsDirectory, block: tuple[int, int] | None, dtype: torch.dtype | None) -> None:
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


def _block(hf: Path) -> tuple[int, int] | None:
    block = (read_config(hf).get("quantization_config") or {}).get("weight_block_size")
    return tuple(block) if block else None


def _pieces(model: ModelConfig, rules: list[Rule], reader: _HFReader, progress: Progress) -> list[Piece]:
    """Return the pieces of the checkpoint, without reading tensors.

    ``progress`` receives a message where tensors of several types are stored under one key.
    """
    depth: dict[str, tuple[int, ...]] = {}
    kept: dict[str, torch.dtype] = {}
    for rule in rules:
        key, index = rule.megatron.key, rule.megatron.index
        seen = depth.get(key, (0,) * len(index))
        depth[key] = tuple(max(a, b + 1) for a, b in zip(seen, index, strict=True))
        for name in rule.hf_names:
            dtype = reader.dtype(rule, name)
            kept[key] = torch.promote_types(kept.get(key, dtype), dtype)  # one type for all layers of a key
    widened = [name for rule in rules for name in rule.hf_names if reader.dtype(rule, name) != kept[rule.megatron.key]]
    if widened:
        wide = str(kept[next(rule.megatron.key for rule in rules if widened[0] in rule.hf_names)]).removeprefix(
            "torch."
        )
        progress.report(f"{first_few(widened, ', ')} become {wide}, like the other tensors of their keys")
    pieces: list[Piece] = []
    for rule in rules:
        pieces += _pieces_of(rule, depth[rule.megatron.key], kept[rule.megatron.key], model, reader)
    return pieces


def _extra_states(rules: list[Rule]) -> list[str]:
    """Return the keys under which Megatron looks for FP8 statistics of linear layers, norms and attention.

    The keys serve every layer spec.  Megatron's loader fails for a missing key, and accepts None as the statistics.
    """
    states: dict[tuple[str, tuple[int, ...]], None] = {}
    for rule in rules:
        module, _, name = rule.megatron.key.rpartition(".")
        if rule.is_passthrough or module.endswith(("word_embeddings", "output_layer", "router")):
            continue
        for expert in [()] if rule.num_experts is None else [(expert,) for expert in range(rule.num_experts)]:
            states[module, (*rule.megatron.index, *expert)] = None
        if name == "layer_norm_weight":  # the norm is a module of its own in the local spec
            states |= {(other.rpartition(".")[0], rule.megatron.index): None for other in names(rule.megatron.key)}
        if module.endswith("self_attention.linear_proj"):
            states[module.replace("linear_proj", "core_attention"), rule.megatron.index] = None
    shape: dict[str, tuple[int, ...]] = {}
    for module, index in states:
        seen = shape.get(module, (0,) * len(index))
        shape[module] = tuple(max(a, b + 1) for a, b in zip(seen, index, strict=True))
    return [
        f"{module}._extra_state/shard_{'.'.join(map(str, index or (0,)))}_{'.'.join(map(str, shape[module] or (1,)))}"
        for module, index in states
    ]


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
    """Return the model of a Megatron checkpoint, and its Hugging Face family."""
    if weights.args is None and original is None:
        raise CheckpointError(
            f"{weights.path} stores no arguments: set --hf-config to a directory with its config.json"
        )
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
    num_layers = weights.num_passthrough_layers
    if model.num_passthrough_mtp_layers != num_layers:
        progress.report(
            f"{model.num_passthrough_mtp_layers} multi-token-prediction layers of the original are not in it"
        )
        model = replace(model, num_passthrough_mtp_layers=num_layers)
    family = family_of(original) if original is not None else family_of_model(model)
    progress.report(f"{family.architecture}; {FORMATS[weights.format]}; iteration {weights.iteration}")
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


class CarriedWeights:
    """The weights of a model from a checkpoint, and the tensors that its family carries along.

    A converted checkpoint holds the carried tensors itself; a checkpoint of a run does not, and they come from the
    Hugging Face directory ``hf``.
    """

    def __init__(self, weights: Weights, family: Family, hf: Path | None) -> None:
        """Find the carried tensors; read none.

        Raises: CheckpointError where neither the checkpoint nor ``hf`` holds a tensor that the family carries.
        """
        self._weights = weights
        self._directory: WeightsDirectory | None = None
        self.rules = carried_rules(family, weights.passthrough)
        if not family.carried or self.rules:
            return
        found: list[Rule] = []
        if hf is not None:
            self._directory = open_weights_directory(hf)
            found = carried_rules(family, {name: held.shape for name, held in self._directory.tensors.items()})
        if not found:
            names = " and ".join(f"{prefix}*" for prefix in family.carried)
            raise CheckpointError(
                f"{weights.path} has no {names}, which {family.architecture} needs: set --hf-config to the Hugging "
                "Face directory from which the run began, with its weights"
            )
        self.rules = found

    def check_shapes(self, rules: Sequence[Rule]) -> None:
        """Raise CheckpointError unless the checkpoint matches ``rules`` and the carried tensors that it holds."""
        self._weights.check_shapes([*rules, *(self.rules if self._directory is None else ())])

    def dtype(self, rule: Rule) -> torch.dtype:
        """Return the type of the stored tensor of ``rule``."""
        if self._directory is not None and rule.is_passthrough and rule in self.rules:
            return self._directory.tensors[rule.hf_names[0]].dtype
        return self._weights.dtype(rule)

    def read(self, rule: Rule) -> Tensor:
        """Return the tensor of ``rule``, without padding."""
        if self._directory is not None and rule.is_passthrough and rule in self.rules:
            return self._directory.read(rule.hf_names[0])
        return self._weights.read(rule)
