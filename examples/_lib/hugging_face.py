# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A Hugging Face directory as transformers loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load(hf: Path) -> tuple[Any, Any]:
    """Return the tokenizer and the model as transformers loads them, in float32 like the run on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    return AutoTokenizer.from_pretrained(hf), AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
