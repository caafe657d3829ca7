# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Convert checkpoints of adapters to directories of the library PEFT and back.

A directory has ``adapter_config.json`` and ``adapter_model.safetensors`` with the factors of each module, named as in
`model.hf.adapter_rules`.  PEFT gives each module its own A, whereas the modules that Megatron fuses into one linear
layer (q, k, v; gate, up) share one: out, each of them gets the shared A; in, different A are stacked.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_selfdistill.adapters import ADAPTER_SUFFIX
from megatron_selfdistill.adapters.stored_adapters import (
    NAME,
    PEFT_CONFIG,
    StoredAdapters,
    read_stored_adapters,
    require_adapters,
)
from megatron_selfdistill.checkpoint.formats import manifest
from megatron_selfdistill.checkpoint.formats.directory import hf_assets_of
from megatron_selfdistill.checkpoint.formats.stored_model import architecture_from_args
from megatron_selfdistill.checkpoint.formats.weights_digest import base_digest
from megatron_selfdistill.config.schema.adapter_config import AdapterConfig
from megatron_selfdistill.data.records import from_json
from megatron_selfdistill.errors import CheckpointError, ConfigError, first_few
from megatron_selfdistill.interop.full_weights import Weights, open_weights, verify_checksums
from megatron_selfdistill.interop.hf.adapter_rules import PEFT_PREFIX, adapter_rules
from megatron_selfdistill.interop.hf.mapping import family_of, family_of_model
from megatron_selfdistill.interop.hf.rules import Rule, stack_shapes
from megatron_selfdistill.interop.hf_files import contained, read_config
from megatron_selfdistill.interop.new_directory import created, require_free
from megatron_selfdistill.interop.release import Progress, write_release
from megatron_selfdistill.interop.torch_dist_tensors import Piece

CONFIG, WEIGHTS = PEFT_CONFIG, "adapter_model.safetensors"
"""The names of PEFT's files."""
_WEIGHT = ".weight"
_LORA = (".lora_A.weight", ".lora_B.weight")


