# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Measure how far vLLM's log-probs are from the trainer's, with adapters and with weights that the adapters changed.

    python tools/benchmarks/adapter_error.py                                    in an environment with vLLM

The model is a random Llama with adapters, whose product has ``--size`` times the norm of each weight.  Its weights are
bfloat16 numbers.  vLLM samples three times: with the factors beside the weights, with weights into which the factors
were merged, again as bfloat16 numbers, and with neither.  The trainer's model, with its adapters, scores the tokens.
With ``--precision fp32`` both sides compute in float32, so that the rounding of activations hides nothing.

The KL divergence from sampler to trainer is estimated, in nats per token, by the mean of r - 1 - log r, r = p / mu
(http://joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measuring_parser import measuring_parser

from megatron_selfdistill.distributed.terminal import silence_known_warnings

MAX_LENGTH = 512


def main() -> None:
    """Sample with vLLM in each of the three ways and print the table."""
    arguments = _parser().parse_args()
    silence_known_warnings()
    torch.set_num_threads(1)
    from megatron_selfdistill.config import ParallelConfig
    from megatron_selfdistill.distributed import ranks

    grid = ranks.initialize(ParallelConfig(), seed=0)
    found = _measure(arguments, grid)
    print(_table(found, arguments, grid.device))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), **found}, indent=2))
    ranks.shutdown()


