# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""An unknown architecture is refused with the nearest known one and what differs; the page lists all known ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_selfdistill.commands.convert import main
from megatron_selfdistill.errors import ConfigError
from megatron_selfdistill.model.hf.mapping import FAMILIES, Family, family_of

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("model_type", "architecture", "nearest"),
    [
        ("gemma2", "Gemma2ForCausalLM", r"attn_logit_softcapping=50.0, final_logit_softcapping=30.0, "),
        ("gemma3_text", "Gemma3ForCausalLM", "hidden_activation="),
        ("cohere", "CohereForCausalLM", "layer_norm_eps=1e-05, logit_scale=0.0625 "),
        ("olmo2", "Olmo2ForCausalLM", "its tensors or its code, not its fields "),
        ("deepseek_v2", "DeepseekV2ForCausalLM", r"what DeepseekV3ForCausalLM refuses \(.* has topk_method='greedy': "),
        ("apertus", "ApertusForCausalLM", r"what \w+ refuses \(.* has hidden_act='xielu': only silu"),
    ],
)
def test_an_unknown_architecture_is_compared_with_the_nearest_known_one(model_type, architecture, nearest):
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type).to_dict() | {"architectures": [architecture]}
    why = r" \(its layers have norms behind attention and MLP, .*\)" if architecture.startswith("Gemma") else ""
    message = (
        rf"config.json has {architecture}, which is not known here{why}: the nearest is \w+, from which it differs"
    )
    with pytest.raises(ConfigError, match=message + f" in .*{nearest}.*convert --list` shows what converts"):
        family_of(config)


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("GraniteForCausalLM", "multiplies embeddings, residual branches and logits by constants"),
        ("Ernie4_5_MoeForCausalLM", "softmax probabilities with biases"),
        ("BailingMoeV2ForCausalLM", "transformers has no class for it"),
        ("DeepseekV32ForCausalLM", "computes its sparse attention with a CUDA extension alone"),
        ("GlmMoeDsaForCausalLM", "computes its sparse attention with a CUDA extension alone"),
        ("Qwen3_5ForConditionalGeneration", "only its text model is known: load it with transformers'"),
        ("Qwen3_5MoeForConditionalGeneration", "only its text model is known: load it with transformers'"),
    ],
)
def test_an_architecture_that_is_often_asked_for_is_refused_with_the_reason(architecture, why):
    with pytest.raises(ConfigError, match=rf"has {architecture}, which is not known here \(.*{why}"):
        family_of({"architectures": [architecture]})


def test_experts_are_a_difference():
    dense = {"architectures": ["NewForCausalLM"], "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes = {"vocab_size": 9, "intermediate_size": 8, "max_position_embeddings": 8, "rms_norm_eps": 1e-6}
    assert not has_experts(nearest_to(dense | sizes))
    assert has_experts(nearest_to(dense | sizes | {"num_experts": 4}))


def nearest_to(config: dict[str, Any]) -> Family:
    with pytest.raises(ConfigError) as error:
        family_of(config)
    return FAMILIES[str(error.value).partition("the nearest is ")[2].partition(",")[0]]


def has_experts(family: Family) -> bool:
    return any("expert" in name for name in family.defaults)


def test_the_page_and_the_command_list_what_converts(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    page = (REPOSITORY / "docs" / "conversion.md").read_text(encoding="utf-8")
    table = page.partition("| architectures in config.json | models | what is required |\n|---|---|---|\n")[2]
    rows = [f"| `{family.architecture}` | {family.models} | {family.limits} |" for family in FAMILIES.values()]
    assert table.partition("\n\n")[0].splitlines() == rows
    with pytest.raises(SystemExit, match="0"):
        main(["--list"])
    heading, *listed = capsys.readouterr().out.splitlines()
    assert heading.split() == "architectures in config.json models what is required".split()
    for line, family in zip(listed, FAMILIES.values(), strict=True):
        assert line.split() == f"{family.architecture} {family.models} {family.limits}".replace("`", "").split()
        assert family.models and family.limits
