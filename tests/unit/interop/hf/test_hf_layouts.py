# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Compare the logits of a converted Hugging Face model in any layout with transformers', in float32 and bf16.

The tensors of an export from the layout equal the original tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hf_models
import models
import pytest
import torch
from layout_logits import logits_through_the_pipeline
from tiers import combinations
from torch import Tensor

from megatron_selfdistill.config import OptimizerConfig, ParallelConfig
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.interop.conversion import hf_to_megatron
from megatron_selfdistill.interop.export import Exporter
from megatron_selfdistill.interop.hf.rules import Rule
from megatron_selfdistill.model import architecture

KINDS = list(hf_models.CONFIGS)
EXPERTS = tuple(kind for kind, (_, arguments) in hf_models.CONFIGS.items() if "num_experts_per_tok" in arguments)
ROTATED = ("qwen3", "llama_linear", "qwen3_yarn", "glm4_moe")
UNCUT_EXPERTS = ("gpt_oss",)  # with biases
"""One kind for each form of the rotary positions, which context parallelism cuts."""
# Each a multiple of 4 for CP2, so that their total is even for sequence parallelism; longer than YaRN's first length.
SEQUENCES = [
    torch.randint(hf_models.VOCAB_SIZE, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (24, 40)
]


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    expert: int = 1
    expert_tensor: int | None = None
    context: int = 1

    def parallel(self, kind: str) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            virtual_pipeline_model_parallel_size=self.virtual,
            expert_model_parallel_size=self.expert,
            expert_tensor_parallel_size=1 if kind in UNCUT_EXPERTS else self.expert_tensor,
            context_parallel_size=self.context,
            sequence_parallel=self.tensor > 1 and kind in (*EXPERTS, "qwen3"),  # experts must
        )


LAYOUTS = {
    "TP1": (Layout(), 1, KINDS),
    "TP2": (Layout(tensor=2), 2, KINDS),
    "PP2xVPP2": (Layout(pipeline=2, virtual=2), 2, KINDS),
    "TP2xPP2": (Layout(tensor=2, pipeline=2), 4, KINDS),
    "CP2": (Layout(context=2), 2, ROTATED),
    "EP2": (Layout(expert=2), 2, EXPERTS),
    "EP2xPP2": (Layout(expert=2, pipeline=2), 4, EXPERTS),
    "TP2xEP2": (Layout(tensor=2, expert=2), 4, EXPERTS),
    "TP2xEP2, ETP1": (Layout(tensor=2, expert=2, expert_tensor=1), 2, EXPERTS),
}
PRECISIONS = ("fp32", "bf16")
FORMS = (
    *("llama2", "qwen2", "qwen3_yarn", "mistral_window", "phi3", "deepseek_v3", "glm4_moe", "qwen2_moe", "olmoe"),
    *("qwen3_next", "gpt_oss"),
)
"""Kinds that are cut in different ways; test_hf_mapping.py compares every kind on one rank."""
CUT_ONCE = ("TP1", "TP2", "PP2xVPP2", "CP2", "EP2")
"""Layouts that cut along one axis, in which every kind is compared; those of two axes compare each of `FORMS`."""


def is_compared(layout: str, kind: str, precision: str = "fp32") -> bool:
    """Return whether a test loads the kind in the layout.

    The precision does not change how a kind is cut, so every kind has bf16 on one rank, and each of `FORMS` in a cut.
    """
    if kind not in LAYOUTS[layout][2]:
        return False
    if precision == "bf16":
        return layout == "TP1" or (kind in FORMS and layout == ("EP2" if kind in EXPERTS else "TP2"))
    return layout in CUT_ONCE or kind in FORMS


def in_layouts(
    *layouts: str, quick: Sequence[str], kinds: Sequence[str] = KINDS, **axes: Sequence[str]
) -> pytest.MarkDecorator:
    """Parametrize over the families and layouts that are compared: each value once in make test, then all pairs."""
    return combinations(
        layout=layouts, kind=KINDS, **axes, valid=is_compared, quick={"layout": quick, "kind": kinds}, strength=1
    )


in_every_layout = in_layouts(*LAYOUTS, quick=["TP2", "PP2xVPP2", "CP2", "EP2"], kinds=FORMS, precision=PRECISIONS)


@dataclass(frozen=True)
class Loaded:
    """A converted model on one rank."""

    logits: Tensor | None
    """``[tokens, vocabulary]`` float32, on the last stage."""
    changed: list[str]
    """Tensors that are not exported as they are in the directory."""