def megatron_to_peft(
    megatron: Path,
    out: Path,
    *,
    iteration: int | None = None,
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint of adapters at ``megatron`` as the directory ``out``, which PEFT loads; return ``out``.

    ``base_model``: the ``base_model_name_or_path`` of the directory, a name on the hub or a Hugging Face directory.
    ``dtype``: the type of the factors; null keeps their type.  Memory: all factors.

    Raises: CheckpointError or ConfigError before anything is written.
    """
    out, progress = Path(out), progress or Progress()
    require_free(out)
    weights = open_weights(megatron, iteration)
    adapters = require_adapters(weights.path)
    verify_checksums(weights, progress.report)
    of_weights = weight_rules(weights)
    rules = adapter_rules(of_weights, adapters.settings)
    weights.check_shapes(rules)
    num_bytes = sum(math.prod(s) for rule in rules for s in rule.hf_shapes) * 4
    with created(out, num_bytes) as temporary:
        progress.start(num_bytes)
        tensors: dict[str, Tensor] = {}
        for rule in rules:
            for name, tensor in zip(rule.hf_names, rule.to_hf(weights.read(rule)), strict=True):
                tensors[name] = tensor.to(dtype or tensor.dtype).clone().contiguous()
                progress.advance(tensor.numel() * 4)
        save_file(tensors, temporary / WEIGHTS, {"format": "pt"})
        modules = _modules(rules, ".lora_A.weight")
        config = peft_config(adapters.settings, base_model) | _targets(modules, of_weights)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in (WEIGHTS, CONFIG):
            manifest.sync(temporary / name)
    return out


def peft_to_megatron(
    peft: Path, base: Path, out: Path, *, dtype: torch.dtype | None = None, progress: Progress | None = None
) -> Path:
    """Write the directory ``peft`` of PEFT as a checkpoint of adapters on ``base``; return ``out/release``.

    ``base``: the Megatron checkpoint of the model to which the adapters belong.  ``dtype``: the type of the factors;
    null keeps their type.
    Modules that Megatron fuses into one layer share one A: equal A stay one, so that our own directories come back bit
    for bit; different A are stacked, with B in blocks, which is exact and has the sum of their ranks.  All layers then
    get the largest rank, by rows and columns of zeros.  The scale stays what it was.  Memory: all factors, twice.

    Raises: CheckpointError or ConfigError before anything is written.
    """
    peft, out, progress = Path(peft), Path(out), progress or Progress()
    require_free(out)
    config, tensors = read_peft(peft, progress)
    if read_stored_adapters(base) is not None:
        raise CheckpointError(f"{base} holds adapters alone, expected the full weights below the adapters of {peft}")
    weights = open_weights(base)
    layers = _layers(peft, weight_rules(weights), tensors)
    rank = max(a.shape[0] for _, _, (a, _) in layers)
    ratio = rank / config["r"]
    alpha = config["lora_alpha"] * (math.sqrt(ratio) if config["use_rslora"] else ratio)
    if rank != config["r"]:
        progress.report(f"rank {config['r']} becomes {rank}: fused layers stack the factors A of their modules")
    settings = AdapterConfig(
        rank=rank,
        alpha=config["lora_alpha"] if rank == config["r"] else alpha,
        rank_stabilised=config["use_rslora"],
        layers=list(dict.fromkeys(_linear_of(rule) for rule, _, _ in layers)),
    )
    pieces = _pieces(layers, rank, dtype)
    description = StoredAdapters(out / "release", settings, base_digest(base), Path(base).absolute())
    texts, assets = {NAME: description.text()}, hf_assets_of(weights.path)
    return write_release(out, pieces, weights.args, assets=assets, texts=texts, progress=progress)


def require_fit(peft: Path, base: Path) -> None:
    """Raise CheckpointError unless ``peft`` holds factors of the layers of ``base``, with their shapes."""
    _layers(peft, weight_rules(open_weights(base)), read_peft(peft, Progress())[1])


def read_peft(peft: Path, progress: Progress) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the settings (r, lora_alpha, use_rslora) and the factors by name of a directory of PEFT.

    Raises: CheckpointError for missing files, and for adapters that are no plain LoRA with one rank and scale.
    """
    try:
        config: Any = from_json(contained(peft, CONFIG).read_bytes())
        tensors = load_file(contained(peft, WEIGHTS))
        found = {"r": int(config["r"]), "lora_alpha": float(config["lora_alpha"])}
        for key, (allowed, why) in _PLAIN.items():
            if config.get(key) not in allowed:
                raise ValueError(f"{CONFIG} has {key}={config[key]!r}: {why}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        expected = f"expected {CONFIG} and {WEIGHTS} of PEFT"
        raise CheckpointError(f"{peft} cannot be read, {expected} ({type(error).__name__}: {error})") from None
    if unknown := [name for name in tensors if not name.endswith(_LORA)]:
        raise CheckpointError(f"{peft} has tensors that are no factors of LoRA: {first_few(unknown, ', ')}")
    if config.get("lora_dropout"):
        progress.report(f"lora_dropout={config['lora_dropout']} is left out: adapters are trained without dropout here")
    ranks = {a.shape[0] if a.dim() else 0 for name, a in tensors.items() if name.endswith(_LORA[0])}
    if ranks != {found["r"]}:
        raise CheckpointError(f"{peft} has factors of the ranks {sorted(ranks)}, expected r={found['r']} alone")
    return {**found, "use_rslora": bool(config.get("use_rslora"))}, tensors


_ONE_RANK = "one checkpoint has one rank and one scale; train or save the adapters with one"
_PLAIN: dict[str, tuple[Sequence[Any], str]] = {
    "peft_type": (("LORA",), "only LoRA can be read"),
    "use_rslora": ((True, False, None), "expected true or false"),
    "use_dora": ((False, None), "DoRA scales weights, which adapters here do not; merge it into its base with PEFT"),
    "bias": (("none", None), "adapters here have no biases; merge it into its base with PEFT"),
    "lora_bias": ((False, None), "adapters here have no biases; merge it into its base with PEFT"),
    "modules_to_save": ((None, []), "it trains whole modules, which adapters here do not; merge it with PEFT"),
    "trainable_token_indices": ((None, [], {}), "it trains embeddings, which stay frozen here; merge it with PEFT"),
    "rank_pattern": ((None, {}), _ONE_RANK),
    "alpha_pattern": ((None, {}), _ONE_RANK),
    "fan_in_fan_out": ((False, None), "its weights are transposed"),
    "init_lora_weights": (
        (True, False, None, "gaussian", "eva", "orthogonal"),
        "it changes the base; save it with PEFT's path_initial_model_for_weight_conversion",
    ),
}
"""Key of adapter_config.json -> the values of plain LoRA, and the reason for which others are refused."""


def _layers(
    peft: Path, rules: Sequence[Rule], tensors: Mapping[str, Tensor]
) -> list[tuple[Rule, Rule, tuple[Tensor, Tensor]]]:
    """Return the rules of A and B, for rank 1, and the factors of each linear layer that PEFT's tensors adapt.

    Raises: CheckpointError for tensors of other modules, and for layers without adapters among those that have them.
    """
    names = {rule.megatron.key.split(".")[-2] for rule in rules if rule.megatron.key.endswith(_WEIGHT)}
    linears = [name for name in names if name.startswith("linear_")]
    probes = adapter_rules(rules, AdapterConfig(rank=1, layers=linears))
    unused = dict.fromkeys(tensors)
    found, lacking = [], []
    for rule_a, rule_b in zip(probes[::2], probes[1::2], strict=True):
        pairs = []
        for a_name, b_name in zip(rule_a.hf_names, rule_b.hf_names, strict=True):
            pair = (tensors.get(a_name), tensors.get(b_name))
            pairs.append(None if pair[0] is None or pair[1] is None else (pair[0], pair[1]))
            if pairs[-1] is not None:
                unused.pop(a_name)
                unused.pop(b_name)
        if any(pair is not None for pair in pairs):
            found.append((rule_a, rule_b, fused(rule_a, rule_b, pairs)))
        else:
            lacking.append(rule_a)
    if unused:
        raise CheckpointError(
            f"{peft} has factors of modules without adapters here, or one factor alone: {first_few(list(unused), ', ')}"
        )
    adapted = {_linear_of(rule) for rule, _, _ in found}
    if part := [rule for rule in lacking if _linear_of(rule) in adapted]:
        raise CheckpointError(
            f"{peft} has no factors of {first_few(list(part[0].hf_names), ', ')}, expected adapters on every layer"
        )
    return found


def fused(rule_a: Rule, rule_b: Rule, pairs: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    """Return A [R, in] and B [out, R] of a linear layer from the factors of its modules; None has no adapter.

    R is the sum of the ranks of the different A.  B A is, in the rows of each module, exactly its own product.
    Raises: CheckpointError for factors of wrong shapes.
    """
    distinct: list[Tensor] = []
    for pair, a_name, b_name, shape in zip(pairs, rule_a.hf_names, rule_b.hf_names, rule_b.hf_shapes, strict=True):
        if pair is None:
            continue
        a, b = pair
        for name, tensor, wanted in ((a_name, a, (a.shape[0], rule_a.shape[1])), (b_name, b, (shape[0], a.shape[0]))):
            if tuple(tensor.shape) != wanted:
                raise CheckpointError(f"{name} has shape {list(tensor.shape)}, expected {list(wanted)}")
        if not any(torch.equal(a, other) for other in distinct):
            distinct.append(a)
    starts = [0, *itertools.accumulate(a.shape[0] for a in distinct)]
    columns = []
    for pair, shape in zip(pairs, rule_b.hf_shapes, strict=True):
        whole = distinct[0].new_zeros(shape[0], starts[-1])
        if pair is not None:
            place = next(i for i, a in enumerate(distinct) if torch.equal(a, pair[0]))
            whole[:, starts[place] : starts[place + 1]] = pair[1]
        columns.append(whole)
    return torch.cat(distinct), rule_b.arrangement.join(tuple(columns))


def _linear_of(rule: Rule) -> str:
    return rule.megatron.key.split(".")[-2].removesuffix(ADAPTER_SUFFIX)


def _pieces(
    layers: Sequence[tuple[Rule, Rule, tuple[Tensor, Tensor]]], rank: int, dtype: torch.dtype | None
) -> list[Piece]:
    """Return the pieces of the checkpoint; all factors get ``rank`` by rows of A and columns of B of zeros."""
    stacks = stack_shapes(rule.megatron for rule_a, rule_b, _ in layers for rule in (rule_a, rule_b))
    kind = dtype or functools.reduce(torch.promote_types, (a.dtype for _, _, (a, _) in layers))
    pieces = []
    for rule_a, rule_b, (a, b) in layers:
        more = rank - a.shape[0]
        padded = (torch.nn.functional.pad(a, (0, 0, 0, more)), torch.nn.functional.pad(b, (0, more)))
        for rule, factor in zip((rule_a, rule_b), padded, strict=True):
            key, index = rule.megatron.key, rule.megatron.index
            sizes = (*(1 for _ in index), *factor.shape)
            made = factor.to(kind).reshape(sizes)
            pieces.append(Piece(key, stacks[key] + tuple(factor.shape), (*index, 0, 0), sizes, kind, lambda t=made: t))  # type: ignore[misc]
    return pieces


def weight_rules(weights: Weights) -> list[Rule]:
    """Return the rules of the model of ``weights``, a checkpoint that may lack the weights themselves.

    Raises: CheckpointError or ConfigError for a model that no family of transformers is.
    """
    if weights.args is None:
        raise CheckpointError(f"{weights.path} stores no arguments, from which the names of the modules follow")
    model = replace(architecture_from_args(weights.args), num_passthrough_mtp_layers=0)
    model = replace(model, vocab_size=model.vocab_size or 1)  # no factor depends on it
    assets = hf_assets_of(weights.path)
    family = family_of(read_config(assets)) if assets is not None else family_of_model(model)
    if family.text_config is not None:
        raise ConfigError(f"the names of PEFT for {family.architecture} depend on the version of transformers")
    return family.rules(model)


def peft_config(settings: AdapterConfig, base_model: str | None) -> dict[str, Any]:
    """Return the contents of PEFT's adapter_config.json, except for the modules."""
    alpha = settings.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": settings.rank_stabilised,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _modules(rules: Sequence[Rule], ending: str) -> list[str]:
    names = (name for rule in rules for name in rule.hf_names if name.endswith(ending))
    return [name.removesuffix(ending).removeprefix(PEFT_PREFIX) for name in names]


def _targets(modules: Sequence[str], of_weights: Sequence[Rule]) -> dict[str, list[str]]:
    """Return the keys of adapter_config.json that name exactly ``modules``: by their last parts where these suffice.

    In a mixture of experts, PEFT takes the names of the projections of an MLP for those of routed experts, whatever
    stands before them; such modules are therefore named by their weights.
    """
    last = {module.rpartition(".")[2] for module in modules}
    matrices = [rule for rule in of_weights if len(rule.shape) == 2 and not rule.vocabulary]
    meant = {module for module in _modules(matrices, _WEIGHT) if module.rpartition(".")[2] in last}
    if meant == set(modules):
        return {"target_modules": sorted(last)}
    routed = {name.rpartition(".")[2] for name in _modules(matrices, _WEIGHT) if ".experts." in name}
    by_weight = [f"{module}{_WEIGHT}" for module in modules if module.rpartition(".")[2] in routed]
    return {
        "target_modules": [module for module in modules if module.rpartition(".")[2] not in routed],
        **({"target_parameters": by_weight} if by_weight else {}),
    }