def _measure(arguments: argparse.Namespace, grid: Any) -> dict[str, dict[str, float]]:
    """Return KL and largest difference of log-probs by the way in which the engine has the adapters."""
    from random_llama import RandomLlama

    from megatron_selfdistill.config import ParallelConfig, RolloutConfig
    from megatron_selfdistill.config.schema.adapter_config import AdapterConfig

    adapter = AdapterConfig(rank=arguments.adapter_rank)
    llama = RandomLlama.of(
        ParallelConfig(),
        grid,
        arguments.vocab,
        precision=arguments.precision,
        num_layers=arguments.layers,
        hidden_size=arguments.hidden,
        num_query_groups=max(arguments.hidden // 256, 1),
    )
    chunks = llama.chunks(adapter)
    _sharpen(chunks)
    _set_size(chunks, arguments.size)
    rollout = RolloutConfig(engine="vllm", kv_cache_gb=0.2)
    sampler = llama.colocated_sampler(chunks, rollout, MAX_LENGTH, adapter)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(arguments.vocab, (arguments.responses, 16), generator=generator).tolist()
    found = {}
    try:
        sampler.update_weights(0)
        found["factors beside the weights"] = _compared(sampler, prompts, arguments.tokens, chunks, grid)
        sampler._engine._adapter = None  # from here on requests name no adapter
        found["neither"] = _compared(sampler, prompts, arguments.tokens, chunks, grid)
        with _merged(chunks):
            sampler._engine.load((pair for bucket in sampler._weights.stream() for pair in bucket), 1)
        found["factors merged into the weights"] = _compared(sampler, prompts, arguments.tokens, chunks, grid)
    finally:
        sampler.close()
    return found


def _compared(
    sampler: Any, prompts: Sequence[list[int]], count: int, chunks: Sequence[Any], grid: Any
) -> dict[str, float]:
    """Return what the engine's samples say about its distance from ``chunks``."""
    from megatron_selfdistill.engines.vllm.engine import EngineRequest

    sampling = {"max_tokens": count, "ignore_eos": True, "logprobs": 0, "detokenize": False}
    requests = [EngineRequest(prompt, {**sampling, "seed": seed}) for seed, prompt in enumerate(prompts)]
    differences = []
    for prompt, output in zip(prompts, sampler._engine.generate(requests), strict=True):
        own = _trainer_log_probs(chunks[0], grid, prompt, output.token_ids)
        differences.append(own - torch.tensor(output.log_probs, dtype=torch.float64))
    log_r = torch.cat(differences)
    return {
        "kl": float((log_r.expm1() - log_r).mean()),
        "max_abs": float(log_r.abs().max()),
        "tokens": log_r.numel(),
    }


@torch.no_grad()
def _trainer_log_probs(chunk: Any, grid: Any, prompt: list[int], response: list[int]) -> Tensor:
    """Return the model's log-probs [n] float64 of a response, computed as in training."""
    from megatron_selfdistill.data.packed_batch import Microbatch
    from megatron_selfdistill.model import forward
    from megatron_selfdistill.model.forward import unwrapped

    tokens = torch.tensor([*prompt, *response])
    total = tokens.numel()
    batch = Microbatch(
        tokens=tokens,
        position_ids=torch.arange(total),
        cu_seqlens=torch.tensor([0, total], dtype=torch.int32),
        padding_mask=torch.zeros(total, dtype=torch.bool),
        response_positions=torch.arange(total),
        response_ids=torch.arange(total),
        num_sequences=1,
    )
    inputs = forward.inputs_of(batch, grid)
    hidden = forward.states_at(forward.hidden_states(chunk, inputs, grid), torch.arange(total), grid)
    logits = forward.project(unwrapped(chunk), hidden).double()[len(prompt) - 1 : -1].cpu()
    return logits.log_softmax(-1).gather(-1, tokens[len(prompt) :, None])[:, 0]


@torch.no_grad()
def _sharpen(chunks: Sequence[torch.nn.Module]) -> None:
    """Make the random weights as large as those of trained models, so that a few tokens have most probability."""
    for name, parameter in ((n, p) for chunk in chunks for n, p in chunk.named_parameters()):
        if parameter.dim() == 2 and "_adapter." not in name:
            gain = 1.0 if "embedding" in name else (2.0 if "output_layer" in name else 1.0) / parameter.shape[1] ** 0.5
            torch.nn.init.normal_(parameter, std=gain)
            parameter.copy_(parameter.bfloat16())


@torch.no_grad()
def _set_size(chunks: Sequence[torch.nn.Module], size: float) -> None:
    """Give each adapter a random B with which its product has ``size`` times the norm of its weight."""
    for weight, adapter in _adapted(chunks):
        torch.nn.init.normal_(adapter.b)
        product = adapter.scale * adapter.b.float() @ adapter.a.float()
        adapter.b.mul_(size * weight.float().norm() / product.norm())


@contextmanager
def _merged(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Add the products of the adapters to the weights, as bfloat16 numbers, while the context lasts."""
    kept = []
    with torch.no_grad():
        for weight, adapter in _adapted(chunks):
            kept.append((weight, weight.detach().clone()))
            weight.copy_((weight.float() + adapter.scale * adapter.b.float() @ adapter.a.float()).bfloat16())
        yield
        for weight, before in kept:
            weight.copy_(before)


def _adapted(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[Tensor, Any]]:
    from megatron_selfdistill.adapters import ADAPTER_SUFFIX
    from megatron_selfdistill.adapters.low_rank_adapters import LowRankAdapter

    for chunk in chunks:
        parameters = dict(chunk.named_parameters())
        for name, module in chunk.named_modules():
            if isinstance(module, LowRankAdapter):
                yield parameters[f"{name.removesuffix(ADAPTER_SUFFIX)}.weight"], module


def _table(found: dict[str, dict[str, float]], arguments: argparse.Namespace, device: torch.device) -> str:
    return "\n".join(
        [
            f"{arguments.layers} layers of {arguments.hidden}, vocabulary {arguments.vocab}, {arguments.precision}, "
            f"rank {arguments.adapter_rank}, change of {arguments.size:g} of the weights; {device.type}",
            "",
            "| vLLM has | tokens | KL, nats per token | largest difference of log-probs |",
            "|---|---|---|---|",
            *(f"| {name} | {f['tokens']:.0f} | {f['kl']:.2e} | {f['max_abs']:.1e} |" for name, f in found.items()),
        ]
    )


def _parser() -> argparse.ArgumentParser:
    sizes = {"layers": 4, "hidden": 512, "vocab": 8192, "adapter-rank": 16, "responses": 32, "tokens": 64}
    parser = measuring_parser(__doc__, sizes)
    parser.add_argument("--size", type=float, default=1e-3, help="norm of an adapter's product to its weight's")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of all products")
    return parser


if __name__ == "__main__":
    main()
