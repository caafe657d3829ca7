# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Stage: the first loss of a run in fp8 through Transformer Engine.

python -m tests.gpu.fp8_stage
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from functools import partial
from pathlib import Path

import tiny_run

from tests.gpu.results import Figure, Outcome, all_held
from tests.gpu.runner import launched


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="selfdistill_fp8_", ignore_cleanup_errors=True) as directory:
        tiny_run.write_data(Path(directory))
        return all_held({"fp8 through Transformer Engine": partial(fp8, Path(directory))})


def fp8(directory: Path) -> Outcome:
    """Compare the first loss of a run in fp8, which is refused unless asked for, with that of a run in bf16."""
    if importlib.util.find_spec("transformer_engine") is None:
        return Outcome(not_done="Transformer Engine, which has the fp8 layers, is not installed")
    from megatron_selfdistill.metrics.run_log import read_metrics

    losses = {}
    for name, keys in {"bf16": [], "fp8": ["+model.transformer.fp8=hybrid"]}.items():
        sizes = ["model.hidden_size=256", "model.ffn_hidden_size=512", "model.num_attention_heads=4"]
        sizes += ["model.num_query_groups=2", "model.max_position_embeddings=128", "num_steps=2", *keys]
        arguments = tiny_run.overrides(directory, directory / name, *sizes)
        arguments = [argument for argument in arguments if argument != "optimizer=fp32"]
        done = launched(["-m", "megatron_selfdistill.train", *arguments], 1)
        if done.returncode:
            raise RuntimeError(f"the run in {name} ended with {done.returncode}; see its output above")
        losses[name] = next(iter(read_metrics(directory / name)))["loss/mean"]
    off = abs(losses["fp8"] - losses["bf16"]) / losses["bf16"]
    return Outcome((Figure("first loss in fp8 against bf16, relative", off, 0.1),))


if __name__ == "__main__":
    sys.exit(main())
