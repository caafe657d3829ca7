# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Compare the logits of a converted Hugging Face model in any layout with transformers', in float32 and bf16.

The tensors of an export from the layout equal the original tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import hf_models
import models
import pytest
import torch
from layout_logits import logits_through_the_pipeline
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


def load(
    root: Path, layout: str, models_to_load: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], tuple[Tensor | None, list[str]]]:
    """Load the kinds of the directories below ``root``, each in a precision.

    Return the logits, on the last stage, and the tensors that are not exported as they are in the directory.
    """
    found = {}
    for kind, precision in models_to_load:
        sizes = {**LAYOUTS[layout][0]} | ({"etp": 1} if kind in UNCUT_EXPERTS else {})
        sequence_parallel = "tp" in sizes and kind in (*EXPERTS, "qwen3")  # experts must
        _, model, rules, tensors = hf_models.read(root / kind)
        with pytest.MonkeyPatch.context() as patch:
            # Latent attention under TP is refused for its gradients; its forward is right, and converted alike.
            patch.setattr(architecture, "refuse_known_faults", lambda config, **_: None)
            cuts, optimizer = models.parallel(**sizes, sp=sequence_parallel), OptimizerConfig(precision=precision)
            chunks, grid = models.build(model, cuts, optimizer=optimizer)
        hf_models.fill(chunks, rules, tensors)
        logits = logits_through_the_pipeline(chunks, grid, SEQUENCES)
        found[kind, precision] = logits, changed_by_export(chunks, grid, rules, tensors, precision)
    return found


def changed_by_export(
    chunks: Sequence[torch.nn.Module],
    grid: RankGrid,
    rules: Sequence[Rule],
    tensors: Mapping[str, Tensor],
    precision: str,
) -> list[str]:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
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


class Comparison:
    """Every kind's directory and transformers' logits, and those of each layout, all made when first asked for.

    ``chosen`` are the cases (layout, kind, precision) that will be asked for.  A layout's
    ranks load all of its cases at once.
    """

    def __init__(self, root: Path, ranks: Any, chosen: Collection[tuple[str, str, str]]) -> None:
        self.root, self.ranks, self.chosen = root, ranks, chosen

    @functools.cached_property
    def expected(self) -> dict[str, dict[str, Tensor]]:
        """Return transformers' logits in float32 (``fp32``) for ``kind``, and those of weights rounded to bf16.

        The rounded weights give logits in float32 (``rounded``) and in bf16 (``bf16``).
        """
        found = {}
        in_bf16 = {kind for _, kind, precision in self.chosen if precision == "bf16"}
        for kind in sorted({kind for _, kind, _ in self.chosen}):
            model = hf_models.write(kind, self.root / kind)
            found[kind] = {"fp32": hf_models.hf_logits(model, SEQUENCES)}
            if kind in in_bf16:
                found[kind]["bf16"] = hf_models.hf_logits(_rounded(kind, model), SEQUENCES)
                found[kind]["rounded"] = hf_models.hf_logits(model.float(), SEQUENCES)
        return found

    @functools.cache  # noqa: B019  (lives as long as the tests of this file)
    def loaded(self, layout: str) -> list[dict[tuple[str, str], tuple[Tensor | None, list[str]]]]:
        """Return what every rank holds of each (kind, precision)."""
        assert self.expected
        _, world_size, kinds = LAYOUTS[layout]
        pairs = [(kind, precision) for kind in kinds for precision in PRECISIONS]
        wanted = [pair for pair in pairs if (layout, *pair) in self.chosen]
        found: list[dict[tuple[str, str], Any]] = [{} for _ in range(world_size)]
        for uncut in (False, True):  # process groups of other sizes need ranks of their own
            alike = [pair for pair in wanted if (pair[0] in UNCUT_EXPERTS) == uncut]
            if alike:
                arguments = self.root, layout, alike
                ranks = self.ranks.run(load, *arguments, world_size=world_size, timeout=300)
                for mine, more in zip(found, ranks, strict=True):
                    mine.update(more)
        return found

    def of(self, layout: str, kind: str, precision: str) -> tuple[Tensor, list[str]]:
        """Return the logits ``[ranks, tokens, vocabulary]`` of every rank of the last stage, and the changed tensors.

        Ranks that compute the same rows do so on memory of their own, so their bits may differ.
        """
        per_rank = [rank[kind, precision] for rank in self.loaded(layout)]
        logits = torch.stack([logits for logits, _ in per_rank if logits is not None])
        return logits, [name for _, changed in per_rank for name in changed]


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
def comparison(request, ranks, tmp_path_factory) -> Comparison:
    """Made for the cases of this session: in make test few of them are left."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    chosen = {(call["layout"], call["kind"], call["precision"]) for call in (item.callspec.params for item in items)}
    return Comparison(tmp_path_factory.mktemp("hf"), ranks, chosen)


@combinations(
    layout=list(LAYOUTS),
    kind=KINDS,
    precision=PRECISIONS,
    valid=is_compared,
    quick={"layout": ["TP2", "PP2xVPP2", "CP2", "EP2"], "kind": QUICK},
    strength=1,
)
def test_logits_are_those_of_transformers_and_the_live_model_is_exported_as_it_came(
    comparison, layout, kind, precision
):
    """In bf16 the logits are as near to exact ones as those of transformers, in the median of the farthest rank.

    A mean would count the few tokens whose rounded router chooses another expert.
    """
    expected = comparison.expected[kind]
    logits, changed = comparison.of(layout, kind, precision)
    assert expected["fp32"].std() > 1
    if precision == "fp32":
        assert (logits - expected["fp32"]).abs().max() <= hf_models.logits_bound(kind)
    else:
        mine = (logits - expected["rounded"]).abs().flatten(1).median(dim=1).values.max()
        assert 0 < mine <= 1.3 * (expected["bf16"] - expected["rounded"]).abs().median()
    assert changed == []
