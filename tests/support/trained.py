# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The trained model of tests with real vLLM servers: its config.json, its requests, and its text from transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import torch

from megatron_selfdistill.interop.export import Exporter
from megatron_selfdistill.interop.hf.mapping import family_of_model
from megatron_selfdistill.rollout.base import Request, SamplingParams
from megatron_selfdistill.rollout.sampling import sample_seed

# On a CPU, vLLM's attention supports heads of 32 channels and no smaller heads.  The model is tied, so that the output
# layer, which vLLM packs on a CPU, arrives under the name of the embedding.
MODEL = models.model_config("tied", hidden_size=64, num_attention_heads=2, num_query_groups=2)
FAMILY = family_of_model(MODEL)
MAX_LENGTH = 256
GREEDY = SamplingParams(max_new_tokens=24, temperature=0.0)
DRAWN = SamplingParams(max_new_tokens=150)


@dataclass(frozen=True)
class Reach:
    """The addresses of servers, and the token that they accept."""

    addresses: list[str]
    token: str
    hf_config: Path


def write_config(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    architecture = {"architectures": [FAMILY.architecture]}
    (directory / "config.json").write_text(json.dumps({**architecture, **FAMILY.hf_config(MODEL, "float32")}))
    return directory


def requests(count: int, longest: int = 150) -> list[Request]:
    """Return two requests for each prompt; the longest prompts fill a block of vLLM's prefix cache."""
    generator = torch.Generator().manual_seed(5)
    lengths = [longest if i % 3 == 2 else 4 + i for i in range(count // 2)]
    prompts = [torch.randint(models.VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    return [Request(prompts[i // 2], sample_seed(3, 0, f"problem {i // 2}", i % 2)) for i in range(count)]


def greedy_by_transformers(prompts: list[list[int]], count: int, seed: int) -> list[tuple[list[int], list[float]]]:
    """Return, on one rank, greedy tokens and log-probs from transformers, for `MODEL` with the weights of ``seed``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    chunks, grid = models.build(MODEL, models.parallel(), seed=seed)
    stream = Exporter(chunks, grid, FAMILY.rules(MODEL)).stream()
    tensors = {name: tensor for bucket in stream for name, tensor in bucket}
    hf_config: dict[str, Any] = FAMILY.hf_config(MODEL, "float32")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config)).eval()
    model.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    return [_greedy(model, prompt, count) for prompt in prompts]


@torch.no_grad()
def _greedy(model: torch.nn.Module, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    tokens, log_probs = list(prompt), []
    for _ in range(count):
        row = model(torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)
        first, second = row.topk(2).values.tolist()
        assert first - second > 1e-4, "too close to a tie to tell engines apart from rounding"
        tokens.append(int(row.argmax()))
        log_probs.append(row.max().item())
    return tokens[len(prompt) :], log_probs