def load(
    root: Path, layout: Layout, models_to_load: Sequence[tuple[str, str]], how: str = "by rules"
) -> dict[tuple[str, str], Loaded]:
    """Load the families of the directories below ``root``, each in a precision.

    ``how``: ``by rules`` or ``from checkpoint`` (as `hf_to_megatron` wrote it).
    """
    from megatron_selfdistill.checkpoint.external import load_weights

    found = {}
    for kind, precision in models_to_load:
        directory = root / kind
        _, model, rules, tensors = hf_models.read(directory)
        with pytest.MonkeyPatch.context() as patch:
            # Latent attention under TP is refused for its gradients; its forward is right, and converted alike.
            patch.setattr(architecture, "refuse_known_faults", lambda config, **_: None)
            optimizer = OptimizerConfig(precision=precision)
            chunks, grid = models.build(model, layout.parallel(kind), optimizer=optimizer)
        if how == "from checkpoint":
            load_weights(directory / "megatron", chunks, model.vocab_size)
        else:
            hf_models.fill(chunks, rules, tensors)
        logits = logits_through_the_pipeline(chunks, grid, SEQUENCES)
        found[kind, precision] = Loaded(logits, changed_by_export(chunks, grid, rules, tensors, precision))
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

    ``chosen`` are the cases (layout, kind, precision, how) that will be asked for.  A layout's ranks load all of its
    cases at once.
    """

    def __init__(self, root: Path, ranks: Any, chosen: Collection[tuple[str, str, str, str]]) -> None:
        self.root, self.ranks, self.chosen = root, ranks, chosen

    @functools.cached_property
    def expected(self) -> dict[str, dict[str, Tensor]]:
        """Return transformers' logits in float32 (``fp32``) for ``kind``, and those of weights rounded to bf16.

        The rounded weights give logits in float32 (``rounded``) and in bf16 (``bf16``).
        """
        found = {}
        in_bf16 = {kind for _, kind, precision, _ in self.chosen if precision == "bf16"}
        for kind in sorted({kind for _, kind, _, _ in self.chosen}):
            model = hf_models.write(kind, self.root / kind)
            found[kind] = {"fp32": hf_models.hf_logits(model, SEQUENCES)}
            if kind not in in_bf16:
                continue
            found[kind]["bf16"] = hf_models.hf_logits(_rounded(kind, model), SEQUENCES)
            found[kind]["rounded"] = hf_models.hf_logits(model.float(), SEQUENCES)
        return found

    @functools.cache  # noqa: B019  (lives as long as the tests of this file)
    def loaded(self, layout: str, how: str = "by rules") -> list[dict[tuple[str, str], Loaded]]:
        """Return what every rank holds of each (kind, precision)."""
        assert self.expected
        cut, world_size, kinds = LAYOUTS[layout]
        pairs = [(kind, precision) for kind in kinds for precision in PRECISIONS]
        wanted = [pair for pair in pairs if (layout, *pair, how) in self.chosen]
        if how == "from checkpoint":
            for kind, _ in wanted:
                if not (self.root / kind / "megatron").exists():
                    hf_to_megatron(self.root / kind, self.root / kind / "megatron")
        found: list[dict[tuple[str, str], Loaded]] = [{} for _ in range(world_size)]
        for uncut in (False, True):  # process groups of other sizes need ranks of their own
            alike = [pair for pair in wanted if (pair[0] in UNCUT_EXPERTS) == uncut]
            if alike:
                ranks = self.ranks.run(load, self.root, cut, alike, how, world_size=world_size, timeout=300)
                for mine, more in zip(found, ranks, strict=True):
                    mine.update(more)
        return found

    def logits(self, layout: str, kind: str, precision: str = "fp32", how: str = "by rules") -> Tensor:
        """Return the logits ``[ranks, tokens, vocabulary]`` of every rank of the last stage.

        Ranks that compute the same rows do so on memory of their own, so their bits may differ.
        """
        per_rank = [rank[kind, precision].logits for rank in self.loaded(layout, how)]
        return torch.stack([logits for logits in per_rank if logits is not None])

    def changed(self, layout: str, kind: str, precision: str = "fp32", how: str = "by rules") -> list[str]:
        return [name for rank in self.loaded(layout, how) for name in rank[kind, precision].changed]

    def difference(self, layout: str, kind: str, how: str = "by rules") -> float:
        """Return the largest distance of any rank from transformers, in float32."""
        return float((self.logits(layout, kind, how=how) - self.expected[kind]["fp32"]).abs().max())

    def bf16_errors(self, layout: str, kind: str) -> tuple[float, float]:
        """Return the median distances of this layout and of transformers from float32 arithmetic on the bf16 weights.

        A mean would count the few tokens whose rounded router chooses another expert.  Of the ranks, the farthest
        counts.
        """
        exact = self.expected[kind]["rounded"]
        mine = (self.logits(layout, kind, "bf16") - exact).abs().flatten(1).median(dim=1).values
        return float(mine.max()), float((self.expected[kind]["bf16"] - exact).abs().median())


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
    calls = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    chosen = {
        (
            call["layout"],
            call["kind"],
            call.get("precision", "fp32"),
            "by rules" if "precision" in call else "from checkpoint",
        )
        for call in calls
        if "kind" in call
    }
    return Comparison(tmp_path_factory.mktemp("hf"), ranks, chosen)


@in_every_layout
def test_logits_are_those_of_transformers(comparison, layout, kind, precision):
    """In float32; in bf16 they are as near to exact ones as those of transformers."""
    assert comparison.expected[kind]["fp32"].std() > 1
    if precision == "fp32":
        assert comparison.difference(layout, kind) <= hf_models.logits_bound(kind)
    else:
        mine, theirs = comparison.bf16_errors(layout, kind)
        assert 0 < mine <= 1.3 * theirs


@in_every_layout
def test_the_live_model_is_exported_as_it_came(comparison, layout, kind, precision):
    assert comparison.changed(layout, kind, precision) == []


@in_layouts("TP2xPP2", "TP2xEP2, ETP1", quick=["TP2xEP2, ETP1"], kinds=["deepseek_v3"])
def test_the_written_checkpoint_loads_in_any_layout_and_leaves_it_as_it_came(comparison, layout, kind):
    assert comparison.difference(layout, kind, "from checkpoint") <= hf_models.logits_bound(kind)
    assert comparison.changed(layout, kind, how="from checkpoint") == []
