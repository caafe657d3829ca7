# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Compare the logits of a converted Hugging Face model in any layout with transformers', in float32 and bf16.

The tensors of an export from the layout equal the original tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hf_models
import models
import pytest
import torch
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.config import OptimizerConfig
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.interop.export import Exporter
from megatron_selfdistill.interop.hf.rules import Rule
from megatron_selfdistill.model import architecture

KINDS = list(hf_models.CONFIGS)
EXPERTS = tuple(kind for kind, (_, arguments) in hf_models.CONFIGS.items() if "num_experts_per_tok" in arguments)
ROTATED = ("qwen3", "llama_linear", "qwen3_yarn", "glm4_moe")
"""One kind for each form of the rotary positions, which context parallelism cuts."""
UNCUT_EXPERTS = ("gpt_oss",)  # with biases
# Each a multiple of 4 for CP2, so that their total is even for sequence parallelism; longer than YaRN's first length.
SEQUENCES = [
    torch.randint(hf_models.VOCAB_SIZE, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (24, 40)
]
LAYOUTS: dict[str, tuple[dict[str, int], int, Sequence[str]]] = {
    "TP1": ({}, 1, KINDS),
    "TP2": ({"tp": 2}, 2, KINDS),
    "PP2xVPP2": ({"pp": 2, "vpp": 2}, 2, KINDS),
    "TP2xPP2": ({"tp": 2, "pp": 2}, 4, KINDS),
    "CP2": ({"cp": 2}, 2, ROTATED),
    "EP2": ({"ep": 2}, 2, EXPERTS),
    "EP2xPP2": ({"ep": 2, "pp": 2}, 4, EXPERTS),
    "TP2xEP2": ({"tp": 2, "ep": 2}, 4, EXPERTS),
    "TP2xEP2, ETP1": ({"tp": 2, "ep": 2, "etp": 1}, 2, EXPERTS),
}
"""Layout -> its sizes, its number of ranks, and the kinds that it cuts."""
PRECISIONS = ("fp32", "bf16")
FORMS = (
    *("llama2", "qwen2", "qwen3_yarn", "mistral_window", "phi3", "deepseek_v3", "glm4_moe", "qwen2_moe", "olmoe"),
    *("qwen3_next", "gpt_oss"),
)
"""Kinds that are cut in different ways; test_hf_mapping.py compares every kind on one rank."""
QUICK = ("llama2", "qwen3_yarn", "mistral_window", "phi3", "deepseek_v3", "glm4_moe", "gpt_oss", "qwen3_next")
CUT_ONCE = ("TP1", "TP2", "PP2xVPP2", "CP2", "EP2")
"""Layouts that cut along one axis, in which every kind is compared; those of two axes compare each of `FORMS`."""


def is_compared(layout: str, kind: str, precision: str) -> bool:
    """Return whether a test loads the kind in the layout.

    The precision does not change how a kind is cut, so every kind has bf16 on one rank, and each of `FORMS` in a cut.
    """
    if kind not in LAYOUTS[layout][2]:
        return False
    if precision == "bf16":
        return layout == "TP1" or (kind in FORMS and layout == ("EP2" if kind in EXPERTS else "TP2"))
    return layout in CUT_ONCE or kind in FORMS


def load(directory: Path, layout: str, kind: str, precision: str) -> tuple[Tensor | None, list[str]]:
    """Return the logits, on the last stage, and the tensors that are not exported as they are in the directory."""
    sizes = {**LAYOUTS[layout][0]} | ({"etp": 1} if kind in UNCUT_EXPERTS else {})
    sequence_parallel = "tp" in sizes and kind in (*EXPERTS, "qwen3")  # experts must
    _, model, rules, tensors = hf_models.read(directory)
    with pytest.MonkeyPatch.context() as patch:
        # Latent attention under TP is refused for its gradients; its forward is right, and converted alike.
        patch.setattr(architecture, "refuse_known_faults", lambda config, **_: None)
        cuts, optimizer = models.parallel(**sizes, sp=sequence_parallel), OptimizerConfig(precision=precision)
        chunks, grid = models.build(model, cuts, optimizer=optimizer)
    hf_models.fill(chunks, rules, tensors)
    logits = hf_models.logits_through_the_pipeline(chunks, grid, SEQUENCES)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return logits, changed_by_export(chunks, grid, rules, tensors, dtype)


def changed_by_export(
    chunks: Sequence[torch.nn.Module], grid: RankGrid, rules: Sequence[Rule], tensors: Mapping[str, Tensor], dtype: Any
) -> list[str]:
    expected = {
        name: tensors[name].to(torch.float32 if rule.float32 else dtype)
        for rule in rules
        if not rule.is_passthrough
        for name in rule.hf_names
    }
    changed = []
    for bucket in Exporter(chunks, grid, rules, bucket_bytes=30_000).stream():
        for name, tensor in bucket:
            wanted = expected.pop(name)
            if tensor.dtype != wanted.dtype or not torch.equal(tensor, wanted):
                changed.append(name)
    return changed + list(expected)


def _rounded(kind: str, model: Any) -> Any:
    """Return the model in bf16, with its expert biases in float32, as transformers keeps them."""
    biases = {name: b.clone() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    model = model.to(torch.bfloat16)
    if kind in EXPERTS:
        model.set_experts_implementation("eager")  # the grouped kernel wants widths that are multiples of 8
    for name, bias in biases.items():
        model.get_buffer(name).data = bias
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[[str], tuple[Path, dict[str, Tensor]]]:
    """Return a function of a kind that returns its directory and transformers' logits, made once.

    ``fp32`` and ``rounded`` are in float32, the latter of weights rounded to bf16, which give ``bf16`` in bf16.
    """

    @functools.cache
    def make(kind: str) -> tuple[Path, dict[str, Tensor]]:
        model = hf_models.write(kind, directory := tmp_path_factory.mktemp(kind))
        logits = {"fp32": hf_models.hf_logits(model, SEQUENCES)}
        logits["bf16"] = hf_models.hf_logits(_rounded(kind, model), SEQUENCES)
        return directory, logits | {"rounded": hf_models.hf_logits(model.float(), SEQUENCES)}

    return make


@combinations(
    layout=list(LAYOUTS),
    kind=KINDS,
    precision=PRECISIONS,
    valid=is_compared,
    quick={"layout": ["TP2", "PP2xVPP2", "CP2", "EP2"], "kind": QUICK},
    strength=1,
)
def test_logits_are_those_of_transformers_and_the_live_model_is_exported_as_it_came(
    ranks, written, layout, kind, precision
):
    """In bf16 the logits are as near to exact ones as those of transformers, in the median of the farthest rank.

    A mean would count the few tokens whose rounded router chooses another expert.
    """
    directory, expected = written(kind)
    per_rank = ranks.run(load, directory, layout, kind, precision, world_size=LAYOUTS[layout][1])
    logits = torch.stack([logits for logits, _ in per_rank if logits is not None])
    assert expected["fp32"].std() > 1
    if precision == "fp32":
        assert (logits - expected["fp32"]).abs().max() <= hf_models.logits_bound(kind)
    else:
        mine = (logits - expected["rounded"]).abs().flatten(1).median(dim=1).values.max()
        assert 0 < mine <= 1.3 * (expected["bf16"] - expected["rounded"]).abs().median()
    assert [name for _, changed in per_rank for name in changed] == []
