# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The step of docs/your_trainer.md runs as it stands, and it learns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "your_trainer.md"


class Letters:
    """A tokenizer of one token per character, with a chat template of one message."""

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> dict[str, list[int]]:
        """Return the ids of the only message and of the generation prompt."""
        return {"input_ids": [*(ord(character) % 61 for character in messages[0]["content"]), 62]}


@pytest.mark.full
def test_the_step_of_the_page_moves_the_student_towards_its_hinted_self():
    from transformers import LlamaConfig, LlamaForCausalLM  # which takes a second in each process that collects tests

    page: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(code, page)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, vocab_size=64, max_position_embeddings=256, initializer_range=0.3)
    model, frozen = LlamaForCausalLM(config), LlamaForCausalLM(config).eval()
    frozen.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    problems = [{"question": f"{n} + {n}?", "hint": f"{2 * n}"} for n in range(3)]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert page["step"](model, frozen, Letters(), problems, optimizer, max_new_tokens=6) > 0
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    # With the same responses in every step the divergence must fall.
    responses = torch.randint(0, 60, (1, 6))
    model.generate = lambda ids, **options: torch.cat([ids, responses], 1)
    losses = [page["step"](model, frozen, Letters(), problems, optimizer) for _ in range(25)]
    assert losses[-1] < 0.3 * losses[0]
    spoken, hints = responses.tolist() * 3, [it["hint"] for it in problems]
    plain, teacher = (
        page["response_logits"](frozen, page["prompts_of"](Letters(), problems, shown), spoken).detach()
        for shown in (None, hints)
    )
    assert page["loss_with_controls"](plain, teacher, frozen, Letters(), problems, spoken, hints, num_controls=2) > 0
