# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""One rank of Megatron-LM itself, on the CPU; test_megatron_lm.py starts it with RANK, WORLD_SIZE and so on set.

    megatron_lm_worker.py MEGATRON_LM WHAT OUT [flags of pretrain_gpt.py ...]

``megatron.training``, ``gpt_builders.py`` and ``pretrain_gpt.py`` come from the directory MEGATRON_LM, and run as they
are.  The process provides only what the machine lacks: CUDA's names (`megatron_selfdistill.compat.cpu`), the repairs of
Megatron Core without Transformer Engine, compiled extensions, and the package ``six``, which a BERT tokenizer imports.
"""

from __future__ import annotations

import enum
import os
import runpy
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_selfdistill.compat import cpu, repairs  # noqa: F401  isort: skip  (must come before megatron.core)


def expose(megatron_lm: Path) -> None:
    """Make Megatron-LM importable, and let it believe in a CUDA device."""
    sys.path.append(str(megatron_lm))
    sys.modules.setdefault("six", types.ModuleType("six"))
    torch.cuda.is_available = lambda: True  # after `cpu.install` has replaced what is behind the name
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(major=9, minor=0, name="none")
    from megatron.core.datasets import utils
    from megatron.legacy import fused_kernels

    fused_kernels.load = lambda args: None  # it compiles CUDA kernels of the older models
    utils.compile_helpers = lambda: None  # the wheel of Megatron Core has them compiled, and no makefile


def name_layers_as_transformer_engine_does() -> None:
    """Let Megatron-LM's local layer spec use the keys of Transformer Engine's, which no CPU runs."""
    from megatron.core.models.gpt import gpt_layer_specs

    from megatron_selfdistill.compat.older_megatron import submodules_of
    from megatron_selfdistill.model.layers import CoreAttention

    local_spec = gpt_layer_specs.get_gpt_layer_local_spec

    def named_spec(*args: Any, **kwargs: Any) -> Any:
        spec = local_spec(*args, **kwargs)
        layer = spec.submodules
        keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
        if hasattr(layer.self_attention.submodules, "kv_layernorm"):  # multi-latent attention
            keys = {
                "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
                "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
            }
            layer.self_attention.submodules.core_attention = CoreAttention  # Megatron's wants values as wide as keys
        if not hasattr(submodules_of(layer.mlp), "experts"):
            keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        layer.sharded_state_dict_keys_map = keys
        return spec

    gpt_layer_specs.get_gpt_layer_local_spec = named_spec


def build() -> tuple[Any, Any, Any]:
    """Return model chunks, optimizer and scheduler as ``pretrain`` builds them; the checkpoint of --load is in them."""
    from gpt_builders import gpt_builder
    from megatron.core.enums import ModelType
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import setup_model_and_optimizer
    from model_provider import model_provider

    initialize_megatron()
    return setup_model_and_optimizer(partial(model_provider, gpt_builder), ModelType.encoder_or_decoder)


def logits(tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits ``[sequence, padded vocabulary]`` of ``tokens [sequence]``, float32."""
    chunks, _, _ = build()
    chunks[0].eval()
    positions = torch.arange(len(tokens))
    mask = torch.ones(len(tokens), len(tokens)).triu(1).bool()[None, None]
    with torch.no_grad():
        return chunks[0](tokens[None], positions[None], mask)[0].float()


def parsed(lines: list[list[str]]) -> list[dict[str, Any]]:
    """Return what Megatron-LM's own parser makes of each argument vector."""
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    found = [vars(parser.parse_args(line)) for line in lines]
    return [{name: value for name, value in args.items() if not isinstance(value, enum.Enum)} for args in found]


def state() -> dict[str, Any]:
    """Return what Megatron-LM holds after it loaded a run's checkpoint."""
    import random

    import numpy as np
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.training import get_args

    chunks, optimizer, scheduler = build()
    inner = [single.optimizer for single in getattr(optimizer, "chained_optimizers", [optimizer])]
    moments = {
        f"{index}.{key}": held[key].clone()
        for one in inner
        for index, held in enumerate(one.state.values())
        for key in ("exp_avg", "exp_avg_sq")
    }
    counted = [held["step"] for one in inner for held in one.state.values() if "step" in held]
    counted += [group["step"] for one in inner for group in one.param_groups if "step" in group]
    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(()).item()
    return {
        "iteration": get_args().iteration,
        "scheduler_steps": scheduler.num_steps,
        "adam_steps": [int(count) for count in counted],
        "weights": {name: p.detach().clone() for name, p in chunks[0].named_parameters()},
        "moments": moments,
        "drawn": [random.random(), float(np.random.random()), torch.rand(()).item(), tracked],
    }


def main() -> None:
    megatron_lm, what, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    expose(megatron_lm)
    name_layers_as_transformer_engine_does()
    sys.argv = [str(megatron_lm / "pretrain_gpt.py"), *sys.argv[4:]]
    if what == "pretrain":
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    given = torch.load(out) if out.exists() else None
    result = {"logits": logits, "parsed": parsed}[what](given) if given is not None else state()
    if os.environ["RANK"] == "0":
        torch.save(result, out)


if __name__ == "__main__":
    main()
